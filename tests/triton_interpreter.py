"""Triton's interpreter for tests, twice as fast."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from triton.runtime import interpreter


def patch_language_once() -> None:
    """The interpreter replaces triton.language's functions by its own again in each call of a function, even in a
    kernel's, which already has them. In a process that only interprets, once for each function is enough."""
    patch: Callable[..., Any] = interpreter._patch_lang
    # returns what undoes a patch: here an empty one, so that the patch stays
    interpreter._patch_lang = functools.cache(lambda function: type(patch(function))())
