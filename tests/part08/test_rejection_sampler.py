"""worker/rejection_sampler.py: the tokens are distributed as the target's, whatever proposed the draft tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from part08_speculative_decoding.worker.rejection_sampler import count_accepted, rejection_sample
from tests.part08.chi_square import MIN_P_VALUE, p_value

LOOK = 'Look at worker/rejection_sampler.py::rejection_sample; README "Rejection sampling".'
LOOK_COUNT = 'Look at worker/rejection_sampler.py::count_accepted; README "Verifying draft tokens".'
NUM_DRAWS = 100_000
VOCAB_SIZE = 8
Rule = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def one_hot(token_id: int, rest: float = 0.0) -> Tensor:
    """1 - rest on one token; the others share the rest."""
    probs = torch.full((VOCAB_SIZE,), rest / (VOCAB_SIZE - 1))
    probs[token_id] = 1 - rest
    return probs


def random_probs(seed: int) -> Tensor:
    return torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)).mul(1.5).softmax(dim=-1)


def with_zeros(probs: Tensor) -> Tensor:
    """As after top-k: half of the tokens have probability 0."""
    probs = probs.masked_fill(torch.arange(VOCAB_SIZE) % 2 == 0, 0)
    return probs / probs.sum()


P = [random_probs(seed) for seed in range(4)]
UNIFORM = torch.full((VOCAB_SIZE,), 1 / VOCAB_SIZE)
CASES: dict[str, tuple[list[Tensor], list[Tensor]]] = {
    "q is p": (P[:3], P[:2]),
    "q uniform, one draft token": (P[:2], [UNIFORM]),
    "q uniform": (P, [UNIFORM] * 3),
    "q peaked where p is small": ([*(one_hot(5, 0.2) for _ in range(3)), P[0]], [one_hot(2, 0.1)] * 3),
    "q has zeros": (P[:3], [with_zeros(P[3]), with_zeros(P[2])]),
    "p has zeros": ([with_zeros(each) for each in P], P[1:]),
    "zeros in both": ([with_zeros(P[0]), P[1], P[2]], [with_zeros(P[1]).flip(0), with_zeros(P[2])]),
    "p is one token": ([one_hot(1), P[0], P[1]], [P[2], P[3]]),
    "a different q each time": (P, [P[3], UNIFORM, P[0]]),
}


def p_values(rule: Rule, targets: list[Tensor], drafts: list[Tensor], seed: int = 0) -> dict[str, float]:
    """For each token that the rule can produce, how likely one as far from the target's distribution is.

    The requests of the batch have 0 to k draft tokens.
    """
    k = len(drafts)
    generator = torch.Generator().manual_seed(seed)
    num_drafts = torch.arange(NUM_DRAWS) % (2 * k + 1)
    num_drafts = torch.where(num_drafts > k, k, num_drafts)  # most have k
    draft_ids = torch.stack([q.multinomial(NUM_DRAWS, True, generator=generator) for q in drafts], dim=1)
    exists = torch.arange(k) < num_drafts.unsqueeze(1)
    draft_ids = torch.where(exists, draft_ids, 0)
    draft_probs = torch.stack(drafts).expand(NUM_DRAWS, -1, -1) * exists.unsqueeze(2)
    uniform = torch.rand(NUM_DRAWS, k, generator=generator)
    noise = torch.empty(NUM_DRAWS, VOCAB_SIZE).exponential_(generator=generator)
    target_probs = torch.stack(targets).expand(NUM_DRAWS, -1, -1)
    num_accepted, after = rule(target_probs, draft_probs, draft_ids, num_drafts, uniform, noise)
    assert num_accepted.shape == after.shape == (NUM_DRAWS,), (
        f"expected two tensors of shape ({NUM_DRAWS},), got {tuple(num_accepted.shape)}, {tuple(after.shape)}. {LOOK}"
    )
    assert bool(((num_accepted >= 0) & (num_accepted <= num_drafts)).all()), (
        f"expected 0 to num_drafts accepted draft tokens, got {num_accepted.min()} to {num_accepted.max()}. {LOOK}"
    )
    found = {}
    padded = torch.cat((draft_ids, torch.zeros(NUM_DRAWS, 1, dtype=torch.int64)), dim=1)
    for number in range(k + 1):
        exists = (num_accepted >= number) & (num_drafts >= number)
        tokens = torch.where(num_accepted > number, padded[:, number], after)[exists]
        found[f"token {number} of {k + 1}"] = p_value(tokens, targets[number])
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_tokens_are_distributed_as_the_targets(case: str) -> None:
    for token, value in p_values(rejection_sample, *CASES[case]).items():
        assert value > MIN_P_VALUE, (
            f"{case}: {NUM_DRAWS} draws of {token}, given that the draft tokens before it are accepted: expected the "
            f"target's distribution, got draws with a p-value of {value:.1g}. {LOOK}"
        )


def wrong(
    accepts: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda p, q, uniform: (q > 0) & (uniform * q < p),
    rest: Callable[[Tensor, Tensor], Tensor] = lambda p, q: (p - q).clamp(min=0),
    bonus: Callable[[Tensor, Tensor], Tensor] = lambda p, q: p,
) -> Rule:
    """Rejection sampling with another rule in one place."""

    def rule(
        target_probs: Tensor, draft_probs: Tensor, draft_ids: Tensor, num_drafts: Tensor, uniform: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        p = target_probs[:, :-1].gather(2, draft_ids.unsqueeze(2)).squeeze(2)
        q = draft_probs.gather(2, draft_ids.unsqueeze(2)).squeeze(2)
        is_accepted = accepts(p, q, uniform) & (torch.arange(p.shape[1]) < num_drafts.unsqueeze(1))
        num_accepted = is_accepted.long().cumprod(dim=1).sum(dim=1)
        rows = torch.arange(len(p))
        target, last_q = target_probs[rows, num_accepted], draft_probs[rows, num_accepted.clamp(max=p.shape[1] - 1)]
        was_rejected = (num_accepted < num_drafts).unsqueeze(1)
        after = torch.where(was_rejected, rest(target, last_q), bonus(target, last_q))
        return num_accepted, (after / noise).argmax(dim=-1)

    return rule


FAULTS: dict[str, tuple[str, Rule]] = {
    "a draft token is accepted whenever q > p": ("a different q each time", wrong(accepts=lambda p, q, uniform: q > p)),
    "a draft token is accepted whenever p > q": ("a different q each time", wrong(accepts=lambda p, q, uniform: p > q)),
    "every draft token is accepted": ("q uniform", wrong(accepts=lambda p, q, uniform: q > 0)),
    "u against p, not p / q": ("q uniform", wrong(accepts=lambda p, q, uniform: uniform < p)),
    "u against q / p": ("a different q each time", wrong(accepts=lambda p, q, uniform: uniform * p < q)),
    "q is not subtracted": ("q uniform, one draft token", wrong(rest=lambda p, q: p)),
    "p is subtracted from q": ("a different q each time", wrong(rest=lambda p, q: (q - p).clamp(min=0))),
    "the absolute difference": ("a different q each time", wrong(rest=lambda p, q: (p - q).abs())),
    "the last token comes from q": ("a different q each time", wrong(bonus=lambda p, q: q)),
    "q is subtracted after the last token too": (
        "a different q each time",
        wrong(bonus=lambda p, q: (p - q).clamp(min=0)),
    ),
    "a part of q is subtracted": ("q uniform", wrong(rest=lambda p, q: (p - 0.9 * q).clamp(min=0))),
    "p is a little too small": ("q uniform", wrong(accepts=lambda p, q, uniform: uniform * q < 0.95 * p)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_test_above_notices_faults(fault: str) -> None:
    case, rule = FAULTS[fault]
    smallest = min(p_values(rule, *CASES[case]).values())
    assert smallest < MIN_P_VALUE / 10, f"{fault}, {case}: not noticed, the smallest p-value is {smallest:.1g}"


def test_the_right_rule_is_not_among_the_faults() -> None:
    for case, (targets, drafts) in CASES.items():
        smallest = min(p_values(wrong(), targets, drafts, seed=1).values())
        assert smallest > MIN_P_VALUE, f"{case}: the right rule is called wrong, p-value {smallest:.1g}"


# Examples


def sample(p: list[Tensor], q: list[Tensor], draft_ids: list[int], uniform: list[float]) -> tuple[int, int]:
    """One request; with noise 1 everywhere the likeliest token is drawn."""
    k = len(q)
    num_accepted, after = rejection_sample(
        torch.stack(p).unsqueeze(0),
        torch.stack(q).unsqueeze(0) if q else torch.zeros(1, 0, VOCAB_SIZE),
        torch.tensor([draft_ids], dtype=torch.int64).view(1, k),
        torch.tensor([k]),
        torch.tensor([uniform]).view(1, k),
        torch.ones(1, VOCAB_SIZE),
    )
    return int(num_accepted), int(after)


def probs(**values: float) -> Tensor:
    """probs(t1=0.5, …): the probabilities of some tokens; the others have 0."""
    found = torch.zeros(VOCAB_SIZE)
    for name, value in values.items():
        found[int(name[1:])] = value
    return found


@pytest.mark.parametrize(
    ("uniform", "expected", "why"),
    [
        ([0.49, 0.0], (2, 6), "p/q is 0.5, and 0.49 is below it; the second has p > q"),
        ([0.51, 0.0], (0, 2), "p/q is 0.5, and 0.51 is above it; p - q is largest for token 2"),
        ([0.0, 0.99], (2, 6), "with p > q it is always accepted"),
    ],
)
def test_a_draft_token_is_accepted_with_probability_p_over_q(
    uniform: list[float], expected: tuple[int, int], why: str
) -> None:
    p = [probs(t1=0.4, t2=0.35, t3=0.25), probs(t4=0.6, t5=0.4), probs(t6=0.7, t7=0.3)]
    q = [probs(t1=0.8, t3=0.2), probs(t4=0.5, t6=0.5)]
    got = sample(p, q, [1, 4], uniform)
    assert got == expected, f"uniform {uniform}: expected {expected} ({why}), got {got}. {LOOK}"


def test_a_draft_token_with_q_0_is_rejected() -> None:
    got = sample([probs(t1=0.9, t2=0.1), P[0]], [probs(t3=1.0)], [1], [0.0])
    assert got == (0, 1), (
        f"q of the draft token is 0: expected a rejection and a token from p - q, (0, 1), got {got}: it needs q > 0. "
        f"{LOOK}"
    )


def test_a_draft_token_with_p_0_is_rejected() -> None:
    got = sample([probs(t2=1.0), P[0]], [probs(t1=1.0)], [1], [0.0])
    assert got == (0, 2), f"p of the draft token is 0, u is 0: expected (0, 2), got {got}. {LOOK}"


def test_a_rejection_where_p_equals_q_but_for_rounding() -> None:
    """What p has more than q is then nothing at all, and argmax of nothing is token 0."""
    below = 0.5 - 2**-24
    got = sample([probs(t1=below, t2=0.5), P[0]], [probs(t1=0.5, t2=0.5)], [1], [1 - 2**-24])
    assert got[0] == 0 and got[1] in (1, 2), (
        f"p is q but for rounding, and the draft token was rejected: expected a token from p, 1 or 2, got {got}: where "
        f"max(p - q, 0) has nothing, draw from p. {LOOK}"
    )


def test_draft_tokens_after_a_rejected_one_do_not_count() -> None:
    p = [probs(t1=1.0), probs(t2=1.0), probs(t3=1.0), probs(t4=1.0)]
    q = [probs(t1=1.0), probs(t7=1.0), probs(t3=1.0)]
    got = sample(p, q, [1, 7, 3], [0.5, 0.5, 0.5])
    assert got == (1, 2), f"right, wrong, right: expected (1, 2), got {got}. {LOOK}"


def test_no_draft_tokens() -> None:
    got = sample([probs(t1=0.4, t5=0.6)], [], [], [])
    assert got == (0, 5), f"no draft tokens: expected a token of p, (0, 5), got {got}. {LOOK}"


# NaN in q


NAN_MASKS: dict[str, list[bool]] = {
    "everywhere": [True] * VOCAB_SIZE,
    "at some tokens": [token % 3 == 0 for token in range(VOCAB_SIZE)],
    "at the tokens that p likes": [bool(value > 0.1) for value in P[0]],
}


@pytest.mark.parametrize("mask", NAN_MASKS)
@pytest.mark.parametrize("is_first", [True, False])
def test_nan_in_q_does_not_change_the_distribution(mask: str, is_first: bool) -> None:
    """A draft model that is broken costs speed only. The draft tokens are drawn from a q of which a part is lost."""

    def rule(p: Tensor, q: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        q = q.clone()
        q[:, 0 if is_first else 1, NAN_MASKS[mask]] = torch.nan
        return rejection_sample(p, q, *rest)

    for token, value in p_values(rule, P[:3], [P[2], P[3]]).items():
        assert value > MIN_P_VALUE, (
            f"q is NaN {mask}: {NUM_DRAWS} draws of {token} are not distributed as the target's, p-value {value:.1g}: "
            f"NaN counts as 0. {LOOK}"
        )


def test_a_draft_token_with_q_nan_is_rejected() -> None:
    nan = torch.full((VOCAB_SIZE,), torch.nan)
    for uniform in (0.0, 0.5, 0.999):
        got = sample([probs(t1=0.6, t2=0.4), P[1]], [nan], [1], [uniform])
        assert got == (0, 1), f"q is NaN, u is {uniform}: expected a token of p, (0, 1), got {got}. {LOOK}"


def test_nan_in_p_gives_a_token_of_the_vocabulary() -> None:
    """The target itself is broken: the answer is worthless, but no index is out of range."""
    nan = torch.full((VOCAB_SIZE,), torch.nan)
    for p, q in (([nan, nan], [P[0]]), ([nan, nan], [nan])):
        num_accepted, after = sample(p, q, [1], [0.5])
        assert 0 <= num_accepted <= 1 and 0 <= after < VOCAB_SIZE, f"NaN: got {num_accepted}, {after}. {LOOK}"


# count_accepted


def answers_of(drafts: list[list[int]], targets: list[list[int]]) -> list[list[int]]:
    """What each answer gets. drafts: its draft tokens; targets: what the target samples at each of them and after."""
    k = max(map(len, drafts))
    padded = torch.tensor([each + [targets[row][len(each)]] * (k - len(each)) for row, each in enumerate(drafts)])
    sampled = torch.tensor([(each + [-1] * k)[:k] for each in targets])
    counts = torch.tensor([len(each) for each in drafts])
    num_accepted = count_accepted(padded.view(len(drafts), k) == sampled.view(len(drafts), k), counts)
    return [target[: n + 1] for target, n in zip(targets, num_accepted.tolist(), strict=True)]


@pytest.mark.parametrize(
    ("drafts", "targets", "expected"),
    [
        ([[1, 2, 3]], [[1, 2, 3, 4]], [[1, 2, 3, 4]]),
        ([[1, 2, 3]], [[1, 5, 3, 4]], [[1, 5]]),
        ([[]], [[5]], [[5]]),
        ([[1, 2], [3]], [[1, 2, 5], [3, 4]], [[1, 2, 5], [3, 4]]),
        ([[1, 2], []], [[7, 2, 5], [3]], [[7], [3]]),
        ([[1, 1, 1, 1]], [[1, 1, 2, 1, 1]], [[1, 1, 2]]),
    ],
)
def test_those_before_the_first_wrong_one_are_accepted(
    drafts: list[list[int]], targets: list[list[int]], expected: list[list[int]]
) -> None:
    """The padding of a shorter row equals what the target samples there, and still does not count."""
    got = answers_of(drafts, targets)
    assert got == expected, (
        f"draft tokens {drafts}, the target samples {targets}: expected {expected}, got {got}. {LOOK_COUNT}"
    )
