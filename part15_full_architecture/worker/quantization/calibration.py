"""Run text through a model layer by layer, and note what goes into each matrix."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model import DecoderModel
from ..weight import Weight


@dataclass(slots=True)
class InputStats:
    """What is known about the inputs of a matrix. second_moment: [columns, columns], the mean of x · xᵀ over all inputs
    x. mean_abs, max_abs: [columns], of each input feature."""

    second_moment: Tensor
    mean_abs: Tensor
    max_abs: Tensor
    num_inputs: int = 0

    @classmethod
    def empty(cls, num_columns: int, device: torch.device) -> InputStats:
        moment = torch.zeros(num_columns, num_columns, device=device)
        return cls(moment, torch.zeros(num_columns, device=device), torch.zeros(num_columns, device=device))

    def add(self, inputs: Tensor) -> None:
        """inputs: [n, columns]"""
        if not len(inputs):
            return
        inputs = inputs.float()
        total = self.num_inputs + len(inputs)
        self.second_moment *= self.num_inputs / total
        self.second_moment += inputs.T @ inputs / total
        self.mean_abs = (self.mean_abs * self.num_inputs + inputs.abs().sum(dim=0)) / total
        self.max_abs = torch.maximum(self.max_abs, inputs.abs().amax(dim=0))
        self.num_inputs = total


def matrices(layer: nn.Module) -> dict[str, Weight]:
    """The matrices of a layer by their paths in it."""
    return {path: module for path, module in layer.named_modules() if isinstance(module, Weight)}


class TextRunner:
    """The hidden states of a text's rows, after as many layers as have run. rows: of token ids."""

    def __init__(self, model: DecoderModel, rows: list[list[int]]) -> None:
        assert model.embed_tokens is not None, "the whole model"
        self.model = model
        self.hidden = [model.embed_tokens(torch.tensor(row, device=model.device)) for row in rows]

    def measure(self, layer: nn.Module) -> dict[str, list[InputStats]]:
        """What goes into the matrices of the next layer: path → one entry, or one for each expert. The hidden states
        stay as they are."""
        stats = {
            path: [InputStats.empty(weight.shape[-1], weight.data.device) for _ in range(num_matrices(weight))]
            for path, weight in matrices(layer).items()
        }
        with contextlib.ExitStack() as stack:
            for path, weight in matrices(layer).items():
                stack.enter_context(recording(weight, stats[path]))
            self._run(layer)
        return stats

    def advance(self, layer: nn.Module) -> None:
        """Run the next layer."""
        self.hidden = self._run(layer)

    def _run(self, layer: nn.Module) -> list[Tensor]:
        outputs = []
        for hidden in self.hidden:
            rotation = self.model.rotary_embedding(torch.arange(len(hidden), device=hidden.device))
            residual = hidden.clone()
            output = layer(None, residual, rotation, causal_attention)
            outputs.append(residual + output)
        return outputs


def num_matrices(weight: Weight) -> int:
    return weight.shape[0] if len(weight.shape) == 3 else 1


@contextlib.contextmanager
def recording(weight: Weight, stats: list[InputStats]) -> Iterator[None]:
    """Inside, all inputs of a matrix, or of each expert's, are noted."""
    grouped: Callable[[Tensor, Tensor], Tensor] = weight.grouped

    def note_groups(rows: Tensor, counts: Tensor) -> Tensor:
        for expert, inputs in enumerate(rows.split(counts.tolist())):
            stats[expert].add(inputs)
        return grouped(rows, counts)

    handle = weight.register_forward_pre_hook(lambda _, inputs: stats[0].add(inputs[0]))
    weight.grouped = note_groups  # type: ignore[method-assign]
    try:
        yield
    finally:
        handle.remove()
        del weight.grouped


def causal_attention(
    layer: int, query: Tensor, key: Tensor, value: Tensor, rotation: Callable[[Tensor], Tensor]
) -> Tensor:
    """attend() for a whole sequence without a cache."""
    q, k, v = (heads.transpose(0, 1).unsqueeze(0) for heads in (rotation(query), rotation(key), value))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
