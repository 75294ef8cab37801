"""One request's life, put together from the traces of two engines and from what the client and the proxy saw."""

from __future__ import annotations

import functools
import json
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from common.trace import Trace, read_trace

from ..disagg.proxy import Proxy


@dataclass(frozen=True, slots=True)
class Bar:
    """Something that took its time. row: where it happened. start_s, end_s: time.perf_counter, the same in all
    processes of this machine."""

    row: str
    what: str
    start_s: float
    end_s: float


@dataclass(slots=True)
class Life:
    """One request. text: its answer. bars: in the order of the rows."""

    text: str = ""
    sent_s: float = 0.0
    first_s: float = 0.0
    end_s: float = 0.0
    bars: list[Bar] = field(default_factory=list)


def watch(proxy: Proxy, bars: list[Bar]) -> None:
    """Note how long the proxy waits for each engine to accept the request: first the prefill engine, which ends
    begin_prefill(), then the decode engine, which ends send()."""
    for name, what in (("begin_prefill", "prefill engine accepts it"), ("send", "decode engine accepts it")):
        setattr(proxy, name, functools.partial(_timed, getattr(proxy, name), what, bars))


async def _timed(call: Any, what: str, bars: list[Bar], *args: Any, **kwargs: Any) -> Any:
    start_s = time.perf_counter()
    found = await call(*args, **kwargs)
    bars.append(Bar("proxy", what, bars[-1].end_s if bars else start_s, time.perf_counter()))
    return found


def stream(url: str, body: dict[str, Any]) -> Iterator[str]:
    """The pieces of an answer as they arrive."""
    with httpx.stream("POST", url, json={**body, "stream": True}, timeout=120, trust_env=False) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line[6:])["choices"][0]["text"]


def live(url: str, body: dict[str, Any]) -> Life:
    """Ask, and note when the answer begins and ends."""
    life = Life(sent_s=time.perf_counter())
    for piece in stream(f"{url}/v1/completions", body):
        life.first_s = life.first_s or time.perf_counter()
        life.text += piece
    life.end_s = time.perf_counter()
    return life


def engine_bars(path: Path, row: str, life: Life) -> list[Bar]:
    """The steps and the transfers of an engine while the request lived."""
    trace, bars = read_trace(path), list[Bar]()
    for step in trace.steps:
        start_s = began(trace) + (step.forward_start_s or 0.0)
        if life.sent_s <= start_s <= life.end_s and step.requests:
            tokens = sum(request.num_scheduled for request in step.requests)
            bars.append(Bar(row, f"{tokens} tokens", start_s, start_s + (step.forward_s or 0.0)))
        for each in step.transfers:
            start_s = began(trace) + each.start_s
            if life.sent_s <= start_s <= life.end_s:
                what = f"{each.num_tokens} tokens, {each.num_bytes / 2**20:.1f} MiB"
                bars.append(Bar("transfer", what, start_s, start_s + each.duration_s))
    return bars


def began(trace: Trace) -> float:
    return float(trace.header["began_s"])


def new_prompt(num_words: int) -> str:
    """One that no cache knows."""
    return f"{secrets.token_hex(4)}: " + "Once upon a time a shy fox lived beside a river. " * (num_words // 10)
