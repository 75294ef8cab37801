"""RoPE and the write to the KV cache on the CPU, in Numba: each query, key and value is read once and written once."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from numba.extending import overload
from torch import Tensor

from ...cpu_attention import OPTIONS, _jit_cached, to_float32
from .. import reference
from .memory import DTYPES, EXACT, LIKE, from_float32, numbers_at

CODE_DTYPES = (torch.int8, torch.uint8)
ROUND = np.float32(1.5 * 2**23)  # a float32 of this size has no fraction: adding it rounds, and the low bits are n
INT8_MAX, FP8_MAX = np.float32(127), np.float32(448)
SMALLEST_NORMAL = np.float32(2.0**-6)  # of e4m3
ROUND_SUBNORMAL = np.float32(2.0**14)  # adding it rounds to multiples of 2⁻⁹, e4m3's steps below SMALLEST_NORMAL


def rotate_and_store(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor, table: Tensor, kv_cache: Tensor, slot_mapping: Tensor,
    scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See reference.py::rotate_and_store.

    query, key and value have the same dtype, float32 or bfloat16, and may be slices of one tensor's rows: only their
    first dimension may have a stride. table is float32 or bfloat16, the KV cache any of these, or codes with scales;
    float16 goes to the reference. All but query, key and value are contiguous. Positions and slots are not checked. In
    one thread, without the GIL.
    """
    dtype, cache_dtype = query.dtype, kv_cache.dtype
    if dtype not in DTYPES or table.dtype not in DTYPES or cache_dtype not in LIKE:
        return reference.rotate_and_store(query, key, value, positions, table, kv_cache, slot_mapping, scales)
    (num_tokens, num_heads, head_dim), num_kv_heads = query.shape, key.shape[1]
    strides = query.stride(), key.stride(), value.stride()
    are_rows = strides[0][1:] == strides[1][1:] == strides[2][1:] == (head_dim, 1)
    assert are_rows, f"the heads of a token must be contiguous, got strides {strides}"
    assert key.shape == value.shape == (num_tokens, num_kv_heads, head_dim), f"got {key.shape} and {value.shape}"
    assert dtype == key.dtype == value.dtype, f"got {dtype}, {key.dtype} and {value.dtype}"
    assert kv_cache.shape[2:] == (2, num_kv_heads, head_dim) and kv_cache.is_contiguous(), f"cache: {kv_cache.shape}"
    assert table.shape[1] == head_dim and table.is_contiguous(), f"table: {table.shape}, for head_dim {head_dim}"
    assert positions.shape == slot_mapping.shape == (num_tokens,), f"got {positions.shape} and {slot_mapping.shape}"
    are_int64 = positions.dtype == slot_mapping.dtype == torch.int64  # in int32, slots would be read wrongly
    assert are_int64 and positions.is_contiguous() and slot_mapping.is_contiguous(), "expected contiguous int64"
    assert (scales is not None) == (cache_dtype in CODE_DTYPES), f"a cache of {cache_dtype}, and scales are {scales}"
    assert scales is None or (scales.shape == (2, num_kv_heads) and scales.is_contiguous()), f"scales: {scales}"
    output = query.new_empty(num_tokens, num_heads, head_dim)
    _rotate_and_store_kernel(
        query.data_ptr(), strides[0][0], key.data_ptr(), strides[1][0], value.data_ptr(), strides[2][0],
        positions.data_ptr(), table.data_ptr(), kv_cache.data_ptr(), slot_mapping.data_ptr(),
        0 if scales is None else scales.data_ptr(), output.data_ptr(), num_tokens, num_heads, num_kv_heads, head_dim,
        LIKE[dtype], LIKE[table.dtype], LIKE[cache_dtype],
    )  # fmt: skip
    return output


@_jit_cached
def _rotate_and_store_kernel(
    query, query_stride, key, key_stride, value, value_stride, positions, table, kv_cache, slot_mapping, scales,
    output, num_tokens, num_heads, num_kv_heads, head_dim, like, table_like, cache_like,
):  # fmt: skip
    """Tensors are addresses; that of scales may be 0. Strides are in numbers, from a token to the next."""
    size, kv_size = num_heads * head_dim, num_kv_heads * head_dim
    positions = numbers_at(positions, 0, num_tokens, np.int64(0))
    slot_mapping = numbers_at(slot_mapping, 0, num_tokens, np.int64(0))
    angles, rotated_key = np.empty(head_dim, np.float32), np.full(kv_size, like)
    for token in range(num_tokens):
        stored_angles = numbers_at(table, positions[token] * head_dim, head_dim, table_like)
        for i in range(head_dim):
            angles[i] = to_float32(stored_angles[i])
        rotated_query = numbers_at(output, token * size, size, like)
        rotate(rotated_query, numbers_at(query, token * query_stride, size, like), angles, like)
        slot = slot_mapping[token]
        if slot >= 0:
            rotate(rotated_key, numbers_at(key, token * key_stride, kv_size, like), angles, like)
            keys = numbers_at(kv_cache, 2 * slot * kv_size, kv_size, cache_like)
            store(keys, rotated_key, scales, 0, head_dim, cache_like)
            values = numbers_at(kv_cache, (2 * slot + 1) * kv_size, kv_size, cache_like)
            heads = numbers_at(value, token * value_stride, kv_size, like)
            store(values, heads, scales, num_kv_heads, head_dim, cache_like)


@numba.njit(inline="always", **OPTIONS)
def rotate(output, heads, angles, like):
    """output, heads: [num_heads · head_dim]; angles: [head_dim]. Dimension i pairs with i + head_dim / 2."""
    half = len(angles) // 2
    cos, sin = angles[:half], angles[half:]
    for head in range(len(heads) // len(angles)):
        start = head * len(angles)  # LLVM vectorizes this, but not a range with a step
        for i in range(half):
            first, second = to_float32(heads[start + i]), to_float32(heads[start + half + i])
            output[start + i] = from_float32(first * cos[i] - second * sin[i], like)
            output[start + half + i] = from_float32(second * cos[i] + first * sin[i], like)


@numba.njit(inline="always", **OPTIONS)
def store(stored, heads, scales, first_scale, head_dim, like):
    """stored, heads: [num_kv_heads · head_dim]. scales: an address, or 0 if numbers are stored as they are."""
    num_kv_heads = len(heads) // head_dim
    for head in range(num_kv_heads):
        scale = np.float32(1) if scales == 0 else numbers_at(scales, first_scale, num_kv_heads, np.float32(0))[head]
        start = head * head_dim
        for i in range(head_dim):
            stored[start + i] = to_stored(to_float32(heads[start + i]), scale, like)


def to_stored(number: Any, scale: Any, like: Any) -> Any:
    """A float32 as a cache stores it. The code depends on like's type: see _to_stored."""
    raise NotImplementedError("to_stored works only inside a kernel")


@overload(to_stored)
def _to_stored(number, scale, like):
    if like == numba.int8:
        return lambda number, scale, like: to_int8(number, scale)
    if like == numba.uint8:
        return lambda number, scale, like: to_fp8(number, scale)
    return lambda number, scale, like: from_float32(number, like)


@numba.njit(**EXACT)
def to_int8(number, scale):
    """number / scale, rounded to nearest even."""
    scaled = number / scale
    scaled = -INT8_MAX if scaled < -INT8_MAX else scaled
    scaled = INT8_MAX if scaled > INT8_MAX else scaled
    return np.int8(np.float32(scaled + ROUND).view(np.int32))


@numba.njit(**EXACT)
def to_fp8(number, scale):
    """number / scale as e4m3: a sign, 4 bits of exponent, 3 of fraction. The largest code is 448, and 0x7F is NaN.

    Rounded to nearest even: see norm.py::to_bfloat16, which drops 16 bits as this drops 20. Then the exponent, which
    float32 stores plus 127, and e4m3 plus 7.
    """
    scaled = number / scale
    sign = (np.float32(scaled).view(np.int32) >> np.int32(24)) & np.int32(0x80)
    size = abs(scaled)
    size = FP8_MAX if size > FP8_MAX else size
    bits = np.float32(size).view(np.int32)
    rounded = np.int32(np.int32(bits + np.int32(0x7FFFF)) + ((bits >> np.int32(20)) & np.int32(1)))
    code = np.int32(rounded >> np.int32(20)) - np.int32((127 - 7) << 3)
    if size < SMALLEST_NORMAL:
        code = np.float32(size + ROUND_SUBNORMAL).view(np.int32) & np.int32(0xF)
    if size != size:
        code = np.int32(0x7F)
    return np.uint8(code | sign)
