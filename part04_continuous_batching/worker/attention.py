"""Attention over the paged KV cache: a reference in torch, and the choice of a kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .kv_cache import KVCache


@dataclass(frozen=True)
class AttentionMetadata:
    """What attention needs to know about a step's batch; the same for all layers.

    num_decodes: this many sequences at the front have one token each and read their context from the cache; the others
    are whole prompts, whose keys and values are all computed in this step.
    slot_mapping: [num_tokens], the slot for each token's key and value.
    query_start_loc: where each sequence begins in the flattened batch, and where the last ends: num_seqs + 1 numbers.
    block_tables: [num_decodes, max_blocks], int32; entries past a context's end are padding.
    context_lens: [num_decodes], int32, tokens of each sequence in the cache, this step's included.
    """

    num_decodes: int
    slot_mapping: Tensor
    query_start_loc: list[int]
    block_tables: Tensor
    context_lens: Tensor


class PagedAttention:
    """attend() for DecoderModel: writes a step's keys and values to the cache, then attends to the cached context.

    Prefill uses the keys and values of the step itself, decode reads them from the cache through the block tables; a
    batch may contain both.
    """

    def __init__(self, kv_cache: KVCache, scale: float, backend: str) -> None:
        self.kv_cache, self.scale = kv_cache, scale
        self.decode = load_backend(backend, kv_cache)

    def attend(self, metadata: AttentionMetadata, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query: [num_tokens, num_heads, head_dim]; key, value: [num_tokens, num_kv_heads, head_dim].

        Returns query's shape.
        """
        self.kv_cache.store(layer, key, value, metadata.slot_mapping)
        output = torch.empty_like(query)
        if num_decodes := metadata.num_decodes:
            cache, tables, lens = self.kv_cache.layer(layer), metadata.block_tables, metadata.context_lens
            output[:num_decodes] = self.decode(query[:num_decodes], cache, tables, lens, self.scale)
        prefill_attention(query, key, value, metadata.query_start_loc[num_decodes:], self.scale, output)
        return output


def prefill_attention(
    query: Tensor, key: Tensor, value: Tensor, query_start_loc: list[int], scale: float, output: Tensor
) -> None:
    """Causal attention within each sequence of a flattened batch. Shapes as in PagedAttention.attend.

    output: has query's shape; only the rows from query_start_loc[0] on are written.
    """
    for start, end in pairwise(query_start_loc):
        q, k, v = (tensor[start:end].transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        output[start:end] = attended[0].transpose(0, 1)


def reference_decode(
    query: Tensor, kv_cache: Tensor, block_tables: Tensor, context_lens: Tensor, scale: float
) -> Tensor:
    """What every kernel computes: one query of each sequence attends to the sequence's whole context.

    query: [num_seqs, num_heads, head_dim]; kv_cache: [num_blocks, block_size, 2, num_kv_heads, head_dim]; block_tables:
    [num_seqs, max_blocks]; context_lens: [num_seqs]. Returns query's shape. Slow: a loop over the sequences.
    """
    block_size, num_kv_heads = kv_cache.shape[1], kv_cache.shape[3]
    output = torch.empty_like(query)
    for seq, context_len in enumerate(context_lens.tolist()):
        block_ids = block_tables[seq, : -(-context_len // block_size)].long()
        key, value = kv_cache[block_ids].flatten(0, 1)[:context_len].unbind(1)  # [context_len, num_kv_heads, head_dim]
        grouped = query[seq].unflatten(0, (num_kv_heads, -1))  # the query heads that share a KV head
        weights = torch.einsum("kgd,lkd->kgl", grouped, key).mul(scale).softmax(dim=-1)
        output[seq] = torch.einsum("kgl,lkd->kgd", weights, value).flatten(0, 1)
    return output


def load_backend(name: str, kv_cache: KVCache) -> Callable[..., Tensor]:
    """The function that computes attention, compiled and ready. Only the chosen backend is imported."""
    if name == "torch":
        return reference_decode
    if name == "triton":
        from .triton_attention import paged_decode as triton_decode

        return triton_decode
    from .cpu_attention import paged_decode as cpu_decode
    from .cpu_attention import warm_up

    warm_up(kv_cache.data.dtype)
    return cpu_decode


def choose_backend(name: str, device: str, dtype: torch.dtype) -> str:
    """auto: Triton on a GPU, Numba on a CPU, except for float16, which Numba does not support."""
    if name != "auto":
        return name
    if device.startswith("cuda"):
        return "triton"
    return "torch" if dtype == torch.float16 else "numba"
