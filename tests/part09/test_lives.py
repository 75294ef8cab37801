"""Random runs: of an engine with steps in several pipeline stages, and of ranks that compute a model."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.contract.engines import SmallEngine, SmallModels, prompts_of
from tests.lives import run_lives
from tests.part08.test_lives import KINDS
from tests.part08.test_lives import Life as SpecLife
from tests.part09.scripted import checks, scripted_engine

SEED = 9 * 7919**6


class StagedLife(SpecLife):
    checks, counts = checks, Counter[str]()
    LOOK = 'Look at core/engine.py::LLMEngine.step and core/scheduler.py; README "Pipeline stages".'

    @initialize(
        num_stages=st.integers(1, 4),
        num_tokens_kv=st.integers(4, 64),
        block_size=st.sampled_from([1, 2, 4, 8]),
        max_num_seqs=st.integers(1, 8),
        spare_tokens=st.one_of(st.integers(0, 6), st.integers(0, 6), st.integers(0, 60)),
        is_chunked=st.sampled_from([True, True, True, False]),
        threshold=st.sampled_from([0, 0, 1, 2, 3, 7, 30]),
        is_async=st.booleans(),
        watermark_blocks=st.integers(0, 3),
        kinds=st.sampled_from(KINDS),
        method=st.sampled_from(["ngram", "draft_model"]),
        num_drafts=st.integers(1, 6),
    )
    def start(self, num_stages: int, kinds: list[str], method: str, num_drafts: int, **drawn: Any) -> None:  # type: ignore[override]
        flags: dict[str, Any] = {"speculative_method": method} if kinds else {}
        self.begin_chunked(
            scripted_engine, kinds=kinds, num_speculative_tokens=num_drafts, pipeline_parallel_size=num_stages,
            **flags, **drawn,
        )  # fmt: skip

    def check_scheduled(self) -> None:
        super().check_scheduled()
        num_in_flight = len(self.engine.in_flight)
        self.counts["steps with a full pipeline"] += num_in_flight == self.engine.max_steps_in_flight - 1 > 1


def test_random_lives() -> None:
    """Whatever happens, in whatever order, in however many stages: every request gets what it gets alone, once."""
    wanted = {
        "steps": 2_000, "chunks": 1_000, "answers": 500, "hits": 300, "turns": 50, "preemptions": 80,
        "preempted half-way": 8, "preempted sharers": 60, "preempted with a step in flight": 20,
        "aborts": 50, "failures": 40, "failed with a step in flight": 5,
        "accepted draft tokens": 500, "outputs of several tokens": 300, "steps with a full pipeline": 1_000,
    }  # fmt: skip
    StagedLife.run(max_examples=90, stateful_step_count=24, seed=SEED, wanted=wanted)


class RankLife(RuleBasedStateMachine):
    """Adds and aborts requests of an engine whose ranks compute a random model, and steps it.

    All ranks of the last stage are held to the same results (tests/local_ranks.py).
    """

    models: SmallModels
    counts: Counter[str]
    prompts = [*prompts_of(8)]
    LOOK = 'Look at worker/parallel.py, worker/model_runner.py and core/scheduler.py; README "One step on all ranks".'

    @initialize(
        tp_size=st.sampled_from([1, 2, 2]), num_stages=st.sampled_from([1, 1, 2]), is_async=st.booleans(),
        budget=st.sampled_from([8, 16, 64]), num_kv_blocks=st.sampled_from([10, 12, 60]),
        method=st.sampled_from(["none", "ngram", "draft", "target"]),
    )  # fmt: skip
    def start(
        self, tp_size: int, num_stages: int, is_async: bool, budget: int, num_kv_blocks: int, method: str
    ) -> None:  # fmt: skip
        flags: dict[str, Any] = {"speculative_method": method, "prompt_lookup_min": 1}
        if method in ("draft", "target"):
            flags = {"speculative_method": "draft_model", "speculative_model": getattr(self.models, method)}
        self.engine = SmallEngine(
            "part09_tensor_parallelism", self.models, tensor_parallel_size=tp_size, pipeline_parallel_size=num_stages,
            async_scheduling=is_async, max_num_batched_tokens=budget, max_num_seqs=4, num_kv_blocks=num_kv_blocks,
            **flags,
        )  # fmt: skip
        self.asked: dict[str, tuple[list[int], int]] = {}
        self.aborted = set[str]()

    @rule(number=st.integers(0, 7), max_tokens=st.integers(1, 14))
    def ask(self, number: int, max_tokens: int) -> None:
        name, prompt = str(len(self.asked)), self.prompts[number]
        self.asked[name] = (prompt, max_tokens)
        self.engine.add(name, prompt, max_tokens=max_tokens)

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.asked, key=int)), "request")
        in_flight = {request.request_id for step in self.engine.core.in_flight for request in step.scheduled.requests}
        if not self.engine.answers[name].ends and name not in self.aborted:
            self.counts["aborts"] += 1
            self.counts["aborts in flight"] += name in in_flight
            self.aborted.add(name)
        self.engine.core.abort_requests([name])

    @rule(count=st.integers(1, 6))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.engine.step()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        core, answers = self.engine.core, self.engine.finish()
        for name, (prompt, max_tokens) in self.asked.items():
            expected, answer = self.models.greedy(prompt, max_tokens), answers[name]
            got = answer.token_ids
            if name in self.aborted:
                expected = expected[: len(got)]
            assert got == expected, (
                f"{self.engine.config.num_ranks} ranks, request {name}: expected transformers' {expected}, got {got}. "
                f"{self.LOOK}"
            )
            self.counts["hits"] += bool(answer.num_cached_tokens)
        assert core.blocks.num_free_blocks == core.blocks.num_blocks - 1, f"blocks are lost. {self.LOOK}"
        if self.engine.config.num_ranks > 1:
            self.counts["preemptions"] += core.scheduler.num_preemptions
            self.counts["accepted draft tokens"] += core.speculation.stats.num_accepted_tokens


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> SmallModels:
    return SmallModels(tmp_path_factory.mktemp("small"))


def test_random_lives_of_ranks(models: SmallModels) -> None:
    """Greedy answers of 1 to 4 ranks are transformers', whatever else happens."""
    RankLife.models, RankLife.counts = models, Counter[str]()
    run_lives(RankLife, max_examples=18, stateful_step_count=24, seed=SEED)
    wanted = {"aborts": 15, "aborts in flight": 5, "hits": 20, "preemptions": 10, "accepted draft tokens": 30}
    got = {name: RankLife.counts[name] for name in wanted}
    assert all(got[name] >= count for name, count in wanted.items()), f"too few to prove anything: {got}"
