"""python -m part15_full_architecture.demo: a burst of mixed requests through the official openai client, on the full
engine and on part 1's server. With --trace: one request, stage by stage."""

from __future__ import annotations

from common.threads import limit_spinning

if __name__ == "__main__":  # before the imports below load torch
    limit_spinning()

import asyncio
import importlib.util
import re
import textwrap
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from common.cli import exit_on_error, option, parse_config
from common.errors import FieldError
from common.serve import server_process
from common.stats import percentile
from common.workloads import QUESTIONS

from .lab.lifecycle import show_lifecycle

PROG = "part15_full_architecture.demo"
PART, BASELINE = PROG.partition(".")[0], "part01_simple_server"
FLAGS = {  # nothing that changes answers: part 1 must give the same
    "speculative_method": "ngram", "kv_offload_gib": "0.1", "max_num_batched_tokens": "256", "max_num_seqs": "32",
}  # fmt: skip
WORDS = "apple river stone lantern bridge garden mirror market"
STORY = "One fine day, Nora went to the market and bought a basket of apples. She met a fox on the way home. " * 12
RULES = "You answer questions about LLM inference in one sentence. " * 16
SHOWN_METRICS = {
    "prefix_cache_hits": "prompt tokens found in the prefix cache",
    "spec_decode_num_accepted_tokens": "draft tokens accepted",
    "kv_offload_saved_tokens": "tokens whose KV was copied to host memory",
}


@dataclass(frozen=True, slots=True)
class DemoConfig:
    model: str = option("tiny", "a shipped model, a directory, a Hugging Face id or random:<preset>")
    trace: bool = option(False, "show one request from HTTP to the forward pass and back, and nothing else")


@dataclass(frozen=True, slots=True)
class Ask:
    """A request of the burst. kind: as the progress shows it."""

    kind: str
    messages: list[dict[str, str]]
    max_tokens: int = 48


@dataclass(frozen=True, slots=True)
class Reply:
    """ttft_s: from the burst's beginning, as end_s."""

    text: str
    num_tokens: int
    ttft_s: float
    end_s: float


def burst() -> list[Ask]:
    """Short questions, questions with a long common beginning, long prompts, and copying."""
    found = [Ask("questions", [user(question)]) for question in QUESTIONS[:8]]
    found += [Ask("with a long prefix", [{"role": "system", "content": RULES}, user(q)]) for q in QUESTIONS[8:14]]
    found += [Ask("long prompts", [user(f"{STORY * number} What is a block table?")], 16) for number in (1, 2, 3)]
    found += [Ask("copying", [user(f"Repeat these words: {WORDS} {WORDS}")], 64) for _ in range(3)]
    return found


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


async def ask_openai(url: str, model: str, asks: Sequence[Ask], progress: Progress) -> list[Reply]:
    """All at once, streamed, with the official client."""
    from openai import AsyncOpenAI  # here: the rest of the course does not need it

    kinds = list(dict.fromkeys(ask.kind for ask in asks))
    tasks = {kind: progress.add_task(kind, total=sum(ask.kind == kind for ask in asks)) for kind in kinds}
    tokens = progress.add_task("output tokens", total=None)
    start_s = time.perf_counter()

    async def ask_one(client: AsyncOpenAI, ask: Ask) -> Reply:
        stream = await client.chat.completions.create(
            model=model, messages=ask.messages, max_tokens=ask.max_tokens, temperature=0, stream=True,  # type: ignore
            stream_options={"include_usage": True, "continuous_usage_stats": True},  # type: ignore[typeddict-unknown-key]
        )  # fmt: skip
        text, num_tokens, ttft_s = "", 0, 0.0
        async for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                ttft_s = ttft_s or time.perf_counter() - start_s
                text += chunk.choices[0].delta.content
            if chunk.usage is not None:
                progress.advance(tokens, chunk.usage.completion_tokens - num_tokens)
                num_tokens = chunk.usage.completion_tokens
        progress.advance(tasks[ask.kind])
        return Reply(text, num_tokens, ttft_s, time.perf_counter() - start_s)

    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=600) as client:
        return await asyncio.gather(*(ask_one(client, ask) for ask in asks))


def ask_part_1(url: str, asks: Sequence[Ask]) -> list[Reply]:
    """All at once; part 1 answers one after the other, and each answer only when it is complete."""
    start_s = time.perf_counter()

    def ask_one(ask: Ask) -> Reply:
        body = {"messages": ask.messages, "max_tokens": ask.max_tokens, "temperature": 0}
        answer = httpx.post(f"{url}/generate", json=body, timeout=600, trust_env=False)
        answer.raise_for_status()
        end_s = time.perf_counter() - start_s
        return Reply(answer.json()["text"], len(answer.json()["token_ids"]), end_s, end_s)

    with ThreadPoolExecutor(len(asks)) as threads:
        return list(threads.map(ask_one, asks))


def progress_bars(console: Console) -> Progress:
    columns = (TextColumn("{task.description:>20}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def show_answers(console: Console, asks: Sequence[Ask], replies: Sequence[Reply]) -> None:
    shown = set[str]()
    for ask, reply in zip(asks, replies, strict=True):
        if ask.kind not in shown:
            shown.add(ask.kind)
            console.print(f"[bold]{ask.kind}[/]: … {ask.messages[-1]['content'][-60:]}", highlight=False)
            text = textwrap.fill(" ".join(reply.text.split()), 78, initial_indent="  ", subsequent_indent="  ")
            console.print(text, highlight=False, markup=False)


def rows(name: str, replies: Sequence[Reply]) -> Iterator[str]:
    seconds, num_tokens = max(reply.end_s for reply in replies), sum(reply.num_tokens for reply in replies)
    ttfts = [reply.ttft_s for reply in replies]
    yield from (name, f"{seconds:.1f}", f"{num_tokens / seconds:,.0f}")
    yield from (f"{1e3 * percentile(ttfts, 50):,.0f}", f"{1e3 * max(ttfts):,.0f}")


def show_metrics(console: Console, url: str) -> None:
    text = httpx.get(f"{url}/metrics", trust_env=False, timeout=60).text
    for name, meaning in SHOWN_METRICS.items():
        found = re.search(rf"^engine:{name}_total (\S+)$", text, re.MULTILINE)
        console.print(f"{float(found[1]):8,.0f} {meaning}" if found else f"no {name}", highlight=False)


def compare(console: Console, model: str) -> None:
    asks = burst()
    table = Table("", "seconds", "output tokens/s", "TTFT p50 (ms)", "TTFT max (ms)")
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in FLAGS.items()]
    console.rule(f"{len(asks)} requests at once, through the openai client")
    with server_process(PART, "--model", model, "--no-log-stats", *flags) as url:
        with progress_bars(console) as progress:
            replies = asyncio.run(ask_openai(url, model, asks, progress))
        show_answers(console, asks, replies)
        table.add_row(*rows("part 15", replies))
        console.rule("What the techniques did")
        show_metrics(console, url)
    console.rule("The same burst on part 1's server")
    if importlib.util.find_spec(BASELINE) is None:
        console.print(f"{BASELINE} is not here: no comparison.", highlight=False)
    else:
        with server_process(BASELINE, "--model", model) as url:
            before = ask_part_1(url, asks)
        table.add_row(*rows("part 1", before))
        num_equal = sum(a.text == b.text for a, b in zip(replies, before, strict=True))
        console.print(f"{num_equal} of {len(asks)} answers are the same.", highlight=False)
    console.print(table)


def run(config: DemoConfig) -> None:
    console = Console(width=80)
    console.print(f"Part 15: the full architecture. Model {config.model}.\n", highlight=False)
    if config.trace:
        show_lifecycle(console, config.model)
        return
    if importlib.util.find_spec("openai") is None:
        raise FieldError("demo", "needs the openai client: pip install openai")
    compare(console, config.model)


def main() -> None:
    exit_on_error(PROG, lambda: run(parse_config(DemoConfig, __doc__ or "", prog=PROG)))


if __name__ == "__main__":
    main()
