"""Quantize a decoder layer with one of the methods."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from ..model import DecoderLayer
from .calibration import InputStats, matrices
from .gptq import gptq
from .scheme import Quantized, Scheme, dequantize, quantize
from .smoothing import awq_factors, quantize_clipped, smooth, smoothquant_factors

MethodName = Literal["rtn", "gptq", "awq", "smoothquant"]


@dataclass(frozen=True, slots=True)
class Method:
    """name: rtn rounds to nearest. scale_dtype: of the stored scales."""

    name: MethodName
    scheme: Scheme
    scale_dtype: torch.dtype = torch.float32

    @property
    def needs_text(self) -> bool:
        return self.name != "rtn"

    def quantize_layer(self, layer: DecoderLayer, stats: dict[str, list[InputStats]]) -> dict[str, list[Quantized]]:
        """The codes of a layer's matrices: path → one entry, or one for each expert. Afterwards, the layer has the
        numbers that the codes stand for.

        stats: see TextRunner.measure(); not for rtn. With awq and smoothquant, norms change as well.
        """
        if self.name == "awq":
            smooth(layer, stats, partial(awq_factors, scheme=self.scheme))
        elif self.name == "smoothquant":
            smooth(layer, stats, smoothquant_factors)
        found: dict[str, list[Quantized]] = {}
        for path, weight in matrices(layer).items():
            parts = weight.data if weight.data.ndim == 3 else weight.data.unsqueeze(0)
            found[path] = []
            for number, matrix in enumerate(parts):
                codes = self._quantize(matrix, stats[path][number] if self.needs_text else None)
                matrix.copy_(dequantize(codes, self.scheme))
                found[path].append(codes)
        return found

    def _quantize(self, matrix: torch.Tensor, inputs: InputStats | None) -> Quantized:
        if inputs is not None and inputs.num_inputs and self.name == "gptq":
            return gptq(matrix, inputs.second_moment, self.scheme, self.scale_dtype)
        if inputs is not None and inputs.num_inputs and self.name == "awq":
            return quantize_clipped(matrix, inputs.second_moment, self.scheme, self.scale_dtype)
        return quantize(matrix, self.scheme, self.scale_dtype)
