"""Engines by role: which ones answer requests, which ones compute prompts, and what the proxy counts of them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import aiohttp
import msgspec
from prometheus_client import Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from common.errors import FieldError

from ..kv_params import KVSource
from ..router.metrics import Metrics
from ..router.policies import Policy, RoutedRequest, make_policy
from ..router.pool import Pool
from ..router.prefix_index import PrefixIndex
from ..router.replica import Replica, Role
from .config import DisaggConfig


class RolePool(Pool):
    """Prefill engines and decode engines, each with a policy of their own. Only decode engines answer requests, unless
    there are none. prompts: what was sent to each of those."""

    def __init__(self, config: DisaggConfig) -> None:
        policy, self.prefill_policy = (_policy_of(config) for _ in range(2))
        super().__init__(policy, config.max_requests_per_replica, config.max_queued_requests)
        self.prompts = PrefixIndex(config.cache_aware_chars)

    def for_answers(self, replicas: list[Replica]) -> list[Replica]:
        """The decode engines. If there are none, prefill engines do both: every engine can."""
        return [replica for replica in replicas if replica.role is Role.DECODE] or replicas

    def choose_prefill(self, request: RoutedRequest, tried: list[Replica]) -> Replica | None:
        """Of the prefill engines that are available, can send KV, and were not tried yet. None if there are none."""
        candidates = [
            replica
            for replica in self.replicas
            if replica.role is Role.PREFILL and replica.is_available and replica.kv_sources and replica not in tried
        ]
        return self.prefill_policy.choose(candidates, request) if candidates else None

    def note_prompt(self, prompt: str, replica: Replica) -> int:
        """A replica is sent a prompt. Returns how many characters of it are probably not in its cache."""
        _, num_cached_chars = self.prompts.match(prompt, [replica])
        self.prompts.insert(prompt, replica)
        return len(prompt) - num_cached_chars

    def forget(self, replica: Replica) -> None:
        super().forget(replica)
        self.prefill_policy.forget(replica)
        self.prompts.remove(replica)


def _policy_of(config: DisaggConfig) -> Policy:
    return make_policy(config.policy, config.cache_aware_chars)


def role_of(given: dict[str, Any], default: Role | None = None) -> Role:
    """The role that an operator has named. Raises FieldError."""
    name = given.get("role", default.value if default else None)
    for role in Role:
        if name == role.value:
            return role
    raise FieldError("role", f"expected {' or '.join(role.value for role in Role)}, got {str(name)[:100]!r}")


class ProxyMetrics(Metrics):
    """The router's, and where prompts were computed."""

    def __init__(self, pool: Pool) -> None:
        super().__init__(pool)
        self.remote_prefills = Counter(
            "router:remote_prefills", "Prompts that a prefill engine was to compute.", registry=self.registry
        )
        self.local_prefills = Counter(
            "router:local_prefills", "Prompts left to the decode engine, and why.", ["reason"], registry=self.registry
        )

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        yield from super().collect()
        family = GaugeMetricFamily("router:replica_role", "1 for the role of a replica.", labels=["replica", "role"])
        for replica in self.pool.replicas:
            family.add_metric([replica.url, replica.role.value], 1.0)
        yield family


class KVTransferInfo(msgspec.Struct):
    """What GET /kv_transfer of an engine answers."""

    sources: tuple[KVSource, ...]


async def fetch_kv_sources(
    session: aiohttp.ClientSession, url: str, api_key: str | None, timeout_s: float
) -> tuple[KVSource, ...]:
    """Where other engines can fetch the KV of the engine at url; nowhere if it doesn't say."""
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    try:
        async with session.get(
            f"{url}/kv_transfer", headers=headers, timeout=timeout, allow_redirects=False
        ) as response:
            body = await response.read() if response.status == 200 else b""
        return msgspec.json.decode(body, type=KVTransferInfo).sources
    except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError):  # ValueError: a wrong URL, or no such JSON
        return ()
