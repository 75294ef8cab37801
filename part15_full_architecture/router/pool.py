"""The replicas that the router knows: which one gets a request, which ones are added and removed."""

from __future__ import annotations

import asyncio

from common.errors import FieldError

from .admission import FairQueue, RetryBudget
from .policies import Policy, RoutedRequest
from .replica import Attempt, Outcome, Replica


class Pool:
    """Everything runs on one event loop."""

    def __init__(self, policy: Policy, max_requests_per_replica: int, max_queued_requests: int) -> None:
        self.policy, self.max_requests_per_replica = policy, max_requests_per_replica
        self.replicas: list[Replica] = []
        self.queue = FairQueue(0, max_queued_requests)
        self.retries = RetryBudget(reserve=max_requests_per_replica)  # one replica that dies may fail so many at once
        self._ended = asyncio.Event()  # set whenever a request ends

    def add(self, replica: Replica) -> None:
        """Raises FieldError if there is one at its URL already."""
        if any(other.url == replica.url for other in self.replicas):
            raise FieldError("url", f"{replica.url} is already here")
        self.replicas.append(replica)
        self.resize()

    def find(self, url: str) -> Replica:
        """Raises FieldError if there is none."""
        for replica in self.replicas:
            if replica.url == url:
                return replica
        raise FieldError("url", f"no replica at {url[:100]!r}")

    def drain(self, replica: Replica) -> None:
        """Send it nothing new from now on."""
        replica.is_draining = True
        self.resize()

    async def remove_when_idle(self, replica: Replica) -> None:
        """Wait for the requests that it still has."""
        while replica.num_pending:
            self._ended.clear()
            await self._ended.wait()
        self.remove(replica)

    def remove(self, replica: Replica) -> None:
        if replica in self.replicas:
            self.replicas.remove(replica)
        self.forget(replica)
        self.resize()

    def set_health(self, replica: Replica, is_healthy: bool) -> None:
        """As a health check has found."""
        if replica.is_healthy and not is_healthy:
            self.forget(replica)  # what it had in its cache is probably lost
        if is_healthy and not replica.is_healthy:
            replica.breaker.reset()  # it has probably been started again
        replica.is_healthy = is_healthy
        self.resize()

    def forget(self, replica: Replica) -> None:
        """It was removed, or has lost what it had in its cache."""
        self.policy.forget(replica)

    def for_answers(self, replicas: list[Replica]) -> list[Replica]:
        """Which of them answer requests: all."""
        return replicas

    def resize(self) -> None:
        """Admit max_requests_per_replica for each replica in service, that is, healthy and not draining."""
        serving = [replica for replica in self.replicas if replica.is_healthy and not replica.is_draining]
        self.queue.resize(len(self.for_answers(serving)) * self.max_requests_per_replica)

    def choose(self, request: RoutedRequest, tried: list[Replica]) -> Replica | None:
        """Of those available that were not tried yet. None if there are none."""
        available = [replica for replica in self.replicas if replica.is_available and replica not in tried]
        candidates = self.for_answers(available)
        return self.policy.choose(candidates, request) if candidates else None

    def begin(self, replica: Replica) -> Attempt:
        """A request is sent to a replica. end() follows, whatever happens."""
        replica.num_pending += 1
        replica.num_requests += 1
        return Attempt(replica, replica.breaker.begin())

    def end(self, attempt: Attempt, outcome: Outcome) -> None:
        replica = attempt.replica
        replica.num_pending -= 1
        replica.num_failures += outcome is Outcome.FAILED
        replica.breaker.end(attempt.is_probe, outcome)
        self._ended.set()
