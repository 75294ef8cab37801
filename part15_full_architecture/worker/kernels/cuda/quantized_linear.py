"""Products with matrices of codes (W8A16, W4A16) in CUDA: a kernel for few rows and one for many."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .library import Library

MAX_GEMV_ROWS = 8
CODE_TYPES = {"int": torch.int8, "fp8": torch.uint8}


def quantized_linear(
    rows: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_size: int,
    codes_per_byte: int,
    kind: Literal["int", "fp8"] = "int",
) -> Tensor:
    """rows · matrixᵀ, with the matrix as codes (W8A16, W4A16): number = (code - zero) · scale.

    rows: [num_rows, columns], float32, float16 or bfloat16. codes: [out_features, columns / codes_per_byte], int8: one
    code in each byte, or two as packing.py::pack_nibbles stores them; for kind "fp8", the bits of e4m3 numbers. scale:
    [out_features, num_groups], float32; zero: the same shape, int8, or None; each for group_size columns. All are
    contiguous. Returns [num_rows, out_features], of rows' dtype.

    Sums are kept in float32. Up to 8 rows are multiplied with the numbers as they are; more, if they aren't float32,
    with the numbers rounded to rows' dtype. Raises KernelError if there is no kernel for the dtypes.
    """
    uses_tensor_cores = len(rows) > MAX_GEMV_ROWS and rows.dtype != torch.float32
    launch = gemm if uses_tensor_cores else gemv
    return launch(rows, codes, scale, zero, group_size, codes_per_byte, kind)


def gemv(
    rows: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_size: int,
    codes_per_byte: int,
    kind: Literal["int", "fp8"] = "int",
) -> Tensor:
    """quantized_linear without tensor cores, fast for few rows: codes are read again for each 8 rows."""
    return _launch("quantized_gemv", rows, codes, scale, zero, group_size, codes_per_byte, kind)


def gemm(
    rows: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_size: int,
    codes_per_byte: int,
    kind: Literal["int", "fp8"] = "int",
) -> Tensor:
    """quantized_linear on tensor cores, for rows of float16 or bfloat16."""
    return _launch("quantized_gemm", rows, codes, scale, zero, group_size, codes_per_byte, kind)


def _launch(
    symbol: str,
    rows: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_size: int,
    codes_per_byte: int,
    kind: Literal["int", "fp8"],
) -> Tensor:
    (num_rows, columns), (out_features, row_bytes), num_groups = rows.shape, codes.shape, scale.shape[1]
    assert codes_per_byte in ((1, 2) if kind == "int" else (1,)), f"{kind} codes, {codes_per_byte} in a byte"
    assert group_size > 0 and group_size % codes_per_byte == 0, f"group_size is {group_size}"
    assert columns == num_groups * group_size, f"{columns} columns are not {num_groups} groups of {group_size}"
    assert columns == row_bytes * codes_per_byte, f"rows have {columns} columns, codes {row_bytes} · {codes_per_byte}"
    assert columns <= 2**30, f"{columns} columns: they are counted in 32 bits"
    assert codes.dtype == torch.int8, f"codes are {codes.dtype}, not int8"
    assert scale.dtype == torch.float32 and len(scale) == out_features, f"scale: {scale.dtype} {list(scale.shape)}"
    if zero is not None:
        assert kind == "int", "FP8 codes have no zero points"
        assert zero.dtype == torch.int8 and zero.shape == scale.shape, f"zero: {zero.dtype} {list(zero.shape)}"
    for name, tensor in {"rows": rows, "codes": codes, "scale": scale, "zero": zero}.items():
        assert tensor is None or tensor.is_contiguous(), f"{name} is not contiguous"
    output = rows.new_empty(num_rows, out_features)
    if output.numel():
        Library(symbol).call(
            symbol, rows, codes, scale, zero, output, rows.dtype, CODE_TYPES[kind], codes_per_byte, num_rows,
            out_features, num_groups, group_size,
        )  # fmt: skip
    return output
