"""The limits that a request must fit into, checked before it is queued."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from common.errors import FieldError, context_exceeded
from common.sampling_params import SamplingParams, check_vocabulary


class EngineLimits(msgspec.Struct, frozen=True):
    """Limits in tokens. num_kv_tokens: size of the KV cache. max_prompt_len: None if a prompt may fill the context."""

    max_model_len: int
    vocab_size: int
    num_kv_tokens: int
    max_prompt_len: int | None = None


def check_fits(prompt_token_ids: Sequence[int], params: SamplingParams, limits: EngineLimits) -> None:
    """Raises FieldError, naming field, value and limit, for a request that can never be served."""
    check_vocabulary(params, limits.vocab_size)
    num_prompt_tokens = len(prompt_token_ids)
    if not num_prompt_tokens:
        raise FieldError("prompt", "expected at least one token, got an empty prompt")
    if min(prompt_token_ids) < 0 or max(prompt_token_ids) >= limits.vocab_size:
        raise FieldError("prompt", f"expected token ids from 0 to {limits.vocab_size - 1} (the vocabulary)")
    if num_prompt_tokens >= limits.max_model_len:
        raise context_exceeded("prompt", num_prompt_tokens, limits.max_model_len)
    num_tokens = min(num_prompt_tokens + params.max_tokens, limits.max_model_len)
    if num_tokens - 1 > limits.num_kv_tokens:  # the last token's key and value are never stored
        raise FieldError(
            "prompt",
            f"{num_prompt_tokens} tokens and an answer of up to {num_tokens - num_prompt_tokens} "
            f"can never fit: the KV cache holds {limits.num_kv_tokens} tokens; lower max_tokens or start with more KV "
            "blocks",
        )
    if limits.max_prompt_len is not None and num_prompt_tokens > limits.max_prompt_len:
        limit = f"at most max_num_batched_tokens={limits.max_prompt_len} tokens"
        raise FieldError("prompt", f"expected {limit}, got {num_prompt_tokens}")
