"""The shipped model is loaded once; each engine over it has a pool, a scheduler and counters of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from common.checkpoint import MODELS_DIR, load_model, load_tokenizer, resolve_checkpoint
from common.testing import small_model
from part08_speculative_decoding import engine as engine_module
from part08_speculative_decoding import model_runner
from part08_speculative_decoding.config import EngineConfig
from part08_speculative_decoding.engine import LLM, LLMEngine
from tests.part08.scripted import take_step, watch

torch.set_num_threads(1)  # for models this small a second thread only waits; on a busy machine it waits long


@pytest.fixture(scope="session")
def make_llm() -> Iterator[Callable[..., LLM]]:
    """An LLM over the shipped model, in float32 on the CPU; flags are EngineConfig's."""
    checkpoint, draft = resolve_checkpoint("tiny"), resolve_checkpoint("tiny-draft")
    load_decoder = model_runner.load_decoder
    decoders = {each.name: load_decoder(each, torch.float32, "cpu") for each in (checkpoint, draft)}
    tokenizer = load_tokenizer(checkpoint)

    def make(**flags: Any) -> LLM:
        llm = LLM(EngineConfig(**{"model": "tiny", "device": "cpu", "num_kv_blocks": 200, **flags}))
        watch(llm.engine.scheduler)
        llm.engine.step = functools.partial(take_step, llm.engine)  # type: ignore[method-assign]
        return llm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            model_runner, "load_decoder", lambda other, *rest: decoders.get(other.name) or load_decoder(other, *rest)
        )
        patch.setattr(engine_module, "load_tokenizer", lambda _: tokenizer)
        yield make


@pytest.fixture(scope="session")
def make_engine(make_llm: Callable[..., LLM]) -> Callable[..., LLMEngine]:
    """The engine inside of it."""
    return lambda **flags: make_llm(**flags).engine


@pytest.fixture(scope="session")
def llm(make_llm: Callable[..., LLM]) -> LLM:
    """One with room for everything that waits for each step, to ask for what a request gets alone."""
    return make_llm(async_scheduling=False)


@pytest.fixture(scope="session")
def reference() -> Any:
    """The shipped model as transformers computes it."""
    return load_model(resolve_checkpoint("tiny"), torch.float32, "cpu")


@pytest.fixture(scope="session")
def prompt_of(llm: LLM) -> Callable[..., list[int]]:
    """prompt_of(length, number=0): so many tokens of a story, from another place for each number."""
    story = (
        "One fine day, Nora went to the market and bought a basket of apples. She met a fox on the way home. "
        "The fox was hungry, so Nora gave it an apple, and they became friends. Every morning the fox came to "
        "the old mill and waited for her. When winter came, the river froze, and nobody could cross the bridge. "
        "Then the fox showed her a path through the forest that only animals knew. "
    )
    tokens = llm.tokenizer.encode(story * 3)

    @functools.cache
    def cut(length: int, number: int) -> tuple[int, ...]:
        start = number * 11 % 90
        assert start + length <= len(tokens), f"the story has {len(tokens)} tokens, {start} + {length} are wanted"
        return tuple(tokens[start : start + length])

    return lambda length, number=0: list(cut(length, number))


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
