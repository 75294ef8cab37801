"""Keys and values as int8 or FP8 codes, with a scale for each KV head of a layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .scheme import FP8_MAX, to_fp8

KV_DTYPES = {"int8": torch.int8, "fp8": torch.uint8}  # uint8: the bits of e4m3, for which few libraries have a type
LARGEST_CODES = {torch.int8: 127.0, torch.uint8: FP8_MAX}


@dataclass(frozen=True, slots=True)
class KVFormat:
    """How keys and values are stored. dtype: of the KV pool. scales: [num_layers, 2, num_kv_heads], float32, of the
    keys and of the values, if the pool has codes: else None."""

    dtype: torch.dtype
    scales: Tensor | None = None


def encode_kv(numbers: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """numbers: […, num_kv_heads, head_dim]; scale: […, num_kv_heads]. Numbers out of range become the nearest code."""
    scaled = numbers.float() / scale.unsqueeze(-1)
    if dtype == torch.int8:
        return scaled.round().clamp(-127, 127).to(torch.int8)
    return to_fp8(scaled).view(torch.uint8)


def decode_kv(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """What is in a KV pool, as numbers of a floating-point dtype: codes without their scales."""
    return (stored.view(torch.float8_e4m3fn) if stored.dtype == torch.uint8 else stored).to(dtype)
