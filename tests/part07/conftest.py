"""Part 7's engines over the shipped model, which is loaded once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from common.testing import small_model
from part07_prefix_caching.llm import LLM
from tests.part07.scripted import checks
from tests.shipped_model import llm, loaded_once, make_engine, prompt_of, reference  # noqa: F401 - fixtures


@pytest.fixture(scope="session")
def make_llm() -> Iterator[Callable[..., LLM]]:
    """An LLM over the shipped model, in float32 on the CPU; flags are EngineConfig's."""
    with loaded_once(checks, "tiny") as make:
        yield make


@pytest.fixture(scope="session")
def small_reference() -> Callable[[str], Any]:
    """A small random model of a family, as transformers computes it."""
    return functools.cache(lambda family: small_model(family, seed=3))
