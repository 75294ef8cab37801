"""python -m part15_full_architecture.bench: quality and speed against bytes, for every method.

Writes results/part14.json and results/part14.png.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from common import plotting
from common.cli import check_minimums, exit_on_error, option, parse_config
from common.results import median, write_result

from .config import EngineConfig
from .lab.quality import perplexity, share_exact
from .lab.rounding import (
    linear_bytes,
    model_of,
    num_linear_weights,
    plant_outliers,
    quantize_layers,
    round_weights,
    smooth_activations,
)
from .lab.speed import decode_speeds
from .llm import LLM
from .quantize import QuantizeConfig, Quantizer
from .worker.quantization.scheme import Scheme

BATCHES = (1, 32)
OUTLIER_FACTORS = (1, 10, 30, 100)
SMALLEST_SHOWN = 0.01  # %
LABELS = {
    "int4": (-22, 0),
    "int4, GPTQ": (-30, -4),
    "int4, AWQ": (-30, 0),
    "nf4": (6, -6),
    "W8A8, SmoothQuant": (-95, 8),
}
W8A8 = Scheme(bits=8, activations="int8")


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to run a model. flags: the engine's. written: flags of a checkpoint that is quantized first. bits: weights
    are rounded to so many bits in memory, where they stay float32."""

    name: str
    flags: dict[str, Any] = field(default_factory=dict)
    written: dict[str, Any] | None = None
    bits: int | None = None


BF16, WHOLE_ROWS = {"dtype": "bfloat16"}, {"group_size": -1}
QUALITY = [
    Variant("fp32"),
    Variant("bf16", BF16),
    Variant("int8", {"quantization": "int8"}),
    Variant("fp8", {"quantization": "fp8"}),
    Variant("W8A8", {"quantization": "w8a8"}),
    Variant("W8A8, SmoothQuant", written={"method": "smoothquant", "bits": 8, **WHOLE_ROWS}),
    Variant("int4, whole rows", written={"method": "rtn", **WHOLE_ROWS}),
    Variant("int4", {"quantization": "int4"}),
    Variant("int4, groups of 32", {"quantization": "int4", "quantization_group_size": 32}),
    Variant("nf4", {"quantization": "nf4"}),
    Variant("int4, GPTQ", written={"method": "gptq"}),
    Variant("int4, AWQ", written={"method": "awq"}),
    Variant("3 bits", bits=3),
    Variant("KV int8", {"kv_cache_dtype": "int8"}),
    Variant("KV fp8", {"kv_cache_dtype": "fp8"}),
    Variant("KV fp8, scale 1", {"kv_cache_dtype": "fp8", "calculate_kv_scales": False}),
    Variant("int4, GPTQ, KV int8", {"kv_cache_dtype": "int8"}, written={"method": "gptq"}),
]
SPEED = [
    Variant("fp32"),
    Variant("bf16", BF16),
    Variant("int8, fp32", {"quantization": "int8"}),
    Variant("int8, bf16", {"quantization": "int8", **BF16}),
    Variant("int4, fp32", {"quantization": "int4"}),
    Variant("int4, bf16", {"quantization": "int4", **BF16}),
    Variant("fp8, fp32", {"quantization": "fp8"}),
    Variant("nf4, fp32", {"quantization": "nf4"}),
    Variant("W8A8, fp32", {"quantization": "w8a8"}),
    Variant("W8A8, bf16", {"quantization": "w8a8", **BF16}),
]


@dataclass(frozen=True, slots=True)
class BenchConfig:
    model: str = option("tiny", "for quality: a shipped model, a directory or a Hugging Face id")
    speed_model: str = option("random:llama-110m", "for speed: any model")
    num_tokens: int = option(32, "output tokens of each request when speed is measured", 1)
    repeats: int = option(3, "runs, in turns; medians are reported", 1)
    results_dir: str = option("results", "folder for the JSON and the plot")

    def __post_init__(self) -> None:
        check_minimums(self)


def load(variant: Variant, model: str, directory: Path) -> LLM:
    """An engine. directory: for checkpoints, which are written only once."""
    if variant.written is not None:
        path = directory / "-".join(map(str, variant.written.values()))
        if not path.exists():
            with Progress(disable=True) as progress:
                Quantizer(QuantizeConfig(model=model, out=str(path), **variant.written)).run(progress)
        model = str(path)
    llm = LLM(EngineConfig(model=model, num_kv_blocks=2_048, **variant.flags))
    if variant.bits is not None:
        round_weights(model_of(llm), Scheme(bits=variant.bits, group_size=128))
    return llm


def describe(llm: LLM) -> dict[str, Any]:
    model = model_of(llm)
    num_bytes = linear_bytes(model)
    executor = llm.engine.executor
    return {
        "linear_mb": round(num_bytes / 1e6, 2), "bits_per_weight": round(8 * num_bytes / num_linear_weights(model), 2),
        "weights_mb": round(executor.weight_bytes / 1e6, 2),
        "kv_bytes_per_token": executor.bytes_per_block // llm.engine.blocks.block_size,
    }  # fmt: skip


def measure_quality(config: BenchConfig, directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    engines: dict[str, LLM] = {}
    for variant in QUALITY:
        seconds, llm = load_times(variant, config, directory)
        engines[variant.name] = llm
        found[variant.name] = {
            **describe(llm), "perplexity": round(perplexity(llm), 4), "exact": round(share_exact(llm), 4),
            "load_s": round(seconds, 2),
        }  # fmt: skip
    for batch_size in BATCHES:
        for name, speed in decode_speeds(engines, batch_size, config.num_tokens, config.repeats).items():
            found[name][f"tokens_per_s_{batch_size}"] = speed
    return found


def load_times(variant: Variant, config: BenchConfig, directory: Path) -> tuple[float, LLM]:
    """Seconds to load a model, and the engine. The first time, a checkpoint may be written and kernels compiled."""
    llm, seconds = load(variant, config.model, directory), list[float]()
    for _ in range(config.repeats):
        start_s = time.perf_counter()
        llm = load(variant, config.model, directory)
        seconds.append(time.perf_counter() - start_s)
    return median(seconds), llm


def measure_speed(config: BenchConfig, directory: Path) -> dict[str, Any]:
    engines = {variant.name: load(variant, config.speed_model, directory) for variant in SPEED}
    found = {name: describe(llm) for name, llm in engines.items()}
    for batch_size in BATCHES:
        for name, speed in decode_speeds(engines, batch_size, config.num_tokens, config.repeats).items():
            found[name][f"tokens_per_s_{batch_size}"] = speed
    return found


def measure_outliers(config: BenchConfig) -> dict[str, Any]:
    """Perplexity when a few activations are larger than the others by a factor: in float32, with W8A8, and with W8A8
    after SmoothQuant."""
    found: dict[str, Any] = {}
    for factor in OUTLIER_FACTORS:
        values = found[str(factor)] = {}
        for name, is_smoothed, scheme in (("fp32", False, None), ("W8A8", False, W8A8), ("SmoothQuant", True, W8A8)):
            llm = LLM(EngineConfig(model=config.model))
            plant_outliers(model_of(llm), factor)
            if is_smoothed:
                smooth_activations(llm)
            if scheme is not None:
                quantize_layers(model_of(llm), scheme)
            values[name] = round(perplexity(llm), 4)
    return found


def measure_all(config: BenchConfig) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        return {
            "quality": measure_quality(config, Path(directory)), "speed": measure_speed(config, Path(directory)),
            "outliers": measure_outliers(config),
        }  # fmt: skip


def plot(m: dict[str, Any], path: Path) -> None:
    fig, axes = plotting.panels(
        [
            ("Quality (tiny)", "bits per weight", "perplexity, more than fp32 (%)"),
            ("Speed (110M)", "", "tokens/s, times fp32"),
            ("W8A8 and outliers", "outliers, times larger", "perplexity"),
        ]
    )
    plot_quality(axes[0], m["quality"])
    names, width = [variant.name for variant in SPEED], 0.4
    for offset, batch_size in enumerate(BATCHES):
        speeds = [m["speed"][name][f"tokens_per_s_{batch_size}"] for name in names]
        places = [place + (offset - 0.5) * width for place in range(len(names))]
        axes[1].bar(
            places, [speed / speeds[names.index("fp32")] for speed in speeds], width, label=f"batch {batch_size}"
        )
    axes[1].set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=9)
    axes[1].axhline(1, color="gray", linewidth=1)
    for name in ("fp32", "W8A8", "SmoothQuant"):
        values = [m["outliers"][str(factor)][name] for factor in OUTLIER_FACTORS]
        axes[2].plot(OUTLIER_FACTORS, values, "o-", label=name)
    axes[2].set_xscale("log")
    axes[2].set_xticks(OUTLIER_FACTORS, map(str, OUTLIER_FACTORS))
    axes[2].minorticks_off()
    for ax in axes[1:]:
        ax.legend(fontsize=9)
    plotting.save(fig, path)


def plot_quality(ax: Any, quality: dict[str, Any]) -> None:
    """Weights alone, and each name beside its point: to the right, but where two points are close."""
    base = quality["fp32"]["perplexity"]
    for name in (variant.name for variant in QUALITY):
        found = quality[name]
        if name in ("fp32", "bf16") or "KV" in name:
            continue
        bits = 3.25 if name == "3 bits" else found["bits_per_weight"]
        worse = max(SMALLEST_SHOWN, 100 * (found["perplexity"] / base - 1))
        [point] = ax.plot(bits, worse, "o")
        ax.annotate(
            name.removeprefix("int4, "), (bits, worse), LABELS.get(name, (6, 0)), textcoords="offset points",
            va="center", fontsize=8, color=point.get_color(),
        )  # fmt: skip
    ax.set_xlim(2.2, 10)
    ax.set_yscale("log")


def report(console: Console, m: dict[str, Any]) -> None:
    for title in ("quality", "speed"):
        columns = list(next(iter(m[title].values())))
        table = Table(title, *columns, box=SIMPLE)
        for name, found in m[title].items():
            table.add_row(name, *(f"{found[column]:,}" for column in columns))
        console.print(table)
    for factor, found in m["outliers"].items():
        console.print(f"outliers, {factor} times larger: perplexity {found}", highlight=False)


def run(config: BenchConfig) -> None:
    results, measurements = Path(config.results_dir), measure_all(config)
    report(Console(width=170), measurements)
    settings = {key: value for key, value in asdict(config).items() if key != "results_dir"}
    write_result(
        results / "part14.json", benchmark="part14", config=settings, seed=0, repeats=config.repeats,
        measurements=measurements,
    )  # fmt: skip
    plot(measurements, results / "part14.png")


def main() -> None:
    prog = "part15_full_architecture.bench"
    config = parse_config(BenchConfig, "Quality and speed against bytes, for every method.", prog)
    exit_on_error(prog, lambda: run(config))


if __name__ == "__main__":
    main()
