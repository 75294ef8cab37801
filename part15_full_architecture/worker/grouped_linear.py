"""Products of groups of rows, each with a weight of its own: what the experts of a layer compute, in one call."""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
from torch import Tensor

from .cpu_grouped_linear import MAX_KERNEL_ROWS, small_groups


def grouped_linear(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """On a CPU. The first counts[0] rows times weight[0], the next counts[1] rows times weight[1], and so on.

    rows: [n, in_features], contiguous. weight: [num_groups, out_features, in_features]. counts: [num_groups], int64,
    with sum n. Returns [n, out_features]. There is one product for each group that has rows.
    """
    output = rows.new_empty(len(rows), weight.shape[1])
    has_kernel = rows.dtype == torch.float32
    starts = list(accumulate(counts.tolist(), initial=0))
    if has_kernel:
        small_groups(rows, weight, starts, output)
    for group, (start, end) in enumerate(pairwise(starts)):
        if end - start > (MAX_KERNEL_ROWS if has_kernel else 0):
            torch.mm(rows[start:end], weight[group].T, out=output[start:end])
    return output
