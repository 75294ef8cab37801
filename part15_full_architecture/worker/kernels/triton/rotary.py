"""Rotary position embedding and the write to the KV cache, in one Triton kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from ...triton_attention import _jit, triton

if triton is not None:
    import triton.language as tl

PAIRS_PER_WARP = 256  # of a group's query heads: 8 pairs for each thread


def rotate_and_store(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor, table: Tensor, kv_cache: Tensor, slot_mapping: Tensor,
    scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Rotate queries and keys by their positions (RoPE: Su et al., 2021), and write keys and values to their slots.

    query: [num_tokens, num_heads, head_dim]; key, value: [num_tokens, num_kv_heads, head_dim]: rows may have a stride,
    as slices of one tensor have; heads are contiguous. positions: [num_tokens], int64. table: [max_positions,
    head_dim], cosines then sines. kv_cache: [num_blocks, block_size, 2, num_kv_heads, head_dim] of one layer, in any
    memory order that keeps a head's numbers side by side. slot_mapping: [num_tokens], int64; tokens with slot -1 are
    not written. scales: [2, num_kv_heads], float32, if the cache has codes: int8, from -127 to 127, or FP8 (e4m3) as
    uint8, up to ±448. Numbers out of range become the largest code. A key is rounded to its own dtype before it becomes
    a code, as it is in torch.

    Returns the rotated queries, contiguous. Raises RuntimeError if Triton is not installed.
    """
    if triton is None:
        raise RuntimeError(
            "rotate_and_store needs the package triton, which is not installed (Linux: pip install triton)"
        )
    num_tokens, num_heads, head_dim = query.shape
    block_size, _, num_kv_heads = kv_cache.shape[1:4]
    group_size = num_heads // num_kv_heads
    assert num_heads % num_kv_heads == 0, f"{num_heads} query heads do not share {num_kv_heads} KV heads evenly"
    assert head_dim % 2 == 0, f"dimensions are rotated in pairs, got heads of {head_dim}"
    for name, heads in (("query", query), ("key", key), ("value", value)):
        is_packed = heads.stride(2) == 1 and (heads.shape[1] == 1 or heads.stride(1) == head_dim)
        assert is_packed, f"the heads of {name} must be contiguous, got strides of {heads.stride()}"
    assert kv_cache.stride(4) == 1, f"a head in the cache must be contiguous, got strides of {kv_cache.stride()}"
    for name, tensor in (("positions", positions), ("slot_mapping", slot_mapping), ("table", table)):
        assert tensor.is_contiguous(), f"{name} must be contiguous, got strides of {tensor.stride()}"
    has_codes = kv_cache.dtype in (torch.int8, torch.uint8)
    assert has_codes == (scales is not None), f"scales go with a cache of codes, got {kv_cache.dtype} and {scales}"
    assert scales is None or scales.is_contiguous(), "scales must be contiguous"

    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    num_pairs = triton.next_power_of_2(group_size) * triton.next_power_of_2(head_dim // 2)
    with torch.cuda.device_of(query):  # Triton launches on the current device
        _rotate_and_store_kernel[(num_tokens, num_kv_heads)](
            query, key, value, positions, table, kv_cache, slot_mapping, scales, output, query.stride(0),
            key.stride(0), value.stride(0), *kv_cache.stride()[:4], GROUP_SIZE=group_size, HEAD_DIM=head_dim,
            BLOCK_SIZE=block_size, PADDED_GROUP_SIZE=triton.next_power_of_2(group_size),
            PADDED_HALF=triton.next_power_of_2(head_dim // 2), num_warps=min(4, max(1, num_pairs // PAIRS_PER_WARP)),
        )  # fmt: skip
    return output


@_jit
def _rotate_and_store_kernel(
    query_ptr, key_ptr, value_ptr, positions_ptr, table_ptr, kv_cache_ptr, slot_mapping_ptr, scales_ptr, output_ptr,
    query_stride, key_stride, value_stride, block_stride, token_stride, kv_stride, kv_head_stride,
    GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, PADDED_GROUP_SIZE: tl.constexpr,
    PADDED_HALF: tl.constexpr,
):  # fmt: skip
    """One program per token and KV head: the group's query heads, the key and the value.

    A pair is dimension i of the first half of a head and dimension i of the second. scales_ptr: None for a cache of
    numbers. Letters give the shapes: g(roup's head), d(imension of a half).
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    token, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    g, d = tl.arange(0, PADDED_GROUP_SIZE), tl.arange(0, PADDED_HALF)
    is_dim = d < HALF
    angle_ptr = table_ptr + tl.load(positions_ptr + token) * HEAD_DIM + d
    cos = tl.load(angle_ptr, mask=is_dim, other=0.0).to(tl.float32)  # [d]
    sin = tl.load(angle_ptr + HALF, mask=is_dim, other=0.0).to(tl.float32)

    heads = kv_head * GROUP_SIZE + g
    offsets, is_pair = heads[:, None] * HEAD_DIM + d[None, :], (g < GROUP_SIZE)[:, None] & is_dim[None, :]
    first, second = load_halves(query_ptr + token * query_stride + offsets, is_pair, HALF)  # [g, d]
    first, second = rotate(first, second, cos[None, :], sin[None, :])
    output_ptr += token * tl.num_programs(1) * GROUP_SIZE * HEAD_DIM
    store_halves(output_ptr + offsets, first, second, is_pair, HALF)

    slot = tl.load(slot_mapping_ptr + token)  # int64: in int32, block · stride overflows from 2³¹ elements on
    if slot >= 0:
        cache_ptr = kv_cache_ptr + slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * token_stride
        cache_ptr += kv_head * kv_head_stride + d
        key_first, key_second = load_halves(key_ptr + token * key_stride + kv_head * HEAD_DIM + d, is_dim, HALF)  # [d]
        key_first, key_second = rotate(key_first, key_second, cos, sin)
        dtype: tl.constexpr = key_ptr.dtype.element_ty  # a code is made of the key as it is without codes: rounded
        key_first, key_second = key_first.to(dtype).to(tl.float32), key_second.to(dtype).to(tl.float32)
        store_codes(cache_ptr, key_first, key_second, scales_ptr, kv_head, is_dim, HALF)

        first_ptr, value_scale = value_ptr + token * value_stride + kv_head * HEAD_DIM + d, tl.num_programs(1) + kv_head
        value_first, value_second = load_halves(first_ptr, is_dim, HALF)
        store_codes(cache_ptr + kv_stride, value_first, value_second, scales_ptr, value_scale, is_dim, HALF)


@_jit
def load_halves(first_ptr, mask, HALF: tl.constexpr):
    """The first and the second half of heads, in float32."""
    first = tl.load(first_ptr, mask=mask, other=0.0).to(tl.float32)
    return first, tl.load(first_ptr + HALF, mask=mask, other=0.0).to(tl.float32)


@_jit
def store_halves(first_ptr, first, second, mask, HALF: tl.constexpr):
    tl.store(first_ptr, first.to(first_ptr.dtype.element_ty), mask=mask)
    tl.store(first_ptr + HALF, second.to(first_ptr.dtype.element_ty), mask=mask)


@_jit
def store_codes(first_ptr, first, second, scales_ptr, scale_index, mask, HALF: tl.constexpr):
    """store_halves() as codes, or as numbers if scales_ptr is None."""
    if scales_ptr is None:
        store_halves(first_ptr, first, second, mask, HALF)
    else:
        scale = tl.load(scales_ptr + scale_index)
        dtype: tl.constexpr = first_ptr.dtype.element_ty
        store_halves(first_ptr, to_codes(first, scale, dtype), to_codes(second, scale, dtype), mask, HALF)


@_jit
def rotate(first, second, cos, sin):
    """Turn each pair by its angle."""
    return first * cos - second * sin, second * cos + first * sin


@_jit
def to_codes(numbers, scale, dtype: tl.constexpr):
    """numbers / scale as codes, int8 or uint8 for FP8, rounded to the nearest, ties to even."""
    scaled = tl.div_rn(numbers, scale)  # a GPU's `/` may be off by two units in the last place, which moves ties
    if dtype == tl.int8:
        clamped = tl.minimum(tl.maximum(scaled, -127.0), 127.0)
        codes = ((clamped + 12582912.0) - 12582912.0).to(tl.int8)  # at 1.5 · 2²³, a float32 has no room for a fraction
    else:
        codes = to_e4m3(scaled)
    return codes


@_jit
def to_e4m3(numbers):
    """The bits of e4m3, the nearest, ties to even; numbers out of range become ±448, NaN stays NaN.

    By integer operations: Triton casts to tl.float8e4nv only from sm_89 on, and on sm_89 itself it truncates to float16
    first, which moves numbers right above a tie onto it. e4m3 has 3 bits of fraction and exponents from 2⁻⁶ to 2⁸, a
    float32 23 bits and exponents stored plus 127.
    """
    bits = numbers.to(tl.int32, bitcast=True)
    sign, magnitude = (bits >> 24) & 0x80, bits & 0x7FFFFFFF
    is_nan = magnitude > 0x7F800000
    magnitude = tl.minimum(magnitude, 0x43E00000)  # 448
    # drop 20 bits of the fraction: adding half of what they can hold, less 1 if the code is even, carries as rounding
    # does. Then count exponents from -7 and not from -127.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # below 2⁻⁶, codes are multiples of 2⁻⁹, which is the last place of float32 numbers from 2¹⁴ on
    small = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) & 0xFF
    code = tl.where(magnitude < 0x3C800000, small, normal)  # 2⁻⁶
    return (sign | tl.where(is_nan, 0x7F, code)).to(tl.uint8)
