"""Messages between the rooms, as plain data: steps between core and worker, requests between core and api."""

from __future__ import annotations

import msgspec

from common.outputs import FinishReason, Logprob
from common.sampling_params import SamplingParams

NULL_BLOCK = 0  # belongs to no request: padding in a block table points here, and nothing reads it


class NewRequest(msgspec.Struct, array_like=True):
    """A request that joins the batch, or joins it again after a preemption.

    row: where the worker keeps the request's state, until the row is given to another request. token_ids: all its
    tokens so far; the first num_prompt_tokens of them are the prompt.
    """

    row: int
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams


class ScheduledRequest(msgspec.Struct, array_like=True):
    """One request's share of a step: which of its tokens are computed.

    These are the tokens at positions num_computed_tokens to num_computed_tokens + num_scheduled_tokens - 1. A token is
    sampled after the last one. new_block_ids: blocks to append to the request's block table first.
    """

    row: int
    num_computed_tokens: int
    num_scheduled_tokens: int
    new_block_ids: list[int]


class StepInput(msgspec.Struct, array_like=True):
    """One step, from core to worker."""

    new_requests: list[NewRequest]
    requests: list[ScheduledRequest]


class PromptLogprobs(msgspec.Struct, array_like=True):
    """Log probabilities of some prompt tokens. index: the request's index in the step; position: the first token's."""

    index: int
    position: int
    logprobs: list[dict[int, Logprob]]


class StepOutput(msgspec.Struct, array_like=True):
    """The result of a step, from worker to core: a sampled token for each scheduled request, in the order of the input.

    logprobs: for each request that asked for them, those of the sampled token and of the likeliest tokens.
    prompt_logprobs: those of the step's prompt tokens, for the requests that asked for them, in order.
    """

    token_ids: list[int]
    logprobs: list[dict[int, Logprob] | None]
    prompt_logprobs: list[PromptLogprobs] = []


class EngineCoreOutput(msgspec.Struct, array_like=True):
    """What a step produced for one request, from core to api. error: why the request failed; nothing follows it.

    prompt_logprobs: sent with the first token, if the request asked for them: an entry for each prompt token, None
    for the first.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    error: str | None = None
