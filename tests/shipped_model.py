"""Fixtures over the shipped model from part 4 on: it is loaded once; each engine over it has a pool, a scheduler and
counters of its own. A part's conftest.py imports them, and defines make_llm: loaded_once is for parts 5 and later."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from common.checkpoint import load_model, load_tokenizer, resolve_checkpoint
from tests.engine_checks import EngineChecks

TIE = 1e-4
torch.set_num_threads(1)  # for models this small a second thread only waits; on a busy machine it waits long


@contextlib.contextmanager
def loaded_once(checks: EngineChecks, *models: str) -> Iterator[Callable[..., Any]]:
    """An LLM of the part over the shipped model, in float32 on the CPU, every step of which is held to the checks;
    flags are EngineConfig's. models: all that are loaded only once."""
    part = checks.part
    load_decoder = part.worker.load_decoder
    decoders = [
        (checkpoint, load_decoder(checkpoint, torch.float32, "cpu")) for checkpoint in map(resolve_checkpoint, models)
    ]
    tokenizer = load_tokenizer(resolve_checkpoint("tiny"))

    def load(checkpoint: Any, *rest: Any) -> Any:
        known = next((decoder for other, decoder in decoders if other == checkpoint), None)
        return known or load_decoder(checkpoint, *rest)

    def make(**flags: Any) -> Any:
        config = part.config.EngineConfig(**{"model": "tiny", "device": "cpu", "num_kv_blocks": 200, **flags})
        llm = part.llm.LLM(config)
        checks.hold(llm.engine)
        return llm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part.worker, "load_decoder", load)
        patch.setattr(part.llm, "load_tokenizer", lambda _: tokenizer)
        yield make


@pytest.fixture(scope="session")
def make_engine(make_llm: Callable[..., Any]) -> Callable[..., Any]:
    """The engine inside of it."""
    return lambda **flags: make_llm(**flags).engine


@pytest.fixture(scope="session")
def llm(make_llm: Callable[..., Any]) -> Any:
    """One with room for everything that waits for each step, to ask for what a request gets alone."""
    return make_llm(async_scheduling=False)


@torch.inference_mode()
def check_ranks(model: Any, prompt: list[int], answer: Any, where: str) -> None:
    """The rank of each token that has a log probability, by transformers' logits over prompt and answer. Two tokens
    whose logits are closer than TIE may be in either order: that much depends on the batch."""
    logits = model(torch.tensor([[*prompt, *answer.token_ids]])).logits[0, len(prompt) - 1 : -1].float()
    for row, entry in zip(logits, answer.logprobs or [], strict=bool(answer.logprobs)):
        for token_id, logprob in entry.items():
            first, last = 1 + int((row > row[token_id] + TIE).sum()), int((row >= row[token_id] - TIE).sum())
            assert first <= logprob.rank <= last, (
                f"{where}: token {token_id}, expected a rank from {first} to {last}, got {logprob}."
            )


@pytest.fixture(scope="session")
def reference() -> Any:
    """The shipped model as transformers computes it."""
    return load_model(resolve_checkpoint("tiny"), torch.float32, "cpu")


@pytest.fixture(scope="session")
def prompt_of(llm: Any) -> Callable[..., list[int]]:
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
