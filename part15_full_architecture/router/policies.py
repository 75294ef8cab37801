"""Which replica gets a request. A policy sees only what a router can know: its own counts, the text, the session."""

from __future__ import annotations

import bisect
import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from .prefix_index import PrefixIndex
from .replica import Replica

MAX_DIFFERENCE, MAX_RATIO = 32, 1.1  # SGLang's: beyond both, the load is out of balance
MIN_MATCH = 0.5  # SGLang's: a prompt goes to the replica that has more than this of it
POINTS_PER_REPLICA = 128  # on the ring of consistent hashing


@dataclass(frozen=True, slots=True)
class RoutedRequest:
    """What policies may look at. prompt: its text, or its token ids as text. session: what
    the client calls its session, if anything."""

    prompt: str
    session: str | None = None


class Policy(Protocol):
    """choose() is called once per attempt and takes note of its own choice. replicas: those available, at least one."""

    def choose(self, replicas: Sequence[Replica], request: RoutedRequest) -> Replica: ...

    def forget(self, replica: Replica) -> None:
        """A replica was removed, or has lost what it had."""


class RoundRobin:
    """One after the other."""

    def __init__(self) -> None:
        self.count = 0

    def choose(self, replicas: Sequence[Replica], request: RoutedRequest) -> Replica:
        self.count += 1
        return replicas[(self.count - 1) % len(replicas)]

    def forget(self, replica: Replica) -> None: ...


class LeastPending:
    """The one with the fewest unfinished requests; of several, any. (If ties went to the first one, a router without
    load would send it everything.)"""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def choose(self, replicas: Sequence[Replica], request: RoutedRequest) -> Replica:
        fewest = min(replica.num_pending for replica in replicas)
        return self.rng.choice([replica for replica in replicas if replica.num_pending == fewest])

    def forget(self, replica: Replica) -> None: ...


class PowerOfTwo:
    """Of two that are drawn at random, the one with fewer unfinished requests."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def choose(self, replicas: Sequence[Replica], request: RoutedRequest) -> Replica:
        """The less loaded of two different replicas, or the only one; of equal ones, either."""
        drawn = self.rng.sample(replicas, min(2, len(replicas)))
        return min(drawn, key=lambda replica: replica.num_pending)

    def forget(self, replica: Replica) -> None: ...


class ConsistentHash:
    """All requests of a session go to one replica. If it is not available, they go to the next one on the ring; when a
    replica comes or goes, only its own sessions move. Without a session, the prompt's beginning is hashed."""

    def __init__(self) -> None:
        self._rings: dict[tuple[str, ...], list[tuple[int, int]]] = {}

    def choose(self, replicas: Sequence[Replica], request: RoutedRequest) -> Replica:
        """The owner of the first point that is not below the key. After the last point comes the first one."""
        ring = self._ring(tuple(replica.url for replica in replicas))
        key = _point(request.session or request.prompt[:256])
        place = bisect.bisect(ring, (key, -1)) % len(ring)
        return replicas[ring[place][1]]

    def _ring(self, urls: tuple[str, ...]) -> list[tuple[int, int]]:
        """Sorted: points, and the index of the replica that each belongs to."""
        if urls not in self._rings:
            if len(self._rings) >= 16:
                self._rings.clear()
            self._rings[urls] = sorted(
                (_point(f"{url} {number}"), index)
                for index, url in enumerate(urls)
                for number in range(POINTS_PER_REPLICA)
            )
        return self._rings[urls]

    def forget(self, replica: Replica) -> None: ...


def _point(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


class CacheAware:
    """The replica that has most of the prompt in its cache, as far as the router can tell from what it has sent there;
    the one with the fewest unfinished requests if none has more than half of it, or if the load is out of balance."""

    def __init__(self, rng: random.Random, max_chars: int) -> None:
        self.index, self.least_pending = PrefixIndex(max_chars), LeastPending(rng)

    def choose(self, replicas: Sequence[Replica], request: RoutedRequest) -> Replica:
        chosen = self._choose(replicas, request)
        self.index.insert(request.prompt, chosen)  # also when the load has decided: the cache will have it
        return chosen

    def _choose(self, replicas: Sequence[Replica], request: RoutedRequest) -> Replica:
        """The least loaded of those that have more than MIN_MATCH of the prompt, or of all: see above."""
        if not is_out_of_balance([replica.num_pending for replica in replicas]):
            holders, num_chars = self.index.match(request.prompt, replicas)
            if num_chars > MIN_MATCH * len(request.prompt):
                return self.least_pending.choose(holders, request)
        return self.least_pending.choose(replicas, request)

    def forget(self, replica: Replica) -> None:
        self.index.remove(replica)


def is_out_of_balance(loads: Sequence[int]) -> bool:
    """SGLang's rule: both the difference and the ratio must be large."""
    return max(loads) - min(loads) > MAX_DIFFERENCE and max(loads) > MAX_RATIO * min(loads)


PolicyName = Literal["round_robin", "least_pending", "power_of_two", "cache_aware", "consistent_hash"]
POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)


def make_policy(name: PolicyName, max_chars: int, rng: random.Random | None = None) -> Policy:
    """max_chars: of prompts that cache_aware remembers of each replica."""
    rng = rng or random.Random()
    match name:
        case "round_robin":
            return RoundRobin()
        case "least_pending":
            return LeastPending(rng)
        case "power_of_two":
            return PowerOfTwo(rng)
        case "consistent_hash":
            return ConsistentHash()
        case "cache_aware":
            return CacheAware(rng, max_chars)
