"""Part 7's engine over a scripted model that knows what every block holds, and what holds of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from part07_prefix_caching.engine import LLMEngine
from tests.engine_checks import PrefixChecks
from tests.scripted import Part, PrefixRunner, make_scripted_engine, next_token

PART = Part("part07_prefix_caching")


class Checks(PrefixChecks):
    LOOK_STEP = (
        'Look at engine.py::LLMEngine.step, _update and scheduler.py; README of part 6, "A chunk is not an answer".'
    )
    LOOK_ADD = 'Look at scheduler.py::SchedulerOutput.add; README of part 6, "A chunk is not an answer".'
    LOOK_SIZE = 'Look at scheduler.py::Scheduler._chunk_size; README of part 6, "Decodes first".'
    LOOK_RUNNING = 'Look at scheduler.py::Scheduler._schedule_running; README of part 6, "Decodes first".'
    LOOK_ADMIT = 'Look at scheduler.py::Scheduler._admit and _schedule_waiting; README of part 6, "Decodes first".'
    LOOK_LATE = 'Look at engine.py::LLMEngine._append; README of part 5, "A token too late".'
    LOOK_ROWS = 'Look at token_buffer.py::TokenBuffer and scheduler.py::Scheduler._release; part 5, "A token too late".'
    LOOK_HIT = 'Look at scheduler.py::Scheduler._schedule_waiting; README "A block\'s name".'
    LOOK_HASH = 'Look at block_manager.py::hash_block and hash_blocks; README "A block\'s name".'
    LOOK_NAME = (
        "Look at block_manager.py::BlockManager and scheduler.py::Scheduler._add, _release; "
        'README "When a name is given".'
    )
    LOOK_FREE = 'Look at block_manager.py::BlockManager.allocate and free; README "Free, and still there".'
    LOOK_QUEUE = 'Look at free_queue.py::FreeBlockQueue; README "Free, and still there".'
    LOOK_TOLD = 'Look at engine.py::LLMEngine._update; README "What a client sees".'


checks = Checks(PART)
watch, take_step, run_dry = checks.watch, checks.take_step, checks.run_dry
check_engine, check_blocks = checks.check_engine, checks.check_blocks


def scripted_engine(
    max_model_len: int = 64, script: Callable[[Sequence[int]], int] = next_token, **flags: Any
) -> LLMEngine:
    """A real LLMEngine over the scripted model, whose scheduler is watched; flags are EngineConfig's."""
    engine = make_scripted_engine(PART, PrefixRunner, max_model_len, script, **flags)
    watch(engine.scheduler)
    return engine
