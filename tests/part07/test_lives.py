"""The engine's bookkeeping, with a scripted worker that knows what every block holds: everything at once."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from tests.engine_lives import PrefixLife, beginning_of
from tests.part07.scripted import checks, scripted_engine

SEED = 0x3F98E274CBD87AD5C90A9587403E430EC66A78795E761D17731AF10506BF2EFC6F877186D76B07E881ED162AE2EB154


class Life(PrefixLife):
    checks, counts = checks, Counter[str]()
    LOOK = 'Look at core/engine.py::LLMEngine.step, _append and core/scheduler.py; README "When a block is cached".'
    LOOK_FAIL = 'Look at core/engine.py::LLMEngine.fail and Scheduler.reset; README "When a block is cached".'
    LOOK_LENGTH = 'Look at core/scheduler.py::Scheduler._schedule_running; README of part 5, "Placeholders".'

    @initialize(
        num_tokens_kv=st.integers(4, 64),
        block_size=st.sampled_from([1, 2, 4, 8]),
        max_num_seqs=st.integers(1, 6),
        spare_tokens=st.one_of(st.integers(0, 6), st.integers(0, 6), st.integers(0, 60)),
        is_chunked=st.sampled_from([True, True, True, False]),
        threshold=st.sampled_from([0, 0, 1, 2, 3, 7, 30]),
        is_async=st.booleans(),
        watermark_blocks=st.integers(0, 3),
    )
    def start(self, **drawn: Any) -> None:
        self.begin_chunked(scripted_engine, **drawn)

    @rule(
        base=st.integers(0, 3), length=st.integers(0, 50), tail=st.integers(0, 5), max_tokens=st.integers(1, 16),
        ignore_eos=st.booleans(), min_tokens=st.integers(0, 3), salt=st.sampled_from([None, None, None, "a", "b"]),
    )  # fmt: skip
    def arrive(
        self, base: int, length: int, tail: int, max_tokens: int, ignore_eos: bool, min_tokens: int, salt: str | None
    ) -> None:
        self.ask(self.begin_alike(base, length, tail), max_tokens, ignore_eos, min_tokens, cache_salt=salt)

    @rule(base=st.integers(0, 3), length=st.integers(1, 24), max_tokens=st.integers(1, 16), count=st.integers(2, 5))
    def arrive_together(self, base: int, length: int, max_tokens: int, count: int) -> None:
        for number in range(count):
            self.ask(beginning_of(base)[: length + number % 2], max_tokens, number % 3 == 0, 0)

    @precondition(lambda self: self.engine.scheduler.running and not self.engine.scheduler.waiting)
    @rule(max_tokens=st.integers(1, 16))
    def fill_up(self, max_tokens: int) -> None:
        self.ask(self.own_prompt(self.room()), max_tokens, True, 0)
        for _ in range(4):
            self.step()

    @precondition(lambda self: self.engine.scheduler.has_unfinished_requests)
    @rule(which=st.sampled_from(["launch_error", "result_error", "preemption_error"]), now=st.integers(0, 1))
    def step_that_fails(self, which: str, now: int) -> None:
        """A failed step empties the engine and the cache: if it happened more often, there would be few hits."""
        if now == 0:
            super().step_that_fails(which)


def test_random_lives() -> None:
    """Whatever happens, in whatever order: every request gets what it gets alone, exactly once."""
    wanted = {
        "steps": 2_000, "chunks": 1_000, "answers": 500, "hits": 400, "turns": 100, "preemptions": 80,
        "preempted half-way": 10, "preempted sharers": 60, "aborts": 50, "aborted half-way": 10, "failures": 40,
        "failed while waiting": 20, "failed with a step in flight": 5, "wasted": 10,
    }  # fmt: skip
    Life.run(max_examples=90, stateful_step_count=25, seed=SEED, wanted=wanted)
