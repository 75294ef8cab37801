"""SiLU and multiplication on the CPU, in Numba: the middle of a gated feed-forward network."""

from __future__ import annotations

import numba
import numpy as np
from torch import Tensor

from ...cpu_attention import OPTIONS, _jit_cached, exp, to_float32
from .. import reference
from .memory import DTYPES, LIKE, from_float32, numbers_at


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """See reference.py::silu_and_mul. gate_up: [num_rows, 2 · size], contiguous, float32 or bfloat16; float16 goes to
    the reference. Returns [num_rows, size]. In one thread, without the GIL."""
    if gate_up.dtype not in DTYPES:
        return reference.silu_and_mul(gate_up)
    num_rows, num_columns = gate_up.shape
    assert gate_up.is_contiguous(), f"gate_up must be contiguous, got strides {gate_up.stride()}"
    assert num_columns % 2 == 0, f"gates and ups have the same size, but there are {num_columns} columns"
    output = gate_up.new_empty(num_rows, num_columns // 2)
    _silu_and_mul_kernel(gate_up.data_ptr(), output.data_ptr(), num_rows, num_columns // 2, LIKE[gate_up.dtype])
    return output


@_jit_cached
def _silu_and_mul_kernel(gate_up, output, num_rows, size, like):
    """gate_up and output are addresses."""
    powers = np.empty(size, np.float32)
    for row in range(num_rows):
        gate = numbers_at(gate_up, row * 2 * size, size, like)
        up = numbers_at(gate_up, (row * 2 + 1) * size, size, like)
        silu_row(numbers_at(output, row * size, size, like), gate, up, powers, like)


@numba.njit(inline="always", **OPTIONS)
def silu_row(output, gate, up, powers, like):
    """silu(x) = x / (1 + e^-x). exp() takes no positive numbers: for x < 0 it is x · e^x / (1 + e^x). Two loops, since
    LLVM makes better code for bfloat16 of each than of one for both."""
    one = np.float32(1)
    for i in range(len(powers)):
        powers[i] = exp(-abs(to_float32(gate[i])))
    for i in range(len(powers)):
        x = to_float32(gate[i])
        numerator = one if x >= 0 else powers[i]
        output[i] = from_float32(x * numerator / (one + powers[i]) * to_float32(up[i]), like)
