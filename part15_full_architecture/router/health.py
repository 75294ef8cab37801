"""Asks every replica at regular intervals whether it is healthy."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from .pool import Pool
from .replica import Replica

FAILURES_TO_UNHEALTHY = 2  # in a row: one lost packet is no reason to move everything


class HealthChecks:
    """A task for each replica, until it is removed."""

    def __init__(self, pool: Pool, is_healthy: Callable[[Replica], Awaitable[bool]], interval_s: float) -> None:
        self.pool, self.is_healthy, self.interval_s = pool, is_healthy, interval_s
        self.tasks: dict[Replica, asyncio.Task[None]] = {}

    def start(self) -> None:
        for replica in self.pool.replicas:
            self.watch(replica)

    def watch(self, replica: Replica) -> None:
        task = asyncio.create_task(self._check(replica))
        self.tasks[replica] = task
        task.add_done_callback(lambda _: self.tasks.pop(replica, None))

    async def _check(self, replica: Replica) -> None:
        num_failures = 0
        while replica in self.pool.replicas:
            is_healthy = await self.is_healthy(replica)
            num_failures = 0 if is_healthy else num_failures + 1
            if is_healthy or num_failures >= FAILURES_TO_UNHEALTHY:
                self.pool.set_health(replica, is_healthy)
            await asyncio.sleep(self.interval_s)

    async def stop(self) -> None:
        tasks = list(self.tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
