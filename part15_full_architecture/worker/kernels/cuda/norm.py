"""RMSNorm in CUDA C++, alone or fused with the addition to the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor

from .library import Library


def add_rms_norm(rows: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add rows to the residual stream, in place, and normalize the sum (fused_add_rms_norm in vLLM).

    rows, residual: [num_rows, size]; weight: [size]; all contiguous, of one dtype: float32, float16 or bfloat16.
    Returns residual / sqrt(mean(residual²) + eps) · weight, of rows' shape and dtype. The norm reads the sum before
    it is rounded. Raises KernelError if a row has more than 25,312 numbers.
    """
    assert rows.dim() == 2 and rows.is_contiguous(), "rows must be [num_rows, size] and contiguous"
    assert residual.shape == rows.shape and residual.is_contiguous(), "residual must have rows' shape, contiguous"
    assert residual.dtype == rows.dtype, f"residual is {residual.dtype}, rows {rows.dtype}: expected the same dtype"
    return launch(rows.unsqueeze(1), residual, weight, eps).squeeze(1)


def rms_norm(rows: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalize rows without a residual (Zhang and Sennrich, 2019).

    rows: [num_rows, size], or the heads of queries or keys: [num_tokens, num_heads, size], where tokens may have a
    stride. weight: [size], of rows' dtype. Returns rows / sqrt(mean(rows²) + eps) · weight, of rows' shape and dtype,
    contiguous. Raises KernelError if a row has more than 25,312 numbers.
    """
    if rows.dim() == 2:
        return launch(rows.unsqueeze(1), None, weight, eps).squeeze(1)
    return launch(rows, None, weight, eps)


def launch(heads: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """heads: [num_tokens, num_heads, size]; tokens may have a stride, heads are contiguous."""
    num_tokens, num_heads, size = heads.shape
    assert heads[:1].is_contiguous(), "only the first dimension of rows may have a stride"
    assert weight.shape == (size,) and weight.is_contiguous(), f"weight must be [{size}] and contiguous"
    assert weight.dtype == heads.dtype, f"weight is {weight.dtype}, rows {heads.dtype}: expected the same dtype"
    output = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    Library("norm").call(
        "add_rms_norm", heads, residual, weight, output, heads.dtype, num_tokens * num_heads, size, num_heads,
        heads.stride(0), float(eps),
    )  # fmt: skip
    return output
