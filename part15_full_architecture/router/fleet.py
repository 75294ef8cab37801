"""Replicas that the router has started itself: one that dies is replaced, and a new version is rolled out."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

from .health import HealthChecks
from .pool import Pool
from .processes import END_TIMEOUT_S, Start, StartedReplica
from .replica import Replica, Role

RESTART_S, MAX_RESTART_S = 1.0, 60.0  # before a replica is started again: the first wait, and the longest
logger = logging.getLogger(__name__)


class Fleet:
    """flags: of all replicas, from now on. wanted: how many there are to be, by role. The pool has those that serve."""

    def __init__(
        self, pool: Pool, health_checks: HealthChecks, start: Start, flags: Sequence[str], wanted: Mapping[Role, int]
    ) -> None:  # fmt: skip
        self.pool, self.health_checks, self.start_one = pool, health_checks, start
        self.flags, self.wanted = list(flags), Counter(wanted)
        self.version = 0  # how many rollouts have begun
        self.started: dict[Replica, StartedReplica] = {}
        self.num_quick_deaths = 0  # of replicas that lived for less than MAX_RESTART_S, in a row
        self._version_of: dict[Replica, int] = {}
        self._tasks = set[asyncio.Task[Any]]()  # of those that start, and that wait for the end of one
        self._rolling = asyncio.Lock()

    async def start(self) -> None:
        """All replicas at the same time; each gets requests as soon as it serves. Raises OSError if one does not
        start."""
        await asyncio.gather(*(self._in_task(self._start_one(role)) for role in self._missing()))

    async def roll(self, flags: Sequence[str]) -> None:
        """Replace all replicas by ones with these flags, one after the other: a new one serves before an old one is
        drained, so no request is lost. An old one that dies meanwhile is replaced by a new one.

        Raises OSError if a new one does not start: then the old ones that are left stay.
        """
        assert not self.is_busy, "another version is being rolled out, or replicas are being started"
        async with self._rolling:
            before, self.flags = self.flags, list(flags)
            self.version += 1
            try:
                while roles := [*self._missing(), *(replica.role for replica in self._old())]:
                    new = await self._start_one(roles[0])
                    if surplus := self._surplus(new):
                        await self.retire(surplus, is_replaced=True)
            except Exception:
                self.flags = before
                for role in self._missing():  # old ones that have died meanwhile
                    self._in_task(self._restart(role))
                raise

    @property
    def is_busy(self) -> bool:
        """Whether another version is being rolled out, or replicas are being started."""
        return self._rolling.locked() or bool(self._missing())

    def _missing(self) -> list[Role]:
        """The roles of those that have not been started, or have ended."""
        return list((self.wanted - Counter(replica.role for replica in self.started)).elements())

    def _surplus(self, new: Replica) -> Replica | None:
        """Which one is no longer needed now that a new one serves: an old one of its role; or the new one, if the one
        that it was to replace was retired meanwhile. None if that one has died."""
        same = [replica for replica in (*self._old(), new) if replica.role is new.role]
        num_started = sum(replica.role is new.role for replica in self.started)
        return same[0] if same and num_started > self.wanted[new.role] else None

    def _old(self) -> list[Replica]:
        return [replica for replica, version in self._version_of.items() if version < self.version]

    async def retire(self, replica: Replica, is_replaced: bool = False) -> None:
        """Drain a replica and end it. is_replaced: another one is there already; else the fleet gets smaller."""
        if not is_replaced:
            self.wanted[replica.role] -= 1
        started = self.started.pop(replica)
        del self._version_of[replica]
        self.pool.drain(replica)
        await self.pool.remove_when_idle(replica)
        await started.stop()

    def set_role(self, replica: Replica, role: Role) -> None:
        """Of any replica. If the fleet has started it, the ones that replace it later will have the new role."""
        if replica in self.started:
            self.wanted[replica.role] -= 1
            self.wanted[role] += 1
        replica.role = role

    async def stop(self, timeout_s: float = END_TIMEOUT_S) -> None:
        """End all replicas, after their open requests, but within timeout_s."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(started.stop(timeout_s) for started in self.started.values()))
        self.started.clear()

    async def _start_one(self, role: Role) -> Replica:
        version = self.version
        started = await self.start_one(self.flags)
        replica = Replica(started.url, role=role)
        self.started[replica], self._version_of[replica] = started, version
        self.pool.add(replica)
        self.health_checks.watch(replica)
        self._in_task(self._watch(replica, started))
        return replica

    async def _watch(self, replica: Replica, started: StartedReplica) -> None:
        """When it ends without being retired, start another one in its place."""
        started_s = time.monotonic()
        how = await started.wait()
        if replica not in self.started:
            return
        is_quick = time.monotonic() - started_s < MAX_RESTART_S
        self.num_quick_deaths = self.num_quick_deaths + 1 if is_quick else 0
        del self.started[replica], self._version_of[replica]
        self.pool.remove(replica)
        is_rolling = self._rolling.locked()  # then roll() brings the fleet to its size
        logger.warning("the replica at %s %s%s", replica.url, how, "" if is_rolling else "; another one is started")
        if not is_rolling:
            await self._restart(replica.role)

    async def _restart(self, role: Role) -> None:
        """Start a replica, again and again until it serves; not at once if several have died soon after their start."""
        wait_s = RESTART_S * 2 ** min(self.num_quick_deaths - 1, 10) if self.num_quick_deaths > 1 else 0.0
        while True:
            await asyncio.sleep(min(wait_s, MAX_RESTART_S))
            try:
                await self._start_one(role)
                return
            except Exception as error:
                wait_s = max(RESTART_S, 2 * wait_s)
                logger.warning("%s; next try in %g s", error, min(wait_s, MAX_RESTART_S))

    def _in_task(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def with_model(flags: Sequence[str], model: str) -> list[str]:
    """The flags of a replica with another model, which is known by the same name as before."""
    kept, given = list[str](), {"--model": "tiny"}
    left = iter(flags)
    for flag in left:
        name, _, value = flag.partition("=")
        if name in ("--model", "--served-model-name"):
            given[name] = value or next(left, "")
        else:
            kept.append(flag)
    name_before = given.get("--served-model-name") or given["--model"]
    return [*kept, "--model", model, "--served-model-name", name_before]
