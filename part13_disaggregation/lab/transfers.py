"""How long a transfer takes, and how much of it happens while the prompt is still computed."""

from __future__ import annotations

import secrets
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from common.trace import StepTrace, read_trace

from .cluster import Layout, engines, kv_header
from .timeline import began

PAIR = Layout("1P1D", 1, 1)


def post(url: str, prompt: list[int], max_tokens: int, headers: dict[str, str]) -> None:
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=300, trust_env=False).raise_for_status()


def transfer(prefill: str, decode: str, secret: str, prompt: list[int], overlaps: bool) -> None:
    """Compute a prompt at one engine, and fetch it at the other: at the same time, or afterwards."""
    transfer_id = secrets.token_hex(8)
    asked = (prefill, prompt, 1, kv_header(transfer_id, None, secret))
    first = threading.Thread(target=post, args=asked)
    first.start()
    if not overlaps:
        first.join()
    post(decode, prompt, 1, kv_header(transfer_id, prefill, secret))
    first.join()


def measure(connector: str, model: str, prompts: list[list[int]], repeats: int) -> list[dict[str, float]]:
    """For each prompt, with and without overlap in turns: medians are the caller's. connector: shm or tcp.

    fetch_ms: from the order to the last byte. exposed_ms: from the end of the prompt's computation to the last byte.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = ("--model", model, "--kv-connector", connector, "--no-enable-prefix-caching")
        with engines(PAIR, *flags, trace_dir=folder) as ((prefill, decode), secret):
            orders = [(prompt, overlaps) for _ in range(repeats) for prompt in prompts for overlaps in (False, True)]
            for prompt, overlaps in [(prompts[0], True), *orders]:  # the first one is a warm-up
                transfer(prefill, decode, secret, prompt, overlaps)
        ends = list(prompt_ends_s(Path(folder) / "0"))
        fetches = list(fetches_s(Path(folder) / "1"))
    assert len(ends) == len(fetches) == len(orders) + 1, f"{len(ends)} prompts, {len(fetches)} fetches"
    rows = list[dict[str, float]]()
    for (prompt, overlaps), computed_s, fetched in zip(orders, ends[1:], fetches[1:], strict=True):
        num_bytes, start_s, fetched_s = fetched
        rows.append(
            {
                "num_tokens": len(prompt), "overlaps": overlaps, "num_bytes": num_bytes,
                "fetch_ms": 1e3 * (fetched_s - start_s), "exposed_ms": 1e3 * (fetched_s - max(start_s, computed_s)),
            }
        )  # fmt: skip
    return rows


def prompt_ends_s(path: Path) -> Iterator[float]:
    """When each prompt was computed (time.perf_counter)."""
    trace = read_trace(path)
    for step in trace.steps:
        if any(request.num_sampled for request in step.requests):
            yield began(trace) + end_s(step)


def end_s(step: StepTrace) -> float:
    return (step.forward_start_s or 0.0) + (step.forward_s or 0.0)


def fetches_s(path: Path) -> Iterator[tuple[int, float, float]]:
    """Bytes, start and end of each."""
    trace = read_trace(path)
    for step in trace.steps:
        for each in step.transfers:
            start_s = began(trace) + each.start_s
            yield each.num_bytes, start_s, start_s + each.duration_s
