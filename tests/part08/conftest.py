"""Part 8's engines over the shipped model, which is loaded once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from common.checkpoint import MODELS_DIR
from common.testing import small_model
from part08_speculative_decoding.llm import LLM
from tests.part08.scripted import checks
from tests.shipped_model import llm, loaded_once, make_engine, prompt_of, reference  # noqa: F401 - fixtures


@pytest.fixture(scope="session")
def make_llm() -> Iterator[Callable[..., LLM]]:
    """An LLM over the shipped model, in float32 on the CPU; flags are EngineConfig's."""
    with loaded_once(checks, "tiny", "tiny-draft") as make:
        yield make


@pytest.fixture(scope="session")
def small_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[str, Any]]:
    """A small random model of a family: its directory, and itself as transformers computes it."""

    @functools.cache
    def make(family: str, seed: int, vocab_size: int = 320) -> tuple[str, Any]:
        model, directory = small_model(family, seed, vocab_size), tmp_path_factory.mktemp(f"{family}-{seed}")
        model.save_pretrained(directory)
        (directory / "tokenizer.json").symlink_to(MODELS_DIR / "tiny" / "tokenizer.json")
        return str(directory), model

    return make
