"""The scripted engine of openai_fakes.py behind a server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from common.checkpoint import MODELS_DIR
from tests.common.openai_fakes import FakeEngine, Server, serving

__all__ = ["engine", "server", "tiny_tokenizer"]


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODELS_DIR / "tiny")


@pytest.fixture
def engine(tiny_tokenizer: PreTrainedTokenizerBase) -> FakeEngine:
    return FakeEngine(tiny_tokenizer)


@pytest.fixture
def server(engine: FakeEngine) -> Iterator[Server]:
    with serving(engine) as server:
        yield server
