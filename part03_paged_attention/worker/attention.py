"""Attention over the paged KV cache: a torch reference, and the choice between it and the Triton kernel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from .kv_cache import KVCache
from .triton_attention import paged_decode


@dataclass(frozen=True)
class AttentionMetadata:
    """What attention has to know about a step's batch; the same for all layers.

    slot_mapping: [num_tokens], where each token's key and value go.
    query_start_loc: where each sequence begins in the flattened batch, and where the last ends: num_seqs + 1 numbers.
    block_tables: [num_seqs, max_blocks] int32, padded with the null block.
    context_lens: [num_seqs] int32, tokens of each sequence in the cache, this step's included.
    """

    is_prefill: bool
    slot_mapping: Tensor
    query_start_loc: list[int]
    block_tables: Tensor
    context_lens: Tensor
    block_size: int

    @cached_property
    def context_slots(self) -> Tensor:
        """The slot of each position of each sequence: [num_seqs, max_context_len]; past a sequence's end slot 0.

        Slot 0 is the null block's and holds zeros, so what other requests left in the cache is never read.
        """
        # exercise: context_slots
        positions = torch.arange(int(self.context_lens.max()), device=self.block_tables.device)
        blocks = self.block_tables.long()[:, positions // self.block_size]
        return (blocks * self.block_size + positions % self.block_size) * self.context_mask
        # exercise: end

    @cached_property
    def context_mask(self) -> Tensor:
        """Which of these positions exist: [num_seqs, max_context_len], bool."""
        positions = torch.arange(int(self.context_lens.max()), device=self.context_lens.device)
        return positions < self.context_lens.unsqueeze(1)


class PagedAttention:
    """attend() for DecoderModel: writes a step's keys and values to the cache and attends to what it holds.

    backend: "torch" or "triton". Prefill attends to the keys and values at hand, decode reads them through the table.
    """

    def __init__(self, kv_cache: KVCache, scale: float, backend: str) -> None:
        self.kv_cache, self.scale, self.backend = kv_cache, scale, backend
        self._gathered = torch.empty(0)

    def attend(self, metadata: AttentionMetadata, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query: [num_tokens, num_heads, head_dim]; key, value: [num_tokens, num_kv_heads, head_dim].

        Returns query's shape.
        """
        self.kv_cache.store(layer, key, value, metadata.slot_mapping)
        if metadata.is_prefill:
            return prefill_attention(query, key, value, metadata.query_start_loc, self.scale)
        if self.backend == "triton":
            cache = self.kv_cache.layer(layer).transpose(1, 2)
            return paged_decode(query, cache, metadata.block_tables, metadata.context_lens, self.scale)
        return self._decode(metadata, layer, query)

    def _decode(self, metadata: AttentionMetadata, layer: int, query: Tensor) -> Tensor:
        """One query a sequence against its context, all sequences at once: gather by slots, mask what is padding."""
        slots = metadata.context_slots
        source = self.kv_cache.slots(layer)
        rows = slots.numel()
        if (
            len(self._gathered) < rows or self._gathered.dtype != source.dtype
        ):  # memory is faulted in once, not each layer
            self._gathered = source.new_empty((rows, *source.shape[1:]))
        gathered = torch.index_select(source, 0, slots.flatten(), out=self._gathered[:rows])
        context = gathered.view(*slots.shape, *source.shape[1:])
        return decode_attention(query, context, metadata.context_mask, self.scale)


def prefill_attention(query: Tensor, key: Tensor, value: Tensor, query_start_loc: list[int], scale: float) -> Tensor:
    """Causal attention within each sequence of a flattened batch. Shapes as in PagedAttention.attend."""
    output = torch.empty_like(query)
    for start, end in zip(query_start_loc, query_start_loc[1:], strict=False):
        q, k, v = (tensor[start:end].transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        output[start:end] = attended[0].transpose(0, 1)
    return output


def decode_attention(query: Tensor, context: Tensor, context_mask: Tensor, scale: float) -> Tensor:
    """One query for each sequence over a context of up to L tokens.

    query: [num_seqs, num_heads, head_dim]; context: [num_seqs, L, 2, num_kv_heads, head_dim], keys and values;
    context_mask: [num_seqs, L], False where there is no token. Returns query's shape.

    The query heads that share a KV head stand in for a row of queries, so keys and values need not be repeated.
    """
    # exercise: decode_attention
    num_seqs, num_heads, head_dim = query.shape
    key, value = (context[:, :, i].transpose(1, 2) for i in (0, 1))  # [num_seqs, num_kv_heads, L, head_dim]
    grouped = query.view(num_seqs, key.shape[1], -1, head_dim)
    mask = context_mask[:, None, None, :]
    return F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale).reshape(query.shape)
    # exercise: end


def choose_backend(name: str, device: str) -> str:
    """auto: Triton on a GPU, torch elsewhere."""
    if name != "auto":
        return name
    return "triton" if device.startswith("cuda") else "torch"
