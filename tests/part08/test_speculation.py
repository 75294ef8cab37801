"""core/speculation.py: guesses where they pay, and counts that say whether they did."""

from __future__ import annotations

import pytest

from common.sampling_params import SamplingParams
from part08_speculative_decoding.core import speculation as speculation_module
from part08_speculative_decoding.core.request import Request
from part08_speculative_decoding.core.speculation import (
    MIN_PROBABILITY,
    PROBE_INTERVAL,
    SMOOTHING,
    Speculation,
    SpeculationStats,
)

LESSON = 'README "How many guesses"'
LOOK_STATS = f"Look at core/speculation.py::SpeculationStats.add; {LESSON}."
LOOK_NUM = f"Look at core/speculation.py::Speculation.num_tokens; {LESSON}."
LOOK_JUDGED = f"Look at core/speculation.py::Speculation.judged; {LESSON}."


def request_of(acceptance: float = 1.0, num_output: int = 1, num_in_flight: int = 0) -> Request:
    request = Request("0", [1, 2, 3], SamplingParams(), 1_000, acceptance=acceptance)
    request.output_token_ids += [5] * num_output
    request.num_output_placeholders = num_in_flight
    return request


# How many


@pytest.mark.parametrize(
    ("acceptance", "expected"),
    [(1.0, 6), (0.9, 6), (0.8, 4), (0.7, 2), (0.6, 2), (0.59, 1), (0.36, 1), (0.34, 0), (0.1, 0), (0.0, 0)],
)
def test_as_many_as_are_likely_to_stand(acceptance: float, expected: int) -> None:
    """Guess i stands with probability acceptance ** i; the limit is 0.35."""
    assert MIN_PROBABILITY == 0.35, "the figures below belong to 0.35"
    got = Speculation(6, 8).num_tokens(request_of(acceptance), num_running=1)
    assert got == expected, (
        f"{acceptance:.0%} of the guesses stand, up to 6 may be made: expected {expected}, as acceptance ** n is at "
        f"least "
        f"{MIN_PROBABILITY} up to there, got {got}. {LOOK_NUM}"
    )


def test_a_guess_that_stands_just_often_enough_is_made() -> None:
    got = Speculation(4, 8).num_tokens(request_of(MIN_PROBABILITY), num_running=1)
    assert got == 1, f"acceptance {MIN_PROBABILITY}, exactly the limit: expected 1 guess, got {got}. {LOOK_NUM}"


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_never_more_than_were_asked_for(limit: int) -> None:
    got = Speculation(limit, 8).num_tokens(request_of(), num_running=1)
    assert got == limit, f"num_speculative_tokens={limit}, all stand: expected {limit}, got {got}. {LOOK_NUM}"


@pytest.mark.parametrize(("num_running", "expected"), [(1, 4), (3, 4), (4, 0), (64, 0)])
def test_none_with_many_running(num_running: int, expected: int) -> None:
    for num_output in (PROBE_INTERVAL, 1):
        got = Speculation(4, 3).num_tokens(request_of(num_output=num_output), num_running)
        assert got == expected, (
            f"{num_running} run, speculative_max_num_seqs=3: expected {expected} guesses, got {got}. {LOOK_NUM}"
        )
    got = Speculation(4, 3).num_tokens(request_of(0.1, PROBE_INTERVAL), num_running)
    assert got == min(1, expected), (
        f"{num_running} run, speculative_max_num_seqs=3, a probe is due: expected {min(1, expected)}, got {got}. "
        f"{LOOK_NUM}"
    )


def test_who_guesses_badly_is_tried_again_now_and_then() -> None:
    speculation = Speculation(4, 8)
    made = [n for n in range(1, 4 * PROBE_INTERVAL + 1) if speculation.num_tokens(request_of(0.1, n), 1)]
    expected = [PROBE_INTERVAL * n for n in range(1, 5)]
    assert made == expected, (
        f"acceptance 0.1: expected one guess after {expected} output tokens (PROBE_INTERVAL={PROBE_INTERVAL}), got "
        f"some "
        f"after {made}. {LOOK_NUM}"
    )
    got = speculation.num_tokens(request_of(0.1, PROBE_INTERVAL), 1)
    assert got == 1, f"a probe is one guess, got {got}. {LOOK_NUM}"


def test_tokens_in_flight_count_for_the_next_try() -> None:
    """A request that runs ahead has to be held back a step before its try, or nobody could guess when it comes."""
    speculation = Speculation(4, 8)
    for num_in_flight in (1, 2):
        num_output = PROBE_INTERVAL - num_in_flight
        got = speculation.num_tokens(request_of(0.1, num_output, num_in_flight), 1)
        assert got == 1, (
            f"{num_output} output tokens and {num_in_flight} in flight, {PROBE_INTERVAL} together: when they are "
            f"there a "
            f"guess is made, so expected 1, got {got}. {LOOK_NUM}"
        )
        got = speculation.num_tokens(request_of(0.1, PROBE_INTERVAL, num_in_flight), 1)
        assert got == 0, (
            f"{PROBE_INTERVAL} output tokens and {num_in_flight} in flight: the moment has passed, expected 0, got "
            f"{got}. "
            f"{LOOK_NUM}"
        )


@pytest.mark.parametrize("num_output", [0, 1, PROBE_INTERVAL])
def test_an_engine_without_guesses_makes_none(num_output: int) -> None:
    for acceptance in (1.0, 0.1):
        got = Speculation(0, 8).num_tokens(request_of(acceptance, num_output), 1)
        assert got == 0, f"num_speculative_tokens=0, {num_output} output tokens: expected 0, got {got}. {LOOK_NUM}"


# What a step teaches


@pytest.mark.parametrize(
    ("num_drafts", "num_accepted", "share"),
    [(4, 4, 1.0), (4, 0, 0.0), (4, 1, 0.5), (4, 3, 0.75), (1, 0, 0.0), (1, 1, 1.0), (2, 1, 0.5)],
)
def test_only_guesses_up_to_the_first_wrong_one_were_judged(num_drafts: int, num_accepted: int, share: float) -> None:
    request = request_of(0.6)
    Speculation(4, 8).judged(request, num_drafts, num_accepted)
    expected = 0.6 + SMOOTHING * (share - 0.6)
    assert request.acceptance == pytest.approx(expected), (
        f"{num_accepted} of {num_drafts} guesses stood, a share of {share} of those that were judged; from 0.6 "
        f"expected "
        f"{expected:.3f}, got {request.acceptance:.3f}. {LOOK_JUDGED}"
    )


def test_no_guesses_teach_nothing() -> None:
    speculation, request = Speculation(4, 8), request_of(0.6)
    speculation.judged(request, 0, 0)
    assert request.acceptance == 0.6, f"no guesses: expected 0.6 to stay, got {request.acceptance}. {LOOK_JUDGED}"
    assert speculation.stats == SpeculationStats(), (
        f"no guesses: expected no change, got {speculation.stats}. {LOOK_STATS}"
    )


def test_down_to_none_and_up_again() -> None:
    speculation, request = Speculation(4, 8), request_of()
    counts = []
    for _ in range(8):
        counts.append(speculation.num_tokens(request, 1))
        speculation.judged(request, counts[-1], 0)
    assert counts == sorted(counts, reverse=True) and counts[0] == 4 and counts[-1] == 0, (
        f"all guesses are wrong: expected 4 at first, fewer and fewer, and none in the end, got {counts}. {LOOK_JUDGED}"
    )
    for _ in range(12):
        speculation.judged(request, 1, 1)
    got = speculation.num_tokens(request, 1)
    assert got == 4, f"then twelve single guesses stood: expected 4 again, got {got}. {LOOK_JUDGED}"


# What is counted


def test_the_rules_example() -> None:
    """Guesses [1, 2, 3] and [4, 5, 6]; the steps brought [1, 2, 7] and [4, 8]."""
    speculation = Speculation(3, 8)
    for drafts, output in (([1, 2, 3], [1, 2, 7]), ([4, 5, 6], [4, 8])):
        speculation.judged(request_of(), len(drafts), len(output) - 1)
    expected = SpeculationStats(2, 6, 3, [2, 1, 0])
    assert speculation.stats == expected, f"expected {expected}, got {speculation.stats}. {LOOK_STATS}"


def test_more_and_fewer_guesses() -> None:
    stats = SpeculationStats()
    for num_drafts, num_accepted in ((1, 1), (0, 0), (4, 2), (2, 2)):
        stats.add(num_drafts, num_accepted)
    expected = SpeculationStats(3, 7, 5, [3, 2, 0, 0])
    assert stats == expected, f"1 of 1, none, 2 of 4, 2 of 2: expected {expected}, got {stats}. {LOOK_STATS}"


def test_requests_are_told_apart_and_engines_are() -> None:
    one, two = Speculation(3, 8), Speculation(3, 8)
    first, second = request_of(), request_of()
    one.judged(first, 3, 0)
    assert second.acceptance == 1.0 and two.stats == SpeculationStats(), (
        f"got {second.acceptance}, {two.stats}. {LOOK_JUDGED}"
    )
    assert speculation_module.SpeculationStats().num_accepted_at == [], f"a list is shared. {LOOK_STATS}"
