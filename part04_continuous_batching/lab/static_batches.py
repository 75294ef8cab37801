"""Part 3's static batching, for comparison."""

from __future__ import annotations

from ..core.engine import LLMEngine
from ..core.scheduler import Scheduler, SchedulerOutput


class StaticScheduler(Scheduler):
    """No request joins a running batch; the next batch is formed when the last request of this one has ended."""

    def _schedule_waiting(self, output: SchedulerOutput) -> None:
        if not self.running:
            super()._schedule_waiting(output)


def use_static_batches(engine: LLMEngine) -> LLMEngine:
    """Replace the engine's scheduler with a StaticScheduler. The engine must be idle."""
    assert not engine.has_unfinished_requests, "the scheduler cannot be replaced while it holds requests"
    old = engine.scheduler
    engine.scheduler = StaticScheduler(engine.blocks, old.max_num_seqs, old.max_num_batched_tokens)
    engine.tracer.scheduler = engine.scheduler
    return engine
