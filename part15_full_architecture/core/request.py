"""A request, its status, and the rule that ends it."""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass, field

from common.outputs import FinishReason, Logprob
from common.sampling_params import SamplingParams

from ..messages import EngineCoreEvent, EventKind, KVTransferParams
from .ngram import NgramIndex


class RequestStatus(enum.IntEnum):
    """vLLM's names, in its order: everything after PREEMPTED is finished. (WAITING_FOR_KV: WAITING_FOR_REMOTE_KVS.)"""

    WAITING = enum.auto()
    WAITING_FOR_KV = enum.auto()
    RUNNING = enum.auto()
    PREEMPTED = enum.auto()
    FINISHED_STOPPED = enum.auto()
    FINISHED_LENGTH_CAPPED = enum.auto()
    FINISHED_ABORTED = enum.auto()

    @property
    def is_finished(self) -> bool:
        return self > RequestStatus.PREEMPTED


@dataclass(slots=True, eq=False)
class Request:
    """One prompt and the tokens generated for it so far."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    max_num_tokens: int  # limit for prompt and answer together
    output_token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # those known so far, until they are reported
    num_computed_tokens: int = 0  # tokens whose keys and values are in the cache once the steps in flight have run
    num_output_placeholders: int = 0  # how many tokens the steps in flight will produce
    draft_token_ids: list[int] = field(default_factory=list)  # proposed next tokens, not yet verified
    num_pending_drafts: int = 0  # how many the step in flight will propose
    acceptance: float = 1.0  # its recent acceptance rate
    ngram_index: NgramIndex | None = None
    num_cached_tokens: int | None = None  # how many were found or loaded when it first ran
    num_found_tokens: int = 0  # how many of its first tokens have KV that was found or loaded
    num_drafted_tokens: int | None = None  # how many of these the draft model has, too; None: all
    kv_transfer: KVTransferParams | None = None
    arrival: int = 0  # its place in the order of all requests
    block_hashes: list[bytes] = field(default_factory=list)  # of its full blocks
    num_cached_blocks: int = 0  # how many of these are in the cache, or copies of cached ones
    row: int | None = None  # the worker's row for this request while it is in the batch
    num_sent_blocks: int = 0  # how many blocks of its block table the worker knows
    num_sent_tokens: int = 0  # how many of its tokens the first pipeline stages know
    status: RequestStatus = RequestStatus.WAITING
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    events: list[EngineCoreEvent] = field(default_factory=list)  # that have not been reported

    def __post_init__(self) -> None:
        if self.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]  # nothing predicts the first token

    @property
    def token_ids(self) -> list[int]:
        return self.prompt_token_ids + self.output_token_ids

    @property
    def num_tokens(self) -> int:
        """Tokens that are known."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_expected_tokens(self) -> int:
        """Tokens that are known once the steps in flight have run."""
        return self.num_tokens + self.num_output_placeholders

    @property
    def num_new_tokens(self) -> int:
        """Tokens that have to be computed before the next one can be sampled."""
        return self.num_expected_tokens - self.num_computed_tokens

    def tokens_between(self, start: int, end: int) -> list[int]:
        """Its known tokens at positions start to end - 1, without copying the others."""
        split = len(self.prompt_token_ids)
        return self.prompt_token_ids[start:end] + self.output_token_ids[max(0, start - split) : max(0, end - split)]

    def add_prompt_logprobs(self, position: int, logprobs: list[dict[int, Logprob]]) -> None:
        """Add those of the prompt tokens from this position on. After a preemption, some arrive a second time."""
        if self.prompt_logprobs is not None:
            self.prompt_logprobs += logprobs[len(self.prompt_logprobs) - position :]

    def take_prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None:
        """All prompt logprobs, to be reported with the first token; None if not requested, and in later calls."""
        found, self.prompt_logprobs = self.prompt_logprobs, None
        return found

    def note(self, kind: EventKind) -> None:
        self.events.append(EngineCoreEvent(kind, time.perf_counter()))

    def take_events(self) -> list[EngineCoreEvent]:
        events, self.events = self.events, []
        return events

    def finish(self, finish_reason: FinishReason, stop_reason: int | None) -> None:
        stopped = finish_reason == "stop"
        self.status = RequestStatus.FINISHED_STOPPED if stopped else RequestStatus.FINISHED_LENGTH_CAPPED
        self.finish_reason, self.stop_reason = finish_reason, stop_reason


def check_stop(request: Request, eos_token_ids: frozenset[int]) -> tuple[FinishReason, int | None] | None:
    """Whether to stop after the newest token: (finish_reason, stop_reason), or None. Based on vLLM's check_stop."""
    params, last = request.params, request.output_token_ids[-1]
    if len(request.output_token_ids) >= params.min_tokens:
        if last in eos_token_ids and not params.ignore_eos:
            return "stop", None
        if last in params.stop_token_ids:
            return "stop", last
    return ("length", None) if request.num_tokens >= request.max_num_tokens else None
