"""What --trace writes: one line a step, in the schema of common.trace."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from common.trace import RequestTrace, StepTrace, TraceWriter

from ..messages import EngineCoreOutput
from ..worker.stream import StepResult
from .scheduler import Scheduler, SchedulerOutput

PART = "part05_async_scheduling"


@dataclass(slots=True)
class StepRecord:
    """What is known of a step that is not over. Times are time.perf_counter's."""

    number: int = 0
    requests: list[RequestTrace] = field(default_factory=list)
    num_waiting: int = 0
    preempted: list[str] = field(default_factory=list)
    began_s: float = 0.0
    launched_s: float = 0.0
    executed_s: float = 0.0
    forward: StepResult | None = None


class StepTracer:
    """Watches the engine take its steps, of which two may be under way. Without a path it does nothing.

    aborted: ids of requests aborted since the last step that was written.
    """

    def __init__(self, path: str | None, scheduler: Scheduler, model: str) -> None:
        self.scheduler, self.aborted = scheduler, list[str]()
        self._writer = None if path is None else TraceWriter(path, part=PART, model=model)
        self._zero_s = 0.0 if self._writer is None else time.perf_counter() - self._writer.elapsed_s()
        self._began_s = 0.0
        self._num_steps = 0

    def begin(self) -> None:
        self._began_s = time.perf_counter()

    def launched(self, output: SchedulerOutput) -> StepRecord:
        """A step was launched a moment ago."""
        if self._writer is None:
            return StepRecord()
        launched_s, self._num_steps = time.perf_counter(), self._num_steps + 1
        tables = self.scheduler.blocks.block_tables
        rows = zip(output.requests, output.num_computed_tokens, output.num_scheduled_tokens, strict=True)
        requests = [
            RequestTrace(
                id=request.request_id,
                num_computed=num_computed,
                num_scheduled=num_scheduled,
                num_blocks=len(tables[request.request_id]),
            )
            for request, num_computed, num_scheduled in rows
        ]
        preempted = [request.request_id for request in output.preempted]
        num_waiting = len(self.scheduler.waiting)
        return StepRecord(self._num_steps, requests, num_waiting, preempted, self._began_s, launched_s)

    def executed(self, record: StepRecord, result: StepResult) -> None:
        """The step's results are there."""
        if self._writer is not None:
            record.executed_s, record.forward = time.perf_counter(), result

    def updated(self, record: StepRecord, outputs: list[EngineCoreOutput]) -> None:
        """The step is over."""
        aborted, self.aborted = self.aborted, []
        if self._writer is None or record.forward is None:
            return
        blocks, delivered = self.scheduler.blocks, {output.request_id for output in outputs}
        self._writer.write(
            StepTrace(
                step=record.number,
                start_s=record.began_s - self._zero_s,
                schedule_s=record.launched_s - record.began_s,
                execute_s=record.executed_s - record.launched_s,
                update_s=time.perf_counter() - record.executed_s,
                num_running=len(record.requests),
                num_waiting=record.num_waiting,
                requests=record.requests,
                num_blocks_total=blocks.num_blocks - 1,
                num_blocks_free=blocks.num_free_blocks,
                preempted=record.preempted,
                aborted=aborted,
                finished=[output.request_id for output in outputs if output.finish_reason],
                forward_start_s=record.forward.start_s - self._zero_s,
                forward_s=record.forward.end_s - record.forward.start_s,
                discarded=[request.id for request in record.requests if request.id not in delivered],
            )
        )

    def close(self) -> None:
        """Write what is left. Nothing is traced afterwards."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
