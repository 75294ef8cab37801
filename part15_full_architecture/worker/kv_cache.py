"""The paged tensors: one pool of KV blocks for all requests, allocated once."""

from __future__ import annotations

import torch
from torch import Tensor

from .model import DecoderModel
from .quantization.kv_codes import KVFormat

CPU_KV_CACHE_BYTES = 1 << 30  # the default; memory pages of unused blocks are never touched


class KVCache:
    """Keys and values of all layers: data [num_layers, num_blocks, block_size, 2, num_kv_heads, head_dim].

    A slot is a token's place in the pool: block · block_size + offset. Nothing reads a slot before it is written, so
    the pool is not cleared at the start. The null block may be written, but it is never read. scales: see KVFormat.
    """

    def __init__(self, model: DecoderModel, num_blocks: int, block_size: int, kv_format: KVFormat) -> None:
        self.num_blocks, self.block_size, self.scales = num_blocks, block_size, kv_format.scales
        shape = (model.num_layers, num_blocks, block_size, 2, model.num_kv_heads, model.head_dim)
        self.data = torch.empty(shape, dtype=kv_format.dtype, device=model.device)

    def layer(self, layer: int) -> Tensor:
        """[num_blocks, block_size, 2, num_kv_heads, head_dim]"""
        return self.data[layer]


def slot_mapping(block_tables: Tensor, rows: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """The slot of each token: block · block_size + offset. Returns [num_tokens], int64.

    block_tables: [num_rows, max_blocks]; rows: [num_tokens], each token's row in block_tables; positions: [num_tokens].
    """
    block_ids = block_tables[rows, positions // block_size].long()
    return block_ids * block_size + positions % block_size


def kv_bytes_per_block(model: DecoderModel, block_size: int, kv_format: KVFormat) -> int:
    """Bytes of a KV block: a key and a value for every layer, KV head and token."""
    per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim
    return per_token * block_size * kv_format.dtype.itemsize
