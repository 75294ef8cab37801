"""Which requests are rejected before they are queued."""

from __future__ import annotations

from collections.abc import Sequence

from common.limits import EngineLimits, check_fits
from common.sampling_params import SamplingParams, check_supported

SAMPLING_FIELDS = (
    "max_tokens", "min_tokens", "temperature", "top_k", "top_p", "seed", "stop_token_ids", "ignore_eos", "stop",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "logprobs", "cache_salt",
    "min_p", "prompt_logprobs", "include_stop_str_in_output", "skip_special_tokens",
)  # fmt: skip


def check_request(prompt_token_ids: Sequence[int], params: SamplingParams, limits: EngineLimits) -> None:
    """Raises FieldError for unsupported parameters, and for a request that can never be served."""
    check_supported(params, SAMPLING_FIELDS)
    check_fits(prompt_token_ids, params, limits)
