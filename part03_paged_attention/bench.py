"""python -m part03_paged_attention.bench: how many requests the same KV memory holds, contiguous and paged, and what
attention through block tables costs.

Writes results/part03.json, results/part03.png and results/part03_memory.png. The contiguous layout is the same engine
with blocks as long as the context: each request then needs exactly one block, and reserves all of it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.colors import ListedColormap
from rich.console import Console
from rich.table import Table
from torch import Tensor

from common import plotting
from common.cli import check_minimums, exit_on_error, option, parse_config
from common.errors import FieldError
from common.results import median, write_result
from common.sampling_params import SamplingParams

from .config import EngineConfig
from .core.engine import LLMEngine
from .lab.memory_map import memory_map, num_slots

CONTEXT, BLOCK_SIZE = 2_048, 16
LAYOUTS = {"contiguous": CONTEXT, "paged": BLOCK_SIZE, "blocks of 8": 8}
PICTURED = ("contiguous", "paged")
Lengths = tuple[int, int]


def short_chat(rng: random.Random) -> Lengths:
    return rng.randint(16, 128), rng.randint(16, 128)


def chat(rng: random.Random) -> Lengths:
    """Lengths with long tails: like ShareGPT's conversations, but a third as long."""
    prompt, answer = rng.lognormvariate(4.3, 0.8), rng.lognormvariate(4.7, 0.7)
    return min(max(int(prompt), 16), 1_024), min(max(int(answer), 16), 768)


def documents(rng: random.Random) -> Lengths:
    return rng.randint(512, 1_500), rng.randint(64, 256)


DISTRIBUTIONS: dict[str, Callable[[random.Random], Lengths]] = {
    "short chat": short_chat,
    "chat": chat,
    "documents": documents,
}


@dataclass(frozen=True, slots=True)
class BenchConfig:
    model: str = option("tiny", "a shipped model, a directory, a Hugging Face id or random:<preset>")
    num_requests: int = option(48, "requests of each distribution", 1)
    budget_tokens: int = option(8_192, "size of the KV pool in tokens: a multiple of the context, 2,048", CONTEXT)
    repeats: int = option(3, "runs of each layout, alternating; medians are reported", 1)
    results_dir: str = option("results", "folder for the JSON and the plots")

    def __post_init__(self) -> None:
        check_minimums(self)
        if self.budget_tokens % CONTEXT:
            raise FieldError("budget_tokens", f"expected a multiple of {CONTEXT}, got {self.budget_tokens}")


def make_engine(config: BenchConfig, block_size: int) -> LLMEngine:
    return LLMEngine(
        EngineConfig(
            model=config.model, max_model_len=CONTEXT, max_num_seqs=256, max_num_batched_tokens=config.budget_tokens,
            block_size=block_size, num_kv_blocks=config.budget_tokens // block_size + 1,
        )
    )  # fmt: skip


def add_requests(engine: LLMEngine, config: BenchConfig, draw: Callable[[random.Random], Lengths]) -> int:
    """Queue the workload. Returns how many tokens it will generate."""
    rng, total = random.Random(0), 0
    for number in range(config.num_requests):
        prompt_tokens, answer_tokens = draw(rng)
        prompt = [rng.randrange(64, 4_096) for _ in range(prompt_tokens)]
        engine.add_request(
            str(number), prompt, SamplingParams(temperature=0, max_tokens=answer_tokens, ignore_eos=True)
        )
        total += answer_tokens
    return total


def run_workload(engine: LLMEngine, config: BenchConfig, draw: Callable[[random.Random], Lengths]) -> dict[str, float]:
    """Serve the workload and look at the pool after each step."""
    num_tokens = add_requests(engine, config, draw)
    first_step, first_preemption = engine.num_steps, engine.num_preemptions
    peak, running, used, reserved = 0, 0, 0, 0
    started = time.perf_counter()
    while engine.has_unfinished_requests:
        engine.step()
        peak, running = max(peak, len(engine.running)), running + len(engine.running)
        in_use, held = num_slots(engine)
        used, reserved = used + in_use, reserved + held
    seconds = time.perf_counter() - started
    steps = engine.num_steps - first_step
    return {
        "steps": steps,
        "peak_requests": peak,
        "mean_requests": round(running / steps, 2),
        "waste": round(1 - used / reserved, 4),
        "preemptions": engine.num_preemptions - first_preemption,
        "output_tokens": num_tokens,
        "tokens_per_s": round(num_tokens / seconds, 1),
    }


def measure_capacity(config: BenchConfig) -> dict[str, dict[str, dict[str, float]]]:
    engines = {name: make_engine(config, size) for name, size in LAYOUTS.items()}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for distribution, draw in DISTRIBUTIONS.items():
        runs = [
            {name: run_workload(engine, config, draw) for name, engine in engines.items()}
            for _ in range(config.repeats)
        ]
        found[distribution] = {
            name: {**runs[0][name], "tokens_per_s": median([run[name]["tokens_per_s"] for run in runs])}
            for name in engines
        }
    return found


def take_pictures(config: BenchConfig, num_steps: int = 40) -> dict[str, list[int]]:
    """The pool after some steps of "chat", a number per 16 slots: −1 free, 0 reserved and empty, else owner + 1."""
    pictures = {}
    for name in PICTURED:
        engine = make_engine(config, LAYOUTS[name])
        add_requests(engine, config, chat)
        for _ in range(num_steps):
            engine.step()
        cells = memory_map(engine, BLOCK_SIZE)
        pictures[name] = [-1 if cell is None else cell.owner + 1 if cell.num_used else 0 for cell in cells]
    return pictures


def median_us(call: Callable[[], Any], repeats: int = 60) -> float:
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 1e6 * median(seconds[repeats // 6 :])


def contiguous_decode(query: Tensor, context: Tensor, scale: float) -> Tensor:
    """Decode attention without block tables: SDPA over keys and values that lie in one tensor.

    query: [num_seqs, num_heads, head_dim]; context: [num_seqs, context_len, 2, num_kv_heads, head_dim], as a contiguous
    KV cache holds it. Returns query's shape. The query heads that share a KV head are passed as several queries of it.
    """
    key, value = context.transpose(1, 3).unbind(2)  # [num_seqs, num_kv_heads, context_len, head_dim]
    grouped = query.unflatten(1, (key.shape[1], -1))
    return F.scaled_dot_product_attention(grouped, key, value, scale=scale).flatten(1, 2)


@torch.inference_mode()
def measure_attention(config: BenchConfig) -> list[dict[str, float]]:
    """One layer's decode attention: through block tables, and over contiguous keys and values."""
    engine = make_engine(BenchConfig(model=config.model, budget_tokens=32 * CONTEXT), BLOCK_SIZE)
    model, attention = engine.executor.worker.model, engine.executor.worker.runner.attention
    assert attention is not None, "the executor has allocated the cache"
    kv_cache, scale, rows = attention.kv_cache.layer(0), model.head_dim**-0.5, []
    random_values = partial(torch.randn, dtype=model.dtype, device=model.device)
    kv_cache.copy_(random_values(kv_cache.shape))
    for num_seqs, length in ((1, 256), (1, 2_000), (8, 256), (8, 1_000), (32, 256), (32, 1_000)):
        width = -(-length // BLOCK_SIZE)
        blocks = torch.randperm(engine.blocks.num_blocks - 1)[: num_seqs * width] + 1
        block_tables = blocks.view(num_seqs, width).int().to(model.device)
        context_lens = torch.full((num_seqs,), length, dtype=torch.int32, device=model.device)
        query = random_values(num_seqs, model.num_heads, model.head_dim)
        context = random_values(num_seqs, length, 2, model.num_kv_heads, model.head_dim)
        paged = median_us(partial(attention.decode, query, kv_cache, block_tables, context_lens, scale))
        ready = median_us(partial(contiguous_decode, query, context, scale))
        rows.append({"num_seqs": num_seqs, "context": length, "paged_us": round(paged, 1), "ready_us": round(ready, 1)})
    return rows


def measure_long_request(config: BenchConfig, num_tokens: int = 64) -> dict[str, float]:
    """The time per step of a single request whose context is almost full."""
    engine = make_engine(config, BLOCK_SIZE)
    prompt = [64 + i % 4_000 for i in range(CONTEXT - num_tokens - 1)]
    engine.add_request("0", prompt, SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True))
    engine.step()
    seconds = []
    while engine.has_unfinished_requests:
        started = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - started)
    return {"context": len(prompt), "step_ms": round(1e3 * median(seconds), 3)}


def plot(capacity: dict[str, Any], path: Path) -> None:
    fig, (left, right) = plotting.panels(
        [("Requests at once in the same memory", "", "requests, mean"), ("Reserved and empty", "", "share, %")]
    )
    legend = {name: f"blocks of {size}" for name, size in LAYOUTS.items()} | {"contiguous": "contiguous"}
    colors = dict(zip(LAYOUTS, (plotting.BASELINE_COLOR, *plotting.COLORS), strict=False))
    for axes, key, factor, fmt in ((left, "mean_requests", 1, "{:,.1f}"), (right, "waste", 100, "{:,.1f}")):
        shown = PICTURED if axes is left else LAYOUTS  # smaller blocks hold as many requests
        for i, (name, color) in enumerate((name, colors[name]) for name in shown):
            values = [factor * runs[name][key] for runs in capacity.values()]
            bars = axes.bar([x + 0.3 * i for x in range(len(values))], values, 0.27, color=color, label=legend[name])
            plotting.label_bars(axes, bars, fmt)
        axes.set_xticks([x + 0.15 * (len(shown) - 1) for x in range(len(capacity))], list(capacity))
        axes.margins(y=0.15)
    right.legend(loc="upper right")
    plotting.save(fig, path)


def plot_memory(pictures: dict[str, list[int]], path: Path, columns: int = 64) -> None:
    titles = {"contiguous": "Contiguous: gray is empty", "paged": "Paged: white is free"}
    fig, all_axes = plotting.panels([(titles[name], "", "") for name in PICTURED], height_px=230)
    colors = ["#FFFFFF", "#D0D0D0"] + [plotting.COLORS[i % len(plotting.COLORS)] for i in range(256)]
    for axes, name in zip(all_axes, PICTURED, strict=True):
        cells = torch.tensor(pictures[name]).view(-1, columns) + 1
        axes.imshow(
            cells, cmap=ListedColormap(colors), vmin=0, vmax=len(colors) - 1, aspect="auto", interpolation="nearest"
        )
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(visible=False)
    plotting.save(fig, path)


def report(console: Console, m: dict[str, Any]) -> None:
    table = Table("lengths", "layout", "at once, mean", "peak", "empty", "steps", "preempted", "tokens/s")
    for distribution, layouts in m["capacity"].items():
        for name, run in layouts.items():
            table.add_row(
                distribution, name, f"{run['mean_requests']:.1f}", f"{run['peak_requests']}",
                f"{100 * run['waste']:.1f}%", f"{run['steps']:,}", f"{run['preemptions']}",
                f"{run['tokens_per_s']:,.0f}",
            )  # fmt: skip
    console.print(table)
    table = Table("sequences", "context", "paged, µs", "contiguous, µs", "ratio")
    for row in m["attention"]:
        table.add_row(
            f"{row['num_seqs']}", f"{row['context']:,}", f"{row['paged_us']:,.0f}", f"{row['ready_us']:,.0f}",
            f"{row['paged_us'] / row['ready_us']:.2f}×",
        )  # fmt: skip
    console.print("Decode attention of one layer:", table)
    long = m["long_request"]
    attention = next(row for row in m["attention"] if row["context"] == 2_000)
    paged_ms, contiguous_ms = (m["num_layers"] * attention[name] / 1e3 for name in ("paged_us", "ready_us"))
    console.print(
        f"Where it loses: a single request gains nothing from paging. With a context of {long['context']:,} tokens, a "
        f"step takes {long['step_ms']:.2f} ms. Attention over 2,000 tokens takes {paged_ms:.2f} ms of it (all layers); "
        f"over contiguous keys and values it would take {contiguous_ms:.2f} ms.",
        highlight=False,
    )


def run(config: BenchConfig) -> None:
    measurements = {
        "capacity": measure_capacity(config),
        "attention": measure_attention(config),
        "long_request": measure_long_request(config),
        "memory": take_pictures(config),
        "num_layers": make_engine(config, BLOCK_SIZE).executor.worker.model.num_layers,
    }
    report(Console(), measurements)
    results = Path(config.results_dir)
    write_result(
        results / "part03.json",
        benchmark="part03",
        config={key: value for key, value in asdict(config).items() if key != "results_dir"}
        | {"context": CONTEXT, "block_size": BLOCK_SIZE},
        seed=0,
        repeats=config.repeats,
        measurements=measurements,
    )
    plot(measurements["capacity"], results / "part03.png")
    plot_memory(measurements["memory"], results / "part03_memory.png")


def main() -> None:
    prog = "part03_paged_attention.bench"
    config = parse_config(BenchConfig, "How many requests the same KV memory holds, contiguous and paged.", prog)
    exit_on_error(prog, lambda: run(config))


if __name__ == "__main__":
    main()
