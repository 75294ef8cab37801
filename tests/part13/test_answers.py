"""Real transfers between two engines: the answers are those of transformers, whatever the two have in common."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.contract.engines import SmallEngine, SmallModels, prompts_of
from tests.lives import run_lives
from tests.part13.pairs import LOOK, PART, Pair

SEED = 13 * 7919**5


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> SmallModels:
    return SmallModels(tmp_path_factory.mktemp("small"))


@contextlib.contextmanager
def pair(models: SmallModels, **flags: Any) -> Iterator[Pair]:
    found = Pair(models, **flags)
    try:
        yield found
    finally:
        found.close()


class PairLife(RuleBasedStateMachine):
    """Two engines with different blocks, ranks, stages and drafts; requests come, are aborted, lose an engine."""

    models: SmallModels
    counts: Counter[str]
    prompts = [*prompts_of(6, longest=40)]

    @initialize(
        connector=st.sampled_from(["tcp", "shm"]),
        prefill_ranks=st.sampled_from([(1, 1), (1, 1), (2, 1), (1, 2), (2, 2)]),
        decode_ranks=st.sampled_from([(1, 1), (1, 1), (2, 1), (1, 2)]),
        blocks=st.sampled_from([(4, 4), (4, 8), (16, 2)]),
        budget=st.sampled_from([8, 16, 64]), pool=st.sampled_from([60, 60, 200]), is_async=st.booleans(),
        method=st.sampled_from(["none", "ngram", "draft", "target"]), has_host=st.booleans(),
    )  # fmt: skip
    def start(
        self, connector: str, prefill_ranks: tuple[int, int], decode_ranks: tuple[int, int], blocks: tuple[int, int],
        budget: int, pool: int, is_async: bool, method: str, has_host: bool,
    ) -> None:  # fmt: skip
        decode_flags: dict[str, Any] = {"speculative_method": method, "prompt_lookup_min": 1}
        if method in ("draft", "target"):
            decode_flags = {"speculative_method": "draft_model", "speculative_model": getattr(self.models, method)}
        if has_host:
            decode_flags["kv_offload_gib"] = 1e-3
        names = ("tensor_parallel_size", "pipeline_parallel_size")
        prefill_flags, decode_flags = (
            {**dict(zip(names, ranks, strict=True)), "block_size": size, "num_kv_blocks": 1 + pool // size, **flags}
            for ranks, size, flags in ((prefill_ranks, blocks[0], {}), (decode_ranks, blocks[1], decode_flags))
        )
        self.pair = Pair(
            self.models, prefill_flags, decode_flags, kv_connector=connector, max_num_batched_tokens=budget,
            max_num_seqs=4, async_scheduling=is_async, kv_lease=1.0,
        )  # fmt: skip
        self.asked: dict[str, tuple[list[int], int]] = {}
        self.aborted = set[str]()

    @rule(number=st.integers(0, 5), max_tokens=st.integers(1, 14))
    def ask(self, number: int, max_tokens: int) -> None:
        self.asked[self.pair.ask(self.prompts[number], max_tokens=max_tokens)] = (self.prompts[number], max_tokens)

    @rule(number=st.integers(0, 5), max_tokens=st.integers(1, 14))
    def ask_again(self, number: int, max_tokens: int) -> None:
        self.ask(number, max_tokens)

    @precondition(lambda self: self.asked)
    @rule(data=st.data(), where=st.sampled_from(["prefill", "decode", "both"]))
    def abort(self, data: st.DataObject, where: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.asked, key=int)), "request")
        if where != "decode":
            known = self.pair.prefill.answers.get(name)  # not, if another engine had got it
            self.counts["aborts at the prefill engine"] += known is not None and not known.ends
            self.pair.prefill.core.abort_requests([name])
        if where != "prefill":
            if not self.pair.decode.answers[name].ends:
                loading = {each.request_id for each in self.pair.decode.core.scheduler.loading}
                self.counts["aborts while fetching"] += name in loading
                self.aborted.add(name)
            self.pair.decode.core.abort_requests([name])

    @rule(num_prefill=st.integers(0, 4), num_decode=st.integers(0, 4))
    def steps(self, num_prefill: int, num_decode: int) -> None:
        for engine, count in ((self.pair.prefill, num_prefill), (self.pair.decode, num_decode)):
            for _ in range(count):
                if engine.core.has_unfinished_requests:
                    engine.step()

    @rule(dice=st.integers(0, 5))
    def lose_the_prefill_engine(self, dice: int) -> None:
        """It is gone, with all that it has computed, and another one takes its place."""
        if dice:
            return
        self.pair.end(self.pair.prefill)
        self.pair.prefill = SmallEngine(PART, self.models, **{**self.pair.flags, **self.pair.prefill_flags})
        self.counts["lost engines"] += 1

    def teardown(self) -> None:
        if not hasattr(self, "pair"):
            return
        self.pair.run()
        for name, (prompt, max_tokens) in self.asked.items():
            expected, got = self.models.greedy(prompt, max_tokens), self.pair.decode.answers[name].token_ids
            if name in self.aborted:
                expected = expected[: len(got)]
            assert got == expected, (
                f"{self.pair.flags}, {self.pair.prefill_flags}, {self.pair.decode_flags}, request {name}: expected "
                f"{expected}, got {got}. {LOOK}"
            )
        self.pair.check_empty()
        self.counts["fetched tokens"] += self.pair.stats.num_fetched_tokens
        self.counts["failed transfers"] += self.pair.stats.num_failed
        self.counts["accepted draft tokens"] += self.pair.decode.core.speculation.stats.num_accepted_tokens
        self.pair.close()


def test_random_lives(models: SmallModels) -> None:
    """Transfers × ranks × stages × block sizes × chunks × drafts × offloading × aborts × lost engines."""
    PairLife.models, PairLife.counts = models, Counter[str]()
    run_lives(PairLife, max_examples=30, stateful_step_count=24, seed=SEED)
    wanted = {
        "fetched tokens": 800, "aborts while fetching": 3, "aborts at the prefill engine": 5, "lost engines": 8,
        "failed transfers": 8, "accepted draft tokens": 30,
    }  # fmt: skip
    got = {name: PairLife.counts[name] for name in wanted}
    assert all(got[name] >= count for name, count in wanted.items()), f"too few to prove anything: {got}"


PROMPT = [(37 * number) % 320 for number in range(100)]


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 100])
def test_prompts_of_any_length(models: SmallModels, length: int) -> None:
    with pair(models, block_size=16) as two:
        got = two.answer(PROMPT[:length])
        assert got == models.greedy(PROMPT[:length], 8), f"a prompt of {length} tokens. {LOOK}"
        expected = length if length > 16 else 0  # less than a block is computed sooner
        assert two.stats.num_fetched_tokens == expected, f"{two.stats}. {LOOK}"
        two.check_empty()


def test_only_the_last_token_is_computed(models: SmallModels) -> None:
    with pair(models, block_size=16) as two:
        name = two.ask(PROMPT)
        two.run()
        computed = two.decode.worker.runner.num_tokens_computed
        assert computed == 1 + 7, (
            f"the last token of the prompt, then 7 of the answer; computed were {computed}. {LOOK}"
        )
        assert two.decode.answers[name].num_cached_tokens == 99, f"{two.decode.answers[name]}. {LOOK}"


def test_what_the_decode_engine_has_is_not_fetched(models: SmallModels) -> None:
    """48 of 100 tokens are in its prefix cache; the next time, all blocks are."""
    with pair(models, block_size=16) as two:
        two.answer(PROMPT[:50])
        assert two.stats.num_fetched_tokens == 50
        assert two.answer(PROMPT) == models.greedy(PROMPT, 8), LOOK
        assert two.stats.num_fetched_tokens == 50 + 52, f"{two.stats}. {LOOK}"
        assert two.answer(PROMPT) == models.greedy(PROMPT, 8), LOOK
        assert two.stats.num_fetched_tokens == 102, f"96 tokens were cached, 4 are no block. {two.stats}. {LOOK}"
        two.check_empty()


def test_what_the_prefill_engine_has_is_not_computed(models: SmallModels) -> None:
    """Its prefix cache holds most of the prompt; it is sent all the same."""
    with pair(models, block_size=16, decode_flags={"enable_prefix_caching": False}) as two:
        two.answer(PROMPT[:64])
        assert two.answer(PROMPT) == models.greedy(PROMPT, 8), LOOK
        assert two.stats.num_fetched_tokens == 164, f"{two.stats}. {LOOK}"
        computed = two.prefill.worker.runner.num_tokens_computed
        assert computed == 64 + 36, f"expected 36 new tokens of the second prompt, {computed} in all. {LOOK}"


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float32")])
def test_other_dtypes(models: SmallModels, dtypes: tuple[str, str]) -> None:
    """What is fetched is rounded, so answers may differ after a while; all of it must arrive."""
    with pair(models, prefill_flags={"dtype": dtypes[0]}, decode_flags={"dtype": dtypes[1]}) as two:
        got = two.answer(PROMPT, max_tokens=4)
        assert len(got) == 4 and two.stats.num_fetched_tokens == 100, f"{two.stats}. {LOOK}"
        pools = [engine.worker.runner.pools[0].float() for engine in (two.prefill, two.decode)]
        used = [pool.flatten(1, 2).abs().amax(dim=(0, 2, 3, 4)) > 0 for pool in pools]
        assert all(each.sum() >= 100 for each in used), f"100 tokens are in both pools. {LOOK}"


def test_several_answers_and_logprobs_and_seeds(models: SmallModels) -> None:
    """n = 3: three requests of one transfer. They get what an engine that computes the prompt itself gives them."""
    fields: dict[str, Any] = {"temperature": 1.0, "logprobs": 3, "max_tokens": 6}
    with pair(models, block_size=16) as two:
        two.offer(PROMPT, "0", "three")
        for seed in range(3):
            two.fetch(PROMPT, str(seed), "three", seed=seed, **fields)
        two.run()
        two.check_empty()
        alone = SmallEngine(PART, models, block_size=16)
        for seed in range(3):
            expected = alone.generate(PROMPT, seed=seed, **fields)
            got = two.decode.answers[str(seed)].token_ids
            assert got == expected, f"seed {seed}: expected {expected}, got {got}. {LOOK}"
        assert two.stats.num_fetched_tokens <= 100 + 2 * 4, f"the other two find its blocks. {two.stats}. {LOOK}"


def test_prompt_logprobs_are_computed_here(models: SmallModels) -> None:
    """They need the logits of all tokens, which don't travel. The other engine's blocks come home all the same."""
    with pair(models, block_size=16) as two:
        two.offer(PROMPT, "0", "logprobs")
        two.fetch(PROMPT, "0", "logprobs", prompt_logprobs=1)
        two.run()
        assert len(two.decode.answers["0"].prompt_logprobs[0]) == 100 and not two.stats.num_fetched_tokens, LOOK
        two.check_empty()


def test_a_draft_model_that_only_the_decode_engine_has(models: SmallModels) -> None:
    """It computes the prompt's KV itself: else its drafts would be no good."""
    decode = {"speculative_method": "draft_model", "speculative_model": models.target}
    with pair(models, block_size=16, decode_flags=decode) as two:
        assert two.answer(PROMPT, max_tokens=16) == models.greedy(PROMPT, 16), LOOK
        stats = two.decode.core.speculation.stats
        assert stats.num_accepted_tokens == stats.num_draft_tokens > 8, (
            f"the draft model is the target, so every draft token is right: {stats}. Look at "
            "core/scheduler.py::Scheduler._start and worker/draft_model.py::DraftModelProposer.add."
        )


def test_another_model_or_another_prompt(models: SmallModels, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing is fetched from an engine that has something else, and the answer is right."""
    others = SmallModels(tmp_path_factory.mktemp("other"), num_layers=3)
    with pair(models, prefill_flags={"model": others.target}) as two:
        assert two.answer(PROMPT) == models.greedy(PROMPT, 8), f"KV of another model was used. {LOOK}"
        assert two.stats.num_fetched_tokens == 0 and two.stats.num_failed == 1, f"{two.stats}. {LOOK}"
    with pair(models, kv_transfer_timeout=0.2, kv_lease=0.6) as two:
        two.offer([*PROMPT[:50], 1, *PROMPT[51:]], "0", "same id")
        two.fetch(PROMPT, "0", "same id")
        two.run()
        assert two.decode.answers["0"].token_ids == models.greedy(PROMPT, 8), f"KV of other tokens was used. {LOOK}"
        assert two.stats.num_fetched_tokens == 0, f"{two.stats}. {LOOK}"
        two.check_empty()


def test_a_failed_step_is_not_used(models: SmallModels, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prefill engine fails after some layers were sent. The other one computes the prompt, and both go on."""
    with pair(models, block_size=16, prefill_flags={"max_num_batched_tokens": 64}) as two:
        run, count = two.prefill.worker.runner.run, 0

        def fail_later(*args: Any) -> Any:
            nonlocal count
            count += 1
            output = run(*args)
            if count == 1:
                raise ValueError("the device is on strike")
            return output

        monkeypatch.setattr(two.prefill.worker.runner, "run", fail_later)
        name = two.ask(PROMPT)
        core = two.prefill.core
        for _ in range(100):
            try:
                two.step()
            except ValueError as error:
                two.prefill.note(core.fail(error))
                break
        two.run()
        assert two.decode.answers[name].token_ids == models.greedy(PROMPT, 8), f"garbage was used. {LOOK}"
        assert two.stats.num_fetched_tokens == 0 and two.stats.num_failed == 1, f"{two.stats}. {LOOK}"
        two.check_empty()
        assert two.answer([5, *PROMPT]) == models.greedy([5, *PROMPT], 8), LOOK
        assert two.stats.num_fetched_tokens == 101, f"the next prompt: {two.stats}. {LOOK}"


def test_a_request_may_fail_instead(models: SmallModels) -> None:
    """kv_load_failure_policy: some would rather have an error than a slow answer."""
    with pair(
        models, decode_flags={"kv_load_failure_policy": "fail", "kv_transfer_timeout": 0.2, "kv_lease": 0.3}
    ) as two:
        two.fetch(PROMPT, "0", "never offered")
        two.run()
        [error] = two.decode.answers["0"].ends
        assert error.startswith("its KV has not arrived: "), f"got {error!r}. {LOOK}"
        two.check_empty()
