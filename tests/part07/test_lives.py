"""The engine's bookkeeping, with a scripted model that knows what every block holds: everything at once."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule

from tests.engine_lives import PrefixLife, beginning_of
from tests.part07.scripted import checks, scripted_engine

SEED = 0x7FC73DBF34937503C86A66267D89319C7CA6C86442D3DF1D07292F00622232CF3D44ACAC243B2B3BC53B23BA3A68E3EF


class Life(PrefixLife):
    checks, counts = checks, Counter[str]()
    LOOK = (
        'Look at core/engine.py::LLMEngine.step, _update, _append and core/scheduler.py; README "When a name is given".'
    )
    LOOK_FAIL = 'Look at core/engine.py::LLMEngine._blaming and core/scheduler.py::Scheduler.fail_step; README "When a name is given".'  # noqa: E501
    LOOK_LENGTH = (
        'Look at core/scheduler.py::Scheduler._schedule_running; README of part 5, "What the future may assume".'
    )

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


def test_random_lives() -> None:
    """Whatever comes, in whatever order: all get what they get alone, exactly once."""
    wanted = {
        "steps": 2_000, "chunks": 1_000, "answers": 500, "hits": 400, "turns": 100, "preemptions": 80,
        "preempted half-way": 10, "preempted sharers": 60, "aborts": 50, "aborted half-way": 10, "failures": 60,
        "failures of sharers": 20, "wasted": 10,
    }  # fmt: skip
    Life.run(max_examples=90, stateful_step_count=25, seed=SEED, wanted=wanted)
