"""The router's settings, one flag each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from common.cli import check_minimums, option
from common.errors import FieldError

from .policies import PolicyName


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
    replica_gpus: float = option(0.0, "ray: GPUs that a replica needs")
    policy: PolicyName = option("cache_aware", "which replica gets a request")
    cache_aware_chars: int = option(8_000_000, "cache_aware: characters of prompts to remember of each replica", 64)
    session_header: str = option("x-session-id", "consistent_hash: the header that names a client's session")
    client_keys: str | None = option(
        None,
        "bearer tokens besides api_key, comma-separated: their clients take turns, and can't change the pool",
    )
    max_requests_per_replica: int = option(96, "requests sent to a replica at once", 1)
    max_queued_requests: int = option(256, "requests that may wait here; one more gets status 429", 0)
    max_retries: int = option(2, "other replicas to try if one fails before its first byte", 0)
    discovery_interval: float = option(5.0, "worker_dns: seconds between two lookups")
    health_interval: float = option(1.0, "seconds between two health checks of a replica")
    health_timeout: float = option(2.0, "seconds that a health check may take")
    connect_timeout: float = option(2.0, "seconds to connect to a replica")
    request_timeout: float = option(600.0, "seconds without a byte from a replica")

    def __post_init__(self) -> None:
        check_minimums(self)
        for name in ("discovery_interval", "health_interval", "health_timeout", "connect_timeout", "request_timeout"):
            if not 0 < getattr(self, name) < 86_400:
                raise FieldError(name, f"expected seconds, above 0, got {getattr(self, name)}")
        for name in ("replica_cpus", "replica_gpus"):
            if not 0 <= getattr(self, name) < 1_024:
                raise FieldError(name, f"expected 0 or more, got {getattr(self, name)}")
        if not self.urls and not self.replicas and self.worker_dns is None:
            raise FieldError("worker_urls", "expected at least one, or worker_dns, or replicas to start")
        for url in self.urls:
            check_url(url, "worker_urls")
            if self.urls.count(url) > 1:
                raise FieldError("worker_urls", f"expected different ones, got {url} twice")
        if self.worker_dns is not None:
            check_url(self.worker_dns, "worker_dns")

    @property
    def urls(self) -> list[str]:
        return [url.strip().rstrip("/") for url in (self.worker_urls or "").split(",") if url.strip()]


def check_url(url: str, field: str) -> str:
    """The URL of a replica, without a slash at its end. Raises FieldError."""
    try:
        parts = urlsplit(url)
        is_valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not parts.query
    except ValueError:
        is_valid = False
    if not is_valid:
        raise FieldError(field, f"expected http://host:port, got {url[:100]!r}")
    return url.rstrip("/")
