"""What a router adds: to the time of each event of a stream, and to that of a request."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import aiohttp

from ..router.policies import PolicyName, RoutedRequest, make_policy
from ..router.processes import PART
from ..router.replica import Replica
from .tenants import Tenants

INTERVAL_S, MAX_TOKENS = 0.05, 60  # 20 tokens per second for each stream, as a busy server's
BODY = {"model": "tiny", "prompt": "Hello", "max_tokens": MAX_TOKENS, "interval_s": INTERVAL_S}


@contextlib.contextmanager
def upstream() -> Iterator[str]:
    with subprocess.Popen(
        [sys.executable, "-m", f"{PART}.lab.upstream"], stdout=subprocess.PIPE, text=True
    ) as process:  # fmt: skip
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


@dataclass(frozen=True, slots=True)
class Delays:
    """From when an event was written to when the client has it, in milliseconds."""

    p50_ms: float
    p99_ms: float


async def measure_streams(url: str, num_streams: int) -> Delays:
    """Clients that each read two streams, one after the other. The first ones begin at equal intervals, so that there
    are always some that begin, as at a server that has been running for a while."""
    delays_s: list[float] = []

    async def read(session: aiohttp.ClientSession, number: int) -> None:
        await asyncio.sleep(MAX_TOKENS * INTERVAL_S * number / num_streams)
        for _ in range(2):
            async with session.post(f"{url}/v1/completions", json={**BODY, "stream": True}) as response:
                response.raise_for_status()
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        delays_s.append(time.monotonic() - json.loads(line[6:])["sent_s"])

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(read(session, number) for number in range(num_streams)))
    assert len(delays_s) == 2 * num_streams * MAX_TOKENS, f"{len(delays_s)} events of {num_streams} streams"
    delays_s.sort()
    return Delays(1e3 * delays_s[len(delays_s) // 2], 1e3 * delays_s[int(0.99 * len(delays_s))])


async def measure_requests(url: str, num_clients: int, num_requests: int) -> float:
    """Requests per second, of clients that each wait for the answer before they send the next one."""
    numbers = iter(range(num_requests))

    async def ask(session: aiohttp.ClientSession) -> None:
        for _ in numbers:
            async with session.post(f"{url}/v1/completions", json=BODY) as response:
                response.raise_for_status()
                await response.read()

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        started_s = time.monotonic()
        await asyncio.gather(*(ask(session) for _ in range(num_clients)))
    return num_requests / (time.monotonic() - started_s)


def measure_choice(policy_name: PolicyName, num_chars: int, num_requests: int = 100) -> float:
    """Milliseconds to choose one of two replicas for a prompt of num_chars characters, 9/10 of them shared."""
    tenants = Tenants(10, 0, num_chars * 9 // 10, num_chars // 10, is_heavy_tailed=False)
    requests = [RoutedRequest(each.prompt) for each in tenants.requests(num_requests, seed=0)]
    policy = make_policy(policy_name, 10**7, random.Random(0))
    replicas = [Replica("http://replica-0"), Replica("http://replica-1")]
    started_s = time.perf_counter()
    for request in requests:
        policy.choose(replicas, request)
    return 1e3 * (time.perf_counter() - started_s) / num_requests
