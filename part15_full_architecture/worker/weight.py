"""The matrices of a model: how they are stored, and the products with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.checkpoint_reader import CheckpointReader

from .kernels.ops import Kernels

Place: TypeAlias = "tuple[int | slice, ...]"
ALL = slice(None)


@dataclass(frozen=True, slots=True)
class Part:
    """The part of a matrix in a checkpoint that a rank has. Rows are output features, columns are input features.

    num_rows, num_columns: of the whole matrix. rows, columns: the rank's.
    """

    num_rows: int
    num_columns: int
    rows: slice = field(default_factory=lambda: ALL)
    columns: slice = field(default_factory=lambda: ALL)

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_rows, self.num_columns

    @property
    def index(self) -> tuple[slice, slice]:
        return self.rows, self.columns


class Packed(Protocol):
    """A matrix in another order, see packed_matrix.py."""

    nbytes: int

    def product(self, rows: Tensor, bias: Tensor | None = None) -> Tensor: ...


class Weight(nn.Module):
    """The matrix of a layer, [rows, columns], or those of its experts, [num_experts, rows, columns], as they are in the
    checkpoint: in floating point.
    """

    kernels = Kernels()

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape
        self.data = nn.Parameter(torch.empty(shape))
        self.packed: Packed | None = None  # takes the place of data, or is a copy: see packed_matrix.py

    def read(self, reader: CheckpointReader, name: str, part: Part, place: Place) -> None:
        """Read the part of a projection. name: its name in the checkpoint. place: where it belongs in this matrix."""
        self.data[place] = reader.read(f"{name}.weight", part.shape, part.index)

    def forward(self, rows: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product. rows: […, columns]; bias: [rows of the matrix]. Returns […, rows of the matrix]."""
        return F.linear(rows, self.data, bias) if self.packed is None else self.packed.product(rows, bias)

    def grouped(self, rows: Tensor, counts: Tensor) -> Tensor:
        """The first counts[0] rows times the first expert's matrix, and so on: see reference.py::grouped_linear."""
        return self.kernels.grouped_linear(rows, self.data, counts)
