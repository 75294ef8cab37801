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

    These are the tokens at positions num_computed_tokens to num_computed_tokens + num_scheduled_tokens - 1; the last of
    them are draft_token_ids, if there are any. is_sampled: tokens are sampled after the last known token and after each
    draft token; a chunk that ends before the last known token samples nothing. new_block_ids: blocks to append to the
    request's block table first. num_next_drafts: how many draft tokens the worker proposes after the step.
    new_token_ids: with several pipeline stages, the tokens that were sampled since the request's last step; they end
    before the draft tokens, and the first stages do not know them.
    """

    row: int
    num_computed_tokens: int
    num_scheduled_tokens: int
    is_sampled: bool
    new_block_ids: list[int]
    draft_token_ids: list[int]
    num_next_drafts: int
    new_token_ids: list[int] = []


class StepInput(msgspec.Struct, array_like=True, tag=True):
    """One step, from core to worker: to every rank, if there are several. Without requests it is a dummy step.

    has_requests: if not None, this step asks whether any engine core has requests; this one says has_requests.
    """

    new_requests: list[NewRequest]
    requests: list[ScheduledRequest]
    has_requests: bool | None = None


class PromptLogprobs(msgspec.Struct, array_like=True):
    """Log probabilities of some prompt tokens. index: the request's index in the step; position: the first token's."""

    index: int
    position: int
    logprobs: list[dict[int, Logprob]]


class Collective(msgspec.Struct, array_like=True):
    """A collective that a rank took part in. start_s, end_s: with the wait for the other ranks (time.perf_counter)."""

    name: str
    num_bytes: int
    start_s: float
    end_s: float


class RankTimes(msgspec.Struct, array_like=True, tag=True):
    """When a rank computed a step (time.perf_counter), and its collectives. Ranks send it if there is a trace."""

    rank: int
    start_s: float
    end_s: float
    collectives: list[Collective]


class StepOutput(msgspec.Struct, array_like=True, tag=True):
    """The result of a step, from worker to core, for each sampled request in the order of the input.

    token_ids: the accepted draft tokens and one more token. logprobs: for each of these tokens, if the request asked
    for them, those of the token and of the likeliest tokens. draft_token_ids: proposed for the next step.
    prompt_logprobs: those of the step's prompt tokens, for the requests that asked for them, in order. start_s, end_s:
    when the device began and finished the step (time.perf_counter). ranks: the same for each rank, if there are several
    and a trace. any_has_requests: the answer, if the step asked.
    """

    token_ids: list[list[int]]
    logprobs: list[list[dict[int, Logprob]] | None]
    draft_token_ids: list[list[int]]
    prompt_logprobs: list[PromptLogprobs] = []
    start_s: float = 0.0
    end_s: float = 0.0
    ranks: list[RankTimes] = []
    any_has_requests: bool | None = None


class Save(msgspec.Struct, array_like=True, tag=True):
    """From core to the worker: copy blocks to host memory, and from there to the tiers below. For each block: its hash,
    its id on the device, and its slot in host memory."""

    transfer_id: int
    hashes: list[bytes]
    block_ids: list[int]
    slots: list[int]


class Load(msgspec.Struct, array_like=True, tag=True):
    """From core to the worker: copy blocks to the device. A block without a slot is read from the tiers below."""

    transfer_id: int
    hashes: list[bytes]
    block_ids: list[int]
    slots: list[int | None]


class LookUp(msgspec.Struct, array_like=True, tag=True):
    """From core to the worker: how many of the first blocks do the tiers have, without a gap?"""

    transfer_id: int
    hashes: list[bytes]


class TransferDone(msgspec.Struct, array_like=True, tag=True):
    """The worker's answer to Save, Load and LookUp; with several ranks, each sends one. num_blocks: how many of the
    first blocks were saved, loaded or found. host_s: seconds for those that have a slot. tier_s: for the others.

    num_bytes: copied. start_s, end_s: when the copying began and ended (time.perf_counter), if there was any.
    """

    transfer_id: int
    num_blocks: int
    host_s: float = 0.0
    tier_s: float = 0.0
    num_bytes: int = 0
    start_s: float = 0.0
    end_s: float = 0.0


class CoreGroup(msgspec.Struct, array_like=True):
    """Engine cores whose ranks share experts. core: the number of this one. directory: where all ranks meet."""

    core: int
    num_cores: int
    directory: str


class StartRank(msgspec.Struct, array_like=True, tag=True):
    """The first message from core to the ranks. init_method: where torch.distributed's ranks find each other. seed: of
    unseeded draws, which must be equal on all ranks. core, num_cores: as in CoreGroup."""

    config: EngineConfig
    init_method: str
    seed: int
    core: int = 0
    num_cores: int = 1


class AllocateCache(msgspec.Struct, array_like=True, tag=True):
    """From core to the ranks. num_blocks: the size of the KV pool, the same on all ranks. num_host_blocks: the size of
    host memory for KV blocks, also the same on all."""

    num_blocks: int
    num_host_blocks: int = 0


class MeasureExperts(msgspec.Struct, array_like=True, tag=True):
    """From core to the ranks: how many tokens have the experts got since the last time?"""


class ExpertLoads(msgspec.Struct, array_like=True, tag=True):
    """The answer of one rank. loads: of each layer with experts, the tokens of each expert, from all ranks."""

    loads: list[list[int]]


class PlaceExperts(msgspec.Struct, array_like=True, tag=True):
    """From core to the ranks: move the experts. placements: of each layer with experts, the expert of each slot."""

    placements: list[list[int]]


class Ping(msgspec.Struct, array_like=True, tag=True):
    """From core to the ranks, which answer with Pong, even while they compute."""


class Stop(msgspec.Struct, array_like=True, tag=True):
    """The last message from core to the ranks."""


class RankLoaded(msgspec.Struct, array_like=True, tag=True):
    """A rank's answer to StartRank. num_blocks: how many KV blocks it has room for. fingerprint: of its weights.
    bytes_per_block: of its KV pool and the draft model's. The others: what it has of the model, how much it read for
    that, and the size of a token in its KV pool."""

    rank: int
    num_blocks: int
    fingerprint: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    num_parameters: int
    num_bytes_read: int
    kv_bytes_per_token: int
    bytes_per_block: int


class CacheAllocated(msgspec.Struct, array_like=True, tag=True):
    """A rank's answer to AllocateCache."""

    rank: int


class Pong(msgspec.Struct, array_like=True, tag=True):
    """How far a rank is since its start. num_steps: those that it has finished. num_collectives: those that it has
    begun."""

    rank: int
    num_steps: int = 0
    num_collectives: int = 0


class RankFailed(msgspec.Struct, array_like=True, tag=True):
    """What went wrong on a rank, which computes no more. field: the flag that is wrong, or None. is_collective: it
    failed in a collective, so the cause is likely to be another rank."""

    rank: int
    field: str | None
    message: str
    is_collective: bool = False


class Start(msgspec.Struct, tag=True):
    """The first message to the core. cores: those with which its ranks share experts."""

    config: EngineConfig
    cores: CoreGroup | None = None


class AddRequest(msgspec.Struct, tag=True):
    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams


class AbortRequests(msgspec.Struct, tag=True):
    request_ids: list[str]


class StartWave(msgspec.Struct, tag=True):
    """From a core that has got a request while all cores were idle, to api, and from there to the other cores."""

    wave: int


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


ToCore = Start | AddRequest | AbortRequests | ResetPrefixCache | StartWave
Transfer = Save | Load | LookUp
ToRank = StartRank | AllocateCache | StepInput | Save | Load | LookUp | MeasureExperts | PlaceExperts | Ping | Stop
FromRank = RankLoaded | CacheAllocated | StepOutput | RankTimes | TransferDone | ExpertLoads | Pong | RankFailed
FromCore = Ready | StartFailed | EngineCoreOutputs | EngineCoreDead | PrefixCacheReset | StartWave

encode = msgspec.msgpack.Encoder().encode
decode_to_core = msgspec.msgpack.Decoder(ToCore).decode
decode_to_rank = msgspec.msgpack.Decoder(ToRank).decode
decode_from_rank = msgspec.msgpack.Decoder(FromRank).decode
decode_from_core = msgspec.msgpack.Decoder(FromCore).decode
