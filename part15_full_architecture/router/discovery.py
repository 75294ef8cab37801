"""Finds replicas by a DNS name that stands for all of them, as a headless service of Kubernetes does."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from common.errors import FieldError
from common.serve import show_url

from .health import HealthChecks
from .pool import Pool
from .replica import Replica

Resolve = Callable[[str, int], Awaitable[set[str]]]
logger = logging.getLogger(__name__)


async def resolve(host: str, port: int) -> set[str]:
    """All addresses of a name. Raises OSError, and UnicodeError for what can't be a name."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return {str(address[0]) for *_, address in found}


class Discovery:
    """A task that looks the name up at regular intervals. A new address is a new replica, which gets requests once it
    is healthy; one that is no longer there is drained. Replicas that were added in another way are left alone.

    url: http://name:port. Raises FieldError for another one.
    """

    def __init__(
        self, pool: Pool, health_checks: HealthChecks, url: str, interval_s: float, resolve: Resolve = resolve
    ) -> None:
        self.pool, self.health_checks, self.interval_s, self.resolve = pool, health_checks, interval_s, resolve
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.path.strip("/"):
            raise FieldError("worker_dns", f"expected http://name:port, got {url[:100]!r}")
        self.host, self.port = parts.hostname or "", parts.port or 80
        self.found: dict[str, Replica] = {}
        self.draining = set[asyncio.Task[None]]()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        tasks = [*self.draining, *filter(None, [self._task])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            try:
                self.update(await self.resolve(self.host, self.port))
            except (OSError, UnicodeError) as error:  # the replicas may well be there: health checks decide
                logger.warning("cannot look up %s: %s", self.host, error)
            await asyncio.sleep(self.interval_s)

    def update(self, addresses: set[str]) -> None:
        for address in sorted(addresses - set(self.found)):
            replica = Replica(show_url(address, self.port), is_healthy=False)
            if all(other.url != replica.url for other in self.pool.replicas):
                self.found[address] = replica
                self.pool.add(replica)
                self.health_checks.watch(replica)
        for address in set(self.found) - addresses:
            gone = self.found.pop(address)
            self.pool.drain(gone)
            task = asyncio.create_task(self.pool.remove_when_idle(gone))
            self.draining.add(task)
            task.add_done_callback(self.draining.discard)
