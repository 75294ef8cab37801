"""A worker that follows a script: it computes no model, and knows of a request only what core has sent it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from common.outputs import Logprob
from common.sampling_params import SamplingParams
from part04_continuous_batching.messages import NULL_BLOCK, ScheduledRequest, StepInput, StepOutput

END = 0  # the token that ends an answer of the scripted model
LOOK_BORDER = "Look at core/scheduler.py::Scheduler._start and _add: the worker knows only what a StepInput says."


def next_token(token_ids: Sequence[int]) -> int:
    """The scripted model: a token that depends on all tokens so far; one in twenty is END."""
    return zlib.crc32(bytes(token_ids)) % 20


@dataclass
class Row:
    """What the worker remembers about the request in one row."""

    token_ids: list[int]
    params: SamplingParams
    block_table: list[int] = field(default_factory=list)


class ScriptedWorker:
    """Its KV cache holds tokens: slot → token. A sampled token depends on what the request's slots hold.

    So a block with two owners, a block table with a gap, or a wrong count of computed tokens changes an answer.
    """

    def __init__(self, block_size: int, script: Callable[[Sequence[int]], int] = next_token) -> None:
        self.block_size, self.script = block_size, script
        self.rows: dict[int, Row] = {}
        self.cache: dict[int, int] = {}

    def execute(self, step: StepInput) -> StepOutput:
        for new in step.new_requests:
            self.rows[new.row] = Row(list(new.token_ids), new.params)
        unknown = [request.row for request in step.requests if request.row not in self.rows]
        assert not unknown, f"rows {unknown} are in the step, and no NewRequest has described them. {LOOK_BORDER}"
        sampled = [self.compute(self.rows[request.row], request) for request in step.requests]
        for request, token_id in zip(step.requests, sampled, strict=True):
            self.rows[request.row].token_ids.append(token_id)
        wanted = [self.rows[request.row].params.logprobs is not None for request in step.requests]
        certain = [{token_id: Logprob(0.0, 1)} for token_id in sampled]
        return StepOutput(sampled, [entry if wants else None for wants, entry in zip(wanted, certain, strict=True)])

    def compute(self, row: Row, request: ScheduledRequest) -> int:
        """Write the scheduled tokens to their slots, and read all tokens so far from theirs."""
        row.block_table += request.new_block_ids
        assert NULL_BLOCK not in row.block_table, f"block table {row.block_table} has the null block"
        start, end = request.num_computed_tokens, request.num_computed_tokens + request.num_scheduled_tokens
        where = f"row {request.row} computes positions {start} to {end - 1}"
        assert end <= len(row.token_ids), f"{where}, and has only {len(row.token_ids)} tokens. {LOOK_BORDER}"
        num_blocks = -(-end // self.block_size)
        assert num_blocks <= len(row.block_table), (
            f"{where}: expected {num_blocks} blocks of {self.block_size} tokens, got {row.block_table}. {LOOK_BORDER}"
        )
        slots = [self.slot(row, position) for position in range(end)]
        self.cache.update(zip(slots[start:], row.token_ids[start:end], strict=True))
        missing = [position for position, slot in enumerate(slots) if slot not in self.cache]
        assert not missing, f"{where}, and reads positions {missing}, which were never computed. {LOOK_BORDER}"
        return self.script([self.cache[slot] for slot in slots])

    def slot(self, row: Row, position: int) -> int:
        return row.block_table[position // self.block_size] * self.block_size + position % self.block_size
