"""Grouped products as a Triton kernel: all groups in one launch, whatever their sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from .triton_attention import MIN_DOT_SIZE, _jit, triton

if triton is not None:
    import triton.language as tl

TILE_COLUMNS, TILE_INNER = 64, 32  # of a program's output tile, and of the products that it adds up at a time


def grouped_linear(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """The first counts[0] rows times weight[0], the next counts[1] rows times weight[1], and so on.

    rows: [n, in_features]. weight: [num_groups, out_features, in_features]; rows of both are contiguous. counts:
    [num_groups], int64, with sum n; they stay on the device, so a launch does not wait for it. Returns [n,
    out_features] of rows' dtype; sums are kept in float32. Raises RuntimeError if Triton is not installed.
    """
    if triton is None:
        raise RuntimeError("grouped_linear needs the package triton, which is not installed")
    num_rows, in_features = rows.shape
    num_groups, out_features, _ = weight.shape
    rows, weight = rows.contiguous(), weight.contiguous()
    output = rows.new_empty(num_rows, out_features)
    tile_rows = min(64, max(MIN_DOT_SIZE, triton.next_power_of_2(num_rows // num_groups)))
    tile_ends = (-(-counts // tile_rows)).cumsum(0)  # tiles of rows up to each group
    max_tiles = triton.cdiv(num_rows, tile_rows) + num_groups  # not known exactly on the host
    with torch.cuda.device_of(rows):  # Triton launches on the current device
        _grouped_linear_kernel[(max_tiles, triton.cdiv(out_features, TILE_COLUMNS))](
            rows, weight, counts.cumsum(0), tile_ends, output, num_groups, IN_FEATURES=in_features,
            OUT_FEATURES=out_features, PADDED_GROUPS=triton.next_power_of_2(num_groups), TILE_ROWS=tile_rows,
            TILE_COLUMNS=TILE_COLUMNS, TILE_INNER=TILE_INNER,
        )  # fmt: skip
    return output


@_jit
def _grouped_linear_kernel(
    rows_ptr, weight_ptr, row_ends_ptr, tile_ends_ptr, output_ptr, num_groups, IN_FEATURES: tl.constexpr,
    OUT_FEATURES: tl.constexpr, PADDED_GROUPS: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
    TILE_INNER: tl.constexpr,
):  # fmt: skip
    """One program for some rows of one group and some columns. Letters give the shapes: g(roup), r(ow), c(olumn), i."""
    tile, g = tl.program_id(0), tl.arange(0, PADDED_GROUPS)
    tile_ends = tl.load(tile_ends_ptr + g, mask=g < num_groups, other=2**62)
    group = tl.sum((tile_ends <= tile).to(tl.int64))
    if group == num_groups:  # the grid is larger than needed
        return
    is_before = g == group - 1
    first_tile = tl.sum(tl.where(is_before, tile_ends, 0))
    row_ends = tl.load(row_ends_ptr + g, mask=g < num_groups, other=0)
    start = tl.sum(tl.where(is_before, row_ends, 0)) + (tile - first_tile) * TILE_ROWS
    end = tl.sum(tl.where(g == group, row_ends, 0))

    r = start + tl.arange(0, TILE_ROWS)
    c, i = tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS), tl.arange(0, TILE_INNER)
    is_row, is_column = (r < end)[:, None], c < OUT_FEATURES
    weight_ptr += group * OUT_FEATURES * IN_FEATURES
    total = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.float32)
    for first in range(0, IN_FEATURES, TILE_INNER):
        inner = first + i
        is_inner = inner < IN_FEATURES
        left = tl.load(rows_ptr + r[:, None] * IN_FEATURES + inner[None, :], mask=is_row & is_inner[None, :], other=0.0)
        right = tl.load(
            weight_ptr + c[None, :] * IN_FEATURES + inner[:, None],
            mask=is_inner[:, None] & is_column[None, :],
            other=0.0,
        )
        total += tl.dot(left, right, input_precision="ieee")  # [r, c]
    output_offsets = r[:, None] * OUT_FEATURES + c[None, :]
    tl.store(output_ptr + output_offsets, total.to(output_ptr.dtype.element_ty), mask=is_row & is_column[None, :])
