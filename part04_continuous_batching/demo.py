"""python -m part04_continuous_batching.demo: which request is in which row of the batch, static and continuous."""

from __future__ import annotations

import time
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.cli import exit_on_error, option, parse_config
from common.prompts import encode_prompt
from common.sampling_params import SamplingParams

from .config import EngineConfig
from .core.engine import LLMEngine
from .lab.static_batches import use_static_batches
from .llm import LLM

LENGTHS = (2, 2, 2, 20, 2, 2, 2, 20)
NUM_ROWS = 4
COLORS = ("red", "green", "yellow", "blue", "magenta", "cyan", "bright_red", "bright_blue")
QUESTIONS = (
    "What is continuous batching?",
    "What is preemption?",
    "What is static batching?",
    "What is head-of-line blocking?",
    "What is a token budget?",
    "What is paged attention?",
)


@dataclass(frozen=True, slots=True)
class DemoConfig:
    model: str = option("tiny", "a shipped model, a directory, a Hugging Face id or random:<preset>")


def fill_rows(engine: LLMEngine) -> list[list[int | None]]:
    """Run LENGTHS. Returns for each step which request is in each row; a request keeps its row until it ends."""
    for number, length in enumerate(LENGTHS):
        params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
        engine.add_request(str(number), [100 + number] * 8, params)
    rows: list[int | None] = [None] * NUM_ROWS
    history = []
    while engine.has_unfinished_requests:
        outputs = engine.step()
        for number in (int(output.request_id) for output in outputs):
            if number not in rows:
                rows[rows.index(None)] = number
        history.append(list(rows))
        for output in outputs:
            if output.finish_reason:
                rows[rows.index(int(output.request_id))] = None
    return history


def show_rows(console: Console, model: str) -> None:
    console.rule("1. Four rows, eight requests")
    console.print(
        f"Answers of {', '.join(map(str, LENGTHS))} tokens. Each column is a step, each digit a request, "
        "· an idle row.\n"
    )
    config = EngineConfig(model=model, max_num_seqs=NUM_ROWS, num_kv_blocks=64)
    for name, engine in (
        ("Static", use_static_batches(LLMEngine(config))),
        ("Continuous", LLMEngine(config)),
    ):
        history = fill_rows(engine)
        busy = sum(owner is not None for rows in history for owner in rows) / (len(history) * NUM_ROWS)
        console.print(f"[bold]{name}[/]: {engine.num_steps} steps, {100 * busy:.0f}% of the rows busy", highlight=False)
        for row in range(NUM_ROWS):
            line = Text(f"row {row} ")
            for rows in history:
                owner = rows[row]
                line.append("·" if owner is None else str(owner), style="dim" if owner is None else COLORS[owner])
            console.print(line)
        console.print()


def show_preemption(console: Console, model: str) -> None:
    console.rule("2. A pool that is too small")
    LLM(EngineConfig(model=model)).generate([[5] * 20], SamplingParams(max_tokens=2))  # the first one compiles kernels
    texts = []
    for num_kv_blocks in (256, 13):
        llm = LLM(EngineConfig(model=model, num_kv_blocks=num_kv_blocks))
        prompts = [
            encode_prompt({"messages": [{"role": "user", "content": question}]}, llm.tokenizer, llm.max_model_len)
            for question in QUESTIONS
        ]
        started = time.perf_counter()
        results = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=60))
        seconds = time.perf_counter() - started
        texts.append([result.outputs[0].text for result in results])
        engine = llm.engine
        console.print(
            f"{num_kv_blocks - 1} blocks: {engine.num_steps} steps, {engine.scheduler.num_preemptions} preemptions, "
            f"{engine.executor.worker.runner.num_tokens_computed} tokens computed, {seconds:.2f} s, "
            f"{engine.blocks.num_free_blocks} blocks free at the end.",
            highlight=False,
        )
    same = "the same" if texts[0] == texts[1] else "NOT the same: that is a bug"
    console.print(f"The answers are {same}:\n", highlight=False)
    table = Table(show_header=False)
    for question, text in zip(QUESTIONS, texts[1], strict=True):
        table.add_row(f"[bold cyan]{question}[/]", text)
    console.print(table)


def run(model: str) -> None:
    console = Console()
    console.print(f"\n[bold]Part 4: continuous batching.[/] Model {model}.\n", highlight=False)
    show_rows(console, model)
    show_preemption(console, model)


def main() -> None:
    prog = "part04_continuous_batching.demo"
    config = parse_config(DemoConfig, "Which request is in which row of the batch, static and continuous.", prog)
    exit_on_error(prog, lambda: run(config.model))


if __name__ == "__main__":
    main()
