"""The shipped model is loaded once; each engine over it has a pool, a scheduler and counters of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from common.checkpoint import load_tokenizer, resolve_checkpoint
from common.outputs import CompletionOutput
from part04_continuous_batching.config import EngineConfig
from part04_continuous_batching.core import engine as engine_module
from part04_continuous_batching.core.engine import LLM, LLMEngine
from part04_continuous_batching.worker import model_runner
from tests.shipped_model import make_engine, prompt_of, reference  # noqa: F401 - fixtures

torch.set_num_threads(1)  # for models this small a second thread only waits; on a busy machine it waits long


def checked_step(engine: LLMEngine) -> list[tuple[str, CompletionOutput]]:
    """LLMEngine.step, but an engine that would never come to an end says so at once."""
    ended = [request.request_id for request in engine.scheduler.running if request.status.is_finished]
    assert not ended, (
        f"requests {ended} have ended and are still among the running: who ends leaves at once. "
        'Look at core/engine.py::LLMEngine._update; README "One number for all work".'
    )
    return LLMEngine.step(engine)


@pytest.fixture(scope="session")
def make_llm() -> Iterator[Callable[..., LLM]]:
    """An LLM over the shipped model, in float32 on the CPU; flags are EngineConfig's."""
    checkpoint = resolve_checkpoint("tiny")
    decoder = model_runner.load_decoder(checkpoint, torch.float32, "cpu")
    tokenizer = load_tokenizer(checkpoint)

    def make(**flags: Any) -> LLM:
        llm = LLM(EngineConfig(**{"model": "tiny", "device": "cpu", "num_kv_blocks": 200, **flags}))
        llm.engine.step = functools.partial(checked_step, llm.engine)  # type: ignore[method-assign]
        return llm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_runner, "load_decoder", lambda *_: decoder)
        patch.setattr(engine_module, "load_tokenizer", lambda *_: tokenizer)
        yield make


@pytest.fixture(scope="session")
def llm(make_llm: Callable[..., LLM]) -> LLM:
    """One with room for everything, to ask for what a request gets alone."""
    return make_llm()
