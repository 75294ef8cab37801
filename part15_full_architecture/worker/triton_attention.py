"""Paged attention as a Triton kernel: decodes and prompt chunks in one launch, reading the cache in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton exists only for Linux, but this module must import everywhere
    triton = None

TILE_SIZE = 32  # tokens of the context that a program reads at once
MAX_TILE_ROWS = {2: 64, 4: 32}  # by bytes per number: rows (token · head) per program before registers spill
MIN_DOT_SIZE = 16  # the shortest side that tl.dot accepts


def paged_attention(
    query: Tensor, kv_cache: Tensor, block_tables: Tensor, query_start_loc: Tensor, context_lens: Tensor,
    max_query_len: int, scale: float,
) -> Tensor:  # fmt: skip
    """Causal attention of each sequence's new tokens over its cached context, for any number of new tokens.

    PagedAttention (Kwon et al., 2023) over sequences laid end to end, as FlashAttention-2's varlen kernels take them
    (Dao, 2023). The mask is aligned at the bottom right: in a sequence with q new tokens and a context of c, query i
    is at position c - q + i and sees keys 0 to c - q + i.

    query: [num_tokens, num_heads, head_dim]. kv_cache: [num_blocks, block_size, 2, num_kv_heads, head_dim] of one
    layer, keys at 0 and values at 1, in any memory order that keeps a head's numbers side by side, as numbers or as
    codes without scales: int8, or uint8 for FP8; the new tokens' are there already. block_tables: [num_seqs,
    max_blocks], int32; entries past a context's end are not read. query_start_loc: [num_seqs + 1], int32, where each
    sequence's queries begin. context_lens: [num_seqs], int32, the new tokens included. max_query_len: at least the
    longest sequence's number of new tokens; a number on the host, so a launch does not wait for the device. Returns
    query's shape and dtype; sums are kept in float32. Raises RuntimeError if Triton is not installed.
    """
    if triton is None:
        raise RuntimeError(
            "paged_attention needs the package triton, which is not installed (Linux: pip install triton)"
        )
    _, num_heads, head_dim = query.shape
    block_size, num_kv_heads = kv_cache.shape[1], kv_cache.shape[3]
    group_size = num_heads // num_kv_heads
    assert num_heads % num_kv_heads == 0, f"{num_heads} query heads do not share {num_kv_heads} KV heads evenly"
    row_strides = (kv_cache.stride(4), block_tables.stride(1), query_start_loc.stride(0), context_lens.stride(0))
    assert row_strides == (1, 1, 1, 1), f"rows must be contiguous, got strides of {row_strides}"
    query, output = query.contiguous(), torch.empty_like(query, memory_format=torch.contiguous_format)
    max_rows = max(MAX_TILE_ROWS[query.element_size()], dot_size(group_size))
    tile_rows = min(dot_size(max_query_len * group_size), max_rows)  # few if every sequence decodes
    grid = (len(context_lens), num_kv_heads, triton.cdiv(max_query_len, tile_rows // group_size))
    with torch.cuda.device_of(query):  # Triton launches on the current device
        _paged_attention_kernel[grid](
            query, kv_cache, block_tables, query_start_loc, context_lens, output, scale, *kv_cache.stride()[:4],
            block_tables.stride(0), GROUP_SIZE=group_size, HEAD_DIM=head_dim, BLOCK_SIZE=block_size,
            TILE_SIZE=TILE_SIZE, TILE_ROWS=tile_rows, PADDED_HEAD_DIM=dot_size(head_dim),
        )  # fmt: skip
    return output


def dot_size(size: int) -> int:
    """The length that a side of tl.dot must be padded to: a power of two, at least MIN_DOT_SIZE."""
    return max(MIN_DOT_SIZE, triton.next_power_of_2(size))


def _jit(kernel: Callable[..., None]) -> Any:
    return kernel if triton is None else triton.jit(kernel)


@_jit
def to_numbers(stored, dtype: tl.constexpr):
    """What the cache has, in the query's dtype. The bits of e4m3 are a float32's with another offset of the exponent:
    not all GPUs have a type for them."""
    if stored.dtype == tl.uint8:
        bits = stored.to(tl.int32)
        bits = ((bits & 0x7F) << 20) | ((bits & 0x80) << 24)
        return (bits.to(tl.float32, bitcast=True) * 1.329227995784916e36).to(dtype)  # 2^120
    return stored.to(dtype)


@_jit
def _paged_attention_kernel(
    query_ptr, kv_cache_ptr, block_tables_ptr, query_start_loc_ptr, context_lens_ptr, output_ptr, scale,
    block_stride, token_stride, value_stride, kv_head_stride, table_stride,
    GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE_SIZE: tl.constexpr,
    TILE_ROWS: tl.constexpr, PADDED_HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """One program per sequence, KV head and tile of queries: all heads of the group for a few tokens.

    Online softmax (Milakov and Gimelshein, 2018): after every tile of keys, `accumulator / total` is the attention
    over the keys so far; a larger maximum rescales both. Letters give the shapes: r(ow), k(ey), d(imension).
    """
    seq, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    TILE_TOKENS: tl.constexpr = TILE_ROWS // GROUP_SIZE
    first_token = tl.program_id(2) * TILE_TOKENS
    query_start = tl.load(query_start_loc_ptr + seq)
    query_len = tl.load(query_start_loc_ptr + seq + 1) - query_start
    if first_token >= query_len:  # the grid is as deep as the longest sequence needs
        return
    num_past = tl.load(context_lens_ptr + seq) - query_len
    # tiles past the diagonal are skipped; keys from num_keys on are not read, so stale values cannot leak in
    num_keys = num_past + tl.minimum(first_token + TILE_TOKENS, query_len)

    r, k, d = tl.arange(0, TILE_ROWS), tl.arange(0, TILE_SIZE), tl.arange(0, PADDED_HEAD_DIM)
    tokens, is_dim = first_token + r // GROUP_SIZE, d[None, :] < HEAD_DIM  # a token's heads are neighboring rows
    is_row = (r < TILE_TOKENS * GROUP_SIZE) & (tokens < query_len)  # a group of 3 leaves one row of 64 unused
    heads = ((query_start + tokens) * tl.num_programs(1) + kv_head) * GROUP_SIZE + r % GROUP_SIZE
    query_offsets, is_query = heads[:, None] * HEAD_DIM + d[None, :], is_row[:, None] & is_dim
    query = tl.load(query_ptr + query_offsets, mask=is_query, other=0.0)  # [r, d]

    maximum = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([TILE_ROWS], tl.float32)
    accumulator = tl.zeros([TILE_ROWS, PADDED_HEAD_DIM], tl.float32)
    for start in range(0, num_keys, TILE_SIZE):
        positions = start + k
        in_context = positions < num_keys  # where false, neither the table nor the cache is read
        block_ids = tl.load(
            block_tables_ptr + seq * table_stride + positions // BLOCK_SIZE, mask=in_context, other=0
        ).to(tl.int64)  # in int32, block · stride overflows from 2³¹ elements on
        offsets = block_ids * block_stride + positions % BLOCK_SIZE * token_stride + kv_head * kv_head_stride  # [k]
        key_ptr = kv_cache_ptr + offsets[:, None] + d[None, :]
        key = tl.load(key_ptr, mask=in_context[:, None] & is_dim, other=0)  # [k, d]
        value = tl.load(key_ptr + value_stride, mask=in_context[:, None] & is_dim, other=0)
        key, value = to_numbers(key, query.dtype), to_numbers(value, query.dtype)

        # "ieee": a GPU would otherwise round float32 operands to TF32's 10 bits; no effect on float16 and bfloat16
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale  # [r, k], float32
        is_visible = positions[None, :] <= (num_past + tokens)[:, None]  # key 0 always is, so each maximum is finite
        scores = tl.where(is_visible, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        rescale = tl.exp(maximum - new_maximum)
        weights = tl.exp(scores - new_maximum[:, None])
        total = total * rescale + tl.sum(weights, axis=1)
        weighted = tl.dot(weights.to(value.dtype), value, input_precision="ieee")  # [r, d], float32
        accumulator = accumulator * rescale[:, None] + weighted
        maximum = new_maximum

    output = accumulator / total[:, None]
    tl.store(output_ptr + query_offsets, output.to(output_ptr.dtype.element_ty), mask=is_query)
