"""SiLU and multiplication in Triton, the middle of a gated feed-forward network."""

from __future__ import annotations

import torch
from torch import Tensor

from ...triton_attention import _jit, triton

if triton is not None:
    import triton.language as tl

TILE_SIZE = 1_024  # numbers of a row that a program computes


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) · up, with silu(x) = x / (1 + exp(-x)), in float32, rounded once (SwiGLU: Shazeer, 2020).

    gate_up: [num_rows, 2 · size], contiguous, gates then ups. Returns [num_rows, size]. Raises RuntimeError if Triton
    is not installed.
    """
    if triton is None:
        raise RuntimeError("silu_and_mul needs the package triton, which is not installed (Linux: pip install triton)")
    assert gate_up.is_contiguous(), f"gate_up must be contiguous, got strides of {gate_up.stride()}"
    num_rows, width = gate_up.shape
    assert width % 2 == 0, f"gate_up needs as many gates as ups, got rows of {width} numbers"
    size = width // 2
    output = gate_up.new_empty(num_rows, size)
    tile_size = min(TILE_SIZE, triton.next_power_of_2(size))
    with torch.cuda.device_of(gate_up):  # Triton launches on the current device
        _silu_and_mul_kernel[(num_rows, triton.cdiv(size, tile_size))](gate_up, output, size, TILE_SIZE=tile_size)
    return output


@_jit
def _silu_and_mul_kernel(gate_up_ptr, output_ptr, size, TILE_SIZE: tl.constexpr):
    """One program for a part of a row."""
    row = tl.program_id(0).to(tl.int64)  # in int32, row · size overflows from 2³¹ elements on
    column = tl.program_id(1) * TILE_SIZE + tl.arange(0, TILE_SIZE)
    is_column = column < size
    gate_ptr = gate_up_ptr + row * 2 * size + column
    gate = tl.load(gate_ptr, mask=is_column, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + size, mask=is_column, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up  # exp(-gate) may be inf: the quotient is -0 then, as it should be
    tl.store(output_ptr + row * size + column, result.to(output_ptr.dtype.element_ty), mask=is_column)
