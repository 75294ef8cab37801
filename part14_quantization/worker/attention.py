"""Attention over the paged KV cache: a reference in torch, and the choice of a kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from .kv_cache import KVCache
from .quantization.kv_codes import decode_kv


@dataclass(frozen=True)
class AttentionMetadata:
    """What attention needs to know about a step's batch; the same for all layers.

    slot_mapping: [num_tokens], the slot for each token's key and value.
    block_tables: [num_seqs, max_blocks], int32; entries past a context's end are padding.
    query_start_loc: [num_seqs + 1], int32, where each sequence begins in the flattened batch, and where the last ends.
    context_lens: [num_seqs], int32, tokens of each sequence in the cache, this step's included.
    max_query_len: the largest number of tokens of one sequence in this step.
    """

    slot_mapping: Tensor
    block_tables: Tensor
    query_start_loc: Tensor
    context_lens: Tensor
    max_query_len: int


class PagedAttention:
    """attend() for DecoderModel: writes a step's keys and values to the cache, then attends to the cached context.

    Decodes and chunks are handled alike: a few queries at the end of a context that is read through a block table.
    """

    def __init__(self, kv_cache: KVCache, scale: float, backend: str) -> None:
        self.kv_cache, self.scale = kv_cache, scale
        self.attention = load_backend(backend, kv_cache)

    def attend(self, metadata: AttentionMetadata, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query: [num_tokens, num_heads, head_dim]; key, value: [num_tokens, num_kv_heads, head_dim].

        Returns query's shape. The kernels know nothing about the scales of a cache that has codes: a head's scale is
        the same for all keys, so the query is multiplied by it instead, and the output by that of the values.
        """
        self.kv_cache.store(layer, key, value, metadata.slot_mapping)
        scales = None if self.kv_cache.scales is None else self.kv_cache.scales[layer]
        output = self.attention(
            query if scales is None else scale_heads(query, scales[0]), self.kv_cache.layer(layer),
            metadata.block_tables, metadata.query_start_loc, metadata.context_lens, metadata.max_query_len, self.scale,
        )  # fmt: skip
        return output if scales is None else scale_heads(output, scales[1])


def scale_heads(heads: Tensor, scale: Tensor) -> Tensor:
    """heads: [num_tokens, num_heads, head_dim]; scale: [num_kv_heads], each for a group of neighboring heads."""
    grouped = heads.unflatten(1, (len(scale), -1))
    return (grouped.float() * scale.view(-1, 1, 1)).to(heads.dtype).flatten(1, 2)


def reference_attention(
    query: Tensor, kv_cache: Tensor, block_tables: Tensor, query_start_loc: Tensor, context_lens: Tensor,
    max_query_len: int, scale: float,
) -> Tensor:  # fmt: skip
    """What every kernel computes: the last tokens of each sequence attend to its context, each token up to itself.

    query: [num_tokens, num_heads, head_dim]; kv_cache: [num_blocks, block_size, 2, num_kv_heads, head_dim], of numbers
    or of codes without their scales; the others as in AttentionMetadata. Returns query's shape. Slow: a loop over the
    sequences.
    """
    block_size, num_kv_heads = kv_cache.shape[1], kv_cache.shape[3]
    output = torch.empty_like(query)
    for seq, (start, end) in enumerate(pairwise(query_start_loc.tolist())):
        context_len = int(context_lens[seq])
        block_ids = block_tables[seq, : -(-context_len // block_size)].long()
        context = kv_cache[block_ids].flatten(0, 1)[:context_len]
        key, value = decode_kv(context, query.dtype).unbind(1)  # [context_len, num_kv_heads, head_dim]
        grouped = query[start:end].unflatten(1, (num_kv_heads, -1))  # the query heads that share a KV head
        scores = torch.einsum("qkgd,lkd->kgql", grouped, key) * scale
        is_visible = causal_mask(end - start, context_len, query.device)
        weights = scores.masked_fill(~is_visible, -torch.inf).softmax(dim=-1)
        output[start:end] = torch.einsum("kgql,lkd->qkgd", weights, value).flatten(1, 2)
    return output


@lru_cache(maxsize=4)  # the same for all layers of a step
def causal_mask(num_queries: int, context_len: int, device: torch.device) -> Tensor:
    """Which positions each query sees if the queries are the last tokens of the context: all positions up to its own.

    Returns [num_queries, context_len], bool: a triangle aligned at the bottom right.
    """
    positions = torch.arange(context_len, device=device)
    return positions <= positions[context_len - num_queries :].unsqueeze(1)


def load_backend(name: str, kv_cache: KVCache) -> Callable[..., Tensor]:
    """The function that computes attention, compiled and ready. Only the chosen backend is imported."""
    if name == "torch":
        return reference_attention
    if name == "triton":
        from .triton_attention import paged_attention as triton_attention

        return triton_attention
    from .cpu_attention import paged_attention as cpu_attention
    from .cpu_attention import warm_up

    warm_up(kv_cache.data.dtype)
    return cpu_attention


def choose_backend(name: str, device: str, dtype: torch.dtype) -> str:
    """auto: Triton on a GPU, Numba on a CPU, except for float16, which Numba does not support."""
    if name != "auto":
        return name
    if device.startswith("cuda"):
        return "triton"
    return "torch" if dtype == torch.float16 else "numba"
