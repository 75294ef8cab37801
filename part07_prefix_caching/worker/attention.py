"""Attention over the paged KV cache: a torch reference, and the choice between it and the Triton kernel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from .device import upload
from .kv_cache import KVCache
from .triton_attention import paged_attention


@dataclass(frozen=True)
class AttentionMetadata:
    """What attention has to know about a step's batch; the same for all layers.

    num_decodes: so many sequences at the front have one token each; the others are chunks of a prompt.
    query_lens, context_lens: of each sequence, its tokens in this step, and those in the cache with this step's.
    slot_mapping: [num_tokens], where each token's key and value go.
    block_tables: [num_seqs, max_blocks] int32, padded with the null block.
    """

    num_decodes: int
    query_lens: list[int]
    context_lens: list[int]
    slot_mapping: Tensor
    block_tables: Tensor
    block_size: int

    @cached_property
    def query_start_loc(self) -> list[int]:
        """Where each sequence begins in the flattened batch, and where the last ends: num_seqs + 1 numbers."""
        return list(accumulate(self.query_lens, initial=0))

    @cached_property
    def query_start_loc_tensor(self) -> Tensor:
        return upload(self.query_start_loc, self.block_tables.device, torch.int32)

    @cached_property
    def context_lens_tensor(self) -> Tensor:
        return upload(self.context_lens, self.block_tables.device, torch.int32)

    @cached_property
    def decode_slots(self) -> Tensor:
        """The slot of each position of each decode: [num_decodes, max_context_len]; past a sequence's end slot 0.

        Slot 0 is the null block's and holds zeros, so what other requests left in the cache is never read.
        """
        return self.slots(slice(0, self.num_decodes), self.decode_mask.shape[1]) * self.decode_mask

    @cached_property
    def decode_mask(self) -> Tensor:
        """Which of these positions exist: [num_decodes, max_context_len], bool."""
        positions = torch.arange(max(self.context_lens[: self.num_decodes]), device=self.block_tables.device)
        return positions < self.context_lens_tensor[: self.num_decodes].unsqueeze(1)

    def slots(self, rows: slice, num_tokens: int) -> Tensor:
        """The slots of the first num_tokens positions of some sequences: [num_rows, num_tokens]."""
        positions = torch.arange(num_tokens, device=self.block_tables.device)
        blocks = self.block_tables[rows].long()[:, positions // self.block_size]
        return blocks * self.block_size + positions % self.block_size


class PagedAttention:
    """attend() for DecoderModel: writes a step's keys and values to the cache and attends to what it holds.

    backend: "torch" or "triton". A first chunk attends to the keys and values at hand; all others read their past
    through the block table. A batch may hold decodes and chunks.
    """

    def __init__(self, kv_cache: KVCache, scale: float, backend: str) -> None:
        self.kv_cache, self.scale, self.backend = kv_cache, scale, backend
        self._gathered = torch.empty(0)

    def attend(self, metadata: AttentionMetadata, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query: [num_tokens, num_heads, head_dim]; key, value: [num_tokens, num_kv_heads, head_dim].

        Returns query's shape.
        """
        self.kv_cache.store(layer, key, value, metadata.slot_mapping)
        if self.backend == "triton":
            return paged_attention(
                query, self.kv_cache.layer(layer).transpose(1, 2), metadata.block_tables,
                metadata.query_start_loc_tensor, metadata.context_lens_tensor, max(metadata.query_lens), self.scale,
            )  # fmt: skip
        output, num_decodes = torch.empty_like(query), metadata.num_decodes
        if num_decodes:
            context = self._gather(layer, metadata.decode_slots)
            output[:num_decodes] = decode_attention(query[:num_decodes], context, metadata.decode_mask, self.scale)
        for row in range(num_decodes, len(metadata.query_lens)):
            start, end = metadata.query_start_loc[row : row + 2]
            num_context = metadata.context_lens[row]
            if num_context > end - start:  # keys and values of earlier chunks are in the cache only
                slots = metadata.slots(slice(row, row + 1), num_context)
                chunk_key, chunk_value = self._gather(layer, slots)[0].unbind(1)
            else:
                chunk_key, chunk_value = key[start:end], value[start:end]
            output[start:end] = chunk_attention(query[start:end], chunk_key, chunk_value, self.scale)
        return output

    def _gather(self, layer: int, slots: Tensor) -> Tensor:
        """The keys and values in some slots: [*slots.shape, 2, num_kv_heads, head_dim], until the next call."""
        source, rows = self.kv_cache.slots(layer), slots.numel()
        if len(self._gathered) < rows or self._gathered.dtype != source.dtype:  # memory is faulted in once
            self._gathered = source.new_empty((rows, *source.shape[1:]))
        gathered = torch.index_select(source, 0, slots.flatten(), out=self._gathered[:rows])
        return gathered.view(*slots.shape, *source.shape[1:])


def chunk_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The last tokens of one sequence over all of it, each over those up to itself.

    query: [num_queries, num_heads, head_dim]; key, value: [num_context, num_kv_heads, head_dim], of which the last
    num_queries belong to the queries. Returns query's shape.

    The causal mask is aligned at the bottom right: query i stands at position num_context - num_queries + i.
    """
    q, k, v = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
    num_queries, num_context = len(query), len(key)
    mask = None if num_queries == num_context else causal_mask(num_queries, num_context, str(query.device))
    attended = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
    )
    return attended[0].transpose(0, 1)


@lru_cache(maxsize=4)  # the same for all layers of a step
def causal_mask(num_queries: int, num_context: int, device: str) -> Tensor:
    """Which positions each query sees: [num_queries, num_context], bool."""
    positions = torch.arange(num_context, device=device)
    return positions <= positions[num_context - num_queries :].unsqueeze(1)


def decode_attention(query: Tensor, context: Tensor, context_mask: Tensor, scale: float) -> Tensor:
    """One query for each sequence over a context of up to L tokens.

    query: [num_seqs, num_heads, head_dim]; context: [num_seqs, L, 2, num_kv_heads, head_dim], keys and values;
    context_mask: [num_seqs, L], False where there is no token. Returns query's shape.

    The query heads that share a KV head stand in for a row of queries, so keys and values need not be repeated.
    """
    num_seqs, num_heads, head_dim = query.shape
    key, value = (context[:, :, i].transpose(1, 2) for i in (0, 1))  # [num_seqs, num_kv_heads, L, head_dim]
    grouped = query.view(num_seqs, key.shape[1], -1, head_dim)
    mask = context_mask[:, None, None, :]
    return F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale).reshape(query.shape)


def choose_backend(name: str, device: str) -> str:
    """auto: Triton on a GPU, torch elsewhere."""
    if name != "auto":
        return name
    return "triton" if device.startswith("cuda") else "torch"
