"""python -m part02_streaming.demo: a streamed answer, a responsive server, and a client that disconnects."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from common.cli import exit_on_error, option, parse_config
from common.serve import running_app

from .config import EngineConfig
from .detokenizer import IncrementalDetokenizer
from .engine import LLM
from .server import create_app

QUESTION = "What is continuous batching?"
LONG = {"prompt": "Once upon a time there was", "max_tokens": 400, "ignore_eos": True, "temperature": 0}


@dataclass(frozen=True, slots=True)
class DemoConfig:
    model: str = option("tiny", "a shipped model, a directory, a Hugging Face id or random:<preset>")


async def read_stream(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> AsyncIterator[str]:
    """The pieces of text of a streamed answer."""
    async with client.stream("POST", path, json={**body, "stream": True}, timeout=60) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                choice = json.loads(line.removeprefix("data: "))["choices"][0]
                yield choice["delta"].get("content", "") if "delta" in choice else choice["text"]


async def show_stream(console: Console, client: httpx.AsyncClient) -> None:
    console.rule("1. A streamed answer")
    body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
    console.print(f"[bold cyan]Q[/] {QUESTION}", highlight=False)
    console.print("[bold green]A[/] ", end="")
    started, first_s, num_pieces = time.perf_counter(), 0.0, 0
    async for text in read_stream(client, "/v1/chat/completions", body):
        if text:
            first_s = first_s or time.perf_counter() - started
            num_pieces += 1
            console.print(text, end="", highlight=False, soft_wrap=True)
            await asyncio.sleep(0.02)  # slow enough to watch; the server does not wait for us
    console.print(
        f"\nTTFT {1e3 * first_s:.0f} ms, {num_pieces} pieces of text. "
        "(This demo slows them down so that you can watch.)\n",
        highlight=False,
    )


async def show_health(console: Console, client: httpx.AsyncClient) -> None:
    console.rule("2. A server that stays responsive")
    started = time.perf_counter()
    answer = asyncio.ensure_future(client.post("/v1/completions", json=LONG, timeout=60))
    waits_ms: list[float] = []
    while not answer.done():
        asked = time.perf_counter()
        (await client.get("/health")).raise_for_status()
        waits_ms.append(1e3 * (time.perf_counter() - asked))
        await asyncio.sleep(0.02)
    console.print(
        f"While {LONG['max_tokens']} tokens were generated ({time.perf_counter() - started:.1f} s), /health was called "
        f"{len(waits_ms)} times and took at most {max(waits_ms):.0f} ms.\n"
        "Part 1 would have answered the first call after the last token.\n",
        highlight=False,
    )


def show_held_back(console: Console, llm: LLM) -> None:
    console.rule("3. The text that is shown, token by token")
    text, stop = "Foxes 🦊 say: good night, Nora.", (" night, Bo", " Nora.")
    console.print(f"The text {text!r} with the stop strings {stop[0]!r} and {stop[1]!r}:", highlight=False)
    detokenizer = IncrementalDetokenizer(llm.tokenizer, stop)
    table = Table("token", "text shown", "why text is held back")
    for token_id in llm.tokenizer.encode(text, add_special_tokens=False):
        num_before = len(detokenizer.text)
        found = detokenizer.add(token_id)
        shown = detokenizer.take(finished=found is not None)
        why = ""
        if found:
            why = f"the stop string {found!r} is complete: the answer ends before it"
        elif len(detokenizer.text) == num_before:
            why = "half a character"
        elif held := detokenizer.num_held_back():
            why = f"{detokenizer.text[-held:]!r} may be the beginning of a stop string"
        piece = llm.tokenizer.decode([token_id])
        table.add_row(repr(piece) if "\ufffd" not in piece else "part of 🦊", repr(shown) if shown else "", why)
        if found:
            break
    console.print(table, "")


async def show_disconnect(console: Console, client: httpx.AsyncClient, llm: LLM, app: Any) -> None:
    console.rule("4. A client that disconnects")
    before, num_read = llm.num_positions_computed, 0
    async for text in read_stream(client, "/v1/completions", LONG):
        num_read += bool(text)
        if num_read == 10:
            break
    num_aborted = app.state.engine.num_aborted
    while app.state.engine.running is not None:
        await asyncio.sleep(0.01)
    num_prompt_tokens = len(llm.tokenizer.encode(LONG["prompt"]))
    num_tokens = llm.num_positions_computed - before - num_prompt_tokens + 1
    console.print(
        f"The client asked for {LONG['max_tokens']} tokens and closed the connection after 10 pieces of text. "
        f"The engine computed {num_tokens} tokens and is idle.",
        highlight=False,
    )
    assert app.state.engine.num_aborted >= num_aborted


async def run_all(console: Console, url: str, llm: LLM, app: Any) -> None:
    async with httpx.AsyncClient(base_url=url) as client:
        await client.post("/v1/completions", json={**LONG, "max_tokens": 8}, timeout=60)  # warm-up
        await show_stream(console, client)
        await show_health(console, client)
        show_held_back(console, llm)
        await show_disconnect(console, client, llm, app)


def run(model: str) -> None:
    console = Console()
    llm = LLM(EngineConfig(model=model))
    app = create_app(llm)
    console.print(f"\n[bold]Part 2: streaming.[/] Model {model}, on {llm.device}.\n", highlight=False)
    with running_app(app) as url:
        asyncio.run(run_all(console, url, llm, app))


def main() -> None:
    prog = "part02_streaming.demo"
    config = parse_config(DemoConfig, "A streamed answer, a responsive server, and a client that disconnects.", prog)
    exit_on_error(prog, lambda: run(config.model))


if __name__ == "__main__":
    main()
