"""Products with the matrices of a layer's experts, in CUDA: all groups of rows in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from .library import Library

TILE_ROWS = (16, 32, 64)


def grouped_linear(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """The first counts[0] rows times weight[0], the next counts[1] rows times weight[1], and so on: a layer's experts.

    rows: [n, in_features]. weight: [num_groups, out_features, in_features], of the same dtype: float32, float16 or
    bfloat16. counts: [num_groups], int64, with sum n; they stay on the device, so a launch does not wait for it. All
    are contiguous. Returns [n, out_features], of rows' dtype; sums are kept in float32. Raises KernelError if there is
    no kernel for the dtype.
    """
    (num_rows, in_features), (num_groups, out_features, _) = rows.shape, weight.shape
    assert weight.shape[2] == in_features, f"rows have {in_features} features, weight {weight.shape[2]}"
    assert weight.dtype == rows.dtype, f"rows are {rows.dtype}, weight {weight.dtype}"
    assert counts.dtype == torch.int64 and counts.shape == (num_groups,), f"counts: {counts.dtype} {list(counts.shape)}"
    for name, tensor in {"rows": rows, "weight": weight, "counts": counts}.items():
        assert tensor.is_contiguous(), f"{name} is not contiguous"
    output = rows.new_empty(num_rows, out_features)
    if output.numel():
        assert num_groups, f"{num_rows} rows, but no groups"
        tile_rows = choose_tile_rows(num_rows, num_groups)
        tile_ends = (-(-counts // tile_rows)).cumsum(0)
        Library("grouped_linear").call(
            "grouped_linear", rows, weight, counts.cumsum(0), tile_ends, output, rows.dtype, num_rows, num_groups,
            out_features, in_features, tile_rows,
        )  # fmt: skip
    return output


def choose_tile_rows(num_rows: int, num_groups: int) -> int:
    """The smallest tile for the mean number of rows of a group, or the largest tile: a tile takes as long with one row
    as with all."""
    return next((size for size in TILE_ROWS if num_rows <= size * num_groups), TILE_ROWS[-1])
