"""The router's settings, one flag each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from common.cli import check_minimums, option
from common.errors import FieldError

from .policies import PolicyName

MAX_SECONDS, MAX_COUNT = 86_400, 1_024


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """Raises FieldError naming a flag that is out of range."""

    worker_urls: str | None = option(None, "the replicas' addresses, comma-separated")
    worker_dns: str | None = option(
        None, "http://name:port, where the name has an address for each replica, such as a headless service"
    )
    replicas: int = option(0, "replicas to start; what follows -- are their flags", 0)
    replica_backend: Literal["process", "ray"] = option("process", "where to start them: here, or on a Ray cluster")
    ray_address: str = option("auto", "ray: the cluster's address, host:port")
    replica_cpus: float = option(1.0, "ray: CPUs that a replica needs")
    replica_gpus: float = option(0.0, "GPUs that each replica has for itself (0: all replicas see all GPUs)")
    policy: PolicyName = option("cache_aware", "which replica gets a request")
    cache_aware_chars: int = option(8_000_000, "cache_aware: characters of prompts to remember of each replica", 64)
    allowed_origins: str | None = option(
        None, "web pages that may use this server: origins, comma-separated, or * (None: those of this machine)"
    )
    session_header: str = option("x-session-id", "consistent_hash: the header that names a client's session")
    client_keys: str | None = option(
        None,
        "bearer tokens besides api_key, comma-separated: their clients take turns, and can't change the pool",
    )
    max_requests_per_replica: int = option(96, "requests sent at once, times the replicas in service", 1)
    max_queued_requests: int = option(256, "requests that may wait here; one more gets status 429", 0)
    max_retries: int = option(2, "other replicas to try if one fails", 0)
    discovery_interval: float = option(5.0, "worker_dns: seconds between two lookups")
    health_interval: float = option(1.0, "seconds between two health checks of a replica")
    health_timeout: float = option(2.0, "seconds that a health check may take")
    connect_timeout: float = option(2.0, "seconds to connect to a replica")
    request_timeout: float = option(600.0, "seconds without a byte from a replica")

    def __post_init__(self) -> None:
        check_minimums(self)
        for name in ("discovery_interval", "health_interval", "health_timeout", "connect_timeout", "request_timeout"):
            if not 0 < getattr(self, name) <= MAX_SECONDS:
                raise FieldError(name, f"expected seconds, above 0 and up to {MAX_SECONDS}, got {getattr(self, name)}")
        for name in ("replicas", "replica_cpus", "replica_gpus"):
            if not 0 <= getattr(self, name) <= MAX_COUNT:
                raise FieldError(name, f"expected 0 to {MAX_COUNT}, got {getattr(self, name)}")
        if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", self.session_header):
            raise FieldError("session_header", f"expected the name of a header, got {self.session_header[:100]!r}")
        if self.replica_backend == "process" and not self.replica_gpus.is_integer():
            raise FieldError("replica_gpus", f"expected a whole number without Ray, got {self.replica_gpus}")
        if not self.urls and not self.num_to_start and self.worker_dns is None:
            raise FieldError("worker_urls", "expected at least one, or worker_dns, or replicas to start")
        for url in self.urls:
            if self.urls.count(url) > 1:
                raise FieldError("worker_urls", f"expected different ones, got {url} twice")
        if self.worker_dns is not None:
            check_url(self.worker_dns, "worker_dns")

    @property
    def num_to_start(self) -> int:
        return self.replicas

    @property
    def urls(self) -> list[str]:
        return [check_url(url.strip(), "worker_urls") for url in (self.worker_urls or "").split(",") if url.strip()]


def check_url(url: str, field: str) -> str:
    """The URL of a replica, in one spelling: without a slash at its end. Raises FieldError."""
    try:
        parts = urlsplit(url)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_valid = False
    if not is_valid or re.search(r"[\s?#@\\]", url):
        raise FieldError(field, f"expected http://host:port, got {url[:100]!r}")
    return f"{parts.scheme}://{parts.netloc.lower()}{parts.path.rstrip('/')}"
