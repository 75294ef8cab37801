"""What --trace writes: one line per step, in the schema of common.trace."""

from __future__ import annotations

from common.trace import RequestTrace, StepTrace, TraceWriter

from ..messages import EngineCoreOutput
from .scheduler import Scheduler, SchedulerOutput

PART = __name__.partition(".")[0]


class StepTracer:
    """Records each step of the engine. Without a path it does nothing.

    aborted: ids of requests aborted since the last step.
    """

    def __init__(self, path: str | None, scheduler: Scheduler, model: str) -> None:
        self.scheduler, self.aborted = scheduler, list[str]()
        self._writer = None
        if path is not None:
            self._writer = TraceWriter(path, part=PART, model=model, block_size=scheduler.blocks.block_size)
        self._times: list[float] = []  # when the step began, was scheduled, was executed
        self._num_steps = 0
        self._requests: list[RequestTrace] = []
        self._preempted: list[str] = []

    def begin(self) -> None:
        if self._writer is not None:
            self._times = [self._writer.elapsed_s()]

    def scheduled(self, output: SchedulerOutput) -> None:
        if self._writer is None:
            return
        self._times.append(self._writer.elapsed_s())
        tables, deltas = self.scheduler.blocks.block_tables, self._writer.deltas
        self._preempted = [request.request_id for request in output.preempted]
        deltas.forget(self._preempted)
        self._requests = [
            RequestTrace(
                id=request.request_id,
                num_computed=share.num_computed_tokens,
                num_scheduled=share.num_scheduled_tokens,
                **deltas.of_request(request.request_id, tables[request.request_id], request.prompt_token_ids),
            )
            for request, share in zip(output.requests, output.step.requests, strict=True)
        ]

    def executed(self) -> None:
        if self._writer is not None:
            self._times.append(self._writer.elapsed_s())

    def updated(self, outputs: list[EngineCoreOutput]) -> None:
        aborted, self.aborted = self.aborted, []
        if self._writer is None:
            return
        begun, scheduled, executed = self._times
        blocks, self._num_steps = self.scheduler.blocks, self._num_steps + 1
        token_ids = {output.request_id: output.token_ids for output in outputs}
        for request in self._requests:
            request.token_ids = token_ids[request.id]
        finished = [output.request_id for output in outputs if output.finish_reason]
        self._writer.deltas.forget([*aborted, *finished])
        self._writer.write(
            StepTrace(
                step=self._num_steps,
                start_s=begun,
                schedule_s=scheduled - begun,
                execute_s=executed - scheduled,
                update_s=self._writer.elapsed_s() - executed,
                num_running=len(self._requests),
                num_waiting=len(self.scheduler.waiting),
                requests=self._requests,
                num_blocks_total=blocks.num_blocks - 1,
                num_blocks_free=blocks.num_free_blocks,
                preempted=self._preempted,
                aborted=aborted,
                finished=finished,
                queued=self._writer.deltas.queued([request.request_id for request in self.scheduler.waiting]),
            )
        )

    def close(self) -> None:
        """Write the remaining steps and stop tracing."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
