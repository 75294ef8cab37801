"""Part 6's engine over the scripted worker, and what holds of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from part06_chunked_prefill.core.engine import LLMEngine
from tests.engine_checks import ChunkChecks
from tests.scripted import Part, ScriptedExecutor, make_scripted_engine, next_token

PART = Part("part06_chunked_prefill")


class Checks(ChunkChecks):
    LOOK_STEP = (
        'Look at core/engine.py::LLMEngine.step, _update and core/scheduler.py; README "Chunks that sample no token".'
    )
    LOOK_ADD = 'Look at core/scheduler.py::Scheduler._add; README "Chunks that sample no token".'
    LOOK_SIZE = 'Look at core/scheduler.py::Scheduler._chunk_size; README "Decodes first".'
    LOOK_RUNNING = 'Look at core/scheduler.py::Scheduler._schedule_running; README "Decodes first".'
    LOOK_ADMIT = 'Look at core/scheduler.py::Scheduler._admit and _schedule_waiting; README "Decodes first".'
    LOOK_LATE = 'Look at core/engine.py::LLMEngine._append; README of part 5, "Late tokens".'
    LOOK_ROWS = 'Look at core/scheduler.py::Scheduler._start, _leave and finish; README of part 5, "Placeholders".'


checks = Checks(PART)
watch, take_step, run_dry, check_engine = checks.watch, checks.take_step, checks.run_dry, checks.check_engine


def scripted_engine(
    max_model_len: int = 64, script: Callable[[Sequence[int]], int] = next_token, **flags: Any
) -> LLMEngine:
    """A real LLMEngine over the scripted worker, whose scheduler is watched; flags are EngineConfig's."""
    engine = make_scripted_engine(PART, ScriptedExecutor, max_model_len, script, **flags)
    watch(engine.scheduler)
    return engine
