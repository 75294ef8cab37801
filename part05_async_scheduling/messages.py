"""What the API process and the engine core say to each other: msgspec structs, as MessagePack over ZeroMQ."""

from __future__ import annotations

import msgspec

from common.outputs import FinishReason, Logprob
from common.sampling_params import SamplingParams

from .config import EngineConfig


class Start(msgspec.Struct, tag=True):
    """The first message to the core."""

    config: EngineConfig


class AddRequest(msgspec.Struct, tag=True):
    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams


class AbortRequests(msgspec.Struct, tag=True):
    request_ids: list[str]


class EngineLimits(msgspec.Struct, frozen=True):
    """What a request has to fit into. num_kv_tokens: what the whole KV pool holds."""

    max_model_len: int
    vocab_size: int
    num_kv_tokens: int


class Ready(msgspec.Struct, tag=True):
    """The core's answer to Start."""

    limits: EngineLimits
    num_kv_blocks: int


class StartFailed(msgspec.Struct, tag=True):
    """The other answer: an error at the boundary. field: the flag at fault, None if it is none."""

    field: str | None
    message: str


class EngineCoreOutput(msgspec.Struct, array_like=True):
    """What one step brought one request. error: the engine failed at it, with this cause; it has ended."""

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    error: str | None = None


class EngineCoreOutputs(msgspec.Struct, tag=True):
    """What one step brought, and how the engine stands after it."""

    outputs: list[EngineCoreOutput]
    stats: dict[str, float]


ToCore = Start | AddRequest | AbortRequests
FromCore = Ready | StartFailed | EngineCoreOutputs

encode = msgspec.msgpack.Encoder().encode
decode_to_core = msgspec.msgpack.Decoder(ToCore).decode
decode_from_core = msgspec.msgpack.Decoder(FromCore).decode
