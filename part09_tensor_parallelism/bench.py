"""python -m part09_tensor_parallelism.bench: what ranks save and what they cost, and the link from which on they pay.

Writes results/part09.json and results/part09.png. All grids of ranks take turns.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from common import plotting
from common.cli import check_minimums, exit_on_error, option, parse_config
from common.results import median, write_result
from common.sampling_params import SamplingParams
from common.trace import StepTrace, read_trace

from .config import EngineConfig
from .core.executor import MultiprocExecutor, UniProcExecutor
from .lab.link import Link, break_even, fit, measure, predict_step_s
from .llm import LLM

GRIDS = {  # tensor-parallel ranks, pipeline stages, threads of each rank
    "1 rank": (1, 1, 1), "2 threads": (1, 1, 2), "tp 2": (2, 1, 1), "tp 4": (4, 1, 1), "pp 2": (1, 2, 1),
}  # fmt: skip
PROMPT_TOKENS = 32


@dataclass(frozen=True, slots=True)
class BenchConfig:
    models: str = option("tiny,random:llama-110m", "models, comma-separated")
    batch_sizes: str = option("1,16", "requests at once, comma-separated")
    max_tokens: int = option(24, "tokens per answer", 8)
    repeats: int = option(5, "runs of each grid, in turns; medians are reported", 1)
    link_repeats: int = option(200, "all-reduces of each size", 3)
    results_dir: str = option("results", "folder for the JSON and the plot")

    def __post_init__(self) -> None:
        check_minimums(self)


@contextlib.contextmanager
def engines(model: str, folder: Path) -> Iterator[dict[str, LLM]]:
    """An engine for each grid, and a trace for each."""
    llms: dict[str, LLM] = {}
    try:
        for name, (tp_size, num_stages, num_threads) in GRIDS.items():
            llms[name] = LLM(
                EngineConfig(
                    model=model, tensor_parallel_size=tp_size, pipeline_parallel_size=num_stages,
                    num_threads=num_threads, max_model_len=256, max_num_seqs=16, kv_cache_memory=2**26,
                    enable_prefix_caching=False, trace=str(folder / name),
                )
            )  # fmt: skip
        yield llms
    finally:
        for llm in llms.values():
            llm.engine.shutdown()


def serve(llm: LLM, batch_size: int, max_tokens: int) -> tuple[float, list[list[int]]]:
    """Output tokens per second, with the prompts' time, and the tokens."""
    prompts = [[5 + number] * PROMPT_TOKENS for number in range(batch_size)]
    started = time.perf_counter()
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True))
    seconds = time.perf_counter() - started
    return batch_size * max_tokens / seconds, [output.outputs[0].token_ids for output in outputs]


def per_step(steps: list[StepTrace], num_requests: int) -> dict[str, float]:
    """Of the steps with this many requests: medians of a decode step's time, of its collectives on rank 0, and of the
    time of a step with prompts."""
    full = [step for step in steps if len(step.requests) == num_requests]
    decodes = [step for step in full if all(r.num_scheduled == 1 for r in step.requests)]
    prompts = [step for step in full if all(r.num_scheduled == PROMPT_TOKENS for r in step.requests)]
    found = {"step_ms": 1e3 * median([step.forward_s or 0.0 for step in decodes])}
    if prompts:
        found["prompts_ms"] = 1e3 * median([step.forward_s or 0.0 for step in prompts])
    calls = [step.ranks[0].collectives for step in decodes if step.ranks]
    if calls and calls[0]:
        found["collectives"] = len(calls[0])
        found["bytes"] = sum(call.num_bytes for call in calls[0])
        found["collectives_ms"] = 1e3 * median([sum(call.duration_s for call in each) for each in calls])
    return found


def compare(model: str, config: BenchConfig) -> dict[str, Any]:
    """All grids in turns. Their answers must be the same."""
    sizes = [int(size) for size in config.batch_sizes.split(",")]
    speeds: dict[str, dict[int, list[float]]] = {name: {size: [] for size in sizes} for name in GRIDS}
    with tempfile.TemporaryDirectory() as folder:
        with engines(model, Path(folder)) as llms:
            memory = {name: memory_of(llm) for name, llm in llms.items()}
            for llm in llms.values():  # warm-up
                serve(llm, sizes[-1], 4)
            for _ in range(config.repeats):
                for size in sizes:
                    answers = []
                    for name, llm in llms.items():
                        speed, token_ids = serve(llm, size, config.max_tokens)
                        speeds[name][size].append(speed)
                        answers.append(token_ids)
                    assert all(each == answers[0] for each in answers), f"{model}: ranks changed an answer"
        steps = {name: read_trace(Path(folder) / name).steps for name in GRIDS}
    return {
        name: {
            **memory[name],
            **{
                str(size): {
                    "tokens_per_s": round(median(speeds[name][size]), 2),
                    **rounded(per_step(steps[name], -(-size // GRIDS[name][1]))),
                }
                for size in sizes
            },
        }
        for name in GRIDS
    }


def rounded(found: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in found.items()}


def memory_of(llm: LLM) -> dict[str, float]:
    """The most that a rank has: parameters, and bytes per token in the KV pool."""
    executor = llm.engine.executor
    if isinstance(executor, MultiprocExecutor):
        return {
            "parameters": max(each.num_parameters for each in executor.ranks_loaded),
            "kv_bytes_per_token": max(each.kv_bytes_per_token for each in executor.ranks_loaded),
        }
    assert isinstance(executor, UniProcExecutor)
    model = executor.worker.model
    return {
        "parameters": sum(each.numel() for each in model.parameters()),
        "kv_bytes_per_token": 2 * model.num_layers * model.num_kv_heads * model.head_dim * model.dtype.itemsize,
    }


def predictions(found: dict[str, Any], link: Link, sizes: list[str]) -> dict[str, Any]:
    """What the cost model says of a step on two ranks, beside what was measured."""
    predicted = {}
    for size in sizes:
        alone_s, two = found["1 rank"][size]["step_ms"] / 1e3, found["tp 2"][size]
        count, num_bytes = int(two["collectives"]), two["bytes"]
        bandwidth = break_even(alone_s, 2, count, num_bytes, link.latency_s)
        predicted[size] = {
            "alone_ms": round(1e3 * alone_s, 3),
            "predicted_ms": round(1e3 * predict_step_s(alone_s, 2, count, num_bytes, link), 3),
            "measured_ms": two["step_ms"],
            "break_even_gb_per_s": None if bandwidth is None else round(bandwidth / 1e9, 4),
        }
    return predicted


def measure_all(config: BenchConfig) -> dict[str, Any]:
    times = measure(2, config.link_repeats)
    link = fit(times)
    models = {model: compare(model, config) for model in config.models.split(",")}
    sizes = config.batch_sizes.split(",")
    return {
        "link": {
            "all_reduce_us": {str(size): round(1e6 * seconds, 1) for size, seconds in times.items()},
            "latency_us": round(1e6 * link.latency_s, 1),
            "gb_per_s": round(link.bytes_per_s / 1e9, 3),
        },
        "models": models,
        "cost model": {model: predictions(found, link, sizes) for model, found in models.items()},
    }


def plot(m: dict[str, Any], path: Path) -> None:
    labels = [
        (model, "", "output tokens/s, 1 rank = 1" if not number else "") for number, model in enumerate(m["models"])
    ]
    fig, all_axes = plotting.panels(labels)
    grids, highest = [name for name in GRIDS if name != "1 rank"], 1.0
    for axes, found in zip(all_axes, m["models"].values(), strict=True):
        sizes = sorted((key for key in found["1 rank"] if key.isdecimal()), key=int)
        for number, size in enumerate(sizes):
            values = [found[name][size]["tokens_per_s"] / found["1 rank"][size]["tokens_per_s"] for name in grids]
            highest = max(highest, *values)
            xs = [x + 0.44 * number for x in range(len(values))]
            label = "1 request" if size == "1" else f"{size} requests"
            bars = axes.bar(xs, values, 0.4, color=plotting.COLORS[number], label=label)
            plotting.label_bars(axes, bars, "{:.2f}")
        axes.set_xticks([x + 0.22 for x in range(len(grids))], grids)
        axes.axhline(1, color=plotting.BASELINE_COLOR, linewidth=1.2)
        axes.legend(loc="upper right")
    for axes in all_axes:
        axes.set_ylim(0, 1.4 * highest)
    plotting.save(fig, path)


def report(console: Console, m: dict[str, Any]) -> None:
    link = m["link"]
    console.print(
        f"Link: all-reduce latency {link['latency_us']} µs, bandwidth {link['gb_per_s']} GB/s.", highlight=False
    )
    for model, found in m["models"].items():
        table = Table(
            "ranks", "weights", "KV bytes", "requests", "tokens/s", "step, ms", "waits, ms", "sent", box=SIMPLE
        )
        for name, of_grid in found.items():
            for size in (key for key in of_grid if key.isdecimal()):
                run = of_grid[size]
                table.add_row(
                    name, f"{of_grid['parameters'] / 1e6:.1f} M", f"{of_grid['kv_bytes_per_token']:,}", size,
                    f"{run['tokens_per_s']:,.1f}", f"{run['step_ms']:.1f}", f"{run.get('collectives_ms', 0):.1f}",
                    f"{run.get('bytes', 0) / 1e3:,.0f}K",
                )  # fmt: skip
        console.print(
            f"\n{model} (per rank; KV bytes per token; waits and bytes sent: in a step's collectives)", highlight=False
        )
        console.print(table)
    for model, sizes in m["cost model"].items():
        for size, each in sizes.items():
            pays = each["break_even_gb_per_s"]
            console.print(
                f"{model}, {size} at once: a step takes {each['alone_ms']} ms on one rank; on two, predicted "
                f"{each['predicted_ms']} ms, measured {each['measured_ms']} ms; "
                + ("at this latency, no bandwidth makes up for it" if pays is None else f"pays from {pays} GB/s on"),
                highlight=False,
            )


def run(config: BenchConfig) -> None:
    results, measurements = Path(config.results_dir), measure_all(config)
    report(Console(), measurements)
    settings = {key: value for key, value in asdict(config).items() if key != "results_dir"}
    write_result(
        results / "part09.json", benchmark="part09", config=settings, seed=0, repeats=config.repeats,
        measurements=measurements,
    )  # fmt: skip
    plot(measurements, results / "part09.png")


def main() -> None:
    prog = "part09_tensor_parallelism.bench"
    config = parse_config(BenchConfig, "What ranks save and cost, and the link from which on they pay.", prog)
    exit_on_error(prog, lambda: run(config))


if __name__ == "__main__":
    main()
