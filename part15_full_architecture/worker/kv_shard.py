"""The part of a model's KV cache that a rank has, and copies of some tokens of it in the form that travels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.checkpoint import Checkpoint
from common.checkpoint_reader import fingerprint

from ..config import EngineConfig
from ..messages import KVSource
from .kv_cache import KVCache
from .parallel import Groups
from .quantization.choice import QuantizationFlags
from .quantization.kv_codes import decode_kv, encode_kv

CONVERTED_AT_ONCE = 16_384  # elements: with more, torch would start threads that the model needs
Span = range  # of layers, heads or positions


class KVShard:
    """Keys and values on their way between two engines have a form of their own: tokens, not blocks, and each layer by
    itself. So block sizes, numbers of ranks and dtypes may differ.

    layers, heads: this rank's, numbered as in the whole model. layout: equal for two engines if the KV of equal tokens
    is equal, but for rounding: it depends on the weights, and on the numbers of layers and heads.
    """

    def __init__(self, cache: KVCache, layers: Span, heads: Span, layout: str) -> None:
        self.cache, self.layers, self.heads, self.layout = cache, layers, heads, layout
        self.dtype = cache.data.dtype
        self.head_dim = cache.data.shape[-1]
        self._scales = None if cache.scales is None else cache.scales.cpu()

    def bytes_per_token(self, num_heads: int) -> int:
        """In one layer."""
        return 2 * num_heads * self.head_dim * self.dtype.itemsize

    def source(self, address: str) -> KVSource:
        return KVSource(address, self.layout, self.layers.start, len(self.layers), self.heads.start, len(self.heads))

    def read(self, layer: int, heads: Span, block_ids: Sequence[int], positions: Span) -> memoryview:
        """Keys and values of a request's tokens at these positions: [num_tokens, 2, num_heads, head_dim] as bytes.

        block_ids: its block table.
        """
        slots, own_heads = self._slots(block_ids, positions), self._own(heads)
        pool = self._pool(layer)
        if pool.device.type == "cpu":
            values = as_integers(pool)[slots, :, own_heads]
        else:
            values = as_integers(pool[torch.from_numpy(slots).to(pool.device), :, own_heads].cpu())
        return np.ascontiguousarray(values).data.cast("B")

    def scales(self, layer: int, heads: Span) -> list[float]:
        """Of the codes of these heads, [2, num_heads] in a row; empty if the pool has numbers."""
        if self._scales is None:
            return []
        return self._scales[layer - self.layers.start, :, self._own(heads)].flatten().tolist()

    def write(
        self, layer: int, heads: Span, block_ids: Sequence[int], positions: Span, data: memoryview, dtype: torch.dtype,
        scales: Sequence[float] = (),
    ) -> None:  # fmt: skip
        """The inverse of read(), of data that may have another dtype, or codes with other scales."""
        slots, own_heads = self._slots(block_ids, positions), self._own(heads)
        pool, shape = self._pool(layer), (len(positions), 2, len(heads), self.head_dim)
        own_scales = self.scales(layer, heads)
        is_same = dtype == self.dtype and list(scales) == own_scales
        if pool.device.type == "cpu" and is_same:
            as_integers(pool)[slots, :, own_heads] = np.frombuffer(data, as_integers(pool).dtype).reshape(shape)
            return
        values = torch.frombuffer(bytearray(data), dtype=dtype).view(shape)
        if not is_same:
            values = convert(values, scales, self.dtype, own_scales)
        pool[torch.from_numpy(slots).to(pool.device), :, own_heads] = values.to(pool.device)

    def _pool(self, layer: int) -> Tensor:
        """[num_slots, 2, num_kv_heads, head_dim]"""
        return self.cache.layer(layer - self.layers.start).flatten(0, 1)

    def _own(self, heads: Span) -> slice:
        return slice(heads.start - self.heads.start, heads.stop - self.heads.start)

    def _slots(self, block_ids: Sequence[int], positions: Span) -> npt.NDArray[np.int64]:
        """The slot of each position. block_ids: the request's block table. Returns [num_positions]."""
        block_size, place = self.cache.block_size, np.arange(positions.start, positions.stop)
        return np.asarray(block_ids)[place // block_size] * block_size + place % block_size


def as_integers(tensor: Tensor) -> npt.NDArray[np.integer]:
    """The same memory as numpy's array: it has no bfloat16, and copies in this thread alone."""
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize]).numpy()


def convert(values: Tensor, scales: Sequence[float], dtype: torch.dtype, own_scales: Sequence[float]) -> Tensor:
    """Numbers or codes to those of another dtype or with other scales. values: [num_tokens, 2, num_heads, head_dim];
    scales: of codes, [2, num_heads] in a row. In small pieces, so that torch converts them in this thread."""
    pieces = list[Tensor]()
    for piece in values.split(max(1, CONVERTED_AT_ONCE // values[0].numel())):
        if scales:
            piece = decode_kv(piece, torch.float32) * torch.tensor(scales).view(2, -1, 1)
        if own_scales:
            piece = encode_kv(piece, torch.tensor(own_scales).view(2, -1), dtype)
        pieces.append(piece.to(dtype))
    return torch.cat(pieces)


def make_shard(cache: KVCache, checkpoint: Checkpoint, groups: Groups, engine: EngineConfig) -> KVShard:
    """The shard of a rank. (The draft model's cache is never transferred: it computes its own.)"""
    config, head_dim = checkpoint.config, cache.data.shape[-1]
    flags = QuantizationFlags(engine.quantization, engine.quantization_group_size)
    heads = groups.tensor.split_kv_heads(config.num_key_value_heads)
    layers = groups.stage.layers(config.num_hidden_layers)
    parts = (fingerprint(checkpoint), str(flags), config.num_hidden_layers, config.num_key_value_heads, head_dim)
    layout = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
    return KVShard(cache, layers, range(heads.start, heads.stop), layout)


def overlap(a: Span, b: Span) -> Span:
    """What two ranges have in common."""
    start = max(a.start, b.start)
    return range(start, max(start, min(a.stop, b.stop)))
