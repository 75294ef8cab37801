"""Assertions and small models that the tests of all parts share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

TOP_2_TOLERANCE = 1e-4
FAMILIES = ("llama", "qwen2", "qwen3")


def small_model(family: str, seed: int, vocab_size: int = 320, num_layers: int = 2) -> Any:
    """A random model of a few thousand parameters, in float32: fast, with the real code paths.

    The shapes are odd on purpose: 3 query heads per KV head, for qwen3 a head_dim that is not hidden_size / heads, and
    untied embeddings for odd seeds. A mixture of experts has 4, of which each token gets 2.
    """
    torch.manual_seed(seed)
    experts = {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2} if family == "qwen3_moe" else {}
    config = AutoConfig.for_model(
        family, hidden_size=48, intermediate_size=96, num_hidden_layers=num_layers, num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16 if family == "qwen3" else 8, vocab_size=vocab_size, max_position_embeddings=256,
        tie_word_embeddings=seed % 2 == 0, initializer_range=0.3,
        eos_token_id=None, bos_token_id=None, pad_token_id=None, **experts,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@torch.inference_mode()
def reference_greedy(
    model: Any, prompt_token_ids: Sequence[int], max_tokens: int, eos_token_ids: Sequence[int] = ()
) -> list[int]:
    """The greedy continuation from transformers' generate, including the end-of-sequence token."""
    prompt = torch.tensor([list(prompt_token_ids)], device=model.device)
    eos = list(eos_token_ids) or [model.config.vocab_size]  # None would mean the model's own; no token has this id
    config = GenerationConfig(do_sample=False, max_new_tokens=max_tokens, eos_token_id=eos, pad_token_id=0)
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
    return output[0, prompt.shape[1] :].tolist()


@torch.inference_mode()
def assert_same_greedy(
    model: Any, prompt_token_ids: Sequence[int], got: Sequence[int], expected: Sequence[int], where: str
) -> None:
    """The oracle: got equals expected, token for token.

    Two correct engines may add numbers in a different order. So the first difference may be a tie: the reference
    model's two best logits are within TOP_2_TOLERANCE of each other. Tokens after a tie are not compared. Any other
    difference is a bug.
    """
    got, expected = list(got), list(expected)
    at = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), min(len(got), len(expected)))
    if got == expected:
        return
    assert at < len(got) and at < len(expected), (
        f"{where}: expected {len(expected)} tokens, got {len(got)}; the first {at} agree. "
        f"One answer stopped early or late: look at the stop rules. Expected …{expected[-4:]}, got …{got[-4:]}"
    )
    text = torch.tensor([[*prompt_token_ids, *expected[:at]]], device=model.device)
    top = model(text).logits[0, -1].float().topk(2)
    gap = float(top.values[0] - top.values[1])
    is_tie = gap <= TOP_2_TOLERANCE and {got[at], expected[at]} <= set(top.indices.tolist())
    assert is_tie, (
        f"{where}: output token {at} (position {len(prompt_token_ids) + at}): expected {expected[at]}, got {got[at]}. "
        f"The reference's two best logits are {gap:.2e} apart (a tie is at most {TOP_2_TOLERANCE:g}), so this is a "
        f"bug: look at positions, at the attention mask and at what the KV cache held when this token was computed."
    )
