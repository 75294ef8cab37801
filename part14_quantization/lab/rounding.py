"""Change a loaded model: round its weights to any number of bits, or give its activations outliers."""

from __future__ import annotations

import math
from typing import Any

import torch

from common.corpus import calibration_rows

from ..llm import LLM
from ..worker.linear import Linear
from ..worker.model import DecoderModel
from ..worker.quantization.calibration import TextRunner
from ..worker.quantization.layouts import QuantizeOnLoad
from ..worker.quantization.scheme import Scheme, dequantize, quantize
from ..worker.quantization.smoothing import smooth, smoothquant_factors
from ..worker.quantization.weight import QuantizedWeight
from ..worker.weight import Weight

NUM_OUTLIERS = 4  # features of each layer's inputs


def model_of(llm: LLM) -> DecoderModel:
    """Of an engine with one rank."""
    model: DecoderModel = llm.engine.executor.worker.model  # type: ignore[attr-defined]
    return model


def layers_of(model: DecoderModel) -> list[Any]:
    return list(model.layers.values())


def linear_bytes(model: DecoderModel) -> int:
    """Of the linear layers' weights in memory, scales included."""
    return sum(each.nbytes for module in model.modules() if isinstance(module, Weight) for each in module.parameters())


def num_linear_weights(model: DecoderModel) -> int:
    return sum(math.prod(module.shape) for module in model.modules() if isinstance(module, Weight))


@torch.inference_mode()
def round_weights(model: DecoderModel, scheme: Scheme) -> None:
    """Replace the weights of linear layers by the numbers that their codes stand for: the answers are those of a
    quantized model, the memory isn't."""
    for module in model.modules():
        if isinstance(module, Weight) and not isinstance(module, QuantizedWeight):
            module.data.copy_(dequantize(quantize(module.data, scheme), scheme))


@torch.inference_mode()
def quantize_layers(model: DecoderModel, scheme: Scheme) -> None:
    """Quantize the linear layers of a model that is loaded already."""
    for module in model.modules():
        if isinstance(module, Linear):
            weight = QuantizedWeight(module.weight.shape, QuantizeOnLoad(scheme))
            weight.store(quantize(module.weight.data, scheme), (slice(None),), "")
            module.weight = weight


@torch.inference_mode()
def smooth_activations(llm: LLM) -> None:
    """SmoothQuant, calibrated with the calibration texts."""
    model = model_of(llm)
    text = TextRunner(model, calibration_rows(llm.tokenizer, 256))
    for layer in layers_of(model):
        smooth(layer, text.measure(layer), smoothquant_factors)
        text.advance(layer)


@torch.inference_mode()
def plant_outliers(model: DecoderModel, factor: float) -> None:
    """Make a few input features of the attention and of the MLP `factor` times larger, and their columns as much
    smaller. The model computes the same. Large language models are like that from some 6 billion parameters on
    (Dettmers et al., 2022)."""
    for number, layer in enumerate(layers_of(model)):
        features = [(7 + 61 * number + 97 * index) % model.config.hidden_size for index in range(NUM_OUTLIERS)]
        for norm, linear in (
            (layer.input_layernorm, layer.self_attn.qkv_proj),
            (layer.post_attention_layernorm, layer.mlp.gate_up_proj),
        ):
            norm.weight[features] *= factor
            linear.weight.data[:, features] /= factor
