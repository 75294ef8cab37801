"""All parts and transformers on the same work, in one run: python -m tools.comparison [--write | --table].

Without a flag it measures and prints. --write also writes results/comparison.json, its plot and README's table; --table
writes the plot and the table again from the JSON that is there.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable
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
FIRST_PART, LAST_PART = 3, 8
REPEATS = {"tiny": 5, "random:llama-110m": 1}
WORKLOADS: dict[str, Callable[[], list[WorkloadRequest]]] = {
    "32 requests": nano_vllm_cpu,
    "one request": lambda: nano_vllm_cpu(1),
}
Way = Callable[[list[WorkloadRequest]], object]


def part_ways(model: str) -> dict[str, Way]:
    """Parts 3 to 8 with their defaults, and part 8 with somebody who guesses."""
    found: dict[str, Way] = {}
    for number in range(FIRST_PART, LAST_PART + 1):
        [folder] = ROOT.glob(f"part{number:02d}_*")
        found[f"part {number}"] = engine_way(folder.name, model)
    methods = ["ngram", "draft_model"] if model == "tiny" else ["ngram"]  # there is a draft for the shipped model only
    for method in methods:
        found[f"part {LAST_PART}, {method}"] = engine_way(folder.name, model, speculative_method=method)
    return found


def engine_way(part: str, model: str, **flags: Any) -> Way:
    config = importlib.import_module(f"{part}.config").EngineConfig(
        model=model, device="cpu", dtype="float32", max_num_seqs=32, max_model_len=1_024, **flags
    )
    llm = importlib.import_module(f"{part}.engine").LLM(config)

    def run(requests: list[WorkloadRequest]) -> None:
        params = [SamplingParams(temperature=0, max_tokens=r.max_tokens, ignore_eos=True) for r in requests]
        results = llm.generate([r.prompt_token_ids or [] for r in requests], params)
        lengths = [len(result.outputs[0].token_ids) for result in results]
        assert lengths == [r.max_tokens for r in requests], f"{part} answered with {lengths} tokens"
        if hasattr(llm.engine, "reset_prefix_cache"):  # else the next run would find this one's prompts
            assert llm.engine.reset_prefix_cache(), "the engine is idle"

    return run


def transformers_ways(model: str) -> dict[str, Way]:
    """As part 4's bench runs them."""
    bench = importlib.import_module("part04_continuous_batching.bench")
    loaded = load_model(resolve_checkpoint(model), torch.float32, "cpu")
    return {
        "transformers, one by one": lambda requests: [bench.generate_padded(loaded, [r]) for r in requests],
        "transformers, padded": lambda requests: bench.generate_padded(loaded, requests),
        "transformers, continuous": lambda requests: bench.generate_continuously(loaded, requests),
    }


def measure(model: str, repeats: int) -> dict[str, dict[str, float]]:
    """Output tokens/s by workload and way; the ways take turns."""
    ways = transformers_ways(model) | part_ways(model)
    found: dict[str, dict[str, float]] = {}
    for workload, build in WORKLOADS.items():
        requests = build()
        num_tokens = sum(request.max_tokens for request in requests)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for way in ways.values():  # warm-up
            way(nano_vllm_cpu(1, seed=1))
        for _ in range(repeats):
            for name, way in ways.items():
                started = time.perf_counter()
                way(requests)
                seconds[name].append(time.perf_counter() - started)
        found[workload] = {name: round(num_tokens / median(times), 1) for name, times in seconds.items()}
        print(model, workload, found[workload], flush=True)
    return found


def markdown(result: dict[str, Any]) -> str:
    """A row a way, a column a model and workload: tokens/s, and how many times transformers one by one."""
    measurements, machine = result["measurements"], result["machine"]
    columns = [(model, workload) for model in measurements for workload in measurements[model]]
    names = list(dict.fromkeys(name for model, workload in columns for name in measurements[model][workload]))
    lines = ["| | " + " | ".join(f"`{model}`, {workload}" for model, workload in columns) + " |"]
    lines.append("|---|" + "---|" * len(columns))
    for name in names:
        cells = []
        for model, workload in columns:
            rates = measurements[model][workload]
            baseline = rates["transformers, one by one"]
            cells.append(f"{rates[name]:,.0f} ({rates[name] / baseline:.1f}×)" if name in rates else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    repeats = ", ".join(f"`{model}` {count}" for model, count in result["config"]["repeats"].items())
    note = f"{machine['cpu_cores']} cores of an {machine['cpu']}, float32; ways in turns, medians of: {repeats}"
    return "\n".join([*lines, "", f"({note}; [results/comparison.json](results/comparison.json).)"])


def plot(measurements: dict[str, Any], path: Path) -> None:
    model = next(iter(measurements))
    fig, panels = plotting.panels([(f"{model}, {workload}", "output tokens/s", "") for workload in measurements[model]])
    for axes, rates in zip(panels, measurements[model].values(), strict=True):
        names = list(rates)[::-1]
        colors = [plotting.BASELINE_COLOR if name.startswith("transformers") else plotting.COLORS[0] for name in names]
        bars = axes.barh(names, [rates[name] for name in names], color=colors)
        axes.bar_label(bars, fmt="{:,.0f}", padding=3)
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.18)
    panels[1].set_yticklabels([])
    plotting.save(fig, path)


def write_table(result: dict[str, Any]) -> None:
    """Plot and table, from what was measured."""
    plot(result["measurements"], RESULT.with_suffix(".png"))
    readme = ROOT / "README.md"
    head, begin, rest = readme.read_text("utf-8").partition(MARKERS[0])
    _, end, tail = rest.partition(MARKERS[1])
    assert begin and end, f"README.md lacks {MARKERS[0]} or {MARKERS[1]}"
    readme.write_text(f"{head}{begin}\n\n{markdown(result)}\n\n{end}{tail}", "utf-8")


def main(argv: list[str]) -> int:
    if argv not in ([], ["--write"], ["--table"]):
        print(__doc__)
        return 2
    if argv != ["--table"]:
        logging.set_verbosity_error()
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
