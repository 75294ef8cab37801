"""Send a request to a replica, and pass its answer through byte for byte."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass

import aiohttp
from yarl import URL

from .config import RouterConfig
from .replica import Attempt, Replica

HOP_BY_HOP = {
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding",
    "upgrade", "host", "content-length", "expect",
}  # fmt: skip
NOT_FORWARDED = {*HOP_BY_HOP, "origin"}  # the router has decided whether a web page may use it
NOT_PASSED_BACK = {*HOP_BY_HOP, "date", "server"}  # the router has its own
KEEP_ALIVE_S = 4.0  # less than uvicorn's: a connection must not be closed while a request is on its way
BUSY, UNAVAILABLE = 429, (502, 503, 504)
Headers = list[tuple[bytes, bytes]]  # as ASGI has them


class ReplicaError(Exception):
    """A replica was not reached, or its answer broke off. The message names it. may_retry: elsewhere; not after a
    time-out, since another replica would need as long."""

    def __init__(self, message: str, may_retry: bool = True) -> None:
        super().__init__(message)
        self.may_retry = may_retry


class Watch:
    """Calls on_silence() when nothing has come for timeout_s. (aiohttp has a time-out, too, but not for a wait that was
    under way when its parser failed.)"""

    def __init__(self, timeout_s: float, on_silence: Callable[[], None]) -> None:
        self.timeout_s, self.on_silence, self.last_s = timeout_s, on_silence, time.monotonic()
        self.timer = asyncio.get_running_loop().call_later(timeout_s, self._check)

    def _check(self) -> None:
        left_s = self.last_s + self.timeout_s - time.monotonic()
        if left_s <= 0:
            self.on_silence()
        else:
            self.timer = asyncio.get_running_loop().call_later(left_s, self._check)


@dataclass(slots=True)
class Answer:
    """A replica's answer: a stream, or read to its end. Call close() in the end, which tells the replica to stop if it
    has not ended."""

    response: aiohttp.ClientResponse
    attempt: Attempt
    timeout_s: float
    content: bytes = b""

    @property
    def status(self) -> int:
        return self.response.status

    @property
    def is_stream(self) -> bool:
        return self.response.content_type == "text/event-stream"

    @property
    def headers(self) -> Headers:
        return [
            (name.lower(), value)
            for name, value in self.response.raw_headers
            if name.lower().decode("latin-1") not in NOT_PASSED_BACK
        ]

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives. Raises ReplicaError."""
        watch = Watch(self.timeout_s, self.close)
        try:
            async for chunk in self.response.content.iter_any():
                watch.last_s = time.monotonic()
                yield chunk
        except Exception as error:  # RuntimeError as well, if the body is malformed
            raise _as_replica_error(f"{self.attempt.replica.url} broke off", error) from error
        finally:
            watch.timer.cancel()

    def close(self) -> None:
        self.response.close()


class Forwarder:
    """Connections to all replicas. start() on the event loop."""

    def __init__(self, config: RouterConfig) -> None:
        self.config = config
        self.session: aiohttp.ClientSession | None = None
        self.responses: weakref.WeakSet[aiohttp.ClientResponse] = weakref.WeakSet()  # those that may not have ended

    def start(self) -> None:
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=self.config.connect_timeout, sock_read=self.config.request_timeout
        )
        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S), timeout=timeout,
            auto_decompress=False, trust_env=False, cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        )  # fmt: skip

    async def close(self) -> None:
        """Readers of open responses get an error."""
        for response in list(self.responses):
            response.close()
        if self.session is not None:
            await self.session.close()

    async def send(
        self, attempt: Attempt, method: str, path: str, headers: Iterable[tuple[bytes, bytes]], body: bytes
    ) -> Answer:
        """Returns when a stream begins, or when another answer is complete: nothing of it was sent on, so it can still
        be asked for elsewhere. Raises ReplicaError.

        path: with the query, as the client sent it.
        """
        assert self.session is not None, "start() was called"
        passed = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]
        passed = [(name, value) for name, value in passed if name.lower() not in NOT_FORWARDED]
        try:
            response = await self.session.request(
                method,
                URL(f"{attempt.replica.url}{path}", encoded=True),
                headers=passed,
                data=body or None,
                allow_redirects=False,
            )
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
            raise _as_replica_error(f"{attempt.replica.url} does not answer", error) from error
        self.responses.add(response)
        answer = Answer(response, attempt, self.config.request_timeout)
        if not answer.is_stream:
            try:
                answer.content = b"".join([chunk async for chunk in answer.chunks()])
            except BaseException:
                answer.close()
                raise
        return answer

    async def is_healthy(self, replica: Replica) -> bool:
        assert self.session is not None, "start() was called"
        timeout = aiohttp.ClientTimeout(total=self.config.health_timeout)
        try:
            async with self.session.get(f"{replica.url}/health", timeout=timeout, allow_redirects=False) as response:
                return response.status == 200
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError):
            return False


def _as_replica_error(what: str, error: Exception) -> ReplicaError:
    if isinstance(error, aiohttp.ClientPayloadError | aiohttp.ServerDisconnectedError):
        why = "the connection was closed"
    else:
        why = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    is_late = isinstance(error, asyncio.TimeoutError) and not isinstance(error, aiohttp.ConnectionTimeoutError)
    return ReplicaError(f"{what}: {why}", may_retry=not is_late)
