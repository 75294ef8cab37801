"""python -m part10_data_parallelism.bench: what each policy saves, what a router costs, and both beside SGLang's and
vLLM's routers, if an interpreter has them (--peer-python).

Writes results/part10.json and results/part10.png.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from common import plotting
from common.cli import check_minimums, exit_on_error, option, parse_config
from common.load_client import LoadConfig, run_load
from common.load_report import LoadReport
from common.results import median, write_result
from common.serve import server_process

from .lab.replicas import prompt_tokens, reset_caches
from .lab.router_cost import measure_choice, measure_requests, measure_streams, upstream
from .lab.routers import RouterKind, has_module, running_router
from .lab.simulation import SmallestTree, Speed, simulate
from .lab.tenants import Tenants, as_chats
from .router.policies import POLICIES, CacheAware, Policy, make_policy
from .router.processes import PART

BLOCK_SIZE = 16
LONG = Tenants(num_tenants=10, zipf=0, system_chars=3_000, own_chars=100, max_tokens=16, is_heavy_tailed=False)
WORKLOADS = {
    "long prefixes": LONG,
    "short prefixes": replace(LONG, system_chars=400),
    "no shared prefixes": replace(LONG, num_tenants=1, system_chars=16, own_chars=1_500),
    "bursts of a tenant": replace(LONG, burst=8.0, rate_per_s=3.0),
}
OURS = [
    RouterKind("this part's", policy) for policy in ("round_robin", "least_pending", "cache_aware", "consistent_hash")
]
PEERS = [
    RouterKind(name, policy, f"{name.lower()}_router.launch_router")
    for name in ("SGLang", "vLLM")
    for policy in ("round_robin", "cache_aware")
]
TENANTS = Tenants()  # of the simulation: 200 tenants, heavy-tailed


@dataclass(frozen=True, slots=True)
class BenchConfig:
    peer_python: str | None = option(None, "a Python that has sglang-router and vllm-router (None: leave them out)")
    num_requests: int = option(60, "requests of each workload", 8)
    max_concurrency: int = option(8, "requests at once, except in bursts", 1)
    num_kv_blocks: int = option(256, "of each replica: room for about two thirds of the long prefixes", 200)
    ttft_limit_ms: int = option(500, "a request with a longer TTFT does not count as goodput", 1)
    num_streams: str = option("1,32,256", "streams at once through a router, comma-separated")
    simulated_replicas: str = option("2,4,16,64,256", "numbers of simulated replicas, comma-separated")
    requests_per_replica: int = option(100, "simulated requests per simulated replica", 10)
    repeats: int = option(5, "runs, in turns; medians are reported", 1)
    results_dir: str = option("results", "folder for the JSON and the plot")

    def __post_init__(self) -> None:
        check_minimums(self)


def kinds(config: BenchConfig) -> list[RouterKind]:
    """The routers that are here."""
    python = config.peer_python
    has = {kind.module: python is not None and has_module(python, kind.module) for kind in PEERS}
    return [*OURS, *(kind for kind in PEERS if has[kind.module])]


@contextlib.contextmanager
def two_replicas(config: BenchConfig) -> Iterator[list[str]]:
    flags = ("--device", "cpu", "--num-threads", "1", "--num-kv-blocks", str(config.num_kv_blocks), "--no-log-stats")
    with server_process(PART, *flags) as first, server_process(PART, *flags) as second:
        yield [first, second]


# Policies, on real replicas


def run_workload(url: str, urls: Sequence[str], tenants: Tenants, config: BenchConfig, seed: int) -> dict[str, float]:
    """One workload through a router, from empty caches."""
    reset_caches(urls)
    before = prompt_tokens(urls)
    max_concurrency = None if tenants.burst > LONG.burst else config.max_concurrency
    load = LoadConfig(url, "tiny", max_concurrency=max_concurrency, ttft_slo_s=config.ttft_limit_ms / 1e3)
    report: LoadReport = asyncio.run(run_load(load, as_chats(tenants.requests(config.num_requests, seed))))
    assert report.num_completed == config.num_requests, f"{url}: {report.results}"
    assert report.ttft_s is not None and report.goodput_requests_per_s is not None
    queried, computed = (after - b for after, b in zip(prompt_tokens(urls), before, strict=True))
    return {
        "hit_rate": 1 - computed / queried, "computed_tokens": computed, "ttft_p50_ms": 1e3 * report.ttft_s.p50,
        "ttft_p99_ms": 1e3 * report.ttft_s.p99, "requests_per_s": report.requests_per_s,
        "goodput_requests_per_s": report.goodput_requests_per_s,
    }  # fmt: skip


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(median([run[name] for run in runs]), 4) for name in runs[0]}


def compare_policies(config: BenchConfig, urls: list[str]) -> dict[str, Any]:
    """workload → router and policy → medians. All routers take turns in front of the same replicas."""
    runs: dict[str, dict[str, list[dict[str, float]]]] = {name: {} for name in WORKLOADS}
    with contextlib.ExitStack() as stack:
        routers = {
            f"{kind.name}, {kind.policy}": stack.enter_context(running_router(kind, urls, config.peer_python))
            for kind in kinds(config)
        }
        for repeat in range(config.repeats):
            for workload, tenants in WORKLOADS.items():
                for name, url in routers.items():
                    found = run_workload(url, urls, tenants, config, seed=repeat)
                    runs[workload].setdefault(name, []).append(found)
    return {workload: {name: medians(each) for name, each in found.items()} for workload, found in runs.items()}


# The router's own cost


def measure_costs(config: BenchConfig) -> dict[str, Any]:
    """router → number of streams → delays of events, and requests per second of as many clients."""
    sizes = [int(size) for size in config.num_streams.split(",")]
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    with upstream() as direct, contextlib.ExitStack() as stack:
        routers = {"direct": direct}
        for kind in kinds(config):
            if kind.policy == "round_robin":
                routers[kind.name] = stack.enter_context(running_router(kind, [direct], config.peer_python))
        for _ in range(config.repeats):
            for size in sizes:
                for name, url in routers.items():
                    delays = asyncio.run(measure_streams(url, size))
                    speed = asyncio.run(measure_requests(url, size, 1_000))
                    one = {**asdict(delays), "requests_per_s": speed}
                    found.setdefault(name, {}).setdefault(str(size), []).append(one)
    return {name: {size: medians(runs) for size, runs in sizes.items()} for name, sizes in found.items()}


def measure_choices(config: BenchConfig) -> dict[str, float]:
    """policy → milliseconds to choose a replica for a prompt of so many characters."""
    return {
        f"{policy}, {num_chars:,} characters": round(
            median([measure_choice(policy, num_chars) for _ in range(config.repeats)]), 4
        )
        for policy in ("least_pending", "cache_aware")
        for num_chars in (3_000, 64_000)
    }


# Many replicas, simulated


def check_simulation(config: BenchConfig, urls: list[str]) -> dict[str, Any]:
    """The same requests at the same times on two real replicas and on two simulated ones: policy → hit rates."""
    tenants = replace(LONG, rate_per_s=2.0, burst=1.0)
    requests = tenants.requests(config.num_requests, seed=0)
    found = {}
    for policy in ("round_robin", "cache_aware"):
        with running_router(RouterKind("", policy), urls, None) as url:
            reset_caches(urls)
            before = prompt_tokens(urls)
            report = asyncio.run(run_load(LoadConfig(url, "tiny"), as_chats(requests)))
            queried, computed = (after - b for after, b in zip(prompt_tokens(urls), before, strict=True))
        chars_per_token = sum(len(request.prompt) for request in requests) / report.prompt_tokens
        speed = Speed(cache_chars=round(config.num_kv_blocks * BLOCK_SIZE * chars_per_token))
        simulated = simulate(make_policy(policy, 10**7, random.Random(0)), requests, 2, speed)
        found[policy] = {"real": round(1 - computed / queried, 4), "simulated": round(simulated.hit_rate, 4)}
    return found


def simulate_all(config: BenchConfig) -> dict[str, Any]:
    """policy → number of replicas → hit rate, TTFT, imbalance. The load per replica is always the same."""
    found: dict[str, dict[str, Any]] = {policy: {} for policy in POLICIES}
    for size in (int(size) for size in config.simulated_replicas.split(",")):
        tenants = replace(TENANTS, num_tenants=25 * size, rate_per_s=5.0 * size)
        requests = tenants.requests(config.requests_per_replica * size, seed=0)
        for policy in POLICIES:
            result = simulate(make_policy(policy, Speed().cache_chars, random.Random(0)), requests, size)
            found[policy][str(size)] = {
                "hit_rate": round(result.hit_rate, 4), "imbalance": round(result.imbalance, 3),
                "ttft_p50_ms": round(1e3 * result.percentile_s(0.5), 1),
                "ttft_p99_ms": round(1e3 * result.percentile_s(0.99), 1),
            }  # fmt: skip
    return found


def simulate_restart() -> dict[str, float]:
    """rule for prompts that no replica knows → TTFT p99 in milliseconds of the 800 requests after a restart."""
    size, tenants = 16, replace(TENANTS, num_tenants=400, zipf=0.6, rate_per_s=80.0)
    requests = tenants.requests(3_200, seed=0)
    policies: dict[str, Policy] = {
        "fewest pending requests": CacheAware(random.Random(0), Speed().cache_chars),
        "smallest tree": SmallestTree(random.Random(0), Speed().cache_chars),
    }
    found = {}
    for name, policy in policies.items():
        after = sorted(simulate(policy, requests, size, restart_after=1_600).ttft_s[1_600:2_400])
        found[name] = round(1e3 * after[int(0.99 * len(after))], 1)
    return found


def measure_all(config: BenchConfig) -> dict[str, Any]:
    costs = measure_costs(config)
    with two_replicas(config) as urls:
        policies, check = compare_policies(config, urls), check_simulation(config, urls)
    return {
        "policies": policies, "cost": costs, "choice_ms": measure_choices(config),
        "simulation check": check, "simulation": simulate_all(config),
        "restart_ttft_p99_ms": simulate_restart(),
    }  # fmt: skip


def plot(m: dict[str, Any], path: Path) -> None:
    """Left: hit rates of real replicas; right: of simulated ones, by their number."""
    fig, (left, right) = plotting.panels(
        [("Two replicas, long prefixes", "", "prefix cache hit rate"), ("Simulated", "replicas", "")]
    )
    colors = dict(zip(POLICIES, (plotting.BASELINE_COLOR, *plotting.COLORS), strict=False))
    found = m["policies"]["long prefixes"]
    for number, (name, each) in enumerate(found.items()):
        color = colors[name.partition(", ")[2]]
        bars = left.bar([number], [each["hit_rate"]], 0.7, color=color)
        plotting.label_bars(left, bars, "{:.2f}")
    left.set_xticks(range(len(found)), [name.replace(", ", "\n") for name in found], rotation=60, fontsize=9)
    for policy, color in colors.items():
        sizes = sorted(m["simulation"][policy], key=int)
        values = [m["simulation"][policy][size]["hit_rate"] for size in sizes]
        right.plot([int(size) for size in sizes], values, marker="o", label=policy, color=color)
    right.set_xscale("log", base=2)
    right.set_xticks([int(size) for size in sizes], sizes)
    right.legend(loc="lower left", fontsize=10)
    for axes in (left, right):
        axes.set_ylim(0, 1)
    plotting.save(fig, path)


def report(console: Console, m: dict[str, Any]) -> None:
    for workload, found in m["policies"].items():
        table = Table("router, policy", "hit rate", "computed", "TTFT p50", "p99, ms", "requests/s", "good", box=SIMPLE)
        for name, each in found.items():
            table.add_row(
                name, f"{each['hit_rate']:.0%}", f"{each['computed_tokens']:,.0f}", f"{each['ttft_p50_ms']:,.0f}",
                f"{each['ttft_p99_ms']:,.0f}", f"{each['requests_per_s']:.1f}", f"{each['goodput_requests_per_s']:.1f}",
            )  # fmt: skip
        console.print(f"\n{workload}", highlight=False)
        console.print(table)
    table = Table("router", "streams", "delay p50, ms", "p99, ms", "requests/s", box=SIMPLE)
    for name, sizes in m["cost"].items():
        for size, each in sizes.items():
            delays = (f"{each['p50_ms']:.2f}", f"{each['p99_ms']:.2f}")
            table.add_row(name, size, *delays, f"{each['requests_per_s']:,.0f}")
    console.print("\nEvents and requests through a router, to a replica that computes nothing", highlight=False)
    console.print(table)
    for what, choice_ms in m["choice_ms"].items():
        console.print(f"to choose a replica, {what}: {choice_ms:.2f} ms", highlight=False)
    for policy, each in m["simulation check"].items():
        console.print(f"hit rate, {policy}: real {each['real']:.1%}, simulated {each['simulated']:.1%}")
    table = Table("simulated replicas", "policy", "hit rate", "imbalance", "TTFT p50", "p99, ms", box=SIMPLE)
    for policy, sizes in m["simulation"].items():
        for size, each in sizes.items():
            table.add_row(
                size, policy, f"{each['hit_rate']:.0%}", f"{each['imbalance']:.2f}", f"{each['ttft_p50_ms']:,.0f}",
                f"{each['ttft_p99_ms']:,.0f}",
            )  # fmt: skip
    console.print(table)
    for rule, ttft_ms in m["restart_ttft_p99_ms"].items():
        console.print(f"unknown prompts to the {rule}: TTFT p99 after a restart {ttft_ms:,.0f} ms", highlight=False)


def run(config: BenchConfig) -> None:
    results, measurements = Path(config.results_dir), measure_all(config)
    report(Console(), measurements)
    settings = {key: value for key, value in asdict(config).items() if key not in ("results_dir", "peer_python")}
    write_result(
        results / "part10.json", benchmark="part10", config=settings, seed=0, repeats=config.repeats,
        measurements=measurements,
    )  # fmt: skip
    plot(measurements, results / "part10.png")


def main() -> None:
    prog = "part10_data_parallelism.bench"
    config = parse_config(BenchConfig, "What policies save and what a router costs, beside other routers.", prog)
    exit_on_error(prog, lambda: run(config))


if __name__ == "__main__":
    main()
