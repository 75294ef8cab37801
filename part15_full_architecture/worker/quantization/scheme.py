"""From real numbers to codes of a few bits and back: schemes with integers, with 8-bit floats, and with a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from common.errors import FieldError

FP8_MAX = 448.0  # the largest e4m3 number
NF4_LEVELS = (  # quantiles of a normal distribution, with an exact 0 (QLoRA: Dettmers et al., 2023)
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scheme:
    """What the numbers of a matrix are stored as.

    kind: "int" for integers times a scale, "fp8" for e4m3 floats times a scale, "nf4" for the 16 levels of NF4 times a
    scale. bits: of a code; below 4, integers are stored as those of 4 bits. group_size: how many neighboring columns of
    a row share a scale (None: the whole row). is_symmetric: code 0 means 0; else each group has a zero point.
    activations: the layer's input becomes codes too, with a scale for each token.
    """

    kind: Literal["int", "fp8", "nf4"] = "int"
    bits: int = 8
    group_size: int | None = None
    is_symmetric: bool = True
    activations: Literal["int8", "fp8"] | None = None

    @property
    def codes_per_byte(self) -> int:
        return 2 if self.bits <= 4 else 1

    @property
    def min_code(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def max_code(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def num_groups(self, num_columns: int) -> int:
        """How many scales a row has. Raises FieldError if the columns can't be divided into whole groups."""
        if self.group_size is None:
            return 1
        if num_columns % self.group_size:
            raise FieldError("quantization", f"{num_columns} input features aren't whole groups of {self.group_size}")
        return num_columns // self.group_size

    def split(self, matrix: Tensor) -> Tensor:
        """[…, columns] → […, num_groups, columns of a group]"""
        return matrix.unflatten(-1, (self.num_groups(matrix.shape[-1]), -1))


@dataclass(slots=True)
class Quantized:
    """A matrix of codes. The number that a code of an "int" scheme stands for is (code - zero) · scale.

    codes: […, columns], int8: integers; the bits of e4m3 numbers; or the indices of levels, minus 8. scale: […,
    num_groups], float32. zero: […, num_groups], int8, or None: 0 everywhere. order: if the groups are not made of
    neighboring columns: [columns], int64, the input feature that belongs to each column.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    order: Tensor | None = None


def quantize(matrix: Tensor, scheme: Scheme, scale_dtype: torch.dtype = torch.float32) -> Quantized:
    """Round each number to the nearest code of its group ("round to nearest", RTN).

    matrix: […, columns]. scale_dtype: what the scales are stored in.
    """
    return encode(matrix, *find_scales(scheme.split(matrix.float()), scheme, scale_dtype), scheme)


def find_scales(
    groups: Tensor, scheme: Scheme, scale_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor | None]:
    """The scale and the zero point of each group. groups: […, num_groups, columns of a group]. Returns […, num_groups]
    twice; None for the zero points if they are all 0. The scales are float32 numbers that scale_dtype can hold."""
    if scheme.kind != "int":
        largest = groups.abs().amax(dim=-1)
        return as_stored(largest / (FP8_MAX if scheme.kind == "fp8" else 1.0), scale_dtype), None
    if scheme.is_symmetric:
        return as_stored(symmetric_scale(groups, scheme.min_code, scheme.max_code), scale_dtype), None
    low, high = groups.amin(dim=-1).clamp(max=0), groups.amax(dim=-1).clamp(min=0)
    scale = as_stored((high - low) / (scheme.max_code - scheme.min_code), scale_dtype)
    zero = (scheme.min_code - low / scale).round().clamp(scheme.min_code, scheme.max_code)
    return scale, zero.to(torch.int8)


def as_stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scales rounded to a dtype; 1 where that is 0, since numbers are divided by them."""
    scale = scale.to(dtype).float()
    return torch.where(scale == 0, 1.0, scale)


def symmetric_scale(groups: Tensor, min_code: int, max_code: int) -> Tensor:
    """The smallest scale with which no number of a group lies outside the codes, min_code to max_code; 1 if all numbers
    are 0. groups: […, num_groups, columns of a group]. Returns […, num_groups]."""
    scale = torch.maximum(groups.amax(dim=-1) / max_code, groups.amin(dim=-1) / min_code)
    return torch.where(scale == 0, 1.0, scale)


def encode(matrix: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> Quantized:
    """The codes of a matrix, […, columns], given the scales and zero points of its groups, […, num_groups]."""
    groups = scheme.split(matrix.float()) / scale.unsqueeze(-1)
    if scheme.kind == "fp8":
        codes = to_fp8(groups).view(torch.int8)
    elif scheme.kind == "nf4":
        levels = torch.tensor(NF4_LEVELS, device=matrix.device)
        codes = torch.bucketize(groups.contiguous(), (levels[1:] + levels[:-1]) / 2).to(torch.int8) - 8
    else:
        shifted = groups.round() + (0 if zero is None else zero.unsqueeze(-1))
        codes = shifted.clamp(scheme.min_code, scheme.max_code).to(torch.int8)
    return Quantized(codes.flatten(-2), scale, zero)


def dequantize(quantized: Quantized, scheme: Scheme) -> Tensor:
    """What the codes stand for: […, columns], float32, in the order of the input features."""
    groups = scheme.split(quantized.codes)
    if scheme.kind == "fp8":
        values = groups.contiguous().view(torch.float8_e4m3fn).float()
    elif scheme.kind == "nf4":
        values = torch.tensor(NF4_LEVELS, device=groups.device)[groups.long() + 8]
    else:
        values = groups.float() if quantized.zero is None else groups.float() - quantized.zero.unsqueeze(-1).float()
    matrix = (values * quantized.scale.unsqueeze(-1)).flatten(-2)
    return matrix if quantized.order is None else torch.empty_like(matrix).index_copy_(-1, quantized.order, matrix)


def to_fp8(numbers: Tensor) -> Tensor:
    """To e4m3, with numbers that are too large becoming the largest one: a plain cast makes them NaN on some
    devices."""
    return numbers.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def round_tokens_to_fp8(rows: Tensor) -> Tensor:
    """What rows become as FP8 codes with a scale for each token. rows: [n, size]; returns the same shape and dtype."""
    numbers = rows.float()
    largest = numbers.abs().amax(dim=-1, keepdim=True)
    scale = as_stored(largest / FP8_MAX, torch.float32)
    return (to_fp8(numbers / scale).float() * scale).to(rows.dtype)


def quantize_tokens(rows: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes for activations, with a scale for each token. rows: [n, size]. Returns codes, [n, size], int8, and
    scales, [n, 1], float32."""
    rows = rows.float()
    scale = symmetric_scale(rows.unsqueeze(1), -127, 127)
    return (rows / scale).round().clamp(-127, 127).to(torch.int8), scale
