"""What a trace contains: a header, then one line per engine step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import msgspec

SCHEMA_VERSION = 1
TransferKind = Literal["save", "load", "read", "fetch"]


class RequestTrace(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One request in one step.

    num_computed: tokens whose KV existed before the step. num_scheduled: tokens computed in it. num_cached: tokens
    taken from the prefix cache instead. num_sampled: output tokens, 0 for a prefill chunk that is not the last.
    num_drafts: how many of num_scheduled were draft tokens. new_block_ids: the last blocks of its block table, those
    that are not in an earlier line. prompt_token_ids: in the first step, and again after a preemption. token_ids: the
    output tokens that this step gave it.
    """

    id: str
    num_computed: int
    num_scheduled: int
    num_cached: int = 0
    num_blocks: int
    num_sampled: int = 1
    num_drafts: int = 0
    new_block_ids: list[int] = []
    prompt_token_ids: list[int] = []
    token_ids: list[int] = []


class CollectiveTrace(msgspec.Struct, frozen=True, kw_only=True):
    """A collective on one rank, with the time that it waited for the other ranks."""

    name: str
    num_bytes: int
    start_s: float
    duration_s: float


class RankTrace(msgspec.Struct, frozen=True, kw_only=True):
    """A step on one rank."""

    rank: int
    start_s: float
    duration_s: float
    collectives: list[CollectiveTrace] = []


class TransferTrace(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """KV that was copied. kind: "save" from the device to host memory, "load" from there to the device, "read" from a
    tier below, "fetch" from another engine. id: the request that it was made for; a save has none."""

    kind: TransferKind = "fetch"
    id: str | None = None
    num_tokens: int
    num_bytes: int
    start_s: float
    duration_s: float


class StepTrace(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One engine step. start_s counts from the start of the trace; num_running and num_waiting are after scheduling.

    requests: those scheduled in this step. num_blocks_*: without the null block. preempted, finished: request ids in
    this step; aborted: since the previous step. discarded: ids of requests in this step that ended before it did.
    execute_s: from scheduling until the results arrive; forward_s: the model's share of it, from forward_start_s on.
    An engine that runs ahead launches a step while the previous one runs; the launch counts as scheduling. ranks: the
    step on each rank, if there are several. transfers: those that have ended since the previous step. queued: ids of
    requests that wait now and did not at the previous step. cached_block_ids, uncached_block_ids: blocks that can be
    found in the prefix cache since the previous step, and those that no longer can. texts: of tokens that are in no
    earlier line, by their ids.
    """

    step: int
    start_s: float
    schedule_s: float
    execute_s: float
    update_s: float
    num_running: int
    num_waiting: int
    requests: list[RequestTrace] = []
    num_blocks_total: int
    num_blocks_free: int
    preempted: list[str] = []
    aborted: list[str] = []
    finished: list[str] = []
    forward_start_s: float | None = None
    forward_s: float | None = None
    discarded: list[str] = []
    ranks: list[RankTrace] = []
    transfers: list[TransferTrace] = []
    queued: list[str] = []
    cached_block_ids: list[int] = []
    uncached_block_ids: list[int] = []
    texts: dict[int, str] = {}

    @property
    def end_s(self) -> float:
        return self.start_s + self.schedule_s + self.execute_s + self.update_s

    @property
    def num_blocks_used(self) -> int:
        return self.num_blocks_total - self.num_blocks_free


@dataclass(frozen=True, slots=True)
class Trace:
    """The contents of a trace file. note: what read_trace() skipped, None if nothing."""

    header: dict[str, Any]
    steps: list[StepTrace]
    note: str | None = None
