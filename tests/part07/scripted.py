"""An engine whose model follows a script: no weights, and a step runs when somebody waits for it, not before."""

from __future__ import annotations

import hashlib
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
from part07_prefix_caching import engine as engine_module
from part07_prefix_caching.block_manager import NULL_BLOCK, BlockManager
from part07_prefix_caching.config import EngineConfig
from part07_prefix_caching.engine import LLMEngine, StepFailedError
from part07_prefix_caching.messages import EngineCoreOutput
from part07_prefix_caching.request import Request, RequestStatus
from part07_prefix_caching.sampler import SamplerOutput
from part07_prefix_caching.scheduler import Scheduler, SchedulerOutput
from part07_prefix_caching.stream import StepResult
from part07_prefix_caching.token_buffer import TokenBuffer

END = 0  # the token that ends an answer
UNWRITTEN = 255  # what the script reads where nobody has written
VOCAB_SIZE = 256
LOOK_STEP = 'Look at engine.py::LLMEngine.step, _update and scheduler.py; README of part 6, "A chunk is not an answer".'
LOOK_ADD = 'Look at scheduler.py::SchedulerOutput.add; README of part 6, "A chunk is not an answer".'
LOOK_SIZE = 'Look at scheduler.py::Scheduler._chunk_size; README of part 6, "Decodes first".'
LOOK_RUNNING = 'Look at scheduler.py::Scheduler._schedule_running; README of part 6, "Decodes first".'
LOOK_ADMIT = 'Look at scheduler.py::Scheduler._admit and _schedule_waiting; README of part 6, "Decodes first".'
LOOK_HIT = 'Look at scheduler.py::Scheduler._schedule_waiting; README "A block\'s name".'
LOOK_NAME = (
    'Look at block_manager.py::BlockManager and scheduler.py::Scheduler._add, _release; README "When a name is given".'
)
LOOK_FREE = 'Look at block_manager.py::BlockManager.allocate and free; README "Free, and still there".'
NOTHING = (UNWRITTEN, b"nothing")  # what is in a slot to which nobody has written


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


def follow(before: bytes, token_id: int) -> bytes:
    """What a token's key and value depend on: itself, and what the one before it depends on."""
    return hashlib.blake2b(before + bytes([token_id]), digest_size=8).digest()


def first_of(cache_salt: str | None) -> bytes:
    """Keys and values depend on no salt. Here they do, so that it is seen if another salt's block is found."""
    return (cache_salt or "").encode()


def contents(token_ids: Sequence[int], cache_salt: str | None) -> list[bytes]:
    """What stands in the cache at each position of a request."""
    found, last = list[bytes](), first_of(cache_salt)
    for token_id in token_ids:
        last = follow(last, token_id)
        found.append(last)
    return found


@dataclass
class Work:
    """What one request does in a step: positions are given as places in the token buffer and slots in the cache.

    output_place: None for a chunk that brings no token.
    """

    request_id: str
    cache_salt: str | None
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
    """In ModelRunner's place, with a real token buffer, and a KV cache: slot → token, and all that it depends on.

    The script sees a request's tokens as its blocks hold them. So a token that went to a wrong place or a wrong owner,
    or that was read too early, changes an answer; and problems has an entry for each request that has read a slot in
    which something else was than it believed. log: launches and results in their order.
    """

    def __init__(self, config: EngineConfig, checkpoint: Any, max_model_len: int, max_num_batched_tokens: int) -> None:
        self.kv_cache = SimpleNamespace(num_blocks=config.num_kv_blocks)
        self.model_config = SimpleNamespace(vocab_size=VOCAB_SIZE)
        self.tokens = TokenBuffer(config.max_num_seqs, max_model_len, "cpu")
        self.tokens.data.fill_(UNWRITTEN)
        self.cache: dict[int, tuple[int, bytes]] = {}
        self.problems: dict[str, str] = {}
        self.meaning: dict[bytes, bytes] = {}  # name → what the last slot of such a block holds
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
            if name not in self.tokens.rows:
                step.new_rows.append((self.tokens.acquire(name), request.token_ids))
            row = self.tokens.rows[name]
            slots = [blocks.slot(name, position) for position in range(end)]
            inputs = [self.tokens.place(row, position) for position in range(start, end)]
            output_place = self.tokens.place(row, end) if num_sampled else None
            salt = request.params.cache_salt
            step.work.append(Work(name, salt, row, inputs, slots[start:], slots, output_place))
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
        for work in step.work:  # all keys and values are written before any is read
            self.write(work)
        places = list[int]()
        for work in step.work:
            tokens = self.read(work, step.number)
            if work.output_place is not None:
                step.sampled.append(self.script(tokens))
                places.append(work.output_place)
        self.tokens.write(torch.tensor(places, dtype=torch.int64), torch.tensor(step.sampled, dtype=torch.int64))

    def write(self, work: Work) -> None:
        """Tokens, and what they depend on: what stands in the slot before."""
        tokens = self.tokens.read(torch.tensor(work.input_places)).tolist()
        start = len(work.context_slots) - len(tokens)
        last = self.cache.get(work.context_slots[start - 1], NOTHING)[1] if start else first_of(work.cache_salt)
        for slot, token_id in zip(work.input_slots, tokens, strict=True):
            last = follow(last, token_id)
            self.cache[slot] = (token_id, last)

    def read(self, work: Work, number: int) -> list[int]:
        """The tokens of a request as its blocks hold them, which is as they are in the token buffer."""
        first = work.row * self.tokens.max_model_len
        wanted = self.tokens.data.view(-1)[first : first + len(work.context_slots)].tolist()
        held = [self.cache.get(slot, NOTHING) for slot in work.context_slots]
        pairs = zip(held, contents(wanted, work.cache_salt), strict=True)
        wrong = [position for position, ((_, got), expected) in enumerate(pairs) if got != expected]
        if wrong:
            slots = [work.context_slots[position] for position in wrong]
            self.problems.setdefault(
                work.request_id,
                f"step {number} reads keys and values of request {work.request_id} (salt {work.cache_salt!r}) at "
                f"positions {wrong}, slots {slots}. Its tokens there are {[wanted[p] for p in wrong]}; the slots hold "
                f"{[held[p][0] for p in wrong]}, or the same tokens after another beginning. {LOOK_NAME}",
            )
        return [token_id for token_id, _ in held]

    def learn_names(self, requests: Sequence[Request], block_size: int, where: str) -> None:
        """Note what the names of these requests' blocks stand for: one name, one beginning."""
        for request in requests:
            held = contents(request.token_ids, request.params.cache_salt)[block_size - 1 :: block_size]
            for number, (name, content) in enumerate(zip(request.block_hashes, held, strict=False)):
                assert self.meaning.setdefault(name, content) == content, (
                    f"{where}: block {number} of request {request.request_id} has the name of another beginning (its "
                    f"tokens, those before it or the salt differ). Look at block_manager.py::hash_block and "
                    f'hash_blocks; README "A block\'s name".'
                )

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
        counts = (output.num_computed_tokens, output.num_scheduled_tokens, output.num_cached_tokens)
        for request, start, n, num_cached in zip(output.requests, *counts, strict=True):
            name = request.request_id
            assert num_cached == 0 or name in waiting, f"{name} runs already, and {num_cached} are found. {LOOK_HIT}"
            if name in waiting:
                check_hit(request, num_cached, scheduler.blocks.block_size, what)
            known = num_cached if name in waiting else computed[name][1]
            assert start == known, (
                f"request {name} computes positions from {start} on; those before {known} are computed: every position "
                f"once, in order, until it is preempted. {LOOK_HIT}"
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


def check_hit(request: Request, num_cached: int, block_size: int, what: str) -> None:
    assert num_cached % block_size == 0 and 0 <= num_cached < request.num_tokens, (
        f"{what}: request {request.request_id} has {request.num_tokens} tokens (block_size={block_size}), and "
        f"{num_cached} of them were found: expected whole blocks, and at least one token left. {LOOK_HIT}"
    )


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
        outputs = LLMEngine.step(engine)
    except StepFailedError as failure:
        if isinstance(failure.__cause__, NotImplementedError):
            raise failure.__cause__ from None
        pytest.fail(f"a step of {failure.request_ids} failed with {failure.__cause__!r}. {LOOK_STEP}")
    check_reads(engine, outputs)
    return outputs


def check_reads(engine: LLMEngine, outputs: Sequence[EngineCoreOutput]) -> None:
    """Who gets a token has read nothing but its own. What a step in flight reads for one that has ended is lost."""
    if isinstance(engine.runner, ScriptedRunner):
        problems = [engine.runner.problems[o.request_id] for o in outputs if o.request_id in engine.runner.problems]
        assert not problems, problems[0]


def check_engine(engine: LLMEngine, where: str) -> None:
    """Between two steps: blocks and rows add up, and what is counted on is what is in flight."""
    blocks, scheduler = engine.blocks, engine.scheduler
    used, free, total = blocks.num_used_blocks, blocks.num_free_blocks, blocks.num_blocks - 1
    assert used + free == total, f"{where}: used {used} + free {free} blocks, expected {total} together. {LOOK_STEP}"
    check_blocks(blocks, where)
    check_names(engine, where)
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


def check_blocks(blocks: BlockManager, where: str) -> None:
    """Every block is free or in tables, as many as it has references; the free queue is in one piece."""
    total = blocks.num_blocks - 1
    free = [block.block_id for block in blocks.free_queue]
    assert len(free) == blocks.num_free_blocks, (
        f"{where}: the free queue says it has {blocks.num_free_blocks} blocks, it has {free}. "
        'Look at free_queue.py::FreeBlockQueue; README "Free, and still there".'
    )
    tables = [block_id for table in blocks.block_tables.values() for block_id in table]
    owned = [*free, *set(tables)]
    assert sorted(owned) == list(range(1, total + 1)) and NULL_BLOCK not in owned, (
        f"{where}: each of blocks 1 to {total} is free or in a table, tables {blocks.block_tables}, free {free}. "
        f"{LOOK_FREE}"
    )
    for table in blocks.block_tables.values():
        assert len(set(table)) == len(table), f"{where}: a block stands twice in one table: {table}. {LOOK_FREE}"
    for block in blocks.pool[1:]:
        expected = tables.count(block.block_id)
        assert block.ref_count == expected, (
            f"{where}: block {block.block_id} is in {expected} tables, its ref_count is {block.ref_count}. {LOOK_FREE}"
        )
    named = {block.block_hash: block.block_id for block in blocks.pool if block.block_hash is not None}
    found = {block_hash: block.block_id for block_hash, block in blocks.cached_blocks.items()}
    assert named == found, (
        f"{where}: blocks {sorted(named.values())} have a name, {sorted(found.values())} are found by theirs. "
        f"{LOOK_NAME}"
    )


def check_names(engine: LLMEngine, where: str) -> None:
    """What is in a block that can be found is what its name says, unless a step in flight is about to write it."""
    if not isinstance(engine.runner, ScriptedRunner):
        return
    runner, blocks = engine.runner, engine.blocks
    runner.learn_names([*engine.scheduler.running, *engine.scheduler.waiting], blocks.block_size, where)
    to_come = {slot for step in runner.pending for work in step.work for slot in work.input_slots}
    for block_hash, block in blocks.cached_blocks.items():
        slots = range(block.block_id * blocks.block_size, (block.block_id + 1) * blocks.block_size)
        if to_come.isdisjoint(slots):
            got = runner.cache.get(slots[-1], NOTHING)[1]
            assert got == runner.meaning.get(block_hash, got) != NOTHING[1], (
                f"{where}: block {block.block_id} can be found under the name of other keys and values than it "
                "holds, or "
                f"it was never written. {LOOK_NAME}"
            )


def check_rows(engine: LLMEngine, where: str) -> None:
    """Every row of the token buffer is free or has one owner, who runs, or is about to give it back."""
    tokens, scheduler = engine.runner.tokens, engine.scheduler
    look = 'Look at token_buffer.py::TokenBuffer and scheduler.py::Scheduler._release; part 5, "A token too late".'
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
        f"all have ended: {blocks.num_used_blocks} blocks are used, {len(engine.in_flight)} steps in flight. "
        f"{LOOK_STEP}"
    )
    return answers


def merge(answers: dict[str, EngineCoreOutput], output: EngineCoreOutput, where: str) -> None:
    assert len(output.token_ids) == 1, f"{where}: a step brings a request one token, got {output}. {LOOK_STEP}"
    before = answers.get(output.request_id)
    assert before is None or before.finish_reason is None, (
        f"{where}: request {output.request_id} had ended, and got another token. Look at engine.py::LLMEngine._append; "
        'README of part 5, "A token too late".'
    )
    assert (output.num_cached_tokens is None) is (before is not None), (
        f"{where}: num_cached_tokens comes with the first output, and with no other; output "
        f"{len(before.token_ids) if before else 0} has {output.num_cached_tokens}. Look at "
        "engine.py::LLMEngine._update; "
        'README "What a client sees".'
    )
    logprobs = [*(before.logprobs or [] if before else []), *(output.logprobs or [])]
    answers[output.request_id] = EngineCoreOutput(
        output.request_id,
        [*(before.token_ids if before else []), *output.token_ids],
        output.finish_reason,
        output.stop_reason,
        logprobs or None,
        before.num_cached_tokens if before else output.num_cached_tokens,
    )
