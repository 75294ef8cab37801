"""Small random models as checkpoints, matrices of codes, and what several of these tests do with them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from common.checkpoint import MODELS_DIR, Checkpoint, resolve_checkpoint
from common.errors import FieldError
from part14_quantization.worker.model import DecoderModel
from part14_quantization.worker.quantization.calibration import causal_attention
from part14_quantization.worker.quantization.scheme import Quantized, Scheme
from part14_quantization.worker.quantization.weight import QuantizedWeight
from part14_quantization.worker.weight import Part
from part14_quantization.worker.weights import load_decoder

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


def save_model(directory: Path, family: str = "llama", seed: int = 0, **changes: Any) -> Checkpoint:
    """A model of 2 layers with the tokenizer of `tiny`. Its norms and biases are random too, or a test of what becomes
    of them would see nothing."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = dict(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
        vocab_size=4_096, max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.2,
        bos_token_id=None, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    if family != "qwen2_moe":
        shape["head_dim"] = 16 if family == "qwen3" else 8
    if family == "mixtral":
        shape |= dict(num_local_experts=4, num_experts_per_tok=2)
    elif family.endswith("_moe"):
        shape |= dict(num_experts=4, moe_intermediate_size=16, num_experts_per_tok=2)
    if family == "qwen2_moe":
        shape |= dict(shared_expert_intermediate_size=32)
    config = AutoConfig.for_model(family, **{**shape, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter)
            elif "norm" in name:
                nn.init.uniform_(parameter, 0.3, 2)
    model.save_pretrained(directory)
    for name in TOKENIZER_FILES:
        shutil.copyfile(MODELS_DIR / "tiny" / name, directory / name)
    return resolve_checkpoint(str(directory))


@contextmanager
def refused(field: str, message: str, look: str) -> Iterator[None]:
    """What is done inside must raise a FieldError. message: a regular expression. look: where the fault is if it
    doesn't."""
    try:
        yield
    except FieldError as error:
        is_right = error.field == field and re.search(message, str(error))
        assert is_right, f"expected an error about {field} like {message!r}, got {error!r}. {look}"
        return
    pytest.fail(f"expected an error about {field} like {message!r}, and there was none. {look}")


def load(directory: Path | Checkpoint) -> DecoderModel:
    checkpoint = directory if isinstance(directory, Checkpoint) else resolve_checkpoint(str(directory))
    return load_decoder(checkpoint, torch.float32, "cpu")


@torch.inference_mode()
def logits(model: DecoderModel, token_ids: Sequence[int]) -> Tensor:
    """[number of tokens, vocab_size]"""
    positions = torch.arange(len(token_ids))
    return model.compute_logits(model(torch.tensor(token_ids), positions, causal_attention))


@dataclass(frozen=True)
class Given:
    """A layout that has these codes."""

    scheme: Scheme
    codes: Quantized
    has_order: bool = False

    def read(self, reader: Any, name: str, part: Part) -> Quantized:
        return self.codes


def weight_of(codes: Quantized, scheme: Scheme) -> QuantizedWeight:
    """A matrix with these codes, or one for each expert, as an engine has it."""
    layout = Given(scheme, codes, codes.order is not None)
    weight = QuantizedWeight(tuple(codes.codes.shape), layout)
    weight.read(None, "a_proj", Part(*codes.codes.shape[-2:]), (slice(None),))  # type: ignore[arg-type]
    return weight
