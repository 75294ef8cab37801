"""The router among replicas that die and clients that misbehave: nothing is lost, and the others are served."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import aiohttp
import httpx
import pytest
from aiohttp import web

from part10_data_parallelism.router.app import Router
from part10_data_parallelism.router.replica import Circuit, Replica
from tests.part10.fake_replicas import FakeReplica, FakeServers, answer_status, answer_stream, routed
from tests.part10.test_router import BODY, KEY, LOOK_FAIL, TIMEOUT_S, ask, check_idle, until

LOOK_BODY = 'Look at router/app.py::Router.answer; README "What passes through".'
NUM_REQUESTS, NUM_CLIENTS = 5_000, 32


async def answer_either(replica: FakeReplica, request: web.Request) -> web.StreamResponse:
    """A stream of a few events, or a whole answer after about as long."""
    body = json.loads(await request.read())
    if not body.get("stream"):
        await asyncio.sleep(0.003)
        return web.json_response({"replica": replica.name, "n": body["n"]})
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for number in range(3):
        await response.write(f'data: {{"n": {body["n"]}, "event": {number}}}\n\n'.encode())
        await asyncio.sleep(0.001)
    await response.write(b"data: [DONE]\n\n")
    return response


def is_in_service(replica: Replica) -> bool:
    """For any number of requests: a half-open circuit lets one through."""
    return replica.is_available and replica.breaker.circuit is Circuit.CLOSED


class Trouble:
    """Kills a replica, starts it again, drains one, adds it again: something every few requests."""

    def __init__(self, url: str, router: Router, servers: FakeServers, replicas: list[FakeReplica]) -> None:
        self.url, self.router, self.servers, self.replicas = url, router, servers, replicas
        self.rng, self.counts, self.lock = random.Random(10), Counter[str](), threading.Lock()

    def make(self) -> None:
        with self.lock:
            self._make()

    def _make(self) -> None:
        known = {replica.url: replica for replica in self.router.pool.replicas}
        running = [r for r in self.replicas if r in self.servers.runners]
        in_service = [r for r in running if r.url in known and is_in_service(known[r.url])]
        stopped = [r for r in self.replicas if r not in self.servers.runners]
        removed = [r for r in running if r.url not in known]
        choices = []
        if len(in_service) > 2:  # one more may always die
            choices += ["kill", "drain"]
        if stopped:
            choices.append("start")
        if removed:
            choices.append("add")
        if not choices:
            return
        choice = self.rng.choice(choices)
        self.counts[choice] += 1
        if choice == "kill":
            self.servers.stop(self.rng.choice(in_service))
        elif choice == "start":
            replica = self.rng.choice(stopped)
            self.servers.start(replica, urlsplit(replica.url).port or 0)
        else:
            replica = self.rng.choice(in_service if choice == "drain" else removed)
            method = "DELETE" if choice == "drain" else "POST"
            answer = httpx.request(
                method, f"{self.url}/workers", json={"url": replica.url}, headers=KEY, trust_env=False
            )
            assert answer.status_code == 202, answer.text


async def send_all(url: str, trouble: Trouble) -> Counter[str]:
    """How the requests ended. A stream may end with an error event, if its replica was killed."""
    ends, numbers = Counter[str](), iter(range(NUM_REQUESTS))

    async def client(session: aiohttp.ClientSession) -> None:
        for number in numbers:
            is_stream = number % 3 == 0
            body = {**BODY, "n": number, "stream": is_stream}
            async with session.post(f"{url}/v1/completions", json=body, headers=KEY) as response:
                text = await response.text()
            ends[how_it_ended(response.status, text, number, is_stream)] += 1
            if number % 40 == 0:
                await asyncio.to_thread(trouble.make)

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(TIMEOUT_S)) as session:
        await asyncio.gather(*(client(session) for _ in range(NUM_CLIENTS)))
    return ends


def how_it_ended(status: int, text: str, number: int, is_stream: bool) -> str:
    if status != 200:
        return f"status {status}: {text}"
    if not is_stream:
        return "whole" if json.loads(text)["n"] == number else f"another's answer: {text}"
    events = [event.removeprefix("data: ") for event in text.split("\n\n") if event]
    if events[-1] != "[DONE]":
        return f"no end: {text}"
    if '"error"' in events[-2]:
        return "error event"
    expected = [{"n": number, "event": event} for event in range(3)]
    return "stream" if [json.loads(event) for event in events[:-1]] == expected else f"another's events: {text}"


def test_no_request_is_lost_while_replicas_die_and_come_and_go() -> None:
    replicas = [FakeReplica(name, answer_either) for name in "abcdef"]
    with routed(*replicas, policy="least_pending", max_retries=5) as (url, router, servers):
        trouble = Trouble(url, router, servers, replicas)
        ends = asyncio.run(send_all(url, trouble))
        check_idle(router)
    good = ("whole", "stream", "error event")
    bad = {end: count for end, count in ends.items() if end not in good}
    assert not bad and sum(ends.values()) == NUM_REQUESTS, f"lost: {bad}, of {ends}. {LOOK_FAIL}"
    assert min(trouble.counts[each] for each in ("kill", "start", "drain", "add")) >= 5, (
        f"{trouble.counts} is too little"
    )
    assert ends["error event"] < 0.02 * NUM_REQUESTS, f"{ends}: only the streams of killed replicas. {LOOK_FAIL}"


# Replicas that misbehave


class RawReplica:
    """A socket that answers every connection with the same bytes, or never."""

    def __init__(self, answer: bytes | None) -> None:
        self.answer = answer
        self.connections: list[socket.socket] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                self.connections.append(connection)
                if self.answer is not None:
                    connection.recv(65_536)
                    connection.sendall(self.answer)
                    connection.shutdown(socket.SHUT_WR)


GARBAGE: dict[str, bytes | None] = {
    "no HTTP": b"\x00\xff\x16\x03\x01 hello\r\n\r\n",
    "nothing": b"",
    "a status that is none": b"HTTP/1.1 abc OK\r\n\r\n",
    "too short": b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{}",
    "a bad chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
    "endless headers": b"HTTP/1.1 200 OK\r\n" + b"X: " + b"y" * 100_000,
}


@pytest.mark.parametrize("name", GARBAGE)
def test_a_replica_that_answers_garbage(name: str) -> None:
    raw, good = RawReplica(GARBAGE[name]), FakeReplica("good")
    thread = threading.Thread(target=raw.serve, daemon=True)
    thread.start()
    try:
        with routed(good, health_interval=3_600, api_key="key") as (url, router, _):
            router.pool.replicas.insert(0, Replica(raw.url))
            got = [ask(url) for _ in range(6)]
            assert [each.status_code for each in got] == [200] * 6, (
                f"{name}: {[each.text for each in got]}. {LOOK_FAIL}"
            )
            assert router.pool.replicas[0].num_failures == 3, f"{name}: its circuit opens. {LOOK_FAIL}"
            check_idle(router)
    finally:
        raw.listener.shutdown(socket.SHUT_RDWR)
        raw.listener.close()
        thread.join()
        for connection in raw.connections:
            connection.close()


@pytest.mark.parametrize("is_stream", [True, False])
def test_an_answer_that_becomes_garbage(is_stream: bool) -> None:
    """After its headers, and after a part of an event, which the client must not take for a whole one."""

    async def answer(replica: FakeReplica, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream" if is_stream else "text/json"})
        await response.prepare(request)
        await response.write(b'data: {"n": 0}\n\ndata: {"n": ')
        await asyncio.sleep(0.05)
        assert request.transport is not None
        request.transport.write(b"no chunk\r\n")
        await replica.until_open(0)  # the connection stays open
        return response

    bad, good = FakeReplica("bad", answer, gate=0), FakeReplica("good")
    with routed(bad, good, request_timeout=2.0) as (url, router, _):
        got = ask(url, stream=is_stream)
        if is_stream:
            events = got.text.split("\n\n")
            assert events[0] == 'data: {"n": 0}' and events[2:] == ["data: [DONE]", ""], f"{events}. {LOOK_FAIL}"
            assert events[1].startswith('data: {"error"'), f"{events}. {LOOK_FAIL}"
        else:
            assert got.json()["replica"] == "good", f"{got.text}. {LOOK_FAIL}"
        check_idle(router)
        bad.gate = 1


def test_no_cookie_of_a_replica_reaches_another_client() -> None:
    async def answer(replica: FakeReplica, request: web.Request) -> web.StreamResponse:
        return web.json_response({"got": request.headers.get("Cookie")}, headers={"Set-Cookie": "secret=1"})

    replica = FakeReplica("a", answer)
    with routed(replica) as (url, router, _):
        router.pool.replicas[0].url = replica.url.replace("127.0.0.1", "localhost")  # cookies belong to names
        got = [ask(url) for _ in range(2)]
        assert got[1].json() == {"got": None}, f"{got[1].text}. {LOOK_BODY}"
        assert "secret" in got[1].headers["set-cookie"], f"{got[1].headers}. {LOOK_BODY}"


def test_a_replica_that_is_killed_while_it_drains() -> None:
    a, b = FakeReplica("a", answer_stream, gate=1), FakeReplica("b")
    with routed(a, b) as (url, router, servers), ThreadPoolExecutor(1) as threads:
        stream = threads.submit(ask, url, stream=True)
        until(lambda: a.num_requests == 1, "the stream to begin")
        httpx.request("DELETE", f"{url}/workers", json={"url": a.url}, headers=KEY, trust_env=False).raise_for_status()
        servers.stop(a)
        events = stream.result(TIMEOUT_S).text.split("\n\n")
        assert '"error"' in events[-3] and events[-2] == "data: [DONE]", f"{events}. {LOOK_FAIL}"
        until(lambda: len(router.pool.replicas) == 1, f"it to be removed, not {router.pool.replicas}. {LOOK_FAIL}")
        assert ask(url).json()["replica"] == "b", LOOK_FAIL
        check_idle(router)


def test_a_replica_that_is_killed_during_a_health_check() -> None:
    """It has not answered yet. Requests go elsewhere, before the next check as well as after it."""

    class Slow(FakeReplica):
        num_checks = 0

        async def handle(self, request: web.Request) -> web.StreamResponse:
            if request.path == "/health":
                self.num_checks += 1
                await asyncio.sleep(TIMEOUT_S)
            return await super().handle(request)

    a, b = Slow("a"), FakeReplica("b")
    with routed(a, b) as (url, router, servers):
        until(lambda: a.num_checks == 1, "a health check")
        servers.stop(a)
        assert [ask(url).json()["replica"] for _ in range(4)] == ["b"] * 4, LOOK_FAIL
        until(lambda: not router.pool.replicas[0].is_healthy, f"the health checks to notice. {LOOK_FAIL}")
        assert [ask(url).json()["replica"] for _ in range(4)] == ["b"] * 4, LOOK_FAIL
        check_idle(router)


# Clients that misbehave


@pytest.mark.parametrize("body", [b'{"prompt": "\xff"}', b'{"prompt": ' + b"[" * 100_000, b"\x00", b"[]", b""])
def test_a_body_that_is_no_request_is_the_replicas_to_refuse(body: bytes) -> None:
    replica = FakeReplica("a", answer_status(400))
    with routed(replica, policy="cache_aware") as (url, router, _):
        headers = {**KEY, "Content-Type": "application/json"}
        got = httpx.post(f"{url}/v1/completions", content=body, headers=headers, timeout=TIMEOUT_S, trust_env=False)
        assert got.status_code == 400 and replica.num_requests == 1, f"{got.text}. {LOOK_BODY}"
        got = httpx.post(f"{url}/workers", content=body, headers=headers, timeout=TIMEOUT_S, trust_env=False)
        assert got.status_code == 400, f"{got.text}. {LOOK_BODY}"
        check_idle(router)


@pytest.mark.parametrize(
    "beginning",
    [b"", b"POST /v1/completions HTT", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Slow: y",
     b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key\r\nContent-Type: application/json\r\n"
     b"Content-Length: 1000\r\n\r\n{"],
    ids=["nothing", "half a line", "half of the headers", "half of the body"],
)  # fmt: skip
def test_clients_that_send_slowly_keep_nobody_from_being_served(beginning: bytes) -> None:
    """They have connections, and no place in the queue."""
    replica = FakeReplica("a")
    with routed(replica, max_requests_per_replica=2, max_queued_requests=2) as (url, router, _):
        address = ("127.0.0.1", urlsplit(url).port or 0)
        with contextlib.ExitStack() as stack:
            for _ in range(200):
                stack.enter_context(socket.create_connection(address)).sendall(beginning)
            got = [ask(url).status_code for _ in range(10)]
            assert got == [200] * 10, f"{got}. {LOOK_BODY}"
            check_idle(router)  # while they are still connected


@pytest.mark.parametrize(
    ("headers", "size", "status"),
    [({"X-Large": "x" * 200_000}, 10, 400), ({}, 1_000_001, 413), ({"Content-Type": "text/plain"}, 10, 415)],
    ids=["headers", "body", "type"],
)
def test_requests_that_are_too_large(headers: dict[str, str], size: int, status: int) -> None:
    """They are refused here, and no replica hears of them."""
    replica = FakeReplica("a")
    with routed(replica) as (url, router, _):
        with contextlib.suppress(httpx.TransportError):  # it may hang up while the rest is sent
            sent = {**KEY, "Content-Type": "application/json", **headers}
            got = httpx.post(f"{url}/v1/completions", content=b"x" * size, headers=sent, trust_env=False)
            assert got.status_code == status, f"expected {status}, got {got.status_code} {got.text}. {LOOK_BODY}"
        assert replica.num_requests == 0 and ask(url).status_code == 200, LOOK_BODY
        check_idle(router)


def test_a_client_may_leave_at_any_moment() -> None:
    """While it waits for its turn, for its answer, or in the middle of a stream: nothing of it is left."""
    replica = FakeReplica("a", answer_stream, gate=1)
    with routed(replica, max_requests_per_replica=4, max_queued_requests=100) as (url, router, _):

        async def leave(after_s: float) -> None:
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(after_s)) as session:
                with contextlib.suppress(asyncio.TimeoutError):
                    async with session.post(f"{url}/v1/completions", json=BODY, headers=KEY) as response:
                        await response.read()

        async def leave_in_the_stream() -> None:
            async with (
                aiohttp.ClientSession() as session,
                session.post(f"{url}/v1/completions", json=BODY, headers=KEY) as response,
            ):
                assert await response.content.readany(), LOOK_FAIL

        async def leave_all() -> None:
            early = (leave(0.02 * number) for number in range(1, 41))
            await asyncio.gather(*early, *(leave_in_the_stream() for _ in range(4)))

        asyncio.run(leave_all())
        check_idle(router)
        replica.gate = 100
        assert ask(url).status_code == 200, LOOK_FAIL
        until(lambda: replica.num_left >= 4, f"the replica to notice. {LOOK_FAIL}")
