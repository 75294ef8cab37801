"""Dense attention with any mask, in Triton: the scores are never in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from ...triton_attention import _jit, dot_size, triton

if triton is not None:
    import triton.language as tl

MAX_TILE_QUERIES, MAX_TILE_BYTES = 64, 16_384  # queries of a program: if they were more, registers would spill
TILE_KEYS = {2: 32, 4: 16}  # by bytes per number: keys that a program reads at once


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """softmax(query · keyᵀ · scale where mask) · value, as FlashAttention computes it (Dao et al., 2022).

    query: [batch, num_heads, num_queries, head_dim]; key, value: [batch, num_heads, num_keys, head_dim]; mask:
    [num_queries, num_keys], bool, True where a query sees a key. All are contiguous; float32, float16 or bfloat16.
    Returns query's shape and dtype; zeros for a query that sees nothing. Sums are kept in float32; weights are rounded
    to value's dtype before they are multiplied, since tensor cores need both operands alike. Raises RuntimeError if
    Triton is not installed.
    """
    if triton is None:
        raise RuntimeError(
            "masked_attention needs the package triton, which is not installed (Linux: pip install triton)"
        )
    batch_size, num_heads, num_queries, head_dim = query.shape
    num_keys = key.shape[2]
    expected = (batch_size, num_heads, num_keys, head_dim)
    assert key.shape == value.shape == expected, (
        f"expected keys and values {list(expected)}, got {list(key.shape)} and {list(value.shape)}"
    )
    assert mask.shape == (num_queries, num_keys) and mask.dtype == torch.bool, (
        f"mask: expected torch.bool {[num_queries, num_keys]}, got {mask.dtype} {list(mask.shape)}"
    )
    for name, tensor in (("query", query), ("key", key), ("value", value), ("mask", mask)):
        assert tensor.is_contiguous(), f"{name} must be contiguous, got strides of {tensor.stride()}"
    output = torch.empty_like(query)
    padded_head_dim, element_size = dot_size(head_dim), query.element_size()
    max_queries = min(MAX_TILE_QUERIES, MAX_TILE_BYTES // (padded_head_dim * element_size))
    tile_queries = min(max_queries, dot_size(num_queries))
    with torch.cuda.device_of(query):  # Triton launches on the current device
        _masked_attention_kernel[(triton.cdiv(num_queries, tile_queries), num_heads, batch_size)](
            query, key, value, mask, output, num_queries, num_keys, scale, HEAD_DIM=head_dim,
            TILE_QUERIES=tile_queries, TILE_KEYS=TILE_KEYS[element_size], PADDED_HEAD_DIM=padded_head_dim,
        )  # fmt: skip
    return output


@_jit
def _masked_attention_kernel(
    query_ptr, key_ptr, value_ptr, mask_ptr, output_ptr, num_queries, num_keys, scale, HEAD_DIM: tl.constexpr,
    TILE_QUERIES: tl.constexpr, TILE_KEYS: tl.constexpr, PADDED_HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """One program per tile of queries and head. Online softmax (Milakov and Gimelshein, 2018): after every tile of
    keys, `accumulator / total` is the attention over the keys so far. Letters give the shapes: q(uery), k(ey),
    d(imension)."""
    # in int32, offsets overflow from 2³¹ elements on
    head = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    q = tl.program_id(0).to(tl.int64) * TILE_QUERIES + tl.arange(0, TILE_QUERIES)
    k, d = tl.arange(0, TILE_KEYS), tl.arange(0, PADDED_HEAD_DIM)
    is_query, is_dim = q < num_queries, d[None, :] < HEAD_DIM
    query_offsets, is_inside = (head * num_queries + q)[:, None] * HEAD_DIM + d[None, :], is_query[:, None] & is_dim
    query = tl.load(query_ptr + query_offsets, mask=is_inside, other=0.0)  # [q, d]

    maximum = tl.full([TILE_QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([TILE_QUERIES], tl.float32)
    accumulator = tl.zeros([TILE_QUERIES, PADDED_HEAD_DIM], tl.float32)
    for start in range(0, num_keys, TILE_KEYS):
        positions = start + k
        is_key = positions < num_keys
        offsets = (head * num_keys + positions)[:, None] * HEAD_DIM + d[None, :]
        key = tl.load(key_ptr + offsets, mask=is_key[:, None] & is_dim, other=0.0)  # [k, d]
        value = tl.load(value_ptr + offsets, mask=is_key[:, None] & is_dim, other=0.0)
        is_pair = is_query[:, None] & is_key[None, :]
        is_visible = tl.load(mask_ptr + q[:, None] * num_keys + positions[None, :], mask=is_pair, other=0) != 0

        # "ieee": a GPU would otherwise round float32 operands to TF32's 10 bits; no effect on float16 and bfloat16
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale  # [q, k], float32
        scores = tl.where(is_visible, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        # a query that has seen no key yet: -inf - -inf would be NaN
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        rescale = tl.exp(maximum - shift)
        weights = tl.exp(scores - shift[:, None])
        total = total * rescale + tl.sum(weights, axis=1)
        weighted = tl.dot(weights.to(value.dtype), value, input_precision="ieee")  # [q, d], float32
        accumulator = accumulator * rescale[:, None] + weighted
        maximum = new_maximum

    output = accumulator / tl.where(total == 0.0, 1.0, total)[:, None]  # zeros for a query that sees nothing
    tl.store(output_ptr + query_offsets, output.to(output_ptr.dtype.element_ty), mask=is_inside)
