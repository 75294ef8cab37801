"""python -m part11_expert_parallelism.bench: experts on several ranks: speed, memory, bytes, and balance.

Writes results/part11.json and results/part11.png.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from common import plotting
from common.cli import check_minimums, exit_on_error, option, parse_config
from common.prompts import encode_prompt
from common.results import median, write_result
from common.sampling_params import SamplingParams

from .api.async_engine import AsyncLLM, RequestStream
from .config import EngineConfig
from .core.eplb import balancedness, place_experts
from .lab.dispatched import dispatched_rows, expected_share
from .lab.expert_map import PROMPTS, count_experts, load_model
from .lab.grouped import measure_grouped

GRIDS: dict[str, dict[str, Any]] = {
    "1 rank": {}, "tp 2": {"tensor_parallel_size": 2},
    "ep 2": {"tensor_parallel_size": 2, "enable_expert_parallel": True},
    "ep 2, dbo": {"tensor_parallel_size": 2, "enable_expert_parallel": True, "enable_dbo": True},
    "ep 4": {"tensor_parallel_size": 4, "enable_expert_parallel": True},
    "dp 2": {"data_parallel_size": 2},
    "dp 2, ep 2": {"data_parallel_size": 2, "enable_expert_parallel": True},
}  # fmt: skip
PLACEMENTS = ("in order", "placed", "4 redundant", "placed by other prompts")
PROMPT_TOKENS = 32
REST_S = 2.0  # engine cores that share experts take dummy steps for a while, which would slow down the next grid


@dataclass(frozen=True, slots=True)
class BenchConfig:
    models: str = option("tiny-moe,random:moe-small", "mixtures of experts, comma-separated")
    batch_sizes: str = option("1,16,64", "requests at once, comma-separated")
    max_tokens: int = option(24, "tokens per answer", 8)
    repeats: int = option(5, "runs of each grid, in turns; medians are reported", 1)
    results_dir: str = option("results", "folder for the JSON and the plot")

    def __post_init__(self) -> None:
        check_minimums(self)


# Speed


class Server:
    """An engine as the API process has it, without HTTP."""

    def __init__(self, model: str, flags: dict[str, Any]) -> None:
        config = EngineConfig(
            model=model, num_threads=1, max_model_len=256, kv_cache_memory=2**27, enable_prefix_caching=False, **flags
        )
        self.engine, self.loop = AsyncLLM(config), asyncio.new_event_loop()
        self.loop.call_soon(self.engine.start)

    def generate(self, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
        """The answers' tokens. All requests arrive at once."""

        async def read(stream: RequestStream) -> list[int]:
            return [token async for output in stream for token in output.token_ids]

        async def generate() -> list[list[int]]:
            return await asyncio.gather(*(read(self.engine.generate(prompt, params)) for prompt in prompts))

        return self.loop.run_until_complete(generate())

    def close(self) -> None:
        self.engine.shutdown()
        self.loop.close()


def serve(server: Server, batch_size: int, max_tokens: int) -> tuple[float, list[list[int]]]:
    """Output tokens per second, with the prompts' time, and the tokens."""
    rng = random.Random(0)
    prompts = [[rng.randrange(100, 4_000) for _ in range(PROMPT_TOKENS)] for _ in range(batch_size)]
    started = time.perf_counter()
    answers = server.generate(prompts, SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True))
    return batch_size * max_tokens / (time.perf_counter() - started), answers


def expert_parameters(model: str, flags: dict[str, Any]) -> int:
    """Parameters of experts on each rank."""
    decoder, _ = load_model(model)
    total = sum(each.numel() for mixture in decoder.mixtures for each in mixture.experts.parameters())
    num_cores = flags.get("data_parallel_size", 1) if flags.get("enable_expert_parallel") else 1
    return total // (num_cores * flags.get("tensor_parallel_size", 1))


def compare(model: str, config: BenchConfig) -> dict[str, Any]:
    """All grids in turns, with one thread for each rank. Their answers must be the same."""
    sizes = [int(size) for size in config.batch_sizes.split(",")]
    speeds: dict[str, dict[int, list[float]]] = {name: {size: [] for size in sizes} for name in GRIDS}
    with contextlib.ExitStack() as stack:
        servers = dict[str, Server]()
        for name, flags in GRIDS.items():
            servers[name] = Server(model, flags)
            stack.callback(servers[name].close)
        for server in servers.values():  # warm-up
            serve(server, sizes[-1], 4)
        for _ in range(config.repeats):
            for size in sizes:
                answers = []
                for name, server in servers.items():
                    speed, token_ids = serve(server, size, config.max_tokens)
                    speeds[name][size].append(speed)
                    answers.append(token_ids)
                    if name == "dp 2, ep 2":
                        time.sleep(REST_S)
                assert all(each == answers[0] for each in answers), f"{model}: ranks changed an answer"
    return {
        name: {
            "expert_parameters": expert_parameters(model, flags),
            "tokens_per_s": {str(size): round(median(speeds[name][size]), 2) for size in sizes},
        }
        for name, flags in GRIDS.items()
    }


# Bytes


def measure_bytes(model_name: str) -> dict[str, Any]:
    """ranks → rows that leave a rank, sent once for each rank and once for each expert, and what chance predicts."""
    model, tokenizer = load_model(model_name)
    prompts = [encode(tokenizer, text) for texts in PROMPTS.values() for text in texts]
    gate = model.mixtures[0].gate
    found = {}
    for num_ranks in (2, 4, 8):
        per_rank, per_expert = dispatched_rows(model, prompts, num_ranks)
        found[str(num_ranks)] = {
            "rows_per_rank": per_rank, "rows_per_expert": per_expert, "share": round(per_rank / per_expert, 4),
            "expected_share": round(expected_share(model.mixtures[0].num_experts, gate.top_k, num_ranks), 4),
        }  # fmt: skip
    return found


# Balance


def encode(tokenizer: Any, text: str) -> list[int]:
    return encode_prompt({"messages": [{"role": "user", "content": text}]}, tokenizer, 2_048)


def measure_balance(model_name: str, num_ranks: int = 4) -> dict[str, Any]:
    """kind of prompt → balancedness of its second half of prompts. Experts are in order; or placed by the first half,
    without and with four redundant experts; or placed by another kind of prompts."""
    model, tokenizer = load_model(model_name)
    loads = {
        kind: [count_experts(model, [encode(tokenizer, text) for text in texts[half::2]]) for half in (0, 1)]
        for kind, texts in PROMPTS.items()
    }
    found, kinds = {}, list(loads)
    for number, (kind, (first, second)) in enumerate(loads.items()):
        other, _ = loads[kinds[number - 1]]
        count = len(first[0])
        placements = (
            [list(range(count)) for _ in first],
            [place_experts(each, count, num_ranks) for each in first],
            [place_experts(each, count + 4, num_ranks) for each in first],
            [place_experts(each, count, num_ranks) for each in other],
        )
        found[kind] = {
            name: round(balancedness(second, slots, num_ranks), 4)
            for name, slots in zip(PLACEMENTS, placements, strict=True)
        }
    return found


def measure_all(config: BenchConfig) -> dict[str, Any]:
    return {
        "models": {model: compare(model, config) for model in config.models.split(",")},
        "bytes": measure_bytes("tiny-moe"), "balance": measure_balance("tiny-moe"),
        "grouped_linear": measure_grouped(config.repeats),
    }  # fmt: skip


def plot(m: dict[str, Any], path: Path) -> None:
    size = list(next(iter(m["models"].values()))["1 rank"]["tokens_per_s"])[-1]
    fig, (left, right) = plotting.panels(
        [(f"Output tokens/s, {size} requests", "", "1 rank = 1"), ("Balance of four ranks", "", "mean load / largest")]
    )
    grids = [name for name in GRIDS if name != "1 rank"]
    speeds = {
        model.removeprefix("random:"): [
            found[name]["tokens_per_s"][size] / found["1 rank"]["tokens_per_s"][size] for name in grids
        ]
        for model, found in m["models"].items()
    }
    plot_bars(left, [name.replace(", ", "\n") for name in grids], speeds, plotting.COLORS)
    left.axhline(1, color=plotting.BASELINE_COLOR, linewidth=1.2)
    left.set_ylim(0, 2)
    balances = {name: [m["balance"][kind][name] for kind in PROMPTS] for name in PLACEMENTS}
    plot_bars(right, list(PROMPTS), balances, (plotting.BASELINE_COLOR, *plotting.COLORS))
    right.set_ylim(0, 1.4)
    plotting.save(fig, path)


def plot_bars(axes: Any, groups: list[str], series: dict[str, list[float]], colors: Sequence[str]) -> None:
    """For each group of bars, one bar of each series."""
    width = 0.8 / len(series)
    for number, (name, values) in enumerate(series.items()):
        places = [x + width * number for x in range(len(groups))]
        bars = axes.bar(places, values, 0.95 * width, color=colors[number], label=name)
        plotting.label_bars(axes, bars, "{:.2f}", fontsize=9)
    axes.set_xticks([x + width * (len(series) - 1) / 2 for x in range(len(groups))], groups)
    axes.legend(loc="upper right", fontsize=9)


def report(console: Console, m: dict[str, Any]) -> None:
    sizes = list(next(iter(m["models"].values()))["1 rank"]["tokens_per_s"])
    table = Table("model", "ranks", "experts per rank", *(f"tokens/s, {size}" for size in sizes), box=SIMPLE)
    for model, grids in m["models"].items():
        for name, found in grids.items():
            speeds = (f"{found['tokens_per_s'][size]:,.1f}" for size in sizes)
            table.add_row(model, name, f"{found['expert_parameters'] / 1e6:.1f} M", *speeds)
    console.print(table)
    for num_ranks, found in m["bytes"].items():
        console.print(
            f"{num_ranks} ranks: {found['rows_per_rank']:,} rows leave a rank instead of {found['rows_per_expert']:,}: "
            f"{found['share']:.0%}; by chance {found['expected_share']:.0%}",
            highlight=False,
        )
    for kind, found in m["balance"].items():
        console.print(f"{kind}: {', '.join(f'{name} {value:.2f}' for name, value in found.items())}", highlight=False)
    for what, found in m["grouped_linear"].items():
        console.print(f"{what}: {', '.join(f'{name} {value} ms' for name, value in found.items())}", highlight=False)


def run(config: BenchConfig) -> None:
    results, measurements = Path(config.results_dir), measure_all(config)
    report(Console(), measurements)
    settings = {key: value for key, value in asdict(config).items() if key != "results_dir"}
    write_result(
        results / "part11.json", benchmark="part11", config=settings, seed=0, repeats=config.repeats,
        measurements=measurements,
    )  # fmt: skip
    plot(measurements, results / "part11.png")


def main() -> None:
    prog = "part11_expert_parallelism.bench"
    config = parse_config(BenchConfig, "Experts on several ranks: speed, memory, bytes, and balance.", prog)
    exit_on_error(prog, lambda: run(config))


if __name__ == "__main__":
    main()
