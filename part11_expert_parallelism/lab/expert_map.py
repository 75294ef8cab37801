"""Where the tokens go: how often each expert of each layer is chosen for a kind of prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from rich.text import Text
from torch import Tensor

from common.checkpoint import load_tokenizer, resolve_checkpoint

from ..worker.model import DecoderModel
from ..worker.weights import load_decoder

PROMPTS: dict[str, tuple[str, ...]] = {
    "questions": (
        "What is a KV cache?", "Why is decoding bound by memory bandwidth?", "Explain continuous batching.",
        "What does a block table do?", "How does speculative decoding work?", "When is a request preempted?",
    ),
    "stories": (
        "Tell me a story about a fox.", "Tell me a story about Nora and a boat.", "Write a short story about a kite.",
        "Tell me a story about a lighthouse.", "Please write a story about an old tree.", "Tell me a story about snow.",
    ),
    "lists": (
        "Here is a list: apple, river, candle, tiger, moon, bread. What comes after candle?",
        "Repeat these words: stone, garden, violin, lamp, sugar, horse, window.",
        "Here is a list: owl, pearl, train, basket, ember, cloud. What comes after train?",
        "Repeat these words: copper, forest, ladder, music, salt, feather, oven.",
    ),
}  # fmt: skip
SHADES = " ░▒▓█"


def load_model(name: str) -> tuple[DecoderModel, Any]:
    """A whole model on the CPU, and its tokenizer."""
    checkpoint = resolve_checkpoint(name)
    return load_decoder(checkpoint, torch.float32, "cpu"), load_tokenizer(checkpoint)


def count_experts(model: DecoderModel, prompts: Sequence[list[int]]) -> list[list[int]]:
    """How many tokens of these prompts go to each expert, for each layer that has experts."""
    for mixture in model.mixtures:
        mixture.loads.zero_()
    with torch.inference_mode():
        for prompt in prompts:
            model(torch.tensor(prompt), torch.arange(len(prompt)), _attend)
    return [mixture.loads.tolist() for mixture in model.mixtures]


def _attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention over one sequence, without a cache."""
    q, k, v = (each.transpose(0, 1)[None] for each in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def heat_map(loads: Sequence[Sequence[int]]) -> list[Text]:
    """A line for each layer: the darker an expert's cell, the more tokens it gets; █ from twice the mean on."""
    lines = []
    for counts in loads:
        mean = sum(counts) / len(counts) or 1.0
        cells = [SHADES[min(len(SHADES) - 1, round((len(SHADES) - 1) * count / (2 * mean)))] * 2 for count in counts]
        lines.append(Text("".join(cells)))
    return lines
