"""Part 9's engine over a scripted worker with several pipeline stages, and what holds of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

from part09_tensor_parallelism.core.engine import LLMEngine
from part09_tensor_parallelism.core.scheduler import Scheduler, SchedulerOutput
from part09_tensor_parallelism.messages import ScheduledRequest
from tests.engine_checks import Before
from tests.part08.scripted import BeforeSpec, Drafter, SpecExecutor, set_drafter
from tests.part08.scripted import Checks as SpecChecks
from tests.scripted import UNWRITTEN, Part, ScriptedStep, Work, make_scripted_engine, next_token, shares

PART = Part("part09_tensor_parallelism")
LESSON = 'README "Pipeline stages"'
LOOK_TOKENS = f"Look at core/scheduler.py::Scheduler._new_token_ids and _start; {LESSON}."
LOOK_TURN = f"Look at core/scheduler.py::Scheduler._schedule_running; {LESSON}."


class StagedExecutor(SpecExecutor):
    """Its first stage has a token buffer of its own, which no sampled token is written to."""

    def __init__(self, part: Part, config: Any) -> None:
        super().__init__(part, config)
        self.known = [[UNWRITTEN] * config.max_model_len for _ in range(config.max_num_seqs)]

    def run(self, step: ScriptedStep) -> None:
        if step.error is None:
            for row, token_ids in step.new_rows:
                self.known[row][: len(token_ids)] = token_ids
        super().run(step)

    def write(self, work: Work) -> None:
        super().write(work)
        if self.config.pipeline_parallel_size == 1:
            return
        known, new = self.known[work.row], work.share.new_token_ids
        known[work.num_known - len(new) : work.num_known] = new
        known[work.num_known : work.end] = work.draft_token_ids
        expected = self.tokens[work.row][work.start : work.end]
        got = known[work.start : work.end]
        assert got == expected, (
            f"request {work.request_id} computes positions {work.start} to {work.end - 1}, whose tokens are "
            f"{expected}; the first stage has {got} ({UNWRITTEN}: nothing). {LOOK_TOKENS}"
        )


class Checks(SpecChecks):
    """With several stages, a request is in one step at a time, and every step has a share of the decodes."""

    def look_at(self, scheduler: Scheduler) -> BeforeSpec:  # type: ignore[override]
        if scheduler.num_stages == 1:
            return super().look_at(scheduler)  # type: ignore[arg-type]
        before = Before(**vars(super(SpecChecks, self).look_at(scheduler)))
        before.at_end |= {request.request_id for request in scheduler.running if request.num_output_placeholders}
        ready = [request for request in scheduler.running if request.request_id not in before.at_end]
        drafts = {
            request.request_id: request.draft_token_ids or scheduler._look_up_drafts(request) for request in ready
        }
        return BeforeSpec(**vars(before), drafts=drafts)

    def check_decodes_first(
        self,
        scheduler: Scheduler,
        output: SchedulerOutput,
        before: Before,
        what: str,  # type: ignore[override]
    ) -> None:
        if scheduler.num_stages > 1:
            share = -(-len(before.running) // scheduler.num_stages)
            lost = {request.request_id for request in output.preempted}
            in_turn = [
                name for name, (num_new, _) in before.running.items() if num_new == 1 and name not in before.at_end
            ]
            before.at_end.update(in_turn[share:])  # for another step
            late = [request.request_id for request in output.requests if request.request_id in before.at_end]
            assert not late, (
                f"{what}: requests {late} have a token in flight, or {share} decodes were in the step before them "
                f"(one of {scheduler.num_stages} in the pipeline; preempted: {sorted(lost)}). {LOOK_TURN}"
            )
        super().check_decodes_first(scheduler, output, before, what)  # type: ignore[arg-type]


checks = Checks(PART)


def shares_of(output: SchedulerOutput) -> dict[str, ScheduledRequest]:
    return {request.request_id: share for request, share in shares(output)}


def scripted_engine(
    max_model_len: int = 64,
    script: Callable[[Sequence[int]], int] = next_token,
    kinds: Sequence[str] = (),
    **flags: Any,
) -> LLMEngine:
    """A real LLMEngine over the scripted worker, whose scheduler is watched; flags and kinds as for part 8's."""
    flags = {"speculative_method": "ngram" if kinds else "none", **flags}
    with mock.patch.object(PART.config, "check_draft_model"):
        engine: LLMEngine = make_scripted_engine(PART, StagedExecutor, max_model_len, script, **flags)
    if kinds:
        set_drafter(engine, Drafter(script, kinds))  # type: ignore[arg-type]
    checks.watch(engine.scheduler)
    return engine
