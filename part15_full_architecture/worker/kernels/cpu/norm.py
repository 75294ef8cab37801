"""RMSNorm on the CPU, in Numba; and how the kernels of this folder get at the memory of tensors.

A step calls these operations dozens of times, on a few rows each, so the time of a call counts as much as the work.
Tensor.numpy() takes 0.7 µs and data_ptr() 0.1: the kernels are given addresses, and they see them as arrays.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from numba import types
from numba.extending import intrinsic, overload
from torch import Tensor

from ...cpu_attention import OPTIONS, _jit_cached, to_float32
from .. import reference

# How a kernel sees the numbers of a dtype. NumPy has no bfloat16 and no FP8: kernels see their bits, as unsigned
# integers. Kernels take these zeros as arguments named `like…`: Numba compiles a version for each of their types.
LIKE = {
    torch.float32: np.float32(0), torch.bfloat16: np.uint16(0), torch.int8: np.int8(0), torch.uint8: np.uint8(0),
}  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16)  # of rows; for others, the reference is called
EXACT: dict[str, Any] = {"nogil": True, "error_model": "numpy"}  # without fastmath: where each rounding counts


def add_rms_norm(rows: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See reference.py::add_rms_norm. All three are contiguous and have the same dtype: float32 or bfloat16. float16
    goes to the reference.

    rows, residual: [num_rows, size]; weight: [size]. Returns rows' shape and dtype; residual is updated in place. In
    one thread, without the GIL.
    """
    if rows.dtype not in DTYPES:
        return reference.add_rms_norm(rows, residual, weight, eps)
    num_rows, size = rows.shape
    assert rows.shape == residual.shape, f"rows are {rows.shape}, the residual is {residual.shape}"
    assert weight.shape == (size,), f"rows have {size} numbers, the weight is {weight.shape}"
    assert rows.dtype == residual.dtype == weight.dtype, f"got {rows.dtype}, {residual.dtype} and {weight.dtype}"
    are_contiguous = rows.is_contiguous() and residual.is_contiguous() and weight.is_contiguous()
    assert are_contiguous, f"rows, residual and weight must be contiguous: got strides {rows.stride()}"
    output = torch.empty_like(rows)
    _norm_kernel(
        rows.data_ptr(), size, residual.data_ptr(), weight.data_ptr(), output.data_ptr(), num_rows, 1, size, eps,
        LIKE[rows.dtype],
    )  # fmt: skip
    return output


def rms_norm(rows: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See reference.py::rms_norm. Both have the same dtype: float32 or bfloat16. float16 goes to the reference.

    rows: [num_rows, size], or [num_tokens, num_heads, size], of which the first dimension may have any stride: Qwen3
    normalizes heads that are part of longer rows. weight: [size]. Returns rows' shape and dtype, contiguous. In one
    thread, without the GIL.
    """
    if rows.dtype not in DTYPES:
        return reference.rms_norm(rows, weight, eps)
    num_tokens, *heads, size = rows.shape
    stride, *inner = rows.stride()
    assert inner in ([1], [size, 1]), f"only the first dimension may have a stride, got {rows.stride()}"
    assert weight.shape == (size,) and weight.is_contiguous(), f"rows have {size} numbers, the weight is {weight.shape}"
    assert rows.dtype == weight.dtype, f"rows are {rows.dtype}, the weight is {weight.dtype}"
    output = torch.empty_like(rows, memory_format=torch.contiguous_format)
    _norm_kernel(
        rows.data_ptr(), stride, 0, weight.data_ptr(), output.data_ptr(), num_tokens, heads[0] if heads else 1, size,
        eps, LIKE[rows.dtype],
    )  # fmt: skip
    return output


@intrinsic
def _pointer(typing_context, address, offset, like):
    """The address of a number, as a pointer to like's type. offset: in numbers."""

    def generate(context, builder, signature, arguments):
        base = builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))
        return builder.gep(base, [arguments[1]])

    return types.CPointer(like)(types.intp, types.intp, like), generate


@numba.njit(inline="always", **OPTIONS)
def numbers_at(address, offset, shape, like):
    """Numbers of like's type that begin `offset` numbers after an address: an array over the same memory."""
    return numba.carray(_pointer(address, offset, like), shape)


def from_float32(number: Any, like: Any) -> Any:
    """A float32 as it is stored, rounded to nearest even. The code depends on like's type: see _from_float32."""
    raise NotImplementedError("from_float32 works only inside a kernel")


@overload(from_float32)
def _from_float32(number, like):
    if like == numba.uint16:
        return lambda number, like: to_bfloat16(number)
    return lambda number, like: number


@numba.njit(**OPTIONS)
def to_bfloat16(number):
    """The upper 16 bits. What is added carries into them if the lower half is more than 0x8000, or is that and the
    number above it is odd. A NaN could overflow, so it becomes one that is known."""
    bits = np.float32(number).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.uint16(rounded) if number == number else np.uint16(0x7FC0)


@_jit_cached
def _norm_kernel(rows, stride, residual, weight, output, num_tokens, num_heads, size, eps, like):
    """The first five but stride are addresses; that of residual may be 0. stride: numbers from a token to the next."""
    eps, num_inverse = np.float32(eps), np.float32(1) / np.float32(size)
    weights, total = numbers_at(weight, 0, size, like), np.empty(size, np.float32)
    for token in range(num_tokens):
        for head in range(num_heads):
            index = (token * num_heads + head) * size
            row = numbers_at(rows, token * stride + head * size, size, like)
            if residual != 0:
                add(total, row, numbers_at(residual, index, size, like), like)
            else:
                for i in range(size):
                    total[i] = to_float32(row[i])
            squares = np.float32(0)
            for i in range(size):
                squares += total[i] * total[i]
            factor = np.float32(1) / np.sqrt(squares * num_inverse + eps)
            normalized = numbers_at(output, index, size, like)
            for i in range(size):
                normalized[i] = from_float32(total[i] * factor * to_float32(weights[i]), like)


@numba.njit(inline="always", **OPTIONS)
def add(total, row, residual, like):
    """The sum goes to the residual, rounded to its dtype, and to total as it is."""
    for i in range(len(total)):
        total[i] = to_float32(row[i]) + to_float32(residual[i])
        residual[i] = from_float32(total[i], like)
