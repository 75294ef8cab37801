"""Real copies of a real model's KV blocks: answers are those of transformers, whatever comes from where."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from common.sampling_params import SamplingParams
from part12_cpu_offloading.config import EngineConfig
from part12_cpu_offloading.core.cost_model import Rate
from part12_cpu_offloading.lab.redis_server import redis_server
from part12_cpu_offloading.llm import LLM
from tests.contract.engines import SmallEngine, SmallModels, prompts_of
from tests.lives import run_lives
from tests.part12.redis_for_tests import needs_redis

PART = "part12_cpu_offloading"
SEED = 12 * 7919**5
LOOK = 'Look at worker/block_copier.py::BlockCopier and core/offload.py::Offloader; README "A copy holds a lease".'


class CopyLife(RuleBasedStateMachine):
    """Adds and aborts requests, resets the device's cache, restarts the engine; loads whatever can be loaded."""

    models: SmallModels
    counts: Counter[str]
    root: Path
    prompts = [*prompts_of(5, longest=28)]

    @initialize(
        tp_size=st.sampled_from([1, 1, 2]), num_stages=st.sampled_from([1, 1, 2]), is_async=st.booleans(),
        budget=st.sampled_from([8, 16, 64]), num_kv_blocks=st.sampled_from([13, 15, 60]),
        method=st.sampled_from(["none", "ngram", "draft", "target"]), num_host_blocks=st.sampled_from([3, 12, 200]),
        has_disk=st.sampled_from([True, True, False]),
    )  # fmt: skip
    def start(
        self, tp_size: int, num_stages: int, is_async: bool, budget: int, num_kv_blocks: int, method: str,
        num_host_blocks: int, has_disk: bool,
    ) -> None:  # fmt: skip
        flags: dict[str, Any] = {"speculative_method": method, "prompt_lookup_min": 1}
        if method in ("draft", "target"):
            flags = {"speculative_method": "draft_model", "speculative_model": getattr(self.models, method)}
        if has_disk:
            flags["kv_offload_dir"] = tempfile.mkdtemp(dir=self.root)
        self.flags = {
            "tensor_parallel_size": tp_size, "pipeline_parallel_size": num_stages, "async_scheduling": is_async,
            "max_num_batched_tokens": budget, "max_num_seqs": 4, "num_kv_blocks": num_kv_blocks,
            "kv_offload_gib": 2e-3, **flags,
        }  # fmt: skip
        self.num_host_blocks = num_host_blocks
        self.asked: dict[str, tuple[list[int], int]] = {}
        self.aborted = set[str]()
        self.begin()

    def begin(self) -> None:
        self.engine = SmallEngine(PART, self.models, **self.flags)
        host = self.engine.core.offloader.host
        while host.num_slots > self.num_host_blocks:  # it is full sooner
            host.num_slots -= 1
            host.free_slots.pop()

    @rule(number=st.integers(0, 4), max_tokens=st.integers(1, 14))
    def ask_again(self, number: int, max_tokens: int) -> None:
        self.ask(number, max_tokens)

    @rule(number=st.integers(0, 4), max_tokens=st.integers(1, 14))
    def ask(self, number: int, max_tokens: int) -> None:
        name, prompt = str(len(self.asked)), self.prompts[number]
        self.asked[name] = (prompt, max_tokens)
        self.engine.add(name, prompt, max_tokens=max_tokens)
        self.engine.core.offloader.cost.compute = Rate()  # nothing is measured: load whatever there is

    @precondition(lambda self: self.engine.answers)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.engine.answers, key=int)), "request")
        if not self.engine.answers[name].ends and name not in self.aborted:
            scheduler = self.engine.core.scheduler
            self.counts["aborts"] += 1
            self.counts["aborts while loading"] += name in {each.request_id for each in scheduler.loading}
            self.aborted.add(name)
        self.engine.core.abort_requests([name])

    @rule(count=st.integers(1, 6))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.engine.step()
            self.engine.core.offloader.cost.compute = Rate()

    @rule(is_restart=st.sampled_from([False, False, True]))
    def forget(self, is_restart: bool) -> None:
        """Finish what there is, then clear the device's cache, or start again."""
        self.engine.finish()
        assert self.engine.core.reset_prefix_cache(), LOOK
        if is_restart:
            self.check()
            self.begin()
            self.counts["restarts"] += 1

    def check(self) -> None:
        core, answers = self.engine.core, self.engine.finish()
        for name in answers:
            prompt, max_tokens = self.asked[name]
            expected, got = self.models.greedy(prompt, max_tokens), answers[name].token_ids
            if name in self.aborted:
                expected = expected[: len(got)]
            assert got == expected, f"{self.flags}, request {name}: expected {expected}, got {got}. {LOOK}"
        self.engine.check_empty(LOOK)
        assert not core.offloader.is_busy, LOOK
        stats = core.offloader.stats
        self.counts["tokens from host"] += stats.num_host_tokens
        self.counts["tokens from disk"] += stats.num_tier_tokens
        self.counts["preemptions"] += core.scheduler.num_preemptions
        self.counts["accepted draft tokens"] += core.speculation.stats.num_accepted_tokens
        for worker in getattr(core.executor, "workers", None) or [core.executor.worker]:
            worker.close()

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.check()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> SmallModels:
    return SmallModels(tmp_path_factory.mktemp("small"))


def test_random_lives(models: SmallModels, tmp_path: Path) -> None:
    """Offloading × preemption × chunks × drafts × stages × ranks × aborts × restarts."""
    CopyLife.models, CopyLife.counts, CopyLife.root = models, Counter[str](), tmp_path
    run_lives(CopyLife, max_examples=40, stateful_step_count=30, seed=SEED)
    wanted = {
        "aborts": 8, "tokens from host": 150, "tokens from disk": 60, "preemptions": 8, "restarts": 10,
        "accepted draft tokens": 50,
    }  # fmt: skip
    got = {name: CopyLife.counts[name] for name in wanted}
    assert all(got[name] >= count for name, count in wanted.items()), f"too few to prove anything: {got}"


PROMPT = [(37 * number) % 3_900 + 100 for number in range(100)]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def tiny(**flags: Any) -> LLM:
    settings: dict[str, Any] = {"model": "tiny", "num_threads": 1, "num_kv_blocks": 40, "kv_offload_gib": 0.01, **flags}
    return LLM(EngineConfig(**settings))


def test_a_prompt_comes_back_after_the_device_forgot_it() -> None:
    """100 tokens in blocks of 16: 96 are loaded, 4 are computed, and the answer is the same."""
    llm = tiny()
    [first] = llm.generate([PROMPT], GREEDY)
    assert llm.engine.reset_prefix_cache()
    llm.engine.offloader.cost.compute = Rate()
    runner = llm.engine.executor.worker.runner  # type: ignore[attr-defined]
    before = runner.num_tokens_computed
    [again] = llm.generate([PROMPT], GREEDY)
    assert again.outputs[0].token_ids == first.outputs[0].token_ids, LOOK
    stats = llm.engine.offloader.stats
    assert stats.num_host_tokens == 96 == again.outputs[0].num_cached_tokens, f"{stats}. {LOOK}"
    assert runner.num_tokens_computed - before == 4 + 11, f"4 tokens of the prompt, 11 of the answer. {LOOK}"


def wait_for_files(directory: Path, count: int) -> None:
    deadline_s = time.monotonic() + 30
    while len(list(directory.glob("*.kv"))) < count:
        assert time.monotonic() < deadline_s, f"expected {count} files. {LOOK}"
        time.sleep(0.01)


@pytest.mark.parametrize("flags", [{}, {"speculative_method": "draft_model"}], ids=["alone", "with a draft model"])
def test_a_prompt_comes_back_after_a_restart(tmp_path: Path, flags: dict[str, Any]) -> None:
    first = tiny(kv_offload_dir=str(tmp_path), **flags)
    [expected] = first.generate([PROMPT], GREEDY)
    first.engine.shutdown()
    again = tiny(kv_offload_dir=str(tmp_path), **flags)
    [got] = again.generate([PROMPT], GREEDY)
    assert got.outputs[0].token_ids == expected.outputs[0].token_ids, LOOK
    assert again.engine.offloader.stats.num_tier_tokens == 96, f"{again.engine.offloader.stats}. {LOOK}"
    other = tiny(kv_offload_dir=str(tmp_path), block_size=32, **flags)
    other.generate([PROMPT], GREEDY)
    assert not other.engine.offloader.stats.num_tier_tokens, f"blocks of another size are no use. {LOOK}"


def test_a_flipped_bit_on_disk_is_computed_again(tmp_path: Path) -> None:
    first = tiny(kv_offload_dir=str(tmp_path))
    [expected] = first.generate([PROMPT], GREEDY)
    first.engine.shutdown()
    key = first.engine.offloader.host.blocks
    third = list(key)[2].hex()
    [path] = tmp_path.glob(f"*-{third}.kv")
    data = bytearray(path.read_bytes())
    data[5_000] ^= 4
    path.write_bytes(data)
    again = tiny(kv_offload_dir=str(tmp_path))
    [got] = again.generate([PROMPT], GREEDY)
    assert got.outputs[0].token_ids == expected.outputs[0].token_ids, f"a poisoned block was used. {LOOK}"
    loaded = again.engine.offloader.stats.num_tier_tokens
    assert loaded % 16 == 0 and loaded < 96, f"expected the blocks before the poisoned one, got {loaded} tokens. {LOOK}"
    again.engine.shutdown()
    assert path.read_bytes() != bytes(data), f"the poisoned file was written anew. {LOOK}"


@needs_redis
def test_two_engines_share_what_one_has_computed() -> None:
    with redis_server() as url:
        first, second = tiny(kv_offload_url=url), tiny(kv_offload_url=url)
        [expected] = first.generate([PROMPT], GREEDY)
        first.engine.shutdown()
        [got] = second.generate([PROMPT], GREEDY)
        assert got.outputs[0].token_ids == expected.outputs[0].token_ids, LOOK
        assert second.engine.offloader.stats.num_tier_tokens == 96, f"{second.engine.offloader.stats}. {LOOK}"


def test_salts_keep_tenants_apart(tmp_path: Path) -> None:
    first = tiny(kv_offload_dir=str(tmp_path))
    salted = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, cache_salt="ada")
    first.generate([PROMPT], salted)
    first.engine.shutdown()
    again = tiny(kv_offload_dir=str(tmp_path))
    again.generate([PROMPT], GREEDY)
    assert not again.engine.offloader.stats.num_tier_tokens, f"Ada's blocks were found without her salt. {LOOK}"
    again.generate([PROMPT], salted)
    assert again.engine.offloader.stats.num_tier_tokens == 96, LOOK
