"""The engine's bookkeeping, with a scripted model and guesses of all kinds: everything at once."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from part08_speculative_decoding.core.request import Request
from part08_speculative_decoding.messages import EngineCoreOutput
from tests.engine_lives import CAT, PrefixLife, beginning_of
from tests.part08.scripted import BY_PROMPT, checks, proposer_of, scripted_engine
from tests.scripted import runner_of

KINDS = [
    ["right"], ["half"], ["right", "wrong", "half", "few", "none"], [BY_PROMPT, "right", "wrong"],
    [BY_PROMPT, "right", "wrong", "half"], [],
]  # fmt: skip
STOP = 7  # a token that ends the answers of those who ask for it
SEED = 0x1CC3CB6BE1CB465C33A6247B9AA6E8008C079FFCC871BB6632F40A08DF3CD1748BF3CE43F7EEA407249C268A83DDBBF3


class Life(PrefixLife):
    checks, counts = checks, Counter[str]()
    LOOK = 'Look at core/engine.py::LLMEngine.step, _update, _append and core/scheduler.py; README "What the step brought".'  # noqa: E501
    LOOK_FAIL = 'Look at core/engine.py::LLMEngine._blaming and core/scheduler.py::Scheduler.fail_step; README "What the step brought".'  # noqa: E501
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
        kinds=st.sampled_from(KINDS),
        num_guesses=st.integers(1, 6),
        max_guessing=st.sampled_from([1, 2, 3, 4, 8, 8, 8]),
    )
    def start(self, num_guesses: int, max_guessing: int, **drawn: Any) -> None:
        self.begin_chunked(
            scripted_engine, num_speculative_tokens=num_guesses, speculative_max_num_seqs=max_guessing, **drawn
        )

    def note_preemption(self, request: Request) -> None:
        super().note_preemption(request)
        self.counts["preempted with guesses in flight"] += request.num_output_placeholders > 1

    @rule(
        base=st.integers(0, 3), length=st.integers(0, 50), tail=st.integers(0, 5), max_tokens=st.integers(1, 24),
        ignore_eos=st.booleans(), min_tokens=st.integers(0, 3), salt=st.sampled_from([None, None, None, "a", "b"]),
        has_stop=st.booleans(),
    )  # fmt: skip
    def arrive(
        self, base: int, length: int, tail: int, max_tokens: int, ignore_eos: bool, min_tokens: int, salt: str | None,
        has_stop: bool,
    ) -> None:  # fmt: skip
        prompt, fields = self.begin_alike(base, length, tail), {"cache_salt": salt, "stop_token_ids": [STOP] * has_stop}
        self.ask(prompt, max_tokens, ignore_eos, min_tokens, **fields)

    @rule(base=st.integers(0, 3), length=st.integers(1, 24), max_tokens=st.integers(1, 24), count=st.integers(2, 5))
    def arrive_together(self, base: int, length: int, max_tokens: int, count: int) -> None:
        for number in range(count):
            self.ask(beginning_of(base)[: length + number % 2], max_tokens, number % 3 == 0, 0)

    @precondition(lambda self: self.engine.scheduler.running)
    @rule(length=st.integers(1, 20), max_tokens=st.integers(1, 24))
    def join_guessers(self, length: int, max_tokens: int) -> None:
        """Somebody joins the step in which guesses are checked, so that more run when the next one is scheduled."""
        for _ in range(30):
            if any(
                request.draft_token_ids and not request.num_output_placeholders
                for request in self.engine.scheduler.running
            ):
                self.counts["joined guessers"] += 1
                break
            self.step()
        self.ask(beginning_of(1)[:length], max_tokens, True, 0)
        self.step()
        self.step()

    @precondition(lambda self: self.engine.scheduler.running and not self.engine.scheduler.waiting)
    @rule(max_tokens=st.integers(1, 16))
    def fill_up(self, max_tokens: int) -> None:
        salt = f"salt {len(self.expected)}"
        self.ask(beginning_of(3)[: self.room()], max_tokens, True, 0, cache_salt=salt)
        for _ in range(4):
            self.step()

    @rule(count=st.one_of(st.integers(1, 2), st.integers(1, 4), st.integers(1, 10)))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    @precondition(lambda self: self.engine.scheduler.has_unfinished_requests)
    @rule(which=st.sampled_from(["launch_error", "result_error", "preemption_error", "error"]))
    def step_that_fails(self, which: str) -> None:
        """The next step that is launched, or the next in which somebody is preempted; a result fails a step later.

        error: the next guesses fail.
        """
        if which == "error" and self.engine.proposer is None:
            return
        setattr(runner_of(self.engine) if which != "error" else proposer_of(self.engine), which, ValueError(CAT))
        self.step()

    def may_fail(self) -> bool:
        guesses_fail = self.engine.proposer is not None and proposer_of(self.engine).error is not None
        return guesses_fail or super().may_fail()

    def receive(self, outputs: list[EngineCoreOutput]) -> None:
        super().receive(outputs)
        for output in outputs:
            self.counts["outputs of several tokens"] += len(output.token_ids) > 1
            self.counts["ended among guesses that stood"] += bool(output.finish_reason) and len(output.token_ids) > 1

    def check_end(self) -> None:
        """The counts are those of the guesses that were in steps; some of them nobody looked at any more."""
        super().check_end()
        stats = self.engine.speculation.stats
        num_made = sum(len(work.draft_ids) for step in runner_of(self.engine).launched for work in step.work)
        assert stats.num_accepted_tokens <= stats.num_draft_tokens <= num_made, f"{stats}, {num_made} made. {self.LOOK}"
        assert sum(stats.num_accepted_at) == stats.num_accepted_tokens, f"{stats} does not add up. {self.LOOK}"
        self.counts["guesses"] += num_made
        self.counts["guesses that stood"] += stats.num_accepted_tokens


def test_random_lives() -> None:
    """Whatever comes, in whatever order: all get what they get alone, exactly once."""
    wanted = {
        "steps": 2_000, "chunks": 1_000, "answers": 500, "hits": 300, "turns": 50, "preemptions": 80,
        "preempted half-way": 10, "preempted sharers": 60, "preempted with guesses in flight": 1, "aborts": 50,
        "failures": 40, "failures of sharers": 10, "wasted": 5, "guesses": 1_000, "guesses that stood": 500,
        "outputs of several tokens": 300, "joined guessers": 8, "ended among guesses that stood": 50,
    }  # fmt: skip
    Life.run(max_examples=90, stateful_step_count=22, seed=SEED, wanted=wanted)
