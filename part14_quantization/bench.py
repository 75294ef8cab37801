"""python -m part13_disaggregation.bench: prefill and decode together or apart, on the same cores, and with a scripted
model on up to eight engines.

Writes results/part13.json and results/part13.png.
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
from common.workloads import WorkloadRequest, long_prompts, short_chat

from .lab.cluster import SCRIPTED, Layout, engines, proxied, reset_caches
from .lab.timeline import live
from .lab.transfers import measure

ONE, TWO = ("--num-threads", "1"), ("--num-threads", "2")
WHOLE = ("--no-enable-chunked-prefill", "--max-num-batched-tokens", "2048")
LAYOUTS = [  # all on the same two cores
    Layout("1 engine, whole prompts", 0, 1, (*TWO, *WHOLE)),
    Layout("1 engine, chunks of 512", 0, 1, TWO),
    Layout("1 engine, chunks of 64", 0, 1, (*TWO, "--max-num-batched-tokens", "64")),
    Layout("2 engines, chunks of 512", 0, 2, ONE),
    Layout("1P1D", 1, 1, ONE),
]
COMPARED = (1, 2, 4)  # in the curves of goodput
SHAPES = [Layout("2P1D", 2, 1, ONE), Layout("1P2D", 1, 2, ONE)]  # for correctness
TTFT_SLO_S, TPOT_SLO_S = 1.0, 0.025
SCRIPTED_TTFT_SLO_S = 2.0
SCRIPTED_TPOT_SLO_S = {"tight": 0.036, "loose": 0.060}
SCRIPTED_CHUNKS = (512, 64)  # tokens per step of engines that do both


@dataclass(frozen=True, slots=True)
class BenchConfig:
    model: str = option("tiny", "a shipped model, a directory, a Hugging Face id or random:<preset>")
    seconds: int = option(15, "length of each load", 5)
    rates: str = option("0.5,1,1.5,2,2.5", "requests per second of the goodput curves, comma-separated")
    transfer_tokens: str = option("64,256,1024,1900", "prompt lengths of the transfers, comma-separated")
    scripted_engines: str = option("1,2,4,8", "numbers of scripted engines, comma-separated")
    scripted_rate: float = option(0.8, "requests per second and scripted engine")
    repeats: int = option(3, "runs, in turns; medians are reported", 1)
    results_dir: str = option("results", "folder for the JSON and the plot")

    def __post_init__(self) -> None:
        check_minimums(self)


def at_rate(requests: Sequence[WorkloadRequest], rate: float, seed: int) -> list[WorkloadRequest]:
    """The requests with random arrivals (a Poisson process)."""
    rng, arrival_s, timed = random.Random(seed), 0.0, list[WorkloadRequest]()
    for request in requests:
        arrival_s += rng.expovariate(rate)
        timed.append(replace(request, arrival_s=arrival_s))
    return timed


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(median([run[name] for run in runs]), 3) for name in runs[0]}


def summary(report: LoadReport, prefix: str = "") -> dict[str, float]:
    assert not report.num_failed, f"requests failed: {[each.error for each in report.results if each.error]}"
    assert report.ttft_s is not None and report.itl_s is not None
    return {
        f"{prefix}ttft_p50_ms": 1e3 * report.ttft_s.p50, f"{prefix}ttft_p99_ms": 1e3 * report.ttft_s.p99,
        f"{prefix}itl_p50_ms": 1e3 * report.itl_s.p50, f"{prefix}itl_p99_ms": 1e3 * report.itl_s.p99,
    }  # fmt: skip


# Interference


async def run_mixed(url: str, model: str, seconds: int, seed: int) -> dict[str, float]:
    """Short chats, and long prompts that disturb them."""
    chats = at_rate(short_chat(2 * seconds, seed, max_tokens=48), 2.0, seed)
    long = long_prompts(seconds // 2, seed, min_prompt_tokens=1_200, max_prompt_tokens=1_800, max_tokens=8)
    config = LoadConfig(url, model)
    short, others = await asyncio.gather(run_load(config, chats), run_load(config, at_rate(long, 0.5, seed)))
    return {
        **summary(short), "long_ttft_p50_ms": summary(others)["ttft_p50_ms"],
        "output_tokens_per_s": short.output_tokens_per_s + others.output_tokens_per_s,
    }  # fmt: skip


def run_rate(url: str, model: str, rate: float, seconds: int, seed: int) -> dict[str, float]:
    """Prompts of about 700 tokens at a rate. goodput: requests per second that meet both targets."""
    requests = long_prompts(
        max(4, round(rate * seconds)), seed, min_prompt_tokens=400, max_prompt_tokens=1_000, max_tokens=32
    )
    load = LoadConfig(url, model, ttft_slo_s=TTFT_SLO_S, tpot_slo_s=TPOT_SLO_S)
    report = asyncio.run(run_load(load, at_rate(requests, rate, seed)))
    return {**summary(report), "goodput": report.goodput_requests_per_s or 0.0}


def measure_layouts(config: BenchConfig) -> dict[str, Any]:
    """All layouts in turns. Engines of those whose turn it isn't are idle."""
    mixed: dict[str, list[dict[str, float]]] = {}
    curves: dict[str, dict[str, list[dict[str, float]]]] = {}
    flags = ("--model", config.model, "--no-enable-prefix-caching", "--num-kv-blocks", "1024")
    with contextlib.ExitStack() as stack:
        urls = {}
        for layout in LAYOUTS:
            found, secret = stack.enter_context(engines(layout, *flags))
            prefill, decode = found[: layout.num_prefill], found[layout.num_prefill :]
            urls[layout.name] = stack.enter_context(proxied(prefill, decode, secret)).url
        for url in urls.values():
            asyncio.run(run_mixed(url, config.model, 5, seed=99))  # warm-up
        for repeat in range(config.repeats):
            for name, url in urls.items():
                found_mixed = asyncio.run(run_mixed(url, config.model, config.seconds, repeat))
                mixed.setdefault(name, []).append(found_mixed)
            for rate in config.rates.split(","):
                for layout in (LAYOUTS[number] for number in COMPARED):
                    one = run_rate(urls[layout.name], config.model, float(rate), config.seconds, repeat)
                    curves.setdefault(layout.name, {}).setdefault(rate, []).append(one)
    return {
        "mixed": {name: medians(runs) for name, runs in mixed.items()},
        "goodput": {name: {rate: medians(runs) for rate, runs in each.items()} for name, each in curves.items()},
    }  # fmt: skip


def check_shapes(config: BenchConfig) -> dict[str, int]:
    """shape → prompts whose answer is not that of an engine that computes alone. It is 0."""
    wrong = {}
    prompts = [request.prompt_token_ids for request in long_prompts(12, 5)]
    for layout in SHAPES:
        with engines(layout, "--model", config.model) as (urls, secret):
            prefill, decode = urls[: layout.num_prefill], urls[layout.num_prefill :]
            with proxied(prefill, decode, secret) as together:
                bodies = [{"prompt": each, "max_tokens": 24, "temperature": 0, "ignore_eos": True} for each in prompts]
                got = [live(together.url, body).text for body in bodies]
                reset_caches(decode)
                expected = [live(decode[0], body).text for body in bodies]
        wrong[layout.name] = sum(a != b for a, b in zip(got, expected, strict=True))
    return wrong


# Transfers


def measure_transfers(config: BenchConfig) -> dict[str, Any]:
    """connector → prompt length → bytes, time alone, time beyond the prompt's computation, and how much was hidden."""
    lengths = [int(length) for length in config.transfer_tokens.split(",")]
    prompts = [
        request.prompt_token_ids or []
        for length in lengths
        for request in long_prompts(1, length, min_prompt_tokens=length, max_prompt_tokens=length)
    ]
    found: dict[str, Any] = {}
    for connector in ("shm", "tcp"):
        rows = measure(connector, config.model, prompts, 2 * config.repeats)
        for length in lengths:
            alone, overlapped = (
                medians([row for row in rows if row["num_tokens"] == length and row["overlaps"] == overlaps])
                for overlaps in (False, True)
            )
            found.setdefault(connector, {})[str(length)] = {
                "mib": round(alone["num_bytes"] / 2**20, 3), "fetch_ms": alone["fetch_ms"],
                "exposed_ms": overlapped["exposed_ms"],
                "hidden_share": round(1 - overlapped["exposed_ms"] / alone["fetch_ms"], 3),
            }  # fmt: skip
    return found


# Scripted engines


def scripted_shapes(size: int) -> Iterator[tuple[str, int, int]]:
    """Name, number of prefill engines, tokens per step."""
    for chunk in SCRIPTED_CHUNKS:
        yield f"together, chunks of {chunk}", 0, chunk
    if size > 1:
        yield "apart", size // 2, SCRIPTED_CHUNKS[0]


def measure_scripted(config: BenchConfig) -> dict[str, Any]:
    """shape → number of engines → TTFT, ITL, and which share of the requests meets both targets, with a tight target
    for TPOT and with a loose one. The load per engine is always the same."""
    sizes = [int(size) for size in config.scripted_engines.split(",")]
    found: dict[str, dict[str, Any]] = {}
    flags = ("--no-enable-prefix-caching", "--num-kv-blocks", "1024")
    for chunk in SCRIPTED_CHUNKS:
        layout = Layout("scripted", 0, max(sizes), (*ONE, "--max-num-batched-tokens", str(chunk)), SCRIPTED)
        with engines(layout, *flags) as (urls, secret):
            for size in sizes:
                for name, num_prefill, of_chunk in scripted_shapes(size):
                    if of_chunk != chunk:
                        continue
                    with proxied(urls[:num_prefill], urls[num_prefill:size], secret) as together:
                        found.setdefault(name, {})[str(size)] = run_scripted(together.url, size, config)
    return found


def run_scripted(url: str, size: int, config: BenchConfig) -> dict[str, float]:
    rate = size * config.scripted_rate
    requests = long_prompts(
        round(rate * config.seconds), 3, min_prompt_tokens=600, max_prompt_tokens=1_400, max_tokens=30
    )
    requests = [replace(request, ignore_eos=True) for request in requests]
    report = asyncio.run(run_load(LoadConfig(url, "tiny"), at_rate(requests, rate, 3)))
    shares = {
        f"share_{name}": sum(
            (each.ttft_s or 0.0) <= SCRIPTED_TTFT_SLO_S and (each.tpot_s or 0.0) <= tpot_slo_s
            for each in report.results
        )
        / len(requests)
        for name, tpot_slo_s in SCRIPTED_TPOT_SLO_S.items()
    }
    return {name: round(value, 3) for name, value in {**summary(report), **shares}.items()}


def measure_all(config: BenchConfig) -> dict[str, Any]:
    return {
        **measure_layouts(config), "transfers": measure_transfers(config), "wrong_answers": check_shapes(config),
        "scripted": measure_scripted(config),
    }  # fmt: skip


def plot(m: dict[str, Any], path: Path) -> None:
    fig, axes = plotting.panels(
        [
            ("Scripted engines", "engines", "meet both targets (%)"),
            ("Goodput, two cores", "requests/s sent", "requests/s"),
            ("Transfers", "tokens", "ms"),
        ]
    )
    for name, points in m["scripted"].items():
        sizes = sorted(points, key=int)
        shares = [100 * points[size]["share_tight"] for size in sizes]
        axes[0].plot([int(size) for size in sizes], shares, "o-", label=name.removeprefix("together, "))
    axes[0].set_xscale("log", base=2)
    axes[0].set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    axes[0].set_ylim(0, 105)
    for name, points in m["goodput"].items():
        rates = sorted(points, key=float)
        goodput = [points[rate]["goodput"] for rate in rates]
        axes[1].plot([float(rate) for rate in rates], goodput, "o-", label=name.removeprefix("1 engine, "))
    axes[1].set_ylim(bottom=0)
    for connector, points in m["transfers"].items():
        lengths = sorted(points, key=int)
        for key, style, label in (("fetch_ms", "o-", "afterwards"), ("exposed_ms", "o--", "overlapped")):
            values = [points[length][key] for length in lengths]
            axes[2].plot([int(length) for length in lengths], values, style, label=f"{connector}, {label}")
    for ax in axes:
        ax.legend(fontsize=9)
    plotting.save(fig, path)


def report(console: Console, m: dict[str, Any]) -> None:
    columns = list(next(iter(m["mixed"].values())))
    table = Table("short chats beside long prompts", *columns, box=SIMPLE)
    for name, found in m["mixed"].items():
        table.add_row(name, *(f"{found[column]:,.0f}" for column in columns))
    console.print(table)
    for name, points in m["goodput"].items():
        console.print(f"goodput, {name}: { {rate: each['goodput'] for rate, each in points.items()} }", highlight=False)
    for connector, points in m["transfers"].items():
        for length, found in points.items():
            console.print(f"transfer, {connector}, {length} tokens: {found}", highlight=False)
    console.print(f"wrong answers: {m['wrong_answers']}", highlight=False)
    for name, points in m["scripted"].items():
        for size, found in points.items():
            console.print(f"scripted, {name}, {size} engines: {found}", highlight=False)


def run(config: BenchConfig) -> None:
    results, measurements = Path(config.results_dir), measure_all(config)
    report(Console(width=160), measurements)
    settings = {key: value for key, value in asdict(config).items() if key != "results_dir"}
    write_result(
        results / "part13.json", benchmark="part13", config=settings, seed=0, repeats=config.repeats,
        measurements=measurements,
    )  # fmt: skip
    plot(measurements, results / "part13.png")


def main() -> None:
    prog = "part13_disaggregation.bench"
    config = parse_config(BenchConfig, "Prefill and decode together or apart, on the same cores.", prog)
    exit_on_error(prog, lambda: run(config))


if __name__ == "__main__":
    main()
