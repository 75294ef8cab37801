"""LLMEngine and LLM: the batch does not change an answer, the blocks add up, and the order is the queue's."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from common.checkpoint import load_model, resolve_checkpoint
from common.errors import FieldError
from common.outputs import CompletionOutput, Logprob, join_outputs
from common.sampling_params import SamplingParams
from common.testing import FAMILIES, assert_same_greedy, reference_greedy
from part03_paged_attention.config import EngineConfig
from part03_paged_attention.core.block_manager import BlockManager
from part03_paged_attention.core.engine import LLMEngine
from part03_paged_attention.core.request import Request, RequestStatus, check_stop
from part03_paged_attention.core.validation import check_request
from part03_paged_attention.llm import LLM
from part03_paged_attention.messages import EngineCoreOutput, StepInput, StepOutput

LOOK_FORM = 'Look at core/engine.py::LLMEngine._form_batch; README "Static batches".'
LOOK_GROW = 'Look at core/engine.py::LLMEngine._grow_batch and _preempt; README "Static batches".'
LOOK_STEP = 'Look at core/engine.py::LLMEngine.step and _update; README "Static batches".'
LOOK_ROWS = 'Look at core/engine.py::LLMEngine._describe and _leave_batch; README "Static batches".'
LOOK_SHARE = 'Look at core/engine.py::LLMEngine._schedule and _share; README "Static batches".'
LOOK_ABORT = 'Look at core/engine.py::LLMEngine.abort_requests; README "Static batches".'
LOOK_FAIL = 'Look at core/engine.py::LLMEngine.fail; README "Static batches".'
LOOK_CHECK = 'Look at core/validation.py::check_request; README "Static batches".'
LOOK_STOP = (
    'Look at core/engine.py::LLMEngine._append and core/request.py::check_stop; README of part 1, "When to stop".'
)
LOOK_LLM = 'Look at llm.py::LLM.generate; README "Static batches".'
LOOK_ORACLE = 'Look at worker/model_runner.py::ModelRunner.execute and _metadata; README "Attention through a table".'
MAX_STEPS = 2_000  # far more than any of these tests needs
PROMPT = [980, 899, 414, 14, 1115, 469, 288, 265, 1321, 274]  # "One fine day, Nora went to the market and"
EOS = frozenset({2, 3})


def guard(engine: LLMEngine) -> None:
    """Check what must be true before and after each call of its methods, so that a mistake ends in a sentence
    and not in an IndexError."""
    grow, form, preempt = engine.blocks.grow, engine._form_batch, engine._preempt

    def checked_grow(request_id: str, num_tokens: int) -> bool:
        assert request_id in engine.blocks.block_tables, (
            f"request {request_id} asks for a block, and is not in the batch: it was preempted before. {LOOK_GROW}"
        )
        return grow(request_id, num_tokens)

    def checked_form() -> None:
        queue = ids(engine.waiting)
        form()
        batch, waiting, statuses = ids(engine.running), ids(engine.waiting), {r.status.name for r in engine.running}
        assert sorted(batch + waiting) == sorted(queue), (
            f"{queue} waited: expected each in the batch or the queue, got batch {batch}, queue {waiting}. {LOOK_FORM}"
        )
        assert len(batch) <= engine.max_num_seqs, (
            f"max_num_seqs={engine.max_num_seqs}: expected at most as many in a batch, got {batch}. {LOOK_FORM}"
        )
        assert statuses <= {"RUNNING"}, (
            f"the batch {batch}: expected status RUNNING, got {sorted(statuses)}. {LOOK_FORM}"
        )
        without = [name for name in batch if name not in engine.blocks.block_tables]
        assert not without, f"requests {without} are in the batch, and hold no blocks. {LOOK_FORM}"

    def checked_preempt(request: Request) -> None:
        assert request in engine.running, (
            f"request {request.request_id} is preempted: expected one of the batch, {ids(engine.running)}. {LOOK_GROW}"
        )
        preempt(request)

    engine.blocks.grow, engine._form_batch, engine._preempt = checked_grow, checked_form, checked_preempt  # type: ignore


@pytest.fixture
def small(small_directory: Callable[[str], Any]) -> Callable[..., LLMEngine]:
    """An engine over a small random model; flags are EngineConfig's."""

    def make(family: str = "llama", **flags: Any) -> LLMEngine:
        flags = {"num_kv_blocks": 1_000, **flags}
        engine = LLMEngine(EngineConfig(model=str(small_directory(family)[0]), device="cpu", **flags))
        guard(engine)
        return engine

    return make


@pytest.fixture(scope="module")
def tiny() -> LLM:
    return LLM(EngineConfig(model="tiny", device="cpu", num_kv_blocks=200))


def greedy(num_tokens: int, **fields: Any) -> SamplingParams:
    """Exactly num_tokens greedy tokens."""
    return SamplingParams(**{"temperature": 0, "max_tokens": num_tokens, "ignore_eos": True, **fields})


def prompt_of(length: int, seed: int = 0, vocab_size: int = 320) -> list[int]:
    rng = random.Random(1_000 * seed + length)
    return [rng.randrange(vocab_size) for _ in range(length)]


def ids(requests: Sequence[Request]) -> list[str]:
    return [request.request_id for request in requests]


def check_invariant(engine: LLMEngine, where: str) -> None:
    """Between two steps: blocks and rows add up, none has two owners, and a running request holds what it needs."""
    blocks = engine.blocks
    used, free, total = blocks.num_used_blocks, blocks.num_free_blocks, blocks.num_blocks - 1
    assert used + free == total, f"{where}: used {used} + free {free} blocks, expected {total} together. {LOOK_STEP}"
    owned = [block for table in blocks.block_tables.values() for block in table]
    assert len(set(owned)) == len(owned) and 0 not in owned, f"{where}: tables {blocks.block_tables}. {LOOK_STEP}"
    assert set(blocks.block_tables) == set(ids(engine.running)), (
        f"{where}: requests {ids(engine.running)} run, block tables have {sorted(blocks.block_tables)}. {LOOK_STEP}"
    )
    rows = [*engine.free_rows, *(request.row for request in engine.running)]
    assert sorted(rows) == list(range(engine.max_num_seqs)), (  # type: ignore[type-var]
        f"{where}: free rows {engine.free_rows}, rows of {ids(engine.running)} "
        f"{[request.row for request in engine.running]}: expected each of {engine.max_num_seqs} once. {LOOK_ROWS}"
    )
    for request in engine.running:
        table = blocks.block_tables[request.request_id]
        expected = blocks.num_blocks_for(request.num_tokens - 1)
        assert len(table) == expected, (
            f"{where}: request {request.request_id} has keys for {request.num_tokens - 1} tokens "
            f"(block_size={blocks.block_size}): expected {expected} blocks, got {len(table)}. {LOOK_GROW}"
        )
        assert request.num_sent_blocks == len(table), (
            f"{where}: request {request.request_id} holds {len(table)} blocks, the worker knows "
            f"{request.num_sent_blocks}. {LOOK_SHARE}"
        )
        status = request.status.name
        assert status == "RUNNING", (
            f"{where}, request {request.request_id}: expected RUNNING, got {status}. {LOOK_STEP}"
        )
    for request in engine.waiting:
        expected_status = RequestStatus.PREEMPTED if request.output_token_ids else RequestStatus.WAITING
        got = (request.status, request.row, request.num_sent_blocks)
        assert got == (expected_status, None, 0), (
            f"{where}: request {request.request_id} waits with {len(request.output_token_ids)} output tokens: expected "
            f"(status, row, blocks sent) {(expected_status, None, 0)}, got {got}. {LOOK_GROW}"
        )
    everywhere = ids([*engine.running, *engine.waiting])
    assert len(set(everywhere)) == len(everywhere), f"{where}: a request is in the engine twice: {everywhere}."
    if not engine.running:
        assert free == total, f"{where}: nothing runs, expected all {total} blocks free, got {free}. {LOOK_STEP}"


@dataclass
class Answer:
    """All of a request's outputs as one."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | None = None

    def add(self, output: EngineCoreOutput, where: str) -> None:
        assert output.error is None, f"{where}: request {output.request_id} failed: {output.error}. {LOOK_STEP}"
        assert len(output.token_ids) == 1, f"{where}: a step gives a request one token, got {output}. {LOOK_STEP}"
        assert self.finish_reason is None, f"{where}: request {output.request_id} had ended. {LOOK_STEP}"
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs or []
        self.finish_reason, self.stop_reason = output.finish_reason, output.stop_reason


@dataclass
class Run:
    """The result of stepping until nothing is left: an answer for each request, and the batch of each step."""

    answers: dict[str, Answer]
    batches: list[list[str]]  # of each step: which requests got an output


def add(engine: LLMEngine, lengths: Sequence[int], params: SamplingParams | Sequence[SamplingParams]) -> None:
    """Queue requests "0", "1", … with prompts of these lengths."""
    each = [params] * len(lengths) if isinstance(params, SamplingParams) else params
    for number, (length, one) in enumerate(zip(lengths, each, strict=True)):
        engine.add_request(str(number), prompt_of(length, number), one)


def finish(engine: LLMEngine, on_step: Callable[[int], None] = lambda number: None) -> Run:
    """Step until nothing is left; on_step(number) is called before each step."""
    run = Run({}, [])
    while engine.has_unfinished_requests:
        number = len(run.batches)
        assert number < MAX_STEPS, (
            f"{number} steps: expected no request, got {ids(engine.running)} in the batch. {LOOK_STEP}"
        )
        on_step(number)
        outputs = engine.step()
        where = f"after step {number}"
        assert outputs or not engine.has_unfinished_requests, (
            f"{where}, {ids(engine.waiting)} wait, {ids(engine.running)} run: expected outputs, got none. {LOOK_FORM}"
        )
        check_invariant(engine, where)
        for output in outputs:
            run.answers.setdefault(output.request_id, Answer()).add(output, where)
        run.batches.append([output.request_id for output in outputs])
    check_invariant(engine, "at the end")
    return run


def run(engine: LLMEngine, lengths: Sequence[int], params: SamplingParams | Sequence[SamplingParams]) -> Run:
    add(engine, lengths, params)
    return finish(engine)


def tokens(answers: dict[str, Answer]) -> list[list[int]]:
    return [answers[request_id].token_ids for request_id in sorted(answers, key=int)]


def num_computed(engine: LLMEngine) -> int:
    return engine.executor.worker.runner.num_tokens_computed


# The oracle

LENGTHS = [1, 2, 15, 16, 17, 31, 33, 90]
MAX_TOKENS = [20, 3, 20, 17, 20, 1, 20, 20]


@pytest.fixture(scope="module")
def expected_tokens(small_directory: Callable[[str], Any]) -> Iterator[Callable[[str], list[list[int]]]]:
    """What transformers answers to the prompts of LENGTHS, computed once for each family."""
    found: dict[str, list[list[int]]] = {}

    def answers(family: str) -> list[list[int]]:
        if family not in found:
            found[family] = [
                reference_greedy(small_directory(family)[1], prompt_of(length, number), num_tokens)
                for number, (length, num_tokens) in enumerate(zip(LENGTHS, MAX_TOKENS, strict=True))
            ]
        return found[family]

    yield answers


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        dict(block_size=16),
        dict(block_size=1),
        dict(block_size=16, max_num_seqs=3),
        dict(block_size=16, max_num_batched_tokens=90),
        dict(block_size=16, num_kv_blocks=1 + 9),
        dict(block_size=4, num_kv_blocks=1 + 32),
        dict(block_size=1, num_kv_blocks=1 + 115),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers_in_every_pool(
    small: Callable[..., LLMEngine],
    small_directory: Callable[[str], Any],
    expected_tokens: Callable[[str], list[list[int]]],
    family: str,
    flags: dict[str, int],
) -> None:
    engine = small(family, **flags)
    got = run(engine, LENGTHS, [greedy(num_tokens) for num_tokens in MAX_TOKENS])
    for number, expected in enumerate(expected_tokens(family)):
        where = f"{family}, {flags}, request {number} (prompt of {LENGTHS[number]}). {LOOK_ORACLE} Difference"
        prompt = prompt_of(LENGTHS[number], number)
        assert_same_greedy(small_directory(family)[1], prompt, got.answers[str(number)].token_ids, expected, where)
    if "num_kv_blocks" in flags:
        assert engine.num_preemptions > 0, (
            f"{family}, {flags}: the pool is small, expected preemptions, got none. {LOOK_GROW}"
        )
    else:
        assert engine.num_preemptions == 0, f"{family}, {flags}: {engine.num_preemptions} preemptions. {LOOK_GROW}"


TEXTS = (
    "What is a KV cache?",
    "Once upon a time there was",
    "a",
    "🦊🦊🦊 and a 🐻",
    "def add(a, b):\n    return a +",
    "Nora lived in a small village by the river. Every morning she walked to the old mill and counted the ducks. " * 3,
    "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n",
)


@pytest.fixture(scope="module")
def tiny_expected(tiny: LLM) -> list[list[int]]:
    reference = load_model(resolve_checkpoint("tiny"), torch.float32, "cpu")
    eos = sorted(tiny.engine.eos_token_ids)
    return [reference_greedy(reference, tiny.tokenizer.encode(text), 16, eos) for text in TEXTS]


@pytest.mark.slow
@pytest.mark.parametrize("num_kv_blocks", [200, 1 + 7])
def test_the_shipped_model_equals_transformers(
    tiny: LLM, tiny_expected: list[list[int]], num_kv_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny.engine, "blocks", BlockManager(num_kv_blocks, 16))
    monkeypatch.setattr(tiny.engine, "num_preemptions", 0)
    prompts = [tiny.tokenizer.encode(text) for text in TEXTS]
    results = tiny.generate(prompts, SamplingParams(temperature=0, max_tokens=16))
    reference = load_model(resolve_checkpoint("tiny"), torch.float32, "cpu")
    for text, prompt, result, expected in zip(TEXTS, prompts, results, tiny_expected, strict=True):
        where = f"prompt {text[:40]!r}, {num_kv_blocks} blocks. {LOOK_ORACLE} Difference"
        assert_same_greedy(reference, prompt, result.outputs[0].token_ids, expected, where)
    is_small = num_kv_blocks < 200
    assert (tiny.engine.num_preemptions > 0) is is_small, (
        f"{num_kv_blocks} blocks: got {tiny.engine.num_preemptions} preemptions. {LOOK_GROW}"
    )


# Steps


def test_a_static_batch_lasts_as_long_as_its_longest_answer(small: Callable[..., LLMEngine]) -> None:
    engine = small(max_num_seqs=4)
    got = run(engine, [5] * 8, [greedy(num_tokens) for num_tokens in [2, 2, 2, 20] * 2])
    assert engine.num_steps == 40, (
        f"answers of [2, 2, 2, 20] tokens, twice, four at a time: expected 20 + 20 = 40 steps, got {engine.num_steps}. "
        f"{LOOK_STEP}"
    )
    expected = ([["0", "1", "2", "3"]] * 2 + [["3"]] * 18) + ([["4", "5", "6", "7"]] * 2 + [["7"]] * 18)
    assert got.batches == expected, (
        f"which requests got a token in each step: expected {expected}, got {got.batches}. {LOOK_STEP}"
    )


def test_no_new_request_enters_a_running_batch(small: Callable[..., LLMEngine]) -> None:
    engine = small(max_num_seqs=4)
    engine.add_request("first", prompt_of(5), greedy(4))

    def on_step(number: int) -> None:
        if number == 1:
            engine.add_request("late", prompt_of(6), greedy(2))

    got = finish(engine, on_step).batches
    expected = [["first"]] * 4 + [["late"]] * 2
    assert got == expected, f"a request that comes while a batch runs: expected {expected}, got {got}. {LOOK_STEP}"


@pytest.mark.parametrize("block_size", [1, 16])
def test_positions_computed(small: Callable[..., LLMEngine], block_size: int) -> None:
    """A prompt in one pass, then one position a token; the last token's key and value are never computed."""
    engine, lengths, num_tokens = small(block_size=block_size), [10, 1, 33, 7], [20, 1, 5, 9]
    run(engine, lengths, [greedy(count) for count in num_tokens])
    expected = sum(length + count - 1 for length, count in zip(lengths, num_tokens, strict=True))
    got = num_computed(engine)
    assert got == expected, (
        f"prompts of {lengths}, answers of {num_tokens}: expected sum(P + G - 1) = {expected} positions, got {got}. "
        'Look at worker/model_runner.py::ModelRunner.execute; README "Static batches".'
    )
    assert engine.num_steps == 20, f"the longest answer has 20 tokens: expected 20 steps, got {engine.num_steps}."


def test_a_step_with_nothing_to_do(small: Callable[..., LLMEngine]) -> None:
    engine = small()
    assert engine.step() == [] and engine.num_steps == 0, f"an idle engine computes nothing. {LOOK_STEP}"
    assert not engine.has_unfinished_requests, f"an idle engine has nothing unfinished. {LOOK_STEP}"


def test_outputs_of_a_step(small: Callable[..., LLMEngine]) -> None:
    engine = small()
    add(engine, [5, 6], [greedy(1), greedy(2, logprobs=1)])
    first, second = engine.step()
    assert (first.request_id, first.finish_reason, first.logprobs) == ("0", "length", None), f"{first}. {LOOK_STEP}"
    assert (second.request_id, second.finish_reason, second.error) == ("1", None, None), f"{second}. {LOOK_STEP}"
    assert [list(entry) for entry in second.logprobs or []] == [second.token_ids], f"{second}. {LOOK_STEP}"
    [last] = engine.step()
    assert (last.request_id, last.finish_reason) == ("1", "length"), f"got {last}. {LOOK_STEP}"


def test_the_pieces_of_an_answer(tiny: LLM) -> None:
    engine, processor = tiny.engine, tiny.processor
    for number in range(3):
        processor.add_request(str(number), PROMPT[number:], greedy(12))
        engine.add_request(str(number), PROMPT[number:], greedy(12))
    pieces: dict[str, list[CompletionOutput]] = {"0": [], "1": [], "2": []}
    while engine.has_unfinished_requests:
        answers, stopped = processor.process(engine.step())
        assert not stopped, f"no request has stop strings, got {stopped}. {LOOK_LLM}"
        for request_id, output in answers:
            pieces[request_id].append(output)
    for request_id, outputs in pieces.items():
        reasons = [output.finish_reason for output in outputs]
        assert reasons == [None] * 11 + ["length"], f"request {request_id}: only the last has a reason: {reasons}."
        answer = join_outputs(outputs)
        expected = tiny.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
        assert answer.text == expected, f"request {request_id}: the tokens say {expected!r}, got {answer.text!r}."
        assert {output.index for output in outputs} == {0} and answer.logprobs is None, f"got {outputs}. {LOOK_LLM}"


def watch_steps(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> list[StepInput]:
    """Every step that the engine sends to the worker, from now on."""
    steps, execute = list[StepInput](), engine.executor.execute

    def watched(step: StepInput) -> StepOutput:
        steps.append(step)
        return execute(step)

    monkeypatch.setattr(engine.executor, "execute", watched)
    return steps


def test_what_core_sends_by_hand(small: Callable[..., LLMEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of 3 and 4 tokens in blocks of 4: the second request gets a block with its first output token."""
    engine = small(block_size=4, max_num_seqs=2)
    steps = watch_steps(engine, monkeypatch)
    run(engine, [3, 4], greedy(3))
    new = [(each.row, each.token_ids, each.num_prompt_tokens) for each in steps[0].new_requests]
    assert new == [(0, prompt_of(3, 0), 3), (1, prompt_of(4, 1), 4)], f"new requests: got {new}. {LOOK_ROWS}"
    assert not steps[1].new_requests and not steps[2].new_requests, f"a request is new once, got {steps}. {LOOK_SHARE}"
    got = [
        [(s.row, s.num_computed_tokens, s.num_scheduled_tokens, s.new_block_ids) for s in step.requests]
        for step in steps
    ]
    expected = [
        [(0, 0, 3, [1]), (1, 0, 4, [2])],
        [(0, 3, 1, []), (1, 4, 1, [3])],
        [(0, 4, 1, [4]), (1, 5, 1, [])],
    ]
    assert got == expected, (
        f"(row, computed, scheduled, new blocks) of each step: expected {expected}, got {got}. {LOOK_SHARE}"
    )


def test_a_preempted_request_is_sent_anew(small: Callable[..., LLMEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    """With its output, the length of its prompt, and all of its new blocks."""
    engine = small(block_size=4, num_kv_blocks=1 + 3)
    steps = watch_steps(engine, monkeypatch)
    answers = run(engine, [4, 4], greedy(6)).answers
    [again] = [step for step in steps[1:] if step.new_requests]
    [new], [share] = again.new_requests, again.requests
    expected = (prompt_of(4, 1) + answers["1"].token_ids[:1], 4)
    assert (new.token_ids, new.num_prompt_tokens) == expected, f"expected {expected}, got {new}. {LOOK_ROWS}"
    got = (share.num_computed_tokens, share.num_scheduled_tokens, len(share.new_block_ids))
    assert got == (0, 5, 2), f"(computed, scheduled, new blocks): expected (0, 5, 2), got {got}. {LOOK_SHARE}"


# Admission


@pytest.mark.parametrize(
    ("flags", "lengths", "expected"),
    [
        (dict(max_num_seqs=2), [5, 5, 5, 5, 5], "01"),
        (dict(max_num_seqs=1), [5, 5], "0"),
        (dict(), [5, 5, 5, 5, 5], "01234"),
        (dict(max_num_batched_tokens=20), [10, 10, 1], "01"),
        (dict(max_num_batched_tokens=20), [10, 11, 1], "0"),
        (dict(max_num_batched_tokens=20), [20, 1], "0"),
        (dict(num_kv_blocks=1 + 10), [64, 64, 64], "01"),
        (dict(num_kv_blocks=1 + 10), [64, 64, 33, 16], "01"),  # the last would fit, but comes after
        (dict(num_kv_blocks=1 + 10), [64, 64, 32, 1], "012"),
        (dict(num_kv_blocks=1 + 3), [16, 16, 16, 16], "012"),
        (dict(num_kv_blocks=1 + 10, max_num_batched_tokens=100), [64, 40, 1], "0"),
    ],
    ids=str,
)
def test_admission(small: Callable[..., LLMEngine], flags: dict[str, int], lengths: list[int], expected: str) -> None:
    """From the head of the queue, until one does not fit; none behind it jumps the queue."""
    engine = small(**flags)
    add(engine, lengths, greedy(2))
    engine.step()
    got = "".join(ids(engine.running))
    assert got == expected, (
        f"{flags}, prompts of {lengths} tokens: expected requests {expected} in the first batch, got {got}. {LOOK_FORM}"
    )
    left, rest = "".join(ids(engine.waiting)), "".join(map(str, range(len(lengths))))[len(expected) :]
    assert left == rest, f"{flags}: expected {rest!r} to wait, got {left!r}. {LOOK_FORM}"
    free = engine.blocks.num_blocks - 1 - sum(-(-length // 16) for length in lengths[: len(expected)])
    assert engine.blocks.num_free_blocks == free, (
        f"{flags}, prompts of {lengths}, {expected} run: expected {free} free blocks, got "
        f"{engine.blocks.num_free_blocks}. A prompt takes only the blocks it fills. {LOOK_FORM}"
    )
    check_invariant(engine, f"{flags}, after the first step")


def test_requests_are_served_in_their_order(small: Callable[..., LLMEngine]) -> None:
    """First come, first served, whatever is short and whatever is long."""
    engine = small(max_num_seqs=3, max_num_batched_tokens=64, num_kv_blocks=1 + 6)
    lengths = [40, 5, 30, 60, 1, 64, 2, 2, 2, 50]
    batches = run(engine, lengths, greedy(3)).batches
    got = list(dict.fromkeys(request_id for batch in batches for request_id in batch))
    assert got == [str(number) for number in range(10)], (
        f"the order in which requests begin: expected 0 to 9, got {got}. {LOOK_FORM}"
    )


def test_a_request_that_outgrew_the_token_budget_gets_its_turn(small: Callable[..., LLMEngine]) -> None:
    """Two of 4 tokens share a budget of 8 and a pool of 5 blocks. The second is preempted with 9 tokens."""
    engine = small(block_size=4, num_kv_blocks=1 + 5, max_num_batched_tokens=8)
    got = run(engine, [4, 4, 4], greedy(12))
    assert engine.num_preemptions > 0, f"the pool is small: expected preemptions, got none. {LOOK_GROW}"
    alone = run(small(block_size=4), [4, 4, 4], greedy(12))
    expected, actual = tokens(alone.answers), tokens(got.answers)
    assert actual == expected, f"the answers that each gets alone: expected {expected}, got {actual}. {LOOK_FORM}"
    shared = [batch for batch in got.batches[12:] if len(batch) > 1 and "1" in batch]
    assert not shared, (
        f"request 1 returns with 9 tokens, more than the budget of 8: expected it alone, got {shared}. {LOOK_FORM}"
    )


# Preemption


def test_a_preempted_request_by_hand(small: Callable[..., LLMEngine]) -> None:
    """Blocks of 4, three of them, two prompts of 4: at the fifth token both want a block, and one is left."""
    engine = small(block_size=4, num_kv_blocks=1 + 3)
    add(engine, [4, 4], greedy(6))
    engine.step()
    first, second = engine.running
    kept = list(second.output_token_ids)
    engine.step()
    assert (ids(engine.running), ids(engine.waiting)) == (["0"], ["1"]), (
        f"the first request takes the last block, the second goes back: expected 0 to run and 1 to wait, got "
        f"{ids(engine.running)} and {ids(engine.waiting)}. {LOOK_GROW}"
    )
    got = (second.status, second.output_token_ids, "1" in engine.blocks.block_tables)
    assert got == (RequestStatus.PREEMPTED, kept, False), (
        f"a preempted request waits, keeps its tokens {kept} and no blocks: (status, tokens, has blocks) is {got}. "
        f"{LOOK_GROW}"
    )
    assert len(first.output_token_ids) == 2, f"the first has 2 tokens by now, got {first.output_token_ids}. {LOOK_GROW}"
    finish(engine)
    counters = (engine.num_preemptions, engine.num_steps, num_computed(engine))
    assert counters == (1, 6 + 5, (4 + 5) + (4 + 5 + 4)), (
        f"(preemptions, steps, positions): expected (1, 11, 22) – the second computes its 4 + 1 tokens again, in one "
        f"prefill – got {counters}. {LOOK_GROW}"
    )


def test_the_latest_is_preempted_first(small: Callable[..., LLMEngine]) -> None:
    """Three of 4 tokens fill three blocks of 4; a fourth waits. The next step leaves room for the first alone."""
    engine = small(block_size=4, num_kv_blocks=1 + 3, max_num_seqs=3)
    add(engine, [4, 4, 4, 4], greedy(6))
    engine.step()
    assert ids(engine.running) == ["0", "1", "2"], f"expected 0, 1 and 2 to run, got {ids(engine.running)}. {LOOK_FORM}"
    outputs = engine.step()
    assert [output.request_id for output in outputs] == ["0"], (
        f"request 0 takes the block of request 2, then there is none for 1: expected a token for 0, got {outputs}. "
        f"{LOOK_GROW}"
    )
    assert ids(engine.waiting) == ["1", "2", "3"], (
        f"preempted requests go to the head of the queue, in their order: expected 1, 2, 3, got {ids(engine.waiting)}. "
        f"{LOOK_GROW}"
    )
    assert engine.num_preemptions == 2, f"expected 2 preemptions, got {engine.num_preemptions}. {LOOK_GROW}"
    check_invariant(engine, "after two preemptions")


def test_a_request_grows_into_a_free_block_before_another_is_preempted(small: Callable[..., LLMEngine]) -> None:
    engine = small(block_size=4, num_kv_blocks=1 + 4)
    add(engine, [4, 4], greedy(4))
    finish(engine)
    assert engine.num_preemptions == 0, (
        f"two blocks are free when two requests cross into their second: expected no preemption, got "
        f"{engine.num_preemptions}. {LOOK_GROW}"
    )


def test_only_a_request_that_begins_a_new_block_gets_one(small: Callable[..., LLMEngine]) -> None:
    engine = small(block_size=4, num_kv_blocks=1 + 8)
    add(engine, [3, 4, 2], greedy(5))
    expected = {0: [1, 1, 1], 1: [1, 2, 1], 2: [2, 2, 1], 3: [2, 2, 2]}  # after each step
    for number, counts in expected.items():
        engine.step()
        got = [len(engine.blocks.block_tables[request_id]) for request_id in "012"]
        assert got == counts, (
            f"prompts of 3, 4 and 2 tokens in blocks of 4, after step {number}: expected {counts} blocks, got {got}. "
            f"{LOOK_GROW}"
        )


def test_the_oldest_request_is_never_preempted_for_a_later_one(small: Callable[..., LLMEngine]) -> None:
    """However small the pool is: so all requests end."""
    engine = small(block_size=1, num_kv_blocks=1 + 24)
    add(engine, [5] * 6, greedy(20))

    def check_order(number: int) -> None:
        unfinished = ids([*engine.running, *engine.waiting])
        in_order = sorted(unfinished, key=int)
        assert unfinished == in_order, (
            f"before step {number}: expected the order {in_order}, got {unfinished}. {LOOK_GROW}"
        )

    got = finish(engine, check_order)
    lengths = [len(answer) for answer in tokens(got.answers)]
    assert lengths == [20] * 6, f"six answers: expected 20 tokens each, got {lengths}. {LOOK_GROW}"
    assert engine.num_preemptions > 5, f"expected more than 5 preemptions, got {engine.num_preemptions}. {LOOK_GROW}"


MIXED = [
    dict(),
    dict(repetition_penalty=1.5),
    dict(presence_penalty=1.5, frequency_penalty=1.0),
    dict(frequency_penalty=-2.0),
    dict(temperature=1.0, seed=3),
    dict(temperature=0.7, seed=4, top_k=20, top_p=0.9, repetition_penalty=1.2),
    dict(logit_bias={7: 20.0}, frequency_penalty=2.0),
    dict(temperature=1.0, seed=3),
]


@pytest.fixture(scope="module")
def mixed_alone(small_directory: Callable[[str], Any]) -> list[Answer]:
    """Each request of MIXED by itself, in a pool with room for all of it."""
    engine, answers = (
        LLMEngine(EngineConfig(model=str(small_directory("qwen3")[0]), device="cpu", num_kv_blocks=100)),
        [],
    )
    for number, fields in enumerate(MIXED):
        engine.add_request("0", prompt_of(6 + number % 3, number % 3), greedy(24, logprobs=2, **fields))
        answers.append(finish(engine).answers["0"])
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("order", ["first to last", "last to first", "shuffled"])
@pytest.mark.parametrize("flags", [dict(), dict(block_size=4, num_kv_blocks=1 + 12), dict(max_num_seqs=3)], ids=str)
def test_batch_and_preemption_change_no_answer(
    small: Callable[..., LLMEngine], mixed_alone: list[Answer], flags: dict[str, int], order: str
) -> None:
    """Penalties count tokens from before a preemption, and seeded draws continue where they were."""
    engine = small("qwen3", **flags)
    numbers = list(range(len(MIXED)))
    if order == "last to first":
        numbers.reverse()
    elif order == "shuffled":
        random.Random(0).shuffle(numbers)
    for number in numbers:
        params = greedy(24, logprobs=2, **MIXED[number])
        engine.add_request(str(number), prompt_of(6 + number % 3, number % 3), params)
    got = finish(engine).answers
    for number, expected in enumerate(mixed_alone):
        answer, where = got[str(number)], f"{MIXED[number]} in a batch with {flags}, {order}"
        assert answer.token_ids == expected.token_ids, (
            f"{where}: expected what the request gets alone, {expected.token_ids}, got {answer.token_ids}. Look at "
            "worker/sampler.py::Sampler and at what a preempted request keeps in core/engine.py::LLMEngine._preempt; "
            'README "Static batches".'
        )
        for position, (entry, alone) in enumerate(zip(answer.logprobs, expected.logprobs, strict=True)):
            assert list(entry) == list(alone), f"{where}, token {position}: logprobs {entry}, alone {alone}."
            for token_id, logprob in entry.items():
                assert logprob.logprob == pytest.approx(alone[token_id].logprob, abs=1e-3), f"{where}: {entry}, {alone}"
    assert (engine.num_preemptions > 0) is ("num_kv_blocks" in flags), (
        f"{flags}: got {engine.num_preemptions} preemptions. {LOOK_GROW}"
    )


@pytest.mark.slow
def test_the_mixed_requests_differ(mixed_alone: list[Answer]) -> None:
    """Else the test above would prove nothing."""
    plain = [answer.token_ids for answer in mixed_alone]
    for number in (1, 2, 3, 5, 6):
        same = [other for other in range(len(plain)) if other != number and other % 3 == number % 3]
        assert all(plain[number] != plain[other] for other in same), f"{MIXED[number]} changes nothing: {plain}"


# Abort

ABORT_LENGTHS = [5, 20, 3, 16, 7]


@pytest.fixture(scope="module")
def answers_of_8(small_directory: Callable[[str], Any]) -> list[list[int]]:
    """What requests of ABORT_LENGTHS answer if none is aborted."""
    engine = LLMEngine(EngineConfig(model=str(small_directory("llama")[0]), device="cpu", num_kv_blocks=100))
    return tokens(run(engine, ABORT_LENGTHS, greedy(8)).answers)


def abort(engine: LLMEngine, *request_ids: str) -> None:
    engine.abort_requests(request_ids)
    remaining = ids([*engine.running, *engine.waiting])
    for request_id in request_ids:
        assert request_id not in remaining, f"aborted request {request_id} is still there: {remaining}. {LOOK_ABORT}"
        assert request_id not in engine.blocks.block_tables, f"aborted request {request_id} holds blocks. {LOOK_ABORT}"
    check_invariant(engine, f"after the abort of {request_ids}")


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [0, 1, 2, 5])
@pytest.mark.parametrize("which", ["0", "1", "2", "3", "4", "02", "012", "34", "01234", "11"])
def test_abort(small: Callable[..., LLMEngine], answers_of_8: list[list[int]], which: str, num_steps: int) -> None:
    """Waiting or running, first or last or all of a batch, twice: the other answers do not change."""
    engine = small(max_num_seqs=3)
    add(engine, ABORT_LENGTHS, greedy(8))
    pieces: dict[str, list[int]] = {str(number): [] for number in range(5)}
    for _ in range(num_steps):
        for output in engine.step():
            pieces[output.request_id] += output.token_ids
    abort(engine, *which)
    for request_id, answer in finish(engine).answers.items():
        assert request_id not in which, f"aborted request {request_id} got more output. {LOOK_ABORT}"
        pieces[request_id] += answer.token_ids
    for number, answer in enumerate(answers_of_8):
        if str(number) not in which:
            assert pieces[str(number)] == answer, (
                f"requests {which} were aborted after {num_steps} steps: request {number} expects {answer}, got "
                f"{pieces[str(number)]}. {LOOK_ABORT}"
            )


def test_abort_of_an_unknown_request(small: Callable[..., LLMEngine]) -> None:
    engine = small()
    add(engine, [5, 5], [greedy(1), greedy(5)])
    engine.step()
    abort(engine, "0", "unknown")  # 0 has ended
    assert ids(engine.running) == ["1"], f"expected 1 to run on, got {ids(engine.running)}. {LOOK_ABORT}"


def test_abort_of_a_preempted_request(small: Callable[..., LLMEngine]) -> None:
    engine = small(block_size=4, num_kv_blocks=1 + 3)
    add(engine, [4, 4, 4], greedy(6))
    engine.step()
    second = engine.running[1]
    engine.step()
    waiting = ids(engine.waiting)
    assert waiting == ["1", "2"], f"0 takes the last block: expected 1 and 2 to wait, got {waiting}. {LOOK_GROW}"
    abort(engine, "1")
    assert second.status is RequestStatus.FINISHED_ABORTED, f"expected FINISHED_ABORTED, got {second.status}."
    got = finish(engine).answers
    assert sorted(got) == ["0", "2"], f"expected answers for 0 and 2, got {sorted(got)}. {LOOK_ABORT}"


@pytest.mark.slow
def test_aborts_at_random(small: Callable[..., LLMEngine]) -> None:
    """Aborts in a small pool: the requests that remain get the answers they get alone."""
    rng, engine = random.Random(0), small(block_size=4, num_kv_blocks=1 + 14, max_num_seqs=5)
    lengths, aborted = [rng.randint(1, 20) for _ in range(40)], set()
    params = [greedy(rng.randint(1, 20)) for _ in lengths]
    expected = tokens(run(small(), lengths, params).answers)
    add(engine, lengths, params)

    def on_step(number: int) -> None:
        if number % 3 == 1:
            request = rng.choice([*engine.running, *engine.waiting])
            aborted.add(request.request_id)
            abort(engine, request.request_id)

    got = finish(engine, on_step).answers
    assert engine.num_preemptions > 0, "this test needs preemptions"
    for number, answer in enumerate(expected):
        if str(number) not in aborted:
            actual = got[str(number)].token_ids
            assert actual == answer, f"request {number}: expected {answer}, got {actual}. {LOOK_ABORT}"
    assert 5 < len(aborted) < 35, f"this test needs some to be aborted and some not, got {len(aborted)}"


# A failed step: see also tests/contract/test_failed_step.py


def break_once(engine: LLMEngine, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next call raises, whatever it has done before that."""
    worker = engine.executor.worker
    owners = {
        "executor": engine.executor,
        "runner": worker.runner,
        "model": worker.model,
        "sampler": worker.runner.sampler,
    }
    owner, name = owners[where.split(".")[0]], where.split(".")[1]
    works = getattr(owner, name)

    def fail(*args: Any) -> Any:
        monkeypatch.setattr(owner, name, works)
        works(*args)
        raise ZeroDivisionError("the cat sat on it")

    monkeypatch.setattr(owner, name, fail)


BREAKING = ["executor.execute", "runner._prepare", "model.forward", "sampler.sample"]


@pytest.mark.slow
def test_failures_at_random(small: Callable[..., LLMEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps fail anywhere in a small pool. Every request ends once, with its answer or the cause."""
    rng, engine = random.Random(1), small(block_size=4, num_kv_blocks=1 + 14, max_num_seqs=5)
    lengths = [rng.randint(1, 20) for _ in range(60)]
    params = [greedy(rng.randint(1, 20)) for _ in lengths]
    expected = run(small(), lengths, params).answers
    answers, failed, num_failures = dict[str, Answer](), list[str](), 0
    for number, length in enumerate(lengths):
        engine.add_request(str(number), prompt_of(length, number), params[number])
        for _ in range(rng.randint(1, 3)):
            if rng.random() < 0.05:
                break_once(engine, rng.choice(BREAKING), monkeypatch)
                present = ids([*engine.running, *engine.waiting])
                with pytest.raises(ZeroDivisionError) as caught:
                    engine.step()
                failed += (outputs := [output.request_id for output in engine.fail(caught.value)])
                assert sorted(outputs) == sorted(present), f"expected {present} to end, got {outputs}. {LOOK_FAIL}"
                num_failures += 1
                break
            for output in engine.step():
                answers.setdefault(output.request_id, Answer()).add(output, f"request {number} is the newest")
            check_invariant(engine, f"request {number} is the newest")
    for request_id, answer in finish(engine).answers.items():
        answers.setdefault(request_id, Answer()).token_ids += answer.token_ids
        answers[request_id].finish_reason = answer.finish_reason
    assert len(set(failed)) == len(failed), f"requests ended twice: {sorted(failed)}. {LOOK_FAIL}"
    ended = [request_id for request_id, answer in answers.items() if answer.finish_reason]
    assert sorted(ended + failed, key=int) == [str(number) for number in range(60)], (
        f"each of 60 requests ends once: {len(ended)} with an answer, {len(failed)} with an error. {LOOK_FAIL}"
    )
    for request_id in ended:
        got, wanted = answers[request_id].token_ids, expected[request_id].token_ids
        assert got == wanted, f"request {request_id}: expected {wanted}, got {got}. {LOOK_FAIL}"
    assert num_failures > 3 and engine.num_preemptions > 0 and len(ended) > 10, "this test needs some of each"


# What can never be served


def refuse(engine: LLMEngine, prompt: list[int], params: SamplingParams, field: str, *words: str) -> None:
    with pytest.raises(FieldError) as caught:
        engine.add_request("x", prompt, params)
    message = str(caught.value)
    assert caught.value.field == field, f"expected the error to name {field}, got {caught.value.field}. {LOOK_CHECK}"
    for word in words:
        assert word in message, f"the message must name value and limit, {word!r}: {message!r}. {LOOK_CHECK}"
    assert not engine.has_unfinished_requests, f"a refused request was queued. {LOOK_CHECK}"


@pytest.mark.slow
@pytest.mark.parametrize(("length", "num_tokens"), [(40, 9), (1, 48), (47, 2), (48, 1)])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_the_largest_request_that_fits(
    small: Callable[..., LLMEngine], block_size: int, length: int, num_tokens: int
) -> None:
    """48 slots hold a prompt and an answer of 49 tokens together, since the last token is never stored."""
    engine = small(block_size=block_size, num_kv_blocks=1 + 48 // block_size)
    got = run(engine, [length], greedy(num_tokens))
    count = len(got.answers["0"].token_ids)
    assert (count, engine.num_preemptions) == (num_tokens, 0), (
        f"a prompt of {length} and {num_tokens} tokens in 48 slots: expected all tokens and no preemption, got {count} "
        f"tokens and {engine.num_preemptions} preemptions. {LOOK_CHECK}"
    )
    refuse(engine, prompt_of(length), greedy(num_tokens + 1), "prompt", f"{length} tokens", "48 tokens")
    refuse(engine, prompt_of(length + 1), greedy(num_tokens), "prompt", f"{length + 1} tokens", "48 tokens")


def test_the_context_limits_what_a_request_can_need(small: Callable[..., LLMEngine]) -> None:
    """max_tokens beyond the context asks for no more blocks than the context has."""
    engine = small(block_size=16, num_kv_blocks=1 + 2, max_model_len=33)
    answer = run(engine, [20], greedy(1_000)).answers["0"]
    assert (len(answer.token_ids), answer.finish_reason) == (13, "length"), (
        f"a prompt of 20 in a context of 33: expected 13 tokens and 'length', got {answer}. {LOOK_CHECK}"
    )
    refuse(engine, prompt_of(33), greedy(1), "prompt", "33 tokens")
    refuse(engine, prompt_of(500), greedy(1), "prompt", "500 tokens")


def test_a_prompt_beyond_the_token_budget(small: Callable[..., LLMEngine]) -> None:
    engine = small(max_num_batched_tokens=20)
    run(engine, [20], greedy(3))
    refuse(engine, prompt_of(21), greedy(3), "prompt", "max_num_batched_tokens=20", "21")


@pytest.mark.parametrize(
    ("prompt", "fields", "field"),
    [
        ([5, 6], {"n": 2}, "n"),
        ([5, 6], {"stop_token_ids": [320]}, "stop_token_ids"),
        ([5, 6], {"logit_bias": {320: 1.0}}, "logit_bias"),
        ([], {}, "prompt"),
        ([5, 320], {}, "prompt"),
        ([5, -1], {}, "prompt"),
    ],
    ids=str,
)
def test_bad_requests_are_refused(
    small: Callable[..., LLMEngine], prompt: list[int], fields: dict[str, Any], field: str
) -> None:
    engine = small()
    refuse(engine, prompt, greedy(3, **fields), field)
    with pytest.raises(FieldError):
        check_request(prompt, greedy(3, **fields), engine.limits)


def test_max_model_len_is_at_most_the_models(small: Callable[..., LLMEngine]) -> None:
    for asked, expected in ((None, 256), (100, 100), (1_000, 256)):
        got = small(max_model_len=asked).limits.max_model_len
        assert got == expected, f"--max-model-len {asked}, the model has 256: expected {expected}, got {got}."


# When an answer ends


def scripted(engine: LLMEngine, scripts: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request gets the tokens of its script, whatever the model computes."""

    def execute(step: StepInput) -> StepOutput:
        by_row = {request.row: request for request in engine.running}
        requests = [by_row[share.row] for share in step.requests]
        token_ids = [scripts[request.request_id][len(request.output_token_ids)] for request in requests]
        return StepOutput(token_ids, [None] * len(token_ids))

    monkeypatch.setattr(engine.executor, "execute", execute)


def generate_named(
    llm: LLM, requests: dict[str, SamplingParams], monkeypatch: pytest.MonkeyPatch
) -> dict[str, CompletionOutput]:
    """What LLM.generate answers to PROMPT, in one batch. The requests' names are their ids in the engine."""
    monkeypatch.setattr(llm, "_request_ids", iter(requests))
    results = llm.generate([PROMPT] * len(requests), list(requests.values()))
    return {name: result.outputs[0] for name, result in zip(requests, results, strict=True)}


@pytest.mark.parametrize(
    ("output", "fields", "expected"),
    [
        ([10, 11], {}, None),
        ([10, 11], {"max_tokens": 2}, ("length", None)),
        ([10, 2], {"max_tokens": 2}, ("stop", None)),
        ([10, 2], {"ignore_eos": True}, None),
        ([10, 50], {"stop_token_ids": [49, 50], "max_tokens": 2}, ("stop", 50)),
        ([10, 2], {"stop_token_ids": [2]}, ("stop", None)),
        ([10, 2], {"stop_token_ids": [2], "ignore_eos": True}, ("stop", 2)),
        ([2], {"min_tokens": 2}, None),
        ([10, 2], {"min_tokens": 2}, ("stop", None)),
        ([10] * 15, {}, ("length", None)),
        ([10] * 15, {"min_tokens": 100}, ("length", None)),
    ],
    ids=str,
)
def test_check_stop(output: list[int], fields: dict[str, Any], expected: tuple | None) -> None:
    params = SamplingParams(**fields)
    request = Request("a", [7] * 5, params, max_num_tokens=min(5 + params.max_tokens, 20), output_token_ids=output)
    got = check_stop(request, EOS)
    assert got == expected, (
        f"5 prompt tokens, output {output}, {fields}, context of 20: expected {expected}, got {got}. {LOOK_STOP}"
    )


def test_every_stop_rule_in_one_batch(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop strings end a request in the output processor, the other rules in the engine."""
    engine = tiny.engine
    [eos] = engine.eos_token_ids
    words = tiny.tokenizer.encode("a b a b a b", add_special_tokens=False)
    assert len(words) == 6, "this test counts on one token for each letter"
    b = words[1]
    cases: dict[str, tuple[list[int], dict[str, Any], tuple[str, int, str, int | str | None]]] = {
        "length": (words, {"max_tokens": 3}, ("a b a", 3, "length", None)),
        "EOS": ([*words[:2], eos], {}, ("a b", 3, "stop", None)),
        "EOS at max_tokens": ([*words[:2], eos], {"max_tokens": 3}, ("a b", 3, "stop", None)),
        "EOS ignored": ([words[0], eos, *words[1:]], {"ignore_eos": True, "max_tokens": 7},
                        ("a b a b a b", 7, "length", None)),
        "stop token": (words, {"stop_token_ids": [b]}, ("a", 2, "stop", b)),
        "stop string": (words, {"stop": [" b a"]}, ("a", 3, "stop", " b a")),
        "stop string at max_tokens": (words, {"stop": [" b a"], "max_tokens": 3}, ("a", 3, "stop", " b a")),
        "stop string, min_tokens": (words, {"stop": [" b"], "min_tokens": 2}, ("a b a", 4, "stop", " b")),
        "stop token and string": (words, {"stop": [" b"], "stop_token_ids": [b]}, ("a", 2, "stop", b)),
    }  # fmt: skip
    scripted(engine, {name: [*script, *[eos] * 20] for name, (script, _, _) in cases.items()}, monkeypatch)
    requests = {
        name: SamplingParams(**{"temperature": 0, "max_tokens": 16, **fields}) for name, (_, fields, _) in cases.items()
    }
    answers = generate_named(tiny, requests, monkeypatch)
    for name, (_, fields, expected) in cases.items():
        answer = answers[name]
        got = (answer.text, len(answer.token_ids), answer.finish_reason, answer.stop_reason)
        assert got == expected, f"{name}, {fields}: (text, tokens, reasons) expected {expected}, got {got}. {LOOK_STOP}"


def test_min_tokens_holds_stop_tokens_back_in_a_batch(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token that would end the answer cannot be sampled before min_tokens, in these rows and in no others."""
    engine = tiny.engine
    [eos] = engine.eos_token_ids
    model = engine.executor.worker.model

    def compute_logits(hidden: Tensor) -> Tensor:
        logits = torch.zeros(len(hidden), engine.limits.vocab_size)
        logits[:, eos] = 10.0
        return logits

    monkeypatch.setattr(model, "compute_logits", compute_logits)
    fields: dict[str, dict[str, Any]] = {
        "free": {},
        "eos": {"min_tokens": 3},
        "token": {"min_tokens": 4, "ignore_eos": True, "stop_token_ids": [eos]},
        "ignored": {"min_tokens": 4, "ignore_eos": True},
    }
    for name, each in fields.items():
        engine.add_request(name, PROMPT, SamplingParams(**{"temperature": 0, "max_tokens": 6, **each}))
    got = {
        name: (answer.token_ids.index(eos), len(answer.token_ids)) for name, answer in finish(engine).answers.items()
    }
    expected = {"free": (0, 1), "eos": (3, 4), "token": (4, 5), "ignored": (0, 6)}
    assert got == expected, (
        f"EOS is always the likeliest: (first EOS, tokens) expected {expected}, got {got}. Look at "
        'worker/sampler.py::hold_back_stop_tokens; README of part 1, "When to stop".'
    )


@pytest.mark.slow
def test_stop_strings_anywhere_in_an_answer(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of random tokens, also parts of characters: each ends with the token that completes a stop string."""
    rng, scripts, stops = random.Random(0), {}, {}
    for number in range(60):
        script = [rng.choice([rng.randrange(4096), rng.randrange(3, 300)]) for _ in range(20)]
        text = tiny.tokenizer.decode(script, skip_special_tokens=True)
        starts = [rng.randrange(len(text)) for _ in range(rng.randint(1, 4))]
        scripts[str(number)], stops[str(number)] = script, [text[s : s + rng.randint(1, 8)] for s in starts]
    scripted(tiny.engine, scripts, monkeypatch)
    requests = {request_id: greedy(20, stop=stop) for request_id, stop in stops.items()}
    answers = generate_named(tiny, requests, monkeypatch)
    for request_id, stop in stops.items():
        text, answer = tiny.tokenizer.decode(scripts[request_id], skip_special_tokens=True), answers[request_id]
        expected = text[: min((text.find(string) + len(string), text.find(string)) for string in stop)[1]]
        where = f"tokens {scripts[request_id]}, stop strings {stop}"
        assert answer.text == expected, f"{where}: expected {expected!r}, got {answer.text!r}. {LOOK_STOP}"
        assert (answer.finish_reason, answer.stop_reason in stop) == ("stop", True), (
            f"{where}: expected 'stop' and one of them, got {answer}. {LOOK_STOP}"
        )


def test_the_end_of_the_context_in_a_batch(small: Callable[..., LLMEngine]) -> None:
    engine = small(max_model_len=16)
    got = run(engine, [10, 15, 3], greedy(100, min_tokens=50)).answers
    counts = [(len(answer.token_ids), answer.finish_reason) for answer in (got["0"], got["1"], got["2"])]
    expected = [(6, "length"), (1, "length"), (13, "length")]
    assert counts == expected, (
        f"prompts of 10, 15 and 3 in a context of 16: expected {expected}, got {counts}. {LOOK_STOP}"
    )


# LLM.generate


@pytest.mark.slow
def test_generate_answers_in_order(tiny: LLM) -> None:
    """The shortest answer is the first to leave the engine, not the first that generate returns."""
    prompts = [PROMPT, PROMPT[:3], PROMPT[2:], [100]]
    each = [greedy(count) for count in (9, 2, 5, 1)]
    results = tiny.generate(prompts, each)
    got = [(result.prompt_token_ids, len(result.outputs[0].token_ids)) for result in results]
    expected = list(zip(prompts, (9, 2, 5, 1), strict=True))
    assert got == expected, f"(prompt, tokens): expected {expected}, got {got}. {LOOK_LLM}"
    assert all(result.finished and len(result.outputs) == 1 for result in results), f"got {results}. {LOOK_LLM}"
    for result, prompt, params in zip(results, prompts, each, strict=True):
        alone = tiny.generate([prompt], params)[0].outputs[0]
        assert result.outputs[0] == alone, f"prompt {prompt}: expected {alone}, got {result.outputs[0]}. {LOOK_LLM}"


def test_generate_with_one_set_of_params_for_all(tiny: LLM) -> None:
    prompts = [PROMPT, PROMPT[:4]]
    got, expected = (
        [result.outputs for result in tiny.generate(prompts, params)] for params in (greedy(5), [greedy(5), greedy(5)])
    )
    assert got == expected, f"expected {expected}, got {got}. {LOOK_LLM}"
    assert tiny.generate([], greedy(5)) == [], f"no prompts, no answers. {LOOK_LLM}"
    assert prompts == [PROMPT, PROMPT[:4]], f"the caller's prompts were changed to {prompts}. {LOOK_LLM}"


@pytest.mark.parametrize(
    ("prompts", "params"),
    [
        ([[100], [101]], [greedy(3)]),
        ([[100]], [greedy(3), greedy(3)]),
        ([[100], [101]], [greedy(3), greedy(3, n=2)]),
        ([[100], []], greedy(3)),
        ([[100], [5_000]], greedy(3)),
        ([[100], [101] * 5_000], greedy(3)),
    ],
    ids=["too few params", "too many params", "n", "empty prompt", "no such token", "too long"],
)
def test_generate_refuses_before_it_queues(
    tiny: LLM, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]
) -> None:
    before = tiny.engine.num_steps
    with pytest.raises(FieldError):
        tiny.generate(prompts, params)
    assert tiny.engine.num_steps == before, f"bad input is refused before anything is computed. {LOOK_LLM}"
    waiting = ids(tiny.engine.waiting)
    assert not waiting, f"bad input was refused, and requests {waiting} are in the queue. {LOOK_LLM}"


@pytest.mark.slow
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_generate_removes_its_requests_when_a_step_fails(
    tiny: LLM, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """Otherwise the next call would get outputs of this one's requests."""
    expected = answers_of(tiny)
    execute = tiny.engine.executor.execute
    for _ in range(3):  # also three times in a row: LLM has no stream to end

        def fail(step: StepInput) -> StepOutput:
            if len(tiny.engine.running[0].output_token_ids) == 2:
                raise error("the cat sat on it")
            return execute(step)

        with monkeypatch.context() as patch, pytest.raises(error, match="the cat sat on it"):
            patch.setattr(tiny.engine.executor, "execute", fail)
            tiny.generate([[100], [101]], greedy(6))
        check_invariant(tiny.engine, "after a step that failed")
        remaining = ids([*tiny.engine.running, *tiny.engine.waiting])
        assert not remaining, f"a step failed with {error.__name__}, and requests {remaining} remain. {LOOK_LLM}"
    got = answers_of(tiny)
    assert got == expected, f"after a failed call: expected {expected}, got {got}. {LOOK_LLM}"


def answers_of(llm: LLM) -> list[CompletionOutput]:
    return [result.outputs[0] for result in llm.generate([PROMPT, [100]], greedy(6))]


def test_a_request_id_is_used_once(tiny: LLM) -> None:
    got = [result.request_id for _ in range(2) for result in tiny.generate([PROMPT, [100]], greedy(1))]
    assert len(set(got)) == 4, f"two calls with two prompts each: expected four ids, got {got}. {LOOK_LLM}"


def test_logprobs_for_the_requests_that_ask(tiny: LLM) -> None:
    each = [greedy(4), greedy(4, logprobs=3), greedy(4, logprobs=0)]
    plain, some, none = (result.outputs[0] for result in tiny.generate([PROMPT] * 3, each))
    assert plain.logprobs is None, f"not asked for, expected no logprobs, got {plain.logprobs}. {LOOK_STEP}"
    for name, answer, count in (("logprobs=3", some, 3), ("logprobs=0", none, 1)):
        entries = answer.logprobs or []
        assert [next(iter(entry)) for entry in entries] == answer.token_ids, (
            f"{name}: one entry a token, that token first: expected {answer.token_ids}, got {entries}. {LOOK_STEP}"
        )
        assert [len(entry) for entry in entries] == [count] * 4, f"{name}: got {entries}. {LOOK_STEP}"
