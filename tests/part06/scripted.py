"""Part 6's engine over the scripted model, and what holds of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from part06_chunked_prefill.engine import LLMEngine
from tests.engine_checks import ChunkChecks
from tests.scripted import Part, ScriptedRunner, make_scripted_engine, next_token

PART = Part("part06_chunked_prefill")


class Checks(ChunkChecks):
    LOOK_STEP = 'Look at engine.py::LLMEngine.step, _update and scheduler.py; README "A chunk is not an answer".'
    LOOK_ADD = 'Look at scheduler.py::SchedulerOutput.add; README "A chunk is not an answer".'
    LOOK_SIZE = 'Look at scheduler.py::Scheduler._chunk_size; README "Decodes first".'
    LOOK_RUNNING = 'Look at scheduler.py::Scheduler._schedule_running; README "Decodes first".'
    LOOK_ADMIT = 'Look at scheduler.py::Scheduler._admit and _schedule_waiting; README "Decodes first".'
    LOOK_LATE = 'Look at engine.py::LLMEngine._append; README of part 5, "A token too late".'
    LOOK_ROWS = 'Look at token_buffer.py and scheduler.py::Scheduler._release; README of part 5, "A token too late".'


checks = Checks(PART)
watch, take_step, run_dry = checks.watch, checks.take_step, checks.run_dry


def scripted_engine(
    max_model_len: int = 64, script: Callable[[Sequence[int]], int] = next_token, **flags: Any
) -> LLMEngine:
    """A real LLMEngine over the scripted model, whose scheduler is watched; flags are EngineConfig's."""
    engine = make_scripted_engine(PART, ScriptedRunner, max_model_len, script, **flags)
    watch(engine.scheduler)
    return engine
