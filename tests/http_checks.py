"""What the tests of every server need: its endpoints, raw requests, and waiting that says what did not happen."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

DEADLINE_S = 20  # for what takes milliseconds; only a mistake makes a test wait this long
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "Hi"}
both_endpoints = pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
streamed_or_not = pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])


class Watched:
    """An ASGI app that counts the requests to another, and keeps its event loop and what it raises on a request."""

    def __init__(self, app: Any) -> None:
        self.app, self.state = app, app.state
        self.num_begun = self.num_ended = 0
        self.errors: list[BaseException] = []
        self.loop: asyncio.AbstractEventLoop | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.loop = asyncio.get_running_loop()
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        self.num_begun += 1
        try:
            await self.app(scope, receive, send)
        except BaseException as error:
            self.errors.append(error)
            raise
        finally:
            self.num_ended += 1


def until(condition: Callable[[], object], what: str) -> None:
    """Wait for the condition; fails with `expected <what>` at the deadline."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"expected {what.rstrip('.')}. Nothing happened for {DEADLINE_S} s."
        time.sleep(0.002)


def request_bytes(path: str, content: bytes, length: int | None = None) -> bytes:
    """A POST as it goes over the wire; length: what its header says, if not the truth."""
    length = len(content) if length is None else length
    headers = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}"
    return f"POST {path} HTTP/1.1\r\n{headers}\r\n\r\n".encode() + content


def send_raw(url: str, data: bytes) -> socket.socket:
    """Send these bytes to the server and leave its answer in the socket."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=DEADLINE_S)
    connection.sendall(data)
    return connection


def read_until(connection: socket.socket, words: bytes, times: int = 1) -> bytes:
    """What comes in, up to where the words have come so many times."""
    data = b""
    while data.count(words) < times:
        try:
            chunk = connection.recv(65536)
        except TimeoutError:
            pytest.fail(f"expected {words!r} {times} times within {DEADLINE_S} s, got {data!r}")
        assert chunk, f"the connection ended before {words!r} came {times} times: {data!r}"
        data += chunk
    return data
