"""The shipped model is loaded once; each engine over it has a pool, a scheduler and counters of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from common.checkpoint import Checkpoint, load_tokenizer, resolve_checkpoint
from part04_continuous_batching import llm as llm_module
from part04_continuous_batching.api import async_engine
from part04_continuous_batching.config import EngineConfig
from part04_continuous_batching.core.engine import LLMEngine
from part04_continuous_batching.llm import LLM
from part04_continuous_batching.messages import EngineCoreOutput
from part04_continuous_batching.worker import worker
from part04_continuous_batching.worker.model import DecoderModel
from tests.shipped_model import make_engine, prompt_of, reference  # noqa: F401 - fixtures

torch.set_num_threads(1)  # for models this small a second thread only waits; on a busy machine it waits long


def checked_step(engine: LLMEngine) -> list[EngineCoreOutput]:
    """LLMEngine.step, but an engine that would never come to an end says so at once."""
    ended = [request.request_id for request in engine.scheduler.running if request.status.is_finished]
    assert not ended, (
        f"requests {ended} have ended and are still among the running: a request that ends leaves at once. "
        'Look at core/engine.py::LLMEngine._append; README "One number for all work".'
    )
    return LLMEngine.step(engine)


@pytest.fixture(scope="session")
def make_config() -> Iterator[Callable[..., EngineConfig]]:
    """EngineConfig for the shipped model, which is loaded once for all engines: float32, on the CPU."""
    checkpoint = resolve_checkpoint("tiny")
    load_decoder, tokenizer = worker.load_decoder, load_tokenizer(checkpoint)
    decoder = load_decoder(checkpoint, torch.float32, "cpu")

    def load(other: Checkpoint, *rest: Any) -> DecoderModel:
        return decoder if other == checkpoint else load_decoder(other, *rest)  # the suite's other tests load others

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "load_decoder", load)
        for module in (llm_module, async_engine):
            patch.setattr(module, "load_tokenizer", lambda *_: tokenizer)
        yield lambda **flags: EngineConfig(**{"model": "tiny", "device": "cpu", "num_kv_blocks": 200, **flags})


@pytest.fixture(scope="session")
def make_llm(make_config: Callable[..., EngineConfig]) -> Callable[..., LLM]:
    """An LLM over the shipped model; flags are EngineConfig's."""

    def make(**flags: Any) -> LLM:
        llm = LLM(make_config(**flags))
        llm.engine.step = functools.partial(checked_step, llm.engine)  # type: ignore[method-assign]
        return llm

    return make


@pytest.fixture(scope="session")
def llm(make_llm: Callable[..., LLM]) -> LLM:
    """One with room for everything, to ask for what a request gets alone."""
    return make_llm()
