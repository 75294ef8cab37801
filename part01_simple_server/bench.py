"""python -m part01_simple_server.bench: time per token by position, with and without the KV cache.

Writes results/part01.json and results/part01.png. Both variants run in one process and take turns.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from common import plotting
from common.cli import check_minimums, exit_on_error, option, parse_config
from common.prompts import encode_prompt
from common.results import median, write_result

from .config import EngineConfig
from .demo import Stopwatch
from .server import kv_bytes_per_token

PROMPT = "Once upon a time there was"
WINDOW = 16  # tokens per point of the plot


@dataclass(frozen=True, slots=True)
class BenchConfig:
    model: str = option("tiny", "a shipped model, a directory, a Hugging Face id or random:<preset>")
    max_tokens: int = option(512, "tokens to generate", 2 * WINDOW)
    repeats: int = option(5, "runs of each variant; medians are reported", 1)
    results_dir: str = option("results", "folder for part01.json and part01.png")

    def __post_init__(self) -> None:
        check_minimums(self)


def measure(llm: Stopwatch, prompt: list[int], config: BenchConfig) -> dict[str, Any]:
    """Median ms per token for both variants, run in turns, and for one-token answers, where a cache cannot help."""
    runs: dict[bool, list[list[float]]] = {True: [], False: []}
    one_token: dict[bool, list[float]] = {True: [], False: []}
    for use_cache in (True, False):
        llm.time_tokens(prompt, 64, use_cache)  # warm-up
    for _ in range(config.repeats):
        for use_cache in (True, False):
            runs[use_cache].append(llm.time_tokens(prompt, config.max_tokens, use_cache)[1])
            one_token[use_cache] += [llm.time_tokens(prompt, 1, use_cache)[1][0] for _ in range(20)]
    per_token = {use: [1e3 * median(times) for times in zip(*runs[use], strict=True)] for use in runs}
    totals = {use: median([sum(run) for run in runs[use]]) for use in runs}
    return {
        "cached_ms": [round(ms, 4) for ms in per_token[True]],
        "uncached_ms": [round(ms, 4) for ms in per_token[False]],
        "cached_tokens_per_s": round(config.max_tokens / totals[True], 2),
        "uncached_tokens_per_s": round(config.max_tokens / totals[False], 2),
        "speedup": round(totals[False] / totals[True], 3),
        "one_token_answer_speedup": round(median(one_token[False]) / median(one_token[True]), 3),
        "kv_bytes_per_token": kv_bytes_per_token(llm.model.config, llm.model.dtype),
        "weight_bytes": sum(p.nbytes for p in llm.model.parameters()),
    }


def windows(values: list[float]) -> tuple[list[int], list[float]]:
    """Medians over windows of WINDOW tokens, with the output position of each window's middle."""
    starts = range(0, len(values) - WINDOW + 1, WINDOW)
    return [start + WINDOW // 2 for start in starts], [median(values[start : start + WINDOW]) for start in starts]


def plot(measurements: dict[str, Any], model: str, path: Path) -> None:
    fig, axes = plotting.figure(f"Time per token, {model}", "output token", "milliseconds")
    for key, color, label in (
        ("uncached_ms", plotting.BASELINE_COLOR, "no cache"),
        ("cached_ms", plotting.COLORS[0], "KV cache"),
    ):
        (line,) = axes.plot(*windows(measurements[key]), color=color)
        plotting.label_line(axes, line, label)
    axes.set_ylim(bottom=0)
    plotting.save(fig, path)


def report(console: Console, measurements: dict[str, Any], max_tokens: int) -> None:
    table = Table("output tokens", "KV cache, ms per token", "no cache, ms per token", "ratio")
    positions, cached = windows(measurements["cached_ms"])
    _, uncached = windows(measurements["uncached_ms"])
    for i in sorted({0, len(positions) // 4, len(positions) // 2, len(positions) - 1}):
        first = positions[i] - WINDOW // 2
        table.add_row(
            f"{first + 1}–{first + WINDOW}", f"{cached[i]:.2f}", f"{uncached[i]:.2f}", f"{uncached[i] / cached[i]:.1f}×"
        )
    console.print(table)
    m = measurements
    console.print(
        f"{max_tokens} tokens: {m['cached_tokens_per_s']:.0f} tokens/s with the cache, "
        f"{m['uncached_tokens_per_s']:.0f} without: {m['speedup']:.1f}×.\n"
        f"No gain for one-token answers: {m['one_token_answer_speedup']:.2f}×. "
        f"Cost: {m['kv_bytes_per_token']:,} bytes of KV cache per token.",
        highlight=False,
    )


def run(config: BenchConfig) -> None:
    llm = Stopwatch(EngineConfig(model=config.model))
    prompt = encode_prompt({"prompt": PROMPT}, llm.tokenizer, llm.max_model_len)
    measurements = measure(llm, prompt, config)
    report(Console(), measurements, config.max_tokens)
    settings = {key: value for key, value in asdict(config).items() if key != "results_dir"}
    results = Path(config.results_dir)
    settings |= {
        "device": llm.device,
        "dtype": str(llm.model.dtype).removeprefix("torch."),
        "prompt_tokens": len(prompt),
    }
    write_result(
        results / "part01.json",
        benchmark="part01",
        config=settings,
        seed=0,
        repeats=config.repeats,
        measurements=measurements,
    )
    plot(measurements, config.model, results / "part01.png")


def main() -> None:
    prog = "part01_simple_server.bench"
    config = parse_config(BenchConfig, "Time per token by position, with and without the KV cache.", prog)
    exit_on_error(prog, lambda: run(config))


if __name__ == "__main__":
    main()
