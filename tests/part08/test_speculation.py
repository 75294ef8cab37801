"""core/speculation.py: draft tokens where they pay off, and counters that show whether they did."""

from __future__ import annotations

import pytest

from common.sampling_params import SamplingParams
from part08_speculative_decoding.config import EngineConfig
from part08_speculative_decoding.core import speculation as speculation_module
from part08_speculative_decoding.core.request import Request
from part08_speculative_decoding.core.speculation import (
    MIN_PROBABILITY,
    PROBE_INTERVAL,
    SMOOTHING,
    Speculation,
    SpeculationStats,
)

LESSON = 'README "How many draft tokens"'
LOOK_STATS = f"Look at core/speculation.py::SpeculationStats.add; {LESSON}."
LOOK_NUM = f"Look at core/speculation.py::Speculation.num_tokens; {LESSON}."
LOOK_VERIFIED = f"Look at core/speculation.py::Speculation.verified; {LESSON}."


def speculation_of(num_tokens: int = 4, max_num_seqs: int = 8, method: str = "draft_model") -> Speculation:
    config = EngineConfig(
        device="cpu", speculative_method=method, num_speculative_tokens=num_tokens,  # type: ignore[arg-type]
        speculative_max_num_seqs=max_num_seqs,
    )  # fmt: skip
    return Speculation(config)


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
def test_as_many_as_are_likely_to_be_accepted(acceptance: float, expected: int) -> None:
    """Draft token i is accepted with probability acceptance ** i; the limit is 0.35."""
    assert MIN_PROBABILITY == 0.35, "the numbers of this test belong to 0.35"
    got = speculation_of(6).num_tokens(request_of(acceptance), num_running=1)
    assert got == expected, (
        f"acceptance {acceptance}, up to 6 draft tokens: expected {expected}, since acceptance ** n is at least "
        f"{MIN_PROBABILITY} up to there, got {got}. {LOOK_NUM}"
    )


def test_a_draft_token_at_the_limit_is_proposed() -> None:
    got = speculation_of().num_tokens(request_of(MIN_PROBABILITY), num_running=1)
    assert got == 1, f"acceptance {MIN_PROBABILITY}, exactly the limit: expected 1 draft token, got {got}. {LOOK_NUM}"


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_never_more_than_num_speculative_tokens(limit: int) -> None:
    got = speculation_of(limit).num_tokens(request_of(), num_running=1)
    assert got == limit, f"num_speculative_tokens={limit}, all are accepted: expected {limit}, got {got}. {LOOK_NUM}"


@pytest.mark.parametrize(("num_running", "expected"), [(1, 4), (3, 4), (4, 0), (64, 0)])
def test_none_with_too_many_requests(num_running: int, expected: int) -> None:
    for num_output in (PROBE_INTERVAL, 1):
        got = speculation_of(4, 3).num_tokens(request_of(num_output=num_output), num_running)
        assert got == expected, (
            f"{num_running} run, speculative_max_num_seqs=3: expected {expected} draft tokens, got {got}. {LOOK_NUM}"
        )
    got = speculation_of(4, 3).num_tokens(request_of(0.1, PROBE_INTERVAL), num_running)
    assert got == min(1, expected), (
        f"{num_running} run, speculative_max_num_seqs=3, a probe is due: expected {min(1, expected)}, got {got}. "
        f"{LOOK_NUM}"
    )


def test_a_request_with_low_acceptance_is_probed_now_and_then() -> None:
    speculation = speculation_of()
    made = [n for n in range(1, 4 * PROBE_INTERVAL + 1) if speculation.num_tokens(request_of(0.1, n), 1)]
    expected = [PROBE_INTERVAL * n for n in range(1, 5)]
    assert made == expected, (
        f"acceptance 0.1: expected one draft token after {expected} output tokens (PROBE_INTERVAL={PROBE_INTERVAL}), "
        f"got some after {made}. {LOOK_NUM}"
    )
    got = speculation.num_tokens(request_of(0.1, PROBE_INTERVAL), 1)
    assert got == 1, f"a probe is one draft token, got {got}. {LOOK_NUM}"


def test_tokens_in_flight_count_for_the_next_probe() -> None:
    """A request that runs ahead has its probe when the tokens in flight have arrived."""
    speculation = speculation_of()
    for num_in_flight in (1, 2):
        num_output = PROBE_INTERVAL - num_in_flight
        got = speculation.num_tokens(request_of(0.1, num_output, num_in_flight), 1)
        assert got == 1, (
            f"{num_output} output tokens and {num_in_flight} in flight, {PROBE_INTERVAL} together: expected 1 draft "
            f"token, got {got}. {LOOK_NUM}"
        )
        got = speculation.num_tokens(request_of(0.1, PROBE_INTERVAL, num_in_flight), 1)
        assert got == 0, (
            f"{PROBE_INTERVAL} output tokens and {num_in_flight} in flight, so the probe was a step ago: expected 0, "
            f"got {got}. {LOOK_NUM}"
        )


@pytest.mark.parametrize("num_output", [0, 1, PROBE_INTERVAL])
def test_without_a_proposer_there_are_none(num_output: int) -> None:
    for acceptance in (1.0, 0.1):
        got = speculation_of(method="none").num_tokens(request_of(acceptance, num_output), 1)
        assert got == 0, f"speculative_method=none, {num_output} output tokens: expected 0, got {got}. {LOOK_NUM}"


# Verified draft tokens


@pytest.mark.parametrize(
    ("num_drafts", "num_accepted", "share"),
    [(4, 4, 1.0), (4, 0, 0.0), (4, 1, 0.5), (4, 3, 0.75), (1, 0, 0.0), (1, 1, 1.0), (2, 1, 0.5)],
)
def test_draft_tokens_after_a_rejection_do_not_count(num_drafts: int, num_accepted: int, share: float) -> None:
    request = request_of(0.6)
    speculation_of().verified(request, num_drafts, num_accepted)
    expected = 0.6 + SMOOTHING * (share - 0.6)
    assert request.acceptance == pytest.approx(expected), (
        f"{num_accepted} of {num_drafts} draft tokens accepted, a share of {share} of those that were verified: from "
        f"0.6, expected {expected:.3f}, got {request.acceptance:.3f}. {LOOK_VERIFIED}"
    )


def test_a_step_without_draft_tokens_changes_nothing() -> None:
    speculation, request = speculation_of(), request_of(0.6)
    speculation.verified(request, 0, 0)
    assert request.acceptance == 0.6, f"no draft tokens: expected 0.6, got {request.acceptance}. {LOOK_VERIFIED}"
    assert speculation.stats == SpeculationStats(), (
        f"no draft tokens: expected no change, got {speculation.stats}. {LOOK_STATS}"
    )


def test_down_to_none_and_up_again() -> None:
    speculation, request = speculation_of(), request_of()
    counts = []
    for _ in range(8):
        counts.append(speculation.num_tokens(request, 1))
        speculation.verified(request, counts[-1], 0)
    assert counts == sorted(counts, reverse=True) and counts[0] == 4 and counts[-1] == 0, (
        f"all draft tokens are rejected: expected 4 at first, then fewer, and none in the end, got {counts}. "
        f"{LOOK_VERIFIED}"
    )
    for _ in range(12):
        speculation.verified(request, 1, 1)
    got = speculation.num_tokens(request, 1)
    assert got == 4, f"then twelve single draft tokens were accepted: expected 4 again, got {got}. {LOOK_VERIFIED}"


# Counters


def test_the_counters_of_an_example() -> None:
    """Draft tokens [1, 2, 3] and [4, 5, 6]; the steps produced [1, 2, 7] and [4, 8]."""
    speculation = speculation_of(3)
    for drafts, output in (([1, 2, 3], [1, 2, 7]), ([4, 5, 6], [4, 8])):
        speculation.verified(request_of(), len(drafts), len(output) - 1)
    expected = SpeculationStats(2, 6, 3, [2, 1, 0])
    assert speculation.stats == expected, f"expected {expected}, got {speculation.stats}. {LOOK_STATS}"


def test_steps_with_different_numbers_of_draft_tokens() -> None:
    stats = SpeculationStats()
    for num_drafts, num_accepted in ((1, 1), (0, 0), (4, 2), (2, 2)):
        stats.add(num_drafts, num_accepted)
    expected = SpeculationStats(3, 7, 5, [3, 2, 0, 0])
    assert stats == expected, f"1 of 1, none, 2 of 4, 2 of 2: expected {expected}, got {stats}. {LOOK_STATS}"


def test_requests_and_engines_share_nothing() -> None:
    one, two = speculation_of(3), speculation_of(3)
    first, second = request_of(), request_of()
    one.verified(first, 3, 0)
    assert second.acceptance == 1.0 and two.stats == SpeculationStats(), (
        f"got {second.acceptance}, {two.stats}. {LOOK_VERIFIED}"
    )
    assert speculation_module.SpeculationStats().num_accepted_tokens_per_pos == [], f"a list is shared. {LOOK_STATS}"
