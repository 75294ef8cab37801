"""python -m part05_async_scheduling.demo: the gap between two steps, what an early end costs, and a killed core."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from common.cli import exit_on_error, option, parse_config
from common.prompts import encode_prompt
from common.sampling_params import SamplingParams
from common.serving import GenerationError

from .api.async_engine import AsyncLLM
from .config import EngineConfig
from .core.engine import LLMEngine
from .lab.timeline import Interval, forward, host, summary, traced
from .llm import LLM

NUM_REQUESTS, NUM_TOKENS = 16, 40
WIDTH = 72  # columns of the timeline
NUM_SHOWN = 5  # steps of it
NUM_CHARS_BEFORE_THE_END = 60
QUESTIONS = (
    "What is continuous batching?",
    "What is preemption?",
    "What is static batching?",
    "What is paged attention?",
)


@dataclass(frozen=True, slots=True)
class DemoConfig:
    model: str = option("tiny", "a shipped model, a directory, a Hugging Face id or random:<preset>")


def decode(engine: LLMEngine) -> None:
    for number in range(NUM_REQUESTS):
        params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
        engine.add_request(str(number), [100 + number] * 8, params)
    while engine.has_unfinished_requests:
        engine.step()


def draw_line(intervals: list[Interval], start_s: float, end_s: float, mark: str) -> str:
    """One character for each slice of time: mark where any of the intervals covers the middle of it."""
    middles = [start_s + (column + 0.5) * (end_s - start_s) / WIDTH for column in range(WIDTH)]
    return "".join(mark if any(a <= middle < b for a, b in intervals) else "·" for middle in middles)


def show_timelines(console: Console, model: str) -> None:
    console.rule("1. The gap between two steps")
    console.print(f"{NUM_REQUESTS} requests; {NUM_SHOWN} steps from the middle of the run.\n", highlight=False)
    for is_async in (False, True):
        config = EngineConfig(model=model, async_scheduling=is_async, max_model_len=1_024)
        steps = traced(config, decode)[1:]
        shown = steps[len(steps) // 2 :][:NUM_SHOWN]
        start_s, end_s = forward(shown[0])[0], forward(shown[-1])[1]
        found = summary(steps)
        console.print(
            f"[bold]{'Asynchronous' if is_async else 'Synchronous'}[/]: forward pass "
            f"{found['forward_ms']:.1f} ms, then a gap of {found['gap_ms']:.2f} ms ({100 * found['gap_share']:.0f}%)",
            highlight=False,
        )
        around = [interval for step in steps for interval in host(step)]
        console.print(f"engine  {draw_line(around, start_s, end_s, '▒')}", highlight=False)
        console.print(f"model   {draw_line([forward(step) for step in shown], start_s, end_s, '█')}\n", highlight=False)


def show_price(console: Console, model: str) -> None:
    console.rule("2. What an early end costs")
    texts = []
    for is_async in (False, True):
        llm = LLM(EngineConfig(model=model, async_scheduling=is_async))
        prompts = [
            encode_prompt({"messages": [{"role": "user", "content": question}]}, llm.tokenizer, llm.max_model_len)
            for question in QUESTIONS
        ]
        outputs = [result.outputs[0] for result in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=100))]
        texts.append([output.text for output in outputs])
        # The last token of an answer is never an input.
        num_needed = sum(map(len, prompts)) + sum(len(output.token_ids) - 1 for output in outputs)
        num_computed = llm.engine.executor.worker.runner.num_tokens_computed
        console.print(
            f"{'Asynchronous' if is_async else 'Synchronous'}: {llm.engine.num_steps} steps, {num_computed} tokens "
            f"computed, {num_computed - num_needed} of them wasted.",
            highlight=False,
        )
    same = "the same" if texts[0] == texts[1] else "NOT the same: that is a bug"
    console.print(f"The {len(QUESTIONS)} answers of the two modes are {same}:\n", highlight=False)
    table = Table(show_header=False)
    for question, text in zip(QUESTIONS, texts[1], strict=True):
        table.add_row(f"[bold cyan]{question}[/]", text)
    console.print(table)


async def show_death(console: Console, model: str) -> None:
    console.rule("3. Two processes")
    engine = await asyncio.to_thread(AsyncLLM, EngineConfig(model=model))
    engine.start()
    try:
        core = engine.core.process.pid
        assert core is not None, "the core was started"
        console.print(f"The API is process {os.getpid()}, the engine core process {core}.", highlight=False)
        prompt = encode_prompt({"prompt": "Once upon a time"}, engine.tokenizer, engine.max_model_len)
        text = ""
        async for output in engine.generate(prompt, SamplingParams(temperature=0, max_tokens=1_000, ignore_eos=True)):
            text += output.text
            if len(text) > NUM_CHARS_BEFORE_THE_END and engine.core.process.is_alive():
                os.kill(core, signal.SIGKILL)
    except GenerationError as error:
        console.print(f"Streamed so far: [green]{text}[/]…")
        console.print(f"Then the core was killed. The stream ended with the error: [red]{error}[/].", highlight=False)
    finally:
        await asyncio.to_thread(engine.shutdown)


def run(model: str) -> None:
    console = Console()
    console.print(f"\n[bold]Part 5: async scheduling.[/] Model {model}.\n", highlight=False)
    show_timelines(console, model)
    show_price(console, model)
    asyncio.run(show_death(console, model))


def main() -> None:
    prog = "part05_async_scheduling.demo"
    config = parse_config(DemoConfig, "The gap between two steps, what an early end costs, and a killed core.", prog)
    exit_on_error(prog, lambda: run(config.model))


if __name__ == "__main__":
    main()
