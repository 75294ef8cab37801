"""Compare all parts and transformers on the same work, in one run: python -m tools.comparison [--write | --table].

Without a flag it measures and prints. --write also writes results/comparison.json, its plot and the table in
results/README.md; --table rewrites the plot and the table from the existing JSON.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from common import plotting
from common.checkpoint import load_model, resolve_checkpoint
from common.results import median, read_result, write_result
from common.sampling_params import SamplingParams
from common.workloads import WorkloadRequest, nano_vllm_cpu

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "results" / "comparison.json"
MARKERS = ("<!-- comparison:begin -->", "<!-- comparison:end -->")
BASELINE = "transformers, one by one"
TRANSFORMERS = (BASELINE, "transformers, padded", "transformers, continuous")
PARTS = tuple(f"part {number}" for number in range(3, 9))
PROPOSERS = {"part 8, ngram": "ngram", "part 8, draft_model": "draft_model"}
REPEATS = {"tiny": 5, "random:llama-110m": 1}
WORKLOADS = {"32 requests": 32, "one request": 1}  # of nano_vllm_cpu
Engine = Callable[[list[WorkloadRequest]], object]  # runs all of these requests


def engine_names(model: str) -> list[str]:
    """Transformers, parts with their defaults, part 8 with each proposer; only the shipped model has a draft model."""
    return [name for name in (*TRANSFORMERS, *PARTS, *PROPOSERS) if model == "tiny" or "draft_model" not in name]


def load(name: str, model: str) -> Engine:
    """Load one of engine_names()."""
    if name in TRANSFORMERS:
        return load_transformers(name, model)
    flags = {"speculative_method": PROPOSERS[name]} if name in PROPOSERS else {}
    [folder] = ROOT.glob(f"part{int(name.split()[1].rstrip(',')):02d}_*")
    return load_part(folder.name, model, **flags)


def load_part(part: str, model: str, **flags: Any) -> Engine:
    config = importlib.import_module(f"{part}.config").EngineConfig(
        model=model, device="cpu", dtype="float32", max_num_seqs=32, max_model_len=1_024, **flags
    )
    llm = importlib.import_module(f"{part}.llm").LLM(config)

    def run(requests: list[WorkloadRequest]) -> None:
        params = [SamplingParams(temperature=0, max_tokens=r.max_tokens, ignore_eos=True) for r in requests]
        results = llm.generate([r.prompt_token_ids or [] for r in requests], params)
        lengths = [len(result.outputs[0].token_ids) for result in results]
        assert lengths == [r.max_tokens for r in requests], f"{part} answered with {lengths} tokens"
        if hasattr(llm.engine, "reset_prefix_cache"):  # otherwise the next run would find this one's prompts
            assert llm.engine.reset_prefix_cache(), "the engine is idle"

    return run


def load_transformers(name: str, model: str) -> Engine:
    """Load transformers, to run it as part 4's bench does."""
    logging.set_verbosity_error()
    bench = importlib.import_module("part04_continuous_batching.bench")
    loaded = load_model(resolve_checkpoint(model), torch.float32, "cpu")
    if name == BASELINE:
        return lambda requests: [bench.generate_padded(loaded, [request]) for request in requests]
    generate = bench.generate_padded if name == "transformers, padded" else bench.generate_continuously
    return lambda requests: generate(loaded, requests)


_engine: Engine | None = None  # in an engine's own process


def _load(name: str, model: str) -> None:
    global _engine
    _engine = load(name, model)
    _engine(nano_vllm_cpu(1, seed=1))  # warm-up


def _seconds(num_requests: int) -> float:
    assert _engine is not None, "_load() runs first"
    requests = nano_vllm_cpu(num_requests)
    started = time.perf_counter()
    _engine(requests)
    return time.perf_counter() - started


def measure(model: str, repeats: int) -> dict[str, dict[str, float]]:
    """Output tokens/s by workload and engine; the engines take turns.

    Each engine has its own process: threads that another engine left running would slow it down.
    """
    spawn = multiprocessing.get_context("spawn")
    found: dict[str, dict[str, float]] = {}
    with contextlib.ExitStack() as stack:
        pools = {
            name: stack.enter_context(ProcessPoolExecutor(1, spawn, initializer=_load, initargs=(name, model)))
            for name in engine_names(model)
        }
        for workload, num_requests in WORKLOADS.items():
            seconds: dict[str, list[float]] = {name: [] for name in pools}
            for _ in range(repeats):
                for name, pool in pools.items():
                    seconds[name].append(pool.submit(_seconds, num_requests).result())
            num_tokens = sum(request.max_tokens for request in nano_vllm_cpu(num_requests))
            found[workload] = {name: round(num_tokens / median(times), 1) for name, times in seconds.items()}
            print(model, workload, found[workload], flush=True)
    return found


def markdown(result: dict[str, Any]) -> str:
    """A row per engine, a column per model and workload: tokens/s, and the ratio to transformers one by one."""
    measurements, machine = result["measurements"], result["machine"]
    columns = [(model, workload) for model in REPEATS for workload in WORKLOADS]
    lines = ["| | " + " | ".join(f"`{model}`, {workload}" for model, workload in columns) + " |"]
    lines.append("|---|" + "---|" * len(columns))
    for name in (*TRANSFORMERS, *PARTS, *PROPOSERS):
        cells = []
        for model, workload in columns:
            rates = measurements[model][workload]
            cells.append(f"{rates[name]:,.0f} ({rates[name] / rates[BASELINE]:.1f}×)" if name in rates else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    repeats = ", ".join(f"{count} for `{model}`" for model, count in result["config"]["repeats"].items())
    note = f"{machine['cpu_cores']} cores of an {machine['cpu']}, float32; the engines take turns; medians of {repeats}"
    return "\n".join([*lines, "", f"({note}; [comparison.json](comparison.json).)"])


def plot(rates_by_workload: dict[str, dict[str, float]], path: Path) -> None:
    fig, panels = plotting.panels([(workload, "output tokens/s", "") for workload in WORKLOADS])
    for axes, workload in zip(panels, WORKLOADS, strict=True):
        rates = rates_by_workload[workload]
        names = [name for name in (*TRANSFORMERS, *PARTS, *PROPOSERS) if name in rates][::-1]
        colors = [plotting.BASELINE_COLOR if name in TRANSFORMERS else plotting.COLORS[0] for name in names]
        bars = axes.barh(names, [rates[name] for name in names], color=colors)
        axes.bar_label(bars, fmt="{:,.0f}", padding=3)
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.18)
    panels[1].set_yticklabels([])
    plotting.save(fig, path)


def write_table(result: dict[str, Any]) -> None:
    """Write the plot and the table from the measurements."""
    plot(result["measurements"]["tiny"], RESULT.with_suffix(".png"))
    page = ROOT / "results" / "README.md"
    head, begin, rest = page.read_text("utf-8").partition(MARKERS[0])
    _, end, tail = rest.partition(MARKERS[1])
    assert begin and end, f"results/README.md lacks {MARKERS[0]} or {MARKERS[1]}"
    page.write_text(f"{head}{begin}\n\n{markdown(result)}\n\n{end}{tail}", "utf-8")


def main(argv: list[str]) -> int:
    if argv not in ([], ["--write"], ["--table"]):
        print(__doc__)
        return 2
    if argv != ["--table"]:
        measurements = {model: measure(model, repeats) for model, repeats in REPEATS.items()}
        if argv:
            write_result(
                RESULT,
                benchmark="comparison",
                config={"workloads": list(WORKLOADS), "repeats": REPEATS},
                seed=0,
                repeats=max(REPEATS.values()),
                measurements=measurements,
            )
    if argv:
        write_table(read_result(RESULT))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
