"""python -m part02_streaming.bench: the latency of answers, and of /health while answers are generated.

Writes results/part02.json and results/part02.png. Both servers run in separate processes. Run it from the repository's
root: part 1's server is the baseline.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from common import plotting
from common.cli import check_minimums, exit_on_error, option, parse_config
from common.load_client import SseParser
from common.results import median, write_result
from common.sampling_params import SamplingParams
from common.serve import server_process
from common.stats import percentile

from .config import EngineConfig
from .engine import LLM

PROMPT = "Once upon a time there was"
ANSWER_TOKENS = (1, 16, 64, 256)
LOAD_TOKENS = 256  # length of the answers that are generated while /health is polled
HEALTH_INTERVAL_S = 0.02


@dataclass(frozen=True, slots=True)
class BenchConfig:
    model: str = option("tiny", "a shipped model, a directory, a Hugging Face id or random:<preset>")
    repeats: int = option(7, "answers of each length; medians are reported", 1)
    health_answers: int = option(8, "answers generated while /health is polled every 20 ms", 1)
    results_dir: str = option("results", "folder for part02.json and part02.png")

    def __post_init__(self) -> None:
        check_minimums(self)


def body(num_tokens: int, **more: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, **more}


async def time_stream(client: httpx.AsyncClient, num_tokens: int) -> tuple[float, float, int]:
    """TTFT and E2E latency of a streamed answer in seconds, and its bytes."""
    parser, first_s, num_bytes = SseParser(), 0.0, 0
    started = time.perf_counter()
    async with client.stream("POST", "/v1/completions", json=body(num_tokens, stream=True)) as response:
        response.raise_for_status()
        async for chunk in response.aiter_bytes():
            num_bytes += len(chunk)
            if parser.feed(chunk) and not first_s:
                first_s = time.perf_counter() - started
    return first_s, time.perf_counter() - started, num_bytes


async def time_whole(client: httpx.AsyncClient, path: str, num_tokens: int) -> tuple[float, int]:
    """Seconds and bytes of an answer that is not streamed."""
    started = time.perf_counter()
    response = await client.post(path, json=body(num_tokens))
    response.raise_for_status()
    return time.perf_counter() - started, len(response.content)


async def measure_answers(url: str, repeats: int) -> list[dict[str, Any]]:
    """For each answer length: TTFT and E2E latency with streaming, and the latency without it."""
    rows = []
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        await time_stream(client, 32)  # warm-up
        for num_tokens in ANSWER_TOKENS:
            streamed, whole = [], []
            for _ in range(repeats if num_tokens > 1 else 5 * repeats):
                streamed.append(await time_stream(client, num_tokens))
                whole.append(await time_whole(client, "/v1/completions", num_tokens))
            rows.append(
                {
                    "output_tokens": num_tokens,
                    "ttft_ms": round(1e3 * median([first for first, _, _ in streamed]), 2),
                    "streamed_ms": round(1e3 * median([end for _, end, _ in streamed]), 2),
                    "whole_ms": round(1e3 * median([end for end, _ in whole]), 2),
                    "streamed_bytes": streamed[0][2],
                    "whole_bytes": whole[0][1],
                }
            )
    return rows


async def answers_in_turn(client: httpx.AsyncClient, path: str, num_answers: int) -> None:
    for _ in range(num_answers):
        await time_whole(client, path, LOAD_TOKENS)


async def streams_at_once(client: httpx.AsyncClient, num_streams: int = 200, at_once: int = 8) -> None:
    """Short streams, eight at a time; the client closes every third one early."""
    slots = asyncio.Semaphore(at_once)

    async def read(number: int) -> None:
        async with slots, client.stream("POST", "/v1/completions", json=body(24, stream=True)) as response:
            num_lines = 0
            async for _ in response.aiter_lines():
                num_lines += 1
                if number % 3 == 0 and num_lines == 10:
                    return

    await asyncio.gather(*map(read, range(num_streams)))


async def measure_health(url: str, make_load: Callable[[httpx.AsyncClient], Coroutine[Any, Any, None]]) -> list[float]:
    """Latency of /health in milliseconds, polled every 20 ms until the load is done.

    Like a monitor, it sends each request on time, whether or not the previous one has been answered.
    """
    waits_ms: list[float] = []
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:

        async def ask() -> None:
            asked = time.perf_counter()
            (await client.get("/health")).raise_for_status()
            waits_ms.append(1e3 * (time.perf_counter() - asked))

        load, questions = asyncio.ensure_future(make_load(client)), []
        while not load.done():
            questions.append(asyncio.ensure_future(ask()))
            await asyncio.sleep(HEALTH_INTERVAL_S)
        await load
        await asyncio.gather(*questions)
    return waits_ms


def time_engine(model: str, repeats: int) -> float:
    """Milliseconds for an answer of LOAD_TOKENS tokens without a server."""
    llm = LLM(EngineConfig(model=model))
    prompt = llm.tokenizer.encode(PROMPT)
    params, seconds = SamplingParams(max_tokens=LOAD_TOKENS, temperature=0, ignore_eos=True), []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        llm.generate(prompt, params)
        seconds.append(time.perf_counter() - started)
    return 1e3 * median(seconds[1:])


def summary(waits_ms: list[float]) -> dict[str, float]:
    return {
        "questions": len(waits_ms),
        "p50_ms": round(percentile(waits_ms, 50), 2),
        "p99_ms": round(percentile(waits_ms, 99), 2),
        "max_ms": round(max(waits_ms), 2),
    }


def measure(config: BenchConfig) -> dict[str, Any]:
    flags, num_answers = ("--model", config.model), config.health_answers
    with server_process("part01_simple_server", *flags) as url:
        waits = {"part 1": asyncio.run(measure_health(url, lambda c: answers_in_turn(c, "/generate", num_answers)))}
    with server_process("part02_streaming", *flags) as url:
        waits["part 2"] = asyncio.run(measure_health(url, lambda c: answers_in_turn(c, "/v1/completions", num_answers)))
        waits["part 2, eight streams"] = asyncio.run(measure_health(url, streams_at_once))
        answers = asyncio.run(measure_answers(url, config.repeats))
    health = {name: {**summary(ms), "sorted_ms": [round(wait, 2) for wait in sorted(ms)]} for name, ms in waits.items()}
    return {
        "answers": answers,
        "health": health,
        "engine_alone_ms": round(time_engine(config.model, config.repeats), 2),
    }


def plot(m: dict[str, Any], model: str, path: Path) -> None:
    fig, (left, right) = plotting.panels(
        [
            (f"Latency of an answer, {model}", "tokens in the answer", "milliseconds"),
            ("Latency of /health meanwhile", "percentile of the requests", "milliseconds"),
        ]
    )
    tokens = [row["output_tokens"] for row in m["answers"]]
    for key, color, label in (
        ("whole_ms", plotting.BASELINE_COLOR, "not streamed"),
        ("ttft_ms", plotting.COLORS[0], "TTFT"),
    ):
        (line,) = left.plot(tokens, [row[key] for row in m["answers"]], color=color, marker="o")
        plotting.label_line(left, line, label)
    left.set_xlim(0, 1.45 * max(tokens))
    for part, color in (("part 1", plotting.BASELINE_COLOR), ("part 2", plotting.COLORS[0])):
        waits = m["health"][part]["sorted_ms"]
        (line,) = right.plot([100 * (i + 1) / len(waits) for i in range(len(waits))], waits, color=color)
        plotting.label_line(right, line, part)
    right.set(yscale="log", xlim=(0, 125), xticks=range(0, 101, 25))
    right.yaxis.set_major_formatter("{x:g}")  # 100, not 10²
    left.set_ylim(bottom=-0.04 * m["answers"][-1]["whole_ms"])
    plotting.save(fig, path)


def report(console: Console, m: dict[str, Any]) -> None:
    table = Table("tokens", "TTFT, ms", "streamed, ms", "not streamed, ms", "bytes streamed", "not streamed")
    for row in m["answers"]:
        table.add_row(
            f"{row['output_tokens']}", f"{row['ttft_ms']:.1f}", f"{row['streamed_ms']:.1f}", f"{row['whole_ms']:.1f}",
            f"{row['streamed_bytes']:,}", f"{row['whole_bytes']:,}",
        )  # fmt: skip
    console.print(table)
    table = Table("/health while answers are generated", "p50, ms", "p99, ms", "max, ms")
    for name, h in m["health"].items():
        table.add_row(name, f"{h['p50_ms']:.1f}", f"{h['p99_ms']:.1f}", f"{h['max_ms']:.1f}")
    console.print(table)
    last = m["answers"][-1]
    console.print(
        f"{LOAD_TOKENS} tokens: {m['engine_alone_ms']:.0f} ms in the engine, {last['whole_ms']:.0f} ms over HTTP, "
        f"{last['streamed_ms']:.0f} ms streamed: streaming costs "
        f"{100 * (last['streamed_ms'] / last['whole_ms'] - 1):.0f}% of the throughput.\n"
        f"No gain for one-token answers: TTFT {m['answers'][0]['ttft_ms']:.1f} ms streamed, "
        f"full answer {m['answers'][0]['whole_ms']:.1f} ms not streamed.",
        highlight=False,
    )


def run(config: BenchConfig) -> None:
    measurements = measure(config)
    report(Console(), measurements)
    settings = {key: value for key, value in asdict(config).items() if key != "results_dir"}
    results = Path(config.results_dir)
    write_result(
        results / "part02.json",
        benchmark="part02",
        config=settings | {"prompt": PROMPT, "load_tokens": LOAD_TOKENS, "health_interval_s": HEALTH_INTERVAL_S},
        seed=0,
        repeats=config.repeats,
        measurements=measurements,
    )
    plot(measurements, config.model, results / "part02.png")


def main() -> None:
    prog = "part02_streaming.bench"
    config = parse_config(BenchConfig, "The latency of answers, and of /health while answers are generated.", prog)
    exit_on_error(prog, lambda: run(config))


if __name__ == "__main__":
    main()
