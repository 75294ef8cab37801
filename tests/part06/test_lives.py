"""The engine's bookkeeping, with a scripted worker: long prompts, small budgets, and everything else at once."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from tests.engine_lives import ChunkLife
from tests.part06.scripted import checks, scripted_engine

SEED = 0x8D5F69FDF4C2AF42FE8581E39EE9DCF3412EA0F373E2DA5907F553BE8B619C641B820248221CB6B329F8B16773D98150


class Life(ChunkLife):
    checks, counts = checks, Counter[str]()
    LOOK = (
        'Look at core/engine.py::LLMEngine.step, _append and core/scheduler.py; README "Chunks that sample no token".'  # noqa: E501
    )
    LOOK_LENGTH = 'Look at core/scheduler.py::Scheduler._schedule_running; README of part 5, "Placeholders".'

    @initialize(
        num_tokens_kv=st.integers(4, 64),
        block_size=st.sampled_from([1, 2, 4, 8]),
        max_num_seqs=st.integers(1, 6),
        spare_tokens=st.one_of(st.integers(0, 6), st.integers(0, 6), st.integers(0, 60)),
        is_chunked=st.sampled_from([True, True, True, False]),
        threshold=st.sampled_from([0, 0, 1, 1, 2, 2, 3, 7]),
        is_async=st.booleans(),
        watermark_blocks=st.integers(0, 3),
    )
    def start(self, **drawn: Any) -> None:
        self.begin_chunked(scripted_engine, **drawn)

    @rule(
        length=st.integers(1, 60), max_tokens=st.integers(1, 16), ignore_eos=st.booleans(), min_tokens=st.integers(0, 3)
    )
    def arrive(self, length: int, max_tokens: int, ignore_eos: bool, min_tokens: int) -> None:
        self.ask(self.own_prompt(length), max_tokens, ignore_eos, min_tokens)

    @rule(length=st.integers(1, 24), max_tokens=st.integers(1, 16), count=st.integers(2, 5))
    def arrive_together(self, length: int, max_tokens: int, count: int) -> None:
        for number in range(count):
            self.arrive(length + number % 2, max_tokens, number % 3 == 0, 0)

    @precondition(lambda self: self.engine.scheduler.running and not self.engine.scheduler.waiting)
    @rule(max_tokens=st.integers(1, 16))
    def fill_up(self, max_tokens: int) -> None:
        self.arrive(self.room(), max_tokens, True, 0)
        for _ in range(4):
            self.step()


def test_random_lives() -> None:
    """Whatever happens, in whatever order: every request gets what it gets alone, exactly once."""
    wanted = {
        "steps": 2_000, "chunks": 1_000, "answers": 500, "preemptions": 80, "preempted half-way": 10, "aborts": 50,
        "aborted half-way": 10, "failures": 40, "failed while waiting": 5, "failed while preempted": 1,
        "failed with a step in flight": 5, "wasted": 10,
    }  # fmt: skip
    Life.run(max_examples=130, stateful_step_count=25, seed=SEED, wanted=wanted)
