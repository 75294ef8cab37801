"""A seeded answer depends on the request alone: its prompt, its params and its seed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.contract.engines import SmallEngine, SmallModels, kinds_of, number_of, prompts_of

LOOK = "Look at worker/noise.py and worker/sampler.py::draw: a seeded row's noise is a function of (seed, position)."
FEW_TOKENS = {token_id: 30.0 for token_id in range(60, 66)}  # answers that repeat themselves: drafts are accepted
PROMPT = next(prompts_of(1, seed=5))
SUBJECTS: list[dict[str, Any]] = [
    {"seed": 11, "temperature": 1.0},
    {"seed": 11, "temperature": 0.7, "top_p": 0.8, "presence_penalty": 0.5},
    {"seed": 12, "temperature": 1.0, "top_p": 0.95, "frequency_penalty": 0.4, "repetition_penalty": 1.2, "top_k": 40},
    {"seed": 13, "temperature": 1.0, "logit_bias": FEW_TOKENS},
    {"seed": 14, "temperature": 0.9, "top_p": 0.9, "logit_bias": FEW_TOKENS, "frequency_penalty": 0.2},
]
NUM_TOKENS = 14


def add_subjects(engine: SmallEngine) -> None:
    for number, fields in enumerate(SUBJECTS):
        engine.add(f"subject {number}", PROMPT, max_tokens=NUM_TOKENS, **fields)


def add_others(engine: SmallEngine, seed: int = 0) -> None:
    """Greedy, unseeded and seeded requests: the second kind draws from the worker's own random state."""
    for number, prompt in enumerate(prompts_of(9, seed)):
        fields = [{}, {"temperature": 1.0}, {"temperature": 1.0, "seed": 11, "top_p": 0.9}][number % 3]
        engine.add(f"other {seed} {number}", prompt, max_tokens=5 + number, **fields)


# Ways to ask. Each gets an engine and asks the subjects; a way says what must have happened for it to prove anything.


def alone(engine: SmallEngine) -> None:
    for number, fields in enumerate(SUBJECTS):
        engine.add(f"subject {number}", PROMPT, max_tokens=NUM_TOKENS, **fields)
        engine.finish()


def in_a_batch(engine: SmallEngine) -> None:
    add_others(engine)
    engine.finish(lambda step: add_subjects(engine) if step == 2 else step < 2)


def after_the_same_prompt(engine: SmallEngine) -> None:
    """From part 7 on its blocks are found in the cache."""
    engine.generate(PROMPT)
    add_subjects(engine)
    engine.finish()
    if number_of(engine.part) >= 7 and engine.config.enable_prefix_caching:
        found = [engine.answers[f"subject {number}"].num_cached_tokens for number in range(len(SUBJECTS))]
        assert min(found) > 0, f"{engine.part}: this test needs prefix hits, got {found}"  # type: ignore[type-var]


WAYS: dict[str, tuple[Callable[[SmallEngine], None], dict[str, Any]]] = {
    "alone": (alone, {}),
    "in a batch": (in_a_batch, {}),
    "in a batch, in a small pool": (in_a_batch, {"num_kv_blocks": 1 + 14}),
    "after the same prompt": (after_the_same_prompt, {}),
}


@functools.cache
def seeded_answers(part: str, models: SmallModels) -> list[list[int]]:
    """What each subject gets alone."""
    engine = SmallEngine(part, models, max_num_seqs=8)
    alone(engine)
    expected = [engine.answers[f"subject {number}"].token_ids for number in range(len(SUBJECTS))]
    assert len({tuple(tokens) for tokens in expected}) == len(SUBJECTS), f"subjects must differ, got {expected}"
    return expected


@pytest.mark.since(3)
def test_a_seeded_answer_depends_on_nothing_else(part: str, small_models: SmallModels) -> None:
    """Alone and in a batch, after preemption, sync and async, in chunks, from cached blocks, with every proposer."""
    preempted, num_accepted = set[str](), dict[str, int]()
    kinds = kinds_of(part, small_models)
    for kind in kinds.keys() & {"a draft model, small chunks"}:  # so that draft tokens are accepted there as well
        kinds[kind]["speculative_model"] = small_models.target
    for kind, flags in kinds.items():
        expected = seeded_answers(part, small_models.of(flags))
        for way, (ask, way_flags) in WAYS.items():
            torch.manual_seed(0)  # for the unseeded others: how many drafts are accepted depends on them
            engine = SmallEngine(part, small_models, **{"max_num_seqs": 8, **flags, **way_flags})
            ask(engine)
            for number, want in enumerate(expected):
                got = engine.answers[f"subject {number}"].token_ids
                assert got == want, (
                    f"{part}, {kind}, {way}: {SUBJECTS[number]} expects what it gets alone, {want}, got {got}. {LOOK}"
                )
            preempted |= {name for name in engine.preempted if name.startswith("subject")}
            if "speculative_method" in flags:
                stats = engine.core.speculation.stats
                num_accepted[kind] = num_accepted.get(kind, 0) + stats.num_accepted_tokens
    assert len(preempted) > 2, f"{part}: this test needs subjects that are preempted, got {preempted}"
    assert all(num_accepted.values()), f"{part}: this test needs accepted draft tokens, got {num_accepted}"


@pytest.mark.since(3)
def test_unseeded_answers_differ(part: str, small_models: SmallModels) -> None:
    """Without a seed two answers to one prompt share no noise, not even in one batch."""
    engine = SmallEngine(part, small_models)
    for name in "ab":
        engine.add(name, PROMPT, max_tokens=NUM_TOKENS, temperature=1.5)
    answers = [answer.token_ids for answer in engine.finish().values()]
    assert answers[0] != answers[1], f"{part}: two unseeded requests got the same answer, {answers[0]}. {LOOK}"
