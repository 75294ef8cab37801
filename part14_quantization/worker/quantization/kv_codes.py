"""Keys and values as int8 or FP8 codes, with a scale for each KV head of a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .calibration import causal_attention
from .scheme import FP8_MAX, to_fp8

KV_DTYPES = {"int8": torch.int8, "fp8": torch.uint8}  # uint8: the bits of e4m3, for which few libraries have a type
LARGEST_CODES = {torch.int8: 127.0, torch.uint8: FP8_MAX}
SCALE_STEPS = 8  # between a power of two and the next


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


def measure_scales(
    forward: Callable[[Callable[..., Tensor]], object], num_layers: int, num_kv_heads: int, dtype: torch.dtype
) -> Tensor:
    """Run the model once, and find the scales with which the largest key and the largest value of each KV head become
    the largest code.

    forward: runs the model with the attend() that it is given. Returns [num_layers, 2, num_kv_heads], float32.
    """
    largest = torch.zeros(num_layers, 2, num_kv_heads)

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        for which, numbers in enumerate((key, value)):
            largest[layer, which] = numbers.abs().amax(dim=(0, 2)).float().cpu()
        return causal_attention(layer, query, key, value)

    forward(attend)
    return round_up(torch.where(largest == 0, 1.0, largest / LARGEST_CODES[dtype]))


def round_up(scale: Tensor) -> Tensor:
    """To the next of SCALE_STEPS steps per power of two. The sums of ranks differ in their last bits, and so would
    scales between engines of different sizes, or before and after a restart."""
    fraction, exponent = torch.frexp(scale)  # the fraction is between 0.5 and 1
    return torch.ldexp((fraction * 2 * SCALE_STEPS).ceil() / (2 * SCALE_STEPS), exponent)
