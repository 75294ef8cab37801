"""worker/sampler.py: each row samples what a step of its own would, and which draft tokens are accepted by that."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from common.sampling_params import SamplingParams
from part08_speculative_decoding.worker.rejection_sampler import SpecDecodeMetadata, verify_drafts
from part08_speculative_decoding.worker.sampler import Sampler, SamplerOutput, SamplingState, to_logprobs
from part08_speculative_decoding.worker.stream import to_cpu
from tests.part08.chi_square import MIN_P_VALUE, p_value

LESSON = 'README "Verifying draft tokens"'
LOOK_VERIFY = f"Look at worker/rejection_sampler.py::verify_drafts; {LESSON}."
LOOK_RANDOM = 'Look at worker/rejection_sampler.py::verify_random_drafts; README "Rejection sampling".'
LOOK_SAMPLE = f"Look at worker/sampler.py::Sampler.sample; {LESSON}."
LOOK_CHANGE = f"Look at worker/sampler.py::apply_penalties and hold_back_stop_tokens; {LESSON}."
LOOK_DRAW = f"Look at worker/sampler.py::draw; {LESSON}."
LOOK_LOGPROBS = f"Look at worker/sampler.py::Sampler.sample and top_logprobs; {LESSON}."
VOCAB_SIZE, EOS, MAX_LEN, MAX_SEQS, MAX_DRAFTS = 30, frozenset({2}), 40, 64, 6


class Step:
    """A step as the runner lays it out: requests with and without draft tokens, their texts in a token buffer.

    Requests take rows from the end, so a row is never a request's index. In the drafter's probabilities, whatever was
    not drawn from is uniform: it would change the answers.
    """

    def __init__(self) -> None:
        self.data = torch.full((MAX_SEQS, MAX_LEN), VOCAB_SIZE - 1)
        self.states: list[SamplingState] = []
        self.logits: list[Tensor] = []
        self.first_rows: list[int] = []
        self.drafts: list[list[int]] = []
        self.random: list[int] = []
        self.probs = torch.full((MAX_SEQS, MAX_DRAFTS, VOCAB_SIZE), 1 / VOCAB_SIZE)

    def add(
        self, logits: Tensor, drafts: Sequence[int] = (), output: Sequence[int] = (),
        draft_probs: Tensor | None = None, **fields: Any,
    ) -> None:  # fmt: skip
        """logits: [len(drafts) + 1, vocab_size], at each draft token and after the last. draft_probs: [len(drafts),
        vocab_size], if the draft tokens were drawn at random."""
        assert len(logits) == len(drafts) + 1
        params, prompt, row = SamplingParams(**fields), [7, 8], MAX_SEQS - 1 - len(self.drafts)
        text = [*prompt, *output, *drafts]
        self.data[row, : len(text)] = torch.tensor(text)
        self.first_rows.append(len(self.states))
        for number in range(len(drafts) + 1):
            self.states.append(SamplingState(params, row, len(prompt), len(prompt) + len(output) + number))
        if draft_probs is not None:
            self.probs[row, : len(drafts)] = draft_probs
            self.random.append(len(self.drafts))
        self.logits.append(logits)
        self.drafts.append(list(drafts))

    def spec(self) -> SpecDecodeMetadata | None:
        counts = [len(each) for each in self.drafts]
        padded = [each + [0] * (max(counts) - len(each)) for each in self.drafts]
        buffer_rows = [self.states[self.first_rows[request]].row for request in self.random]
        if not any(counts):
            return None
        return SpecDecodeMetadata(self.first_rows, counts, torch.tensor(padded), self.random, buffer_rows)

    def sample(self) -> SamplerOutput:
        logits = torch.cat(self.logits).clone()
        return Sampler(EOS).sample(logits, self.states, self.data, self.spec(), self.probs)

    def answers(self, sampled: SamplerOutput) -> list[list[int]]:
        token_ids = sampled.token_ids.tolist()
        accepted = [0] * len(self.drafts) if sampled.num_accepted is None else sampled.num_accepted.tolist()
        return [token_ids[first : first + n + 1] for first, n in zip(self.first_rows, accepted, strict=True)]


def saying(*token_ids: int) -> Tensor:
    """Logits for which these are the likeliest tokens, row by row."""
    logits = torch.randn(len(token_ids), VOCAB_SIZE, generator=torch.Generator().manual_seed(sum(token_ids)))
    logits[range(len(token_ids)), list(token_ids)] = 9.0
    return logits


# Greedy


@pytest.mark.parametrize(
    ("drafts", "targets", "expected"),
    [
        ([[1, 2, 3]], [[1, 2, 3, 4]], [[1, 2, 3, 4]]),
        ([[1, 2, 3]], [[1, 5, 3, 4]], [[1, 5]]),
        ([[]], [[5]], [[5]]),
        ([[1, 2], [3]], [[1, 2, 5], [3, 4]], [[1, 2, 5], [3, 4]]),
        ([[], [0], [6, 6, 6], []], [[9], [0, 4], [6, 6, 5, 6], [3]], [[9], [0, 4], [6, 6, 5], [3]]),
        ([[4], [1, 2, 3]], [[0, 9], [0, 2, 3, 4]], [[0], [0]]),
    ],
)
def test_greedy_examples(drafts: Any, targets: Any, expected: Any) -> None:
    """Requests with no, one and several draft tokens in one batch; padding is no draft token."""
    step = Step()
    for draft, target in zip(drafts, targets, strict=True):
        step.add(saying(*target), draft, temperature=0)
    sampled = step.sample()
    got = step.answers(sampled)
    assert got == expected, (
        f"draft tokens {drafts}, the likeliest are {targets}: expected {expected}, got {got}. {LOOK_VERIFY}"
    )
    if not any(drafts):
        assert sampled.num_accepted is None, f"no draft tokens, no counts: got {sampled.num_accepted}. {LOOK_SAMPLE}"


def test_padding_never_counts() -> None:
    """The padding of a request points to rows of the next one, or past the last row."""
    step = Step()
    step.add(saying(0, 0, 0, 0), [0, 0, 0], temperature=0)
    step.add(saying(5, 0), [5], temperature=0)
    sampled = step.sample()
    got = sampled.num_accepted.tolist() if sampled.num_accepted is not None else None
    assert got == [3, 1], f"3 and 1 draft tokens, all right, padded with 0: expected [3, 1], got {got}. {LOOK_VERIFY}"


# Seeded: as one step after the other


def one_by_one(logits: Tensor, output: Sequence[int], **fields: Any) -> list[int]:
    """What one row after the other samples, in steps of their own, after some output."""
    tokens = list(output)
    for row in logits:
        step = Step()
        step.add(row.unsqueeze(0), output=tokens, **fields)
        tokens.append(int(step.sample().token_ids[0]))
    return tokens[len(output) :]


@pytest.mark.parametrize("num_right", range(4))
@pytest.mark.parametrize("num_neighbors", [0, 1, 2])
def test_a_seeded_request_draws_what_it_draws_without_draft_tokens(num_right: int, num_neighbors: int) -> None:
    """Whatever the other requests of the batch are."""
    logits = torch.randn(4, VOCAB_SIZE, generator=torch.Generator().manual_seed(3))
    expected = one_by_one(logits, [], seed=11)
    drafts = [token if number < num_right else (token + 1) % VOCAB_SIZE for number, token in enumerate(expected[:3])]
    step = Step()
    for _ in range(num_neighbors):
        step.add(torch.randn(3, VOCAB_SIZE), [1, 2], draft_probs=torch.full((2, VOCAB_SIZE), 1 / VOCAB_SIZE))
    step.add(logits, drafts, seed=11)
    step.add(torch.randn(1, VOCAB_SIZE), seed=12)
    got = step.answers(step.sample())[num_neighbors]
    assert got == expected[: num_right + 1], (
        f"{num_right} of 3 draft tokens are what the seed draws: expected {expected[: num_right + 1]}, got {got}. "
        f"{LOOK_DRAW}"
    )


# Each row has a text of its own


FIELDS: list[dict[str, Any]] = [
    {"frequency_penalty": 1.5},
    {"presence_penalty": 2.0},
    {"repetition_penalty": 1.8},
    {"min_tokens": 3},
    {"min_tokens": 2, "stop_token_ids": [4, 5]},
    {"logit_bias": {9: 6.0}},
    {"temperature": 0.7, "top_k": 4, "seed": 8},
    {"temperature": 1.3, "top_p": 0.6, "seed": 9},
    {"temperature": 1.0, "seed": 4, "frequency_penalty": 0.8, "min_tokens": 4, "top_k": 10, "logit_bias": {2: 5.0}},
]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_a_row_sees_the_draft_tokens_before_it(fields: dict[str, Any]) -> None:
    """Penalties and min_tokens count them as output: the rows sample what steps of their own sample."""
    fields = {"temperature": 0, **fields}
    logits = torch.randn(4, VOCAB_SIZE, generator=torch.Generator().manual_seed(1))
    logits[:, 2] += 4.0  # the end, which min_tokens holds back
    logits[:, 11] += 3.0
    expected = one_by_one(logits, [11], **fields)
    step = Step()
    step.add(saying(3, 4), [3], temperature=0)
    step.add(logits, expected[:3], output=[11], **fields)
    got = step.answers(step.sample())[1]
    assert got == expected, (
        f"{fields}: one step after the other gives {expected}. The first three as draft tokens: expected the same, got "
        f"{got}; row i has i more tokens of output. {LOOK_CHANGE}"
    )


# Log-probabilities


def test_logprobs_are_the_raw_models_for_accepted_and_rejected_draft_tokens() -> None:
    torch.manual_seed(0)
    logits, p_like = torch.randn(4, VOCAB_SIZE), torch.randn(3, VOCAB_SIZE).softmax(dim=-1)
    step = Step()
    step.add(saying(3, 4), [3], temperature=0, logprobs=1)
    step.add(logits, [5, 6, 7], temperature=1.0, top_k=3, logprobs=3, draft_probs=p_like)
    step.add(logits, logits.argmax(dim=-1)[:3].tolist(), temperature=0, logprobs=2)
    sampled = step.sample()
    raw = logits.log_softmax(dim=-1)
    for request, num_top in ((1, 3), (2, 2)):
        for number, token_id in enumerate(step.answers(sampled)[request]):
            row = step.first_rows[request] + number
            assert sampled.logprobs is not None
            found = to_logprobs(*sampled.logprobs.tolist()[row], num_top)
            first, entry = next(iter(found.items()))
            expected, rank = float(raw[number, token_id]), int((raw[number] > raw[number, token_id]).sum()) + 1
            assert first == token_id and abs(entry.logprob - expected) < 1e-4 and entry.rank == rank, (
                f"request {request}, token {number} is {token_id}: expected its log-probability {expected:.4f} and "
                f"rank {rank} first, got {first}: {entry}. {LOOK_LOGPROBS}"
            )
            top = raw[number].topk(num_top).indices.tolist()
            assert set(found) == {token_id, *top}, f"expected {top} too, got {found}. {LOOK_LOGPROBS}"


# Draft tokens that were drawn at random


def top_k_probs(logits: Tensor, temperature: float, k: int) -> Tensor:
    """By the definition."""
    scaled = logits / temperature
    kth = scaled.topk(k).values[:, -1:]
    return scaled.masked_fill(scaled < kth, -torch.inf).softmax(dim=-1)


def test_random_draft_tokens_are_verified_by_p_and_q_after_top_k_and_temperature() -> None:
    """p is peaked, q is flat: over many requests the tokens are p's, and what top-k excludes never comes."""
    torch.manual_seed(1)
    logits = torch.randn(3, VOCAB_SIZE)
    p = top_k_probs(logits, 0.8, 6)
    q = torch.full((2, VOCAB_SIZE), 1 / VOCAB_SIZE)
    q[0] = (q[0] + p[0]) / 2
    tokens: list[list[int]] = [[], [], []]
    for _ in range(40):
        step = Step()
        for number in range(25):
            step.add(logits, q.multinomial(1).flatten().tolist(), draft_probs=q, temperature=0.8, top_k=6)
            if number % 5 == 0:
                step.add(saying(3), temperature=0)
        for answer, drafts in zip(step.answers(step.sample()), step.drafts, strict=True):
            for number, token_id in enumerate(answer if drafts else []):
                tokens[number].append(token_id)
    for number, found in enumerate(tokens):
        value = p_value(torch.tensor(found), p[number])
        assert value > MIN_P_VALUE, (
            f"token {number}: {len(found)} of them are not distributed as the target's after temperature and top-k, "
            f"p-value {value:.1g}. {LOOK_RANDOM}"
        )


def targets_and_drafters() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Logits, their distributions p at temperature 0.7 and top-k 7, and q: half like p, half on p's seventh token."""
    logits = [torch.randn(5, VOCAB_SIZE) for _ in range(2)]
    p = [top_k_probs(each, 0.7, 7) for each in logits]
    seventh = [each[:4].topk(7).indices[:, -1:] for each in p]
    q = [(each[:4] + torch.zeros(4, VOCAB_SIZE).scatter(1, at, 1.0)) / 2 for each, at in zip(p, seventh, strict=True)]
    return logits, p, q


def mixed_step(logits: list[Tensor], q: list[Tensor], rng: random.Random, is_broken: bool) -> Step:
    """64 requests in a random order: all kinds that a batch may have, each with a distribution of its own.

    Of the kinds with random draft tokens, request i has the target logits[i % n] and the drafter q[i % n].
    """
    step, kinds = Step(), [number % 8 for number in range(MAX_SEQS)]
    rng.shuffle(kinds)
    for number, kind in enumerate(kinds):
        which = number % len(q)
        if kind < 5:  # 0 to 4 draft tokens, drawn at random
            drafts = q[which][:kind].multinomial(1).flatten().tolist() if kind else []
            probs = torch.full_like(q[which][:kind], torch.nan) if is_broken and number % 2 else q[which][:kind]
            step.add(logits[which][: kind + 1], drafts, draft_probs=probs if kind else None, temperature=0.7, top_k=7)
        elif kind == 5:
            step.add(saying(4, 5, 6), [4, 9], temperature=0)
        elif kind == 6:
            step.add(saying(4, 5), [4], seed=number, temperature=0.01)
        else:
            step.add(saying(8), temperature=0, presence_penalty=0.1)
    return step


def run_mixed_steps(change: Callable[[Step], object], is_broken: bool = False) -> dict[tuple[int, int], float]:
    """(which target, which token) → the p-value of all tokens drawn from it. change: what happens to each step."""
    rng = random.Random(5)
    torch.manual_seed(2)
    logits, p, q = targets_and_drafters()
    tokens: dict[tuple[int, int], list[int]] = {}
    num_accepted = num_drafts = 0
    for _ in range(60):
        step = mixed_step(logits, q, rng, is_broken)
        change(step)
        for number, (answer, drafts) in enumerate(zip(step.answers(step.sample()), step.drafts, strict=True)):
            params = step.states[step.first_rows[number]].params
            if params.temperature == 0.7:
                num_accepted, num_drafts = num_accepted + len(answer) - 1, num_drafts + len(drafts)
                for at, token_id in enumerate(answer):
                    tokens.setdefault((number % len(q), at), []).append(token_id)
                continue
            expected = {2: [4, 5], 1: [4, 5], 0: [8]}[len(drafts)]
            assert answer == expected, f"{params}: expected {expected}, got {answer}. {LOOK_VERIFY}"
    assert num_accepted > 0.15 * num_drafts, f"{num_accepted} of {num_drafts} accepted: this proves nothing"
    return {key: p_value(torch.tensor(found), p[key[0]][key[1]]) for key, found in sorted(tokens.items())}


@pytest.mark.parametrize("is_broken", [False, True], ids=["", "half of q is NaN"])
def test_a_mixed_batch_of_many_requests(is_broken: bool) -> None:
    """Different numbers of random draft tokens beside greedy, seeded and undrafted rows: each gets what is its own."""
    for (which, at), value in run_mixed_steps(lambda step: None, is_broken).items():
        assert value > MIN_P_VALUE, (
            f"target {which}, token {at}: the draws are not distributed as the target's, p-value {value:.1g}. "
            f"{LOOK_RANDOM}"
        )


FAULTS: dict[str, Callable[[Step], object]] = {
    "the probabilities of the neighbor's row": lambda step: step.probs.copy_(step.probs.roll(1, 0)),
    "the probabilities of the next draft token": lambda step: step.probs.copy_(step.probs.roll(-1, 1)),
    "the request's index for its row": lambda step: step.probs.copy_(step.probs.flip(0)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_test_above_notices_faults(fault: str) -> None:
    smallest = min(run_mixed_steps(FAULTS[fault]).values())
    assert smallest < MIN_P_VALUE, f"{fault}: not noticed, the smallest p-value is {smallest:.1g}"


def test_a_random_draft_token_is_verified_by_what_top_p_keeps() -> None:
    """p: 0.5, 0.3, 0.2; top-p 0.7 keeps 0.625 and 0.375. q is exactly that, so every draft token is accepted."""
    logits = torch.full((2, VOCAB_SIZE), -40.0)
    logits[:, :3] = torch.tensor([0.5, 0.3, 0.2]).log()
    q = torch.zeros(1, VOCAB_SIZE)
    q[0, :2] = torch.tensor([0.625, 0.375])
    step = Step()
    for _ in range(60):
        step.add(logits, q.multinomial(1).flatten().tolist(), draft_probs=q, temperature=1.0, top_p=0.7)
    sampled = step.sample()
    assert sampled.num_accepted is not None
    num_accepted = int(sampled.num_accepted.sum())
    assert num_accepted == 60, f"p equals q: expected all 60 accepted, got {num_accepted}. {LOOK_RANDOM}"


def test_log_probabilities_are_the_models_own_with_draft_tokens_too() -> None:
    """Before the bias, the penalties and the temperature."""
    logits, step = saying(4, 6), Step()
    step.add(logits, [4], temperature=0, logprobs=1, logit_bias={5: 3.0}, presence_penalty=0.5)
    sampled = step.sample()
    assert sampled.logprobs is not None
    rows = sampled.logprobs.tolist()
    got = [to_logprobs(*rows[row], 1)[token_id].logprob for row, token_id in enumerate((4, 6))]
    expected = logits.log_softmax(dim=-1)[[0, 1], [4, 6]].tolist()
    assert got == pytest.approx(expected, abs=1e-5), f"expected {expected}, got {got}. {LOOK_LOGPROBS}"


def test_a_random_draft_token_may_be_accepted_though_its_row_sampled_another_token() -> None:
    """It is verified by p / q, not by what the row happened to draw."""
    p = torch.full((2, VOCAB_SIZE), 0.0)
    q, step = p[:1].softmax(dim=-1), Step()
    for _ in range(40):
        step.add(p, q.multinomial(1).flatten().tolist(), draft_probs=q, temperature=1.0)
    sampled = step.sample()
    assert sampled.num_accepted is not None
    num_accepted = int(sampled.num_accepted.sum())
    assert num_accepted == 40, f"p equals q: expected all 40 accepted, got {num_accepted}. {LOOK_RANDOM}"
    for drafts, answer in zip(step.drafts, step.answers(sampled), strict=True):
        assert answer[0] == drafts[0], f"draft token {drafts[0]} was accepted, got {answer[0]}. {LOOK_RANDOM}"


def test_fewer_random_draft_tokens_than_were_proposed() -> None:
    """The scheduler may have cut them; the drafter's probabilities still have those of the others."""
    q = torch.zeros(1, VOCAB_SIZE)
    q[0, 4] = 1
    step = Step()
    step.add(saying(4, 6), [4], draft_probs=q, temperature=0.01)
    step.add(saying(1, 2, 3), [1, 2], temperature=0)
    got = step.answers(step.sample())
    assert got == [[4, 6], [1, 2, 3]], f"expected [[4, 6], [1, 2, 3]], got {got}. {LOOK_RANDOM}"


def test_a_broken_draft_model_does_not_change_the_answers() -> None:
    """p = [0, 0.5, 0.5]: token 0 is impossible. The draft tokens are 0, their probabilities NaN."""
    torch.manual_seed(0)
    logits = torch.full((2, VOCAB_SIZE), -torch.inf)
    logits[:, 1:3] = 0.0
    tokens = list[int]()
    for _ in range(20):
        step = Step()
        for _ in range(MAX_SEQS):
            step.add(logits, [0], draft_probs=torch.full((1, VOCAB_SIZE), torch.nan), temperature=1.0)
        sampled = step.sample()
        assert sampled.num_accepted is not None and not sampled.num_accepted.any(), (
            f"q is NaN: expected no accepted draft tokens, got {sampled.num_accepted}. {LOOK_RANDOM}"
        )
        tokens += [answer[0] for answer in step.answers(sampled)]
    counts = torch.bincount(torch.tensor(tokens), minlength=3).tolist()
    value = p_value(torch.tensor(tokens), logits[0].softmax(dim=-1))
    assert value > MIN_P_VALUE, (
        f"q is NaN, p is [0, 0.5, 0.5]: expected {len(tokens)} tokens distributed as p, got {counts}. {LOOK_RANDOM}"
    )


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"temperature": 1.0}, {"temperature": 1.0, "seed": 3}], ids=str)
@pytest.mark.parametrize("is_random", [False, True])
def test_nan_logits_give_tokens_of_the_vocabulary(fields: dict[str, Any], is_random: bool) -> None:
    logits = torch.full((3, VOCAB_SIZE), torch.nan)
    draft_probs = torch.full((2, VOCAB_SIZE), torch.nan) if is_random and fields == {"temperature": 1.0} else None
    step = Step()
    step.add(logits, [1, 2], draft_probs=draft_probs, **fields)
    sampled = step.sample()
    assert sampled.num_accepted is not None
    answer = step.answers(sampled)[0]
    assert all(0 <= token_id < VOCAB_SIZE for token_id in answer) and 1 <= len(answer) <= 3, (
        f"NaN logits: expected tokens from 0 to {VOCAB_SIZE - 1}, got {answer}. {LOOK_VERIFY}"
    )


def test_verify_drafts_changes_no_token() -> None:
    token_ids = torch.tensor([1, 2, 3, 4, 5])
    spec = SpecDecodeMetadata([0, 2, 4], [1, 1, 0], torch.tensor([[1], [9], [0]]), [], [])
    got = (verify_drafts(spec, token_ids).tolist(), token_ids.tolist())
    assert got == ([1, 0, 0], [1, 2, 3, 4, 5]), f"expected ([1, 0, 0], [1, 2, 3, 4, 5]), got {got}. {LOOK_VERIFY}"


def test_what_is_copied_to_the_cpu() -> None:
    step = Step()
    step.add(saying(3, 4), [3], temperature=1.0, seed=2, logprobs=1)
    sampled = step.sample()
    copied = to_cpu(sampled)
    assert copied.num_accepted is not None and sampled.num_accepted is not None
    assert torch.equal(copied.token_ids, sampled.token_ids) and torch.equal(
        copied.num_accepted, sampled.num_accepted
    ), "the copy differs. Look at worker/stream.py::to_cpu."


# How many operator calls a step takes


class CountingMode(TorchDispatchMode):
    """Counts the operators that torch dispatches."""

    num_calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_calls += 1
        return func(*args, **(kwargs or {}))


def num_calls(num_requests: int, **fields: Any) -> int:
    """Of a step in which each request has 4 random draft tokens."""
    step, q = Step(), torch.full((4, VOCAB_SIZE), 1 / VOCAB_SIZE)
    for number in range(num_requests):
        step.add(torch.randn(5, VOCAB_SIZE), [number % VOCAB_SIZE] * 4, draft_probs=q, **fields)
    logits, spec = torch.cat(step.logits), step.spec()
    with CountingMode() as counting:
        Sampler(EOS).sample(logits, step.states, step.data, spec, step.probs)
    return counting.num_calls


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.8},
        {"temperature": 0.8, "top_p": 0.9, "top_k": 5, "frequency_penalty": 0.5, "min_tokens": 9, "logprobs": 2},
    ],
    ids=["plain", "everything"],
)
def test_operator_calls_do_not_grow_with_the_batch(fields: dict[str, Any]) -> None:
    small, large = num_calls(8, **fields), num_calls(MAX_SEQS, **fields)
    assert large <= small and large < 200, (
        f"{fields}, each request with 4 random draft tokens: expected under 200 operator calls, as many for "
        f"{MAX_SEQS} requests as for 8; got {small} for 8 and {large} for {MAX_SEQS}. {LOOK_SAMPLE}"
    )
