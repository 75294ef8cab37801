"""Replicas that answer as a test says, and the router in front of them: all in this process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from common.serve import ListenConfig, running_app
from part10_data_parallelism.router.app import Router, create_app
from part10_data_parallelism.router.config import RouterConfig

Handler = Callable[["FakeReplica", web.Request], Awaitable[web.StreamResponse]]
FAST: dict[str, Any] = {
    "health_interval": 0.05,
    "health_timeout": 60.0,
    "connect_timeout": 60.0,
    "request_timeout": 30.0,
}


async def answer_whole(replica: FakeReplica, request: web.Request) -> web.StreamResponse:
    return web.json_response({"replica": replica.name, "body": json.loads(await request.read())})


async def answer_stream(replica: FakeReplica, request: web.Request) -> web.StreamResponse:
    """Three events, each once the test has opened the gate; notes if the client leaves."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "X-Engine": "fake"})
    await response.prepare(request)
    try:
        for number in range(3):
            await response.write(f'data: {{"n":{number},"é":"\N{SNOWMAN}"}}\n\n'.encode())
            await replica.until_open(number)
        await response.write(b"data: [DONE]\n\n")
    except (ConnectionError, asyncio.CancelledError):
        replica.num_left += 1
        raise
    return response


def answer_status(status: int) -> Handler:
    async def answer(replica: FakeReplica, request: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": f"status {status}"}}, status=status)

    return answer


async def break_off(replica: FakeReplica, request: web.Request) -> web.StreamResponse:
    """After the first event, or the first half of a whole answer."""
    is_stream = b'"stream"' in await request.read()
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream" if is_stream else "application/json"})
    await response.prepare(request)
    await response.write(b'data: {"n":0}\n\n' if is_stream else b'{"half": ')
    assert request.transport is not None
    request.transport.abort()
    return response


async def hang_up(replica: FakeReplica, request: web.Request) -> web.StreamResponse:
    """Before a byte."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


@dataclass(eq=False)
class FakeReplica:
    """num_left: clients that left before the end. gate: how many events of streams may follow their first."""

    name: str
    handler: Handler = answer_whole
    is_well: bool = True
    url: str = ""
    num_requests: int = 0
    num_left: int = 0
    gate: int = 100
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/health":
            return web.json_response({}, status=200 if self.is_well else 503)
        self.num_requests += 1
        self.headers.append(dict(request.headers))
        self.paths.append(request.raw_path)
        return await self.handler(self, request)

    async def until_open(self, number: int) -> None:
        while number >= self.gate:
            await asyncio.sleep(0.005)


class FakeServers:
    """An event loop in a thread, with a server for each replica."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="fake-replicas")
        self.thread.start()
        self.runners: dict[FakeReplica, web.ServerRunner] = {}

    def start(self, replica: FakeReplica, port: int = 0) -> FakeReplica:
        asyncio.run_coroutine_threadsafe(self._start(replica, port), self.loop).result(60)
        return replica

    async def _start(self, replica: FakeReplica, port: int) -> None:
        runner = web.ServerRunner(web.Server(replica.handle, handler_cancellation=True), shutdown_timeout=0.001)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", port)
        await site.start()
        replica.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self.runners[replica] = runner

    def stop(self, replica: FakeReplica) -> None:
        """Its connections end at once, and its port refuses new ones."""
        runner = self.runners.pop(replica)
        asyncio.run_coroutine_threadsafe(runner.cleanup(), self.loop).result(60)

    def close(self) -> None:
        for replica in list(self.runners):
            self.stop(replica)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@contextlib.contextmanager
def routed(
    *replicas: FakeReplica, api_key: str | None = "key", **flags: Any
) -> Iterator[tuple[str, Router, FakeServers]]:
    """The router's address, itself, and the servers of its replicas."""
    servers = FakeServers()
    try:
        for replica in replicas:
            servers.start(replica)
        config = RouterConfig(
            worker_urls=",".join(replica.url for replica in replicas), **{"policy": "round_robin", **FAST, **flags}
        )
        app = create_app(config, ListenConfig(api_key=api_key))
        with running_app(app) as url:
            yield url, app.state.router, servers
    finally:
        servers.close()
