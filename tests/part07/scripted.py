"""Part 7's engine over a scripted model that knows what every block holds, and what holds of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from part07_prefix_caching.core.engine import LLMEngine
from tests.engine_checks import PrefixChecks
from tests.scripted import Part, PrefixRunner, make_scripted_engine, next_token

PART = Part("part07_prefix_caching")


class Checks(PrefixChecks):
    LOOK_STEP = 'Look at core/engine.py::LLMEngine.step, _update and core/scheduler.py; README of part 6, "A chunk is not an answer".'  # noqa: E501
    LOOK_ADD = 'Look at core/scheduler.py::SchedulerOutput.add; README of part 6, "A chunk is not an answer".'
    LOOK_SIZE = 'Look at core/scheduler.py::Scheduler._chunk_size; README of part 6, "Decodes first".'
    LOOK_RUNNING = 'Look at core/scheduler.py::Scheduler._schedule_running; README of part 6, "Decodes first".'
    LOOK_ADMIT = 'Look at core/scheduler.py::Scheduler._admit and _schedule_waiting; README of part 6, "Decodes first".'
    LOOK_LATE = 'Look at core/engine.py::LLMEngine._append; README of part 5, "A token too late".'
    LOOK_ROWS = 'Look at worker/token_buffer.py::TokenBuffer and core/scheduler.py::Scheduler._release; part 5, "A token too late".'  # noqa: E501
    LOOK_HIT = 'Look at core/scheduler.py::Scheduler._schedule_waiting; README "A block\'s name".'
    LOOK_HASH = 'Look at core/block_manager.py::hash_block and hash_blocks; README "A block\'s name".'
    LOOK_NAME = (
        "Look at core/block_manager.py::BlockManager and core/scheduler.py::Scheduler._add, _release; "
        'README "When a name is given".'
    )
    LOOK_FREE = 'Look at core/block_manager.py::BlockManager.allocate and free; README "Free, and still there".'
    LOOK_QUEUE = 'Look at core/free_queue.py::FreeBlockQueue; README "Free, and still there".'
    LOOK_TOLD = 'Look at core/engine.py::LLMEngine._update; README "What a client sees".'


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
