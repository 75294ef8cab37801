"""Part 7's engine over a scripted worker that knows what every block holds, and what holds of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from part07_prefix_caching.core.engine import LLMEngine
from tests.engine_checks import PrefixChecks
from tests.scripted import Part, PrefixExecutor, make_scripted_engine, next_token

PART = Part("part07_prefix_caching")


class Checks(PrefixChecks):
    LOOK_STEP = 'Look at core/engine.py::LLMEngine.step, _update and core/scheduler.py; README of part 6, "Chunks that sample no token".'  # noqa: E501
    LOOK_ADD = 'Look at core/scheduler.py::Scheduler._add; README of part 6, "Chunks that sample no token".'
    LOOK_SIZE = 'Look at core/scheduler.py::Scheduler._chunk_size; README of part 6, "Decodes first".'
    LOOK_RUNNING = 'Look at core/scheduler.py::Scheduler._schedule_running; README of part 6, "Decodes first".'
    LOOK_ADMIT = 'Look at core/scheduler.py::Scheduler._admit and _schedule_waiting; README of part 6, "Decodes first".'
    LOOK_LATE = 'Look at core/engine.py::LLMEngine._append; README of part 5, "Late tokens".'
    LOOK_ROWS = 'Look at core/scheduler.py::Scheduler._start, _leave and finish; README of part 5, "Placeholders".'
    LOOK_HIT = 'Look at core/scheduler.py::Scheduler._schedule_waiting; README "A block\'s hash".'
    LOOK_HASH = 'Look at core/block_manager.py::hash_block and hash_blocks; README "A block\'s hash".'
    LOOK_NAME = (
        "Look at core/block_manager.py::BlockManager.cache_full_blocks and core/scheduler.py::Scheduler._add, _leave; "
        'README "When a block is cached".'
    )
    LOOK_FREE = 'Look at core/block_manager.py::BlockManager.admit, grow and free; README "Free, but still cached".'
    LOOK_QUEUE = 'Look at core/free_queue.py::FreeBlockQueue; README "Free, but still cached".'
    LOOK_TOLD = 'Look at core/engine.py::LLMEngine._update; README "What a client sees".'


checks = Checks(PART)
watch, take_step, run_dry = checks.watch, checks.take_step, checks.run_dry
check_engine, check_blocks = checks.check_engine, checks.check_blocks


def scripted_engine(
    max_model_len: int = 64, script: Callable[[Sequence[int]], int] = next_token, **flags: Any
) -> LLMEngine:
    """A real LLMEngine over the scripted worker, whose scheduler is watched; flags are EngineConfig's."""
    engine = make_scripted_engine(PART, PrefixExecutor, max_model_len, script, **flags)
    watch(engine.scheduler)
    return engine
