"""python -m part15_full_architecture.bench: operations beside torch's, and decode speed with kernels added one by one.

In "torch", all operations but attention are computed by the references, which are written to be read.

Writes results/part15.json and results/part15.png. With --check, it measures the operations only, and fails if one has
lost more than 30% of its committed advantage over torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from llvmlite.binding import get_host_cpu_name
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from common import plotting
from common.cli import check_minimums, exit_on_error, option, parse_config
from common.errors import FieldError
from common.results import write_result
from common.threads import set_num_threads

from .config import EngineConfig
from .lab.kernel_times import measure
from .lab.operators import CallCounter, replaced_run
from .lab.speed import decode_speeds, generate_s, prefill_speeds
from .llm import LLM

BATCHES = (1, 32)
SAMPLED = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "seed": 1}
FLOOR = 0.7  # of a committed advantage over torch
BEFORE = {"norm": "torch", "rotary": "torch", "activation": "torch", "sampling": "torch"}  # reference.py
ADDED = {"torch": (), "+ norm": ("norm",), "+ rotary": ("rotary",), "+ activation": ("activation",)}
MODELS: dict[str, list[dict[str, Any]]] = {
    "tiny": [{}], "random:llama-110m": [{}, {"dtype": "bfloat16"}],
}  # fmt: skip


TITLES = {
    "tiny, float32": "tiny",
    "random:llama-110m, float32": "110M",
    "random:llama-110m, bfloat16": "110M, bfloat16",
}
SHOWN = {"greedy_1": "greedy, batch 1", "greedy_32": "greedy, batch 32", "sampled_32": "sampled, batch 32"}


@dataclass(frozen=True, slots=True)
class BenchConfig:
    num_tokens: int = option(16, "output tokens of each request when decode speed is measured", 1)
    repeats: int = option(3, "runs, in turns; medians are reported", 1)
    results_dir: str = option("results", "folder for the JSON and the plot")
    check: bool = option(False, "measure the operations only, and compare with the committed results")

    def __post_init__(self) -> None:
        check_minimums(self)


def measure_operations(repeats: int) -> dict[str, Any]:
    """One thread, float32."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {model: measure(model, torch.float32, "cpu", repeats) for model in MODELS}
    torch.set_num_threads(before)
    return found


def variants() -> Iterator[tuple[str, dict[str, Any]]]:
    """The references in torch, but part 14's kernel for attention; then with this part's kernels, added one by one."""
    wanted = dict(BEFORE)
    for name, added in ADDED.items():
        wanted = {operation: backend for operation, backend in wanted.items() if operation not in added}
        yield name, {"kernels": kernels_flag(wanted), "pack_weights": False, "megakernel": False}
    yield "+ sampling", {"pack_weights": False, "megakernel": False}
    yield "+ packed matrices", {"megakernel": False}
    yield "megakernel", {}


def kernels_flag(wanted: dict[str, str]) -> str:
    return ",".join(f"{operation}={backend}" for operation, backend in wanted.items()) or "auto"


def measure_engines(config: BenchConfig) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for model, settings in MODELS.items():
        for flags in settings:
            engines = {name: engine(model, **flags, **own) for name, own in variants()}
            rows = found[f"{model}, {flags.get('dtype', 'float32')}"] = {
                name: {"operators_per_step": operators_per_step(llm)} for name, llm in engines.items()
            }
            for batch_size in BATCHES:
                for name, speed in decode_speeds(engines, batch_size, config.num_tokens, config.repeats).items():
                    rows[name][f"greedy_{batch_size}"] = speed
                speeds = decode_speeds(engines, batch_size, config.num_tokens, config.repeats, **SAMPLED)
                for name, speed in speeds.items():
                    rows[name][f"sampled_{batch_size}"] = speed
    return found


def measure_prefill(config: BenchConfig) -> dict[str, Any]:
    """Prompt tokens/s with torch's matrix products, and with packed copies of the matrices where these are faster."""
    found = dict[str, Any]()
    for model, settings in MODELS.items():
        for flags in settings:
            engines = {"plain": engine(model, **flags, pack_weights=False), "packed copies": engine(model, **flags)}
            found[f"{model}, {flags.get('dtype', 'float32')}"] = prefill_speeds(engines, config.repeats)
    return found


def measure_padding(config: BenchConfig) -> dict[str, Any]:
    """Where it loses: padded steps on a CPU, which has no launches to save. 5 requests in buckets of 5 and of 8."""
    engines = {
        "no buckets": engine("tiny"), "bucket of 5": engine("tiny", cudagraph_capture_sizes="5"),
        "bucket of 8": engine("tiny", cudagraph_capture_sizes="8"),
    }  # fmt: skip
    return decode_speeds(engines, 5, config.num_tokens, config.repeats)


def measure_emulation() -> dict[str, float]:
    """Seconds for 32 output tokens of one request: with the kernels in Numba, and in emulated CUDA."""
    engines = {"numba": engine("tiny"), "cuda, emulated": engine("tiny", kernels="cuda")}
    for llm in engines.values():
        generate_s(llm, 1, 4)  # compiles
    return {name: round(generate_s(llm, 1, 32), 3) for name, llm in engines.items()}


def engine(model: str, **flags: Any) -> LLM:
    return LLM(EngineConfig(model=model, num_kv_blocks=1_024, **flags))


def operators_per_step(llm: LLM) -> int:
    """torch's operators in a decode step of 32 requests."""
    runner = llm.engine.executor.worker.runner  # type: ignore[attr-defined]
    counts = list[int]()
    run = runner.run

    def run_counted(*args: Any, **named: Any) -> Any:
        with CallCounter() as counter:
            result = run(*args, **named)
        counts.append(counter.num_calls)
        return result

    with replaced_run(runner, run_counted):
        generate_s(llm, 32, 8)
    return counts[-1]


def measure_all(config: BenchConfig) -> dict[str, Any]:
    set_num_threads(None)
    return {
        "operations": measure_operations(config.repeats), "engines": measure_engines(config),
        "prefill": measure_prefill(config), "padding": measure_padding(config), "emulation_s": measure_emulation(),
    }  # fmt: skip


def check(config: BenchConfig) -> None:
    """Raises FieldError naming the operations that have lost their advantage over torch, or another kind of CPU."""
    path = Path(config.results_dir) / "part15.json"
    result = json.loads(path.read_text())
    committed, measured_on = result["measurements"]["operations"], result["config"].get("target")
    if measured_on != (target := get_host_cpu_name()):
        raise FieldError(
            "check",
            f"{path} was measured on {measured_on or 'another CPU'}, and this is {target}, where torch and the kernels "
            "gain more or less. Measure first: make bench PART=15",
        )
    slower = []
    for model, operations in measure_operations(config.repeats).items():
        for name, values in operations.items():
            for backend, speedup in values["speedup"].items():
                expected = committed[model][name]["speedup"].get(backend)
                if expected is not None and speedup < FLOOR * expected:
                    slower.append(f"{model}, {name}: {backend} is {speedup} times as fast as torch, was {expected}")
    if slower:
        raise FieldError("check", "; ".join(slower))
    print(f"all operations have at least {FLOOR:.0%} of their advantage over torch in {path}")


def plot(m: dict[str, Any], path: Path) -> None:
    titles = [(TITLES[name], "", "times torch's") for name in TITLES]
    fig, axes = plotting.panels([("Operations", "", "times torch's speed"), *titles])
    found = {name.split(",")[0]: each for name, each in m["operations"]["tiny"].items() if name.endswith(", 32 rows")}
    names = sorted(found, key=lambda name: -found[name]["speedup"]["numba"])
    bars = axes[0].bar(range(len(names)), [found[name]["speedup"]["numba"] for name in names])
    axes[0].set_yscale("log")
    axes[0].set_yticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
    axes[0].minorticks_off()
    axes[0].set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=9)
    plotting.label_bars(axes[0], bars, "{:.1f}", fontsize=8)
    order = [name for name, _ in variants()]
    for ax, rows in zip(axes[1:], (m["engines"][name] for name in TITLES), strict=True):
        for key, label in SHOWN.items():
            ax.plot(range(len(order)), [rows[name][key] / rows[order[0]][key] for name in order], "o-", label=label)
        ax.set_xticks(range(len(order)), order, rotation=60, ha="right", fontsize=9)
        ax.set_ylim(0, 7)
        ax.axhline(1, color="gray", linewidth=1)
    axes[2].legend(fontsize=9, loc="upper left")
    plotting.save(fig, path)


def report(console: Console, m: dict[str, Any]) -> None:
    for model, operations in m["operations"].items():
        table = Table(model, "torch (µs)", "numba (µs)", "torch / numba", box=SIMPLE)
        for name, values in operations.items():
            table.add_row(
                name, *(f"{values['us'][key]:,.1f}" for key in ("torch", "numba")), f"{values['speedup']['numba']:.1f}"
            )
        console.print(table)
    for model, rows in m["engines"].items():
        columns = list(next(iter(rows.values())))
        table = Table(model, *columns, box=SIMPLE)
        for name, found in rows.items():
            table.add_row(name, *(f"{found[column]:,.0f}" for column in columns))
        console.print(table)
    console.print(f"prefill, tokens/s: {m['prefill']}", highlight=False)
    console.print(f"padding, tokens/s: {m['padding']}", highlight=False)
    console.print(f"emulation, s: {m['emulation_s']}", highlight=False)


def run(config: BenchConfig) -> None:
    if config.check:
        check(config)
        return
    results, measurements = Path(config.results_dir), measure_all(config)
    report(Console(width=160), measurements)
    settings = {key: value for key, value in asdict(config).items() if key not in ("results_dir", "check")}
    settings["target"] = get_host_cpu_name()  # as Numba and the C++ compiler know this CPU
    write_result(
        results / "part15.json", benchmark="part15", config=settings, seed=0, repeats=config.repeats,
        measurements=measurements,
    )  # fmt: skip
    plot(measurements, results / "part15.png")


def main() -> None:
    prog = "part15_full_architecture.bench"
    config = parse_config(BenchConfig, "Each operation beside torch's, and decode speed with the kernels added.", prog)
    exit_on_error(prog, lambda: run(config))


if __name__ == "__main__":
    main()
