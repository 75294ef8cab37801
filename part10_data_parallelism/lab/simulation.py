"""The router's policies in front of many simulated replicas: how hit rate and imbalance grow with their number.

The policies are the router's own, with its `Replica` objects. Simulated are only the clients and the replicas: each one
computes the prompts that it gets one after the other, finds their beginnings in a prefix cache of limited size, and
decodes all requests that it has at once.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..router.policies import MIN_MATCH, CacheAware, Policy, RoutedRequest
from ..router.prefix_index import CHUNK_CHARS, hash_chunks
from ..router.replica import Replica
from .tenants import TenantRequest


@dataclass(slots=True)
class Speed:
    """Of a replica. prefill_chars_per_s: of prompts that are not cached. tokens_per_s: of one request that decodes
    alone; slowdown: how much longer a step takes with each further one."""

    prefill_chars_per_s: float = 60_000.0
    tokens_per_s: float = 60.0
    slowdown: float = 0.02
    cache_chars: int = 400_000


@dataclass(slots=True)
class SimulatedReplica:
    """free_at_s: when the prompts that it has are computed."""

    replica: Replica
    speed: Speed
    free_at_s: float = 0.0
    chunks: OrderedDict[bytes, None] = field(default_factory=OrderedDict)

    def take(self, request: TenantRequest) -> tuple[float, float, int, int]:
        """Returns when its first token and its last one come, and how many characters were found and computed."""
        hashes = list(hash_chunks(request.prompt))
        num_found = len(list(itertools.takewhile(lambda chunk: chunk in self.chunks, hashes)))
        for chunk in reversed(hashes):
            self.chunks[chunk] = None
            self.chunks.move_to_end(chunk)
        while len(self.chunks) > self.speed.cache_chars // CHUNK_CHARS:
            self.chunks.popitem(last=False)
        found = min(num_found * CHUNK_CHARS, len(request.prompt) - 1)
        computed = len(request.prompt) - found
        start_s = max(request.arrival_s, self.free_at_s)
        self.free_at_s = first_s = start_s + computed / self.speed.prefill_chars_per_s
        pace = self.speed.tokens_per_s / (1 + self.speed.slowdown * self.replica.num_pending)
        return first_s, first_s + request.max_tokens / pace, found, computed


class SmallestTree(CacheAware):
    """How not to do it: what no replica has in its cache goes to the replica that has been sent the least text, so that
    all caches grow alike. Whatever its load is: a replica that comes back with an empty cache gets every miss."""

    def _choose(self, replicas: Sequence[Replica], request: RoutedRequest) -> Replica:
        holders, num_chars = self.index.match(request.prompt, replicas)
        if num_chars > MIN_MATCH * len(request.prompt):
            return self.least_pending.choose(holders, request)
        return min(replicas, key=lambda replica: len(self.index.chunks.get(replica, ())))


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """hit_rate: the share of the prompts' characters that were found. ttft_s: of each request, in order. imbalance: the
    most characters that a replica has computed, relative to the mean. max_pending: of any replica at any time."""

    hit_rate: float
    ttft_s: list[float]
    imbalance: float
    max_pending: int

    def percentile_s(self, share: float) -> float:
        return sorted(self.ttft_s)[min(int(share * len(self.ttft_s)), len(self.ttft_s) - 1)]


def simulate(
    policy: Policy, requests: Sequence[TenantRequest], num_replicas: int, speed: Speed | None = None,
    restart_after: int | None = None,
) -> SimulationResult:  # fmt: skip
    """The same requests always give the same result, if the policy's random numbers do.

    restart_after: after so many requests, the first replica comes back with an empty cache.
    """
    speed = speed or Speed()
    replicas = [Replica(f"http://replica-{number}") for number in range(num_replicas)]
    simulated = {replica: SimulatedReplica(replica, speed) for replica in replicas}
    ends: list[tuple[float, int, Replica]] = []
    found_chars = total_chars = 0
    computed_chars = dict.fromkeys(replicas, 0)
    ttft_s = []
    max_pending = 0
    for number, request in enumerate(requests):
        if number == restart_after:
            policy.forget(replicas[0])
            simulated[replicas[0]].chunks.clear()
        while ends and ends[0][0] <= request.arrival_s:
            heapq.heappop(ends)[2].num_pending -= 1
        chosen = policy.choose(replicas, RoutedRequest(request.prompt))
        chosen.num_pending += 1
        max_pending = max(max_pending, chosen.num_pending)
        first_s, end_s, found, computed = simulated[chosen].take(request)
        heapq.heappush(ends, (end_s, number, chosen))
        ttft_s.append(first_s - request.arrival_s)
        found_chars, total_chars = found_chars + found, total_chars + len(request.prompt)
        computed_chars[chosen] += computed
    mean = sum(computed_chars.values()) / num_replicas
    return SimulationResult(found_chars / total_chars, ttft_s, max(computed_chars.values()) / mean, max_pending)
