"""python -m part15_full_architecture.lab.soak: half an hour of mixed load on two replicas with everything on.

Clients disconnect at random, and every few minutes one replica, or its engine core, is killed. The other replica is
never killed: its memory, file handles and blocks must stay flat. Each greedy answer must be the same every time. Writes
results/part15_soak.json.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from common.cli import check_minimums, exit_on_error, option, parse_config
from common.errors import FieldError
from common.results import median, write_result
from common.serve import server_process

PROG = "part15_full_architecture.lab.soak"
PART = PROG.partition(".")[0]
KEY = "soak"
HEADERS = {"Authorization": f"Bearer {KEY}"}  # /workers needs one
ROUTER_FLAGS = ("--api-key", KEY, "--replicas", "2", "--policy", "cache_aware", "--request-timeout", "60")
ENGINE_FLAGS = (  # a pool in which requests are preempted
    "--device", "cpu", "--num-threads", "1", "--no-log-stats", "--num-kv-blocks", "120",
    "--max-num-batched-tokens", "128", "--max-num-seqs", "8", "--speculative-method", "ngram",
    "--kv-offload-gib", "0.05", "--kv-offload-disk-gib", "0.05", "--enable-log-requests",
)  # fmt: skip
NUM_CLIENTS, NUM_PROMPTS = 6, 40
ABORT_SHARE = 0.15
SAMPLE_S, KILL_S = 10.0, 150.0
WARM_UP_SHARE = 0.25  # of the time, in which caches fill
MAX_GROWTH = 0.05  # of memory, from the first third after the warm-up to the last one
MAX_NEW_FILES = 4  # file handles, in the same way: connections come and go


@dataclass(frozen=True, slots=True)
class SoakConfig:
    minutes: int = option(30, "how long the load lasts", 1)
    seed: int = option(0, "of the load and the kills")
    results_dir: str = option("results", "folder for the JSON")

    def __post_init__(self) -> None:
        check_minimums(self)


@dataclass(slots=True)
class Sample:
    """Of the replica that is never killed: its two processes together."""

    at_s: float
    memory_mib: float
    num_files: int


@dataclass(slots=True)
class Soak:
    url: str
    router_pid: int
    survivor: int  # the process of the replica that is never killed
    deadline_s: float
    rng: random.Random
    known: dict[int, list[int]] = field(default_factory=dict)  # prompt → its greedy answer
    counts: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    samples: list[Sample] = field(default_factory=list)
    killed_at_s: float = -1e9


def prompt_of(number: int) -> list[int]:
    """A fifth are long, a fifth repeat themselves; all share one of four beginnings."""
    rng = random.Random(number)
    beginning = [(31 * number % 4 * 97 + 7 * place) % 3_700 + 100 for place in range(96)]
    if number % 5 == 0:
        return beginning + [rng.randrange(100, 3_900) for _ in range(500)]
    if number % 5 == 1:
        return beginning + [rng.randrange(100, 3_900) for _ in range(8)] * 4
    return beginning + [rng.randrange(100, 3_900) for _ in range(rng.randrange(1, 40))]


def body_of(soak: Soak) -> tuple[int | None, dict[str, Any]]:
    """A random request, and the number of its prompt if its answer must always be the same."""
    number = soak.rng.randrange(NUM_PROMPTS)
    body: dict[str, Any] = {
        "prompt": prompt_of(number), "max_tokens": 24, "temperature": 0, "ignore_eos": True, "stream": True,
        "return_token_ids": True,
    }  # fmt: skip
    kind = soak.rng.randrange(4)
    if kind == 0:
        return None, {**body, "temperature": 0.8, "top_p": 0.9, "seed": soak.rng.randrange(1_000), "logprobs": 2}
    if kind == 1:
        return None, {**body, "temperature": 1.0, "n": 2}
    return number, body


async def client(soak: Soak, http: httpx.AsyncClient) -> None:
    while time.monotonic() < soak.deadline_s:
        number, body = body_of(soak)
        leaves_after = soak.rng.randrange(1, 20) if soak.rng.random() < ABORT_SHARE else None
        try:
            token_ids = await ask(http, soak, body, leaves_after)
        except (httpx.HTTPError, FieldError) as error:
            is_expected = time.monotonic() - soak.killed_at_s < 30  # a replica was killed, and what it had is lost
            soak.counts["lost with a killed replica" if is_expected else "failed"] += 1
            if not is_expected:
                soak.errors[f"{type(error).__name__}: {error}"[:200]] += 1
            await asyncio.sleep(0.2)
            continue
        if leaves_after is not None and token_ids is None:
            soak.counts["left early"] += 1
            continue
        soak.counts["answered"] += 1
        if number is not None and token_ids is not None:
            if soak.known.setdefault(number, token_ids) != token_ids:
                soak.counts["other answers"] += 1
                soak.errors[f"prompt {number}: {soak.known[number]}, then {token_ids}"] += 1
            soak.counts["compared"] += 1


async def ask(http: httpx.AsyncClient, soak: Soak, body: dict[str, Any], leaves_after: int | None) -> list[int] | None:
    """The answer's tokens; None if the client has left after so many events."""
    token_ids, num_events = list[int](), 0
    async with http.stream("POST", f"{soak.url}/v1/completions", json=body) as response:
        if response.status_code != 200:
            text = (await response.aread()).decode()
            raise FieldError("status", f"{response.status_code}: {text[:150]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise FieldError("stream", event["error"]["message"])
            token_ids += [token for choice in event["choices"] for token in choice["token_ids"]]
            num_events += 1
            if num_events == leaves_after:
                return None
    return token_ids


async def kill_now_and_then(soak: Soak) -> None:
    """A replica's API process or its engine core, in turns; never those of the survivor."""
    await asyncio.sleep(KILL_S)
    is_core = False
    while time.monotonic() < soak.deadline_s - KILL_S / 2:
        for pid in children_of(soak.router_pid):
            cores = children_of(pid)
            if pid != soak.survivor and cores:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(cores[-1] if is_core else pid, signal.SIGKILL)
                soak.counts["killed engine cores" if is_core else "killed replicas"] += 1
                soak.killed_at_s, is_core = time.monotonic(), not is_core
        await asyncio.sleep(KILL_S)


async def sample(soak: Soak) -> None:
    began_s = time.monotonic()
    while time.monotonic() < soak.deadline_s:
        pids = [soak.survivor, *children_of(soak.survivor)]
        soak.samples.append(
            Sample(
                time.monotonic() - began_s, round(sum(map(memory_mib, pids)), 1),
                sum(len([*Path(f"/proc/{pid}/fd").iterdir()]) for pid in pids),
            )
        )  # fmt: skip
        await asyncio.sleep(SAMPLE_S)


def children_of(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, ppid = path.read_text().rpartition(")")[2].split()[:2]
            command = (path.parent / "cmdline").read_text()
            if int(ppid) == parent and state != "Z" and "resource_tracker" not in command:
                found.append(int(path.parent.name))
    return sorted(found)


def memory_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) / 1_024 if found else 0.0


def gauges(urls: list[str]) -> dict[str, float]:
    """The sums of all replicas' numbers."""
    found: Counter[str] = Counter()
    for url in urls:
        text = httpx.get(f"{url}/metrics", timeout=60, trust_env=False).text
        found.update({name: float(value) for name, value in re.findall(r"^engine:(\w+) (\S+)$", text, re.MULTILINE)})
    return dict(found)


def until_idle(urls: list[str]) -> dict[str, float]:
    """Wait until nothing is left in the engines. Raises FieldError if something stays."""
    deadline_s = time.monotonic() + 60
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    while True:
        for url in urls:  # an engine sends its numbers when a message comes
            httpx.post(f"{url}/v1/completions", json={"prompt": [7], "max_tokens": 1}, timeout=60, trust_env=False)
        time.sleep(0.2)
        found = gauges(urls)
        if not any(found[name] for name in names):
            return found
        if time.monotonic() > deadline_s:
            raise FieldError("soak", f"not idle after 60 s: { {name: found[name] for name in names} }")


def growth(soak: Soak) -> dict[str, float]:
    """From the first third after the warm-up to the last one, in medians."""
    samples = soak.samples[int(WARM_UP_SHARE * len(soak.samples)) :]
    third = max(1, len(samples) // 3)
    first, last = samples[:third], samples[-third:]
    return {
        "memory_mib_before": median([each.memory_mib for each in first]),
        "memory_mib_after": median([each.memory_mib for each in last]),
        "files_before": median([float(each.num_files) for each in first]),
        "files_after": median([float(each.num_files) for each in last]),
    }


async def load(soak: Soak) -> None:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(headers=HEADERS, timeout=120, trust_env=False, limits=limits) as http:
        clients = [client(soak, http) for _ in range(NUM_CLIENTS)]
        await asyncio.gather(kill_now_and_then(soak), sample(soak), *clients)


def workers(url: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = httpx.get(f"{url}/workers", headers=HEADERS, timeout=60, trust_env=False).json()[
        "workers"
    ]
    return found


def run(config: SoakConfig) -> None:
    with tempfile.TemporaryDirectory() as directory:
        # All replicas share the directory: blocks that one has written, the other one reads.
        flags = [*ROUTER_FLAGS, "--", *ENGINE_FLAGS, "--kv-offload-dir", directory]
        with server_process(f"{PART}.router", *flags) as url:
            while len([each for each in workers(url) if each["is_healthy"]]) < 2:
                time.sleep(0.5)
            [router_pid] = [pid for pid in children_of(os.getpid()) if len(children_of(pid)) >= 2]
            soak = Soak(
                url, router_pid, children_of(router_pid)[0], time.monotonic() + 60 * config.minutes,
                random.Random(config.seed),
            )  # fmt: skip
            asyncio.run(load(soak))
            while len([each for each in workers(url) if each["is_healthy"]]) < 2:
                time.sleep(0.5)
            totals = until_idle([each["url"] for each in workers(url)])
    finish(config, soak, totals)


def finish(config: SoakConfig, soak: Soak, totals: dict[str, float]) -> None:
    found = growth(soak)
    names = ("num_preemptions_total", "spec_decode_num_accepted_tokens_total", "kv_offload_host_tokens_total",
             "kv_offload_tier_tokens_total", "prefix_cache_hits_total")  # fmt: skip
    measurements = {
        "counts": dict(sorted(soak.counts.items())), "errors": dict(soak.errors), "growth": found,
        "since_the_last_kill": {name: totals.get(name, 0.0) for name in names},
        "samples": [asdict(each) for each in soak.samples[:: max(1, len(soak.samples) // 60)]],
    }  # fmt: skip
    Console(width=100).print_json(data={name: each for name, each in measurements.items() if name != "samples"})
    settings = {key: value for key, value in asdict(config).items() if key != "results_dir"}
    write_result(
        Path(config.results_dir) / "part15_soak.json", benchmark="part15_soak", config=settings, seed=config.seed,
        repeats=1, measurements=measurements,
    )  # fmt: skip
    problems = [f"{soak.counts[name]} {name}" for name in ("failed", "other answers") if soak.counts[name]]
    if found["memory_mib_after"] > (1 + MAX_GROWTH) * found["memory_mib_before"]:
        problems.append(f"memory grew from {found['memory_mib_before']} to {found['memory_mib_after']} MiB")
    if found["files_after"] > found["files_before"] + MAX_NEW_FILES:
        problems.append(f"file handles grew from {found['files_before']:g} to {found['files_after']:g}")
    if problems:
        raise FieldError("soak", "; ".join(problems))


def main() -> None:
    config = parse_config(SoakConfig, "Mixed load with aborts and kills on two replicas with everything on.", PROG)
    exit_on_error(PROG, lambda: run(config))


if __name__ == "__main__":
    main()
