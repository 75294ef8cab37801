"""Matrices of codes, in the place of those of floating-point numbers."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from common.checkpoint_reader import CheckpointReader
from common.errors import FieldError

from ..weight import Part, Place, Weight
from .packing import pack_nibbles, unpack_nibbles
from .products import grouped_product, product
from .scheme import Quantized, Scheme, dequantize


class Layout(Protocol):
    """Where the codes of a matrix come from: computed from the checkpoint's numbers, or stored there in some form.

    scheme: of the codes. has_order: whether groups may consist of columns that aren't neighbors.
    """

    @property
    def scheme(self) -> Scheme: ...

    @property
    def has_order(self) -> bool: ...

    def read(self, reader: CheckpointReader, name: str, part: Part) -> Quantized:
        """The part of a projection. Raises FieldError if it can't be read, or if a group would straddle ranks."""
        ...


class QuantizedWeight(Weight):
    """codes: […, rows, bytes of a row], int8. scale, zero: […, rows, num_groups], float32 and int8; zero may be None.
    order: [columns], int64, or None. shape: of the matrix, without packing."""

    def __init__(self, shape: tuple[int, ...], layout: Layout) -> None:
        nn.Module.__init__(self)
        self.shape, self.layout, self.scheme = shape, layout, layout.scheme
        *rows, num_columns = shape
        num_groups = self.scheme.num_groups(num_columns)
        self.codes = integers(*rows, num_columns // self.scheme.codes_per_byte)
        self.scale = nn.Parameter(torch.empty(*rows, num_groups), requires_grad=False)
        self.zero = None if self.scheme.is_symmetric else integers(*rows, num_groups)
        self.order = integers(num_columns, dtype=torch.int64) if layout.has_order else None
        self._has_read_order = False

    def read(self, reader: CheckpointReader, name: str, part: Part, place: Place) -> None:
        self.store(self.layout.read(reader, name, part), place, name)

    def store(self, quantized: Quantized, place: Place, name: str) -> None:
        """Put codes of a projection in their place. name: for messages."""
        codes = quantized.codes
        self.codes[place] = pack_nibbles(codes, self.group_size) if self.scheme.codes_per_byte == 2 else codes
        self.scale[place] = quantized.scale
        if self.zero is not None:
            assert quantized.zero is not None, "a scheme with zero points"
            self.zero[place] = quantized.zero
        if self.order is not None:
            self._set_order(quantized.order, name)
        elif quantized.order is not None:
            raise FieldError(
                "model", f"{name} has groups of scattered columns (g_idx), but not by its config (desc_act)"
            )

    def _set_order(self, order: Tensor | None, name: str) -> None:
        """All projections of this matrix have the same input, so the same order."""
        assert self.order is not None
        found = torch.arange(self.shape[-1]) if order is None else order
        if self._has_read_order and not torch.equal(self.order.cpu(), found.cpu()):
            raise FieldError("model", f"{name} has its columns in another order (g_idx) than the projection beside it")
        self.order.copy_(found)
        self._has_read_order = True

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.scheme.group_size or self.shape[-1]

    def quantized(self) -> Quantized:
        """The codes, unpacked."""
        codes = unpack_nibbles(self.codes, self.group_size) if self.scheme.codes_per_byte == 2 else self.codes
        return Quantized(codes, self.scale, self.zero, self.order)

    def dequantized(self) -> Tensor:
        """The numbers that the codes stand for: […, rows, columns], float32, in the order of the input features."""
        return dequantize(self.quantized(), self.scheme)

    def expert(self, expert: int) -> QuantizedWeight:
        """One expert's matrix. It shares this one's memory."""
        with torch.device("meta"):
            weight = QuantizedWeight(self.shape[1:], self.layout)
        for name, parameter in self.named_parameters():
            own = parameter if name == "order" else parameter[expert]
            setattr(weight, name, nn.Parameter(own, requires_grad=False))
        weight.kernels = self.kernels
        return weight

    def forward(self, rows: Tensor, bias: Tensor | None = None) -> Tensor:
        output = product(rows.flatten(0, -2), self).unflatten(0, rows.shape[:-1])
        return output if bias is None else output + bias

    def grouped(self, rows: Tensor, counts: Tensor) -> Tensor:
        return grouped_product(rows, self, counts)


def integers(*shape: int, dtype: torch.dtype = torch.int8) -> nn.Parameter:
    """Numbers that .to(dtype) doesn't change."""
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
