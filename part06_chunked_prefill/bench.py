"""python -m part06_chunked_prefill.bench: ITL while long prompts arrive, whole and in chunks.

Writes results/part06.json and results/part06.png. Everything runs in one process, in turns.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from common import plotting
from common.cli import check_minimums, exit_on_error, option, parse_config
from common.results import median, write_result
from common.sampling_params import SamplingParams
from common.stats import percentile
from common.workloads import WorkloadRequest, heavy_tailed, long_prompts

from .config import EngineConfig
from .core.engine import LLMEngine
from .lab.timeline import summary, traced

NUM_SEQS = 32  # decodes, to measure the engine's own work in a step
WHOLE = "whole"


@dataclass(frozen=True, slots=True)
class BenchConfig:
    model: str = option("random:llama-110m", "a shipped model, a directory, a Hugging Face id or random:<preset>")
    small_model: str = option("tiny", "a model with short steps")
    num_decodes: int = option(8, "requests that decode throughout", 1)
    num_prompts: int = option(3, "long prompts, one after the other", 1)
    prompt_tokens: int = option(2_000, "tokens in each long prompt")
    recommended_budget: int = option(256, "the budget to compare with whole prompts")
    repeats: int = option(2, "runs of each, in turns; medians are reported", 1)
    results_dir: str = option("results", "folder for the JSON and the plots")

    def __post_init__(self) -> None:
        check_minimums(self)


BUDGETS = (64, 128, 256, 512, 1_024)


def engine_config(config: BenchConfig, model: str, budget: int | None) -> EngineConfig:
    """budget: tokens in a step; None: prompts stay whole."""
    return EngineConfig(
        model=model,
        max_num_seqs=NUM_SEQS,
        max_num_batched_tokens=budget,
        enable_chunked_prefill=budget is not None,
        max_model_len=config.prompt_tokens + 48,
    )


class Decodes:
    """Requests that decode throughout the run. itl_s: times between two tokens of one request (inter-token latency)."""

    def __init__(self, engine: LLMEngine, num_requests: int, max_tokens: int) -> None:
        self.engine, self.itl_s = engine, list[float]()
        self.last_s = {f"decode {number}": 0.0 for number in range(num_requests)}
        for number, name in enumerate(self.last_s):
            params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
            engine.add_request(name, [100 + number] * 16, params)
        self.step(num_steps=20)
        self.itl_s.clear()

    def step(self, num_steps: int = 1, until: str | None = None) -> None:
        """Run num_steps steps; with until, run until that request has received num_steps tokens."""
        while num_steps > 0:
            outputs, now_s = self.engine.step(), time.perf_counter()
            for output in outputs:
                if output.request_id in self.last_s:
                    self.itl_s.append(now_s - self.last_s[output.request_id])
                    self.last_s[output.request_id] = now_s
            if until is None or any(output.request_id == until for output in outputs):
                num_steps -= 1


def serve_both(config: BenchConfig, model: str, budget: int | None) -> dict[str, float]:
    """Long prompts arrive while other requests decode, each one twenty steps after the previous one got its token."""
    engine = LLMEngine(engine_config(config, model, budget))
    decodes = Decodes(engine, config.num_decodes, config.prompt_tokens)
    ttfts_s = []
    for prompt in prompts(config):
        arrived_s = time.perf_counter()
        engine.add_request(prompt.request_id, prompt.prompt_token_ids or [], SamplingParams(max_tokens=1, seed=0))
        decodes.step(until=prompt.request_id)
        ttfts_s.append(time.perf_counter() - arrived_s)
        decodes.step(num_steps=20)
    found = {
        "itl_p50_ms": 1e3 * percentile(decodes.itl_s, 50),
        "itl_p99_ms": 1e3 * percentile(decodes.itl_s, 99),
        "itl_max_ms": 1e3 * max(decodes.itl_s),
        "ttft_ms": 1e3 * median(ttfts_s),
    }
    engine.add_request("long", prompt.prompt_token_ids or [], SamplingParams(max_tokens=32, seed=0))
    decodes.step(until="long")
    decodes.itl_s.clear()
    decodes.step(num_steps=20)  # decodes beside a long context
    return found | {"itl_beside_ms": 1e3 * median(decodes.itl_s)}


def prompts(config: BenchConfig) -> list[WorkloadRequest]:
    length = config.prompt_tokens
    return long_prompts(config.num_prompts, min_prompt_tokens=length, max_prompt_tokens=length)


def prefill_alone(config: BenchConfig, model: str, budget: int | None) -> dict[str, float]:
    """The case where chunks can only lose: prompts with no decodes running beside them."""
    engine = LLMEngine(engine_config(config, model, budget))
    num_tokens = 0
    started = time.perf_counter()
    for request in prompts(config):
        assert request.prompt_token_ids is not None
        num_tokens += len(request.prompt_token_ids)
        engine.add_request(request.request_id, request.prompt_token_ids, SamplingParams(temperature=0, max_tokens=1))
    while engine.has_unfinished_requests:
        engine.step()
    return {"tokens_per_s": num_tokens / (time.perf_counter() - started)}


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(median([run[key] for run in runs]), 2) for key in runs[0]}


def compare(config: BenchConfig, model: str) -> dict[str, dict[str, float]]:
    """Whole prompts and every budget, alternating."""
    budgets: dict[str, int | None] = {WHOLE: None, **{str(budget): budget for budget in BUDGETS}}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in budgets}
    for _ in range(config.repeats):
        for name, budget in budgets.items():
            runs[name].append(serve_both(config, model, budget) | prefill_alone(config, model, budget))
    return {name: medians(found) for name, found in runs.items()}


def measure_host(config: BenchConfig) -> dict[str, float]:
    """The engine's own work in a step of NUM_SEQS decodes: schedule, prepare, update."""

    def run(engine: LLMEngine) -> None:
        for request in heavy_tailed(NUM_SEQS):
            assert request.prompt_token_ids is not None
            params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
            engine.add_request(request.request_id, request.prompt_token_ids[:32], params)
        while engine.has_unfinished_requests:
            engine.step()

    settings = EngineConfig(
        model=config.small_model, max_num_seqs=NUM_SEQS, async_scheduling=False, max_model_len=1_024
    )
    runs = [traced(settings, run) for _ in range(config.repeats)]
    return medians([summary([step for step in steps if len(step.requests) == NUM_SEQS][2:]) for steps in runs])


def plot(found: dict[str, dict[str, float]], model: str, path: Path) -> None:
    fig, (left, right) = plotting.panels(
        [
            (f"ITL of decodes, {model}", "token budget of a step", "milliseconds"),
            (f"TTFT of prompts, {model}", "token budget of a step", "seconds"),
        ]
    )
    names = [*map(str, BUDGETS), WHOLE]
    lowest, highest = found[WHOLE]["itl_p50_ms"], found[WHOLE]["itl_p99_ms"]
    for key, label, color in (("itl_p50_ms", "p50", plotting.COLORS[2]), ("itl_p99_ms", "p99", plotting.COLORS[0])):
        left.plot(range(len(names)), [found[name][key] for name in names], marker="o", label=label, color=color)
    left.set_yscale("log")
    left.set_yticks([mark for mark in (50, 100, 200, 500, 1_000, 2_000, 5_000) if lowest / 2 < mark < 2 * highest])
    left.yaxis.set_major_formatter("{x:,.0f}")
    left.minorticks_off()
    left.legend(loc="upper left")
    ttfts_s = [found[name]["ttft_ms"] / 1e3 for name in names]
    right.plot(range(len(names)), ttfts_s, marker="o", color=plotting.COLORS[1])
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.set_xticks(range(len(names)), names)
    plotting.save(fig, path)


def report(console: Console, m: dict[str, Any], config: BenchConfig) -> None:
    for model, found in m["budgets"].items():
        table = Table(
            "token budget",
            "ITL p50",
            "ITL p99",
            "ITL max",
            "ITL beside a long context",
            "TTFT of the prompt",
            "prompts alone",
            title=model,
        )
        columns = ("itl_p50_ms", "itl_p99_ms", "itl_max_ms", "itl_beside_ms", "ttft_ms")
        for name, run in found.items():
            table.add_row(
                name, *(f"{run[key]:,.0f} ms" for key in columns),
                f"{run['tokens_per_s']:,.0f} tokens/s",
            )  # fmt: skip
        console.print(table)
        ratio = found[WHOLE]["itl_p99_ms"] / found[str(config.recommended_budget)]["itl_p99_ms"]
        console.print(
            f"{model}: ITL p99 is {ratio:.1f} times lower with a budget of {config.recommended_budget}", highlight=False
        )
    console.print(
        f"{config.small_model}: the engine's own work for {NUM_SEQS} decodes is {m['host']['host_ms']:.2f} ms per step",
        highlight=False,
    )


def run(config: BenchConfig) -> None:
    results = Path(config.results_dir)
    measurements: dict[str, Any] = {
        "budgets": {model: compare(config, model) for model in (config.model, config.small_model)},
        "host": measure_host(config),
    }
    report(Console(), measurements, config)
    settings = {key: value for key, value in asdict(config).items() if key != "results_dir"}
    write_result(
        results / "part06.json",
        benchmark="part06",
        config=settings,
        seed=0,
        repeats=config.repeats,
        measurements=measurements,
    )
    plot(measurements["budgets"][config.model], config.model.removeprefix("random:"), results / "part06.png")


def main() -> None:
    prog = "part06_chunked_prefill.bench"
    config = parse_config(BenchConfig, "ITL while long prompts arrive, whole and in chunks.", prog)
    exit_on_error(prog, lambda: run(config))


if __name__ == "__main__":
    main()
