"""Where the scales of quantized keys and values come from."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from common.checkpoint import Checkpoint, load_tokenizer
from common.corpus import calibration_rows
from common.errors import FieldError

from ...config import EngineConfig
from ..model import DecoderModel
from .calibration import causal_attention
from .choice import as_object, quantization_settings
from .kv_codes import KV_DTYPES, LARGEST_CODES, KVFormat

NUM_TOKENS = 1_024  # of text, on which scales are measured
SCALE_STEPS = 8  # between a power of two and the next

logger = logging.getLogger(__name__)


def choose_kv_format(model: DecoderModel, config: EngineConfig, checkpoint: Checkpoint) -> KVFormat:
    """How a model's keys and values are stored. The scales of codes are those of the checkpoint if it has any for this
    dtype, else they are measured on text. All ranks of a model call this together.

    Raises FieldError for int8 without scales: with a scale of 1, most keys and values would become 0.
    """
    if config.kv_cache_dtype == "auto":
        return KVFormat(model.dtype)
    dtype, scales = KV_DTYPES[config.kv_cache_dtype], None
    if stored_dtype(checkpoint) == config.kv_cache_dtype:
        scales = model.stored_kv_scales
    if scales is None and config.calculate_kv_scales:
        scales = calculate_scales(model, checkpoint, dtype)
    if scales is None and dtype == torch.int8:
        raise FieldError(
            "calculate_kv_scales", "the checkpoint has no scales for keys and values in int8: expected true"
        )
    if scales is None:
        logger.warning("the checkpoint has no scales for keys and values: 1.0 is used, which may cost quality")
        scales = torch.ones(model.num_layers, 2, model.num_kv_heads)
    return KVFormat(dtype, scales.to(model.device))


def stored_dtype(checkpoint: Checkpoint) -> str:
    """What the checkpoint's own scales are for: FP8, unless its config says otherwise."""
    scheme = (quantization_settings(checkpoint.config) or {}).get("kv_cache_scheme")
    is_int = scheme is not None and as_object("kv_cache_scheme", scheme).get("type") == "int"
    return "int8" if is_int else "fp8"


@torch.inference_mode()
def calculate_scales(model: DecoderModel, checkpoint: Checkpoint, dtype: torch.dtype) -> torch.Tensor:
    """Measured on the first tokens of the calibration text. vLLM measures on the first batch that comes: then answers
    depend on who asks first."""
    num_tokens = min(NUM_TOKENS, checkpoint.max_model_len)
    rows = calibration_rows(load_tokenizer(checkpoint), num_tokens, 1)
    input_ids = torch.tensor(rows[0], device=model.device) % checkpoint.config.vocab_size
    positions = torch.arange(num_tokens, device=model.device)
    scales = measure_scales(
        lambda attend: model(input_ids, positions, attend), model.num_layers, model.num_kv_heads, dtype
    )
    for mixture in model.mixtures:
        mixture.loads.zero_()  # from tokens that nobody sent
    return scales


def measure_scales(
    forward: Callable[[Callable[..., Tensor]], object], num_layers: int, num_kv_heads: int, dtype: torch.dtype
) -> Tensor:
    """Run the model once, and find the scales with which the largest key and the largest value of each KV head become
    the largest code.

    forward: runs the model with the attend() that it is given. Returns [num_layers, 2, num_kv_heads], float32.
    """
    largest = torch.zeros(num_layers, 2, num_kv_heads)

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, rotation: Callable[[Tensor], Tensor]) -> Tensor:
        for which, numbers in enumerate((rotation(key), value)):
            largest[layer, which] = numbers.abs().amax(dim=(0, 2)).float().cpu()
        return causal_attention(layer, query, key, value, rotation)

    forward(attend)
    return round_up(torch.where(largest == 0, 1.0, largest / LARGEST_CODES[dtype]))


def round_up(scale: Tensor) -> Tensor:
    """To the next of SCALE_STEPS steps per power of two. The sums of ranks differ in their last bits, and so would
    scales between engines of different sizes, or before and after a restart."""
    fraction, exponent = torch.frexp(scale)  # the fraction is between 0.5 and 1
    return torch.ldexp((fraction * 2 * SCALE_STEPS).ceil() / (2 * SCALE_STEPS), exponent)
