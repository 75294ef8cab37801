"""Random runs over a scripted worker: requests are added, aborted, end and fail in any order, ahead or not."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule

from tests.engine_lives import EngineLife
from tests.part05.scripted import checks, scripted_engine

SEED = 0x131C7115E44F5539CF14C849083A5255AC8DB97663C55E4E259E1B8A5BF4BB8438C70B650AA60ADB29C59F4BF066BB94


class Life(EngineLife):
    checks, counts = checks, Counter[str]()
    LOOK = 'Look at core/engine.py::LLMEngine.step, _update, _append and core/scheduler.py; README "Late tokens".'
    LOOK_LENGTH = 'Look at core/scheduler.py::Scheduler._schedule_running; README "Placeholders".'
    MAX_MODEL_LEN = 24

    @initialize(
        num_usable=st.integers(3, 14),
        block_size=st.sampled_from([1, 2, 4]),
        max_num_seqs=st.integers(1, 6),
        spare_tokens=st.integers(0, 20),
        is_async=st.booleans(),
        watermark_blocks=st.integers(0, 3),
    )
    def start(self, is_async: bool, watermark_blocks: int, spare_tokens: int, num_usable: int, **flags: Any) -> None:
        engine = scripted_engine(
            self.MAX_MODEL_LEN,
            num_kv_blocks=1 + num_usable,
            max_num_batched_tokens=self.MAX_MODEL_LEN + spare_tokens,
            async_scheduling=is_async,
            **flags,
        )
        self.begin(engine, watermark_blocks)

    @rule(
        length=st.integers(1, 16), max_tokens=st.integers(1, 16), ignore_eos=st.booleans(), min_tokens=st.integers(0, 3)
    )
    def arrive(self, length: int, max_tokens: int, ignore_eos: bool, min_tokens: int) -> None:
        self.ask(self.own_prompt(length), max_tokens, ignore_eos, min_tokens)

    @rule(length=st.integers(1, 12), max_tokens=st.integers(1, 16), count=st.integers(2, 5))
    def arrive_together(self, length: int, max_tokens: int, count: int) -> None:
        for number in range(count):
            self.arrive(length + number % 2, max_tokens, number % 3 == 0, 0)

    @rule(count=st.integers(1, 10))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def most_steps(self) -> int:
        return 10 + 2 * sum(map(len, self.expected.values()))


def test_random_lives() -> None:
    """Every request gets what it gets alone, exactly once, or an error after a failed step."""
    wanted = {
        "steps": 2_000, "answers": 200, "preemptions": 100, "aborts": 50, "wasted": 30, "failures": 40,
        "failed while waiting": 10, "failed while preempted": 3, "failed with a step in flight": 5,
    }  # fmt: skip
    Life.run(max_examples=170, stateful_step_count=25, seed=SEED, wanted=wanted)
