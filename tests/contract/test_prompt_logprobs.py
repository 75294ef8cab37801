"""How likely the tokens of a prompt are: one number a token, whatever became of the prompt's steps."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from tests.contract.engines import Answer, SmallEngine, SmallModels, kinds_of, number_of, prompts_of

LOOK = "Look at worker/prompt_logprobs.py, and at Request.add_prompt_logprobs and take_prompt_logprobs."
LOOK_CACHE = "Look at core/scheduler.py::_schedule_waiting: a hit skips the logits that were asked for."
PROMPTS = list(prompts_of(8, seed=3, longest=30))
NUM_TOP = [0, 2, 20, None]  # of prompt number i: NUM_TOP[i % 4]


@functools.cache
def expected_logprobs(models: SmallModels, prompt: tuple[int, ...]) -> tuple[np.ndarray, list[int]]:
    """[len(prompt) - 1, vocab_size]: row i is what the model thinks of the token at position i + 1; and the ranks of
    the prompt's tokens."""
    with torch.inference_mode():
        rows = models.reference(torch.tensor([prompt])).logits[0, :-1].log_softmax(dim=-1)
    own = rows.gather(1, torch.tensor(prompt[1:])[:, None])
    return rows.numpy(), ((rows > own).sum(dim=1) + 1).tolist()


def check(where: str, models: SmallModels, prompt: list[int], num_top: int | None, answer: Answer) -> None:
    if num_top is None:
        assert answer.prompt_logprobs == [], f"{where}: nothing was asked for, got {answer.prompt_logprobs}. {LOOK}"
        return
    assert len(answer.prompt_logprobs) == 1, (
        f"{where}: they come once, with the first token; they came {len(answer.prompt_logprobs)} times. {LOOK}"
    )
    [got] = answer.prompt_logprobs
    assert len(got) == len(prompt), f"{where}: {len(prompt)} tokens, but {len(got)} entries. {LOOK}"
    assert got[0] is None, f"{where}: nothing predicts the first token, expected None for it, got {got[0]}. {LOOK}"
    rows, ranks = expected_logprobs(models, tuple(prompt))
    for position, (token, entry, row, rank) in enumerate(zip(prompt[1:], got[1:], rows, ranks, strict=True), start=1):
        place = f"{where}, position {position} of {len(prompt)}"
        assert next(iter(entry)) == token, f"{place}: the prompt's token {token} comes first, got {entry}. {LOOK}"
        distance = abs(entry[token].logprob - float(row[token]))
        assert distance < 1e-4, f"{place}: expected {float(row[token]):.5f}, got {entry[token]}. {LOOK}"
        assert entry[token].rank == rank, f"{place}: expected rank {rank}, got {entry[token]}. {LOOK}"
        top = [(other, found) for other, found in entry.items() if found.rank <= num_top]
        assert len(top) == num_top, f"{place}: the {num_top} likeliest were asked for, got {top}. {LOOK}"
        assert all(abs(found.logprob - float(row[other])) < 1e-4 for other, found in top), f"{place}: {top}. {LOOK}"


def ask(engine: SmallEngine, prefix: str, **fields: Any) -> None:
    for number, prompt in enumerate(PROMPTS):
        engine.add(f"{prefix}{number}", prompt, prompt_logprobs=NUM_TOP[number % 4], **fields)


@pytest.mark.since(3)
@pytest.mark.parametrize("flags", [{}, {"num_kv_blocks": 1 + 13}, {"max_num_seqs": 2}], ids=str)
def test_they_are_the_models_own(part: str, small_models: SmallModels, flags: dict[str, Any]) -> None:
    """In a batch, in chunks, behind cached blocks, after preemption, beside drafts; and no answer changes by them."""
    preempted, hits = set[str](), list[int | None]()
    for kind, kind_flags in kinds_of(part, small_models).items():
        engine = SmallEngine(part, small_models, **{"max_num_seqs": 8, **kind_flags, **flags})
        models = small_models.of(kind_flags)
        where = f"{part}, {kind}, {flags}"
        for prefix in ("first ", "again "):
            ask(engine, prefix, max_tokens=9)
            for name, answer in engine.finish().items():
                number = int(name.split()[1])
                check(f"{where}, {name}", models, PROMPTS[number], NUM_TOP[number % 4], answer)
                expected = models.greedy(PROMPTS[number], 9)
                assert answer.token_ids == expected, (
                    f"{where}, {name}: expected the answer {expected}, got {answer.token_ids}. {LOOK}"
                )
        engine.check_empty(LOOK)
        preempted |= engine.preempted
        for name, answer in engine.answers.items():
            if NUM_TOP[int(name.split()[1]) % 4] is not None:
                assert not answer.num_cached_tokens, f"{where}, {name}: {answer.num_cached_tokens} hits. {LOOK_CACHE}"
            hits.append(answer.num_cached_tokens)
    if "num_kv_blocks" in flags:
        assert preempted, f"{part}, {flags}: this test needs requests that are preempted"
    if number_of(part) >= 7 and not flags:
        assert any(hits), f"{part}: this test needs prefix hits of requests that ask for nothing, got {hits}"


@pytest.mark.since(3)
def test_a_prompt_of_one_token_has_none(part: str, small_models: SmallModels) -> None:
    engine = SmallEngine(part, small_models)
    engine.add("a", [5], prompt_logprobs=3)
    assert engine.finish()["a"].prompt_logprobs == [[None]], f"{part}: {engine.answers['a']}. {LOOK}"


@pytest.mark.since(3)
def test_the_logits_of_a_long_prompt_are_computed_piece_by_piece(part: str, small_models: SmallModels) -> None:
    """A row of logits is as wide as the vocabulary: for a whole prompt they would take memory that is not there."""
    engine = SmallEngine(part, small_models, max_num_seqs=4)
    model, sizes = engine.worker.model, list[int]()
    compute_logits = model.compute_logits

    def counted(hidden: torch.Tensor) -> torch.Tensor:
        sizes.append(len(hidden))
        return compute_logits(hidden)

    with mock.patch.object(model, "compute_logits", counted):
        engine.add("a", PROMPTS[0], prompt_logprobs=1, max_tokens=1)
        engine.finish()
    assert max(sizes) <= 4, f"{part}: at most max_num_seqs=4 rows at a time, got {sizes}. {LOOK}"
    check(part, small_models, PROMPTS[0], 1, engine.answers["a"])
