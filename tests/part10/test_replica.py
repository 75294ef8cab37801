"""router/replica.py: when a replica that has failed is tried again."""

from __future__ import annotations

import pytest

from part10_data_parallelism.router.replica import Circuit, CircuitBreaker, Outcome, Replica

LOOK = 'Look at router/replica.py::CircuitBreaker; README "When a replica fails".'
LOOK_LETS_THROUGH = 'Look at router/replica.py::CircuitBreaker.lets_through; README "When a replica fails".'


class Clock:
    def __init__(self) -> None:
        self.time_s = 0.0

    def __call__(self) -> float:
        return self.time_s


def request(breaker: CircuitBreaker, outcome: Outcome) -> None:
    breaker.end(breaker.begin(), outcome)


def open_circuit(clock: Clock) -> CircuitBreaker:
    """It has failed three times in a row, and is open for a second."""
    breaker = CircuitBreaker(max_failures=3, open_s=1.0, max_open_s=3.0, now=clock)
    for _ in range(3):
        request(breaker, Outcome.FAILED)
    return breaker


def half_open(clock: Clock) -> CircuitBreaker:
    breaker = open_circuit(clock)
    clock.time_s += 1.01
    return breaker


def check(breaker: CircuitBreaker, circuit: Circuit, is_let_through: bool, what: str) -> None:
    assert breaker.circuit is circuit, f"{what}: expected {circuit.name}, got {breaker.circuit.name}. {LOOK}"
    got = breaker.lets_through()
    assert got is is_let_through, (
        f"{what}: the circuit is {circuit.name}, is_probed is {breaker.is_probed}: expected lets_through() to return "
        f"{is_let_through}, got {got}. {LOOK_LETS_THROUGH}"
    )


def test_the_circuit_opens_after_failures_in_a_row() -> None:
    breaker = CircuitBreaker(max_failures=3, open_s=1.0, now=Clock())
    check(breaker, Circuit.CLOSED, True, "a new replica")
    for outcome in (Outcome.FAILED, Outcome.FAILED, Outcome.SUCCEEDED, Outcome.FAILED, Outcome.FAILED):
        request(breaker, outcome)
    check(breaker, Circuit.CLOSED, True, "two failures, a success, two failures")
    request(breaker, Outcome.FAILED)
    check(breaker, Circuit.OPEN, False, "the third failure in a row")


def test_a_closed_circuit_lets_several_requests_through_at_once() -> None:
    breaker = CircuitBreaker(now=Clock())
    for number in range(5):
        check(breaker, Circuit.CLOSED, True, f"{number} requests are under way, and none has failed")
        breaker.begin()


def test_a_half_open_circuit_lets_one_request_through() -> None:
    breaker = half_open(Clock())
    check(breaker, Circuit.HALF_OPEN, True, "it was open for a second: one request tries the replica again")
    breaker.begin()
    for _ in range(3):
        check(breaker, Circuit.HALF_OPEN, False, "the probe is under way, and the others wait for its outcome")


def test_asking_does_not_use_up_the_probe() -> None:
    """The metrics, the health endpoint, and requests that go elsewhere in the end ask as well."""
    replica = Replica("http://127.0.0.1:8000", breaker=half_open(Clock()))
    for number in range(1, 4):
        got = replica.is_available
        assert got is True, (
            f"half open, and no request was sent: expected is_available to be True each time, got {got} at time "
            f"{number}. Only begin() starts the probe: lets_through() changes nothing. {LOOK_LETS_THROUGH}"
        )


def test_a_probe_that_succeeds_closes_the_circuit() -> None:
    breaker = half_open(Clock())
    request(breaker, Outcome.SUCCEEDED)
    for _ in range(2):
        check(breaker, Circuit.CLOSED, True, "the probe has succeeded")
        breaker.begin()


def test_each_probe_that_fails_doubles_the_wait() -> None:
    clock = Clock()
    breaker = open_circuit(clock)
    for wait_s in (1.0, 2.0, 3.0, 3.0):  # up to max_open_s
        clock.time_s += wait_s - 0.01
        check(breaker, Circuit.OPEN, False, f"it is open for {wait_s} s, which have not passed")
        clock.time_s += 0.02
        check(breaker, Circuit.HALF_OPEN, True, f"{wait_s} s have passed")
        request(breaker, Outcome.FAILED)


def test_a_probe_whose_client_leaves_makes_room_for_the_next_one() -> None:
    breaker = half_open(Clock())
    request(breaker, Outcome.GIVEN_UP)
    check(breaker, Circuit.HALF_OPEN, True, "the probe's client has left: the next request is the probe")


def test_requests_that_were_sent_earlier_say_nothing_new() -> None:
    """A replica dies with a hundred requests. That's one reason to wait, not a hundred."""
    clock = Clock()
    breaker = CircuitBreaker(max_failures=3, open_s=1.0, max_open_s=30.0, now=clock)
    earlier = [breaker.begin() for _ in range(100)]
    for is_probe in earlier[:90]:
        breaker.end(is_probe, Outcome.FAILED)
    clock.time_s = 1.01
    check(breaker, Circuit.HALF_OPEN, True, "90 requests have failed at once, a second ago")
    probe = breaker.begin()
    for is_probe, outcome in zip(earlier[90:], [*Outcome] * 3, strict=False):
        breaker.end(is_probe, outcome)
        check(breaker, Circuit.HALF_OPEN, False, f"the probe is under way, and an earlier request {outcome.name}")
    breaker.end(probe, Outcome.SUCCEEDED)
    check(breaker, Circuit.CLOSED, True, "the probe has succeeded")


@pytest.mark.parametrize(("is_healthy", "is_draining"), [(False, False), (True, True)])
def test_a_replica_that_is_not_in_service_is_not_available(is_healthy: bool, is_draining: bool) -> None:
    replica = Replica("http://127.0.0.1:8000", is_healthy=is_healthy, is_draining=is_draining)
    assert not replica.is_available, (
        f"is_healthy={is_healthy}, is_draining={is_draining}: expected is_available to be False. "
        'Look at router/replica.py::Replica.is_available; README "When a replica fails".'
    )
