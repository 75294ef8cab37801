"""RoPE and the write to the KV cache in CUDA C++, as one kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from .library import Library

CODE_DTYPES = (torch.int8, torch.uint8)


def rotate_and_store(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor, table: Tensor, kv_cache: Tensor, slot_mapping: Tensor,
    scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Rotate queries and keys by their positions (RoPE), and write keys and values to their slots of the KV cache.

    query: [num_tokens, num_heads, head_dim]; key, value: [num_tokens, num_kv_heads, head_dim]; float32, float16 or
    bfloat16. Tokens may have a stride: the three are slices of one projection. positions, slot_mapping: [num_tokens],
    int64; a token with slot -1 is not stored. table: [max_positions, head_dim], cosines then sines, of float32 or
    query's dtype. kv_cache: [num_blocks, block_size, 2, num_kv_heads, head_dim] of one layer, contiguous, of query's
    dtype, or int8 codes, or FP8 e4m3 codes as uint8. scales: [2, num_kv_heads], float32, for codes.
    Returns the rotated queries, contiguous. (RoPE: Su et al., 2021)
    """
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[1]
    for name, heads, count in (("query", query, num_heads), ("key", key, num_kv_heads), ("value", value, num_kv_heads)):
        assert heads.shape == (num_tokens, count, head_dim), f"{name} has shape {tuple(heads.shape)}"
        assert heads.dtype == query.dtype, f"{name} is {heads.dtype}, query {query.dtype}: expected the same dtype"
        assert heads[:1].is_contiguous(), f"only the first dimension of {name} may have a stride"
    assert head_dim % 2 == 0, f"head_dim is {head_dim}: expected an even number"
    for name, tensor in (("positions", positions), ("slot_mapping", slot_mapping)):
        assert tensor.shape == (num_tokens,) and tensor.dtype == torch.int64, f"{name} must be [{num_tokens}], int64"
        assert tensor.is_contiguous(), f"{name} must be contiguous"
    assert table.shape[1] == head_dim and table.is_contiguous(), f"table must be [max_positions, {head_dim}]"
    assert table.dtype in (torch.float32, query.dtype), f"table is {table.dtype}: expected float32 or {query.dtype}"
    assert kv_cache.shape[2:] == (2, num_kv_heads, head_dim) and kv_cache.is_contiguous(), (
        f"kv_cache has shape {tuple(kv_cache.shape)}: expected [num_blocks, block_size, 2, {num_kv_heads}, {head_dim}]"
    )
    if kv_cache.dtype in CODE_DTYPES:
        assert scales is not None and scales.shape == (2, num_kv_heads), f"codes need scales: [2, {num_kv_heads}]"
        assert scales.dtype == torch.float32 and scales.is_contiguous(), "scales must be float32 and contiguous"
    else:
        assert scales is None and kv_cache.dtype == query.dtype, f"kv_cache is {kv_cache.dtype}, query {query.dtype}"
    rotated = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    Library("rotary").call(
        "rotate_and_store", query, key, value, positions, table, kv_cache, slot_mapping, scales, rotated,
        query.dtype, kv_cache.dtype, table.dtype, num_tokens, num_heads, num_kv_heads, head_dim,
        query.stride(0), key.stride(0), value.stride(0),
    )  # fmt: skip
    return rotated
