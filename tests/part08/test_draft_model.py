"""worker/draft_model.py: a cache that follows the target's, whatever happens to the requests and to their blocks."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from common.checkpoint import load_model, resolve_checkpoint
from common.errors import FieldError
from common.sampling_params import SamplingParams
from part08_speculative_decoding.config import EngineConfig
from part08_speculative_decoding.core.engine import LLMEngine
from part08_speculative_decoding.llm import LLM
from part08_speculative_decoding.messages import ScheduledRequest
from part08_speculative_decoding.worker import sampler as sampler_module
from part08_speculative_decoding.worker.draft_model import DraftModelProposer, Span, samples_drafts
from part08_speculative_decoding.worker.rejection_sampler import SpecDecodeMetadata
from part08_speculative_decoding.worker.token_buffer import TokenBuffer
from tests.part08.scripted import take_step, watch

LESSON = 'README "The draft model\'s KV cache"'
LOOK = f"Look at worker/draft_model.py::DraftModelProposer.propose and _forward; {LESSON}."
LOOK_CATCH_UP = f"Look at worker/draft_model.py::DraftModelProposer._catch_up and add; {LESSON}."
LOOK_CHOOSE = 'Look at worker/draft_model.py::DraftModelProposer._choose; README "Rejection sampling".'
LOOK_SAMPLES = 'Look at worker/draft_model.py::samples_drafts; README "Rejection sampling".'
VOCAB_SIZE, TARGET = 40, ("llama", 9)
TIE = 1e-3
SmallModels = Callable[..., tuple[str, Any]]
MakeLLM = Callable[..., LLM]


def drafter_of(engine: LLMEngine) -> DraftModelProposer:
    drafter = engine.executor.worker.drafter
    assert drafter is not None
    return drafter


class Compared:
    """Around a drafter: compares each step's proposals with those of a model that computes everything from scratch.

    Whatever was not written is NaN. counts: of each step (tokens of the step, sampled requests, draft tokens proposed,
    tokens of the first pass, tokens of all passes).
    """

    def __init__(self, drafter: DraftModelProposer, reference: Any) -> None:
        self.drafter, self.reference = drafter, reference
        self.num_compared = self.num_followed = self.num_rejected = 0
        self.counts: list[tuple[int, int, int, int, int]] = []
        self.spans: list[list[Span]] = []
        self._propose, self._forward = drafter.propose, drafter._forward
        drafter.propose, drafter._forward = self.propose, self.forward  # type: ignore[method-assign]
        assert drafter.attention is not None
        drafter.attention.kv_cache.data.fill_(torch.nan)
        drafter.probs.fill_(torch.nan)

    def forward(self, input_ids: Tensor, spans: list[Span], block_tables: Tensor) -> Tensor:
        self.spans.append(spans)
        return self._forward(input_ids, spans, block_tables)

    @torch.inference_mode()
    def propose(
        self, requests: Sequence[ScheduledRequest], params: Sequence[SamplingParams], num_accepted: Sequence[int],
        tokens: TokenBuffer, block_tables: Tensor,
    ) -> list[list[int]]:  # fmt: skip
        self.spans, before = [], self.drafter.num_tokens_computed
        proposals = self._propose(requests, params, num_accepted, tokens, block_tables)
        by_request = iter(proposals)
        for request, each, accepted in zip(requests, params, num_accepted, strict=True):
            self.num_rejected += len(request.draft_token_ids) - accepted
            end = request.num_computed_tokens + request.num_scheduled_tokens - len(request.draft_token_ids) + accepted
            drafts = next(by_request) if request.is_sampled else []
            self.check(request, each, tokens.data[request.row, : end + 1].tolist(), drafts)
        first = sum(span.end - span.start for span in self.spans[0]) if self.spans else 0
        self.counts.append(
            (
                sum(request.num_scheduled_tokens for request in requests),
                sum(request.is_sampled for request in requests),
                sum(request.num_next_drafts for request in requests),
                first,
                self.drafter.num_tokens_computed - before,
            )
        )
        self.check_counts(requests)
        return proposals

    def check(self, request: ScheduledRequest, params: SamplingParams, text: list[int], drafts: list[int]) -> None:
        assert len(drafts) == request.num_next_drafts, (
            f"{request}: expected {request.num_next_drafts} draft tokens, got {drafts}. {LOOK}"
        )
        self.num_followed += request.num_scheduled_tokens > 1
        if not drafts or samples_drafts(params):
            return
        logits = self.reference(torch.tensor([[*text, *drafts[:-1]]])).logits[0, len(text) - 1 :].float()
        gaps = logits.max(dim=-1).values - logits[range(len(drafts)), drafts]
        assert bool((gaps < TIE).all()), (
            f"{request}, {len(text)} tokens: from scratch the draft model proposes {logits.argmax(dim=-1).tolist()} "
            f"(each after the draft tokens before it), with its cache {drafts}. {LOOK}"
        )
        self.num_compared += 1

    def check_counts(self, requests: Sequence[ScheduledRequest]) -> None:
        num_tokens, num_sampled, num_drafts, first, total = self.counts[-1]
        assert first <= num_tokens + num_sampled and total <= num_tokens + num_drafts + num_sampled, (
            f"a step of {num_tokens} tokens that samples {num_sampled} requests and proposes {num_drafts} tokens: the "
            f"draft model follows with the same tokens, and one more of each sampled request, so expected at most "
            f"{num_tokens + num_sampled} in the first pass and one for each further draft token; got {first}, and "
            f"{total} in all. {LOOK_CATCH_UP}"
        )
        for span in self.spans[0] if self.spans else []:
            start = requests[span.seq].num_computed_tokens
            assert span.start >= start, (
                f"{requests[span.seq]}: expected the draft model to compute positions from {start} on, as the target; "
                f"got {span}. {LOOK_CATCH_UP}"
            )


def engine_of(
    small_models: SmallModels, draft: tuple[str, int] = ("qwen3", 8), **flags: Any
) -> tuple[LLMEngine, Compared]:
    """A target and a draft model, by default of another family: they agree now and then."""
    directory, reference = small_models(*draft, VOCAB_SIZE)
    target, _ = small_models(*TARGET, VOCAB_SIZE)
    config = {
        "model": target, "speculative_model": directory, "speculative_method": "draft_model", "device": "cpu",
        "num_speculative_tokens": 3, "num_kv_blocks": 200, "block_size": 4, **flags,
    }  # fmt: skip
    engine = LLMEngine(EngineConfig(**config))
    watch(engine.scheduler)
    return engine, Compared(drafter_of(engine), reference)


def finish(engine: LLMEngine) -> None:
    while engine.has_unfinished_requests:
        take_step(engine)


def test_an_architecture_that_no_draft_model_may_have() -> None:
    with pytest.raises(FieldError, match="architecture 'qwen3_moe' is not supported") as caught:
        LLMEngine(EngineConfig(device="cpu", speculative_method="draft_model", speculative_model="tiny-moe"))
    assert caught.value.field == "speculative_model", f"got {caught.value}. Look at worker/worker.py::load_draft_model."


def test_both_caches_come_out_of_one_budget(small_models: SmallModels) -> None:
    """A pool sized by the target's blocks alone would take more memory than it was given."""
    budget = 100_000
    engine, compared = engine_of(small_models, num_kv_blocks=None, kv_cache_memory=budget)
    target, draft = engine.executor.worker.runner.attention, compared.drafter.attention
    assert target is not None and draft is not None
    caches = (target.kv_cache, draft.kv_cache)
    sizes = [cache.data.numel() * cache.data.element_size() for cache in caches]
    assert caches[0].num_blocks == caches[1].num_blocks, f"blocks: {[cache.num_blocks for cache in caches]}. {LOOK}"
    per_block = sum(sizes) // caches[0].num_blocks
    assert budget - per_block < sum(sizes) <= budget, (
        f"a budget of {budget:,} bytes: the target's cache and the draft model's take {sizes}, {sum(sizes):,} "
        f"together. Look at worker/worker.py::Worker.num_blocks_available; {LESSON}."
    )


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])
@pytest.mark.parametrize("seed", range(3))
def test_proposals_are_those_of_a_model_without_a_cache(small_models: SmallModels, seed: int, is_async: bool) -> None:
    """A random life: rejections, chunks, prefix hits, preemptions, aborts, rows that are reused, and a failed step."""
    rng = random.Random(seed)
    engine, compared = engine_of(
        small_models, num_kv_blocks=rng.choice([16, 20]), max_num_seqs=5, max_num_batched_tokens=rng.choice([9, 40]),
        async_scheduling=is_async, speculative_max_num_seqs=rng.choice([3, 8]),
    )  # fmt: skip
    scheduler, names = engine.scheduler, set[str]()
    texts = [[rng.randrange(VOCAB_SIZE) for _ in range(30)]]
    for number in range(120):
        if number < 95 and rng.random() < 0.35:
            name = str(rng.randrange(40))
            if name not in names:
                names.add(name)
                prompt = rng.choice(texts)[: rng.randint(1, 30)] + [rng.randrange(VOCAB_SIZE)] * rng.randint(0, 2)
                kind, max_tokens = rng.randrange(5), rng.randint(1, 20)
                temperature, own_seed = (1.0 if kind > 2 else 0.0), (number if kind == 3 else None)
                params = SamplingParams(temperature=temperature, seed=own_seed, max_tokens=max_tokens, ignore_eos=True)
                engine.add_request(name, prompt, params)
        if names and rng.random() < 0.05:
            name = rng.choice(sorted(names))
            engine.abort_requests([name])
            names.discard(name)
        texts += [request.token_ids for request in scheduler.running[:1]]
        if number == 60:
            engine.fail(RuntimeError("the cat sat on it"))
            names.clear()
        for output in take_step(engine):
            if output.finish_reason:
                names.discard(output.request_id)
    finish(engine)
    found = compared.num_compared, compared.num_followed, compared.num_rejected, scheduler.num_hit_tokens
    assert min(found) > 25, f"(compared, chunks and verifications, rejected, hits) {found}: too few"
    assert scheduler.num_preemptions > 2, f"only {scheduler.num_preemptions} preemptions"


def test_proposals_of_the_shipped_draft_model(make_llm: MakeLLM, prompt_of: Callable[..., list[int]]) -> None:
    """`tiny` and `tiny-draft`: what is accepted of them is as much as of a draft model computed from scratch."""
    llm = make_llm(speculative_method="draft_model", num_kv_blocks=40, max_num_seqs=6, max_num_batched_tokens=48)
    reference = load_model(resolve_checkpoint("tiny-draft"), torch.float32, "cpu")
    compared = Compared(drafter_of(llm.engine), reference)
    prompts = [prompt_of(60 if number % 3 else 12, number % 4) for number in range(10)]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    answers = llm.generate(prompts, params)
    stats = llm.engine.speculation.stats
    assert compared.num_compared > 30 and len(answers) == 10, f"only {compared.num_compared} compared"
    assert stats.num_accepted_tokens > 0.2 * stats.num_draft_tokens, f"too few accepted: {stats}. {LOOK}"
    assert llm.engine.scheduler.num_hit_tokens and compared.num_rejected, "no prefix hit, or no rejection"


@pytest.mark.parametrize("draft", [TARGET, ("qwen3", 8)], ids=["the target itself", "another model"])
def test_it_computes_each_position_once(small_models: SmallModels, draft: tuple[str, int]) -> None:
    """The positions of rejected draft tokens are computed again; with the target as the draft model there are none."""
    engine, compared = engine_of(small_models, draft, async_scheduling=False)
    engine.add_request("0", list(range(10)), SamplingParams(temperature=0, max_tokens=16, ignore_eos=True))
    while engine.has_unfinished_requests:
        take_step(engine)
        spans = [(span.start, span.end) for passed in compared.spans for span in passed]
        assert all(a[1] == b[0] for a, b in zip(spans, spans[1:], strict=False)), (
            f"the passes of a step compute positions {spans}: expected each to begin where the last one ended. {LOOK}"
        )
    num_positions, num_computed = 10 + 16 - 1, compared.drafter.num_tokens_computed
    assert num_computed <= num_positions + compared.num_rejected and (draft != TARGET or not compared.num_rejected), (
        f"{num_positions} positions and {compared.num_rejected} rejected draft tokens: got {num_computed} computed "
        f"positions. {LOOK_CATCH_UP}"
    )


def test_a_long_prompt_is_followed_in_chunks(small_models: SmallModels) -> None:
    """The draft model's prefill obeys the step's token budget, as the target's."""
    engine, compared = engine_of(small_models, async_scheduling=False, max_num_batched_tokens=16, max_num_seqs=2)
    engine.add_request("0", [5, 6], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    take_step(engine)
    engine.add_request("1", [n % VOCAB_SIZE for n in range(100)], SamplingParams(temperature=0, max_tokens=2))
    finish(engine)
    firsts = [first for _, _, _, first, _ in compared.counts]
    assert max(firsts) <= 16 + 2, (
        f"a budget of 16 tokens: expected at most 16, and one more of each of two requests, in the draft model's first "
        f"pass, got {firsts}. {LOOK_CATCH_UP}"
    )


def test_a_prefix_hit_of_the_target_is_one_of_the_draft_model(small_models: SmallModels) -> None:
    engine, compared = engine_of(small_models, async_scheduling=False)
    prompt = list(range(20))
    for name in ("0", "1"):
        engine.add_request(name, prompt, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
        take_step(engine)
        first = compared.spans[0][0]
        expected = (0, 21) if name == "0" else (16, 21)
        assert (first.start, first.end) == expected, (
            f"request {name}, 20 tokens and the first of its answer, blocks of 4; the first request has computed them: "
            f"expected the draft model to compute positions from {expected[0]} to {expected[1] - 1}, got {first}. "
            f"{LOOK_CATCH_UP}"
        )
    finish(engine)
    assert compared.num_compared > 3, f"only {compared.num_compared} compared"


def test_a_block_that_is_found_in_the_step_that_computes_it(small_models: SmallModels) -> None:
    """Two requests with the same prompt join in one step; the second one reads what the first one writes."""
    engine, compared = engine_of(small_models, async_scheduling=False)
    for name in ("0", "1"):
        engine.add_request(name, list(range(20)), SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    take_step(engine)
    spans = sorted((span.start, span.end) for span in compared.spans[0])
    assert spans == [(0, 21), (16, 21)] and compared.num_compared == 2, f"got {spans}. {LOOK_CATCH_UP}"


def test_after_a_preemption_it_starts_again(small_models: SmallModels) -> None:
    engine, compared = engine_of(small_models, async_scheduling=False, enable_prefix_caching=False)
    engine.add_request("0", list(range(10)), SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
    take_step(engine)
    engine.scheduler.preempt(engine.scheduler.running[0])
    take_step(engine)
    first = compared.spans[0][0]
    assert first.start == 0, f"its blocks were freed: expected positions from 0 on, got {first}. {LOOK_CATCH_UP}"
    finish(engine)


def test_a_row_goes_to_another_request(small_models: SmallModels) -> None:
    """Nothing is erased when a request leaves; the next one in its row begins anew."""
    engine, compared = engine_of(small_models, async_scheduling=False, max_num_seqs=1, enable_prefix_caching=False)
    for number, length in enumerate([20, 3, 11]):
        engine.add_request(str(number), [number] * length, SamplingParams(temperature=0, max_tokens=6))
        if number == 1:
            take_step(engine)
            engine.abort_requests(["1"])
        finish(engine)
    assert compared.num_compared >= 3, f"only {compared.num_compared} compared"


def test_different_numbers_of_draft_tokens_in_one_batch(small_models: SmallModels) -> None:
    engine, compared = engine_of(small_models, async_scheduling=False)
    acceptances = [0.4, 1.0, 0.1, 0.75, 0.4]
    for number in range(5):
        params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
        engine.add_request(str(number), [number] * (3 + number), params)
    for request, acceptance in zip(engine.scheduler.waiting, acceptances, strict=True):
        request.acceptance = acceptance
        if acceptance == 0.1:
            request.max_num_tokens = 8  # a probe is due at the start; but this one has room for a single token
    take_step(engine)
    got = [len(request.draft_token_ids) for request in engine.scheduler.running]
    assert got == [1, 3, 1, 3, 1], f"acceptances {acceptances}, up to 3: expected [1, 3, 1, 3, 1], got {got}. {LOOK}"
    assert compared.num_compared == 5 and [len(spans) for spans in compared.spans] == [5, 2, 2], (
        f"requests in each pass: expected [5, 2, 2], got {compared.spans}. {LOOK}"
    )
    finish(engine)


# Which are drawn


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({"temperature": 0}, False), ({}, True), ({"seed": 3}, False), ({"temperature": 0.2}, True)],
)
def test_draft_tokens_are_drawn_if_the_answer_is_and_has_no_seed(fields: dict[str, Any], expected: bool) -> None:
    got = samples_drafts(SamplingParams(**fields))
    assert got is expected, f"{fields}: expected draft tokens drawn at random {expected}, got {got}. {LOOK_SAMPLES}"


def test_probs_are_what_the_draft_tokens_were_drawn_from(small_models: SmallModels) -> None:
    """Normalized, after the request's own temperature, top-k and top-p; rows of others are not touched."""
    engine, compared = engine_of(small_models, async_scheduling=False, num_speculative_tokens=2, max_num_seqs=8)
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
        assert request.row is not None
        q, drafts = compared.drafter.probs[request.row], request.draft_token_ids
        if not samples_drafts(request.params):
            assert bool(q.isnan().all()), f"{fields}: its draft tokens are not drawn. {LOOK_CHOOSE}"
            continue
        assert len(drafts) == 2 and torch.allclose(q.sum(dim=-1), torch.ones(2), atol=1e-5), (
            f"{fields}, draft tokens {drafts}: q sums to {q.sum(dim=-1)}. {LOOK_CHOOSE}"
        )
        assert bool((q[range(2), drafts] > 0).all()), f"{fields}: q of draft tokens {drafts} is 0. {LOOK_CHOOSE}"
        with torch.inference_mode():
            logits = compared.reference(torch.tensor([[*request.token_ids, *drafts[:-1]]])).logits[0, -2:].float()
        logits = logits / fields["temperature"]
        if "top_k" in fields:
            logits = logits.masked_fill(logits < logits.topk(3).values[:, -1:], -torch.inf)
        expected = logits.softmax(dim=-1)
        if "top_p" in fields:
            ordered = expected.sort(dim=-1, descending=True)
            is_kept = ordered.values.cumsum(dim=-1) - ordered.values < fields["top_p"]
            expected = torch.zeros_like(expected).scatter(1, ordered.indices, ordered.values * is_kept)
            expected /= expected.sum(dim=-1, keepdim=True)
        assert torch.allclose(q, expected, atol=1e-4), (
            f"{fields}: expected the draft model's distribution after temperature, top-k and top-p. {LOOK_CHOOSE}"
        )
    free = sorted(set(range(8)) - {request.row for request in engine.scheduler.running})
    assert bool(compared.drafter.probs[free].isnan().all()), f"rows {free} belong to no request. {LOOK_CHOOSE}"


def test_probabilities_stay_with_their_row_while_the_request_is_not_in_a_step(
    small_models: SmallModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Draft tokens are verified with the probabilities they were drawn from, though other rows were proposed since."""
    engine, compared = engine_of(small_models, async_scheduling=False)
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    for number in range(2):
        engine.add_request(str(number), [number, 7], params)
    take_step(engine)
    first, second = engine.scheduler.running
    row = first.row
    before, drafts = compared.drafter.probs[row].clone(), list(first.draft_token_ids)
    assert drafts and row is not None
    engine.scheduler.running.remove(first)  # held back for a few steps
    for _ in range(3):
        engine.step()
    engine.scheduler.running.insert(0, first)
    assert torch.equal(compared.drafter.probs[row], before), f"another request has changed them. {LOOK_CHOOSE}"
    seen = list[Tensor]()
    verify = sampler_module.verify_random_drafts

    def noted(spec: SpecDecodeMetadata, drawn: Any, probs: Tensor, draft_probs: Tensor, *rest: Tensor) -> None:
        assert drafts == spec.draft_token_ids[0, : len(drafts)].tolist() and spec.random[0] == 0, f"got {spec}"
        seen.append(draft_probs[spec.buffer_rows[0]].clone())
        verify(spec, drawn, probs, draft_probs, *rest)

    monkeypatch.setattr(sampler_module, "verify_random_drafts", noted)
    take_step(engine)
    assert seen and torch.equal(seen[0], before), f"the verification used other probabilities. {LOOK_CHOOSE}"
