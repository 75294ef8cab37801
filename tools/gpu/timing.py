"""Measure seconds per call on a device, and its memory bandwidth."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from common.results import median


def seconds_per_call(call: Callable[[], object], device: str, calls: int = 20, rounds: int = 5) -> float:
    """The median over rounds of the seconds per call, from `calls` calls launched one after the other.

    On a GPU it is measured between two events: if a call takes longer than its launch, the launch does not count.
    """
    for _ in range(3):
        call()
    return median([_round_seconds(call, device, calls) / calls for _ in range(rounds)])


def _round_seconds(call: Callable[[], object], device: str, calls: int) -> float:
    if device == "cpu":
        started = time.perf_counter()
        for _ in range(calls):
            call()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def copy_bandwidth_gb_s(device: str) -> float:
    """GB/s of a large copy inside the device's memory, reads and writes together: the most a kernel can reach."""
    num_bytes = 2**24 if device == "cpu" else 2**32
    gb_s = 2 * num_bytes / _copy_seconds(num_bytes, device) / 1e9
    if device != "cpu":
        torch.cuda.empty_cache()  # release the memory to later allocations
    return gb_s


def _copy_seconds(num_bytes: int, device: str) -> float:
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return seconds_per_call(lambda: target.copy_(source), device, calls=5)
