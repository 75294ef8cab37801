"""common/limits.py: a request that can never fit is refused with its field, the value and the limit."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from common.errors import FieldError
from common.limits import EngineLimits, check_fits
from common.sampling_params import SamplingParams

LOOK = "Look at common/limits.py::check_fits."
LIMITS = EngineLimits(max_model_len=20, vocab_size=100, num_kv_tokens=16)
PARAMS = SamplingParams(max_tokens=4)


def test_limits_cross_a_process_boundary_and_cannot_change() -> None:
    got = msgspec.msgpack.decode(msgspec.msgpack.encode(LIMITS), type=EngineLimits)
    assert got == LIMITS and got.max_prompt_len is None, f"expected {LIMITS}, got {got}"
    with pytest.raises(AttributeError):
        LIMITS.vocab_size = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("num_prompt_tokens", "max_tokens", "limits"),
    [
        (1, 1, LIMITS),
        (13, 4, LIMITS),  # 17 tokens: the last one's key and value are never stored
        (16, 1, LIMITS),
        (19, 100, msgspec.structs.replace(LIMITS, num_kv_tokens=19)),  # the context ends the answer
        (8, 4, msgspec.structs.replace(LIMITS, max_prompt_len=8)),
    ],
)
def test_requests_that_just_fit(num_prompt_tokens: int, max_tokens: int, limits: EngineLimits) -> None:
    check_fits([7] * num_prompt_tokens, replace(PARAMS, max_tokens=max_tokens), limits)


@pytest.mark.parametrize(
    ("token_ids", "params", "limits", "message"),
    [
        ([], PARAMS, LIMITS, "prompt: expected at least one token, got an empty prompt"),
        ([1, 100], PARAMS, LIMITS, "prompt: expected token ids from 0 to 99 (the vocabulary)"),
        ([-1, 1], PARAMS, LIMITS, "prompt: expected token ids from 0 to 99 (the vocabulary)"),
        ([1] * 20, PARAMS, LIMITS, "prompt: This model's maximum context length is 20 tokens (max_model_len)"),
        ([1] * 14, PARAMS, LIMITS, "prompt: 14 tokens and an answer of up to 4 can never fit: the KV cache holds 16"),
        ([1] * 17, replace(PARAMS, max_tokens=100), LIMITS, "prompt: 17 tokens and an answer of up to 3 can never fit"),
        (
            [1] * 9,
            PARAMS,
            msgspec.structs.replace(LIMITS, max_prompt_len=8),
            "prompt: expected at most max_num_batched_tokens=8 tokens, got 9",
        ),
        ([1], replace(PARAMS, stop_token_ids=(100,)), LIMITS, "stop_token_ids: expected ids below 100"),
        ([1], replace(PARAMS, logit_bias=((100, 1.0),)), LIMITS, "logit_bias: expected ids below 100"),
    ],
)
def test_requests_that_never_fit(
    token_ids: list[int], params: SamplingParams, limits: EngineLimits, message: str
) -> None:
    with pytest.raises(FieldError) as caught:
        check_fits(token_ids, params, limits)
    assert str(caught.value).startswith(message), f"expected {message!r}, got {str(caught.value)!r}. {LOOK}"
    field = message.partition(":")[0]
    assert caught.value.field == field, f"expected the error to name {field}, got {caught.value.field}. {LOOK}"
