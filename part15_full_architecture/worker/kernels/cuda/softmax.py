"""Softmax of rows in CUDA C++: four rungs, each with less memory traffic than the one before."""

from __future__ import annotations

import torch
from torch import Tensor

from .library import Library


def softmax_naive(rows: Tensor) -> Tensor:
    """One thread per row, three reads. See launch_softmax for the arguments."""
    return launch_softmax("softmax_naive", rows)


def softmax_warp(rows: Tensor) -> Tensor:
    """One warp per row, three reads. See launch_softmax for the arguments."""
    return launch_softmax("softmax_warp", rows)


def softmax_fused(rows: Tensor) -> Tensor:
    """One block per row, which it keeps in shared memory: one read. See launch_softmax for the arguments.

    Raises KernelError if a row has more than 25,280 numbers.
    """
    return launch_softmax("softmax_fused", rows)


def softmax_online(rows: Tensor) -> Tensor:
    """One block per row of any length, two reads (Milakov and Gimelshein, 2018). See launch_softmax for the
    arguments."""
    return launch_softmax("softmax_online", rows)


def launch_softmax(name: str, rows: Tensor) -> Tensor:
    """The rung with this name. rows: [num_rows, size], float32, float16 or bfloat16, contiguous.

    Returns the same shape and dtype. A row that has only -inf becomes zeros; one with NaN or +inf becomes NaN.
    """
    assert rows.dim() == 2 and rows.shape[1] > 0, f"rows has shape {tuple(rows.shape)}: expected [num_rows, size]"
    assert rows.is_contiguous(), "rows must be contiguous"
    output = torch.empty_like(rows)
    Library(name).call(name, rows, output, rows.dtype, *rows.shape)
    return output
