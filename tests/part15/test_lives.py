"""Everything at once in a tiny pool: answers are those of transformers, and nothing is left behind."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from part15_full_architecture.core.cost_model import Rate
from tests.contract.engines import GROUP_SIZE, SmallEngine, SmallModels, prompts_of
from tests.lives import run_lives

PART = "part15_full_architecture"
SEED = 15 * 7919**5
CAT = "the cat sat on it"
LOOK = "Everything is on; leave out one of the flags after the other to find the technique"
SAMPLED: list[dict[str, Any]] = [
    {"temperature": 0.9, "top_p": 0.8, "seed": 5}, {"temperature": 0.7, "top_k": 9, "seed": -1, "logprobs": 2},
    {"temperature": 1.2, "min_p": 0.05, "seed": 7, "presence_penalty": 0.5},
]  # fmt: skip


class FullLife(RuleBasedStateMachine):
    """Adds and aborts requests, lets steps fail, forgets the cache, restarts; with all techniques of the course.

    Greedy answers must be those of transformers. A seeded answer must be the same whenever it is asked for.
    """

    models: SmallModels
    counts: Counter[str]
    root: Path
    seeded: dict[tuple[Any, ...], list[int]]
    prompts = [*prompts_of(6, longest=30)]

    @initialize(
        ranks=st.sampled_from([(1, 1), (1, 1), (1, 1), (2, 1), (1, 2), (2, 2)]),
        is_async=st.booleans(),
        budget=st.sampled_from([8, 16, 64]),
        num_kv_blocks=st.sampled_from([13, 15, 24]),
        method=st.sampled_from(["none", "ngram", "draft", "target"]),
        quantization=st.sampled_from(["", "", "int4", "int8"]),
        has_host=st.booleans(),
        has_disk=st.booleans(),
        sizes=st.sampled_from(["", "1,2,4,8,16", "3,7"]),
        kernels=st.sampled_from(["auto", "auto", "torch", "attention=torch,norm=numba"]),
        offloads_weights=st.booleans(),
    )
    def start(
        self, ranks: tuple[int, int], is_async: bool, budget: int, num_kv_blocks: int, method: str, quantization: str,
        has_host: bool, has_disk: bool, sizes: str, kernels: str, offloads_weights: bool,
    ) -> None:  # fmt: skip
        self.flags: dict[str, Any] = {
            "tensor_parallel_size": ranks[0], "pipeline_parallel_size": ranks[1], "async_scheduling": is_async,
            "max_num_batched_tokens": budget, "max_num_seqs": 4, "num_kv_blocks": num_kv_blocks, "kernels": kernels,
            "cudagraph_capture_sizes": sizes,
        }  # fmt: skip
        if quantization:
            self.flags |= {"quantization": quantization, "quantization_group_size": GROUP_SIZE}
        if has_host:
            self.flags["kv_offload_gib"] = 2e-3
        if has_host and has_disk:
            self.flags["kv_offload_dir"] = tempfile.mkdtemp(dir=self.root)
        if offloads_weights and ranks == (1, 1) and not quantization:
            self.flags["cpu_offload_gb"] = 1.0
        self.method = method
        self.asked: dict[str, tuple[tuple[int, ...], int, dict[str, Any]]] = {}
        self.aborted, self.failed = set[str](), set[str]()
        self.begin()

    def begin(self) -> None:
        models = self.models.of(self.flags)
        drafts: dict[str, Any] = {"speculative_method": self.method, "prompt_lookup_min": 1}
        if self.method in ("draft", "target"):
            drafts = {"speculative_method": "draft_model", "speculative_model": getattr(models, self.method)}
        self.engine = SmallEngine(PART, self.models, **self.flags, **drafts)
        self.measure_nothing()

    def measure_nothing(self) -> None:
        self.engine.core.offloader.cost.compute = Rate()  # so whatever can be loaded is loaded

    @rule(number=st.integers(0, 5), max_tokens=st.integers(1, 14))
    def ask(self, number: int, max_tokens: int) -> None:
        self.add(self.prompts[number], max_tokens, {})

    @rule(number=st.integers(0, 5), max_tokens=st.integers(1, 14), kind=st.integers(0, len(SAMPLED) - 1))
    def ask_seeded(self, number: int, max_tokens: int, kind: int) -> None:
        self.add(self.prompts[number], max_tokens, SAMPLED[kind])

    def add(self, prompt: list[int], max_tokens: int, fields: dict[str, Any]) -> None:
        name = str(len(self.asked))
        self.asked[name] = (tuple(prompt), max_tokens, fields)
        self.engine.add(name, prompt, max_tokens=max_tokens, **fields)
        self.measure_nothing()

    @precondition(lambda self: self.engine.answers)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.engine.answers, key=int)), "request")
        if not self.engine.answers[name].ends and name not in self.aborted | self.failed:
            self.counts["aborts"] += 1
            self.aborted.add(name)
        self.engine.core.abort_requests([name])

    @rule(count=st.integers(1, 8))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.engine.step()
            self.counts["steps"] += 1
            self.measure_nothing()
            blocks = self.engine.core.blocks
            assert blocks.num_used_blocks + blocks.num_free_blocks == blocks.num_blocks - 1, f"{self.flags}. {LOOK}"

    @precondition(lambda self: self.engine.core.scheduler.has_unfinished_requests)
    @rule()
    def fail(self) -> None:
        """A step fails: all requests in the engine end with the error, and the next ones are served."""
        core, before = self.engine.core, set(self.engine.core.unfinished)
        outputs = core.fail(ValueError(CAT))
        ended = {output.request_id for output in outputs}
        assert ended == before and all(CAT in (output.error or "") for output in outputs), f"{outputs}. {LOOK}"
        self.engine.note(outputs)
        self.failed |= ended
        self.engine.check_empty(LOOK)
        self.counts["failures"] += 1

    @rule(is_restart=st.sampled_from([False, False, True]))
    def forget(self, is_restart: bool) -> None:
        """Finish what there is, then clear the device's cache, or start again."""
        self.finish()
        assert self.engine.core.reset_prefix_cache(), LOOK
        if is_restart:
            self.check()
            self.begin()
            self.counts["restarts"] += 1

    def finish(self) -> None:
        def count(number: int) -> bool:
            self.counts["steps"] += 1
            return False

        self.engine.finish(count)

    def check(self) -> None:
        self.finish()
        core, answers = self.engine.core, self.engine.answers
        for name, answer in answers.items():
            self.check_answer(name, answer.token_ids)
        self.engine.check_empty(LOOK)
        assert not core.offloader.is_busy, LOOK
        stats = core.offloader.stats
        self.counts["loaded tokens"] += stats.num_host_tokens + stats.num_tier_tokens
        self.counts["found tokens"] += core.scheduler.num_hit_tokens
        self.counts["preemptions"] += core.scheduler.num_preemptions
        self.counts["accepted draft tokens"] += core.speculation.stats.num_accepted_tokens
        for worker in getattr(core.executor, "workers", None) or [core.executor.worker]:
            for name, counter in (("padded steps", "num_replays"), ("megakernels", "num_runs")):
                self.counts[name] += getattr(worker.runner.small_steps, counter, 0)
            worker.close()

    def check_answer(self, name: str, got: list[int]) -> None:
        prompt, max_tokens, fields = self.asked[name]
        is_whole = name not in self.aborted | self.failed
        models = self.models.of(self.flags)
        if not fields:
            expected = models.greedy(list(prompt), max_tokens)
        else:
            key = (models.target, prompt, fields["seed"])  # an answer begins like a longer one
            known = self.seeded.setdefault(key, [])
            if is_whole and len(got) > len(known):
                assert got[: len(known)] == known, f"{self.flags}, {fields}: {got} does not begin with {known}. {LOOK}"
                known[:] = got
            if len(got) > len(known):
                return  # a part of an answer that has never been seen whole
            expected = known[: len(got)] if not is_whole else known[:max_tokens]
        if not is_whole:
            expected = expected[: len(got)]
        assert got == expected, f"{self.flags}, request {name}, {fields}: expected {expected}, got {got}. {LOOK}"

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.check()


def test_ten_thousand_steps(tmp_path: Path) -> None:
    """All techniques × ranks × quantization × kernels × padding × aborts × failures × restarts, in pools of 12 to 23
    blocks."""
    FullLife.models, FullLife.counts, FullLife.root = SmallModels(tmp_path / "small"), Counter[str](), tmp_path
    FullLife.seeded = {}
    run_lives(FullLife, max_examples=130, stateful_step_count=50, seed=SEED)
    wanted = {
        "steps": 10_000, "aborts": 150, "failures": 200, "restarts": 200, "preemptions": 60, "padded steps": 1_000,
        "loaded tokens": 1_000, "found tokens": 4_000, "accepted draft tokens": 200,
    }  # fmt: skip
    got = {name: FullLife.counts[name] for name in wanted}
    assert all(got[name] >= count for name, count in wanted.items()), f"too few to prove anything: {got}"
