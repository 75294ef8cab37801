"""An engine whose model follows a script: no weights, and a step runs when somebody waits for it, not before."""

from __future__ import annotations

import time
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from common.sampling_params import SamplingParams
from part06_chunked_prefill import engine as engine_module
from part06_chunked_prefill.block_manager import NULL_BLOCK, BlockManager
from part06_chunked_prefill.config import EngineConfig
from part06_chunked_prefill.engine import LLMEngine, StepFailedError
from part06_chunked_prefill.messages import EngineCoreOutput
from part06_chunked_prefill.request import Request, RequestStatus
from part06_chunked_prefill.sampler import SamplerOutput
from part06_chunked_prefill.scheduler import Scheduler, SchedulerOutput
from part06_chunked_prefill.stream import StepResult
from part06_chunked_prefill.token_buffer import TokenBuffer

END = 0  # the token that ends an answer
UNWRITTEN = 255  # what the script reads where nobody has written
VOCAB_SIZE = 256
LOOK_STEP = 'Look at engine.py::LLMEngine.step, _update and scheduler.py; README "A chunk is not an answer".'
LOOK_ADD = 'Look at scheduler.py::SchedulerOutput.add; README "A chunk is not an answer".'
LOOK_SIZE = 'Look at scheduler.py::Scheduler._chunk_size; README "Decodes first".'
LOOK_RUNNING = 'Look at scheduler.py::Scheduler._schedule_running; README "Decodes first".'
LOOK_ADMIT = 'Look at scheduler.py::Scheduler._admit and _schedule_waiting; README "Decodes first".'


def next_token(token_ids: Sequence[int]) -> int:
    """The scripted model: a token out of all tokens so far; one in twenty is END."""
    return zlib.crc32(bytes(token_ids)) % 20


def answer_alone(
    prompt: list[int], max_tokens: int, ignore_eos: bool = False, script: Callable[[Sequence[int]], int] = next_token
) -> list[int]:
    output: list[int] = []
    while len(output) < max_tokens and (ignore_eos or END not in output):
        output.append(script(prompt + output))
    return output


def params_for(max_tokens: int, **fields: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **fields)


def ids(requests: Sequence[Request]) -> list[str]:
    return [request.request_id for request in requests]


@dataclass
class Work:
    """What one request does in a step: positions are given as places in the token buffer and slots in the cache.

    output_place: None for a chunk that brings no token.
    """

    request_id: str
    row: int
    input_places: list[int]
    input_slots: list[int]
    context_slots: list[int]
    output_place: int | None


@dataclass(eq=False)
class ScriptedStep:
    """A step that was launched. It runs when its result is asked for, after all that were launched before it."""

    runner: ScriptedRunner
    number: int
    new_rows: list[tuple[int, list[int]]] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)
    error: Exception | None = None
    sampled: list[int] = field(default_factory=list)

    def result(self) -> StepResult:
        while self in self.runner.pending:
            self.runner.run(self.runner.pending.popleft())
        self.runner.log.append(f"result {self.number}")
        if self.error is not None:
            raise self.error
        now = time.perf_counter()
        return StepResult(SamplerOutput(torch.tensor(self.sampled, dtype=torch.int64), None), now, now)


class ScriptedRunner:
    """In ModelRunner's place, with a real token buffer, and a KV cache of tokens: slot → token.

    The script sees a request's tokens as its blocks hold them. So a token that went to a wrong place or a wrong owner,
    or that was read too early, changes an answer. log: launches and results in their order.
    """

    def __init__(self, config: EngineConfig, checkpoint: Any, max_model_len: int, max_num_batched_tokens: int) -> None:
        self.kv_cache = SimpleNamespace(num_blocks=config.num_kv_blocks)
        self.model_config = SimpleNamespace(vocab_size=VOCAB_SIZE)
        self.tokens = TokenBuffer(config.max_num_seqs, max_model_len, "cpu")
        self.tokens.data.fill_(UNWRITTEN)
        self.cache: dict[int, int] = {}
        self.script: Callable[[Sequence[int]], int] = next_token
        self.pending: deque[ScriptedStep] = deque()
        self.launched: list[ScriptedStep] = []
        self.log: list[str] = []
        self.launch_error: Exception | None = None  # raised by the next launch
        self.preemption_error: Exception | None = None  # raised by the next launch after a preemption
        self.result_error: Exception | None = None  # raised by the result of the next step that is launched
        self.num_tokens_computed = 0

    def launch(self, scheduled: SchedulerOutput, blocks: BlockManager) -> ScriptedStep:
        self.tokens.release(scheduled.left)
        if scheduled.preempted and self.preemption_error is not None:
            error, self.preemption_error = self.preemption_error, None
            raise error
        if self.launch_error is not None:
            error, self.launch_error = self.launch_error, None
            raise error
        step = ScriptedStep(self, len(self.launched) + 1, error=self.result_error)
        self.result_error = None
        counts = (scheduled.num_computed_tokens, scheduled.num_scheduled_tokens, scheduled.num_sampled_tokens)
        for request, start, num_tokens, num_sampled in zip(scheduled.requests, *counts, strict=True):
            name, end = request.request_id, start + num_tokens
            if start == 0:
                step.new_rows.append((self.tokens.acquire(name), request.token_ids))
            row = self.tokens.rows[name]
            slots = [blocks.slot(name, position) for position in range(end)]
            inputs = [self.tokens.place(row, position) for position in range(start, end)]
            output_place = self.tokens.place(row, end) if num_sampled else None
            step.work.append(Work(name, row, inputs, slots[start:], slots, output_place))
            self.num_tokens_computed += end - start
        self.pending.append(step)
        self.launched.append(step)
        self.log.append(f"launch {step.number}")
        return step

    def run(self, step: ScriptedStep) -> None:
        if step.error is not None:
            return  # nothing of it happens
        for row, token_ids in step.new_rows:
            self.tokens.fill(row, token_ids)
        for work in step.work:
            tokens = self.tokens.read(torch.tensor(work.input_places)).tolist()
            self.cache.update(zip(work.input_slots, tokens, strict=True))
        places = list[int]()
        for work in step.work:
            if work.output_place is not None:
                step.sampled.append(self.script([self.cache.get(slot, UNWRITTEN) for slot in work.context_slots]))
                places.append(work.output_place)
        self.tokens.write(torch.tensor(places, dtype=torch.int64), torch.tensor(step.sampled, dtype=torch.int64))

    def num_samples(self, request_id: str) -> int:
        """How many tokens were sampled for a request, wanted or not."""
        return sum(
            work.request_id == request_id and work.output_place is not None
            for step in self.launched for work in step.work
        )  # fmt: skip


def scripted_engine(
    max_model_len: int = 64, script: Callable[[Sequence[int]], int] = next_token, **flags: Any
) -> LLMEngine:
    """A real LLMEngine over the scripted model; flags are EngineConfig's."""
    checkpoint = SimpleNamespace(eos_token_ids=frozenset({END}), max_model_len=max_model_len)
    parts = {"ModelRunner": ScriptedRunner, "resolve_checkpoint": lambda _: checkpoint}
    with mock.patch.multiple(engine_module, **parts):
        engine = LLMEngine(EngineConfig(**{"device": "cpu", "num_kv_blocks": 1_000, **flags}))
    runner_of(engine).script = script
    watch(engine.scheduler)
    return engine


def watch(scheduler: Scheduler) -> None:
    """From here on every schedule() is held to the rules that have no exception."""
    computed: dict[str, tuple[Request, int]] = {}  # of each request, how many positions so far; an id may come again
    schedule = scheduler.schedule

    def watched() -> SchedulerOutput:
        queues = ids([*scheduler.running, *scheduler.waiting])
        before = {r.request_id: (r.num_missing_tokens, r.num_expected_tokens) for r in scheduler.running}
        at_end = {r.request_id for r in scheduler.running if r.num_expected_tokens >= r.max_num_tokens}
        waiting = {r.request_id: r.num_tokens for r in scheduler.waiting}
        output = schedule()
        names, lost = ids(output.requests), ids(output.preempted)
        what = f"of {queues} a step got {dict(zip(names, output.num_scheduled_tokens, strict=True))}"
        check_budget(scheduler, output, what)
        check_decodes_first(scheduler, output, before, at_end, what)
        for request, start, n in zip(
            output.requests, output.num_computed_tokens, output.num_scheduled_tokens, strict=True
        ):
            name = request.request_id
            owner, known = computed.get(name, (request, 0))
            known = known if owner is request else 0
            assert start == known, (
                f"request {name} computes positions from {start} on; those before {known} are computed: every position "
                f"once, in order, until it is preempted. {LOOK_ADD}"
            )
            computed[name] = (request, start + n)
            assert name not in waiting or not output.preempted, f"{name} joins while {lost} are preempted. {LOOK_ADMIT}"
            num_blocks = len(scheduler.blocks.block_tables[name])
            expected = scheduler.blocks.num_blocks_for(max(start + n, waiting.get(name, 0)))
            assert num_blocks >= expected, (
                f"request {name} was let in with {num_blocks} blocks, expected {expected}, enough for all of its "
                f"{waiting.get(name, start + n)} tokens. {LOOK_ADMIT}"
            )
        for request in output.preempted:
            computed.pop(request.request_id, None)
        return output

    scheduler.schedule = watched  # type: ignore[method-assign]


def check_budget(scheduler: Scheduler, output: SchedulerOutput, what: str) -> None:
    total, budget = sum(output.num_scheduled_tokens), scheduler.max_num_batched_tokens
    assert total <= budget, f"{what}: {total} tokens, the budget is {budget}. {LOOK_SIZE}"
    assert len(scheduler.running) <= scheduler.max_num_seqs, (
        f"{what}: {len(scheduler.running)} run, at most {scheduler.max_num_seqs} may. {LOOK_ADMIT}"
    )
    counts = (output.num_computed_tokens, output.num_scheduled_tokens, output.num_sampled_tokens)
    for request, start, num_tokens, num_sampled in zip(output.requests, *counts, strict=True):
        name, limit = request.request_id, scheduler.long_prefill_token_threshold
        assert num_tokens >= 1 and request.num_computed_tokens == start + num_tokens, (
            f"{what}: request {name} had {start} tokens computed and has {request.num_computed_tokens}. {LOOK_ADD}"
        )
        end = request.num_expected_tokens - num_sampled  # without the token that this step brings
        assert num_sampled == (start + num_tokens == end), (
            f"{what}: request {name} has {end} tokens and computes those from {start} to {start + num_tokens}: "
            f"expected num_sampled_tokens {int(start + num_tokens == end)}, got {num_sampled}. {LOOK_ADD}"
        )
        assert num_sampled or scheduler.enable_chunked_prefill, (
            f"{what}: request {name} was cut, without chunked prefill. {LOOK_SIZE}"
        )
        assert num_tokens <= limit or not limit or not scheduler.enable_chunked_prefill, (
            f"{what}: request {name} got {num_tokens} tokens, long_prefill_token_threshold is {limit}. {LOOK_SIZE}"
        )


def check_decodes_first(
    scheduler: Scheduler, output: SchedulerOutput, before: dict[str, tuple[int, int]], at_end: set[str], what: str
) -> None:
    """before: of those that ran, how many tokens each lacked; at_end: whose last token is in flight."""
    lost = ids(output.preempted)
    decodes = [name for name in before if before[name][0] == 1 and name not in at_end and name not in lost]
    names = ids(output.requests)
    assert names[: len(decodes)] == decodes, (
        f"{what}: {decodes} lack one token each, so they come first, and all of them; got {names}. {LOOK_RUNNING}"
    )
    budget_left = scheduler.max_num_batched_tokens - output.total_num_scheduled_tokens
    for name in before:
        if before[name][0] > 1 and name not in lost and name not in names:
            assert not budget_left, f"{what}: {name} lacks {before[name][0]}, {budget_left} are left. {LOOK_RUNNING}"
    victims = [name for name in lost if before[name][0] == 1]
    assert not lost or victims or decodes, f"{what}: {lost} left, and nobody needed a block. {LOOK_RUNNING}"


def runner_of(engine: LLMEngine) -> ScriptedRunner:
    assert isinstance(engine.runner, ScriptedRunner)
    return engine.runner


def take_step(engine: LLMEngine) -> list[EngineCoreOutput]:
    """LLMEngine.step of an engine that has no reason to fail."""
    ended = [request.request_id for request in engine.scheduler.running if request.status.is_finished]
    assert not ended, f"requests {ended} have ended and are still among the running. {LOOK_STEP}"
    try:
        return LLMEngine.step(engine)
    except StepFailedError as failure:
        if isinstance(failure.__cause__, NotImplementedError):
            raise failure.__cause__ from None
        pytest.fail(f"a step of {failure.request_ids} failed with {failure.__cause__!r}. {LOOK_STEP}")


def check_engine(engine: LLMEngine, where: str) -> None:
    """Between two steps: blocks and rows add up, and what is counted on is what is in flight."""
    blocks, scheduler = engine.blocks, engine.scheduler
    used, free, total = blocks.num_used_blocks, blocks.num_free_blocks, blocks.num_blocks - 1
    assert used + free == total, f"{where}: used {used} + free {free} blocks, expected {total} together. {LOOK_STEP}"
    owned = [*blocks.free_blocks, *(block for table in blocks.block_tables.values() for block in table)]
    assert len(set(owned)) == len(owned) and NULL_BLOCK not in owned, (
        f"{where}: a block has two owners: {blocks.block_tables}, free {list(blocks.free_blocks)}. {LOOK_STEP}"
    )
    running, waiting = ids(scheduler.running), ids(list(scheduler.waiting))
    assert len(set(running + waiting)) == len(running + waiting), (
        f"{where}: somebody is there twice, running {running}, waiting {waiting}. {LOOK_STEP}"
    )
    owners = {request_id for request_id, table in blocks.block_tables.items() if table}
    assert owners == set(running), f"{where}: {running} run, blocks are held by {sorted(owners)}. {LOOK_STEP}"
    assert len(engine.in_flight) < engine.max_steps_in_flight, (
        f"{where}: {len(engine.in_flight)} steps are in flight, at most {engine.max_steps_in_flight - 1} may be left. "
        f"{LOOK_STEP}"
    )
    for request in scheduler.running:
        num_computed, last = request.num_computed_tokens, request.num_expected_tokens - 1
        first = last if request.num_output_placeholders else 1  # who waits for a token has computed all before it
        assert request.status is RequestStatus.RUNNING and first <= num_computed <= last, (
            f"{where}: request {request.request_id} runs as {request.status}, with {request.num_tokens} tokens and "
            f"{request.num_output_placeholders} placeholders: expected num_computed_tokens from {first} to {last}, got "
            f"{num_computed}. {LOOK_ADD}"
        )
    for request in scheduler.waiting:
        state = (request.status, request.num_computed_tokens)
        assert state == (RequestStatus.WAITING, 0), f"{where}: request {request.request_id} waits as {state}."
    for request in [*scheduler.running, *scheduler.waiting]:
        num_in_flight = sum(request in step.scheduled.sampled_requests for step in engine.in_flight)
        assert request.num_output_placeholders == num_in_flight, (
            f"{where}: request {request.request_id} gets a token from {num_in_flight} of the steps in flight: expected "
            f"as many placeholders, got {request.num_output_placeholders}. {LOOK_ADD}"
        )
    check_rows(engine, where)


def check_rows(engine: LLMEngine, where: str) -> None:
    """Every row of the token buffer is free or has one owner, who runs, or is about to give it back."""
    tokens, scheduler = engine.runner.tokens, engine.scheduler
    look = 'Look at token_buffer.py and scheduler.py::Scheduler._release; README of part 5, "A token too late".'
    rows = [*tokens.rows.values(), *tokens._free_rows]
    assert sorted(rows) == list(range(len(tokens.data))), (
        f"{where}: rows {tokens.rows} are taken, {tokens._free_rows} are free, of {len(tokens.data)}. {look}"
    )
    strangers = set(tokens.rows) - set(ids(scheduler.running)) - set(scheduler._left)
    assert not strangers, f"{where}: {sorted(strangers)} neither run nor have just left, and hold rows. {look}"


def run_dry(engine: LLMEngine, on_step: Callable[[int], object] = lambda number: None) -> dict[str, EngineCoreOutput]:
    """Step until nothing is left, checking after each; every request's outputs as one.

    on_step(number) is called before each step and may return True: somebody is still to come.
    """
    answers: dict[str, EngineCoreOutput] = {}
    number = 0
    while on_step(number) or engine.has_unfinished_requests:
        for output in take_step(engine):
            merge(answers, output, f"step {number}")
        check_engine(engine, f"after step {number}")
        number += 1
        assert number < 500, f"{number} steps, and {ids(engine.scheduler.running)} still run. {LOOK_STEP}"
    blocks = engine.blocks
    assert blocks.num_free_blocks == blocks.num_blocks - 1 and not engine.in_flight, (
        f"all have ended: {blocks.num_used_blocks} blocks used, {len(engine.in_flight)} steps in flight. {LOOK_STEP}"
    )
    return answers


def merge(answers: dict[str, EngineCoreOutput], output: EngineCoreOutput, where: str) -> None:
    assert len(output.token_ids) == 1, f"{where}: a step brings a request one token, got {output}. {LOOK_STEP}"
    before = answers.get(output.request_id)
    assert before is None or before.finish_reason is None, (
        f"{where}: request {output.request_id} had ended, and got another token. Look at engine.py::LLMEngine._append; "
        'README of part 5, "A token too late".'
    )
    logprobs = [*(before.logprobs or [] if before else []), *(output.logprobs or [])]
    answers[output.request_id] = EngineCoreOutput(
        output.request_id,
        [*(before.token_ids if before else []), *output.token_ids],
        output.finish_reason,
        output.stop_reason,
        logprobs or None,
    )
