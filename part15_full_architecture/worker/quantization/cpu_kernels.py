"""Products with matrices of codes on a CPU, in Numba: each code is read and decoded once, for up to a few rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import torch
from torch import Tensor

from .scheme import NF4_LEVELS

if TYPE_CHECKING:
    from .weight import QuantizedWeight

MAX_KERNEL_ROWS = 8  # for more, decoding to memory and a matrix product take less time
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz", "arcp"}}
INT8, INT4, FP8, NF4 = range(4)
LEVELS = np.array(NF4_LEVELS, np.float32)
FP8_SHIFT = np.float32(2.0**120)  # e4m3's exponents are stored plus 7, float32's plus 127


def small_products(
    rows: Tensor, weight: QuantizedWeight, starts: Sequence[int], output: Tensor, max_rows: int = MAX_KERNEL_ROWS
) -> None:
    """The products of each expert that has up to max_rows rows. Nothing is done for the others.

    rows: [n, columns], in the order of the matrix's columns; starts: [num_experts + 1], where each expert's rows begin;
    output: [n, rows of a matrix]: both float32.
    """
    if any(start < end <= start + max_rows for start, end in zip(starts, starts[1:], strict=False)):
        codes, scale, zero = as_experts(weight)
        _products_kernel(
            rows.numpy(), codes, scale, zero, LEVELS, kind(weight), weight.group_size, np.array(starts),
            output.numpy(), max_rows,
        )  # fmt: skip


def decode_rows(weight: QuantizedWeight, expert: int, start: int, stop: int) -> Tensor:
    """The numbers of some rows of an expert's matrix: [number of rows, columns], float32, in the order of the matrix's
    columns."""
    codes, scale, zero = as_experts(weight)
    tile = torch.empty(len(codes[expert, start:stop]), weight.shape[-1])
    _decode_kernel(
        codes[expert, start:stop], scale[expert, start:stop], zero[expert, start:stop], LEVELS, kind(weight),
        weight.group_size, tile.numpy(),
    )  # fmt: skip
    return tile


def warm_up() -> None:
    """Compile the kernels, which takes seconds, or load them from disk; for all shapes."""
    none, codes, scale = np.empty((0, 2), np.float32), np.empty((1, 0, 2), np.int8), np.empty((1, 0, 1), np.float32)
    zero = np.empty((1, 0, 1), np.int8)
    _products_kernel(none, codes, scale, zero, LEVELS, INT8, 2, np.zeros(2, np.int64), none, MAX_KERNEL_ROWS)
    _decode_kernel(codes[0], scale[0], zero[0], LEVELS, INT8, 2, none)


def kind(weight: QuantizedWeight) -> int:
    scheme = weight.scheme
    if scheme.kind == "int":
        return INT4 if scheme.codes_per_byte == 2 else INT8
    return FP8 if scheme.kind == "fp8" else NF4


def as_experts(weight: QuantizedWeight) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and zero points: [num_experts, rows, …], for one matrix as for that of a single expert."""
    scale = weight.scale.numpy()
    zero = np.zeros(scale.shape, np.int8) if weight.zero is None else weight.zero.numpy()
    arrays = weight.codes.numpy(), scale, zero
    codes, scale, zero = (array if array.ndim == 3 else array[np.newaxis] for array in arrays)
    return codes, scale, zero


def _jit_cached(kernel: Callable[..., None]) -> Any:
    """Compile at the first call, and keep the result on disk: in __pycache__ or in the user's cache directory."""
    try:
        return numba.njit(cache=True, **OPTIONS)(kernel)
    except RuntimeError:  # neither directory can be written: compile again in each process
        return numba.njit(**OPTIONS)(kernel)


@_jit_cached
def _products_kernel(rows, codes, scale, zero, levels, kind, group_size, starts, output, max_rows):
    for expert in range(len(codes)):
        start, end = starts[expert], starts[expert + 1]
        if start < end and end - start <= max_rows:
            _product_kernel(
                rows[start:end], codes[expert], scale[expert], zero[expert], levels, kind, group_size, output[start:end]
            )  # fmt: skip


@numba.njit(inline="always", **OPTIONS)
def _product_kernel(rows, codes, scale, zero, levels, kind, group_size, output):
    decoded = np.empty(rows.shape[1], np.float32)
    for column in range(len(codes)):
        decode(decoded, codes[column], scale[column], zero[column], levels, kind, group_size)
        for row in range(len(rows)):
            output[row, column] = dot(rows[row], decoded)


@_jit_cached
def _decode_kernel(codes, scale, zero, levels, kind, group_size, output):
    for row in range(len(codes)):
        decode(output[row], codes[row], scale[row], zero[row], levels, kind, group_size)


@numba.njit(inline="always", **OPTIONS)
def decode(numbers, codes, scale, zero, levels, kind, group_size):
    """One row of a matrix. numbers: [columns]; codes: [bytes of a row]; scale, zero: [num_groups]."""
    if kind == INT8:
        decode_int8(numbers, codes, scale, zero, group_size)
    elif kind == INT4:
        decode_int4(numbers, codes, scale, zero, group_size)
    elif kind == FP8:
        decode_fp8(numbers, codes, scale, group_size)
    else:
        decode_nf4(numbers, codes, scale, levels, group_size)


@numba.njit(inline="always", **OPTIONS)
def decode_int8(numbers, codes, scale, zero, group_size):
    """The inner loops run over views that start at 0: LLVM vectorizes those."""
    for group in range(len(scale)):
        start, end = group * group_size, (group + 1) * group_size
        values, own, factor, offset = numbers[start:end], codes[start:end], scale[group], np.int32(zero[group])
        for i in range(group_size):
            values[i] = np.float32(np.int32(own[i]) - offset) * factor


@numba.njit(inline="always", **OPTIONS)
def decode_int4(numbers, codes, scale, zero, group_size):
    """Byte i of a group has number i in its lower half and number i + group_size / 2 in its upper half, both plus 8."""
    half = group_size // 2
    for group in range(len(scale)):
        start, factor, offset = group * group_size, scale[group], np.int32(zero[group]) + np.int32(8)
        own = codes[group * half : (group + 1) * half]
        low, high = numbers[start : start + half], numbers[start + half : start + group_size]
        for i in range(half):
            byte = np.int32(own[i])
            low[i] = np.float32((byte & np.int32(15)) - offset) * factor
            high[i] = np.float32(((byte >> np.int32(4)) & np.int32(15)) - offset) * factor


@numba.njit(inline="always", **OPTIONS)
def decode_nf4(numbers, codes, scale, levels, group_size):
    half = group_size // 2
    for group in range(len(scale)):
        start, factor = group * group_size, scale[group]
        own = codes[group * half : (group + 1) * half]
        low, high = numbers[start : start + half], numbers[start + half : start + group_size]
        for i in range(half):
            byte = np.int32(own[i])
            low[i] = levels[byte & np.int32(15)] * factor
            high[i] = levels[(byte >> np.int32(4)) & np.int32(15)] * factor


@numba.njit(inline="always", **OPTIONS)
def decode_fp8(numbers, codes, scale, group_size):
    """e4m3 has a sign, 4 bits of exponent and 3 of fraction: the upper bits of a float32, but for the exponent's
    offset. Numbers too small for a full fraction come out right as well, as they are in float32."""
    bits = numbers.view(np.int32)
    for i in range(len(codes)):
        byte = np.int32(codes[i])
        bits[i] = ((byte & np.int32(0x7F)) << np.int32(20)) | ((byte & np.int32(0x80)) << np.int32(24))
    for group in range(len(scale)):
        values, factor = numbers[group * group_size : (group + 1) * group_size], scale[group] * FP8_SHIFT
        for i in range(group_size):
            values[i] *= factor


@numba.njit(inline="always", **OPTIONS)
def dot(a, b):
    total = np.float32(0)
    for i in range(len(a)):
        total += a[i] * b[i]
    return total
