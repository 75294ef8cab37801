"""What --trace writes: one line per step, in the schema of common.trace."""

from __future__ import annotations

import time

from common.trace import CollectiveTrace, RankTrace, RequestTrace, StepTrace, TraceWriter, TransferKind, TransferTrace

from ..messages import EngineCoreOutput, Fetch, Load, RankTimes, StepOutput, Transfer, TransferDone
from .request import Request
from .scheduler import Scheduler, SchedulerOutput

PART = __name__.partition(".")[0]


class StepTracer:
    """Records each step of the engine, of which two may be in flight. Without a path it does nothing.

    aborted: ids of requests aborted since the last step that was written.
    """

    def __init__(self, path: str | None, scheduler: Scheduler, model: str) -> None:
        self.scheduler, self.aborted = scheduler, list[str]()
        self._transfers: list[TransferTrace] = []  # that have ended since the last step that was written
        self._writer = None
        if path is not None:
            self._writer = TraceWriter(path, part=PART, model=model, block_size=scheduler.blocks.block_size)
        self._zero_s = 0.0 if self._writer is None else time.perf_counter() - self._writer.elapsed_s()
        self._start_s = 0.0
        self._num_steps = 0

    def begin(self) -> None:
        self._start_s = self._now_s()

    def launched(self, output: SchedulerOutput) -> StepTrace | None:
        """A step was just launched. Returns its trace, which the later calls complete."""
        if self._writer is None:
            return None
        self._num_steps += 1
        tables, deltas = self.scheduler.blocks.block_tables, self._writer.deltas
        started = {new.row for new in output.step.new_requests}
        preempted = [request.request_id for request in output.preempted]
        waiting = [*self.scheduler.loaded, *self.scheduler.loading, *self.scheduler.waiting]
        deltas.forget(preempted)
        requests = [
            RequestTrace(
                id=request.request_id,
                num_computed=share.num_computed_tokens,
                num_scheduled=share.num_scheduled_tokens,
                **deltas.of_request(request.request_id, tables[request.request_id], request.prompt_token_ids),
                num_cached=share.num_computed_tokens if share.row in started else 0,
                num_sampled=share.is_sampled + len(share.draft_token_ids),
                num_drafts=len(share.draft_token_ids),
            )
            for request, share in output.pairs
        ]
        return StepTrace(
            step=self._num_steps, start_s=self._start_s, schedule_s=self._now_s() - self._start_s, execute_s=0.0,
            update_s=0.0, num_running=len(requests), num_waiting=self.scheduler.num_waiting, requests=requests,
            num_blocks_total=self.scheduler.blocks.num_blocks - 1, num_blocks_free=0,
            preempted=preempted, queued=deltas.queued([request.request_id for request in waiting]),
        )  # fmt: skip

    def executed(self, trace: StepTrace | None, output: StepOutput) -> None:
        """The step's results have arrived."""
        if trace is not None:
            trace.execute_s = self._now_s() - trace.end_s
            trace.forward_start_s, trace.forward_s = output.start_s - self._zero_s, output.end_s - output.start_s
            trace.ranks = [self._rank_trace(times) for times in output.ranks]

    def _rank_trace(self, times: RankTimes) -> RankTrace:
        collectives = [
            CollectiveTrace(
                name=each.name, num_bytes=each.num_bytes, start_s=each.start_s - self._zero_s,
                duration_s=each.end_s - each.start_s,
            )
            for each in times.collectives
        ]  # fmt: skip
        return RankTrace(
            rank=times.rank, start_s=times.start_s - self._zero_s, duration_s=times.end_s - times.start_s,
            collectives=collectives,
        )  # fmt: skip

    def transferred(self, transfer: Transfer, request: Request | None, done: TransferDone) -> None:
        """A transfer has ended. One that copied nothing, such as a lookup, has no end_s and is left out."""
        if self._writer is None or not done.end_s:
            return
        block_size = self.scheduler.blocks.block_size
        self._transfers.append(
            TransferTrace(
                kind=_kind_of(transfer),
                id=None if request is None else request.request_id,
                num_tokens=done.num_tokens if isinstance(transfer, Fetch) else done.num_blocks * block_size,
                num_bytes=done.num_bytes,
                start_s=done.start_s - self._zero_s,
                duration_s=done.end_s - done.start_s,
            )
        )

    def updated(self, trace: StepTrace | None, outputs: list[EngineCoreOutput]) -> None:
        """The step is over."""
        aborted, self.aborted = self.aborted, []
        if trace is None or self._writer is None:
            return
        trace.update_s = self._now_s() - trace.end_s
        trace.num_blocks_free = self.scheduler.blocks.num_free_blocks
        delivered = {output.request_id: output.token_ids for output in outputs}
        for request in trace.requests:
            request.token_ids = delivered.get(request.id, [])
            if request.num_drafts:
                request.num_sampled = len(request.token_ids) or 1
        trace.aborted, trace.finished = aborted, [output.request_id for output in outputs if output.finish_reason]
        self._writer.deltas.forget([*trace.aborted, *trace.finished])
        trace.transfers, self._transfers = self._transfers, []
        trace.discarded = [r.id for r in trace.requests if r.num_sampled and r.id not in delivered]
        cached = self._writer.deltas.cached(block.block_id for block in self.scheduler.blocks.cached_blocks.values())
        trace.cached_block_ids, trace.uncached_block_ids = cached
        self._writer.write(trace)

    def close(self) -> None:
        """Write the remaining steps and stop tracing."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _now_s(self) -> float:
        return time.perf_counter() - self._zero_s


def _kind_of(transfer: Transfer) -> TransferKind:
    match transfer:
        case Fetch():
            return "fetch"
        case Load():
            return "read" if None in transfer.slots else "load"
    return "save"
