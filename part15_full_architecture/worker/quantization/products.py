"""Products with matrices of codes: which kernel computes them."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu_kernels import MAX_KERNEL_ROWS, decode_rows, small_products
from .scheme import Scheme, quantize_tokens, round_tokens_to_fp8

if TYPE_CHECKING:
    from .weight import QuantizedWeight

TILE_ROWS = 256  # of a matrix, whose numbers are needed at once
INT8PACK_COLUMNS = 16
MAX_INT8PACK_ROWS = 16  # for more, torch's product with bfloat16 numbers is faster
MIN_CUDA_INT_MM_ROWS = 17


def product(rows: Tensor, weight: QuantizedWeight) -> Tensor:
    """rows · matrixᵀ. rows: [n, columns]; returns [n, rows of the matrix], in the dtype of the input."""
    scheme = weight.scheme
    if scheme.activations == "int8" and has_int_mm(weight, rows):
        return int8_product(rows, weight.codes, weight.scale)
    rows = round_inputs(rows, scheme)
    if not rows.is_cuda and has_int8pack(weight, rows) and len(rows) <= MAX_INT8PACK_ROWS:
        return torch._weight_int8pack_mm(rows.contiguous(), weight.codes, weight.scale[:, 0].to(rows.dtype))
    return weight.kernels.quantized_linear(rows, weight)


def grouped_product(rows: Tensor, weight: QuantizedWeight, counts: Tensor) -> Tensor:
    """The first counts[0] rows times the first expert's matrix, and so on. rows: [n, columns]; counts: [num_experts],
    int64, with sum n. Returns [n, rows of a matrix], in the dtype of the input."""
    starts = list(accumulate(counts.tolist(), initial=0))
    if not rows.is_cuda and weight.scheme.activations != "int8":
        return cpu_product(round_inputs(rows, weight.scheme), weight, starts)
    output = rows.new_empty(len(rows), weight.shape[-2])
    for expert, (start, end) in enumerate(pairwise(starts)):
        if start < end:
            output[start:end] = product(rows[start:end], weight.expert(expert))
    return output


def round_inputs(rows: Tensor, scheme: Scheme) -> Tensor:
    """What the activations' codes stand for."""
    match scheme.activations:
        case "int8":
            codes, scale = quantize_tokens(rows)
            return (codes * scale).to(rows.dtype)
        case "fp8":
            return round_tokens_to_fp8(rows)
    return rows


def cpu_product(rows: Tensor, weight: QuantizedWeight, starts: list[int]) -> Tensor:
    """Few rows: a kernel decodes each row of a matrix, and multiplies it with all of them. More rows: a matrix product
    of floating-point numbers, with a tile of the matrix at a time.

    starts: [num_experts + 1], where each expert's rows begin.
    """
    rows = rows if weight.order is None else rows[:, weight.order]
    inputs = rows.float().contiguous()
    output = torch.empty(len(rows), weight.shape[-2])
    small_products(inputs, weight, starts, output)
    for expert, (start, end) in enumerate(pairwise(starts)):
        if end - start > MAX_KERNEL_ROWS:
            own = rows[start:end]
            for first in range(0, weight.shape[-2], TILE_ROWS):
                tile = decode_rows(weight, expert, first, first + TILE_ROWS).to(rows.dtype)
                output[start:end, first : first + TILE_ROWS] = F.linear(own, tile)
    return output.to(rows.dtype)


def numba_product(rows: Tensor, weight: QuantizedWeight) -> Tensor:
    return cpu_product(rows, weight, [0, len(rows)])


def triton_product(rows: Tensor, weight: QuantizedWeight) -> Tensor:
    from . import triton_kernels  # which a CPU does not need

    if not triton_kernels.supports(weight.scheme):
        return reference_product(rows, weight)
    return triton_kernels.product(rows if weight.order is None else rows[:, weight.order], weight)


def cuda_product(rows: Tensor, weight: QuantizedWeight) -> Tensor:
    from ..kernels.cuda.quantized_linear import quantized_linear

    if weight.scheme.kind not in ("int", "fp8"):
        return reference_product(rows, weight)
    rows = rows.contiguous() if weight.order is None else rows[:, weight.order]
    return quantized_linear(
        rows, weight.codes, weight.scale, weight.zero, weight.group_size, weight.scheme.codes_per_byte,
        weight.scheme.kind,
    )  # fmt: skip


def reference_product(rows: Tensor, weight: QuantizedWeight) -> Tensor:
    """What every kernel computes: with numbers, in the dtype of the input."""
    return F.linear(rows, weight.dequantized().to(rows.dtype))


def has_int8pack(weight: QuantizedWeight, rows: Tensor) -> bool:
    """Whether torch has a fast product for this on a CPU: for bfloat16 and int8 with a scale for each row. With a
    number of columns that isn't a multiple of 16, it would read what isn't there."""
    scheme = weight.scheme
    is_int8 = scheme.kind == "int" and scheme.bits == 8 and scheme.group_size is None and scheme.is_symmetric
    return is_int8 and rows.dtype == torch.bfloat16 and weight.shape[-1] % INT8PACK_COLUMNS == 0


def has_int_mm(weight: QuantizedWeight, rows: Tensor) -> bool:
    """Whether torch can multiply these integers: on a GPU, sizes must be divisible by 8."""
    return weight.scheme.group_size is None and not (rows.is_cuda and any(size % 8 for size in weight.shape[-2:]))


def int8_product(rows: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """W8A8: the rows become int8 as well, and integers are multiplied and summed, exactly, in int32. Then the two
    scales are applied.

    rows: [n, columns]; codes: [m, columns], int8; scale: [m, 1], float32. Returns [n, m].
    """
    row_codes, row_scale = quantize_tokens(rows)
    return (int_mm(row_codes, codes).float() * row_scale * scale.T).to(rows.dtype)


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """a · bᵀ of int8 matrices, int32. On a GPU, torch's product needs more than 16 rows, a multiple of 8."""
    if not a.is_cuda:
        return torch._int_mm(a, b.T)
    num_rows = len(a)
    wanted = -(-max(num_rows, MIN_CUDA_INT_MM_ROWS) // 8) * 8
    return torch._int_mm(F.pad(a, (0, 0, 0, wanted - num_rows)), b.T)[:num_rows]
