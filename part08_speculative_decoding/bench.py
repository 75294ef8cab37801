"""python -m part08_speculative_decoding.bench: the speedup by task and batch size, and where speculation is slower.

Writes results/part08.json and results/part08.png. Everything runs in one process, in turns.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console
from rich.table import Table

from common import plotting
from common.checkpoint import load_tokenizer, resolve_checkpoint
from common.cli import check_minimums, exit_on_error, option, parse_config
from common.prompts import encode_prompt
from common.results import median, write_result
from common.sampling_params import SamplingParams

from .config import EngineConfig
from .lab.deep_target import write_deep_model
from .llm import LLM
from .messages import EngineCoreOutput

METHODS = ("none", "ngram", "draft_model")
LABELS = {"none": "no speculation", "ngram": "n-gram lookup", "draft_model": "draft model"}
COLORS = dict(zip(METHODS, (plotting.BASELINE_COLOR, plotting.COLORS[1], plotting.COLORS[0]), strict=True))
QUESTIONS = (
    "What is a KV cache?", "What is preemption?", "What is paged attention?", "What is continuous batching?",
    "What is static batching?", "What is a block table?", "What is chunked prefill?", "What is prefix caching?",
)  # fmt: skip
BEGINNINGS = (
    "Once upon a time", "One fine day", "The fox", "Nora and", "On a cold morning", "In a small village",
    "There once was a bear", "Every evening",
)  # fmt: skip
WORDS = ("apple", "river", "stone", "lantern", "bridge", "garden", "mirror", "market")
BATCH_SIZES = (1, 4, 16)


@dataclass(frozen=True, slots=True)
class BenchConfig:
    model: str = option("tiny", "the small target; extra layers that change nothing make it the large target")
    draft_model: str = option("tiny-draft", "the draft model")
    num_layers: int = option(48, "layers of the large target")
    num_speculative_tokens: int = option(4, "maximum number of draft tokens per request and step")
    max_tokens: int = option(48, "maximum tokens per answer", 8)
    repeats: int = option(3, "runs of each method, in turns; medians are reported", 1)
    results_dir: str = option("results", "folder for the JSON and the plots")

    def __post_init__(self) -> None:
        check_minimums(self)


def tasks(model: str) -> dict[str, list[list[int]]]:
    """Prompts by task: trained questions, stories, rows of words to repeat."""
    checkpoint = resolve_checkpoint(model)
    tokenizer, rng = load_tokenizer(checkpoint), random.Random(0)

    def encode(body: dict[str, Any]) -> list[int]:
        return encode_prompt(body, tokenizer, checkpoint.max_model_len)

    rows = [" ".join(rng.sample(WORDS, len(WORDS)) * 2) for _ in range(8)]
    return {
        "answers": [encode({"messages": [{"role": "user", "content": question}]}) for question in QUESTIONS],
        "stories": [encode({"prompt": beginning}) for beginning in BEGINNINGS],
        "copying": [encode({"messages": [{"role": "user", "content": f"Repeat these words: {row}"}]}) for row in rows],
    }


def make_llms(config: BenchConfig, model: str, max_num_seqs: int) -> dict[str, LLM]:
    """An engine for each method. Speculation stays on for up to max_num_seqs requests, so that its cost shows."""
    return {
        method: LLM(
            EngineConfig(
                model=model,
                max_num_seqs=max_num_seqs,
                max_model_len=512,
                speculative_method=method,  # type: ignore[arg-type]
                speculative_model=config.draft_model,
                num_speculative_tokens=config.num_speculative_tokens,
                speculative_max_num_seqs=max_num_seqs,
            )
        )
        for method in METHODS
    }


def run_once(
    llm: LLM, prompts: list[list[int]], batch_size: int, max_tokens: int, temperature: float
) -> dict[str, Any]:
    """Serve prompts in batches: tokens per second, tokens of one request per step, and the tokens themselves."""
    params = SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=0)
    steps, step, num_outputs = llm.engine.num_steps, llm.engine.step, 0

    def counted_step() -> list[EngineCoreOutput]:
        nonlocal num_outputs
        outputs = step()
        num_outputs += sum(bool(output.token_ids) for output in outputs)
        return outputs

    started, answers = time.perf_counter(), []
    with mock.patch.object(llm.engine, "step", counted_step):
        for first in range(0, len(prompts), batch_size):
            answers += llm.generate(prompts[first : first + batch_size], params)
    seconds = time.perf_counter() - started
    token_ids = [result.outputs[0].token_ids for result in answers]
    num_tokens = sum(map(len, token_ids))
    return {
        "tokens_per_s": num_tokens / seconds,
        "steps": llm.engine.num_steps - steps,
        "tokens_per_step": num_tokens / num_outputs,
        "token_ids": token_ids,
    }


def compare(
    config: BenchConfig, model: str, prompts: list[list[int]], batch_size: int, temperature: float = 0.0
) -> dict[str, dict[str, float]]:
    """All methods in turns. Their answers must be the same."""
    llms = make_llms(config, model, max(batch_size, 1))
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    for llm in llms.values():  # warm-up
        run_once(llm, prompts[:batch_size], batch_size, 8, temperature)
    for _ in range(config.repeats):
        for method, llm in llms.items():
            runs[method].append(run_once(llm, prompts, batch_size, config.max_tokens, temperature))
    assert all(run["token_ids"] == runs["none"][0]["token_ids"] for each in runs.values() for run in each), (
        "speculation changed an answer"
    )
    keys = ("tokens_per_s", "steps", "tokens_per_step")
    return {
        method: {key: round(median([run[key] for run in each]), 3) for key in keys} for method, each in runs.items()
    }


def measure_all(config: BenchConfig, large: str) -> dict[str, Any]:
    by_task = tasks(config.model)
    mixed = [prompt for group in zip(*by_task.values(), strict=True) for prompt in group][:16]
    return {
        "tasks": {task: compare(config, large, prompts[:4], 1) for task, prompts in by_task.items()},
        "sampled": compare(config, large, by_task["stories"][:4], 1, temperature=0.8),
        "batches": {str(size): compare(config, large, mixed, size) for size in BATCH_SIZES},
        "small target": compare(config, config.model, mixed, 1),
    }


def speedups(found: dict[str, dict[str, float]]) -> Iterator[tuple[str, float]]:
    for method in METHODS[1:]:
        yield method, found[method]["tokens_per_s"] / found["none"]["tokens_per_s"]


def plot(m: dict[str, Any], path: Path) -> None:
    fig, (left, right) = plotting.panels(
        [
            ("Large target, one request", "", "speedup of output tokens/s\nover no speculation"),
            ("Large target, a mix of the three", "requests at once", ""),
        ]
    )
    for number, method in enumerate(METHODS[1:]):
        values = [dict(speedups(found))[method] for found in m["tasks"].values()]
        xs = [x + 0.4 * number for x in range(len(values))]
        bars = left.bar(xs, values, 0.36, color=COLORS[method], label=LABELS[method])
        plotting.label_bars(left, bars, "{:.1f}×")
        values = [dict(speedups(found))[method] for found in m["batches"].values()]
        right.plot(range(len(values)), values, marker="o", color=COLORS[method], label=LABELS[method])
    left.set_xticks([x + 0.2 for x in range(len(m["tasks"]))], list(m["tasks"]))
    left.margins(y=0.45)  # the legend is above the bars
    right.sharey(left)  # after the bars, whose margin it takes over
    right.set_xticks(range(len(m["batches"])), list(m["batches"]))
    for axes in (left, right):
        axes.axhline(1, color=plotting.BASELINE_COLOR, linewidth=1.2)
    left.legend(loc="upper left")
    right.legend(loc="upper right")
    plotting.save(fig, path)


def report(console: Console, m: dict[str, Any]) -> None:
    table = Table("workload", "method", "tokens per step", "steps", "tokens/s", "speedup")
    rows = {
        **{f"{task}, one request": found for task, found in m["tasks"].items()},
        "stories, temperature 0.8": m["sampled"],
        **{f"mix, {size} at once": found for size, found in m["batches"].items()},
        "mix, small target": m["small target"],
    }
    for name, found in rows.items():
        for method, run in found.items():
            ratio = run["tokens_per_s"] / found["none"]["tokens_per_s"]
            numbers = f"{run['tokens_per_step']:.2f}", f"{run['steps']:,.0f}", f"{run['tokens_per_s']:,.0f}"
            table.add_row(name, LABELS[method], *numbers, f"{ratio:.2f}×")
    console.print(table)


def run(config: BenchConfig) -> None:
    results = Path(config.results_dir)
    with tempfile.TemporaryDirectory() as folder:
        write_deep_model(config.model, config.num_layers, Path(folder))
        measurements = measure_all(config, folder)
    report(Console(), measurements)
    settings = {key: value for key, value in asdict(config).items() if key != "results_dir"}
    write_result(
        results / "part08.json",
        benchmark="part08",
        config=settings,
        seed=0,
        repeats=config.repeats,
        measurements=measurements,
    )
    plot(measurements, results / "part08.png")


def main() -> None:
    prog = "part08_speculative_decoding.bench"
    config = parse_config(BenchConfig, "The speedup by task and by batch size, and where speculation is slower.", prog)
    exit_on_error(prog, lambda: run(config))


if __name__ == "__main__":
    main()
