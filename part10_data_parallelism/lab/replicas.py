"""What demo and bench ask the replicas themselves."""

from __future__ import annotations

import re
from collections.abc import Sequence

import httpx


def reset_caches(urls: Sequence[str]) -> None:
    """Empty the prefix caches. The replicas must be idle."""
    for url in urls:
        httpx.post(f"{url}/reset_prefix_cache", timeout=60, trust_env=False).raise_for_status()


def prompt_tokens(urls: Sequence[str]) -> tuple[float, float]:
    """Since the replicas' start, of all together: tokens of prompts, and how many of them they have computed."""
    queries = hits = 0.0
    for url in urls:
        values = _metrics(url)
        queries += values["prefix_cache_queries_total"]
        hits += values["prefix_cache_hits_total"]
    return queries, queries - hits


def num_running(url: str) -> float:
    """How many requests a replica computes now."""
    return _metrics(url)["num_requests_running"]


def _metrics(url: str) -> dict[str, float]:
    """Name → value, of those that have no labels."""
    text = httpx.get(f"{url}/metrics", timeout=60, trust_env=False).text
    return {name: float(value) for name, value in re.findall(r"^engine:(\w+) (\S+)$", text, re.MULTILINE)}
