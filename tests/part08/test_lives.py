"""The engine's bookkeeping, with a scripted worker and draft tokens of all kinds: everything at once."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from part08_speculative_decoding.core.request import Request
from part08_speculative_decoding.messages import EngineCoreOutput
from tests.engine_lives import CAT, PrefixLife, beginning_of
from tests.part08.scripted import BY_PROMPT, checks, scripted_engine
from tests.scripted import executor_of

KINDS = [
    ["right"], ["half"], ["right", "wrong", "half", "few", "none"], [BY_PROMPT, "right", "wrong"],
    [BY_PROMPT, "right", "wrong", "half"], [],
]  # fmt: skip
STOP = 7  # a stop token of some requests
SEED = 0x0FE8D126E036D634178B18C7D3AC45C2F9A734B258D99CA3EB488D4372FFEBAE6B33C8779C463A27E350DF17526FBA27


class Life(PrefixLife):
    checks, counts = checks, Counter[str]()
    LOOK = 'Look at core/engine.py::LLMEngine.step, _update, _append and core/scheduler.py; README "Several tokens from one step".'  # noqa: E501
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
        kinds=st.sampled_from(KINDS),
        method=st.sampled_from(["ngram", "draft_model"]),
        num_drafts=st.integers(1, 6),
        max_drafting=st.sampled_from([1, 2, 3, 4, 8, 8, 8]),
    )
    def start(self, kinds: list[str], method: str, num_drafts: int, max_drafting: int, **drawn: Any) -> None:
        flags: dict[str, Any] = {"speculative_method": method} if kinds else {}
        self.begin_chunked(
            scripted_engine, kinds=kinds, num_speculative_tokens=num_drafts, speculative_max_num_seqs=max_drafting,
            **flags, **drawn,
        )  # fmt: skip

    def note_preemption(self, request: Request) -> None:
        super().note_preemption(request)
        self.counts["preempted with a step in flight"] += request.num_output_placeholders > 0
        self.counts["preempted with draft tokens"] += bool(request.draft_token_ids)

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
    def join_a_verification(self, length: int, max_tokens: int) -> None:
        """A request joins the step that verifies draft tokens, so that more run when the next one is scheduled."""
        for _ in range(30):
            if any(
                request.draft_token_ids or request.num_pending_drafts or self.engine.scheduler._look_up_drafts(request)
                for request in self.engine.scheduler.running
            ):
                self.counts["joined a verification"] += 1
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

    @precondition(lambda self: self.engine.scheduler.running and self.engine.max_steps_in_flight == 2)
    @rule()
    def step_with_draft_tokens_that_fails(self) -> None:
        """The step in flight fails while it verifies draft tokens, or proposes some, or both."""
        for _ in range(10):
            for step in executor_of(self.engine).pending:
                is_proposing = any(work.share.num_next_drafts for work in step.work)
                is_verifying = any(work.draft_token_ids for work in step.work)
                if is_proposing or is_verifying:
                    self.counts["failed while draft tokens were proposed"] += is_proposing
                    self.counts["failed while draft tokens were verified"] += is_verifying
                    step.error = ValueError(CAT)
                    self.step()
                    return
            self.step()

    def receive(self, outputs: list[EngineCoreOutput]) -> None:
        super().receive(outputs)
        for output in outputs:
            self.counts["outputs of several tokens"] += len(output.token_ids) > 1
            self.counts["ended among accepted draft tokens"] += bool(output.finish_reason) and len(output.token_ids) > 1

    def check_end(self) -> None:
        """The counters are those of the draft tokens in the steps, but for requests that had ended meanwhile."""
        super().check_end()
        stats = self.engine.speculation.stats
        num_made = sum(len(work.draft_token_ids) for step in executor_of(self.engine).launched for work in step.work)
        assert stats.num_accepted_tokens <= stats.num_draft_tokens <= num_made, (
            f"{stats}, {num_made} scheduled. {self.LOOK}"
        )
        assert sum(stats.num_accepted_tokens_per_pos) == stats.num_accepted_tokens, (
            f"{stats} does not add up. {self.LOOK}"
        )
        self.counts["draft tokens"] += num_made
        self.counts["accepted draft tokens"] += stats.num_accepted_tokens


def test_random_lives() -> None:
    """Whatever happens, in whatever order: every request gets what it gets alone, exactly once."""
    wanted = {
        "steps": 2_000, "chunks": 1_000, "answers": 500, "hits": 300, "turns": 50, "preemptions": 80,
        "preempted half-way": 8, "preempted sharers": 60, "preempted with a step in flight": 20,
        "preempted with draft tokens": 8, "aborts": 50, "failures": 40, "failed with a step in flight": 5,
        "failed while draft tokens were proposed": 5, "failed while draft tokens were verified": 5, "wasted": 5,
        "draft tokens": 1_000, "accepted draft tokens": 500, "outputs of several tokens": 300,
        "joined a verification": 8, "ended among accepted draft tokens": 50,
    }  # fmt: skip
    Life.run(max_examples=110, stateful_step_count=22, seed=SEED, wanted=wanted)
