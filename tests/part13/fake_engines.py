"""Engines that answer as a test says, and the proxy in front of them: all in this process."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from aiohttp import web

from common.serve import ListenConfig, running_app
from part13_disaggregation.disagg.config import DisaggConfig
from part13_disaggregation.disagg.proxy import Proxy, create_app
from part13_disaggregation.kv_params import HEADER, open_signed
from part13_disaggregation.messages import KVSource, KVTransferParams
from tests.part10.fake_replicas import FAST, FakeReplica, FakeServers, Handler

LOOK_INFO = "Look at disagg/proxy.py::Proxy.is_healthy and roles.py::fetch_kv_sources."
TIMEOUT_S = 60.0
SECRET = "a secret of the tests"


def source(name: str) -> KVSource:
    return KVSource(f"tcp://{name}", "layout", 0, 4, 0, 2)


async def answer_prefill(engine: FakeReplica, request: web.Request) -> web.StreamResponse:
    """Headers when the test lets it admit the prompt, an event when the test lets it finish."""
    assert isinstance(engine, FakeEngine)
    try:
        await engine.until(lambda: engine.may_admit)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        engine.num_admitted += 1
        await engine.until(lambda: engine.may_finish)
        await response.write(b'data: {"n":0}\n\ndata: [DONE]\n\n')
    except (ConnectionError, asyncio.CancelledError):
        engine.num_prefills_left += 1
        raise
    return response


async def break_off_prefill(engine: FakeReplica, request: web.Request) -> web.StreamResponse:
    """After its headers."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    assert request.transport is not None
    request.transport.abort()
    return response


@dataclass(eq=False)
class FakeEngine(FakeReplica):
    """prefill: how it answers the proxy's own requests; handler: all others. info: the body of GET /kv_transfer; None:
    404. bodies, params: of the requests, and what their header says. num_prefills_left: prompts that the proxy has
    given up."""

    prefill: Handler = answer_prefill
    info: bytes | None = b""
    bodies: list[bytes] = field(default_factory=list)
    params: list[KVTransferParams | None] = field(default_factory=list)
    info_headers: list[dict[str, str]] = field(default_factory=list)
    may_admit: bool = True
    may_finish: bool = True
    num_admitted: int = 0
    num_prefills_left: int = 0

    def __post_init__(self) -> None:
        if self.info == b"":
            self.has_sources(self.name)

    def has_sources(self, *names: str) -> None:
        self.info = msgspec.json.encode({"sources": [source(name) for name in names]})

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/kv_transfer":
            self.info_headers.append(dict(request.headers))
            return web.Response(status=404) if self.info is None else web.Response(body=self.info)
        if request.path == "/health":
            return await super().handle(request)
        value = request.headers.get(HEADER)
        params = None if value is None else open_signed(value, SECRET)
        assert value is None or params is not None, f"{self.name} got {value!r}, which the proxy has not signed"
        self.params.append(params)
        self.bodies.append(await request.read())
        self.num_requests += 1
        self.headers.append(dict(request.headers))
        self.paths.append(request.raw_path)
        is_prefill = params is not None and not params.sources
        return await (self.prefill if is_prefill else self.handler)(self, request)

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await asyncio.sleep(0.005)


@contextlib.contextmanager
def proxied(
    prefill: Sequence[FakeEngine], decode: Sequence[FakeEngine], api_key: str | None = "key", **flags: Any
) -> Iterator[tuple[str, Proxy, FakeServers]]:
    """The proxy's address, itself, and the servers of its engines. Every engine that has told so can send KV."""
    servers = FakeServers()
    try:
        for engine in (*prefill, *decode):
            servers.start(engine)
        config = DisaggConfig(
            prefill_urls=",".join(engine.url for engine in prefill),
            decode_urls=",".join(engine.url for engine in decode),
            **{"policy": "round_robin", "kv_transfer_secret": SECRET, **FAST, "request_timeout": 600.0, **flags},
        )
        app = create_app(config, ListenConfig(api_key=api_key))
        with running_app(app) as url:
            proxy: Proxy = app.state.router
            wait_for_sources(proxy, [*prefill, *decode])
            yield url, proxy, servers
    finally:
        servers.close()


def wait_for_sources(proxy: Proxy, engines: Sequence[FakeEngine]) -> None:
    for engine in engines:
        if engine.info is not None and b"layout" in engine.info:
            replica = proxy.pool.find(engine.url)
            until(lambda replica=replica: replica.kv_sources, f"{engine.name}'s info. {LOOK_INFO}")  # type: ignore[misc]


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, f"expected {what}"
        time.sleep(0.005)
