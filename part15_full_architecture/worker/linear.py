"""The layers that have weights. Each layer knows its tensors in a checkpoint and loads them itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.checkpoint_reader import CheckpointReader

from .kernels.ops import Kernels
from .weight import Part, Weight


class Linear(nn.Module):
    """One projection, or several projections of the same input as one matrix product.

    outputs: a projection's name in the checkpoint → its number of rows, in the order of the rows. weight: may be
    replaced by a quantized one before it is loaded.
    """

    def __init__(self, in_features: int, outputs: dict[str, int], bias: bool) -> None:
        super().__init__()
        self.outputs = outputs
        self.weight = Weight(sum(outputs.values()), in_features)
        self.bias = nn.Parameter(torch.empty(sum(outputs.values()))) if bias else None

    def load(self, reader: CheckpointReader, path: str) -> None:
        """path: the layer's path in the model. In a checkpoint, the projections are at the same level."""
        owner, start = path.rpartition(".")[0], 0
        for output, num_rows in self.outputs.items():
            name = f"{owner}.{output}" if owner else output
            part, place = self.part(output), slice(start, start + num_rows)
            self.weight.read(reader, name, part, (place,))
            if self.bias is not None:
                self.bias[place] = reader.read(f"{name}.bias", (part.num_rows,), (part.rows,))
            start += num_rows

    def part(self, name: str) -> Part:
        """What this layer needs of a projection."""
        return Part(self.outputs[name], self.weight.shape[-1])

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: […, in_features]; returns […, total rows]."""
        return self.weight(hidden, self.bias)


class Embedding(nn.Module):
    """A vector for every token of the vocabulary."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def load(self, reader: CheckpointReader, path: str) -> None:
        self.weight.copy_(reader.read(f"{path}.weight", tuple(self.weight.shape)))

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids: [num_tokens], int64; returns [num_tokens, hidden_size]."""
        return F.embedding(token_ids, self.weight)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, over the last dimension, computed in float32 (Zhang and Sennrich, 2019)."""

    kernels = Kernels()

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def load(self, reader: CheckpointReader, path: str) -> None:
        self.weight.copy_(reader.read(f"{path}.weight", tuple(self.weight.shape)))

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: […, size]; returns the same shape and dtype."""
        return self.kernels.rms_norm(hidden, self.weight, self.eps)

    def add(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """Add hidden to the residual stream, in place, and normalize the sum. Both: [num_tokens, size]; returns the
        same shape and dtype."""
        return self.kernels.add_rms_norm(hidden, residual, self.weight, self.eps)
