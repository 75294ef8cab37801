"""api/load_balancer.py: which engine core gets a request, if a server has several."""

from __future__ import annotations

from collections import Counter

import pytest

from part10_data_parallelism.api.load_balancer import LoadBalancer

LOOK = 'Look at api/load_balancer.py::LoadBalancer.choose; README "Replicas inside one server".'
LOOK_REPORT = 'Look at api/load_balancer.py::LoadBalancer.report; README "Replicas inside one server".'
Counts = list[tuple[int, int]]  # (waiting, running) of each core


def balancer_with(counts: Counts) -> LoadBalancer:
    """Each core has just reported its counts."""
    balancer = LoadBalancer(len(counts))
    for core, (num_waiting, num_running) in enumerate(counts):
        balancer.report(core, num_waiting, num_running)
    return balancer


def counts_of(balancer: LoadBalancer) -> Counts:
    return list(zip(balancer.waiting, balancer.running, strict=True))


def choose(balancer: LoadBalancer) -> int:
    """LoadBalancer.choose; if it raises, or chooses a core that doesn't exist, the message says so."""
    counts, first = counts_of(balancer), balancer.first
    what = f"{len(counts)} cores with (waiting, running) {counts}, self.first is {first}"
    try:
        core = balancer.choose()
    except LookupError as error:
        pytest.fail(f"{what}: choose() fails with {error!r}. After the last core comes core 0. {LOOK}")
    assert core in range(len(counts)), f"{what}: expected a core from 0 to {len(counts) - 1}, got {core!r}. {LOOK}"
    return core


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([(2, 0), (0, 7), (1, 4)], 1),  # scores 8, 7, 8
        ([(0, 3), (0, 3), (0, 2)], 2),  # 3, 3, 2
        ([(1, 0), (0, 5), (0, 4)], 0),  # 4, 5, 4: the first of the equal ones, as nobody was chosen yet
    ],
)
def test_the_core_with_the_lowest_score(counts: Counts, expected: int) -> None:
    scores = [4 * num_waiting + num_running for num_waiting, num_running in counts]
    got = choose(balancer_with(counts))
    assert got == expected, (
        f"(waiting, running) {counts} give the scores {scores}: expected core {expected}, got {got}. {LOOK}"
    )


def test_ties_go_to_each_core_in_turn() -> None:
    balancer, got = LoadBalancer(3), []
    for _ in range(6):
        core = choose(balancer)
        balancer.report(core, 0, 0)  # it is done before the next request comes
        got.append(core)
    assert got == [0, 1, 2, 0, 1, 2], (
        f"6 requests, and all 3 cores are idle each time: expected each core in turn, got {got}. The search begins "
        f"after the core that was chosen last. {LOOK}"
    )


def test_requests_between_two_reports_count_as_waiting() -> None:
    """Core 0 runs 10 requests, core 1 is idle, and no core reports anything meanwhile."""
    balancer = balancer_with([(0, 10), (0, 0)])
    for number, (expected, after) in enumerate(
        [(1, [0, 1]), (1, [0, 2]), (1, [0, 3]), (0, [1, 3]), (1, [1, 4]), (0, [2, 4])], start=1
    ):
        counts = counts_of(balancer)
        scores = [4 * num_waiting + num_running for num_waiting, num_running in counts]
        got = choose(balancer)
        assert got == expected, (
            f"request {number}, (waiting, running) {counts}, scores {scores}: expected core {expected}, got {got}. "
            f"A request that was sent since the last report counts as waiting. {LOOK}"
        )
        assert balancer.waiting == after and balancer.running == [10, 0], (
            f"request {number} was sent to core {got}, which counts it as waiting until its next report: expected "
            f"waiting {after} and running [10, 0], got {balancer.waiting} and {balancer.running}. {LOOK}"
        )


def test_requests_between_two_reports_are_spread() -> None:
    """A core whose counts are old would get all of them."""
    balancer = LoadBalancer(3)
    got = Counter(choose(balancer) for _ in range(30))
    assert got == {0: 10, 1: 10, 2: 10}, f"30 requests at once for 3 idle cores: expected 10 each, got {got}. {LOOK}"


def test_a_report_replaces_what_was_counted_since_the_last_one() -> None:
    balancer = LoadBalancer(2)
    balancer.waiting[0] += 1  # as choose() does
    balancer.report(0, 0, 1)
    assert (balancer.waiting, balancer.running) == ([0, 0], [1, 0]), (
        f"core 0 reports 0 waiting and 1 running: expected waiting [0, 0] and running [1, 0], got {balancer.waiting} "
        f"and {balancer.running}. {LOOK_REPORT}"
    )
