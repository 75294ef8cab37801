"""Dense attention with any mask in CUDA C++, as one kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from .library import Library


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """softmax(query · keyᵀ · scale where mask) · value; the scores never go to memory (FlashAttention: Dao et
    al., 2022).

    query: [batch, num_heads, num_queries, head_dim]; key, value: [batch, num_heads, num_keys, head_dim]; of one dtype:
    float32, float16 or bfloat16. mask: [num_queries, num_keys], bool, True where a query sees a key. All contiguous.
    Returns query's shape and dtype; zeros for a query that sees nothing. Raises KernelError if head_dim is over 256.
    """
    batch, num_heads, num_queries, head_dim = query.shape
    num_keys = key.shape[2]
    assert key.shape == value.shape == (batch, num_heads, num_keys, head_dim), (
        f"key has shape {tuple(key.shape)}, value {tuple(value.shape)}: "
        f"expected [{batch}, {num_heads}, num_keys, {head_dim}]"
    )
    assert query.dtype == key.dtype == value.dtype, "query, key and value must have the same dtype"
    assert mask.shape == (num_queries, num_keys) and mask.dtype == torch.bool, (
        f"mask is {tuple(mask.shape)}, {mask.dtype}: expected [{num_queries}, {num_keys}], bool"
    )
    for name, tensor in (("query", query), ("key", key), ("value", value), ("mask", mask)):
        assert tensor.is_contiguous(), f"{name} must be contiguous"
    output = torch.empty_like(query)
    Library("masked_attention").call(
        "masked_attention", query, key, value, mask, output, query.dtype, batch * num_heads, num_queries, num_keys,
        head_dim, float(scale),
    )  # fmt: skip
    return output
