"""worker/sampler.py: a whole batch is sampled as each row alone would be, and each row by the definition."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from common.outputs import Logprob
from common.sampling_params import SamplingParams
from part03_paged_attention.worker.model_runner import to_step_output
from part03_paged_attention.worker.sampler import (
    LogprobsTensors,
    Sampler,
    SamplerOutput,
    SamplingState,
    apply_penalties,
    draw,
    probabilities,
    to_logprobs,
    top_logprobs,
)

LOOK_PROBS = 'Look at worker/sampler.py::probabilities; README of part 1, "Choosing a token".'
LOOK_DRAW = 'Look at worker/sampler.py::draw; README of part 1, "Choosing a token".'
LOOK_CHANGE = (
    "Look at worker/sampler.py::apply_logit_bias, apply_penalties and hold_back_stop_tokens; "
    'README of part 1, "Choosing a token".'
)
LOOK_LOGPROBS = 'Look at worker/sampler.py::Sampler.sample and top_logprobs; README of part 1, "Choosing a token".'
LOOK_CHOOSE = 'Look at worker/sampler.py::choose; README of part 1, "Choosing a token".'
VOCAB_SIZE = 50
OTHERS_TOKEN = 13  # what the token buffer holds where it holds no token of a request
TINY = 1e-30  # what float32 may round to 0
EOS = frozenset({2, 3})


@dataclass
class Asked:
    """A request as the sampler meets it: its tokens so far, and how the next one is sampled."""

    prompt: Sequence[int]
    output: Sequence[int]
    params: SamplingParams


def asked(prompt: Sequence[int] = (7,), output: Sequence[int] = (), **fields: Any) -> Asked:
    return Asked(prompt, output, SamplingParams(**fields))


def states_of(requests: Sequence[Asked]) -> tuple[list[SamplingState], Tensor]:
    """What the model runner passes to the sampler: a state per request, and the token buffer. Rows are in another
    order than the batch, and hold tokens of earlier requests behind the request's own."""
    longest = max(len(request.prompt) + len(request.output) for request in requests)
    token_rows = torch.full((len(requests) + 3, longest + 4), OTHERS_TOKEN)
    states = []
    for number, request in enumerate(requests):
        row, tokens = len(requests) - number, [*request.prompt, *request.output]
        token_rows[row, : len(tokens)] = torch.tensor(tokens)
        states.append(SamplingState(request.params, row, len(request.prompt), len(tokens)))
    return states, token_rows


def states(*requests: Asked) -> list[SamplingState]:
    return states_of(requests)[0]


def sample(logits: Tensor, requests: Sequence[Asked]) -> SamplerOutput:
    return Sampler(EOS).sample(logits, *states_of(requests))


def sample_ids(logits: Tensor, requests: Sequence[Asked]) -> list[int]:
    return sample(logits, requests).token_ids.tolist()


def entry_of(tensors: LogprobsTensors, row: int, num_top: int) -> dict[int, Logprob]:
    return to_logprobs(*tensors.tolist()[row], num_top)


def batch_of(sampling: Sequence[SamplingState]) -> Any:
    """What to_step_output reads of a Batch."""
    return SimpleNamespace(sampling=list(sampling), prompt_spans=[])


def random_logits(num_rows: int, seed: int, vocab_size: int = VOCAB_SIZE) -> Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


# Temperature, min-p, top-k, top-p


def definition(logits: list[float], params: SamplingParams) -> list[float]:
    """Probabilities of one row after temperature, min-p, top-k and top-p, in plain Python; not normalized after top-p.

    Of equally likely tokens at the edge of top-p the first ones stay, which is one of the right answers.
    """
    scaled = [value / params.temperature for value in logits]
    scaled = [value if math.exp(value - max(scaled)) >= params.min_p else -math.inf for value in scaled]
    kth = sorted(scaled, reverse=True)[min(params.top_k or len(scaled), len(scaled)) - 1]
    weights = [math.exp(value - max(scaled)) if value >= kth else 0.0 for value in scaled]
    probs = [weight / sum(weights) for weight in weights]
    kept, mass = [0.0] * len(probs), 0.0
    for token_id in sorted(range(len(probs)), key=lambda token_id: -probs[token_id]):
        if mass < params.top_p or params.top_p == 1:
            kept[token_id] = probs[token_id]
        mass += probs[token_id]
    return kept


CHOICES: list[dict[str, Any]] = [
    dict(),
    dict(temperature=0.5),
    dict(temperature=5.0),
    dict(temperature=0.01),
    dict(top_k=1),
    dict(top_k=5),
    dict(top_k=VOCAB_SIZE - 1),
    dict(top_k=VOCAB_SIZE),
    dict(top_k=1_000),
    dict(top_p=0.9),
    dict(top_p=0.5),
    dict(top_p=1e-9),
    dict(top_p=0.999),
    dict(top_k=5, top_p=0.7),
    dict(temperature=2.0, top_k=20, top_p=0.8),
    dict(temperature=0.3, top_p=0.95),
    dict(min_p=0.05),
    dict(min_p=0.5),
    dict(min_p=1),
    dict(min_p=1e-9),
    dict(temperature=3.0, min_p=0.1),
    dict(temperature=2.0, min_p=0.02, top_k=6),
    dict(temperature=2.0, min_p=0.02, top_p=0.8),
]


@pytest.mark.parametrize("seed", range(4))
def test_a_batch_is_each_row_by_the_definition(seed: int) -> None:
    logits, requests = random_logits(len(CHOICES), seed), [asked(**fields) for fields in CHOICES]
    before = logits.clone()
    got = probabilities(logits, states(*requests))
    for row, (fields, request) in enumerate(zip(CHOICES, requests, strict=True)):
        expected = torch.tensor(definition(logits[row].tolist(), request.params))
        kept, wanted = ((probs > TINY).nonzero().flatten().tolist() for probs in (got[row], expected))
        assert kept == wanted, (
            f"{fields} in row {row} of a mixed batch: expected tokens {wanted}, got {kept}. {LOOK_PROBS}"
        )
        difference = float((got[row] - expected).abs().max())
        assert difference < 1e-5, f"{fields} in row {row}: probabilities are off by {difference:.2e}. {LOOK_PROBS}"
    assert torch.equal(logits, before), f"probabilities() changed the logits it was given. {LOOK_PROBS}"


@pytest.mark.parametrize("fields", CHOICES, ids=str)
def test_a_batch_of_one(fields: dict[str, Any]) -> None:
    logits, request = random_logits(1, 9), asked(**fields)
    got = probabilities(logits, states(request))[0]
    expected = torch.tensor(definition(logits[0].tolist(), request.params))
    assert torch.allclose(got, expected, atol=1e-5), f"{fields} alone: expected {expected}, got {got}. {LOOK_PROBS}"


@pytest.mark.parametrize("seed", range(4))
def test_ties(seed: int) -> None:
    """Equal logits everywhere. Top-k keeps all that equal the k-th; top-p as few as reach it, no matter which."""
    logits, requests = random_logits(len(CHOICES), seed).round(), [asked(**fields) for fields in CHOICES]
    got = probabilities(logits, states(*requests))
    for row, (fields, request) in enumerate(zip(CHOICES, requests, strict=True)):
        expected = definition(logits[row].tolist(), request.params)
        wanted = sorted((value for value in expected if value > TINY), reverse=True)
        kept = sorted((value for value in got[row].tolist() if value > TINY), reverse=True)
        assert kept == pytest.approx(wanted, abs=1e-5), (
            f"{fields}, logits with ties: expected {len(wanted)} tokens with {wanted}, got {len(kept)} with {kept}. "
            f"{LOOK_PROBS}"
        )
        least, left_out = min(kept), logits[row][got[row] == 0]
        if len(left_out):
            assert float(left_out.max()) <= float(logits[row][got[row] > 0].min()), (
                f"{fields}: a token was left out that is likelier than one that stayed with {least}. {LOOK_PROBS}"
            )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 2}, [2, 3]),
        ({"top_p": 0.3}, [3]),
        ({"top_p": 0.45}, [3]),
        ({"top_p": 0.46}, [2, 3]),
        ({"top_p": 0.7}, [2, 3]),
        ({"top_k": 2, "top_p": 0.59}, [3]),
        ({"top_k": 3, "top_p": 0.83}, [2, 3]),
        ({"top_k": 3, "top_p": 0.84}, [1, 2, 3]),
        ({"temperature": 0.2, "top_p": 0.8}, [3]),
        ({"top_p": 1e-9}, [3]),
        ({"min_p": 0.3}, [1, 2, 3]),
        ({"min_p": 0.5}, [2, 3]),
        ({"min_p": 0.7}, [3]),
        ({"min_p": 1}, [3]),
        ({"min_p": 0.3, "top_p": 0.8}, [2, 3]),
        ({"min_p": 0.3, "top_p": 0.84}, [1, 2, 3]),
        ({"min_p": 0.3, "temperature": 0.5}, [2, 3]),
        ({"min_p": 0.3, "temperature": 2.0}, [0, 1, 2, 3]),
    ],
    ids=str,
)
def test_which_tokens_stay_by_hand(fields: dict[str, Any], expected: list[int]) -> None:
    logits = torch.tensor([[0.1, 0.15, 0.3, 0.4500001]]).log()
    got = probabilities(logits, states(asked(**fields)))[0].nonzero().flatten().tolist()
    assert got == expected, (
        f"probabilities .1 .15 .3 .45, {fields}: expected tokens {expected}, got {got}. {LOOK_PROBS}"
    )


def test_top_p_that_is_reached_exactly() -> None:
    """Four tokens of 0.25 each: two of them reach 0.5, and the third is not needed."""
    got = probabilities(torch.zeros(1, 4), states(asked(top_p=0.5))).count_nonzero()
    assert int(got) == 2, f"probabilities .25 four times, top_p=0.5: expected 2 tokens, got {int(got)}. {LOOK_PROBS}"


def test_tokens_that_are_held_back_stay_so() -> None:
    logits = random_logits(3, 0)
    logits[:, :20] = -torch.inf
    got = probabilities(logits, states(asked(), asked(top_p=0.999), asked(top_k=40)))
    assert not got[:, :20].any() and not got.isnan().any(), (
        f"-inf must become a probability of 0, got {got}. {LOOK_PROBS}"
    )


# Greedy and drawn rows together


def test_greedy_and_drawn_rows() -> None:
    fields = [dict(temperature=0), dict(seed=1), dict(temperature=0, top_k=3), dict(top_k=1, seed=2), dict(seed=3)]
    logits = random_logits(5, 1)
    best = logits.argmax(dim=-1).tolist()
    drawn: list[set[int]] = [set() for _ in fields]
    for step in range(30):
        requests = [asked(output=[5] * step, **each) for each in fields]
        for row, token_id in enumerate(sample_ids(logits.clone(), requests)):
            drawn[row].add(token_id)
    for row in (0, 2, 3):
        assert drawn[row] == {best[row]}, f"{fields[row]}: expected always {best[row]}, got {drawn[row]}. {LOOK_CHOOSE}"
    for row in (1, 4):
        assert len(drawn[row]) > 3, f"{fields[row]}: 30 draws gave only {drawn[row]}. {LOOK_CHOOSE}"


def test_a_batch_that_is_all_greedy_draws_nothing() -> None:
    before = torch.get_rng_state()
    got = sample_ids(random_logits(4, 2), [asked(temperature=0)] * 4)
    assert got == random_logits(4, 2).argmax(dim=-1).tolist(), (
        f"expected the likeliest tokens, got {got}. {LOOK_CHOOSE}"
    )
    assert torch.equal(torch.get_rng_state(), before), (
        f"greedy requests drew from torch's global generator. {LOOK_CHOOSE}"
    )


# Seeds

SEEDED = dict(temperature=1.3, top_p=0.95)


def draws_of(seed: int, neighbors: list[dict[str, Any]], row: int, vocab_size: int, num_draws: int = 25) -> list[int]:
    """What a seeded request draws at a row of a batch; its logits differ from step to step."""
    others, drawn = [asked(**fields) for fields in neighbors], list[int]()
    for step in range(num_draws):
        requests = [*others[:row], asked(output=drawn, seed=seed, **SEEDED), *others[row:]]
        logits = random_logits(len(requests), 1_000 + step, vocab_size)
        logits[row] = random_logits(1, step, vocab_size)[0]
        drawn.append(sample_ids(logits, requests)[row])
    return drawn


@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE, 333])
def test_a_seed_draws_the_same_in_every_batch(vocab_size: int) -> None:
    alone = draws_of(7, [], 0, vocab_size)
    batches: list[tuple[list[dict[str, Any]], int]] = [
        ([{}], 0),
        ([{}], 1),
        ([{"temperature": 0}, {"seed": 7}, {"seed": 8}], 2),
        ([{"temperature": 0}] * 3, 1),
        ([{"top_k": 3}, {"top_p": 0.5}, {"seed": 1, "temperature": 3.0}, {}], 4),
    ]
    for neighbors, row in batches:
        torch.manual_seed(row)
        got = draws_of(7, neighbors, row, vocab_size)
        assert got == alone, f"seed 7 in row {row} beside {neighbors}: expected {alone}, got {got}. {LOOK_DRAW}"
    assert draws_of(8, [], 0, vocab_size) != alone, f"seeds 7 and 8 draw the same. {LOOK_DRAW}"


def test_a_seed_draws_the_same_in_other_rows_and_beside_others_each_step() -> None:
    expected, drawn, rng = draws_of(7, [], 0, VOCAB_SIZE), list[int](), random.Random(0)
    for step in range(25):
        row, num_rows = rng.randrange(4), 4
        logits = random_logits(num_rows, 500 + step)
        logits[row] = random_logits(1, step)[0]
        others = [asked(**rng.choice([{}, {"seed": step}, {"temperature": 0}])) for _ in range(3)]
        requests = [*others[:row], asked(output=drawn, seed=7, **SEEDED), *others[row:]]
        drawn.append(sample_ids(logits, requests)[row])
    assert drawn == expected, f"a seeded request in other rows each step: expected {expected}, got {drawn}. {LOOK_DRAW}"


def test_a_seeded_draw_can_be_repeated() -> None:
    """It depends on the seed and the position of the token, and on no state: as after a preemption."""
    logits, first = random_logits(1, 0, 333), list[int]()
    for length in (3, 4, 5, 4, 3):
        first += sample_ids(logits.clone(), [asked([7] * length, seed=5, temperature=5.0)])
    assert first[:2] == first[:2:-1] and len(set(first)) == 3, (
        f"one seed, positions 3, 4, 5, 4, 3: expected three tokens, then the second and the first again, got {first}. "
        f"{LOOK_DRAW}"
    )
    split = sample_ids(logits.clone(), [asked([7], [7] * 3, seed=5, temperature=5.0)])
    assert split == [first[1]], f"position 4 with an output of 3 tokens: expected {first[1]}, got {split}. {LOOK_DRAW}"


def test_unseeded_rows_draw_different_tokens() -> None:
    logits = random_logits(1, 3).repeat(2, 1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pairs = [sample_ids(logits.clone(), [asked(), asked()]) for _ in range(40)]
    assert any(one != other for one, other in pairs), f"two unseeded rows always drew the same: {pairs}. {LOOK_DRAW}"
    assert len(set(map(tuple, pairs))) > 5, f"40 unseeded draws gave only {set(map(tuple, pairs))}. {LOOK_DRAW}"


# The distribution


def chi_square(counts: Counter[int], expected: list[float], num_draws: int) -> float:
    total = sum(expected)
    return sum((counts[i] - num_draws * p / total) ** 2 / (num_draws * p / total) for i, p in enumerate(expected) if p)


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("fields", [{}, {"temperature": 2.0}, {"top_k": 4}, {"top_p": 0.8}], ids=str)
def test_draws_follow_the_probabilities(fields: dict[str, Any], seed: int | None) -> None:
    """Chi-square over 20,000 draws with a fixed seed; by chance it exceeds 33.7 once in 10,000 times."""
    num_draws, logits = 20_000, torch.tensor([1.0, 2.0, 0.5, -1.0, 2.5, 0.0, 1.5, -0.5, 1.2, 0.7])
    params = SamplingParams(seed=seed, **fields)
    batch = [SamplingState(params, 0, 1, position) for position in range(1, num_draws + 1)]
    probs = probabilities(logits.unsqueeze(0), batch[:1]).expand(num_draws, -1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        counts = Counter(draw(probs, batch).tolist())
    expected = definition(logits.tolist(), params)
    never = [token_id for token_id in counts if not expected[token_id]]
    assert not never, f"{fields}: tokens {never} have probability 0 and were drawn. {LOOK_DRAW}"
    got = chi_square(counts, expected, num_draws)
    assert got < 33.7, (
        f"{fields}, seed {seed}: {num_draws} draws of {expected} gave {sorted(counts.items())}, chi-square {got:.1f}, "
        f"expected below 33.7. {LOOK_DRAW}"
    )


# What is done to the logits


def changed(logits: Tensor, request: Asked) -> list[float]:
    """One row of logits as they are when the token is chosen."""
    row = logits.clone()
    sample(row.unsqueeze(0), [request])
    return row.tolist()


def penalized(logits: list[float], prompt: list[int], output: list[int], params: SamplingParams) -> list[float]:
    """The definition, token by token: bias, repetition, then frequency and presence."""
    values = list(logits)
    for token_id, bias in params.logit_bias:
        values[token_id] += bias
    for token_id in range(len(values)):
        if token_id in prompt or token_id in output:
            penalty = params.repetition_penalty
            values[token_id] = values[token_id] / penalty if values[token_id] > 0 else values[token_id] * penalty
        count = output.count(token_id)
        values[token_id] -= params.frequency_penalty * count
        if count:
            values[token_id] -= params.presence_penalty
    return values


@pytest.mark.parametrize(
    "fields",
    [
        dict(repetition_penalty=1.5),
        dict(repetition_penalty=0.5),
        dict(presence_penalty=1.5),
        dict(presence_penalty=-2.0),
        dict(frequency_penalty=0.7),
        dict(frequency_penalty=-1.0),
        dict(repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.3),
        dict(repetition_penalty=1.2, presence_penalty=0.5, logit_bias={5: 3.0, 11: -20.0, 40: 1.5}),
        dict(logit_bias={0: 100.0, 49: -100.0}),
        dict(),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("prompt", "output"),
    [([5, 11, 5, 20], [11, 30, 30, 30, 40]), ([5, 11, 5], []), ([7], [7, 7]), ([0], [49])],
    ids=["both", "no output yet", "same token", "edges"],
)
def test_penalties_and_bias_by_the_definition(prompt: list[int], output: list[int], fields: dict[str, Any]) -> None:
    """Repetition counts the prompt and the output, presence and frequency the output alone."""
    for seed in range(3):
        logits, request = random_logits(1, seed)[0], asked(prompt, output, temperature=0, **fields)
        got, expected = changed(logits, request), penalized(logits.tolist(), prompt, output, request.params)
        wrong = [i for i in range(VOCAB_SIZE) if got[i] != pytest.approx(expected[i], abs=1e-4)]
        assert not wrong, (
            f"{fields}, prompt {prompt}, output {output}: token {wrong[0]} with logit {float(logits[wrong[0]]):.3f} "
            f"expected {expected[wrong[0]]:.3f}, got {got[wrong[0]]:.3f}; wrong are {wrong}. {LOOK_CHANGE}"
        )


def test_only_the_rows_that_ask_are_changed() -> None:
    logits = random_logits(4, 0)
    before = logits.clone()
    requests = [
        asked([5], [6], temperature=0),
        asked([5], [6], temperature=0, repetition_penalty=2.0, logit_bias={9: 1.0}),
        asked([5], [6]),
        asked([5], [6], temperature=0, min_tokens=5),
    ]
    sample(logits, requests)
    rows = [row for row in range(4) if not torch.equal(logits[row], before[row])]
    assert rows == [1, 3], f"rows 1 and 3 ask for changes: expected them to change, got {rows}. {LOOK_CHANGE}"
    tokens = (logits[1] != before[1]).nonzero().flatten().tolist()
    assert tokens == [5, 6, 9], f"row 1 asks for changes of 5, 6 and 9, got {tokens}. {LOOK_CHANGE}"


def test_penalties_change_what_is_chosen() -> None:
    logits = torch.zeros(2, VOCAB_SIZE)
    logits[:, 10], logits[:, 20] = 2.0, 1.5
    requests = [asked([1], [10], temperature=0), asked([1], [10], temperature=0, presence_penalty=1.0)]
    got = sample_ids(logits, requests)
    assert got == [10, 20], f"without and with presence_penalty=1: expected [10, 20], got {got}. {LOOK_CHANGE}"


def test_apply_penalties_changes_each_row_by_its_own_request() -> None:
    """In place, with prompts and answers of different lengths; the token buffer stays as it is."""
    requests = [
        asked([5, 6], [6, 7], repetition_penalty=1.3, frequency_penalty=1.0),
        asked([9], [], presence_penalty=1.0),
        asked(range(20), [3] * 15, repetition_penalty=0.7, presence_penalty=-1.0),
        asked([1, 2], [1, 2, 1]),
        asked([OTHERS_TOKEN], [4], frequency_penalty=-0.5, repetition_penalty=1.1),
    ]
    logits, (batch, token_rows) = random_logits(len(requests), 1), states_of(requests)
    expected = [
        penalized(row.tolist(), list(request.prompt), list(request.output), request.params)
        for row, request in zip(logits, requests, strict=True)
    ]
    before = token_rows.clone()
    apply_penalties(logits, batch, token_rows)
    for number, (got, wanted) in enumerate(zip(logits.tolist(), expected, strict=True)):
        assert got == pytest.approx(wanted, abs=1e-4), f"request {number}: expected {wanted}, got {got}. {LOOK_CHANGE}"
    assert torch.equal(token_rows, before), f"the token buffer was changed. {LOOK_CHANGE}"


@pytest.mark.parametrize(
    ("num_output", "fields", "expected"),
    [
        (0, {"min_tokens": 3}, [2, 3]),
        (2, {"min_tokens": 3}, [2, 3]),
        (3, {"min_tokens": 3}, []),
        (0, {}, []),
        (2, {"min_tokens": 3, "stop_token_ids": [9, 8]}, [2, 3, 8, 9]),
        (2, {"min_tokens": 3, "ignore_eos": True}, []),
        (2, {"min_tokens": 3, "ignore_eos": True, "stop_token_ids": [9, 2]}, [2, 9]),
        (2, {"min_tokens": 3, "logit_bias": {2: 100.0}}, [2, 3]),
    ],
    ids=str,
)
def test_min_tokens(num_output: int, fields: dict[str, Any], expected: list[int]) -> None:
    got = changed(random_logits(1, 4)[0], asked([7], [5] * num_output, temperature=0, **fields))
    held_back = [token_id for token_id, value in enumerate(got) if value == -math.inf]
    assert held_back == expected, (
        f"{fields}, end-of-sequence tokens 2 and 3, {num_output} tokens are out: expected {expected} held back, got "
        f"{held_back}. {LOOK_CHANGE}"
    )


# Log-probabilities


def reference_logprobs(logits: list[float]) -> list[float]:
    log_total = math.log(sum(math.exp(value - max(logits)) for value in logits)) + max(logits)
    return [value - log_total for value in logits]


@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
def test_logprobs_are_the_raw_models(num_top: int) -> None:
    """Whatever temperature, bias and penalties do to the choice."""
    fields: list[dict[str, Any]] = [
        dict(temperature=0),
        dict(temperature=3.0, seed=1, top_k=40),
        dict(temperature=0, logit_bias={31: 50.0}),
        dict(temperature=0, presence_penalty=2.0, repetition_penalty=2.0),
        dict(temperature=0, min_tokens=2, logit_bias={2: 100.0}),
    ]
    logits, requests = random_logits(5, 5), [asked([7], [8], logprobs=num_top, **each) for each in fields]
    raw = [reference_logprobs(row) for row in logits.tolist()]
    output = sample(logits, requests)
    assert output.logprobs is not None, f"all requests asked for logprobs, got none. {LOOK_LOGPROBS}"
    for row, (each, token_id, expected) in enumerate(zip(fields, output.token_ids.tolist(), raw, strict=True)):
        entry, where = entry_of(output.logprobs, row, num_top), f"{each}, logprobs={num_top}"
        assert next(iter(entry)) == token_id, (
            f"{where}: the sampled token {token_id} comes first, got {entry}. {LOOK_LOGPROBS}"
        )
        ranked = sorted(range(VOCAB_SIZE), key=lambda i: -expected[i])
        wanted = [token_id, *(i for i in ranked[:num_top] if i != token_id)]
        assert list(entry) == wanted, f"{where}: expected tokens {wanted}, got {list(entry)}. {LOOK_LOGPROBS}"
        for i, logprob in entry.items():
            assert type(logprob.logprob) is float and logprob.logprob == pytest.approx(expected[i], abs=1e-4), (
                f"{where}: token {i} expected {expected[i]:.4f} (raw logits), got {logprob}. {LOOK_LOGPROBS}"
            )
            rank = ranked.index(i) + 1
            assert logprob.rank == rank, f"{where}: token {i} has rank {rank}, got {logprob.rank}. {LOOK_LOGPROBS}"
    assert output.token_ids[2] == 31, f"a bias of 50 on token 31, got {output.token_ids[2]}. {LOOK_CHANGE}"


def test_logprobs_only_if_somebody_asks() -> None:
    got = sample(random_logits(2, 6), [asked(temperature=0)] * 2).logprobs
    assert got is None, f"no request asked: expected no logprobs, got {got}. {LOOK_LOGPROBS}"
    requests = [asked(temperature=0), asked(temperature=0, logprobs=0), asked(logprobs=4, seed=1)]
    some = sample(random_logits(3, 6), requests).logprobs
    assert some is not None, f"two requests asked: expected logprobs, got none. {LOOK_LOGPROBS}"
    counts = [len(entry_of(some, 1, 0)), len(entry_of(some, 2, 1)), len(entry_of(some, 2, 4))]
    assert counts[0] == 1 and counts[1] in (1, 2) and counts[2] in (4, 5), (
        f"0, 1 and 4 of the likeliest: expected 1, 1 or 2, and 4 or 5 entries, got {counts}. {LOOK_LOGPROBS}"
    )


def test_each_request_gets_as_many_logprobs_as_it_asked_for() -> None:
    fields: list[dict[str, Any]] = [{}, {"logprobs": 0}, {"logprobs": 3}, {"logprobs": 1}]
    requests = [asked(temperature=0, **each) for each in fields]
    got = to_step_output(sample(random_logits(4, 6), requests), batch_of(states(*requests)))
    counts = [None if entry is None else len(entry) for entry in got.logprobs]
    assert counts == [None, 1, 3, 1], f"{fields}: expected [None, 1, 3, 1] entries, got {counts}. {LOOK_LOGPROBS}"
    first = [None if entry is None else next(iter(entry)) for entry in got.logprobs]
    assert first == [None, *got.token_ids[1:]], f"sampled {got.token_ids}, got entries {got.logprobs}. {LOOK_LOGPROBS}"
    assert all(type(token_id) is int for token_id in got.token_ids), f"expected ints, got {got.token_ids}."


def test_top_logprobs_by_hand() -> None:
    cases: list[tuple[int, int, dict[int, Logprob]]] = [
        (1, 0, {1: Logprob(-0.5, 1)}),
        (0, 0, {0: Logprob(-3.0, 4)}),
        (1, 2, {1: Logprob(-0.5, 1), 3: Logprob(-1.5, 2)}),
        (2, 2, {2: Logprob(-2.0, 3), 1: Logprob(-0.5, 1), 3: Logprob(-1.5, 2)}),
    ]
    logprobs = torch.tensor([[-3.0, -0.5, -2.0, -1.5]]).repeat(len(cases), 1)
    tensors = top_logprobs(logprobs, torch.tensor([token_id for token_id, _, _ in cases]), num_top=2)
    for row, (token_id, num_top, expected) in enumerate(cases):
        got = entry_of(tensors, row, num_top)
        assert (got, list(got)) == (expected, list(expected)), (
            f"log-probabilities {logprobs[row].tolist()}, token {token_id} sampled, {num_top} asked for: expected "
            f"{expected}, got {got}. {LOOK_LOGPROBS}"
        )


# The cost


class CountCalls(TorchDispatchMode):
    """How often each operator of torch is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("seed", "limit"), [(None, 120), (3, 160)], ids=["unseeded", "seeded"])
def test_the_number_of_operator_calls_does_not_grow_with_the_rows(seed: int | None, limit: int) -> None:
    """Every request has penalties, bias, min_tokens, top-k, top-p and logprobs."""
    params = SamplingParams(
        repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.3, logit_bias={5: 1.0, 6: -1.0},
        min_tokens=8, stop_token_ids=[9], top_k=20, top_p=0.9, logprobs=5, seed=seed,
    )  # fmt: skip
    counts = {}
    for num_rows in (2, 64):
        batch, token_rows = states_of([Asked([5] * (3 + i % 7), [6] * (i % 5), params) for i in range(num_rows)])
        logits = random_logits(num_rows, 0, 333)
        with CountCalls() as counter:
            to_step_output(Sampler(EOS).sample(logits, batch, token_rows), batch_of(batch))
        counts[num_rows] = counter.calls
    look = "Look at worker/sampler.py for a loop over rows with tensors in it."
    assert counts[2] == counts[64], (
        f"expected as many operator calls for 64 rows as for 2; more often with 64: {dict(counts[64] - counts[2])}, "
        f"with 2: {dict(counts[2] - counts[64])}. {look}"
    )
    total = sum(counts[64].values())
    assert total < limit, f"64 rows: expected fewer than {limit} operator calls, got {total}: {counts[64]}. {look}"
