"""Random noise as a function of (seed, position), so there is no generator to keep, rewind or move with a request."""

from __future__ import annotations

import torch
from torch import Tensor

GOLDEN_RATIO = -0x61C8864680B583EB  # 2⁶⁴ / φ, as a signed number: the step between two inputs of SplitMix64


def exponential_noise(seeds: Tensor, positions: Tensor, size: int) -> Tensor:
    """seeds, positions: [n], int64. Returns [n, size], float32, distributed as Exp(1).

    Row i is a function of seeds[i] and positions[i]: the same in every batch, on every device, in every process.
    """
    streams = mix(mix(seeds) + positions * GOLDEN_RATIO)
    bits = mix(streams.unsqueeze(1) + torch.arange(1, size + 1, device=seeds.device) * GOLDEN_RATIO)
    uniform = shift_right(bits, 33).float() * 2.0**-31  # 31 bits: fine steps near 0, since the smallest noise wins
    return torch.log1p(-uniform.clamp_(2.0**-33, 1 - 2.0**-24)).neg_()  # never 0 and never infinite


def mix(x: Tensor) -> Tensor:
    """SplitMix64's output function (Steele, Lea and Flood, 2014): every input bit changes half of the output bits."""
    x = (x ^ shift_right(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ shift_right(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ shift_right(x, 31)


def shift_right(x: Tensor, num_bits: int) -> Tensor:
    """A logical shift; torch's >> would copy the sign bit."""
    return (x >> num_bits) & ((1 << (64 - num_bits)) - 1)
