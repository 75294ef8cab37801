"""Paged attention for decode as a Triton kernel: it reads the cache in place, without gathering a context first."""

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

TILE_SIZE = 32  # tokens that a program reads at once
MIN_DOT_SIZE = 16  # the shortest side that tl.dot accepts


def paged_decode(query: Tensor, kv_cache: Tensor, block_tables: Tensor, context_lens: Tensor, scale: float) -> Tensor:
    """Attention of one new token per sequence over its cached context (PagedAttention: Kwon et al., 2023).

    query: [num_seqs, num_heads, head_dim]. kv_cache: [num_blocks, block_size, 2, num_kv_heads, head_dim] of one layer,
    keys at 0 and values at 1, in any memory order that keeps a head's numbers side by side. block_tables: [num_seqs,
    max_blocks], int32; entries past a context's end are not read. context_lens: [num_seqs], int32, at least 1, the new
    token included. Returns [num_seqs, num_heads, head_dim] in query's dtype; sums are kept in float32.
    Raises RuntimeError if Triton is not installed.
    """
    if triton is None:
        raise RuntimeError("paged_decode needs the package triton, which is not installed (Linux: pip install triton)")
    num_seqs, num_heads, head_dim = query.shape
    block_size, num_kv_heads = kv_cache.shape[1], kv_cache.shape[3]
    assert num_heads % num_kv_heads == 0, f"{num_heads} query heads do not share {num_kv_heads} KV heads evenly"
    assert kv_cache.stride(4) == block_tables.stride(1) == context_lens.stride(0) == 1, "rows must be contiguous"
    query, output = query.contiguous(), torch.empty_like(query, memory_format=torch.contiguous_format)
    group_size = num_heads // num_kv_heads
    with torch.cuda.device_of(query):  # Triton launches on the current device
        _paged_decode_kernel[(num_seqs, num_kv_heads)](
            query, kv_cache, block_tables, context_lens, output, scale, *kv_cache.stride()[:4], block_tables.stride(0),
            GROUP_SIZE=group_size, HEAD_DIM=head_dim, BLOCK_SIZE=block_size, TILE_SIZE=TILE_SIZE,
            PADDED_GROUP_SIZE=dot_size(group_size), PADDED_HEAD_DIM=dot_size(head_dim),
        )  # fmt: skip
    return output


def dot_size(size: int) -> int:
    """The length that a side of tl.dot must be padded to: a power of two, at least MIN_DOT_SIZE."""
    return max(MIN_DOT_SIZE, triton.next_power_of_2(size))


def _jit(kernel: Callable[..., None]) -> Any:
    return kernel if triton is None else triton.jit(kernel)


@_jit
def _paged_decode_kernel(
    query_ptr, kv_cache_ptr, block_tables_ptr, context_lens_ptr, output_ptr, scale,
    block_stride, token_stride, value_stride, kv_head_stride, table_stride,
    GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE_SIZE: tl.constexpr,
    PADDED_GROUP_SIZE: tl.constexpr, PADDED_HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """One program per sequence and KV head: each key and value is read once for all query heads of its group.

    Online softmax (Milakov and Gimelshein, 2018): after every tile of tokens, `accumulator / total` is the attention
    over the tokens so far; a larger maximum rescales both. Letters give the shapes: g(roup), t(oken), d(imension).
    """
    seq, kv_head, num_kv_heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    g, t, d = tl.arange(0, PADDED_GROUP_SIZE), tl.arange(0, TILE_SIZE), tl.arange(0, PADDED_HEAD_DIM)
    is_dim = d[None, :] < HEAD_DIM
    heads = (seq * num_kv_heads + kv_head) * GROUP_SIZE + g
    query_offsets, is_query = heads[:, None] * HEAD_DIM + d[None, :], (g[:, None] < GROUP_SIZE) & is_dim
    query = tl.load(query_ptr + query_offsets, mask=is_query, other=0.0)  # [g, d]

    maximum = tl.full([PADDED_GROUP_SIZE], float("-inf"), tl.float32)
    total = tl.zeros([PADDED_GROUP_SIZE], tl.float32)
    accumulator = tl.zeros([PADDED_GROUP_SIZE, PADDED_HEAD_DIM], tl.float32)
    context_len = tl.load(context_lens_ptr + seq)
    for start in range(0, context_len, TILE_SIZE):
        positions = start + t
        in_context = positions < context_len  # where false, neither the table nor the cache is read
        block_ids = tl.load(
            block_tables_ptr + seq * table_stride + positions // BLOCK_SIZE, mask=in_context, other=0
        ).to(tl.int64)  # in int32, block · stride overflows from 2³¹ elements on
        offsets = block_ids * block_stride + positions % BLOCK_SIZE * token_stride + kv_head * kv_head_stride  # [t]
        key_ptr = kv_cache_ptr + offsets[:, None] + d[None, :]
        key = tl.load(key_ptr, mask=in_context[:, None] & is_dim, other=0.0)  # [t, d]
        value = tl.load(key_ptr + value_stride, mask=in_context[:, None] & is_dim, other=0.0)

        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale  # [g, t], float32
        scores = tl.where(in_context[None, :], scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        rescale = tl.exp(maximum - new_maximum)
        weights = tl.exp(scores - new_maximum[:, None])
        total = total * rescale + tl.sum(weights, axis=1)
        weighted = tl.dot(weights.to(value.dtype), value, input_precision="ieee")  # [g, d], float32
        accumulator = accumulator * rescale[:, None] + weighted
        maximum = new_maximum

    output = accumulator / total[:, None]
    tl.store(output_ptr + query_offsets, output.to(output_ptr.dtype.element_ty), mask=is_query)
