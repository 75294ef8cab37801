"""What the router knows of a replica: whether it can be sent requests, and how many it has."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto

from ..kv_params import KVSource


class Circuit(Enum):
    """CLOSED: requests pass. OPEN: none pass. HALF_OPEN: one passes, as a probe."""

    CLOSED = auto()
    OPEN = auto()
    HALF_OPEN = auto()


class Role(Enum):
    """What the proxy in disagg/ uses an engine for. DECODE: it answers requests. PREFILL: it computes the KV of their
    prompts. The router alone has no prefill engines."""

    DECODE = "decode"
    PREFILL = "prefill"


class Outcome(Enum):
    """Of a request. FAILED: the replica was not reached, answered that it can't serve, or broke off. GIVEN_UP: the
    client has left, or the replica was only busy, which says nothing about it."""

    SUCCEEDED = auto()
    FAILED = auto()
    GIVEN_UP = auto()


@dataclass(slots=True)
class CircuitBreaker:
    """Stops sending requests to a replica that has failed several times in a row; later, one request tries it again.

    max_failures: in a row. open_s: until the next try, doubled with each try that fails, up to max_open_s.
    """

    max_failures: int = 3
    open_s: float = 1.0
    max_open_s: float = 30.0
    now: Callable[[], float] = time.monotonic
    num_failures: int = 0
    num_opened: int = 0  # by failures in a row: 1, and 1 for each probe that has failed since
    opened_at_s: float = 0.0
    is_probed: bool = False  # whether the one request is under way

    @property
    def circuit(self) -> Circuit:
        if self.num_opened == 0:
            return Circuit.CLOSED
        wait_s = min(self.open_s * 2 ** (self.num_opened - 1), self.max_open_s)
        return Circuit.OPEN if self.now() < self.opened_at_s + wait_s else Circuit.HALF_OPEN

    def lets_through(self) -> bool:
        """Whether a request may be sent now."""
        match self.circuit:
            case Circuit.CLOSED:
                return True
            case Circuit.OPEN:
                return False
            case Circuit.HALF_OPEN:
                return not self.is_probed

    def begin(self) -> bool:
        """A request is sent. Returns whether it is the probe, for end()."""
        is_probe = self.circuit is Circuit.HALF_OPEN
        self.is_probed |= is_probe
        return is_probe

    def end(self, is_probe: bool, outcome: Outcome) -> None:
        """While the circuit isn't closed, only the probe counts: requests that were sent earlier say nothing new."""
        if is_probe:
            self.is_probed = False
        elif self.circuit is not Circuit.CLOSED:
            return
        match outcome:
            case Outcome.SUCCEEDED:
                self.reset()
            case Outcome.FAILED:
                self.num_failures += 1
                if is_probe or self.num_failures >= self.max_failures:
                    self.num_opened, self.opened_at_s, self.num_failures = self.num_opened + 1, self.now(), 0

    def reset(self) -> None:
        """Close the circuit."""
        self.num_failures = self.num_opened = 0
        self.is_probed = False


@dataclass(eq=False, slots=True)
class Replica:
    """An engine's server. Two replicas are the same if they are one object, so a new one at an old URL is another.

    num_pending: requests that were sent and have not ended. is_healthy: as of the last health check. is_draining: it
    gets no new requests, and is removed when num_pending is 0. kv_sources: where other engines can fetch its KV, as of
    the last health check of the proxy.
    """

    url: str
    is_healthy: bool = True
    is_draining: bool = False
    role: Role = Role.DECODE
    kv_sources: tuple[KVSource, ...] = ()
    num_pending: int = 0
    breaker: CircuitBreaker = field(default_factory=CircuitBreaker)
    num_requests: int = 0  # since it was added; for metrics, as are those below
    num_failures: int = 0

    @property
    def is_available(self) -> bool:
        return self.is_healthy and not self.is_draining and self.breaker.lets_through()


@dataclass(frozen=True, slots=True)
class Attempt:
    """A request that was sent to a replica. is_probe: as its circuit breaker has said."""

    replica: Replica
    is_probe: bool
