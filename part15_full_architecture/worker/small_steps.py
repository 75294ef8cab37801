"""Steps of few tokens, whose time goes to calls and launches more than to the work: how a device computes them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..config import EngineConfig
from .attention import AttentionMetadata, PagedAttention
from .graphs import DEFAULT_SIZES, StepGraphs, can_be_captured
from .kernels.ops import Kernels
from .megakernel import Megakernel, can_be_one_kernel
from .model import DecoderModel


class SmallSteps(Protocol):
    def run(self, input_ids: Tensor, positions: Tensor, metadata: AttentionMetadata) -> Tensor | None:
        """A forward pass: [num_tokens, hidden_size], which the next call may overwrite. None for an empty step
        and one that is too large.

        input_ids, positions: [num_tokens], int64.
        """
        ...


def make_small_steps(
    model: DecoderModel, attention: PagedAttention, config: EngineConfig, max_blocks: int
) -> SmallSteps | None:
    """The CUDA graphs that the config asks for, on a CPU the megakernel, or None if the model can have neither.

    max_blocks: the width of the widest block table.
    """
    assert config.max_num_batched_tokens is not None, "resolve_config fills it in"
    sizes = [size for size in config.graph_sizes(DEFAULT_SIZES) if size <= config.max_num_batched_tokens]
    if sizes and can_be_captured(model):
        graphs = StepGraphs(model, attention, sizes, max_blocks)
        with torch.inference_mode():
            graphs.capture()
        return graphs
    if uses_megakernel(model, attention.kernels, attention.kv_cache.scales, config):
        return Megakernel(model, attention, torch.get_num_threads())
    return None


def uses_megakernel(model: DecoderModel, kernels: Kernels, kv_scales: Tensor | None, config: EngineConfig) -> bool:
    return config.megakernel and not config.cudagraph_capture_sizes and can_be_one_kernel(model, kernels, kv_scales)
