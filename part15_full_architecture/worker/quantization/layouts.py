"""How checkpoints store codes: the layouts of compressed-tensors, GPTQ and AWQ, and numbers that become codes here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from common.checkpoint_reader import CheckpointReader
from common.errors import FieldError

from ..weight import Part
from .packing import AWQ_ORDER, unpack_words
from .scheme import Quantized, Scheme, quantize

INT32, INT8, FP8 = ("I32",), ("I8",), ("F8_E4M3",)
MAX_FP8_SCALE = 128.0  # times 2^120, the kernels' factor, it is a float32 number


@dataclass(frozen=True, slots=True)
class QuantizeOnLoad:
    """The checkpoint has floating-point numbers, which are rounded to the nearest codes when they are loaded."""

    scheme: Scheme
    has_order: bool = False

    def read(self, reader: CheckpointReader, name: str, part: Part) -> Quantized:
        """Where a scale is for a whole row, all ranks read the whole row: so it's the same for any number of ranks."""
        if self.scheme.group_size is not None:
            return quantize(reader.read(f"{name}.weight", part.shape, part.index), self.scheme)
        whole = quantize(reader.read(f"{name}.weight", part.shape, (part.rows,)), self.scheme)
        return Quantized(whole.codes[:, part.columns].contiguous(), whole.scale, whole.zero)


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """compressed-tensors' "pack-quantized": weight_packed, [rows, columns / codes per word], int32, of codes plus
    2^(bits - 1); weight_scale, [rows, num_groups]; weight_zero_point, packed in the other direction; weight_g_idx,
    [columns], the group of each column."""

    scheme: Scheme
    has_order: bool = False

    def read(self, reader: CheckpointReader, name: str, part: Part) -> Quantized:
        bits, (num_rows, num_columns) = self.scheme.bits, part.shape
        num_groups, per_word = self.scheme.num_groups(num_columns), 32 // self.scheme.bits
        words_shape = (num_rows, -(-num_columns // per_word))
        words = reader.read(f"{name}.weight_packed", words_shape, (part.rows,), INT32)
        codes = unpack_words(words, bits, num_columns)
        scale = read_scales(reader, f"{name}.weight_scale", num_rows, num_groups)[part.rows]
        zero = None
        if not self.scheme.is_symmetric:
            shape = (-(-num_rows // per_word), num_groups)
            words = reader.read(f"{name}.weight_zero_point", shape, (), INT32)
            zero = signed(unpack_words(words.T, bits, num_rows).T[part.rows], bits)
        discard(reader, f"{name}.weight_shape")
        groups = read_group_index(reader, f"{name}.weight_g_idx", num_columns) if self.has_order else None
        return take_part(signed(codes, bits), scale, zero, groups, name, part, self.scheme)


@dataclass(frozen=True, slots=True)
class PlainLayout:
    """compressed-tensors' "int-quantized" and "float-quantized": weight, [rows, columns], in int8 or e4m3, and
    weight_scale, [rows, 1] or [1]."""

    scheme: Scheme
    has_order: bool = False

    def read(self, reader: CheckpointReader, name: str, part: Part) -> Quantized:
        dtypes = FP8 if self.scheme.kind == "fp8" else INT8
        codes = reader.read(f"{name}.weight", part.shape, part.index, dtypes).view(torch.int8)
        num_groups = self.scheme.num_groups(part.num_columns)
        scale = read_scales(reader, f"{name}.weight_scale", part.num_rows, num_groups)[part.rows]
        if self.scheme.kind == "fp8" and len(scale) and scale.max() > MAX_FP8_SCALE:
            raise FieldError("model", f"{name}: expected scales up to {MAX_FP8_SCALE}, got {scale.max().item()}")
        return Quantized(codes, scale[:, group_slice(self.scheme, part, name)])


@dataclass(frozen=True, slots=True)
class GPTQLayout:
    """GPTQ's: qweight, [columns / codes per word, rows]; qzeros, [num_groups, rows / codes per word]; scales,
    [num_groups, rows]; g_idx, [columns], the group of each column.

    is_version_1: it stores zero points minus 1. Tools subtract from whole words, so that a zero point of 0 borrows from
    the one above it.
    """

    scheme: Scheme
    has_order: bool
    is_version_1: bool

    def read(self, reader: CheckpointReader, name: str, part: Part) -> Quantized:
        bits, (num_rows, num_columns) = self.scheme.bits, part.shape
        num_groups, per_word = self.scheme.num_groups(num_columns), 32 // self.scheme.bits
        words_shape = (-(-num_columns // per_word), num_rows)
        words = reader.read(f"{name}.qweight", words_shape, (slice(None), part.rows), INT32)
        codes = unpack_words(words.T, bits, num_columns)
        scale = read_transposed_scales(reader, f"{name}.scales", num_rows, num_groups, part)
        words = reader.read(f"{name}.qzeros", (num_groups, -(-num_rows // per_word)), (), INT32)
        if self.is_version_1:
            words = words + sum(1 << place for place in range(0, 32, bits))  # in int32, which wraps around
        zero = unpack_words(words, bits, num_rows).T[part.rows]
        groups = read_group_index(reader, f"{name}.g_idx", num_columns)
        return take_part(signed(codes, bits), scale, signed(zero, bits), groups, name, part, self.scheme)


@dataclass(frozen=True, slots=True)
class AWQLayout:
    """AWQ's: qweight, [columns, rows / 8]; qzeros, [num_groups, rows / 8]; both packed in AWQ_ORDER; scales,
    [num_groups, rows]."""

    scheme: Scheme
    has_order: bool = False

    def read(self, reader: CheckpointReader, name: str, part: Part) -> Quantized:
        num_rows, num_columns = part.shape
        num_groups = self.scheme.num_groups(num_columns)
        words = reader.read(f"{name}.qweight", (num_columns, -(-num_rows // 8)), (), INT32)
        codes = unpack_words(words, 4, num_rows, AWQ_ORDER).T[part.rows]
        words = reader.read(f"{name}.qzeros", (num_groups, -(-num_rows // 8)), (), INT32)
        zero = unpack_words(words, 4, num_rows, AWQ_ORDER).T[part.rows]
        scale = read_transposed_scales(reader, f"{name}.scales", num_rows, num_groups, part)
        return take_part(signed(codes, 4), scale, signed(zero, 4), None, name, part, self.scheme)


def take_part(
    codes: Tensor, scale: Tensor, zero: Tensor | None, groups: Tensor | None, name: str, part: Part, scheme: Scheme
) -> Quantized:
    """The part's columns. codes: [rows of the part, all columns]; scale, zero: [rows of the part, all groups]; groups:
    [all columns], if they aren't runs of neighbors.

    Raises FieldError if columns of a group are on several ranks, or if the scheme has no zero points and these aren't
    0.
    """
    if zero is not None and scheme.is_symmetric:
        if zero.any():
            found = int(zero[zero != 0][0]) - scheme.min_code
            wanted = f"expected {-scheme.min_code} with sym, got {found}"
            raise FieldError("model", f"{name}: zero points: {wanted} (checkpoint_format gptq stores them minus 1)")
        zero = None
    if groups is not None:
        check_groups(groups, scheme.group_size or part.num_columns, name)
    if groups is not None and not torch.equal(groups, groups.sort().values):
        if part.columns.indices(part.num_columns) != (0, part.num_columns, 1):
            raise FieldError(
                "tensor_parallel_size", f"{name} has groups of scattered columns (desc_act, actorder), which are on "
                "several ranks: expected 1",
            )  # fmt: skip
        order = groups.argsort(stable=True)
        return Quantized(codes[:, order], scale, zero, order)
    own = group_slice(scheme, part, name)
    return Quantized(codes[:, part.columns].contiguous(), scale[:, own], None if zero is None else zero[:, own])


def group_slice(scheme: Scheme, part: Part, name: str) -> slice:
    """The groups that the part's columns are: of the scales and zero points, which columns? Raises FieldError if a
    group is on several ranks. name: the projection's, for the message."""
    start, stop, _ = part.columns.indices(part.num_columns)
    if scheme.group_size is None:
        return slice(None)
    if start % scheme.group_size or stop % scheme.group_size:
        raise FieldError("tensor_parallel_size", f"{name}: {straddling(start, stop, scheme.group_size)}")
    return slice(start // scheme.group_size, stop // scheme.group_size)


def straddling(start: int, stop: int, group_size: int) -> str:
    """What is wrong with a rank's columns."""
    return f"columns {start} to {stop - 1} of this rank aren't whole groups of {group_size}: expected fewer ranks"


def check_groups(groups: Tensor, group_size: int, name: str) -> None:
    """Raises FieldError if the groups of the columns aren't all of the same size."""
    if not torch.equal(groups.sort().values, torch.arange(len(groups)) // group_size):
        sizes = f"{len(groups) // group_size} groups of {group_size} columns"
        raise FieldError("model", f"{name}: g_idx: expected {sizes}, got others")


def read_scales(reader: CheckpointReader, name: str, num_rows: int, num_groups: int) -> Tensor:
    """[num_rows, num_groups], float32. A single scale is for the whole matrix. Raises FieldError if one is below 0."""
    if reader.shape_of(name) in ((1,), ()):
        stored = reader.read(name, reader.shape_of(name) or ()).reshape(1, 1).expand(num_rows, num_groups)
    else:
        stored = reader.read(name, (num_rows, num_groups))
    return checked(stored.float(), name)


def read_transposed_scales(
    reader: CheckpointReader, name: str, num_rows: int, num_groups: int, part: Part
) -> Tensor:  # fmt: skip
    """Scales of the part's rows that are stored as [num_groups, num_rows]: [rows of the part, num_groups], float32."""
    return checked(reader.read(name, (num_groups, num_rows), (slice(None), part.rows)).T.float(), name)


def checked(scale: Tensor, name: str) -> Tensor:
    """Raises FieldError if a scale is below 0."""
    if not (scale >= 0).all():
        raise FieldError("model", f"{name}: expected scales of at least 0, got {scale.min().item()}")
    return scale


def read_group_index(reader: CheckpointReader, name: str, num_columns: int) -> Tensor | None:
    """The group of each column: [num_columns]. None if there is no such tensor."""
    if reader.shape_of(name) is None:
        return None
    return reader.read(name, (num_columns,), (), INT32).long()


def signed(codes: Tensor, bits: int) -> Tensor:
    """From 0 … 2^bits - 1 to -2^(bits - 1) … 2^(bits - 1) - 1."""
    return (codes - 2 ** (bits - 1)).to(torch.int8)


def discard(reader: CheckpointReader, name: str) -> None:
    """This tensor says nothing new."""
    reader.unread.discard(name)
