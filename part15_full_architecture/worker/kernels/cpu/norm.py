"""RMSNorm on the CPU, in Numba: alone, and with the addition to the residual stream before it."""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from ...cpu_attention import OPTIONS, _jit_cached, to_float32
from .. import reference
from .memory import DTYPES, LIKE, from_float32, numbers_at


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
