"""Part 5's engine over the scripted worker, and what holds of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from part05_async_scheduling.core.engine import LLMEngine
from part05_async_scheduling.core.request import Request, RequestStatus
from tests.engine_checks import EngineChecks
from tests.scripted import Part, ScriptedExecutor, make_scripted_engine, next_token

PART = Part("part05_async_scheduling")


def scripted_engine(
    max_model_len: int = 64, script: Callable[[Sequence[int]], int] = next_token, **flags: Any
) -> LLMEngine:
    """A real LLMEngine over the scripted worker; flags are EngineConfig's."""
    return make_scripted_engine(PART, ScriptedExecutor, max_model_len, script, **flags)


class Checks(EngineChecks):
    LOOK_STEP = 'Look at core/engine.py::LLMEngine.step, _append and core/scheduler.py; README "One step ahead".'
    LOOK_LATE = 'Look at core/engine.py::LLMEngine._append; README "Late tokens".'
    LOOK_ROWS = 'Look at core/scheduler.py::Scheduler._start, _leave and finish; README "Placeholders".'

    def check_running(self, request: Request, where: str) -> None:
        state = (request.status, request.num_computed_tokens)
        expected = (RequestStatus.RUNNING, request.num_expected_tokens - 1)
        assert state == expected, (
            f"{where}: request {request.request_id} has {request.num_tokens} tokens and "
            f"{request.num_output_placeholders} placeholders: expected (status, num_computed_tokens) {expected}, got "
            f'{state}. Look at core/scheduler.py::Scheduler._add; README "Placeholders".'
        )

    def check_placeholders(self, engine: LLMEngine, request: Request, where: str) -> None:
        num_in_flight = sum(request in step.scheduled.requests for step in engine.in_flight)
        assert request.num_output_placeholders == num_in_flight, (
            f"{where}: request {request.request_id} is in {num_in_flight} of the steps in flight: expected as many "
            f"placeholders, got {request.num_output_placeholders}. Look at core/engine.py::LLMEngine._append; "
            'README "Placeholders".'
        )


checks = Checks(PART)
take_step, check_engine, run_dry, merge = checks.take_step, checks.check_engine, checks.run_dry, checks.merge
