"""What tools/comparison.py runs in an engine's process, made up: it loads neither torch nor an engine."""

from __future__ import annotations

import os

from common.workloads import nano_vllm_cpu

_loaded: list[str] = []


def num_tokens(num_requests: int) -> int:
    return sum(request.max_tokens for request in nano_vllm_cpu(num_requests))


def load(name: str, model: str) -> None:
    _loaded.append(f"{name} of {model}")


def seconds(num_requests: int) -> float:
    """So few that a token takes 1 / (this process's id), if it has loaded one engine only."""
    assert len(_loaded) == 1, f"one process has loaded {_loaded}"
    return num_tokens(num_requests) / os.getpid()
