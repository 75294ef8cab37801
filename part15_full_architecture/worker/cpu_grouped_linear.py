"""Grouped products of few rows on the CPU, in a Numba kernel: each weight is read once, in one call for all groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np
from torch import Tensor

MAX_KERNEL_ROWS = 8  # of a group; a matrix product is faster for more
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz", "arcp"}}


def small_groups(
    rows: Tensor, weight: Tensor, starts: Sequence[int], output: Tensor, max_rows: int = MAX_KERNEL_ROWS
) -> None:
    """The products of the groups that have up to max_rows rows; the others are left alone.

    rows: [n, in_features]; weight: [num_groups, out_features, in_features]; output: [n, out_features]: all float32.
    starts: [num_groups + 1], where each group's rows begin.
    """
    _small_groups_kernel(rows.numpy(), weight.numpy(), np.array(starts), output.numpy(), max_rows)


def _jit_cached(kernel: Callable[..., None]) -> Any:
    """Compile at the first call, and keep the result on disk: in __pycache__ or in the user's cache directory."""
    try:
        return numba.njit(cache=True, **OPTIONS)(kernel)
    except RuntimeError:  # neither directory can be written: compile again in each process
        return numba.njit(**OPTIONS)(kernel)


@_jit_cached
def _small_groups_kernel(rows, weight, starts, output, max_rows):
    for group in range(len(weight)):
        start, end = starts[group], starts[group + 1]
        if end - start <= max_rows:
            for column in range(weight.shape[1]):
                for row in range(start, end):
                    total = np.float32(0)
                    for index in range(rows.shape[1]):
                        total += rows[row, index] * weight[group, column, index]
                    output[row, column] = total
