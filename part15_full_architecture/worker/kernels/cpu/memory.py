"""How the kernels of this folder get at the memory of tensors.

They are called dozens of times in a step, on a few rows each, so the time of a call counts as much as the work.
Tensor.numpy() takes 0.7 µs and data_ptr() 0.1: the kernels are given addresses, and they see them as arrays.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from ...cpu_attention import OPTIONS

# How a kernel sees the numbers of a dtype. NumPy has no bfloat16 and no FP8: kernels see their bits, as unsigned
# integers. Kernels take these zeros as arguments named `like…`: Numba compiles a version for each of their types.
LIKE = {
    torch.float32: np.float32(0), torch.bfloat16: np.uint16(0), torch.int8: np.int8(0), torch.uint8: np.uint8(0),
}  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16)  # of rows; for others, the reference is called
CACHE_LINE = 64  # bytes
EXACT: dict[str, Any] = {"nogil": True, "error_model": "numpy"}  # without fastmath: where each rounding counts


@intrinsic
def _pointer(typing_context, address, offset, like):
    """The address of a number, as a pointer to like's type. offset: in numbers."""

    def generate(context, builder, signature, arguments):
        base = builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))
        return builder.gep(base, [arguments[1]])

    return types.CPointer(like)(types.intp, types.intp, like), generate


@numba.njit(inline="always", **OPTIONS)
def numbers_at(address, offset, shape, like):
    """Numbers of like's type that begin `offset` numbers after an address: an array over the same memory."""
    return numba.carray(_pointer(address, offset, like), shape)


@intrinsic
def prefetch(typing_context, address):
    """Ask the CPU to bring the cache line at an address closer, and do not wait for it."""

    def generate(context, builder, signature, arguments):
        pointer, int32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        function_type = ir.FunctionType(ir.VoidType(), [pointer, int32, int32, int32])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], function_type)
        to_read, to_all_caches, data = int32(0), int32(3), int32(1)
        builder.call(function, [builder.inttoptr(arguments[0], pointer), to_read, to_all_caches, data])
        return context.get_dummy_value()

    return types.void(types.intp), generate


def from_float32(number: Any, like: Any) -> Any:
    """A float32 as it is stored, rounded to nearest even. The code depends on like's type: see _from_float32."""
    raise NotImplementedError("from_float32 works only inside a kernel")


@overload(from_float32)
def _from_float32(number, like):
    if like == numba.uint16:
        return lambda number, like: to_bfloat16(number)
    return lambda number, like: number


@numba.njit(**OPTIONS)
def to_bfloat16(number):
    """The upper 16 bits. What is added carries into them if the lower half is more than 0x8000, or is that and the
    number above it is odd. A NaN could overflow, so it becomes one that is known."""
    bits = np.float32(number).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.uint16(rounded) if number == number else np.uint16(0x7FC0)
