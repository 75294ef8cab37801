"""What the rooms say to each other, as plain data: core and worker about steps, api and core about requests.

Between processes it travels as MessagePack over ZeroMQ.
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

    row: where the worker keeps what it has to remember about the request, until the row goes to another one.
    token_ids: all its tokens so far, of which the first num_prompt_tokens are the prompt.
    """

    row: int
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams


class ScheduledRequest(msgspec.Struct, array_like=True):
    """One request's share of a step: which of its tokens are computed.

    They are those at positions num_computed_tokens to num_computed_tokens + num_scheduled_tokens - 1; the last of them
    are draft_token_ids, if there are any. is_sampled: tokens are sampled after the last known token and after each
    draft token; a chunk that ends before the last known token samples nothing. new_block_ids: what to append to the
    request's block table first. num_next_drafts: how many draft tokens the worker proposes after the step.
    """

    row: int
    num_computed_tokens: int
    num_scheduled_tokens: int
    is_sampled: bool
    new_block_ids: list[int]
    draft_token_ids: list[int]
    num_next_drafts: int


class StepInput(msgspec.Struct, array_like=True):
    """One step, from core to worker."""

    new_requests: list[NewRequest]
    requests: list[ScheduledRequest]


class StepOutput(msgspec.Struct, array_like=True):
    """What a step brought, from worker to core, for each sampled request in the order of the input.

    token_ids: the draft tokens that were accepted, and one more. logprobs: for those that asked, the sampled token's
    and the likeliest tokens', for each of these. draft_token_ids: proposals for the next step. start_s, end_s: when the
    device began with the step and when it was done (time.perf_counter).
    """

    token_ids: list[list[int]]
    logprobs: list[list[dict[int, Logprob]] | None]
    draft_token_ids: list[list[int]]
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
    """Answered by PrefixCacheReset, in the order of the questions."""


class PrefixCacheReset(msgspec.Struct, tag=True):
    """was_reset: False if requests were in the engine."""

    was_reset: bool


class Ready(msgspec.Struct, tag=True):
    """The core's answer to Start. stats: its gauges, so that /metrics has all of them before the first request."""

    limits: EngineLimits
    num_kv_blocks: int
    stats: dict[str, float]


class StartFailed(msgspec.Struct, tag=True):
    """The other answer to Start. field: the flag at fault, or None."""

    field: str | None
    message: str


class EngineCoreOutput(msgspec.Struct, array_like=True):
    """What a step brought one request, from core to api. error: why the request failed; it has ended.

    num_cached_tokens: with its first token, how many tokens of the prompt were found in the cache.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    num_cached_tokens: int | None = None
    error: str | None = None


class EngineCoreOutputs(msgspec.Struct, tag=True):
    """What one step brought, and the engine's gauges after it."""

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
