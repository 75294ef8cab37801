"""router/discovery.py: the router follows the addresses of a name."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from aiohttp import web

from common.errors import FieldError
from part10_data_parallelism.router import app
from part10_data_parallelism.router.app import Router
from part10_data_parallelism.router.config import RouterConfig
from part10_data_parallelism.router.discovery import Discovery, resolve
from part10_data_parallelism.router.replica import Replica
from tests.part10.fake_replicas import FakeReplica, FakeServers, answer_stream, routed
from tests.part10.test_router import BODY, KEY, TIMEOUT_S, ask, check_idle, until

LOOK = 'Look at router/discovery.py::Discovery; README "Replicas come and go".'
A, B = "127.0.0.1", "127.0.0.2"
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs a second loopback address, 127.0.0.2")


class ReplicasOfAName(FakeServers):
    """All on one port, each at the address that is its name."""

    port = 0

    async def _start(self, replica: FakeReplica, port: int) -> None:
        runner = web.ServerRunner(web.Server(replica.handle, handler_cancellation=True))
        await runner.setup()
        await web.TCPSite(runner, replica.name, self.port).start()
        self.port = runner.addresses[0][1]
        replica.url = f"http://{replica.name}:{self.port}"
        self.runners[replica] = runner


@dataclass
class Name:
    """What a lookup finds. error: of all lookups, until it is None again."""

    addresses: set[str] = field(default_factory=set)
    error: Exception | None = None
    num_lookups: int = 0

    async def resolve(self, host: str, port: int) -> set[str]:
        assert host == "replicas.test", f"got {host}. {LOOK}"
        self.num_lookups += 1
        if self.error is not None:
            raise self.error
        return set(self.addresses)

    def wait_for_lookups(self, number: int = 3) -> None:
        expected = self.num_lookups + number
        until(lambda: self.num_lookups >= expected, f"lookups to go on. {LOOK}")


@pytest.fixture
def name(monkeypatch: pytest.MonkeyPatch) -> Name:
    name = Name({A})
    monkeypatch.setattr(app, "Discovery", functools.partial(Discovery, resolve=name.resolve))
    return name


@contextlib.contextmanager
def discovered(
    a: FakeReplica, b: FakeReplica, *by_hand: FakeReplica, **flags: Any
) -> Iterator[tuple[str, Router]]:  # fmt: skip
    """A router over a name for a and b. Yields its URL, and itself."""
    servers = ReplicasOfAName()
    try:
        servers.start(a)
        servers.start(b)
        flags = {"worker_dns": f"http://replicas.test:{servers.port}", "discovery_interval": 0.02, **flags}
        with routed(*by_hand, **flags) as (url, router, _):
            yield url, router
    finally:
        servers.close()


def replica_at(router: Router, fake: FakeReplica) -> Replica | None:
    return next((replica for replica in router.pool.replicas if replica.url == fake.url), None)


def names_of(url: str, number: int = 4) -> set[str]:
    """Who answers. There is one route to each replica, in turn."""
    return {ask(url).json()["replica"] for _ in range(number)}


@linux_only
def test_a_new_address_gets_requests_once_it_is_well(name: Name) -> None:
    a, b = FakeReplica(A), FakeReplica(B, is_well=False)
    with discovered(a, b) as (url, router):
        until(lambda: ask(url).status_code == 200, f"the first replica to be found. {LOOK}")
        assert names_of(url) == {A}, f"the other one has not been found. {LOOK}"
        name.addresses = {A, B}
        until(lambda: replica_at(router, b), f"{b.url} to be added. {LOOK}")
        assert names_of(url) == {A}, f"{b.url} isn't well. {LOOK}"
        b.is_well = True
        until(lambda: names_of(url) == {A, B}, f"{b.url} to get requests. {LOOK}")
        name.wait_for_lookups()
        assert len(router.pool.replicas) == 2, f"each address is added once: {router.pool.replicas}. {LOOK}"
        check_idle(router)


@linux_only
def test_an_address_that_vanishes_is_drained_and_may_come_back(name: Name) -> None:
    a, b = FakeReplica(A), FakeReplica(B, answer_stream, gate=0)
    name.addresses = {B}
    with discovered(a, b) as (url, router), contextlib.ExitStack() as stack:
        until(lambda: (found := replica_at(router, b)) and found.is_available, f"{b.url} to be well. {LOOK}")
        stream = stack.enter_context(
            httpx.stream("POST", f"{url}/v1/completions", json=BODY, headers=KEY, timeout=TIMEOUT_S, trust_env=False)
        )
        chunks = stream.iter_raw()
        text, before = next(chunks), replica_at(router, b)
        name.addresses = {A}
        until(lambda: before and before.is_draining, f"{b.url} to be drained. {LOOK}")
        until(lambda: (found := replica_at(router, a)) and found.is_available, f"{a.url} to be well. {LOOK}")
        assert names_of(url) == {A} and replica_at(router, b) is before, f"{b.url} has a stream, no more. {LOOK}"
        name.addresses = {A, B}
        name.wait_for_lookups()
        assert replica_at(router, b) is before, f"it came back, and drains still. {LOOK}"
        b.gate = 100
        text += b"".join(chunks)
        assert text.count(b"data: ") == 4 and text.endswith(b"data: [DONE]\n\n"), f"{text!r}. {LOOK}"
        until(lambda: replica_at(router, b) not in (before, None), f"a new replica at {b.url}. {LOOK}")
        b.handler = a.handler
        until(lambda: names_of(url) == {A, B}, f"it to get requests. {LOOK}")
        name.addresses = {A}
        until(lambda: replica_at(router, b) is None, f"{b.url}, which is idle, to be removed. {LOOK}")
        check_idle(router)


@linux_only
@pytest.mark.parametrize("error", [OSError("no answer"), UnicodeError("label too long")])
def test_a_lookup_that_fails_changes_nothing(name: Name, error: Exception) -> None:
    a, b = FakeReplica(A), FakeReplica(B)
    with discovered(a, b) as (url, router):
        until(lambda: ask(url).status_code == 200, f"the first replica to be found. {LOOK}")
        before = list(router.pool.replicas)
        name.error = error
        name.wait_for_lookups()
        assert router.pool.replicas == before and not before[0].is_draining, f"{router.pool.replicas}. {LOOK}"
        assert names_of(url) == {A}, LOOK
        name.addresses, name.error = {A, B}, None
        until(lambda: names_of(url) == {A, B}, f"later lookups to count. {LOOK}")


@linux_only
def test_replicas_that_were_added_by_hand_are_left_alone(name: Name) -> None:
    """Also one at an address that the name has."""
    a, b, by_hand = FakeReplica(A), FakeReplica(B), FakeReplica("by hand")
    name.addresses = set()
    with discovered(a, b, by_hand) as (url, router):
        added = httpx.post(f"{url}/workers", json={"url": a.url}, headers=KEY, trust_env=False)
        assert added.status_code == 202, f"{added.text}. {LOOK}"
        name.addresses = {A, B}
        until(lambda: names_of(url, 6) == {A, B, "by hand"}, f"three replicas. {LOOK}")
        assert len(router.pool.replicas) == 3, f"{a.url} is there already: {router.pool.replicas}. {LOOK}"
        name.addresses = set()
        until(lambda: replica_at(router, b) is None, f"{b.url} to be removed. {LOOK}")
        name.wait_for_lookups()
        assert names_of(url) == {A, "by hand"}, LOOK
        assert not any(replica.is_draining for replica in router.pool.replicas), f"{router.pool.replicas}. {LOOK}"


def test_the_addresses_of_localhost() -> None:
    found = asyncio.run(resolve("localhost", 8000))
    assert found and found <= {"127.0.0.1", "::1"}, f"got {found}. {LOOK}"


@pytest.mark.parametrize("url", ["https://replicas.test:8000", "http://replicas.test:8000/v1"])
def test_only_plain_http_without_a_path(url: str) -> None:
    """A certificate has no addresses in it, and the path would be lost."""
    with pytest.raises(FieldError, match=r"worker_dns: expected http://name:port, got '.*replicas\.test"):
        Router(RouterConfig(worker_dns=url))
