"""Messages between the rooms, as plain data: steps between core and worker, requests between api and core.

Between processes, they travel as MessagePack over ZeroMQ.
"""

from __future__ import annotations

import msgspec

from common.limits import EngineLimits
from common.outputs import FinishReason, Logprob
from common.sampling_params import SamplingParams

from .config import EngineConfig

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

    These are the tokens at positions num_computed_tokens to num_computed_tokens + num_scheduled_tokens - 1. is_sampled:
    a token is sampled after the last one; a chunk that ends before the last known token samples nothing.
    new_block_ids: blocks to append to the request's block table first.
    """

    row: int
    num_computed_tokens: int
    num_scheduled_tokens: int
    is_sampled: bool
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
    """The result of a step, from worker to core: a token for each sampled request, in the order of the input.

    logprobs: for each of these that asked for them, those of the sampled token and of the likeliest tokens.
    prompt_logprobs: those of the step's prompt tokens, for the requests that asked for them, in order. start_s, end_s:
    when the device began and finished the step (time.perf_counter).
    """

    token_ids: list[int]
    logprobs: list[dict[int, Logprob] | None]
    prompt_logprobs: list[PromptLogprobs] = []
    start_s: float = 0.0
    end_s: float = 0.0


class Start(msgspec.Struct, tag=True):
    """The first message to the core."""

    config: EngineConfig


class AddRequest(msgspec.Struct, tag=True):
    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams


class AbortRequests(msgspec.Struct, tag=True):
    request_ids: list[str]


class ResetPrefixCache(msgspec.Struct, tag=True):
    """The core answers with PrefixCacheReset, in the order of the requests."""


class PrefixCacheReset(msgspec.Struct, tag=True):
    """was_reset: False if requests were in the engine."""

    was_reset: bool


class Ready(msgspec.Struct, tag=True):
    """The core's answer to Start. stats: its gauges, so that /metrics has all of them before the first request."""

    limits: EngineLimits
    num_kv_blocks: int
    stats: dict[str, float]


class StartFailed(msgspec.Struct, tag=True):
    """The core's answer to Start if it cannot start. field: the flag that is wrong, or None."""

    field: str | None
    message: str


class EngineCoreOutput(msgspec.Struct, array_like=True):
    """What a step produced for one request, from core to api. error: why the request failed; nothing follows it.

    Sent with the first token: prompt_logprobs, if the request asked for them: an entry for each prompt token, None for
    the first; and num_cached_tokens: how many prompt tokens were found in the prefix cache.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int | None = None
    error: str | None = None


class EngineCoreOutputs(msgspec.Struct, tag=True):
    """What one step produced, and the engine's gauges after it."""

    outputs: list[EngineCoreOutput]
    stats: dict[str, float]


class EngineCoreDead(msgspec.Struct, tag=True):
    """The core's last message before it ends by itself."""

    cause: str


ToCore = Start | AddRequest | AbortRequests | ResetPrefixCache
FromCore = Ready | StartFailed | EngineCoreOutputs | EngineCoreDead | PrefixCacheReset

encode = msgspec.msgpack.Encoder().encode
decode_to_core = msgspec.msgpack.Decoder(ToCore).decode
decode_from_core = msgspec.msgpack.Decoder(FromCore).decode
