"""What the rooms say to each other, as plain data: core and worker about steps, core and api about requests."""

from __future__ import annotations

import msgspec

from common.outputs import FinishReason, Logprob
from common.sampling_params import SamplingParams

NULL_BLOCK = 0  # belongs to no request: padding in a block table points here, and nothing reads it


class NewRequest(msgspec.Struct, array_like=True):
    """A request that joins the batch, or joins it again after a preemption.

    row: where the worker keeps what it has to remember about the request, until the row goes to another one.
    token_ids: all its tokens so far, of which the first num_prompt_tokens are the prompt.
    """

    row: int
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams


class ScheduledRequest(msgspec.Struct, array_like=True):
    """One request's share of a step: which of its tokens are computed.

    They are those at positions num_computed_tokens to num_computed_tokens + num_scheduled_tokens - 1, and one more is
    sampled after the last. new_block_ids: what to append to the request's block table first.
    """

    row: int
    num_computed_tokens: int
    num_scheduled_tokens: int
    new_block_ids: list[int]


class StepInput(msgspec.Struct, array_like=True):
    """One step, from core to worker."""

    new_requests: list[NewRequest]
    requests: list[ScheduledRequest]


class StepOutput(msgspec.Struct, array_like=True):
    """What a step sampled, from worker to core: a token for each scheduled request, in the order of the input.

    logprobs: for each request that asked for them, the sampled token's and the likeliest tokens'.
    """

    token_ids: list[int]
    logprobs: list[dict[int, Logprob] | None]


class EngineCoreOutput(msgspec.Struct, array_like=True):
    """What a step brought one request, from core to api. error: why the request failed; it has ended."""

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    error: str | None = None
