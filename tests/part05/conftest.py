"""Part 5's engines over the shipped model, which is loaded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from part05_async_scheduling.llm import LLM
from tests.part05.scripted import checks
from tests.shipped_model import llm, loaded_once, make_engine, prompt_of, reference  # noqa: F401 - fixtures


@pytest.fixture(scope="session")
def make_llm() -> Iterator[Callable[..., LLM]]:
    """An LLM over the shipped model, in float32 on the CPU; flags are EngineConfig's."""
    with loaded_once(checks, "tiny") as make:
        yield make
