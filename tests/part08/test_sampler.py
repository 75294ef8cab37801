"""worker/sampler.py: a token for every row as one step after the other would give it, and which guesses stand by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from common.sampling_params import SamplingParams
from part08_speculative_decoding.worker.sampler import Drafts, Sampler, SamplerOutput, SamplingState, draw, judge
from tests.part08.chi_square import MIN_P_VALUE, p_value

LESSON = 'README "Judging a guess"'
LOOK_JUDGE = f"Look at worker/sampler.py::judge; {LESSON}."
LOOK_DRAWN = 'Look at worker/sampler.py::judge; README "Drawn, not chosen".'
LOOK_SAMPLE = f"Look at worker/sampler.py::Sampler.sample; {LESSON}."
LOOK_CHANGE = f"Look at worker/sampler.py::Sampler._change_logits; {LESSON}."
LOOK_DRAW = f"Look at worker/sampler.py::draw; {LESSON}."
LOOK_LOGPROBS = f"Look at worker/sampler.py::Sampler.sample and top_logprobs; {LESSON}."
VOCAB_SIZE, EOS, MAX_LEN = 30, frozenset({2}), 40


class Step:
    """A step's rows as the runner makes them: requests with guesses or without, their texts in a token buffer."""

    def __init__(self) -> None:
        self.data = torch.full((8, MAX_LEN), 29)
        self.states: list[SamplingState] = []
        self.logits: list[Tensor] = []
        self.first_rows: list[int] = []
        self.guesses: list[list[int]] = []
        self.probs: dict[int, Tensor] = {}

    def add(
        self, logits: Tensor, guesses: Sequence[int] = (), output: Sequence[int] = (),
        draft_probs: Tensor | None = None, generator: torch.Generator | None = None, **fields: Any,
    ) -> None:  # fmt: skip
        """logits: [len(guesses) + 1, vocab_size], for each guess's place and after the last."""
        assert len(logits) == len(guesses) + 1
        params, prompt, row = SamplingParams(**fields), [7, 8], 7 - len(self.guesses)
        if generator is None and params.seed is not None:
            generator = torch.Generator().manual_seed(params.seed)
        text = [*prompt, *output, *guesses]
        self.data[row, : len(text)] = torch.tensor(text)
        self.first_rows.append(len(self.states))
        for number in range(len(guesses) + 1):
            num_tokens = len(prompt) + len(output) + number
            self.states.append(SamplingState(params, generator, row, len(prompt), num_tokens, bool(guesses)))
        if draft_probs is not None:
            self.probs[len(self.guesses)] = draft_probs
        self.logits.append(logits)
        self.guesses.append(list(guesses))

    def sample(self) -> SamplerOutput:
        counts = [len(each) for each in self.guesses]
        padded = torch.tensor([each + [0] * (max(counts) - len(each)) for each in self.guesses], dtype=torch.int64)
        drafts = Drafts(self.first_rows, counts, padded, self.probs) if any(counts) else None
        return Sampler(EOS).sample(torch.cat(self.logits).clone(), self.states, self.data, drafts)

    def answers(self, sampled: SamplerOutput) -> list[list[int]]:
        token_ids = sampled.token_ids.tolist()
        accepted = [0] * len(self.guesses) if sampled.num_accepted is None else sampled.num_accepted.tolist()
        return [token_ids[first : first + n + 1] for first, n in zip(self.first_rows, accepted, strict=True)]


def saying(*token_ids: int) -> Tensor:
    """Logits whose likeliest tokens are these, row by row."""
    logits = torch.randn(len(token_ids), VOCAB_SIZE, generator=torch.Generator().manual_seed(sum(token_ids)))
    logits[range(len(token_ids)), list(token_ids)] = 9.0
    return logits


# Greedy


@pytest.mark.parametrize(
    ("guesses", "targets", "expected"),
    [
        ([[1, 2, 3]], [[1, 2, 3, 4]], [[1, 2, 3, 4]]),
        ([[1, 2, 3]], [[1, 5, 3, 4]], [[1, 5]]),
        ([[]], [[5]], [[5]]),
        ([[1, 2], [3]], [[1, 2, 5], [3, 4]], [[1, 2, 5], [3, 4]]),
        ([[], [0], [6, 6, 6], []], [[9], [0, 4], [6, 6, 5, 6], [3]], [[9], [0, 4], [6, 6, 5], [3]]),
        ([[4], [1, 2, 3]], [[0, 9], [0, 2, 3, 4]], [[0], [0]]),
    ],
)
def test_greedy_by_the_rules_examples(guesses: Any, targets: Any, expected: Any) -> None:
    """Requests with none, one and many guesses in one batch; what fills up the shorter ones is no guess."""
    step = Step()
    for guess, target in zip(guesses, targets, strict=True):
        step.add(saying(*target), guess, temperature=0)
    sampled = step.sample()
    got = step.answers(sampled)
    assert got == expected, (
        f"guesses {guesses}, the likeliest are {targets}: expected {expected}, got {got}. {LOOK_JUDGE}"
    )
    if not any(guesses):
        assert sampled.num_accepted is None, f"no guesses, no counts: got {sampled.num_accepted}. {LOOK_SAMPLE}"


def test_a_row_without_a_guess_is_no_request_s() -> None:
    """Padding points behind the last row; what is sampled in another request's rows says nothing of it."""
    step = Step()
    step.add(saying(0, 0, 0, 0), [0, 0, 0], temperature=0)
    step.add(saying(5, 0), [5], temperature=0)
    sampled = step.sample()
    got = sampled.num_accepted.tolist() if sampled.num_accepted is not None else None
    assert got == [3, 1], f"3 and 1 guesses, all right, padded with 0: expected [3, 1], got {got}. {LOOK_JUDGE}"


# Seeded: as one step after the other


def one_by_one(logits: Tensor, generator: torch.Generator, **fields: Any) -> tuple[list[int], list[Tensor]]:
    """Tokens of one row after the other, in steps of their own, and the generator's state after each."""
    tokens, states = [], []
    for row in logits:
        step = Step()
        step.add(row.unsqueeze(0), generator=generator, **fields)
        tokens.append(int(step.sample().token_ids[0]))
        states.append(generator.get_state())
    return tokens, states


@pytest.mark.parametrize("num_right", range(4))
def test_a_seeded_request_draws_what_it_would_have_drawn(num_right: int) -> None:
    logits = torch.randn(4, VOCAB_SIZE, generator=torch.Generator().manual_seed(3))
    expected, states = one_by_one(logits, torch.Generator().manual_seed(11))
    guesses = [token if number < num_right else (token + 1) % VOCAB_SIZE for number, token in enumerate(expected[:3])]
    for neighbours in range(2):
        step = Step()
        for _ in range(neighbours):
            step.add(torch.randn(3, VOCAB_SIZE), [1, 2])
        step.add(logits, guesses, seed=11)
        step.add(torch.randn(1, VOCAB_SIZE), seed=12)
        sampled = step.sample()
        got = step.answers(sampled)[neighbours]
        assert got == expected[: num_right + 1], (
            f"{num_right} of 3 guesses are what the seed draws: expected {expected[: num_right + 1]}, got {got}. "
            f"{LOOK_DRAW}"
        )
        row = step.first_rows[neighbours] + num_right
        assert torch.equal(sampled.generators[row], states[num_right]), (
            f"row {row}: expected the generator's state after {num_right + 1} draws of its own. {LOOK_DRAW}"
        )
        rows = set(range(step.first_rows[neighbours], step.first_rows[neighbours] + 4))
        assert set(sampled.generators) == rows, (
            f"states are kept for rows of seeded requests with guesses, {sorted(rows)}, got "
            f"{sorted(sampled.generators)}: "
            f"a copy of a state costs. {LOOK_DRAW}"
        )


def test_draw_uses_a_generator_row_after_row() -> None:
    probs = torch.full((3, VOCAB_SIZE), 1 / VOCAB_SIZE)
    generator = torch.Generator().manual_seed(5)
    state = SamplingState(SamplingParams(seed=5), generator, 0, 1, 1, True)
    together, kept = draw(probs, [state] * 3)
    generator.manual_seed(5)
    alone = [int(draw(probs[:1], [state])[0][0]) for _ in range(3)]
    assert together.tolist() == alone and sorted(kept) == [0, 1, 2], (
        f"three rows of one seeded request: expected {alone}, as in three steps, got {together.tolist()}. {LOOK_DRAW}"
    )


# Every row's own text


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
def test_a_row_sees_the_guesses_before_it(fields: dict[str, Any]) -> None:
    """Penalties and min_tokens count them as output: the rows give what steps of their own give."""
    fields = {"temperature": 0, **fields}
    logits = torch.randn(4, VOCAB_SIZE, generator=torch.Generator().manual_seed(1))
    logits[:, 2] += 4.0  # the end, which min_tokens holds back
    logits[:, 11] += 3.0
    generator = torch.Generator().manual_seed(fields.get("seed", 0))
    expected, output = list[int](), [11]
    for row in logits:
        step = Step()
        step.add(row.unsqueeze(0), output=output, generator=generator, **fields)
        expected.append(int(step.sample().token_ids[0]))
        output.append(expected[-1])
    step = Step()
    step.add(saying(3, 4), [3], temperature=0)
    step.add(logits, expected[:3], output=[11], **fields)
    got = step.answers(step.sample())[1]
    assert got == expected, (
        f"{fields}: one step after the other gives {expected}. The first three as guesses: expected the same, got "
        f"{got}; "
        f"row i has i more tokens of output. {LOOK_CHANGE}"
    )


# Log-probabilities


def test_logprobs_are_the_raw_model_s_whatever_became_of_the_guess() -> None:
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
            found = sampled.logprobs.of(row, num_top)
            first, entry = next(iter(found.items()))
            expected, rank = float(raw[number, token_id]), int((raw[number] > raw[number, token_id]).sum()) + 1
            assert first == token_id and abs(entry.logprob - expected) < 1e-4 and entry.rank == rank, (
                f"request {request}, token {number} is {token_id}: expected its log-probability {expected:.4f} and "
                f"rank "
                f"{rank} first, got {first}: {entry}. {LOOK_LOGPROBS}"
            )
            top = raw[number].topk(num_top).indices.tolist()
            assert set(found) == {token_id, *top}, f"expected {top} too, got {found}. {LOOK_LOGPROBS}"


# Guesses that were drawn


def test_drawn_guesses_are_judged_by_p_and_q_after_top_k_and_temperature() -> None:
    """p is peaked, q is flat: the outcome over many requests is p's, and what top-k excludes never comes."""
    torch.manual_seed(1)
    logits = torch.randn(3, VOCAB_SIZE)
    scaled = logits / 0.8
    kth = scaled.topk(6).values[:, -1:]
    p = scaled.masked_fill(scaled < kth, -torch.inf).softmax(dim=-1)
    q = torch.full((2, VOCAB_SIZE), 1 / VOCAB_SIZE)
    q[0] = (q[0] + p[0]) / 2
    tokens: list[list[int]] = [[], [], []]
    for _ in range(500):
        step = Step()
        for number in range(2):
            guesses = q.multinomial(1).flatten().tolist()
            step.add(logits, guesses, draft_probs=q, temperature=0.8, top_k=6)
            if number == 0:
                step.add(saying(3), temperature=0)
        for answer in step.answers(step.sample())[::2]:
            for place, token_id in enumerate(answer):
                tokens[place].append(token_id)
    for place, found in enumerate(tokens):
        value = p_value(torch.tensor(found), p[place])
        assert value > MIN_P_VALUE, (
            f"token {place}: {len(found)} of them are not distributed as the target's after temperature and top-k, "
            f"p-value {value:.1g}. {LOOK_DRAWN}"
        )


def test_a_drawn_guess_is_judged_by_what_top_p_leaves() -> None:
    """p: 0.5, 0.3, 0.2; top-p 0.7 leaves 0.625 and 0.375. q is just that, so every guess has to stand."""
    logits = torch.full((2, VOCAB_SIZE), -40.0)
    logits[:, :3] = torch.tensor([0.5, 0.3, 0.2]).log()
    q = torch.zeros(1, VOCAB_SIZE)
    q[0, :2] = torch.tensor([0.625, 0.375])
    num_stood = 0
    for _ in range(60):
        step = Step()
        step.add(logits, q.multinomial(1).flatten().tolist(), draft_probs=q, temperature=1.0, top_p=0.7)
        sampled = step.sample()
        assert sampled.num_accepted is not None
        num_stood += int(sampled.num_accepted[0])
    assert num_stood == 60, f"p equals q, so every guess stands: expected 60 of 60, got {num_stood}. {LOOK_DRAWN}"


def test_log_probabilities_are_the_models_own_with_guesses_too() -> None:
    """Before the bias, the penalties and the temperature."""
    logits, step = saying(4, 6), Step()
    step.add(logits, [4], temperature=0, logprobs=1, logit_bias={5: 3.0}, presence_penalty=0.5)
    sampled = step.sample()
    assert sampled.logprobs is not None
    got = [sampled.logprobs.of(row, 1)[token_id].logprob for row, token_id in enumerate((4, 6))]
    expected = logits.log_softmax(dim=-1)[[0, 1], [4, 6]].tolist()
    assert got == pytest.approx(expected, abs=1e-5), f"expected {expected}, got {got}. {LOOK_LOGPROBS}"


def test_a_drawn_guess_may_stand_though_its_row_sampled_another_token() -> None:
    """Drawn guesses are judged by p / q, not by what the row happened to draw; others are judged by that."""
    p = torch.full((2, VOCAB_SIZE), 0.0)
    q = p[:1].softmax(dim=-1)
    num_stood = 0
    for _ in range(40):
        step = Step()
        step.add(p, q.multinomial(1).flatten().tolist(), draft_probs=q, temperature=1.0)
        sampled = step.sample()
        assert sampled.num_accepted is not None
        num_stood += int(sampled.num_accepted[0])
        expected = step.guesses[0][0]
        assert int(sampled.token_ids[0]) == expected, f"it stands, so it is the row's token. {LOOK_DRAWN}"
    assert num_stood == 40, f"p equals q, so every guess stands: expected 40 of 40, got {num_stood}. {LOOK_DRAWN}"


def test_fewer_drawn_guesses_than_were_made() -> None:
    """The scheduler may have cut them: q has as many rows as there are guesses in the step."""
    q = torch.zeros(1, VOCAB_SIZE)
    q[0, 4] = 1
    step = Step()
    step.add(saying(4, 6), [4], draft_probs=q, temperature=0.01)
    step.add(saying(1, 2, 3), [1, 2], temperature=0)
    got = step.answers(step.sample())
    assert got == [[4, 6], [1, 2, 3]], f"expected [[4, 6], [1, 2, 3]], got {got}. {LOOK_DRAWN}"


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"temperature": 1.0}, {"temperature": 1.0, "seed": 3}], ids=str)
@pytest.mark.parametrize("is_drawn", [False, True])
def test_nan_logits_give_tokens_of_the_vocabulary(fields: dict[str, Any], is_drawn: bool) -> None:
    logits = torch.full((3, VOCAB_SIZE), torch.nan)
    draft_probs = torch.full((2, VOCAB_SIZE), torch.nan) if is_drawn and fields == {"temperature": 1.0} else None
    step = Step()
    step.add(logits, [1, 2], draft_probs=draft_probs, **fields)
    sampled = step.sample()
    assert sampled.num_accepted is not None
    answer = step.answers(sampled)[0]
    assert all(0 <= token_id < VOCAB_SIZE for token_id in answer) and 1 <= len(answer) <= 3, (
        f"NaN logits: expected tokens from 0 to {VOCAB_SIZE - 1}, got {answer}. {LOOK_JUDGE}"
    )


def test_judge_changes_only_rows_of_drawn_guesses() -> None:
    token_ids = torch.tensor([1, 2, 3, 4, 5])
    drafts = Drafts([0, 2, 4], [1, 1, 0], torch.tensor([[1], [9], [0]]), {})
    num_accepted = judge(drafts, token_ids, {})
    got = (num_accepted.tolist(), token_ids.tolist())
    assert got == ([1, 0, 0], [1, 2, 3, 4, 5]), f"expected ([1, 0, 0], [1, 2, 3, 4, 5]), got {got}. {LOOK_JUDGE}"


def test_what_is_copied_to_the_cpu() -> None:
    step = Step()
    step.add(saying(3, 4), [3], temperature=1.0, seed=2, logprobs=1)
    sampled = step.sample()
    copied = sampled.to_cpu()
    assert torch.equal(copied.token_ids, sampled.token_ids) and copied.generators == sampled.generators
    assert copied.num_accepted is not None and sampled.num_accepted is not None
    assert torch.equal(copied.num_accepted, sampled.num_accepted), "Look at worker/sampler.py::SamplerOutput.to_cpu."
