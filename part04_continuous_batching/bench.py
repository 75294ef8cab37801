"""python -m part04_continuous_batching.bench: static versus continuous batching, both versus transformers, and where
a step's time goes.

Writes results/part04.json, part04.png, part04_slots_static.png and part04_slots_continuous.png. Everything runs in one
process, in turns.
"""

from __future__ import annotations

import random
import tempfile
import textwrap
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from common import plotting
from common.checkpoint import load_model, resolve_checkpoint
from common.cli import check_minimums, exit_on_error, option, parse_config
from common.results import median, write_result
from common.sampling_params import SamplingParams
from common.stats import percentile
from common.trace import read_trace
from common.trace.view import draw
from common.workloads import WorkloadRequest, heavy_tailed, nano_vllm_cpu

from .config import EngineConfig
from .core.engine import LLMEngine
from .lab.static_batches import use_static_batches
from .lab.step_times import OUTSIDE, PARTS, step_timer

NUM_SEQS = 16


@dataclass(frozen=True, slots=True)
class BenchConfig:
    model: str = option("tiny", "a shipped model, a directory, a Hugging Face id or random:<preset>")
    num_requests: int = option(256, "requests of each workload", NUM_SEQS)
    repeats: int = option(3, "runs of each, in turns; medians are reported", 1)
    profile_model: str = option("random:llama-110m", "a second model for the breakdown of a step")
    results_dir: str = option("results", "folder for the JSON and the plots")

    def __post_init__(self) -> None:
        check_minimums(self)


def heaviest(num_requests: int) -> list[WorkloadRequest]:
    """Most answers are very short, a few reach the limit: half end within 12 tokens, one in fifty at 512."""
    return heavy_tailed(num_requests, median_output_tokens=12, sigma=2.0)


def uniform(num_requests: int) -> list[WorkloadRequest]:
    """heavy_tailed's prompts, with answers of 64 tokens each: all requests of a batch end in the same step."""
    return heavy_tailed(num_requests, median_output_tokens=64, sigma=0.0)


def add(engine: LLMEngine, request: WorkloadRequest) -> None:
    assert request.prompt_token_ids is not None
    params = SamplingParams(temperature=0, max_tokens=request.max_tokens, ignore_eos=True)
    engine.add_request(request.request_id, request.prompt_token_ids, params)


def serve(engine: LLMEngine, requests: list[WorkloadRequest]) -> dict[str, float]:
    """Serve requests that all arrive at time zero. A latency is the time to the request's last token."""
    first_step, latencies, sizes = engine.num_steps, [], 0
    started = time.perf_counter()
    for request in requests:
        add(engine, request)
    while engine.has_unfinished_requests:
        outputs = engine.step()
        sizes += len(outputs)
        now_s = time.perf_counter() - started
        latencies += [now_s for output in outputs if output.finish_reason]
    steps, seconds = engine.num_steps - first_step, time.perf_counter() - started
    return {
        "steps": steps,
        "mean_batch": round(sizes / steps, 2),
        "tokens_per_s": round(sum(request.max_tokens for request in requests) / seconds, 1),
        "mean_latency_s": round(sum(latencies) / len(latencies), 3),
        "p99_latency_s": round(percentile(latencies, 99), 3),
    }


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(median([run[key] for run in runs]), 3) for key in runs[0]}


def measure_batching(config: BenchConfig) -> dict[str, dict[str, dict[str, float]]]:
    engine_config = EngineConfig(model=config.model, max_num_seqs=NUM_SEQS)
    engines = {
        "static": use_static_batches(LLMEngine(engine_config)),
        "continuous": LLMEngine(engine_config),
    }
    found = {}
    for workload, requests in (
        ("heavy-tailed", heaviest(config.num_requests)),
        ("mild tail", heavy_tailed(config.num_requests)),
        ("uniform", uniform(config.num_requests)),
    ):
        for engine in engines.values():
            serve(engine, requests[:NUM_SEQS])  # warm-up
        runs = [{name: serve(engine, requests) for name, engine in engines.items()} for _ in range(config.repeats)]
        found[workload] = {name: medians([run[name] for run in runs]) for name in engines}
    return found


def measure_transformers(config: BenchConfig) -> dict[str, float]:
    """Output tokens/s on the CPU-sized public workload: this engine, and transformers used in three ways."""
    requests = nano_vllm_cpu()
    checkpoint = resolve_checkpoint(config.model)
    model = load_model(checkpoint, torch.float32, "cpu")
    engine = LLMEngine(EngineConfig(model=config.model, device="cpu", dtype="float32", max_num_seqs=len(requests)))
    num_tokens = sum(request.max_tokens for request in requests)
    ways: dict[str, Callable[[], object]] = {
        "part 4": lambda: serve(engine, requests),
        "one by one": lambda: [generate_padded(model, [request]) for request in requests],
        "padded batch": lambda: generate_padded(model, requests),
        "its continuous batching": lambda: generate_continuously(model, requests),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(config.repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    return {name: round(num_tokens / median(times), 1) for name, times in seconds.items()}


@torch.inference_mode()
def generate_padded(model: Any, requests: list[WorkloadRequest]) -> None:
    """transformers.generate on a batch padded on the left, run until its longest answer ends."""
    prompts = [request.prompt_token_ids or [] for request in requests]
    width, longest = max(map(len, prompts)), max(request.max_tokens for request in requests)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    generation = GenerationConfig(
        do_sample=False, max_new_tokens=longest, min_new_tokens=longest, pad_token_id=0,
        eos_token_id=model.config.vocab_size - 1,
    )  # fmt: skip
    model.generate(ids, attention_mask=mask, generation_config=generation)


def generate_continuously(model: Any, requests: list[WorkloadRequest]) -> None:
    """transformers' own continuous batching, with a cache of the size that was quickest here (64 pages of 256)."""
    generation = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=model.config.vocab_size - 1)
    settings = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=2_048)
    with model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=settings
    ) as manager:
        for request in requests:
            manager.add_request(request.prompt_token_ids, max_new_tokens=request.max_tokens)
        num_tokens = 0
        while num_tokens < sum(request.max_tokens for request in requests):
            output = manager.get_result(timeout=60)
            assert output is not None and output.error is None, f"transformers ended with {output}"
            num_tokens += len(output.generated_tokens) if output.is_finished() else 0


def measure_step(model: str, num_seqs: int = 32, context: int = 256, num_steps: int = 40) -> dict[str, Any]:
    """Where the time of a decode step goes, in ms, with num_seqs requests of about context tokens each.

    Steps with and without timers take turns. parts: medians; they need not add up exactly to the median of the steps.
    """
    flags: dict[str, Any] = {"max_num_seqs": num_seqs, "max_model_len": 2 * context, "device": "cpu"}
    engine = LLMEngine(EngineConfig(model=model, max_num_batched_tokens=num_seqs * context, **flags))
    rng = random.Random(0)
    for number in range(num_seqs):
        prompt = [rng.randrange(3, 1_000) for _ in range(context - num_steps)]
        params = SamplingParams(temperature=0, max_tokens=context, ignore_eos=True)
        engine.add_request(str(number), prompt, params)
    engine.step()
    untimed, timed, parts = list[float](), list[float](), list[dict[str, float]]()
    for number in range(2 * num_steps):
        with step_timer(engine) if number % 2 else nullcontext() as timer:
            started = time.perf_counter()
            engine.step()
            seconds = time.perf_counter() - started
        if timer is None:
            untimed.append(seconds)
        else:
            timed.append(seconds)
            parts.append(timer.seconds)
    found = {part: 1e3 * median([step[part] for step in parts]) for part in PARTS}
    return {
        "num_seqs": num_seqs,
        "context": context,
        "step_ms": round(1e3 * median(untimed), 2),
        "timed_step_ms": round(1e3 * median(timed), 2),
        "outside_share": round(sum(found[part] for part in OUTSIDE) / sum(found.values()), 4),
        "parts": {part: round(ms, 3) for part, ms in found.items()},
    }


def take_pictures(config: BenchConfig, path: Path, num_requests: int = 48) -> None:
    """One picture for each way of batching, on the same axis: a row for each request, a column for each step."""
    traces = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("static", "continuous"):
            file = Path(folder) / name
            engine = LLMEngine(EngineConfig(model=config.model, max_num_seqs=NUM_SEQS, trace=str(file)))
            if name == "static":
                use_static_batches(engine)
            serve(engine, [replace(request, request_id=str(i)) for i, request in enumerate(heavy_tailed(num_requests))])
            engine.tracer.close()
            traces[name] = read_trace(file)
    last_step = max(trace.steps[-1].step for trace in traces.values())
    for name, trace in traces.items():
        title = f"{name.capitalize()} batching: requests in each step"
        draw(trace, path.with_stem(f"{path.stem}_{name}"), title=title, last_step=last_step)


def plot(m: dict[str, Any], path: Path) -> None:
    fig, (left, right) = plotting.panels(
        [("Static and continuous batches", "", "output tokens/s"), ("Against transformers", "", "output tokens/s")]
    )
    workloads = list(m["batching"])
    for i, (name, color) in enumerate((("static", plotting.BASELINE_COLOR), ("continuous", plotting.COLORS[0]))):
        values = [m["batching"][workload][name]["tokens_per_s"] for workload in workloads]
        bars = left.bar([x + 0.4 * i for x in range(len(values))], values, 0.36, color=color, label=name)
        plotting.label_bars(left, bars)
    left.set_xticks([x + 0.2 for x in range(len(workloads))], workloads)
    left.margins(y=0.25)
    left.legend(loc="upper left", ncols=2)
    names = ["one by one", "padded batch", "its continuous batching", "part 4"]
    colors = [plotting.BASELINE_COLOR] * 3 + [plotting.COLORS[0]]
    bars = right.bar(range(4), [m["transformers"][name] for name in names], 0.6, color=colors)
    plotting.label_bars(right, bars)
    right.set_xticks(range(4), [textwrap.fill(name, 11) for name in names])
    right.margins(y=0.15)
    plotting.save(fig, path)


def report(console: Console, m: dict[str, Any]) -> None:
    table = Table("workload", "batches", "steps", "busy rows, mean", "tokens/s", "latency, mean", "p99")
    for workload, ways in m["batching"].items():
        for name, run in ways.items():
            table.add_row(
                workload, name, f"{run['steps']:,.0f}", f"{run['mean_batch']:.1f}", f"{run['tokens_per_s']:,.0f}",
                f"{run['mean_latency_s']:.2f} s", f"{run['p99_latency_s']:.2f} s",
            )  # fmt: skip
    console.print(table)
    ours = m["transformers"]["part 4"]
    for name, rate in m["transformers"].items():
        console.print(f"{name}: {rate:,.0f} tokens/s, part 4 is {ours / rate:.2f}× as fast", highlight=False)
    for model, step in m["step"].items():
        report_step(console, model, step)


def report_step(console: Console, model: str, step: dict[str, Any]) -> None:
    total = sum(step["parts"].values())
    table = Table("part of the step", "ms", "share", title=f"{model}: a step of {step['num_seqs']} decodes")
    for part, ms in step["parts"].items():
        table.add_row(part, f"{ms:.2f}", f"{100 * ms / total:.1f}%")
    table.add_row("all parts", f"{total:.2f}", "100%")
    console.print(table)
    console.print(
        f"The context is about {step['context']} tokens. A step takes {step['step_ms']:.2f} ms, and "
        f"{step['timed_step_ms']:.2f} ms with the timers, whose own cost is part of the numbers above. "
        f"{100 * step['outside_share']:.1f}% of the step is outside the model and the sampler.",
        highlight=False,
    )


def run(config: BenchConfig) -> None:
    results = Path(config.results_dir)
    measurements: dict[str, Any] = {
        "batching": measure_batching(config),
        "transformers": measure_transformers(config),
        "step": {model: measure_step(model) for model in dict.fromkeys((config.model, config.profile_model))},
    }
    report(Console(), measurements)
    settings = {key: value for key, value in asdict(config).items() if key != "results_dir"}
    write_result(
        results / "part04.json",
        benchmark="part04",
        config=settings | {"max_num_seqs": NUM_SEQS},
        seed=0,
        repeats=config.repeats,
        measurements=measurements,
    )
    plot(measurements, results / "part04.png")
    take_pictures(config, results / "part04_slots.png")


def main() -> None:
    prog = "part04_continuous_batching.bench"
    config = parse_config(BenchConfig, "Static versus continuous batching, and both versus transformers.", prog)
    exit_on_error(prog, lambda: run(config))


if __name__ == "__main__":
    main()
