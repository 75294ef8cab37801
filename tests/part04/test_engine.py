"""LLMEngine and LLM: whichever requests join, end or are preempted, an answer stays the same and the blocks add up."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from common.errors import FieldError
from common.outputs import CompletionOutput, join_outputs
from common.sampling_params import SamplingParams
from common.testing import assert_same_greedy, reference_greedy
from part04_continuous_batching.api.output_processor import OutputProcessor
from part04_continuous_batching.core.engine import LLMEngine
from part04_continuous_batching.core.request import Request, RequestStatus
from part04_continuous_batching.lab.static_batches import use_static_batches
from part04_continuous_batching.lab.step_times import PARTS, step_timer
from part04_continuous_batching.llm import LLM
from part04_continuous_batching.messages import EngineCoreOutput, NewRequest, ScheduledRequest, StepInput, StepOutput
from part04_continuous_batching.worker.model_runner import ModelRunner
from part04_continuous_batching.worker.sampler import SamplerOutput, SamplingState

LOOK_ORACLE = (
    'Look at worker/model_runner.py::ModelRunner._prepare and _metadata; README "Prefill and decode in one pass".'
)
LOOK_PASS = (
    "Look at worker/model_runner.py::ModelRunner._metadata and worker/attention.py; "
    'README "Prefill and decode in one pass".'
)
LOOK_APPEND = 'Look at core/engine.py::LLMEngine._append; README "One number for all work".'
LOOK_STEP = (
    'Look at core/engine.py::LLMEngine.step and core/scheduler.py; README "The idea: a new batch for every step".'
)
LOOK_PREEMPT = 'Look at core/scheduler.py::Scheduler.preempt; README "Running requests come first".'
LOOK_KEPT = (
    "Look at what a preempted request keeps, core/scheduler.py::Scheduler.preempt, and at worker/sampler.py::Sampler; "
    'README "Prefill and decode in one pass".'
)
LOOK_ABORT = 'Look at core/scheduler.py::Scheduler.abort; README "Aborts, failures and slow readers".'
LOOK_CHECK = (
    'Look at core/validation.py::check_request and config.py::resolve_config; README "Which requests may join".'
)
LOOK_STOP = (
    'Look at core/engine.py::LLMEngine._append and core/request.py::check_stop; README of part 1, "When to stop".'
)
LOOK_LLM = "Look at llm.py::LLM.generate."
MAX_STEPS = 1_000  # far more than any of these tests needs

MakeEngine = Callable[..., LLMEngine]
PromptOf = Callable[..., list[int]]
Alone = Callable[[list[int], int], list[int]]


def greedy(num_tokens: int, **fields: Any) -> SamplingParams:
    """Exactly num_tokens greedy tokens."""
    return SamplingParams(**{"temperature": 0, "max_tokens": num_tokens, "ignore_eos": True, **fields})


def runner_of(engine: LLMEngine) -> ModelRunner:
    return engine.executor.worker.runner


def ids(requests: Sequence[Request]) -> list[str]:
    return [request.request_id for request in requests]


def check_invariant(engine: LLMEngine, where: str) -> None:
    """Between two steps: the blocks add up, no two requests share one, and a running request has one new token."""
    blocks, scheduler = engine.blocks, engine.scheduler
    used, free, total = blocks.num_used_blocks, blocks.num_free_blocks, blocks.num_blocks - 1
    assert used + free == total, f"{where}: used {used} + free {free} blocks, expected {total} together. {LOOK_STEP}"
    owned = [block for table in blocks.block_tables.values() for block in table]
    assert len(set(owned)) == len(owned) and 0 not in owned, f"{where}: tables {blocks.block_tables}. {LOOK_STEP}"
    owners = {request_id for request_id, table in blocks.block_tables.items() if table}
    assert owners == set(ids(scheduler.running)), (
        f"{where}: requests {ids(scheduler.running)} run, blocks are held by {sorted(owners)}. {LOOK_STEP}"
    )
    for request in scheduler.running:
        name, expected = request.request_id, request.num_tokens - 1
        assert request.num_computed_tokens == expected, (
            f"{where}: request {name} has {request.num_tokens} tokens, the newest has just been sampled: expected "
            f"num_computed_tokens {expected}, got {request.num_computed_tokens}. {LOOK_APPEND}"
        )
        held = len(blocks.block_tables[name])
        assert held == blocks.num_blocks_for(expected), (
            f"{where}: request {name} has keys for {expected} tokens (block_size={blocks.block_size}): expected "
            f"{blocks.num_blocks_for(expected)} blocks, got {held}. {LOOK_STEP}"
        )
        assert request.status is RequestStatus.RUNNING, (
            f"{where}: request {name} is still among the running, as {request.status!r}: a request that ends leaves at "
            f"once. "
            f"{LOOK_APPEND}"
        )
    rows = [*scheduler.free_rows, *(request.row for request in scheduler.running)]
    assert sorted(rows) == list(range(scheduler.max_num_seqs)), (  # type: ignore[type-var]
        f"{where}: each row is free or has one owner: free {scheduler.free_rows}, all {rows}. {LOOK_STEP}"
    )
    for request in scheduler.waiting:
        state = (request.status, request.num_computed_tokens, request.row)
        status = RequestStatus.PREEMPTED if request.output_token_ids else RequestStatus.WAITING
        assert state == (status, 0, None), f"{where}: {request.request_id} waits as {state}. {LOOK_PREEMPT}"


@dataclass
class Run:
    """What came of stepping until nothing was left: each request's outputs as one, and the requests of each step."""

    answers: dict[str, EngineCoreOutput]
    batches: list[list[str]]


def merge(pieces: list[EngineCoreOutput]) -> EngineCoreOutput:
    """The outputs of one request as one."""
    token_ids = [token_id for piece in pieces for token_id in piece.token_ids]
    logprobs = [entry for piece in pieces for entry in piece.logprobs or []]
    return msgspec.structs.replace(pieces[-1], token_ids=token_ids, logprobs=logprobs or None)


def finish(engine: LLMEngine, on_step: Callable[[int], object] = lambda number: None) -> Run:
    """Step until nothing is left. on_step(number) is called before each step; True means that a request is to come."""
    pieces: dict[str, list[EngineCoreOutput]] = {}
    batches: list[list[str]] = []
    while on_step(len(batches)) or engine.has_unfinished_requests:
        number = len(batches)
        where = f"after step {number}"
        assert number < MAX_STEPS, f"{number} steps, and {ids(engine.scheduler.running)} still run. {LOOK_APPEND}"
        outputs = engine.step() if engine.has_unfinished_requests else []
        assert outputs or not engine.has_unfinished_requests, f"{where}: no output, though some wait. {LOOK_STEP}"
        for output in outputs:
            request_id = output.request_id
            assert len(output.token_ids) == 1, f"{where}: a step gives one token a request, got {output}. {LOOK_APPEND}"
            before = pieces.setdefault(request_id, [])
            assert not before or before[-1].finish_reason is None, (
                f"{where}: request {request_id} had ended and got another token. {LOOK_APPEND}"
            )
            before.append(output)
        check_invariant(engine, where)
        batches.append([output.request_id for output in outputs])
    blocks = engine.blocks
    assert blocks.num_free_blocks == blocks.num_blocks - 1, (
        f"all have ended: expected {blocks.num_blocks - 1} free blocks, got {blocks.num_free_blocks}. {LOOK_APPEND}"
    )
    return Run({request_id: merge(outputs) for request_id, outputs in pieces.items()}, batches)


class Lost:
    """Counts the positions whose keys and values were lost by preemption."""

    def __init__(self, engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_tokens = 0
        preempt = engine.scheduler.preempt

        def count(request: Request) -> None:
            self.num_tokens += request.num_computed_tokens
            preempt(request)

        monkeypatch.setattr(engine.scheduler, "preempt", count)


@pytest.fixture(scope="module")
def alone(llm: LLM) -> Alone:
    """alone(prompt, num_tokens): the greedy answer of an engine that has nothing else to do, which is asked once."""

    @functools.cache
    def ask(prompt: tuple[int, ...], num_tokens: int) -> list[int]:
        return llm.generate([list(prompt)], greedy(num_tokens))[0].outputs[0].token_ids

    return lambda prompt, num_tokens: ask(tuple(prompt), num_tokens)


# The oracle

LENGTHS = [17, 1, 2, 33, 15, 16, 60, 1, 31, 5]
MAX_TOKENS = [12, 9, 3, 10, 1, 12, 5, 12, 9, 10]
ARRIVALS = [0, 0, 1, 2, 2, 3, 7, 8, 8, 30]  # the step at which each arrives; by 30 some pools are idle again


@pytest.fixture(scope="module")
def expected_tokens(reference: Any, prompt_of: PromptOf) -> list[list[int]]:
    """What transformers answers to each of the prompts of LENGTHS alone."""
    cases = enumerate(zip(LENGTHS, MAX_TOKENS, strict=True))
    return [reference_greedy(reference, prompt_of(length, number), count) for number, (length, count) in cases]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "is_small"),
    [
        (dict(block_size=16), False),
        (dict(block_size=1, num_kv_blocks=2_000), False),
        (dict(block_size=16, max_num_seqs=3), False),
        (dict(block_size=16, max_model_len=65, max_num_batched_tokens=65), False),
        (dict(block_size=16, num_kv_blocks=1 + 4), True),
        (dict(block_size=4, num_kv_blocks=1 + 16), True),
        (dict(block_size=1, num_kv_blocks=1 + 64), True),
    ],
    ids=str,
)
def test_greedy_equals_transformers_whenever_a_request_arrives(
    make_engine: MakeEngine,
    reference: Any,
    prompt_of: PromptOf,
    expected_tokens: list[list[int]],
    flags: dict[str, int],
    is_small: bool,
) -> None:
    engine = make_engine(**flags)

    def arrive(step: int) -> bool:
        for number in (number for number, at in enumerate(ARRIVALS) if at == step):
            engine.add_request(str(number), prompt_of(LENGTHS[number], number), greedy(MAX_TOKENS[number]))
        return step < max(ARRIVALS)

    got = finish(engine, arrive)
    for number, expected in enumerate(expected_tokens):
        where = f"{flags}, request {number} (prompt of {LENGTHS[number]}). {LOOK_ORACLE} Difference"
        prompt = prompt_of(LENGTHS[number], number)
        assert_same_greedy(reference, prompt, got.answers[str(number)].token_ids, expected, where)
    num_preemptions = engine.scheduler.num_preemptions
    assert (num_preemptions > 1) is is_small, f"{flags}: {num_preemptions} preemptions. {LOOK_PREEMPT}"


# Steps


@pytest.mark.parametrize(("is_static", "expected"), [(True, 40), (False, 24)], ids=["static", "continuous"])
def test_static_and_continuous(
    make_engine: MakeEngine, llm: LLM, prompt_of: PromptOf, is_static: bool, expected: int
) -> None:
    """Answers of 2, 2, 2 and 20 tokens, twice, on four slots: the same answers, in fewer steps."""
    engine = make_engine(max_num_seqs=4)
    if is_static:
        use_static_batches(engine)
    prompts = [prompt_of(8, number) for number in range(8)]
    each = [greedy(count) for count in [2, 2, 2, 20] * 2]
    for number, (prompt, params) in enumerate(zip(prompts, each, strict=True)):
        engine.add_request(str(number), prompt, params)
    got = finish(engine)
    assert (engine.num_steps, len(got.batches)) == (expected, expected), (
        f"answers of [2, 2, 2, 20] tokens, twice, on four slots: expected {expected} steps, got {engine.num_steps}. "
        f"{LOOK_STEP}"
    )
    if not is_static:
        batches = [["0", "1", "2", "3"]] * 2 + [["3", "4", "5", "6"]] * 2 + [["3", "7"]] * 16 + [["7"]] * 4
        assert got.batches == batches, f"the requests of each step: expected {batches}, got {got.batches}. {LOOK_STEP}"
    for number, alone in enumerate(llm.generate(prompts, each)):
        tokens = got.answers[str(number)].token_ids
        assert tokens == alone.outputs[0].token_ids, (
            f"request {number}: expected {alone.outputs[0].token_ids}, got {tokens}. {LOOK_ORACLE}"
        )


def test_a_request_joins_the_next_step_and_leaves_as_soon_as_it_ends(
    make_engine: MakeEngine, prompt_of: PromptOf
) -> None:
    engine = make_engine(max_num_seqs=2)
    comes = {0: ("a", 5), 2: ("b", 2), 3: ("c", 3)}

    def arrive(step: int) -> bool:
        if step in comes:
            name, count = comes[step]
            engine.add_request(name, prompt_of(6), greedy(count))
        return step < 3

    got = finish(engine, arrive).batches
    expected = [["a"], ["a"], ["a", "b"], ["a", "b"], ["a", "c"], ["c"], ["c"]]
    assert got == expected, (
        f"two slots; a (5 tokens) arrives at step 0, b (2) at step 2, c (3) at step 3: the requests of each step, "
        f"expected {expected}, got {got}. {LOOK_APPEND}"
    )


def test_an_idle_engine_has_nothing_to_do(make_engine: MakeEngine, prompt_of: PromptOf) -> None:
    engine = make_engine()
    for when in ("before any request", "after the last one"):
        outputs = engine.step()
        assert outputs == [], f"a step {when}: expected no outputs, got {outputs}. {LOOK_STEP}"
        num_steps = engine.num_steps
        engine.add_request(when, prompt_of(5), greedy(1))
        engine.step()
        assert engine.num_steps == num_steps + 1, f"{when}: expected one step, took {engine.num_steps - num_steps}"
    assert engine.num_steps == 2, f"idle steps are none: expected 2 in all, got {engine.num_steps}. {LOOK_STEP}"


def test_the_pieces_of_an_answer(make_llm: Callable[..., LLM], prompt_of: PromptOf) -> None:
    """One token a step; only the last piece says why it ended; the pieces' text is the tokens' text."""
    llm = make_llm()
    engine, processor = llm.engine, llm.processor
    for number, count in enumerate((9, 1, 4)):
        params = greedy(count, logprobs=1 if number == 2 else None)
        processor.add_request(str(number), prompt_of(7, number), params)
        engine.add_request(str(number), prompt_of(7, number), params)
    pieces: dict[str, list[CompletionOutput]] = {"0": [], "1": [], "2": []}
    while engine.has_unfinished_requests:
        answers, stopped = processor.process(engine.step())
        assert not stopped, f"no request has a stop string, {stopped} stopped. Look at api/output_processor.py."
        for request_id, output in answers:
            pieces[request_id].append(output)
            assert len(pieces[request_id]) <= 9, f"request {request_id} does not end. {LOOK_APPEND}"
    for (request_id, outputs), count in zip(pieces.items(), (9, 1, 4), strict=True):
        reasons = [output.finish_reason for output in outputs]
        expected = [None] * (count - 1) + ["length"]
        assert reasons == expected, f"request {request_id}: expected reasons {expected}, got {reasons}. {LOOK_APPEND}"
        text = llm.tokenizer.decode([output.token_ids[0] for output in outputs], skip_special_tokens=True)
        joined = "".join(output.text for output in outputs)
        assert joined == text, f"request {request_id}: its tokens say {text!r}, got {joined!r}. {LOOK_APPEND}"
        for output in outputs:
            has_logprobs = output.logprobs is not None and [*output.logprobs[0]][:1] == output.token_ids
            assert has_logprobs is (request_id == "2"), f"request {request_id}: logprobs {output}. {LOOK_APPEND}"


def test_the_next_step_has_row_and_blocks_of_a_request_that_ended(make_engine: MakeEngine, prompt_of: PromptOf) -> None:
    engine = make_engine(max_num_seqs=1, num_kv_blocks=1 + 2)
    for name in "ab":
        engine.add_request(name, prompt_of(30), greedy(2))
    batches = finish(engine).batches
    assert batches == [["a"], ["a"], ["b"], ["b"]], (
        f"one slot, two blocks: a has both of them for two steps, then b. Got {batches}. {LOOK_APPEND}"
    )


@pytest.mark.parametrize("block_size", [1, 16])
def test_positions_computed(make_engine: MakeEngine, prompt_of: PromptOf, block_size: int) -> None:
    """A prompt once, then one position a token; the last token's key and value are never computed."""
    engine, lengths, counts = make_engine(block_size=block_size, max_num_seqs=3), [10, 1, 33, 7, 2], [20, 1, 5, 9, 3]
    for number, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        engine.add_request(str(number), prompt_of(length, number), greedy(count))
    finish(engine)
    expected = sum(length + count - 1 for length, count in zip(lengths, counts, strict=True))
    got = runner_of(engine).num_tokens_computed
    assert got == expected, (
        f"prompts of {lengths}, answers of {counts}: expected sum(P + G - 1) = {expected} positions, got {got}. "
        f"{LOOK_APPEND}"
    )


def test_positions_computed_with_a_preemption_by_hand(make_engine: MakeEngine, prompt_of: PromptOf) -> None:
    """Blocks of 4, three of them, two prompts of 4: at the fifth token both want a block, and one is left."""
    engine = make_engine(block_size=4, num_kv_blocks=1 + 3)
    for name in "01":
        engine.add_request(name, prompt_of(4, int(name)), greedy(6))
    engine.step()
    kept = list(engine.scheduler.running[1].output_token_ids)
    engine.step()
    queues = (ids(engine.scheduler.running), ids(list(engine.scheduler.waiting)))
    assert queues == (["0"], ["1"]), (
        f"0 takes the last block, 1 is preempted: (running, waiting) is {queues}. {LOOK_STEP}"
    )
    assert engine.scheduler.waiting[0].output_token_ids == kept, f"1 had {kept} and loses it. {LOOK_PREEMPT}"
    finish(engine)
    counters = (engine.scheduler.num_preemptions, engine.num_steps, runner_of(engine).num_tokens_computed)
    assert counters == (1, 6 + 5, (4 + 5) + (4 + 5 + 4)), (
        f"(preemptions, steps, positions): expected (1, 11, 22), since request 1 computes its 4 tokens again, with "
        f"the one it had sampled; got {counters}. {LOOK_PREEMPT}"
    )


def test_what_is_computed_again_is_what_was_lost(
    make_engine: MakeEngine, prompt_of: PromptOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(block_size=4, num_kv_blocks=1 + 9)
    lost = Lost(engine, monkeypatch)
    lengths, counts = [5, 9, 1, 12, 7, 3], [20, 11, 24, 3, 16, 1]
    for number, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        engine.add_request(str(number), prompt_of(length, number), greedy(count))
    finish(engine)
    assert engine.scheduler.num_preemptions > 3, f"got {engine.scheduler.num_preemptions} preemptions. {LOOK_STEP}"
    once = sum(length + count - 1 for length, count in zip(lengths, counts, strict=True))
    got = runner_of(engine).num_tokens_computed
    assert got == once + lost.num_tokens, (
        f"{engine.scheduler.num_preemptions} preemptions lost {lost.num_tokens} positions: expected {once} + "
        f"{lost.num_tokens} computed, got {got}. {LOOK_PREEMPT}"
    )


# Prefill and decode in one pass


Pass = list[tuple[str, int, list[int], Tensor]]  # of each request: id, number of new tokens, tokens, logits


def record_passes(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> list[Pass]:
    """Notes what goes through the model in each step from here on."""
    passes: list[Pass] = []
    execute, sample = engine.executor.execute, runner_of(engine).sampler.sample
    found: list[Tensor] = []

    def record_logits(logits: Tensor, states: Sequence[SamplingState], token_rows: Tensor) -> SamplerOutput:
        assert logits.shape == (len(states), engine.limits.vocab_size), f"got {tuple(logits.shape)}. {LOOK_PASS}"
        assert logits.dtype is torch.float32, f"expected float32, got {logits.dtype}. {LOOK_PASS}"
        found[:] = logits.clone()  # the sampler changes them
        return sample(logits, states, token_rows)

    def record_step(step: StepInput) -> StepOutput:
        output = execute(step)
        by_row = {request.row: request for request in engine.scheduler.running}
        requests = [by_row[share.row] for share in step.requests]
        rows = zip(requests, step.requests, found, strict=True)
        passes.append([(r.request_id, share.num_scheduled_tokens, r.token_ids, row) for r, share, row in rows])
        return output

    monkeypatch.setattr(runner_of(engine).sampler, "sample", record_logits)
    monkeypatch.setattr(engine.executor, "execute", record_step)
    return passes


@pytest.mark.slow
def test_a_pass_over_both_kinds_gives_each_the_logits_it_gets_alone(
    make_engine: MakeEngine, prompt_of: PromptOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, alone = make_engine(block_size=4), make_engine()
    passes, alone_passes = record_passes(engine, monkeypatch), list[Tensor]()

    def arrive(step: int) -> bool:
        for number in {0: (0, 1, 2), 3: (3, 4), 5: (5, 6, 7)}.get(step, ()):
            engine.add_request(str(number), prompt_of([9, 1, 16, 1, 30, 5, 1, 4][number], number), greedy(8))
        if step == 5:
            engine.scheduler.preempt(engine.scheduler.running[-1])  # comes back in this step, before the new ones
        return step < 5

    def record_alone(logits: Tensor, *rest: Any) -> SamplerOutput:
        alone_passes.append(logits[0].clone())
        return sample(logits, *rest)

    finish(engine, arrive)
    num_new_tokens = [(name, count) for name, count, _, _ in passes[5]]
    expected = [("0", 1), ("1", 1), ("2", 1), ("3", 1), ("4", 30 + 2), ("5", 5), ("6", 1), ("7", 4)]
    assert num_new_tokens == expected, (
        f"(request, tokens) of the pass that holds all kinds: {expected}, got {num_new_tokens}. {LOOK_PASS}"
    )
    sample = runner_of(alone).sampler.sample
    monkeypatch.setattr(runner_of(alone).sampler, "sample", record_alone)
    for number in (0, 3, 5, 6):
        for name, num_computed, token_ids, logits in passes[number]:
            blocks = list(range(1, 2 + len(token_ids) // 16))
            new = NewRequest(0, token_ids, len(token_ids), greedy(1))
            alone.executor.execute(StepInput([new], [ScheduledRequest(0, 0, len(token_ids), blocks)]))
            difference = float((logits - alone_passes[-1]).abs().max())
            assert difference < 1e-4, (
                f"pass {number} over {[(n, c) for n, c, _, _ in passes[number]]} (request, tokens): the logits of "
                f"request {name}, {num_computed} of its {len(token_ids)} tokens computed here, differ by "
                f"{difference:.1e} from those it gets alone. {LOOK_PASS}"
            )


@pytest.mark.slow
def test_what_others_left_in_the_cache_is_never_read(make_engine: MakeEngine, llm: LLM, prompt_of: PromptOf) -> None:
    """Every slot that a request has not written may hold anything, those of the null block too."""
    engine = make_engine(block_size=4)
    attention = runner_of(engine).attention
    assert attention is not None
    attention.kv_cache.data.fill_(torch.nan)
    lengths = [5, 1, 18, 4]
    for number, length in enumerate(lengths):
        engine.add_request(str(number), prompt_of(length, number), greedy(6))
    got = finish(engine).answers
    for number, length in enumerate(lengths):
        expected = llm.generate([prompt_of(length, number)], greedy(6))[0].outputs[0].token_ids
        tokens = got[str(number)].token_ids
        assert tokens == expected, f"prompt of {length}, NaN in the free slots: {tokens}, not {expected}. {LOOK_PASS}"


# Interactions: sampling params × the other requests of a step × preemption

# A bias: answers of so few words repeat themselves, whatever the model, so penalties have something to change.
TEN_WORDS = {100 + number: 40.0 for number in range(10)}
MIXED: list[dict[str, Any]] = [
    dict(),
    dict(temperature=1.0, seed=3),
    dict(repetition_penalty=1.5),
    dict(presence_penalty=1.5, frequency_penalty=1.0),
    dict(temperature=0.7, seed=4, top_k=5, top_p=0.9, repetition_penalty=1.2),
    dict(frequency_penalty=2.0, logprobs=2),
    dict(temperature=1.0, seed=3),
    dict(frequency_penalty=2.0, logit_bias={**TEN_WORDS, 100: 0.0, 7: 42.0}),
    dict(temperature=1.0, seed=5, ignore_eos=False, min_tokens=10, logit_bias={**TEN_WORDS, 2: 40.0}),
]


def mixed(number: int) -> SamplingParams:
    return greedy(20, **{"logit_bias": TEN_WORDS, **MIXED[number]})


@pytest.fixture(scope="module")
def mixed_alone(llm: LLM, prompt_of: PromptOf) -> list[CompletionOutput]:
    """Each request of MIXED by itself, in a roomy pool."""
    prompts = [prompt_of(6 + number % 3, number % 3) for number in range(len(MIXED))]
    return [llm.generate([prompt], mixed(number))[0].outputs[0] for number, prompt in enumerate(prompts)]


@pytest.mark.slow
@pytest.mark.parametrize("order", ["at once", "shuffled, one by one"])
@pytest.mark.parametrize(
    "flags", [dict(), dict(block_size=4, num_kv_blocks=1 + 13), dict(max_num_seqs=3), dict(is_static=True)], ids=str
)
def test_other_requests_and_preemption_change_no_answer(
    make_engine: MakeEngine,
    mixed_alone: list[CompletionOutput],
    prompt_of: PromptOf,
    flags: dict[str, Any],
    order: str,
) -> None:
    """Penalties count tokens from before a preemption, and a seeded draw depends on its position alone."""
    engine = make_engine(**{name: value for name, value in flags.items() if name != "is_static"})
    if "is_static" in flags:
        use_static_batches(engine)
    numbers = list(range(len(MIXED)))
    if order.startswith("shuffled"):
        random.Random(0).shuffle(numbers)

    def arrive(step: int) -> bool:
        arriving, numbers[:] = (numbers[:], []) if order == "at once" else (numbers[:1], numbers[1:])
        for number in arriving:
            engine.add_request(str(number), prompt_of(6 + number % 3, number % 3), mixed(number))
        return bool(numbers)

    got = finish(engine, arrive).answers
    for number, expected in enumerate(mixed_alone):
        answer, where = got[str(number)], f"{MIXED[number]} among others with {flags}, {order}"
        assert answer.token_ids == expected.token_ids, (
            f"{where}: expected what the request gets alone, {expected.token_ids}, got {answer.token_ids}. {LOOK_KEPT}"
        )
        for entry, alone in zip(answer.logprobs or [], expected.logprobs or [], strict=True):
            assert list(entry) == list(alone), f"{where}: logprobs {entry}, alone {alone}. {LOOK_KEPT}"
            for token_id, logprob in entry.items():
                assert logprob.logprob == pytest.approx(alone[token_id].logprob, abs=1e-3), f"{where}: {entry}, {alone}"
    num_preemptions = engine.scheduler.num_preemptions
    assert (num_preemptions > 2) is ("num_kv_blocks" in flags), f"{flags}, {order}: {num_preemptions} preemptions."


@pytest.mark.slow
def test_the_mixed_requests_differ(mixed_alone: list[CompletionOutput]) -> None:
    """Else the test above would prove nothing."""
    for number in range(3, len(MIXED)):
        same_prompt = [other for other in range(number) if other % 3 == number % 3]
        for other in same_prompt:
            assert mixed_alone[number].token_ids != mixed_alone[other].token_ids, (
                f"{MIXED[number]} answers as {MIXED[other]}: {mixed_alone[number].token_ids}"
            )


@pytest.mark.slow
@pytest.mark.parametrize("flags", [dict(), dict(block_size=4, num_kv_blocks=1 + 14)], ids=str)
def test_stop_strings_in_a_batch(make_engine: MakeEngine, llm: LLM, prompt_of: PromptOf, flags: dict[str, int]) -> None:
    """Each answer ends where its own stop string begins, also if half of it came before a preemption.

    Some end in the beginning of one: it is held back, and shown at the end.
    """
    engine, prompts = make_engine(**flags), [prompt_of(6 + number, number) for number in range(8)]
    processor, step, texts = OutputProcessor(llm.tokenizer), engine.step, dict[str, list[CompletionOutput]]()
    whole = [result.outputs[0].text for result in llm.generate(prompts, greedy(24))]
    stops = [text[12 + 5 * number :][:9] if number % 4 else f"{text[-4:]}¤" for number, text in enumerate(whole)]

    def arrive(step: int) -> bool:
        if step < len(prompts):
            params = greedy(24, stop=[stops[step]])
            processor.add_request(str(step), prompts[step], params)
            engine.add_request(str(step), prompts[step], params)
        return step < len(prompts)

    def step_and_process() -> list[EngineCoreOutput]:
        outputs = step()
        answers, stopped = processor.process(outputs)
        engine.abort_requests(stopped)
        for request_id, answer in answers:
            texts.setdefault(request_id, []).append(answer)
        return outputs

    engine.step = step_and_process  # type: ignore[method-assign]
    finish(engine, arrive)
    for number, (text, stop) in enumerate(zip(whole, stops, strict=True)):
        expected = (text[: text.find(stop)], "stop", stop) if stop in text else (text, "length", None)
        answer = join_outputs(texts[str(number)])
        actual = (answer.text, answer.finish_reason, answer.stop_reason)
        assert actual == expected, f"request {number}, stop={stop!r}, {flags}: {expected}, got {actual}. {LOOK_STOP}"
    assert (engine.scheduler.num_preemptions > 2) is bool(flags), f"{engine.scheduler.num_preemptions} preemptions."


def want_always(engine: LLMEngine, token_id: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's likeliest token is always this one; the second is token 100."""
    sample = runner_of(engine).sampler.sample

    def sample_scripted(logits: Tensor, states: Sequence[SamplingState], token_rows: Tensor) -> SamplerOutput:
        logits.zero_()
        logits[:, token_id], logits[:, 100] = 10.0, 5.0
        return sample(logits, states, token_rows)

    monkeypatch.setattr(runner_of(engine).sampler, "sample", sample_scripted)


@pytest.mark.parametrize("flags", [dict(), dict(block_size=1, num_kv_blocks=1 + 20)], ids=str)
def test_how_answers_end_in_a_batch(
    make_engine: MakeEngine, prompt_of: PromptOf, monkeypatch: pytest.MonkeyPatch, flags: dict[str, int]
) -> None:
    """min_tokens, ignore_eos, stop tokens and the end of the context, each for its own request."""
    engine = make_engine(max_model_len=16, **flags)
    [eos] = engine.eos_token_ids
    want_always(engine, eos, monkeypatch)
    cases: dict[str, tuple[dict[str, Any], tuple[int, str, int | None]]] = {  # fields → tokens, finish and stop reason
        "EOS": ({}, (1, "stop", None)),
        "EOS at max_tokens": ({"max_tokens": 1}, (1, "stop", None)),
        "min_tokens": ({"min_tokens": 4}, (5, "stop", None)),
        "min_tokens and max_tokens": ({"min_tokens": 4, "max_tokens": 4}, (4, "length", None)),
        "ignored": ({"ignore_eos": True, "max_tokens": 7}, (7, "length", None)),
        "ignored to the end": ({"ignore_eos": True, "max_tokens": 900}, (11, "length", None)),
        "stop token": ({"ignore_eos": True, "stop_token_ids": [eos], "min_tokens": 6}, (7, "stop", eos)),
        "biased": ({"logit_bias": {eos: -50.0}, "max_tokens": 900}, (11, "length", None)),
    }
    for name, (fields, _) in cases.items():
        engine.add_request(name, prompt_of(5), SamplingParams(**{"temperature": 0, "max_tokens": 16, **fields}))
    got = finish(engine).answers
    for name, (fields, expected) in cases.items():
        answer = got[name]
        actual = (len(answer.token_ids), answer.finish_reason, answer.stop_reason)
        assert actual == expected, (
            f"{name}: the model wants EOS, {fields}, prompt of 5 in a context of 16, {flags}: (tokens, finish_reason, "
            f"stop_reason) expected {expected}, got {actual}. {LOOK_STOP}"
        )
    assert (engine.scheduler.num_preemptions > 2) is bool(flags), f"{engine.scheduler.num_preemptions} preemptions."


# Abort


def abort(engine: LLMEngine, *request_ids: str) -> None:
    engine.abort_requests(request_ids)
    remaining = ids([*engine.scheduler.running, *engine.scheduler.waiting])
    for request_id in request_ids:
        assert request_id not in remaining, f"request {request_id} was aborted, and is among {remaining}. {LOOK_ABORT}"
        assert request_id not in engine.blocks.block_tables, f"aborted request {request_id} holds blocks. {LOOK_ABORT}"
    check_invariant(engine, f"after the abort of {request_ids}")


@pytest.mark.parametrize("which", ["0", "1", "2", "13", "0123", "ended", "unknown"])
def test_abort_and_preemption(make_engine: MakeEngine, alone: Alone, prompt_of: PromptOf, which: str) -> None:
    """0 runs, 1 was preempted, 2 and 3 wait: the other answers stay the same, and all blocks are freed."""
    engine = make_engine(block_size=4, num_kv_blocks=1 + 3)
    prompts = [prompt_of(4, number) for number in range(4)]
    engine.add_request("ended", prompts[0], greedy(1))
    finish(engine)
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), prompt, greedy(6))
    engine.step()
    engine.step()
    queues = (ids(engine.scheduler.running), ids(list(engine.scheduler.waiting)))
    assert queues == (["0"], ["1", "2", "3"]), f"this test needs 1 to be preempted, got {queues}. {LOOK_PREEMPT}"
    aborted = [which] if which in ("ended", "unknown") else list(which)
    abort(engine, *aborted)
    left = [number for number in range(4) if str(number) not in aborted]
    requests = {int(r.request_id): r for r in [*engine.scheduler.running, *engine.scheduler.waiting]}
    finish(engine)
    for number in left:
        expected = alone(prompts[number], 6)
        got = requests[number].output_token_ids
        assert got == expected, f"{which} was aborted: request {number} expects {expected}, got {got}. {LOOK_ABORT}"


@pytest.mark.slow
def test_aborts_at_random(make_engine: MakeEngine, llm: LLM, prompt_of: PromptOf) -> None:
    """Requests arrive and are aborted in a small pool; each that stays gets the answer it gets alone."""
    rng, engine = random.Random(0), make_engine(block_size=4, num_kv_blocks=1 + 14, max_num_seqs=5)
    prompts = [prompt_of(rng.randint(1, 20), number) for number in range(30)]
    each = [greedy(rng.randint(1, 16)) for _ in prompts]
    expected = [result.outputs[0].token_ids for result in llm.generate(prompts, each)]
    aborted: set[str] = set()

    def on_step(step: int) -> bool:
        if step < len(prompts):
            engine.add_request(str(step), prompts[step], each[step])
        there = [*engine.scheduler.running, *engine.scheduler.waiting]
        if step % 4 == 3 and there:
            aborted.add(rng.choice(there).request_id)
            abort(engine, *aborted)  # most of them once more
        return step < len(prompts)

    got = finish(engine, on_step).answers
    assert engine.scheduler.num_preemptions > 2, "this test needs preemptions"
    assert 5 < len(aborted) < 25, f"this test needs some to be aborted and some not, got {len(aborted)}"
    for number, tokens in enumerate(expected):
        if str(number) not in aborted:
            actual = got[str(number)].token_ids
            assert actual == tokens, f"request {number}: expected {tokens}, got {actual}. {LOOK_ABORT}"


# What can never be served


def refuse(engine: LLMEngine, prompt: list[int], params: SamplingParams, field: str, *words: str) -> None:
    with pytest.raises(FieldError) as caught:
        engine.add_request("x", prompt, params)
    message = str(caught.value)
    assert caught.value.field == field, f"expected the error to blame {field}, got {caught.value.field}. {LOOK_CHECK}"
    for word in words:
        assert word in message, f"the message must name value and limit, {word!r}: {message!r}. {LOOK_CHECK}"
    assert not engine.has_unfinished_requests, f"a refused request was queued. {LOOK_CHECK}"


@pytest.mark.slow
@pytest.mark.parametrize(("length", "num_tokens"), [(40, 9), (1, 48), (48, 1)])
@pytest.mark.parametrize("block_size", [1, 16])
def test_the_largest_request_that_fits(
    make_engine: MakeEngine, alone: Alone, prompt_of: PromptOf, block_size: int, length: int, num_tokens: int
) -> None:
    """48 slots hold prompt and answer of 49 tokens together: the last token is never stored. Other requests wait."""
    engine = make_engine(block_size=block_size, num_kv_blocks=1 + 48 // block_size)
    refuse(engine, prompt_of(length), greedy(num_tokens + 1), "prompt", f"{length} tokens", "48 tokens")
    refuse(engine, prompt_of(length + 1), greedy(num_tokens), "prompt", f"{length + 1} tokens", "48 tokens")
    cases = {"before": (3, 4), "largest": (length, num_tokens), "after": (3, 4)}
    for name, (each_length, count) in cases.items():
        engine.add_request(name, prompt_of(each_length), greedy(count))
    got = finish(engine).answers
    for name, (each_length, count) in cases.items():
        expected = alone(prompt_of(each_length), count)
        assert got[name].token_ids == expected, (
            f"a prompt of {length} and {num_tokens} tokens in 48 slots, {name}: {got[name].token_ids}, not {expected}. "
            f"{LOOK_CHECK}"
        )


def test_the_context_limits_what_a_request_can_need(make_engine: MakeEngine, prompt_of: PromptOf) -> None:
    """max_tokens beyond the context asks for no more blocks than the context has."""
    engine = make_engine(block_size=16, num_kv_blocks=1 + 2, max_model_len=33)
    engine.add_request("0", prompt_of(20), greedy(1_000))
    answer = finish(engine).answers["0"]
    assert (len(answer.token_ids), answer.finish_reason) == (13, "length"), (
        f"a prompt of 20 in a context of 33: expected 13 tokens and 'length', got {answer}. {LOOK_CHECK}"
    )


@pytest.mark.parametrize(
    ("prompt", "fields", "field", "words"),
    [
        ([5, 6], {"n": 2}, "n", ["2"]),
        ([5, 6], {"stop_token_ids": [4_096]}, "stop_token_ids", ["4096"]),
        ([5, 6], {"logit_bias": {4_096: 1.0}}, "logit_bias", ["4096"]),
        ([], {}, "prompt", ["empty"]),
        ([5, 4_096], {}, "prompt", ["4095"]),
        ([5, -1], {}, "prompt", ["4095"]),
        ([5] * 64, {}, "prompt", ["64"]),
        ([5] * 900, {}, "prompt", ["900", "64"]),
    ],
    ids=["n", "stop token", "bias", "empty", "no such token", "negative", "context", "beyond the context"],
)
def test_bad_requests_are_refused(
    make_engine: MakeEngine, prompt: list[int], fields: dict[str, Any], field: str, words: list[str]
) -> None:
    """A prompt longer than the context would wait forever: no step has room for it."""
    engine = make_engine(max_model_len=64, max_num_batched_tokens=64)
    refuse(engine, prompt, greedy(3, **fields), field, *words)


def test_a_step_must_have_room_for_the_longest_prompt(make_engine: MakeEngine) -> None:
    with pytest.raises(FieldError) as caught:
        make_engine(max_model_len=100, max_num_batched_tokens=99)
    assert caught.value.field == "max_num_batched_tokens", f"got {caught.value.field}. {LOOK_CHECK}"
    for word in ("max_model_len=100", "99"):
        assert word in str(caught.value), f"the message must name value and limit, {word!r}: {caught.value}."
    for flags, expected in (
        (dict(max_model_len=100, max_num_batched_tokens=100), 100),
        (dict(max_model_len=100), 2_048),
        (dict(), 2_048),
        (dict(max_num_batched_tokens=3_000), 3_000),
    ):
        engine = make_engine(**flags)
        got = engine.scheduler.max_num_batched_tokens
        assert got == expected, f"{flags}: expected a budget of {expected}, got {got}. {LOOK_CHECK}"


# LLM.generate


def test_generate_answers_in_order(make_llm: Callable[..., LLM], llm: LLM, prompt_of: PromptOf) -> None:
    """The shortest answer comes first out of the engine, not out of generate."""
    small = make_llm(max_num_seqs=2)
    prompts, counts = [prompt_of(5 + number, number) for number in range(4)], (9, 2, 5, 1)
    results = small.generate(prompts, [greedy(count) for count in counts])
    got = [(result.prompt_token_ids, len(result.outputs[0].token_ids)) for result in results]
    expected = list(zip(prompts, counts, strict=True))
    assert got == expected, f"(prompt, tokens): expected {expected}, got {got}. {LOOK_LLM}"
    assert small.generate([], greedy(5)) == [], f"no prompts, no answers. {LOOK_LLM}"


@pytest.mark.parametrize(
    ("prompts", "params"),
    [
        ([[100], [101]], [greedy(3)]),
        ([[100]], [greedy(3), greedy(3)]),
        ([[100], [101]], [greedy(3), greedy(3, n=2)]),
        ([[100], []], greedy(3)),
        ([[100], [101] * 5_000], greedy(3)),
    ],
    ids=["too few params", "too many params", "n", "empty prompt", "too long"],
)
def test_generate_refuses_before_it_queues(
    llm: LLM, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]
) -> None:
    before = llm.engine.num_steps
    with pytest.raises(FieldError):
        llm.generate(prompts, params)
    assert llm.engine.num_steps == before, f"bad input is refused before anything is computed. {LOOK_LLM}"
    assert not llm.engine.has_unfinished_requests, f"bad input was refused, and requests are queued. {LOOK_LLM}"


@pytest.mark.slow
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_generate_leaves_nothing_behind_when_a_step_fails(
    make_llm: Callable[..., LLM], prompt_of: PromptOf, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """Else the next call would get tokens of this one's requests."""
    llm = make_llm(max_num_seqs=2)
    expected = llm.generate([prompt_of(5)], greedy(6))[0].outputs
    execute = llm.engine.executor.execute

    def fail(step: StepInput) -> StepOutput:
        if not step.new_requests:  # the second step
            raise error("the cat sat on it")
        return execute(step)

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(llm.engine.executor, "execute", fail)
        llm.generate([prompt_of(3, number) for number in range(3)], greedy(6))
    check_invariant(llm.engine, "after a step that failed")
    assert not llm.engine.has_unfinished_requests, f"a step failed, and its requests are still there. {LOOK_LLM}"
    got = llm.generate([prompt_of(5)], greedy(6))[0].outputs
    assert got == expected, f"after a failed call: expected {expected}, got {got}. {LOOK_LLM}"


# Where a step's time goes (bench.py)


@pytest.mark.slow
def test_the_parts_of_a_step_add_up(make_engine: MakeEngine, prompt_of: PromptOf) -> None:
    """Every function is timed once, and its time does not count for the one that calls it; then the timers are gone."""
    engine = make_engine()
    forward = runner_of(engine).model.norm.forward
    engine.add_request("0", prompt_of(5), greedy(3))
    engine.step()
    engine.add_request("1", prompt_of(9), greedy(1))
    with step_timer(engine) as timer:
        whole = timer.timed("rest of the step", engine.step)
        outputs = whole()
    assert [output.request_id for output in outputs] == ["0", "1"], f"a decode and a prefill, got {outputs}."
    look = "Look at lab/step_times.py::step_timer."
    assert list(timer.seconds) == list(PARTS), f"got {list(timer.seconds)}. {look}"
    assert min(timer.seconds.values()) > 0, f"a part was never timed: {timer.seconds}. {look}"
    assert runner_of(engine).model.norm.forward == forward, f"the timers stay after the block. {look}"
    before = dict(timer.seconds)
    finish(engine)
    assert timer.seconds == before, f"the timers stay after the block. {look}"
