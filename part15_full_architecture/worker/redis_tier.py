"""KV blocks in a Redis server, which engines on many machines share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

TIMEOUT_S = 1.0  # to connect, and for each answer
PREFIX = "kv:"


class RedisTier:
    """One string for each block. The server decides what it evicts: set its maxmemory, and maxmemory-policy to
    allkeys-lru.

    Nothing is sent before the first call, so an engine starts without its server.
    """

    def __init__(self, url: str) -> None:
        """Raises ValueError if the URL is not one of a Redis server, or has options that can't be used."""
        self._server = redis.Redis.from_url(
            url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S,
            retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),  # the server was restarted
        )  # fmt: skip
        pool = self._server.connection_pool
        try:
            pool.make_connection()  # which doesn't connect
        except (TypeError, AttributeError) as error:
            raise ValueError(f"an option of the URL can't be used: {error}") from error
        options = pool.connection_kwargs
        if options.get("decode_responses") or not isinstance(options["retry"], Retry) or urlsplit(url).port == 0:
            raise ValueError("the options decode_responses and retry, and port 0, can't be used")
        host, port = options.get("host") or "localhost", options.get("port", 6379)
        self.name = f"Redis {options.get('path') or f'{host}:{port}'}"  # without the URL's password

    def contains(self, keys: Sequence[str]) -> list[bool]:
        with self._as_os_errors(), self._server.pipeline(transaction=False) as pipeline:
            for key in keys:
                pipeline.exists(PREFIX + key)
            return [bool(found) for found in pipeline.execute()]

    def read(self, keys: Sequence[str]) -> list[bytes | None]:
        with self._as_os_errors():
            found: list[bytes | None] = self._server.mget([PREFIX + key for key in keys])  # type: ignore[assignment]
            return found

    def write(self, key: str, data: bytes) -> None:
        with self._as_os_errors():
            self._server.set(PREFIX + key, data)

    def delete(self, key: str) -> None:
        with self._as_os_errors():
            self._server.delete(PREFIX + key)

    @contextlib.contextmanager
    def _as_os_errors(self) -> Iterator[None]:
        try:
            yield
        except (redis.RedisError, UnicodeError) as error:  # UnicodeError: of a host's name
            raise OSError(f"{type(error).__name__}: {error}") from error
