"""The paged tensors: one pool of KV blocks for all requests, allocated once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from common.errors import FieldError

from ..core.block_manager import NULL_BLOCK
from .model import head_dim

CPU_KV_CACHE_BYTES = 1 << 30  # if nothing else is said; the pages of unused blocks are never touched


class KVCache:
    """Keys and values of all layers: data [num_layers, num_blocks, block_size, 2, num_kv_heads, head_dim].

    A slot is a token's place in the pool: block · block_size + offset. Key and value of a token lie side by side, so
    that one gather fetches both. The null block is zeros and stays so; what is in a slot before it is written is
    never read, so the pool is not wiped at the start.
    """

    def __init__(self, model_config: Any, num_blocks: int, block_size: int, dtype: torch.dtype, device: str) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        shape = (num_blocks, block_size, 2, model_config.num_key_value_heads, head_dim(model_config))
        self.data = torch.empty((model_config.num_hidden_layers, *shape), dtype=dtype, device=device)
        self.data[:, NULL_BLOCK] = 0

    def layer(self, layer: int) -> Tensor:
        """[num_blocks, block_size, 2, num_kv_heads, head_dim]"""
        return self.data[layer]

    def slots(self, layer: int) -> Tensor:
        """The same memory by slots: [num_blocks · block_size, 2, num_kv_heads, head_dim]."""
        return self.data[layer].flatten(0, 1)

    def store(self, layer: int, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
        """Write the key and value of each token to its slot. key, value: [num_tokens, num_kv_heads, head_dim]."""
        self.slots(layer)[slot_mapping] = torch.stack((key, value), dim=1)


def kv_bytes_per_block(model_config: Any, block_size: int, dtype: torch.dtype) -> int:
    """A key and a value for every layer, KV head and token of a block."""
    per_token = 2 * model_config.num_hidden_layers * model_config.num_key_value_heads * head_dim(model_config)
    return per_token * block_size * dtype.itemsize


def num_blocks_in(num_bytes: int, bytes_per_block: int, field: str) -> int:
    """How many blocks a budget holds. Raises FieldError naming its flag if not even one beside the null block."""
    num_blocks = num_bytes // bytes_per_block
    if num_blocks < 2:
        raise FieldError(
            field, f"{num_bytes:,} bytes hold {num_blocks} blocks of {bytes_per_block:,} bytes, expected at least 2"
        )
    return num_blocks
