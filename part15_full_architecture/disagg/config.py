"""The proxy's settings: the router's, and which engines have which role."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from common.cli import option
from common.errors import FieldError

from ..kv_params import MIN_SECRET_CHARS, SECRET_VARIABLE
from ..router.config import MAX_COUNT, RouterConfig, check_url
from ..router.replica import Role


@dataclass(frozen=True, slots=True)
class DisaggConfig(RouterConfig):
    """Raises FieldError naming a flag that is out of range."""

    worker_urls: str | None = option(None, "not here: see prefill_urls and decode_urls")
    replicas: int = option(0, "not here: see prefill and decode", 0)
    prefill: int = option(0, "prefill engines to start; what follows -- are the flags of all engines", 0)
    decode: int = option(0, "decode engines to start", 0)
    prefill_urls: str | None = option(None, "the addresses of prefill engines that run already, comma-separated")
    decode_urls: str | None = option(None, "the addresses of decode engines that run already, comma-separated")
    remote_prefill_chars: int = option(
        1000, "a decode engine computes a prompt itself if fewer of its characters than this are new to that engine", 0
    )
    kv_transfer_secret: str | None = option(
        None,
        f"what the proxy signs its orders to engines with; they need the same (None: {SECRET_VARIABLE} from the "
        "environment, or a new one if the proxy starts all engines)",
    )

    def __post_init__(self) -> None:
        for name, instead in (("worker_urls", "prefill_urls and decode_urls"), ("replicas", "prefill and decode")):
            if getattr(self, name):
                raise FieldError(name, f"expected {instead} instead, got {str(getattr(self, name))[:100]!r}")
        for name in ("prefill", "decode"):
            if not 0 <= getattr(self, name) <= MAX_COUNT:
                raise FieldError(name, f"expected 0 to {MAX_COUNT}, got {getattr(self, name)}")
        urls = dict[str, Role]()
        for url, role in self.engines:
            if url in urls:
                raise FieldError(f"{role.value}_urls", f"expected different addresses, got {url} twice")
            urls[url] = role
        if not urls and not self.num_to_start and self.worker_dns is None:
            raise FieldError("decode", "expected at least one engine: prefill, decode, prefill_urls or decode_urls")
        if self.replica_backend != "process":
            raise FieldError("replica_backend", f"expected process with roles, got {self.replica_backend}")
        RouterConfig.__post_init__(self)

    @property
    def num_to_start(self) -> int:
        return self.prefill + self.decode

    @property
    def engines(self) -> list[tuple[str, Role]]:
        """The addresses of those that run already. Raises FieldError."""
        given = ((self.prefill_urls, Role.PREFILL), (self.decode_urls, Role.DECODE))
        return [
            (check_url(url.strip(), f"{role.value}_urls"), role)
            for urls, role in given
            for url in (urls or "").split(",")
            if url.strip()
        ]

    @property
    def urls(self) -> list[str]:
        return [url for url, _ in self.engines]


def secret_of(config: DisaggConfig) -> str:
    """The secret that the proxy shares with its engines. Raises FieldError if it is too short, or if there is none and
    some engines run already."""
    secret = config.kv_transfer_secret
    if secret is None:
        secret = os.environ.get(SECRET_VARIABLE)
    if secret is None and (config.urls or config.worker_dns is not None):
        raise FieldError("kv_transfer_secret", f"expected that of the engines, here or in {SECRET_VARIABLE}, got none")
    if secret is None:
        return secrets.token_hex(32)
    if len(secret.strip()) < MIN_SECRET_CHARS:
        raise FieldError("kv_transfer_secret", f"expected at least {MIN_SECRET_CHARS} characters, got {len(secret)}")
    return secret


def with_kv_connector(flags: Sequence[str], platform: str = sys.platform) -> list[str]:
    """The flags of an engine that can fetch KV from others, and send it: they are on one machine."""
    if any(flag.partition("=")[0] == "--kv-connector" for flag in flags):
        return list(flags)
    return [*flags, "--kv-connector", "shm" if platform == "linux" else "tcp"]
