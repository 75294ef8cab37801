"""`sample`: greedy, temperature, top-k, top-p, and draws that a seed makes reproducible."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from common.sampling_params import SamplingParams
from part01_simple_server.server import LLM, sample

LOOK = 'Look at server.py::sample; README "Choosing a token".'
LOGITS = torch.tensor([1.5, -0.5, 2.0, 0.0, 1.0, -3.0, 0.5, 2.5])  # likeliest first: 7, 2, 0, 4, 6, 3, 1, 5


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def changed(params: SamplingParams) -> dict[str, Any]:
    """The fields that differ from their defaults."""
    default = SamplingParams()
    return {
        field.name: value
        for field in fields(params)
        if (value := getattr(params, field.name)) != getattr(default, field.name)
    }


def draw_one(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    try:
        got = sample(logits.clone(), params, generator)
    except NotImplementedError:  # the exercise is not done yet
        raise
    except RuntimeError as error:
        pytest.fail(f"{changed(params)}: expected a token id, got {error!r}. Is a token left to draw? {LOOK}")
    assert isinstance(got, int), f"{changed(params)}: expected an int, got {type(got).__name__}. {LOOK}"
    return got


def draw(logits: Tensor, params: SamplingParams, count: int, seed: int = 0) -> Counter[int]:
    generator = seeded(seed)
    return Counter(draw_one(logits, params, generator) for _ in range(count))


def support(logits: Tensor, params: SamplingParams) -> set[int]:
    """The tokens that come up in 300 draws. Those of the tests are likely enough to be seen."""
    return set(draw(logits, params, 300))


def exact_probabilities(logits: list[float], params: SamplingParams) -> list[float]:
    """By hand, in double precision: temperature, then top-k, then top-p over what is left."""
    weights = {i: math.exp(value / params.temperature) for i, value in enumerate(logits)}
    ranked = sorted(weights, key=weights.__getitem__, reverse=True)[: params.top_k or None]
    total, kept, mass = sum(weights[i] for i in ranked), [], 0.0
    for i in ranked:
        if mass >= params.top_p:
            break
        kept.append(i)
        mass += weights[i] / total
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        pytest.param(SamplingParams(temperature=0.7, top_k=5), marks=pytest.mark.slow),
        pytest.param(SamplingParams(temperature=1.6, top_p=0.8), marks=pytest.mark.slow),
        pytest.param(SamplingParams(temperature=1.3, top_k=6, top_p=0.9), marks=pytest.mark.slow),
    ],
    ids=["plain", "temperature, top-k", "temperature, top-p", "all three"],
)
def test_draws_follow_the_distribution(params: SamplingParams) -> None:
    count = 8_000
    expected, drawn = exact_probabilities(LOGITS.tolist(), params), draw(LOGITS, params, count)
    for token, probability in enumerate(expected):
        sigma = math.sqrt(count * probability * (1 - probability))
        assert abs(drawn[token] - count * probability) <= 5 * sigma, (
            f"{changed(params)}, token {token} (probability {probability:.4f}) in {count} draws: expected "
            f"{count * probability:.0f} give or take {5 * sigma:.0f}, got {drawn[token]}. {LOOK}"
        )


@pytest.mark.parametrize("params", [{}, {"top_k": 3}, {"top_p": 0.5}, {"seed": 1}])
def test_temperature_0_is_greedy(params: dict) -> None:
    generator = seeded(0)
    before = generator.get_state()
    got = sample(LOGITS.clone(), SamplingParams(temperature=0, **params), generator)
    assert got == 7, f"temperature 0 with {params}: expected the likeliest token, 7, got {got}. {LOOK}"
    assert isinstance(got, int), f"expected an int, got {type(got).__name__}. {LOOK}"
    assert torch.equal(generator.get_state(), before), f"greedy needs no random numbers, but drew some. {LOOK}"


@pytest.mark.parametrize("temperature", [1e-50, 1e-6, 1e-5, 0.01])
def test_a_tiny_temperature_is_as_good_as_greedy(temperature: float) -> None:
    got = support(LOGITS, SamplingParams(temperature=temperature))
    assert got == {7}, f"temperature {temperature}: expected only the likeliest token, 7, got {got}. {LOOK}"


def test_a_high_temperature_flattens() -> None:
    drawn = draw(LOGITS, SamplingParams(temperature=100), 4_000)
    counts = [drawn[token] for token in range(8)]
    assert min(counts) > 400, (
        f"temperature 100 makes 8 tokens about equally likely: expected each in some 500 of 4000 draws, got {counts}. "
        f"{LOOK}"
    )


@pytest.mark.parametrize(
    ("top_k", "expected"),
    [(1, {7}), (2, {7, 2}), (3, {7, 2, 0}), (8, set(range(8))), (9, set(range(8))), (0, set(range(8)))],
)
def test_top_k(top_k: int, expected: set[int]) -> None:
    got = support(LOGITS, SamplingParams(temperature=4.0, top_k=top_k))
    assert got == expected, f"top_k={top_k} of 8 tokens: expected draws from {expected}, got {got}. {LOOK}"


def test_top_k_beyond_any_vocabulary() -> None:
    got = support(LOGITS, SamplingParams(temperature=4.0, top_k=10**30))
    assert got == set(range(8)), f"top_k=10**30 keeps all 8 tokens, got {got}. {LOOK}"


def test_top_k_with_a_tie_at_its_edge() -> None:
    got = support(torch.tensor([3.0, 2.0, 2.0, 1.9]), SamplingParams(top_k=2))
    assert {0} < got <= {0, 1, 2}, (
        f"logits 3, 2, 2, 1.9 with top_k=2: expected token 0 and one or both of 1 and 2, never 3; got {got}. {LOOK}"
    )


@pytest.mark.parametrize(
    ("top_p", "expected"), [(0.2, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.51, 3), (0.75, 3), (0.76, 4), (1.0, 4)]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, expected: int) -> None:
    got = len(support(torch.zeros(4), SamplingParams(top_p=top_p)))  # 4 tokens of probability 1/4, exactly
    assert got == expected, f"4 equal tokens, top_p={top_p}: expected {expected} of them kept, got {got}. {LOOK}"


@pytest.mark.parametrize("top_p", [1e-50, 1e-12, 0.001, 0.3])
def test_top_p_always_keeps_the_likeliest(top_p: float) -> None:
    got = support(LOGITS, SamplingParams(top_p=top_p))
    assert got == {7}, (
        f"top_p={top_p}, the likeliest token alone reaches it: expected draws from {{7}}, got {got}. {LOOK}"
    )


def test_top_p_counts_the_mass_of_the_likeliest_not_of_the_first() -> None:
    logits = torch.tensor([0.1, 0.1, 0.2, 0.6]).log()
    got = support(logits, SamplingParams(top_p=0.7))
    assert got == {3, 2}, f"probabilities .1 .1 .2 .6, top_p=0.7: expected tokens 3 and 2, got {got}. {LOOK}"


def test_order_is_temperature_then_top_k_then_top_p() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    got = support(logits, SamplingParams(top_k=2, top_p=0.5))
    assert got == {0}, (
        "probabilities .4 .3 .2 .1: top_k=2 leaves .57 and .43, of which top_p=0.5 keeps the first alone; "
        f"expected {{0}}, got {got}. Top-p must see what top-k left. {LOOK}"
    )
    got = support(logits, SamplingParams(temperature=0.5, top_p=0.5))
    assert got == {0}, (
        "temperature 0.5 makes the probabilities .53 .30 .13 .03, of which top_p=0.5 keeps the first alone; "
        f"expected {{0}}, got {got}. Temperature comes first. {LOOK}"
    )


@pytest.mark.parametrize("params", [{}, {"temperature": 0}, {"top_k": 4}, {"top_p": 0.9999}, {"temperature": 100}])
def test_a_token_ruled_out_is_never_drawn(params: dict) -> None:
    logits = LOGITS.clone()
    logits[[7, 2, 1]] = -torch.inf  # as min_tokens does with stop tokens
    got = support(logits, SamplingParams(**params))
    wrong = got & {7, 2, 1}
    assert not wrong, f"{params}, tokens 7, 2 and 1 have a logit of -inf: expected none of them, got {wrong}. {LOOK}"


def test_logits_are_left_alone() -> None:
    logits = LOGITS.clone()
    sample(logits, SamplingParams(temperature=0.5, top_k=3, top_p=0.5), seeded(0))
    assert torch.equal(logits, LOGITS), (
        f"sample() must not change its argument: expected logits {LOGITS.tolist()}, got {logits.tolist()}. {LOOK}"
    )


def sequence(seed: int) -> list[int]:
    generator = seeded(seed)
    return [draw_one(LOGITS, SamplingParams(top_p=0.95), generator) for _ in range(40)]


def test_a_generator_makes_draws_reproducible() -> None:
    assert sequence(3) == sequence(3), f"the same seed twice drew different tokens. {LOOK}"
    assert sequence(3) != sequence(4), f"40 draws with seeds 3 and 4 are equal: the generator is not used. {LOOK}"


def test_a_generator_leaves_the_global_one_alone() -> None:
    torch.manual_seed(1)
    before, first = torch.get_rng_state(), sequence(3)
    assert torch.equal(torch.get_rng_state(), before), f"a seeded draw moved torch's global generator. {LOOK}"
    torch.manual_seed(2)
    assert sequence(3) == first, f"a seeded draw depends on torch's global generator. {LOOK}"


def ask(llm: LLM, seed: int | None) -> list[int]:
    params = SamplingParams(temperature=5.0, max_tokens=8, ignore_eos=True, seed=seed)
    return llm.generate([100, 101, 102], params).outputs[0].token_ids


def test_a_seeded_request_is_reproducible(llm: LLM) -> None:
    torch.manual_seed(1)
    before, first = torch.get_rng_state(), ask(llm, seed=7)
    where = 'Look at the generator in server.py::LLM.generate; README "Choosing a token".'
    assert torch.equal(torch.get_rng_state(), before), f"a seeded request moved torch's global generator. {where}"
    ask(llm, seed=None)
    assert ask(llm, seed=7) == first, f"seed 7 twice, with another request between: two different answers. {where}"
    assert ask(llm, seed=8) != first, f"seeds 7 and 8 gave one answer at temperature 5. {where}"


def test_unseeded_requests_differ(llm: LLM) -> None:
    torch.manual_seed(1)
    first, second = ask(llm, seed=None), ask(llm, seed=None)
    assert first != second, f"two unseeded requests at temperature 5 gave one answer, {first}. {LOOK}"
