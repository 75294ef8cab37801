"""worker/draft_model.py: a cache that keeps step with the target's, whatever happens to the blocks."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from common.sampling_params import SamplingParams
from part08_speculative_decoding.config import EngineConfig
from part08_speculative_decoding.core.block_manager import BlockManager
from part08_speculative_decoding.core.engine import LLMEngine
from part08_speculative_decoding.core.request import Request
from part08_speculative_decoding.worker.draft_model import DraftModelProposer, draws_guesses
from tests.part08.scripted import take_step, watch

LESSON = 'README "A cache that keeps step"'
LOOK = f"Look at worker/draft_model.py::DraftModelProposer.propose and _forward; {LESSON}."
LOOK_RELEASE = (
    f"Look at worker/draft_model.py::DraftModelProposer.release and core/engine.py::LLMEngine._launch; {LESSON}."
)
LOOK_CHOOSE = 'Look at worker/draft_model.py::DraftModelProposer._choose; README "Drawn, not chosen".'
LOOK_DRAWS = 'Look at worker/draft_model.py::draws_guesses; README "Drawn, not chosen".'
VOCAB_SIZE = 40
TIE = 1e-3
SmallModels = Callable[..., tuple[str, Any]]


class Compared:
    """In the proposer's place: lets it guess, and compares the guesses with a model that computes all from scratch."""

    def __init__(self, proposer: DraftModelProposer, reference: Any) -> None:
        self.proposer, self.reference = proposer, reference
        self.num_compared = 0
        self.release = proposer.release

    @torch.inference_mode()
    def propose(self, requests: list[Request], counts: list[int], blocks: BlockManager) -> None:
        self.proposer.propose(requests, counts, blocks)
        for request, count in zip(requests, counts, strict=True):
            guesses, text = request.draft_token_ids, request.token_ids
            assert len(guesses) == count, f"{count} guesses were asked for, got {guesses}. {LOOK}"
            if draws_guesses(request):
                continue
            logits = self.reference(torch.tensor([[*text, *guesses[:-1]]])).logits[0, len(text) - 1 :].float()
            short = logits.max(dim=-1).values - logits[range(count), guesses]
            assert bool((short < TIE).all()), (
                f"request {request.request_id}, {len(text)} tokens: from scratch the draft model guesses "
                f"{logits.argmax(dim=-1).tolist()} (each after the guesses before it), with its cache {guesses}. {LOOK}"
            )
            self.num_compared += 1


def engine_of(small_models: SmallModels, **flags: Any) -> tuple[LLMEngine, Compared]:
    directory, reference = small_models("qwen3", 8, VOCAB_SIZE)
    target, _ = small_models("llama", 9, VOCAB_SIZE)
    engine = LLMEngine(
        EngineConfig(
            **{
                "model": target, "speculative_model": directory, "speculative_method": "draft_model", "device": "cpu",
                "num_speculative_tokens": 3, "num_kv_blocks": 200, "block_size": 4, **flags,
            }
        )
    )  # fmt: skip
    watch(engine.scheduler)
    assert isinstance(engine.proposer, DraftModelProposer)
    compared = Compared(engine.proposer, reference)
    engine.proposer = compared  # type: ignore[assignment]
    return engine, compared


def test_both_caches_come_out_of_one_budget(small_models: SmallModels) -> None:
    """A pool sized by the target's blocks alone would take more memory than it was given."""
    budget = 100_000
    engine, compared = engine_of(small_models, num_kv_blocks=None, kv_cache_memory=budget)
    caches = (engine.runner.kv_cache, compared.proposer.kv_cache)
    sizes = [cache.data.numel() * cache.data.element_size() for cache in caches]
    assert caches[0].num_blocks == caches[1].num_blocks, f"blocks: {[cache.num_blocks for cache in caches]}. {LOOK}"
    per_block = sum(sizes) // caches[0].num_blocks
    assert budget - per_block < sum(sizes) <= budget, (
        f"a budget of {budget:,} bytes: the target's cache and the draft's take {sizes}, {sum(sizes):,} together. "
        f"Look at worker/model_runner.py::ModelRunner._num_blocks; {LESSON}."
    )


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])
@pytest.mark.parametrize("seed", range(2))
def test_guesses_are_those_of_a_model_without_a_cache(small_models: SmallModels, seed: int, is_async: bool) -> None:
    """Random lives: rejections, prefix hits, blocks that are shared, preemptions, aborts, ids that come again."""
    rng = random.Random(seed)
    engine, compared = engine_of(
        small_models, num_kv_blocks=rng.choice([26, 34]), max_num_seqs=5, max_num_batched_tokens=rng.choice([9, 40]),
        async_scheduling=is_async, speculative_max_num_seqs=rng.choice([3, 8]),
    )  # fmt: skip
    beginning = [rng.randrange(VOCAB_SIZE) for _ in range(30)]
    names, texts = set[str](), [beginning]
    for number in range(90):
        if number < 70 and rng.random() < 0.35:
            name = str(rng.randrange(40))
            if name not in names:
                names.add(name)
                prompt = rng.choice(texts)[: rng.randint(1, 30)] + [rng.randrange(VOCAB_SIZE)] * rng.randint(0, 2)
                params = SamplingParams(temperature=0, max_tokens=rng.randint(1, 20), ignore_eos=True)
                engine.add_request(name, prompt, params)
        if names and rng.random() < 0.05:
            name = rng.choice(sorted(names))
            engine.abort_requests([name])
            names.discard(name)
        texts += [request.token_ids for request in engine.scheduler.running[:1]]
        for output in take_step(engine):
            if output.finish_reason:
                names.discard(output.request_id)
    assert compared.num_compared > 25, f"only {compared.num_compared} compared"
    assert engine.scheduler.num_hit_tokens > 0, "nobody found anything in the cache"


def test_it_computes_what_it_has_not_computed(small_models: SmallModels) -> None:
    """A prompt of 10: 10 tokens and 2 guesses; then the new tokens, and again 2 guesses."""
    engine, compared = engine_of(small_models, async_scheduling=False)
    proposer = compared.proposer
    engine.add_request("0", list(range(10)), SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
    counts, known = list[int](), 0
    while engine.has_unfinished_requests:
        before = proposer.num_tokens_computed
        take_step(engine)
        if engine.scheduler.running and (num_guesses := len(engine.scheduler.running[0].draft_token_ids)):
            num_tokens = engine.scheduler.running[0].num_tokens
            counts.append(proposer.num_tokens_computed - before - (num_tokens - known) - (num_guesses - 1))
            known = num_tokens
    assert counts and not any(counts), (
        f"each pass computes what is new and the guesses but the last: expected no more, got {counts} too many. {LOOK}"
    )


def test_who_is_released_is_computed_again(small_models: SmallModels) -> None:
    engine, compared = engine_of(small_models, async_scheduling=False)
    engine.add_request("0", list(range(10)), SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
    take_step(engine)
    assert compared.proposer._num_computed == {"0": 11}, f"got {compared.proposer._num_computed}. {LOOK}"
    engine.scheduler.preempt(engine.scheduler.running[0])
    take_step(engine)
    before = compared.proposer.num_tokens_computed
    assert before > 2 * 10, f"its blocks were lost: expected all tokens computed twice, {before} in all. {LOOK_RELEASE}"
    engine.abort_requests(["0"])
    engine.add_request("1", [5, 6], SamplingParams(temperature=0, max_tokens=1))
    take_step(engine)
    assert compared.proposer._num_computed == {}, f"0 is gone: got {compared.proposer._num_computed}. {LOOK_RELEASE}"
    compared.proposer.release(["nobody"])


def test_different_numbers_of_guesses_in_one_batch(small_models: SmallModels) -> None:
    engine, compared = engine_of(small_models, async_scheduling=False)
    acceptances = [0.4, 1.0, 0.75, 0.4]
    for number in range(4):
        engine.add_request(
            str(number), [number] * (3 + number), SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
        )
    for request, acceptance in zip(engine.scheduler.waiting, acceptances, strict=True):
        request.acceptance = acceptance
    take_step(engine)
    got = [len(request.draft_token_ids) for request in engine.scheduler.running]
    assert got == [1, 3, 3, 1], f"acceptances {acceptances}, up to 3: expected [1, 3, 3, 1] guesses, got {got}. {LOOK}"
    assert compared.num_compared == 4


# Which are drawn


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({"temperature": 0}, False), ({}, True), ({"seed": 3}, False), ({"temperature": 0.2}, True)],
)
def test_guesses_are_drawn_where_the_answer_is_and_nobody_gave_a_seed(fields: dict[str, Any], expected: bool) -> None:
    generator = torch.Generator().manual_seed(3) if "seed" in fields else None
    request = Request("0", [1], SamplingParams(**fields), 9, generator)
    got = draws_guesses(request)
    assert got is expected, f"{fields}: expected guesses drawn at random {expected}, got {got}. {LOOK_DRAWS}"


def test_q_is_what_the_guesses_were_drawn_from(small_models: SmallModels) -> None:
    """Normalised, after the request's own temperature and top-k; greedy and seeded neighbours have none."""
    engine, compared = engine_of(small_models, async_scheduling=False, num_speculative_tokens=2)
    all_fields: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.7, "top_k": 3},
        {"seed": 5},
        {"temperature": 2.0},
        {"temperature": 1.0, "top_p": 0.5},
    ]
    for number, fields in enumerate(all_fields):
        engine.add_request(str(number), [number, 7, 8], SamplingParams(max_tokens=9, ignore_eos=True, **fields))
    take_step(engine)
    for request, fields in zip(engine.scheduler.running, all_fields, strict=True):
        q, guesses = request.draft_probs, request.draft_token_ids
        if not draws_guesses(request):
            assert q is None, f"{fields}: its guesses are not drawn, expected no q. {LOOK_CHOOSE}"
            continue
        assert q is not None and q.shape == (2, VOCAB_SIZE), (
            f"{fields}: expected q of shape (2, {VOCAB_SIZE}). {LOOK_CHOOSE}"
        )
        assert torch.allclose(q.sum(dim=-1), torch.ones(2), atol=1e-5), (
            f"{fields}: q sums to {q.sum(dim=-1)}. {LOOK_CHOOSE}"
        )
        assert bool((q[range(2), guesses] > 0).all()), f"{fields}: q of guesses {guesses} is 0. {LOOK_CHOOSE}"
        with torch.inference_mode():
            logits = compared.reference(torch.tensor([[*request.token_ids, *guesses[:-1]]])).logits[0, -2:].float()
        logits = logits / fields["temperature"]
        if "top_k" in fields:
            logits = logits.masked_fill(logits < logits.topk(3).values[:, -1:], -torch.inf)
        expected = logits.softmax(dim=-1)
        if "top_p" in fields:
            ordered = expected.sort(dim=-1, descending=True)
            is_left = ordered.values.cumsum(dim=-1) - ordered.values < fields["top_p"]
            expected = torch.zeros_like(expected).scatter(1, ordered.indices, ordered.values * is_left)
            expected /= expected.sum(dim=-1, keepdim=True)
        assert torch.allclose(q, expected, atol=1e-4), (
            f"{fields}: expected the draft model's distribution after temperature, top-k and top-p, as the target's. "
            f"{LOOK_CHOOSE}"
        )
