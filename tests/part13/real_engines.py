"""Engines in processes of their own, the proxy in front of them, and an engine that computes alone, for comparison.

Of part 13, or of the later part that is named.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import json
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import torch

from common.checkpoint import load_model, resolve_checkpoint
from common.serve import ListenConfig, running_app
from common.testing import assert_same_greedy
from part13_disaggregation.disagg.proxy import Proxy
from part13_disaggregation.kv_params import SECRET_VARIABLE
from tests.forked_servers import GREEDY, ForkedServer, Host, is_alive, until
from tests.http_checks import COMPLETIONS
from tests.part10.fake_replicas import FAST
from tests.process_checks import TIMEOUT_S, ServerClient

PART = "part13_disaggregation"
SECRET, KEY = "a secret of the tests", {"Authorization": "Bearer key"}
FLAGS = ["--num-threads", "1", "--model", "tiny"]
POOL = ["--num-kv-blocks", "300"]
SENDS = ["--kv-connector", "shm", "--kv-transfer-secret", SECRET]
LOOK_FREE = 'Look at core/kv_transfer.py::KVTransfer and worker/kv_sender.py::KVSender; README "Delayed free".'
LOOK_SOURCES = "Look at disagg/proxy.py::Proxy.is_healthy and roles.py::fetch_kv_sources."


def prompt_of(number: int, num_tokens: int) -> list[int]:
    """Token ids that no other number has."""
    return [(37 * place + 101 * number) % 3_800 + 100 + number % 7 for place in range(num_tokens)]


# Engines


class Engines:
    """Forks engines, which end with the block that `forked` opens. Several threads may call it."""

    def __init__(self, host: Host, part: str = PART) -> None:
        self.host, self.part, self.lock = host, part, threading.Lock()
        self.started: list[ForkedServer] = []

    def start(self, *flags: str, **changes: Any) -> ForkedServer:
        """changes: see Host.start."""
        with self.lock:
            engine = self.host.serve(self.part, *FLAGS, *flags, **changes)
            self.started.append(engine)
        return engine


@contextlib.contextmanager
def forked(host: Host, part: str = PART) -> Iterator[Engines]:
    engines = Engines(host, part)
    try:
        yield engines
    finally:
        for engine in engines.started:
            kill(engine)
        until(lambda: not any(is_alive(each.pid) or is_alive(each.core) for each in engines.started), "all to end")


def kill(engine: ForkedServer) -> None:
    """The whole engine at once, as if its machine had failed."""
    for pid in (engine.pid, engine.core):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def counters(engine: ServerClient) -> dict[str, float]:
    """Its gauges and counters as they are now: an engine sends them to its server when a message comes."""
    poke = engine.post(COMPLETIONS, {**GREEDY, "prompt": [7], "max_tokens": 1})
    assert poke.status_code == 200, f"{poke.text}. {LOOK_FREE}"
    found = re.findall(r"^engine:(\w+) ([0-9].*)$", engine.get("/metrics").text, re.MULTILINE)
    return {name.removesuffix("_total"): float(value) for name, value in found}


def counter(engine: ServerClient, name: str) -> float:
    return counters(engine)[name]


def check_free(*engines: ServerClient) -> None:
    """Soon no request is left, and all blocks are free."""
    names = ("kv_cache_usage_perc", "num_requests_running", "num_requests_waiting")
    for engine in engines:
        last: list[float] = []

        def is_free(engine: ServerClient = engine, last: list[float] = last) -> bool:
            found = counters(engine)
            last[:] = [found[name] for name in names]
            return not any(last)

        until(is_free, f"{names} of {engine.url} to be 0. {LOOK_FREE}")


# The proxy


@contextlib.contextmanager
def proxied(
    prefill: Sequence[ServerClient], decode: Sequence[ServerClient], engine_flags: Sequence[str] = (), /,
    part: str = PART, **flags: Any,
) -> Iterator[tuple[str, Proxy]]:  # fmt: skip
    """The proxy's address, and itself. It runs in this process; the engines don't."""
    disagg = importlib.import_module(f"{part}.disagg.proxy")
    config = disagg.DisaggConfig(
        prefill_urls=",".join(engine.url for engine in prefill), decode_urls=",".join(engine.url for engine in decode),
        **{"policy": "round_robin", "kv_transfer_secret": SECRET, "remote_prefill_chars": 0, **FAST,
           "request_timeout": TIMEOUT_S, "health_timeout": TIMEOUT_S, **flags},
    )  # fmt: skip
    app = disagg.create_app(config, ListenConfig(api_key="key"), engine_flags)
    with running_app(app) as url:
        proxy: Proxy = app.state.router
        until(lambda: all(replica.kv_sources for replica in proxy.pool.replicas), f"all sources. {LOOK_SOURCES}")
        yield url, proxy


class ForkedReplica:
    """What the proxy starts in place of a ReplicaProcess: a real engine as well, but it starts within a second."""

    engines: Engines

    def __init__(self, server: ForkedServer) -> None:
        self.server, self.url = server, server.url
        self.ended = asyncio.create_task(self._poll())

    @classmethod
    async def start(cls, flags: Sequence[str], host: str = "", env: Mapping[str, str] | None = None) -> ForkedReplica:
        secret = ["--kv-transfer-secret", (env or {})[SECRET_VARIABLE]]
        return cls(await asyncio.to_thread(cls.engines.start, *flags, *secret))

    async def _poll(self) -> None:
        while is_alive(self.server.pid):
            await asyncio.sleep(0.02)

    async def wait(self) -> str:
        await asyncio.shield(self.ended)
        return "has ended"

    async def stop(self, timeout_s: float = 0.0) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.server.pid, signal.SIGTERM)
        await asyncio.wait_for(asyncio.shield(self.ended), TIMEOUT_S)


def admin(method: str, where: str, **fields: Any) -> Any:
    got = httpx.request(method, where, json=fields or None, headers=KEY, timeout=TIMEOUT_S, trust_env=False)
    assert got.is_success, got.text
    return got.json()


# Clients


class Client(ServerClient):
    """Of the proxy, with its key."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, path: str = COMPLETIONS, **fields: Any) -> httpx.Response:
        return self.post(path, {**GREEDY, **fields}, KEY)

    def ask_for_ids(self, prompt: list[int] | list[list[int]], max_tokens: int, **fields: Any) -> list[list[int]]:
        """Of each choice. prompt: one, or several."""
        got = self.ask(prompt=prompt, max_tokens=max_tokens, return_token_ids=True, **fields)
        assert got.status_code == 200, f"{got.status_code}: {got.text}"
        return [choice["token_ids"] for choice in got.json()["choices"]]

    def streamed(
        self, prompt: list[int], max_tokens: int, after_first: Callable[[], object] = lambda: None
    ) -> Streamed:
        """A whole stream. after_first: is called after its first event."""
        body = {**GREEDY, "prompt": prompt, "max_tokens": max_tokens, "return_token_ids": True, "stream": True}
        with self.stream(COMPLETIONS, body, KEY) as response:
            chunks = response.iter_text()
            text = next(chunks)
            after_first()
            text += "".join(chunks)
        return read_events(text)

    def begin(self, **fields: Any) -> socket.socket:
        """Send a request, and read nothing."""
        content = json.dumps({**GREEDY, **fields}).encode()
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nContent-Type: application/json\r\n"
        head += f"Authorization: {KEY['Authorization']}\r\nContent-Length: {len(content)}\r\n\r\n"
        connection = socket.create_connection(("127.0.0.1", self.port))
        connection.sendall(head.encode() + content)
        return connection


@dataclass(frozen=True)
class Streamed:
    """token_ids: that came before its end. error: of an error event, or None."""

    token_ids: list[int]
    error: str | None


def read_events(text: str) -> Streamed:
    """Raises AssertionError if a stream has no end."""
    events = [event.removeprefix("data: ") for event in text.split("\n\n") if event]
    assert events and events[-1] == "[DONE]", f"expected a stream that ends, got {text[-300:]!r}"
    parsed = [json.loads(event) for event in events[:-1]]
    errors = [event["error"]["message"] for event in parsed if "error" in event]
    token_ids = [token for event in parsed for choice in event.get("choices", ()) for token in choice["token_ids"]]
    return Streamed(token_ids, errors[0] if errors else None)


# What is right


@functools.cache
def reference() -> Any:
    return load_model(resolve_checkpoint("tiny"), torch.float32, "cpu")


class Oracle:
    """An engine that computes alone, and its answers."""

    def __init__(self, engine: ForkedServer) -> None:
        self.client = Client(engine.url)
        self.known: dict[tuple[int, ...], list[int]] = {}

    def answer(self, prompt: list[int], max_tokens: int) -> list[int]:
        key = (max_tokens, *prompt)
        if key not in self.known:
            [self.known[key]] = self.client.ask_for_ids(prompt, max_tokens)
        return self.known[key]

    def check(self, prompt: list[int], max_tokens: int, got: list[int], where: str) -> None:
        """Token for token; ties may be broken either way."""
        expected = self.answer(prompt, max_tokens)
        if got != expected:
            assert_same_greedy(reference(), prompt, got, expected, where)

    def check_beginning(self, prompt: list[int], max_tokens: int, got: list[int], where: str) -> None:
        """Of an answer that has broken off."""
        expected = self.answer(prompt, max_tokens)[: len(got)]
        if got != expected:
            assert_same_greedy(reference(), prompt, got, expected, where)
