"""Softmax over rows in Triton: fused if a row fits in a program's registers, else online."""

from __future__ import annotations

import torch
from torch import Tensor

from ...triton_attention import _jit, triton

if triton is not None:
    import triton.language as tl

MAX_FUSED_SIZE = 32_768  # numbers of a row that a program keeps in registers
ONLINE_TILE_SIZE = 8_192  # of a longer row, numbers that a program reads at once
NUMBERS_PER_WARP = 1_024  # 32 for each thread


def softmax(rows: Tensor) -> Tensor:
    """exp(x) / sum(exp(x)) for each row, in float32, rounded once.

    A row of up to MAX_FUSED_SIZE numbers is read once and written once. A longer row is read twice, with the online
    softmax (Milakov and Gimelshein, 2018).

    rows: [num_rows, size], contiguous, float32, float16 or bfloat16. Returns the same shape and dtype. A row of -inf
    alone becomes zeros; NaN or +inf anywhere makes its whole row NaN, as in torch. Raises RuntimeError if Triton is
    not installed.
    """
    if triton is None:
        raise RuntimeError("softmax needs the package triton, which is not installed (Linux: pip install triton)")
    assert rows.is_contiguous(), f"rows must be contiguous, got strides of {rows.stride()}"
    num_rows, size = rows.shape
    output = torch.empty_like(rows)
    is_fused = size <= MAX_FUSED_SIZE
    kernel = _fused_softmax_kernel if is_fused else _online_softmax_kernel
    tile_size = triton.next_power_of_2(size) if is_fused else ONLINE_TILE_SIZE
    with torch.cuda.device_of(rows):  # Triton launches on the current device
        kernel[(num_rows,)](rows, output, size, TILE_SIZE=tile_size, num_warps=count_warps(tile_size))
    return output


def count_warps(num_numbers: int) -> int:
    """How many warps share this many numbers, a power of two: at most a block's 32."""
    return min(32, max(1, num_numbers // NUMBERS_PER_WARP))


@_jit
def _fused_softmax_kernel(rows_ptr, output_ptr, size, TILE_SIZE: tl.constexpr):
    """One program per row. The numbers stay in registers from the load to the store."""
    row = tl.program_id(0).to(tl.int64)  # in int32, row · size overflows from 2³¹ elements on
    column = tl.arange(0, TILE_SIZE)
    is_column = column < size
    numbers = tl.load(rows_ptr + row * size + column, mask=is_column, other=float("-inf")).to(tl.float32)
    weights = tl.exp(numbers - finite(tl.max(numbers, axis=0)))
    result = weights / at_least_one(tl.sum(weights, axis=0))
    tl.store(output_ptr + row * size + column, result.to(output_ptr.dtype.element_ty), mask=is_column)


@_jit
def _online_softmax_kernel(rows_ptr, output_ptr, size, TILE_SIZE: tl.constexpr):
    """One program per row: maximum and sum in a first loop, the results in a second one.

    Each lane of the tile has its own maximum and sum in the first loop. They are merged once, after it.
    """
    row = tl.program_id(0).to(tl.int64)
    rows_ptr += row * size
    output_ptr += row * size
    lane = tl.arange(0, TILE_SIZE)
    maximum = tl.full([TILE_SIZE], float("-inf"), tl.float32)
    total = tl.zeros([TILE_SIZE], tl.float32)
    for start in range(0, size, TILE_SIZE):
        column = start + lane
        numbers = tl.load(rows_ptr + column, mask=column < size, other=float("-inf")).to(tl.float32)
        new_maximum = tl.maximum(maximum, numbers)
        total = total * tl.exp(maximum - finite(new_maximum)) + tl.exp(numbers - finite(new_maximum))
        maximum = new_maximum
    row_maximum = finite(tl.max(maximum, axis=0))
    row_total = at_least_one(tl.sum(total * tl.exp(maximum - row_maximum), axis=0))

    for start in range(0, size, TILE_SIZE):
        column = start + lane
        numbers = tl.load(rows_ptr + column, mask=column < size, other=float("-inf")).to(tl.float32)
        result = tl.exp(numbers - row_maximum) / row_total
        tl.store(output_ptr + column, result.to(output_ptr.dtype.element_ty), mask=column < size)


@_jit
def finite(maximum):
    """The maximum, or 0 instead of -inf: -inf - -inf would be NaN, and exp(-inf - 0) is the 0 that we want."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@_jit
def at_least_one(total):
    """The sum of exp(x - maximum), at least 1 for the maximum itself, or 1 instead of the 0 of a row of -inf. NaN stays
    NaN."""
    return tl.where(total == 0.0, 1.0, total)
