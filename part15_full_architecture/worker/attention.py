"""Attention over the paged KV cache, as the model's layers call it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .kernels.ops import Kernels
from .kv_cache import KVCache
from .model import Rotation


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

    def __init__(self, kv_cache: KVCache, scale: float, kernels: Kernels) -> None:
        self.kv_cache, self.scale, self.kernels = kv_cache, scale, kernels

    def attend(
        self, metadata: AttentionMetadata, layer: int, query: Tensor, key: Tensor, value: Tensor, rotation: Rotation
    ) -> Tensor:
        """query: [num_tokens, num_heads, head_dim]; key, value: [num_tokens, num_kv_heads, head_dim]: rows may have a
        stride.

        Returns query's shape. The attention kernels know nothing about the scales of a cache that has codes: a head's
        scale is the same for all keys, so the query is multiplied by it instead, and the output by that of the values.
        """
        kv_cache = self.kv_cache.layer(layer)
        scales = None if self.kv_cache.scales is None else self.kv_cache.scales[layer]
        query = self.kernels.rotate_and_store(
            query, key, value, rotation.positions, rotation.table, kv_cache, metadata.slot_mapping, scales
        )
        output = self.kernels.paged_attention(
            query if scales is None else scale_heads(query, scales[0]), kv_cache, metadata.block_tables,
            metadata.query_start_loc, metadata.context_lens, metadata.max_query_len, self.scale,
        )  # fmt: skip
        return output if scales is None else scale_heads(output, scales[1])


def scale_heads(heads: Tensor, scale: Tensor) -> Tensor:
    """heads: [num_tokens, num_heads, head_dim]; scale: [num_kv_heads], each for a group of neighboring heads."""
    grouped = heads.unflatten(1, (len(scale), -1))
    return (grouped.float() * scale.view(-1, 1, 1)).to(heads.dtype).flatten(1, 2)
