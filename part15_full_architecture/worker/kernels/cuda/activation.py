"""SiLU and multiplication in CUDA C++."""

from __future__ import annotations

import torch
from torch import Tensor

from .library import Library


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) · up, the middle of a gated feed-forward network (SwiGLU: Shazeer, 2020).

    gate_up: [num_rows, 2 · size], gates then ups; float32, float16 or bfloat16, contiguous. Returns [num_rows, size].
    """
    assert gate_up.dim() == 2 and gate_up.is_contiguous(), "gate_up must be [num_rows, 2 * size] and contiguous"
    num_rows, columns = gate_up.shape
    assert columns > 0 and columns % 2 == 0, f"gate_up has {columns} columns: expected an even number"
    output = torch.empty(num_rows, columns // 2, dtype=gate_up.dtype, device=gate_up.device)
    Library("activation").call("silu_and_mul", gate_up, output, gate_up.dtype, num_rows, columns // 2)
    return output
