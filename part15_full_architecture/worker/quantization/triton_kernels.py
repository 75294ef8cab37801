"""Products with matrices of codes on a GPU, in Triton: codes become numbers in registers, a tile at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..triton_attention import _jit, dot_size, to_numbers, triton
from .scheme import Scheme

if TYPE_CHECKING:
    from .weight import QuantizedWeight

if triton is not None:
    import triton.language as tl

MAX_TILE_ROWS, MIN_TILE_OUTPUTS = 64, 32  # of a program's output tile: with few rows, more programs with fewer outputs
MAX_TILE_BYTES = {2: 64, 4: 16}  # by bytes per number: of a matrix's row at once, before registers spill


def supports(scheme: Scheme) -> bool:
    """Whether there is a kernel for these codes: for integers and FP8, not for NF4, whose levels need a table."""
    return scheme.kind in ("int", "fp8")


def product(rows: Tensor, weight: QuantizedWeight) -> Tensor:
    """rows · matrixᵀ with weights as codes and activations as numbers (W8A16, W4A16): codes become numbers of rows'
    dtype right before they are multiplied.

    rows: [n, columns], in the order of the matrix's columns; weight: one matrix, with codes that are supported. Returns
    [n, rows of the matrix], of rows' dtype; sums are kept in float32. Raises RuntimeError if Triton is not installed.
    """
    if triton is None:
        raise RuntimeError("product needs the package triton, which is not installed (Linux: pip install triton)")
    rows, out_features = rows.contiguous(), len(weight.codes)
    output = rows.new_empty(len(rows), out_features)
    if not len(rows):
        return output
    codes = weight.codes.view(torch.uint8) if weight.scheme.kind == "fp8" else weight.codes  # what to_numbers expects
    codes_per_byte = weight.scheme.codes_per_byte
    tile_rows = min(MAX_TILE_ROWS, dot_size(len(rows)))
    tile_outputs = max(MIN_TILE_OUTPUTS, tile_rows)
    with torch.cuda.device_of(rows):  # Triton launches on the current device
        _product_kernel[(triton.cdiv(len(rows), tile_rows), triton.cdiv(out_features, tile_outputs))](
            rows, codes, weight.scale, weight.zero, output, len(rows), OUT_FEATURES=out_features,
            NUM_GROUPS=weight.scale.shape[1], GROUP_SIZE=weight.group_size, CODES_PER_BYTE=codes_per_byte,
            TILE_ROWS=tile_rows, TILE_OUTPUTS=tile_outputs,
            TILE_BYTES=min(MAX_TILE_BYTES[rows.element_size()], dot_size(weight.group_size // codes_per_byte)),
        )  # fmt: skip
    return output


@_jit
def _product_kernel(
    rows_ptr, codes_ptr, scale_ptr, zero_ptr, output_ptr, num_rows, OUT_FEATURES: tl.constexpr,
    NUM_GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, CODES_PER_BYTE: tl.constexpr, TILE_ROWS: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr, TILE_BYTES: tl.constexpr,
):  # fmt: skip
    """One program for some rows and some output features. Letters give the shapes: r(ow), o(utput), b(yte).

    A tile of bytes is in a single group, so each output has one scale in it. zero_ptr: None if all zero points are 0.
    """
    GROUP_BYTES: tl.constexpr = GROUP_SIZE // CODES_PER_BYTE
    TILES_PER_GROUP: tl.constexpr = (GROUP_BYTES + TILE_BYTES - 1) // TILE_BYTES
    # in int32, the offsets below overflow from 2³¹ elements on
    r = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    o = tl.program_id(1).to(tl.int64) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    b = tl.arange(0, TILE_BYTES)
    is_row, is_output = (r < num_rows)[:, None], o < OUT_FEATURES
    rows_ptr += r[:, None] * (NUM_GROUPS * GROUP_SIZE)
    codes_ptr += o[None, :] * (NUM_GROUPS * GROUP_BYTES)
    total = tl.zeros([TILE_ROWS, TILE_OUTPUTS], tl.float32)
    for tile in range(NUM_GROUPS * TILES_PER_GROUP):  # one loop and not two, so that tiles are loaded ahead
        group, byte = tile // TILES_PER_GROUP, tile % TILES_PER_GROUP * TILE_BYTES + b
        is_byte = byte < GROUP_BYTES
        codes = tl.load(
            codes_ptr + group * GROUP_BYTES + byte[:, None], mask=is_byte[:, None] & is_output[None, :], other=0
        )  # [b, o]
        scale = tl.load(scale_ptr + o * NUM_GROUPS + group, mask=is_output, other=0.0)
        zero = 0.0
        if zero_ptr is not None:
            zero = tl.load(zero_ptr + o * NUM_GROUPS + group, mask=is_output, other=0).to(tl.float32)[None, :]
        first = rows_ptr + group * GROUP_SIZE + byte[None, :]
        is_inner = is_row & is_byte[None, :]
        if CODES_PER_BYTE == 2:  # see packing.py::pack_nibbles: two runs of columns
            total = add_product(total, first, is_inner, (codes & 15) - 8, scale[None, :], zero)
            total = add_product(total, first + GROUP_BYTES, is_inner, (codes >> 4 & 15) - 8, scale[None, :], zero)
        else:
            total = add_product(total, first, is_inner, codes, scale[None, :], zero)
    output_offsets, is_inside = r[:, None] * OUT_FEATURES + o[None, :], is_row & is_output[None, :]
    tl.store(output_ptr + output_offsets, total.to(output_ptr.dtype.element_ty), mask=is_inside)


@_jit
def add_product(total, rows_ptr, is_inner, codes, scale, zero):
    """total: [r, o]; rows_ptr, is_inner: [r, b]; codes: [b, o]; scale, zero: [1, o]."""
    rows = tl.load(rows_ptr, mask=is_inner, other=0.0)
    numbers = (to_numbers(codes, tl.float32) - zero) * scale
    # "ieee": a GPU would otherwise round float32 operands to TF32's 10 bits; no effect on float16 and bfloat16
    return tl.dot(rows, numbers.to(rows.dtype), total, input_precision="ieee")
