"""RMSNorm in Triton, with and without the addition to the residual stream before it."""

from __future__ import annotations

import torch
from torch import Tensor

from ...triton_attention import _jit, triton
from .softmax import count_warps

if triton is not None:
    import triton.language as tl

MAX_SIZE = 32_768  # numbers of a row that a program keeps in registers
TILE_NUMBERS = 1_024  # a program handles several short rows, such as the heads of Qwen3's norms of queries and keys


def add_rms_norm(rows: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add rows to the residual stream, in place, and normalize the sum: both are read once and written once.

    rows, residual: [num_rows, size], contiguous, with size up to MAX_SIZE; weight: [size]. Returns sum /
    sqrt(mean(sum²) + eps) · weight, of rows' shape and dtype (RMSNorm: Zhang and Sennrich, 2019). The norm reads the
    float32 sum before it is rounded to residual's dtype. Raises RuntimeError if Triton is not installed.
    """
    assert rows.shape == residual.shape, f"rows {list(rows.shape)} and residual {list(residual.shape)} differ"
    assert residual.is_contiguous(), f"residual must be contiguous, got strides of {residual.stride()}"
    return launch_norm(rows, residual, weight, eps)


def rms_norm(rows: Tensor, weight: Tensor, eps: float) -> Tensor:
    """add_rms_norm without a residual: for a model's first norm, and for Qwen3's norms of single heads.

    rows: [num_rows, size], or heads: [num_tokens, num_heads, size]; the first dimension may have a stride, as that of a
    slice of queries, keys and values has. weight: [size]. Returns rows' shape and dtype, contiguous.
    """
    return launch_norm(rows, None, weight, eps)


def launch_norm(rows: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    if triton is None:
        raise RuntimeError("the norms need the package triton, which is not installed (Linux: pip install triton)")
    size, num_heads = rows.shape[-1], 1 if rows.dim() == 2 else rows.shape[1]
    num_rows = len(rows) * num_heads
    assert rows[:1].is_contiguous(), f"only the first dimension may have a stride, got strides of {rows.stride()}"
    assert weight.shape == (size,) and weight.is_contiguous(), f"weight: expected [{size}], got {list(weight.shape)}"
    assert size <= MAX_SIZE, f"rows of {size} numbers do not fit: at most {MAX_SIZE}"
    output = torch.empty_like(rows, memory_format=torch.contiguous_format)
    tile_size = triton.next_power_of_2(size)
    tile_rows = max(1, TILE_NUMBERS // tile_size)
    with torch.cuda.device_of(rows):  # Triton launches on the current device
        _rms_norm_kernel[(triton.cdiv(num_rows, tile_rows),)](
            rows, residual, weight, output, num_rows, num_heads, rows.stride(0), size, eps, TILE_ROWS=tile_rows,
            TILE_SIZE=tile_size, num_warps=count_warps(tile_rows * tile_size),
        )  # fmt: skip
    return output


@_jit
def _rms_norm_kernel(
    rows_ptr, residual_ptr, weight_ptr, output_ptr, num_rows, num_heads, token_stride, size, eps,
    TILE_ROWS: tl.constexpr, TILE_SIZE: tl.constexpr,
):  # fmt: skip
    """One program for a long row, or for several short ones. residual_ptr: None for a norm without addition. Letters
    give the shapes: r(ow), c(olumn)."""
    r = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    c = tl.arange(0, TILE_SIZE)
    is_inside = (r < num_rows)[:, None] & (c < size)[None, :]
    row_offsets = r // num_heads * token_stride + r % num_heads * size  # int64: int32 overflows from 2³¹ elements on
    total = tl.load(rows_ptr + row_offsets[:, None] + c[None, :], mask=is_inside, other=0.0).to(tl.float32)
    offsets = r[:, None] * size + c[None, :]  # [r, c]
    if residual_ptr is not None:
        total += tl.load(residual_ptr + offsets, mask=is_inside, other=0.0).to(tl.float32)
        tl.store(residual_ptr + offsets, total.to(residual_ptr.dtype.element_ty), mask=is_inside)
    scale = tl.rsqrt(tl.sum(total * total, axis=1) / size + eps)  # [r]; padding adds zeros to the sum
    weight = tl.load(weight_ptr + c, mask=c < size, other=0.0).to(tl.float32)
    normalized = total * scale[:, None] * weight[None, :]
    tl.store(output_ptr + offsets, normalized.to(output_ptr.dtype.element_ty), mask=is_inside)
