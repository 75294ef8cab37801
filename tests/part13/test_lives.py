"""Random runs: other engines fetch prompts here, and prompts are fetched from them, late, in part or not at all."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from tests.engine_lives import beginning_of
from tests.part08.test_lives import KINDS
from tests.part08.test_lives import Life as SpecLife
from tests.part13.scripted import NextTransfer, TransferExecutor, checks, scripted_engine
from tests.scripted import executor_of

SEED = 13 * 7919**6


class TransferLife(SpecLife):
    checks, counts = checks, Counter[str]()
    LOOK = 'Look at core/kv_transfer.py and core/scheduler.py; README "Delayed free".'
    LAST_STEPS = 20

    @initialize(
        num_tokens_kv=st.integers(4, 64),
        block_size=st.sampled_from([1, 2, 4, 8]),
        max_num_seqs=st.integers(1, 6),
        spare_tokens=st.one_of(st.integers(0, 6), st.integers(0, 6), st.integers(0, 60)),
        is_chunked=st.sampled_from([True, True, True, False]),
        threshold=st.sampled_from([0, 0, 1, 2, 3, 7, 30]),
        is_async=st.booleans(),
        watermark_blocks=st.integers(0, 3),
        kinds=st.sampled_from([[], [], *KINDS]),
        method=st.sampled_from(["ngram", "draft_model"]),
        num_drafts=st.integers(1, 6),
        num_stages=st.sampled_from([1, 1, 1, 2, 3]),
        caching=st.sampled_from([True, True, True, False]),
        seed=st.integers(0, 2**30),
        failing=st.sampled_from([0.0, 0.0, 0.1, 0.3]),
        patience=st.sampled_from([0.1, 0.5, 1.0]),
    )
    def start(  # type: ignore[override]
        self, kinds: list[str], method: str, num_drafts: int, num_stages: int, caching: bool, **drawn: Any
    ) -> None:
        flags: dict[str, Any] = {"speculative_method": method} if kinds else {}
        self.begin_chunked(
            scripted_engine, kinds=kinds, num_speculative_tokens=num_drafts, pipeline_parallel_size=num_stages,
            enable_prefix_caching=caching, **flags, **drawn,
        )  # fmt: skip
        self.next_transfer = NextTransfer(self.engine)

    @property
    def executor(self) -> TransferExecutor:
        executor = executor_of(self.engine)
        assert isinstance(executor, TransferExecutor)
        return executor

    @rule(
        base=st.integers(0, 3), length=st.integers(1, 50), tail=st.integers(0, 5), max_tokens=st.integers(1, 12),
        salt=st.sampled_from([None, None, "a"]), count=st.sampled_from([1, 1, 1, 3]),
    )  # fmt: skip
    def arrive_to_be_fetched(
        self, base: int, length: int, tail: int, max_tokens: int, salt: str | None, count: int
    ) -> None:
        """Another engine has its KV; for several answers to one prompt, it is the same transfer."""
        prompt, transfer_id = self.begin_alike(base, length, tail), None
        for _ in range(count):
            transfer_id = self.next_transfer.ask(True, transfer_id).transfer_id
            self.ask(prompt, max_tokens, True, 0, cache_salt=salt)

    @rule(
        base=st.integers(0, 3), length=st.integers(1, 50), tail=st.integers(0, 5),
        max_tokens=st.sampled_from([1, 1, 5]), salt=st.sampled_from([None, None, "a"]),
    )  # fmt: skip
    def arrive_to_be_offered(self, base: int, length: int, tail: int, max_tokens: int, salt: str | None) -> None:
        self.next_transfer.ask(False)
        self.ask(self.begin_alike(base, length, tail), max_tokens, True, 0, cache_salt=salt)

    @rule(count=st.integers(1, 3), is_fetched=st.booleans())
    def large_ones(self, count: int, is_fetched: bool) -> None:
        """Prompts that need about all blocks."""
        for _ in range(count):
            self.next_transfer.ask(is_fetched)
            self.ask(self.own_prompt(min(40, self.capacity)), 2, True, 0)
        for _ in range(4):
            self.step()

    @precondition(lambda self: not self.engine.scheduler.has_unfinished_requests)
    @rule()
    def reset(self) -> None:
        """Nothing is offered any longer."""
        assert self.engine.reset_prefix_cache(), f"an engine without requests resets its prefix cache. {self.LOOK}"
        assert not self.engine.transfers.offered, f"after a reset: {self.engine.transfers.offered}. {self.LOOK}"
        self.counts["resets"] += 1

    def abort_one(self, name: str) -> None:
        scheduler = self.engine.scheduler
        self.counts["aborted while loading"] += any(
            each.request_id == name for each in [*scheduler.loading, *scheduler.loaded]
        )
        super().abort_one(name)

    @precondition(lambda self: self.engine.scheduler.loading or self.engine.scheduler.loaded)
    @rule(data=st.data())
    def abort_while_loading(self, data: st.DataObject) -> None:
        requests = [*self.engine.scheduler.loading, *self.engine.scheduler.loaded]
        self.abort_one(data.draw(st.sampled_from(sorted(each.request_id for each in requests)), "request"))

    @precondition(lambda self: any(each.block_ids for each in self.engine.transfers.offered.values()))
    @rule(max_tokens=st.integers(2, 12))
    def others_need_the_blocks(self, max_tokens: int) -> None:
        """While a computed prompt is held for another engine."""
        self.counts["held for another engine"] += 1
        self.ask(beginning_of(3)[: self.room()], max_tokens, True, 0, cache_salt=f"salt {len(self.expected)}")
        for _ in range(4):
            self.step()

    def may_fail(self) -> bool:
        return super().may_fail() or any(step.error for step in self.executor.launched[-4:])

    def check_empty(self, where: str, look: str) -> None:
        super().check_empty(where, look)
        engine, executor = self.engine, self.executor
        transfers, scheduler = engine.transfers, engine.scheduler
        assert not scheduler.loading and not scheduler.loaded, f"{where}: {scheduler.loading} are left. {look}"
        left = [transfers.offered, transfers.watched, transfers._names, engine.orders.pending, engine.connector._chosen]
        left += [executor.offers, executor.fetches]
        assert not any(left), f"{where}: expected no transfer any more, got {left}. {look}"
        unreleased = {name for name in executor.watches}
        assert not unreleased or engine.orders.new, f"{where}: {unreleased} are still held elsewhere. {look}"

    def most_steps(self) -> int:
        return 6 * super().most_steps()

    def check_end(self) -> None:
        super().check_end()
        self.executor.patience, self.executor.failing = 1.0, 0.0  # for the one that follows
        self.counts.update(self.executor.counts)
        got, expected = self.engine.transfers.stats.num_fetched_tokens, self.executor.counts["fetched tokens"]
        assert got == expected, f"{expected} tokens were fetched, counted are {got}. {self.LOOK}"


def test_random_lives() -> None:
    """Whatever happens, in whatever order: every request gets what it gets alone; no block is lost, no offered block is
    reused while another engine may read it, and what was fetched is used when it has arrived, not before."""
    wanted = {
        "steps": 4_000, "answers": 700, "hits": 200, "preemptions": 40, "aborts": 80, "aborted while loading": 10,
        "failures": 30, "failed with a step in flight": 10, "offers": 250, "fetches": 100, "fetches that failed": 8,
        "watches that failed": 12, "fetched tokens": 1_500, "resets": 10, "held for another engine": 10,
        "accepted draft tokens": 100,
    }  # fmt: skip
    TransferLife.run(max_examples=120, stateful_step_count=24, seed=SEED, wanted=wanted)
