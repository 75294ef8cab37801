"""python -m part05_async_scheduling.bench: the engine with and without async scheduling.

Writes results/part05.json, results/part05.png and results/part05_timeline.png. Every comparison is made in one run.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from common import plotting
from common.cli import check_minimums, exit_on_error, option, parse_config
from common.load_client import LoadConfig, run_load
from common.results import median, write_result
from common.sampling_params import SamplingParams
from common.serve import server_process
from common.threads import SPIN_VARIABLES
from common.trace import StepTrace
from common.workloads import WorkloadRequest, heavy_tailed

from .config import EngineConfig
from .core.engine import LLMEngine
from .lab.timeline import forward, host, summary, traced
from .messages import StepInput, StepOutput
from .worker.sampler import SamplerOutput
from .worker.stream import StepHandle, ThreadStream

PROG = "part05_async_scheduling"
NUM_SEQS = 32
MODES = {"sync": False, "async": True}
COLORS = {"sync": plotting.BASELINE_COLOR, "async": plotting.COLORS[0]}
FORWARD_S, HOST_S, NUM_SCRIPTED_STEPS = 0.010, 0.004, 100
NUM_STREAMS, STREAM_TOKENS, BUSY_LIMIT_S = 8, 100, 300
LONG_SPIN = {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"}  # OpenMP's own defaults
THREADING: dict[str, tuple[dict[str, str], list[str]]] = {  # name: (environment, flags)
    "server's default": ({}, []),
    "OpenMP's default": (LONG_SPIN, []),
    "--num-threads 1": ({}, ["--num-threads", "1"]),
}


@dataclass(frozen=True, slots=True)
class BenchConfig:
    small_model: str = option("tiny", "a model with short steps")
    large_model: str = option("random:llama-110m", "a model with long steps")
    num_steps: int = option(60, "decode steps of each measurement", 10)
    repeats: int = option(3, "runs of each, in turns; medians are reported", 1)
    results_dir: str = option("results", "folder for the JSON and the plots")

    def __post_init__(self) -> None:
        check_minimums(self)


class ScriptedExecutor:
    """Replaces the engine's executor: every step takes FORWARD_S on the device and HOST_S in the engine."""

    def __init__(self) -> None:
        self.stream = ThreadStream()

    def launch(self, step: StepInput) -> StepHandle:
        ready_at = time.perf_counter() + HOST_S
        while time.perf_counter() < ready_at:  # work, not sleep
            pass
        num_requests = len(step.requests)
        return self.stream.launch(lambda: self._run(num_requests), without_logprobs)

    @staticmethod
    def _run(num_requests: int) -> SamplerOutput:
        time.sleep(FORWARD_S)  # a GPU computes without the CPU
        return SamplerOutput(torch.full((num_requests,), 7), None)


def without_logprobs(sampled: SamplerOutput) -> StepOutput:
    return StepOutput(sampled.token_ids.tolist(), [None] * len(sampled.token_ids))


def run_scripted(engine: LLMEngine) -> None:
    """100 steps of 10 ms on the device and 4 ms in the engine."""
    engine.executor = ScriptedExecutor()  # type: ignore[assignment]
    params = SamplingParams(temperature=0, max_tokens=NUM_SCRIPTED_STEPS, ignore_eos=True)
    engine.add_request("0", [5], params)
    while engine.has_unfinished_requests:
        engine.step()


def measure_scripted(config: BenchConfig) -> tuple[dict[str, float], dict[str, list[StepTrace]]]:
    """Seconds from the first step to the last; and the steps of the last run."""
    seconds: dict[str, list[float]] = {name: [] for name in MODES}
    last: dict[str, list[StepTrace]] = {}
    for _ in range(config.repeats):
        for name, is_async in MODES.items():
            steps = last[name] = traced(EngineConfig(model="tiny", async_scheduling=is_async), run_scripted)
            seconds[name].append(steps[-1].end_s - steps[0].start_s)
    return {name: round(median(times), 3) for name, times in seconds.items()}, last


def add_decodes(engine: LLMEngine, num_tokens: int) -> None:
    for request in heavy_tailed(NUM_SEQS):
        assert request.prompt_token_ids is not None
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        engine.add_request(request.request_id, request.prompt_token_ids[:32], params)


def decode_steps(model: str, is_async: bool, num_steps: int) -> list[StepTrace]:
    """Steps of NUM_SEQS decodes each, without the first and last ones, in which the batch is smaller."""

    def run(engine: LLMEngine) -> None:
        add_decodes(engine, num_steps + 4)
        while engine.has_unfinished_requests:
            engine.step()

    config = EngineConfig(model=model, async_scheduling=is_async, max_num_seqs=NUM_SEQS, max_model_len=1_024)
    return traced(config, run)[3:-1]


def medians(runs: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        name: {key: round(median([run[key] for run in found]), 4) for key in found[0]} for name, found in runs.items()
    }


def measure_decode(model: str, config: BenchConfig) -> dict[str, Any]:
    """The gap between two steps and the tokens per second."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in MODES}
    for _ in range(config.repeats):
        for name, is_async in MODES.items():
            steps = decode_steps(model, is_async, config.num_steps)
            seconds = forward(steps[-1])[1] - forward(steps[0])[0]
            runs[name].append(summary(steps) | {"tokens_per_s": NUM_SEQS * len(steps) / seconds})
    return medians(runs)


def measure_outside(model: str, is_async: bool, num_steps: int) -> dict[str, float]:
    """A step of NUM_SEQS decodes, and how much of it the model takes: the measurement of part 4's bench."""
    engine = LLMEngine(EngineConfig(model=model, async_scheduling=is_async, max_num_seqs=NUM_SEQS, max_model_len=1_024))
    add_decodes(engine, num_steps + 8)
    inside: list[float] = []

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            started = time.perf_counter()
            result = call(*args)
            inside.append(time.perf_counter() - started)
            return result

        return run

    decoder: Any = engine.executor.worker.model
    decoder.forward, decoder.compute_logits = timed(decoder.forward), timed(decoder.compute_logits)
    for _ in range(4):
        engine.step()
    inside.clear()
    total = []
    for _ in range(num_steps):
        started = time.perf_counter()
        engine.step()
        total.append(time.perf_counter() - started)
    forwards = [a + b for a, b in zip(inside[::2], inside[1::2], strict=False)]
    step_ms, model_ms = 1e3 * median(total), 1e3 * median(forwards)
    return {"step_ms": round(step_ms, 2), "model_ms": round(model_ms, 2), "outside_ms": round(step_ms - model_ms, 2)}


def measure_waste(config: BenchConfig) -> dict[str, float]:
    """Answers that end with a stop token: steps, and tokens computed."""
    lengths = [request.max_tokens for request in heavy_tailed(64)]
    found: dict[str, float] = {}
    for name, is_async in MODES.items():
        engine = LLMEngine(EngineConfig(model=config.small_model, async_scheduling=is_async, max_num_seqs=NUM_SEQS))
        scripted = EndsByItself(lengths)
        engine.executor = scripted  # type: ignore[assignment]
        for number in range(len(lengths)):
            params = SamplingParams(temperature=0, max_tokens=1_000, stop_token_ids=(EndsByItself.END,))
            engine.add_request(str(number), [number + 100], params)
        while engine.has_unfinished_requests:
            engine.step()
        found[f"{name}_steps"], found[f"{name}_computed"] = engine.num_steps, scripted.num_tokens_computed
    found["num_requests"], found["num_tokens"] = len(lengths), sum(lengths)
    return found


class EndsByItself(ScriptedExecutor):
    """Ends the request with the prompt [100 + i] after lengths[i] tokens, with a stop token."""

    END = 9

    def __init__(self, lengths: list[int]) -> None:
        super().__init__()
        self.lengths, self.num_tokens_computed = lengths, 0
        self.lengths_of_rows: dict[int, int] = {}

    def launch(self, step: StepInput) -> StepHandle:
        self.lengths_of_rows |= {new.row: self.lengths[new.token_ids[0] - 100] for new in step.new_requests}
        self.num_tokens_computed += sum(request.num_scheduled_tokens for request in step.requests)
        num_sampled = [request.num_computed_tokens + request.num_scheduled_tokens for request in step.requests]
        ends = [num >= self.lengths_of_rows[r.row] for num, r in zip(num_sampled, step.requests, strict=True)]
        tokens = torch.tensor([self.END if ends_now else 7 for ends_now in ends])
        return self.stream.launch(lambda: SamplerOutput(tokens, None), without_logprobs)


def measure_http(config: BenchConfig) -> dict[str, dict[str, float]]:
    """Streams over HTTP, with the API and the core in separate processes: output tokens/s, and the time per token."""
    requests: list[WorkloadRequest] = heavy_tailed(64, sigma=0.0, median_output_tokens=64)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in MODES}
    for _ in range(config.repeats):
        for name, is_async in MODES.items():
            flag = "--async-scheduling" if is_async else "--no-async-scheduling"
            with server_process(PROG, "--model", config.small_model, flag) as url:
                load = LoadConfig(url, model=config.small_model, max_concurrency=NUM_SEQS)
                asyncio.run(run_load(load, requests[:NUM_SEQS]))  # warm-up
                report = asyncio.run(run_load(load, requests))
            assert not report.num_failed and report.tpot_s is not None, f"{report.num_failed} requests failed"
            runs[name].append({"tokens_per_s": report.output_tokens_per_s, "tpot_ms": 1e3 * report.tpot_s.p50})
    return medians(runs)


@contextlib.contextmanager
def one_core_taken() -> Iterator[None]:
    """Keep one core busy with another process while the block runs, for BUSY_LIMIT_S at most."""
    code = f"import time; end = time.monotonic() + {BUSY_LIMIT_S}\nwhile time.monotonic() < end: pass"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def measure_busy(config: BenchConfig) -> dict[str, dict[str, float]]:
    """Streams over HTTP, output tokens/s: without other load, and next to a process that keeps one core busy."""
    requests = heavy_tailed(NUM_STREAMS, sigma=0.0, median_output_tokens=STREAM_TOKENS)
    clean = {name: value for name, value in os.environ.items() if name not in SPIN_VARIABLES}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in THREADING}
    for _ in range(config.repeats):
        for name, (variables, flags) in THREADING.items():
            with server_process(PROG, "--model", config.small_model, *flags, env=clean | variables) as url:
                load = LoadConfig(url, model=config.small_model, max_concurrency=NUM_STREAMS)
                asyncio.run(run_load(load, requests))  # warm-up
                quiet = asyncio.run(run_load(load, requests))
                with one_core_taken():
                    busy = asyncio.run(run_load(load, requests))
            assert not quiet.num_failed + busy.num_failed, f"{quiet.num_failed + busy.num_failed} requests failed"
            runs[name].append({"quiet": quiet.output_tokens_per_s, "core_taken": busy.output_tokens_per_s})
    return medians(runs)


def plot_timeline(steps: dict[str, list[StepTrace]], path: Path, num_shown: int = 6) -> None:
    """What the device and the engine did, below each other, for some scripted steps from the middle."""
    labels = [(title, "milliseconds", "") for title in ("Synchronous", "Asynchronous")]
    fig, panels = plotting.panels(labels, height_px=260)
    longest = steps["sync"][len(steps["sync"]) // 2 :][:num_shown]
    span_ms = 1e3 * (forward(longest[-1])[1] - forward(longest[0])[0])  # on both sides, so that they can be compared
    for axes, (name, found) in zip(panels, steps.items(), strict=True):
        shown = found[len(found) // 2 :][: 2 * num_shown]
        zero_s = forward(shown[0])[0]
        for level, color, intervals in (
            (1, COLORS[name], [forward(step) for step in shown]),
            (0, plotting.COLORS[1], [interval for step in shown for interval in host(step)]),
        ):
            bars = [(1e3 * (start - zero_s), 1e3 * (end - start)) for start, end in intervals]
            axes.broken_barh(bars, (level - 0.35, 0.7), color=color, edgecolor="white", linewidth=0.6)
        axes.set_yticks([0, 1], ["engine", "model"])
        axes.set_xlim(0, span_ms)
        axes.grid(axis="y", visible=False)
    plotting.save(fig, path)


def plot(m: dict[str, Any], path: Path) -> None:
    fig, (left, right) = plotting.panels(
        [("10 ms model, 4 ms engine", "", "seconds for 100 steps"), ("Real models", "", "output tokens/s, sync = 1")]
    )
    bars = left.bar(range(2), [m["scripted"][name] for name in MODES], 0.6, color=list(COLORS.values()))
    plotting.label_bars(left, bars, "{:.2f}")
    left.set_xticks(range(2), list(MODES))
    left.margins(y=0.15)
    pairs = {**{f"{model}\nengine": found for model, found in m["decode"].items()}, "tiny\nover HTTP": m["http"]}
    ratios = [found["async"]["tokens_per_s"] / found["sync"]["tokens_per_s"] for found in pairs.values()]
    for name, offset, values in (("sync", -0.2, [1.0] * len(ratios)), ("async", 0.2, ratios)):
        bars = right.bar([x + offset for x in range(len(ratios))], values, 0.36, color=COLORS[name], label=name)
        if name == "async":  # every sync bar is 1
            plotting.label_bars(right, bars, "{:.2f}×")
    right.set_xticks(range(len(ratios)), [name.replace("random:", "") for name in pairs])
    right.set_ylim(0, 1.4 * max(1.0, *ratios))
    right.legend(loc="upper left", ncols=2)
    plotting.save(fig, path)


def report(console: Console, m: dict[str, Any]) -> None:
    scripted = m["scripted"]
    console.print(
        f"{NUM_SCRIPTED_STEPS} scripted steps: sync {scripted['sync']:.2f} s, async {scripted['async']:.2f} s",
        highlight=False,
    )
    table = Table("model", "loop", "model, ms", "gap, ms", "gap's share", "engine's work, ms", "tokens/s")
    for model, found in m["decode"].items():
        for name, run in found.items():
            table.add_row(
                model, name, f"{run['forward_ms']:.2f}", f"{run['gap_ms']:.3f}", f"{100 * run['gap_share']:.2f}%",
                f"{run['host_ms']:.2f}", f"{run['tokens_per_s']:,.0f}",
            )  # fmt: skip
    console.print(table)
    for name, run in m["http"].items():
        console.print(
            f"over HTTP, {name}: {run['tokens_per_s']:,.0f} tokens/s, TPOT {run['tpot_ms']:.1f} ms", highlight=False
        )
    table = Table(f"{NUM_STREAMS} streams over HTTP", "tokens/s", "tokens/s, one core taken")
    for name, run in m["busy"].items():
        table.add_row(name, f"{run['quiet']:,.0f}", f"{run['core_taken']:,.0f}")
    console.print(table)
    waste, outside = m["waste"], m["outside"]
    console.print(
        f"{waste['num_requests']} answers that end with a stop token: {waste['sync_computed']} tokens computed "
        f"synchronously in {waste['sync_steps']} steps, {waste['async_computed']} asynchronously in "
        f"{waste['async_steps']} steps",
        highlight=False,
    )
    for model, run in outside.items():
        console.print(
            f"{model}, {NUM_SEQS} decodes, sync: {run['step_ms']:.1f} ms per step, {run['outside_ms']:.2f} ms of it "
            "outside the model",
            highlight=False,
        )


def run(config: BenchConfig) -> None:
    results, models = Path(config.results_dir), (config.small_model, config.large_model)
    scripted, steps = measure_scripted(config)
    measurements: dict[str, Any] = {
        "scripted": scripted,
        "decode": {model: measure_decode(model, config) for model in models},
        "outside": {model: measure_outside(model, False, config.num_steps) for model in models},
        "waste": measure_waste(config),
        "http": measure_http(config),
        "busy": measure_busy(config),
    }
    report(Console(), measurements)
    settings = {key: value for key, value in asdict(config).items() if key != "results_dir"}
    write_result(
        results / "part05.json",
        benchmark="part05",
        config=settings | {"max_num_seqs": NUM_SEQS},
        seed=0,
        repeats=config.repeats,
        measurements=measurements,
    )
    plot(measurements, results / "part05.png")
    plot_timeline(steps, results / "part05_timeline.png")


def main() -> None:
    prog = f"{PROG}.bench"
    config = parse_config(BenchConfig, "The engine with and without async scheduling.", prog)
    exit_on_error(prog, lambda: run(config))


if __name__ == "__main__":
    main()
