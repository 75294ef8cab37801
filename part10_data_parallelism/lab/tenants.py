"""A workload of many tenants: each has a system prompt of its own, and a few of them send most of the requests."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from common.workloads import WorkloadRequest

ALPHA = 1.7  # of the Pareto distributions of lengths
WORDS = (
    "a cache holds what was computed before so that the next request with the same beginning need not wait for it and "
    "each server in turn reads weights once per step for all of its users while long answers and short ones share it"
).split()


@dataclass(frozen=True, slots=True)
class TenantRequest:
    """arrival_s: after the start. system, own: the two parts of its prompt. max_tokens: of the answer."""

    arrival_s: float
    system: str
    own: str
    max_tokens: int

    @property
    def prompt(self) -> str:
        return f"{self.system}\n{self.own}"


@dataclass(frozen=True, slots=True)
class Tenants:
    """zipf: how unequal the tenants are; tenant r sends in proportion to 1 / r ** zipf, so at 0 they are equal.
    system_chars, own_chars, max_tokens: means of heavy-tailed lengths, or exact ones. rate_per_s: requests per second,
    all together. burst: how many requests a tenant sends at once, on average.
    """

    num_tenants: int = 200
    zipf: float = 1.0
    system_chars: int = 4_000
    own_chars: int = 600
    max_tokens: int = 120
    is_heavy_tailed: bool = True
    rate_per_s: float = 20.0
    burst: float = 3.0

    def requests(self, num_requests: int, seed: int) -> list[TenantRequest]:
        """The same arguments give the same requests."""
        return list(self._requests(num_requests, random.Random(seed)))

    def _requests(self, num_requests: int, rng: random.Random) -> Iterator[TenantRequest]:
        systems = [_text(rng, self._length(rng, self.system_chars)) for _ in range(self.num_tenants)]
        weights = [1 / (rank + 1) ** self.zipf for rank in range(self.num_tenants)]
        now_s, num_left = 0.0, num_requests
        while num_left:
            now_s += rng.expovariate(self.rate_per_s / self.burst)
            [system] = rng.choices(systems, weights)
            for _ in range(min(num_left, max(1, round(rng.expovariate(1 / self.burst))))):
                own = _text(rng, self._length(rng, self.own_chars))
                yield TenantRequest(now_s, system, own, self._length(rng, self.max_tokens))
                num_left -= 1

    def _length(self, rng: random.Random, mean: int) -> int:
        """If heavy-tailed: from a Pareto distribution, cut off at 20 times the mean."""
        if not self.is_heavy_tailed:
            return mean
        return max(1, min(round(mean * (ALPHA - 1) / ALPHA * rng.paretovariate(ALPHA)), 20 * mean))


def as_chats(requests: Sequence[TenantRequest]) -> list[WorkloadRequest]:
    """What common.load_client sends."""
    return [
        WorkloadRequest(
            f"tenant-{number}", request.arrival_s, request.max_tokens, ignore_eos=True,
            messages=[{"role": "system", "content": request.system}, {"role": "user", "content": request.own}],
        )
        for number, request in enumerate(requests)
    ]  # fmt: skip


def _text(rng: random.Random, num_chars: int) -> str:
    """Random words, which no two texts begin with."""
    return " ".join([str(rng.randrange(10**6)), *rng.choices(WORDS, k=num_chars // 2)])[:num_chars]
