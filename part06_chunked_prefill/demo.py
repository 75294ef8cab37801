"""python -m part06_chunked_prefill.demo: the token budget of a step, and how a long prompt affects other requests."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from common.cli import exit_on_error, option, parse_config
from common.sampling_params import SamplingParams

from .config import EngineConfig
from .core.engine import LLMEngine
from .lab.timeline import traced

NUM_DECODES, NUM_BEFORE = 4, 12  # running requests, and how many tokens they have when the long prompt arrives
LONG_PROMPT = 1_900
BUDGET = 1_024  # of show_budget
WIDTH = 56  # columns of the longest bar


@dataclass(frozen=True, slots=True)
class DemoConfig:
    model: str = option("tiny", "a shipped model, a directory, a Hugging Face id or random:<preset>")


@dataclass(slots=True)
class Run:
    """itl_ms: the time between two tokens of a running request. ttft_ms: from the long prompt's arrival to its first
    token."""

    itl_ms: list[float] = field(default_factory=list)
    ttft_ms: float = 0.0
    token_ids: list[int] = field(default_factory=list)


def show_budget(console: Console, model: str) -> None:
    console.rule("1. One token budget per step")
    console.print(
        f"Three prompts of 800 tokens, at most {BUDGET:,} tokens in a step. How many tokens each request computes:\n",
        highlight=False,
    )

    def run(engine: LLMEngine) -> None:
        for number in range(3):
            prompt = [100 + (number + position) % 900 for position in range(800)]
            engine.add_request("ABC"[number], prompt, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
        while engine.has_unfinished_requests:
            engine.step()

    for threshold in (0, 400):
        config = EngineConfig(model=model, max_num_batched_tokens=BUDGET, long_prefill_token_threshold=threshold)
        steps = traced(config, run)[:4]
        table = Table("request", *(f"step {step.step}" for step in steps))
        for name in "ABC":
            found = [[request.num_scheduled for request in step.requests if request.id == name] for step in steps]
            table.add_row(name, *(str(count[0]) if count else "·" for count in found))
        limit = f"{threshold} tokens" if threshold else "none (a prompt takes the rest of the budget)"
        console.print(f"Limit for the chunks of one prompt: {limit}", highlight=False)
        console.print(table)


def answer_beside_a_prompt(config: EngineConfig) -> Run:
    """A long prompt arrives while four requests decode."""
    engine, run = LLMEngine(config), Run()
    for number in range(NUM_DECODES):
        params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
        engine.add_request(str(number), [100 + number] * 8, params)
    arrived_s = 0.0
    last_s = time.perf_counter()
    while engine.has_unfinished_requests:
        outputs, now_s = engine.step(), time.perf_counter()
        for output in outputs:
            if output.request_id == "0":
                run.itl_ms.append(1e3 * (now_s - last_s))
                last_s = now_s
            if output.request_id == "long":
                run.ttft_ms = run.ttft_ms or 1e3 * (now_s - arrived_s)
                run.token_ids += output.token_ids
        if len(run.itl_ms) == NUM_BEFORE and not arrived_s:
            arrived_s = now_s
            prompt = [100 + position % 900 for position in range(LONG_PROMPT)]
            engine.add_request("long", prompt, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    return run


def show_waits(console: Console, model: str) -> None:
    console.rule("2. A long prompt arrives")
    console.print(
        f"{NUM_DECODES} requests decode, then a prompt of {LONG_PROMPT:,} tokens arrives. Each bar is the time between "
        "two tokens of one of the four (ITL, inter-token latency).\n",
        highlight=False,
    )
    runs = {
        "Whole prompts": answer_beside_a_prompt(
            EngineConfig(model=model, enable_chunked_prefill=False, max_num_batched_tokens=2_048)
        ),
        "Chunks, a budget of 256 tokens": answer_beside_a_prompt(EngineConfig(model=model, max_num_batched_tokens=256)),
    }
    longest = max(max(run.itl_ms[1:]) for run in runs.values())
    for name, run in runs.items():
        console.print(
            f"[bold]{name}[/]: largest ITL {max(run.itl_ms[1:]):.0f} ms, long prompt's TTFT {run.ttft_ms:.0f} ms",
            highlight=False,
            soft_wrap=True,
        )
        for itl_ms in run.itl_ms[NUM_BEFORE - 2 : NUM_BEFORE + 10]:
            console.print(f"{itl_ms:6.1f} ms {'█' * max(1, round(WIDTH * itl_ms / longest))}", highlight=False)
        console.print()
    answers = [run.token_ids for run in runs.values()]
    same = "the same" if answers[0] == answers[1] else "NOT the same: that is a bug"
    console.print(f"The two answers to the long prompt are {same}.", highlight=False)


def run(model: str) -> None:
    console = Console()
    console.print(f"\n[bold]Part 6: chunked prefill.[/] Model {model}.\n", highlight=False)
    show_budget(console, model)
    show_waits(console, model)


def main() -> None:
    prog = "part06_chunked_prefill.demo"
    config = parse_config(DemoConfig, "The token budget of a step, and how a long prompt affects other requests.", prog)
    exit_on_error(prog, lambda: run(config.model))


if __name__ == "__main__":
    main()
