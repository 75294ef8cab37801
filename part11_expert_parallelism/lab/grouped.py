"""Grouped products on the CPU: the kernel for few rows, and one matrix product for each group."""

from __future__ import annotations

import time
from itertools import accumulate

import torch
from torch import Tensor

from common.results import median

from ..worker.cpu_grouped_linear import small_groups

SHAPES = {"tiny-moe": (8, 512, 256), "moe-small": (16, 1_024, 512), "128 experts": (128, 512, 256)}
COUNTS = (1, 2, 4, 8, 16)


def by_products(rows: Tensor, weight: Tensor, starts: list[int]) -> Tensor:
    output = rows.new_empty(len(rows), weight.shape[1])
    for group, (start, end) in enumerate(zip(starts, starts[1:], strict=False)):
        if end > start:
            torch.mm(rows[start:end], weight[group].T, out=output[start:end])
    return output


def by_kernel(rows: Tensor, weight: Tensor, starts: list[int]) -> Tensor:
    output = rows.new_empty(len(rows), weight.shape[1])
    small_groups(rows, weight, starts, output, max_rows=len(rows))
    return output


@torch.inference_mode()
def measure_grouped(repeats: int) -> dict[str, dict[str, float]]:
    """shape and rows per group → milliseconds of both, on one thread. In all groups as many rows."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    found: dict[str, dict[str, float]] = {}
    for name, shape in SHAPES.items():
        weight = torch.randn(*shape)
        for count in COUNTS:
            rows = torch.randn(count * shape[0], shape[2])
            starts = list(accumulate([count] * shape[0], initial=0))
            times: dict[str, list[float]] = {"kernel": [], "products": []}
            for _ in range(10 * repeats):
                for kind, call in (("kernel", by_kernel), ("products", by_products)):
                    started = time.perf_counter()
                    call(rows, weight, starts)
                    times[kind].append(1e3 * (time.perf_counter() - started))
            found[f"{name}, {count} rows each"] = {kind: round(median(each), 4) for kind, each in times.items()}
    torch.set_num_threads(before)
    return found
