"""Say what is wrong with a scheduler of parts 4 to 6 before it crashes: a learner reads a sentence, not a KeyError."""

from __future__ import annotations

from typing import Any

LOOK = "Look at core/scheduler.py::Scheduler."


def guard(scheduler: Any) -> None:
    """From here on its methods are held to what must be true before and after each call."""
    blocks = scheduler.blocks
    grow, start, add = blocks.grow, scheduler._start, scheduler._add
    preempt, finish = scheduler.preempt, scheduler.finish

    def names() -> tuple[list[str], list[str]]:
        queues = (scheduler.running, scheduler.waiting)
        running, waiting = ([request.request_id for request in queue] for queue in queues)
        return running, waiting

    def checked_grow(request_id: str, num_tokens: int) -> bool:
        assert request_id in blocks.block_tables, (
            f"request {request_id} asks for a block, and no longer runs: it was preempted in this step. {LOOK}"
        )
        return grow(request_id, num_tokens)

    def checked_start(request: Any, output: Any) -> None:
        num_running, limit = len(scheduler.running), scheduler.max_num_seqs
        assert num_running < limit, (
            f"request {request.request_id} is admitted while {num_running} run: expected at most {limit} to run "
            f"(max_num_seqs), got {num_running + 1}. {LOOK}"
        )
        start(request, output)

    def checked_add(request: Any, num_tokens: int, output: Any) -> None:
        name = request.request_id
        assert request in scheduler.running and request.row is not None, (
            f"request {name} is put into the step: expected one that runs and has a row, got one that is "
            f"{request.status.name} and has row {request.row}. {LOOK}"
        )
        assert name in blocks.block_tables, f"request {name} is put into the step, and holds no blocks. {LOOK}"
        num_before = len(output.requests)
        add(request, num_tokens, output)
        got = (len(output.requests) - num_before, len(output.step.requests) - num_before)
        assert got == (1, 1), (
            f"request {name} is put into the step, new entries in (requests, step.requests): expected (1, 1), got "
            f"{got}. {LOOK}"
        )

    def checked_preempt(request: Any) -> None:
        name, (running, _) = request.request_id, names()
        assert request in scheduler.running, f"request {name} is preempted: expected one of {running}. {LOOK}"
        preempt(request)
        status, (running, waiting) = request.status.name, names()
        assert name not in running, f"request {name} is preempted, and is still among the running, {running}. {LOOK}"
        assert name in waiting, f"request {name} is preempted, and is not among the waiting, {waiting}. {LOOK}"
        assert status == "PREEMPTED", f"request {name} is preempted, status: expected PREEMPTED, got {status}. {LOOK}"
        assert name not in blocks.block_tables, f"request {name} is preempted, and still holds blocks. {LOOK}"

    def checked_finish(request: Any) -> None:
        finish(request)
        name, (running, waiting) = request.request_id, names()
        assert name not in running + waiting, (
            f"request {name} has ended: expected it in no queue, got running {running}, waiting {waiting}. {LOOK}"
        )
        assert name not in blocks.block_tables, f"request {name} has ended, and still holds blocks. {LOOK}"
        assert request.row is None, f"request {name} has ended, and still has row {request.row}. {LOOK}"

    blocks.grow = checked_grow
    scheduler._start, scheduler._add = checked_start, checked_add
    scheduler.preempt, scheduler.finish = checked_preempt, checked_finish
