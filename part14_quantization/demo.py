"""python -m part13_disaggregation.demo: one request's life, from the proxy through both engines, as one timeline."""

from __future__ import annotations

import tempfile
import threading
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.table import Table

from common.cli import exit_on_error, option, parse_config
from common.results import median

from .lab.cluster import Layout, cluster
from .lab.timeline import Bar, Life, engine_bars, live, new_prompt, stream, watch

PROG = "part13_disaggregation.demo"
TOGETHER = Layout("1, which does both", 0, 1, ("--num-threads", "2"))
PAIR = Layout("1 prefill, 1 decode", 1, 1)
ANSWER = {"max_tokens": 16, "temperature": 0, "ignore_eos": True}
WIDTH, NAME_WIDTH = 48, 10
NUM_WORDS = 1_200


@dataclass(frozen=True, slots=True)
class DemoConfig:
    model: str = option("tiny", "a shipped model, a directory, a Hugging Face id or random:<preset>")


def draw(bars: list[Bar], start_s: float, end_s: float) -> str:
    """A line of characters: where something was going on."""
    line = ["·"] * WIDTH
    for bar in bars:
        first = int(WIDTH * (bar.start_s - start_s) / (end_s - start_s))
        last = int(WIDTH * (bar.end_s - start_s) / (end_s - start_s))
        for place in range(max(0, first), min(WIDTH - 1, last) + 1):
            line[place] = "█" if line[place] == "·" else "▒"
    return "".join(line)


def show_life(console: Console, life: Life) -> None:
    rows: dict[str, list[Bar]] = {}
    for bar in life.bars:
        rows.setdefault(bar.row, []).append(bar)
    end_s = max(bar.end_s for bar in life.bars)
    for row, bars in rows.items():
        first, last = bars[0].start_s - life.sent_s, bars[-1].end_s - life.sent_s
        console.print(
            f"{row:>{NAME_WIDTH}} │{draw(bars, life.sent_s, end_s)}│ {1e3 * first:4.0f} to {1e3 * last:4.0f} ms",
            highlight=False,
        )
    for row, bars in rows.items():
        if row != "decode":
            console.print(f"{row}: {', then '.join(bar.what for bar in bars)}", highlight=False)
        else:
            console.print(f"decode: {bars[0].what}, then {len(bars) - 1} more steps", highlight=False)


def one_life(console: Console, model: str) -> None:
    console.rule("1. One request's life")
    body, bars = {**ANSWER, "prompt": new_prompt(NUM_WORDS)}, list[Bar]()
    with tempfile.TemporaryDirectory() as folder:
        with cluster(PAIR, "--model", model, trace_dir=folder) as engines:
            live(engines.url, {**body, "prompt": new_prompt(NUM_WORDS)})  # both sides are warm
            watch(engines.proxy, bars)
            life = live(engines.url, body)
            alone = live(engines.decode[0], body)
        steps = [engine_bars(Path(folder) / str(number), row, life) for number, row in enumerate(("prefill", "decode"))]
    life.bars = sorted(bars, key=lambda bar: bar.start_s) + steps[0]
    life.bars += [bar for bar in steps[1] if bar.row == "transfer"] + [bar for bar in steps[1] if bar.row == "decode"]
    show_life(console, life)
    console.print(
        f"TTFT {1e3 * (life.first_s - life.sent_s):.0f} ms. The decode engine alone gives the same answer: "
        f"{'yes' if life.text == alone.text else 'NO'}.\n",
        highlight=False,
    )


def pauses(console: Console, model: str) -> None:
    """What a stream notices of a long prompt."""
    console.rule("2. A long prompt comes while an answer is streamed")
    table = Table("engines", "threads of each", "typical pause", "longest pause")
    for layout in (TOGETHER, PAIR):
        with cluster(layout, "--model", model) as engines:
            live(engines.url, {**ANSWER, "prompt": new_prompt(NUM_WORDS)})  # all sides are warm
            gaps_ms = streamed_gaps_ms(engines.url)
        table.add_row(layout.name, layout.flags[-1], f"{median(gaps_ms):.0f} ms", f"{max(gaps_ms):.0f} ms")
    console.print(table)


def streamed_gaps_ms(url: str) -> list[float]:
    """The pauses between two pieces of an answer. After the tenth piece, a long prompt comes."""
    times, sent = list[float](), threading.Event()

    def ask_later() -> None:
        sent.wait()
        live(url, {**ANSWER, "prompt": new_prompt(NUM_WORDS)})

    other = threading.Thread(target=ask_later)
    other.start()
    for _ in stream(f"{url}/v1/completions", {**ANSWER, "prompt": "Hello", "max_tokens": 150}):
        times.append(time.perf_counter())
        if len(times) == 10:
            sent.set()
    other.join()
    return [1e3 * (end - start) for start, end in pairwise(times)]


def run(config: DemoConfig) -> None:
    console = Console(width=80)
    console.print(f"Part 13: disaggregated prefill and decode. Model {config.model}.\n", highlight=False)
    one_life(console, config.model)
    pauses(console, config.model)


def main() -> None:
    exit_on_error(PROG, lambda: run(parse_config(DemoConfig, __doc__ or "", prog=PROG)))


if __name__ == "__main__":
    main()
