"""What holds of every engine from part 5 on, between two steps and in each; and engines driven until all have ended.

Each part has a class of its own on top of one of these, which says where to look. It works on any LLMEngine of the
part, and sees more where the model is scripted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec.structs import replace

from common.trace import StepTrace
from tests.scripted import LOOK_BORDER, NOTHING, Part, PrefixExecutor, ScriptedExecutor, contents, ids, shares


def worker_table(engine: Any, row: int) -> list[int]:
    """A row's block table as the worker, real or scripted, knows it."""
    if isinstance(engine.executor, ScriptedExecutor):
        return engine.executor.tables[row]
    states = engine.executor.worker.runner.states
    return states.block_tables[row, : states.num_blocks[row]].tolist()


class EngineChecks:
    """Part 5 and all after it: whose blocks and rows add up, and what is counted on is what is in flight."""

    LOOK_STEP: str
    LOOK_LATE: str
    LOOK_ROWS: str

    def __init__(self, part: Part) -> None:
        self.part = part

    def hold(self, engine: Any) -> None:
        """From here on every step of an engine is one that has no reason to fail."""
        engine.step = functools.partial(self.take_step, engine)

    def take_step(self, engine: Any) -> list[Any]:
        """LLMEngine.step of an engine that has no reason to fail."""
        ended = [request.request_id for request in engine.scheduler.running if request.status.is_finished]
        assert not ended, f"requests {ended} have ended and are still among the running. {self.LOOK_STEP}"
        try:
            return self.part.engine.LLMEngine.step(engine)
        except (AssertionError, NotImplementedError):
            raise
        except Exception as error:
            raise AssertionError(f"a step failed with {error!r}. {self.LOOK_STEP}") from error

    def check_engine(self, engine: Any, where: str) -> None:
        """Between two steps: blocks and rows add up, and what is counted on is what is in flight."""
        blocks, scheduler = engine.blocks, engine.scheduler
        used, free, total = blocks.num_used_blocks, blocks.num_free_blocks, blocks.num_blocks - 1
        assert used + free == total, (
            f"{where}: used {used} + free {free} blocks, expected {total} together. {self.LOOK_STEP}"
        )
        self.check_cache(engine, where)
        running, waiting = ids(scheduler.running), ids(list(scheduler.waiting))
        assert len(set(running + waiting)) == len(running + waiting), (
            f"{where}: a request is there twice, running {running}, waiting {waiting}. {self.LOOK_STEP}"
        )
        owners = {request_id for request_id, table in blocks.block_tables.items() if table}
        assert owners == set(running), f"{where}: {running} run, blocks are held by {sorted(owners)}. {self.LOOK_STEP}"
        assert len(engine.in_flight) < engine.max_steps_in_flight, (
            f"{where}: {len(engine.in_flight)} steps are in flight, expected at most {engine.max_steps_in_flight - 1}. "
            f"{self.LOOK_STEP}"
        )
        for request in scheduler.running:
            self.check_running(request, where)
        for request in scheduler.waiting:
            self.check_waiting(request, where)
        for request in [*scheduler.running, *scheduler.waiting]:
            self.check_placeholders(engine, request, where)
        self.check_rows(engine, where)

    def check_cache(self, engine: Any, where: str) -> None:
        """Every block has one owner."""
        blocks = engine.blocks
        owned = [*blocks.free_blocks, *(block for table in blocks.block_tables.values() for block in table)]
        assert len(set(owned)) == len(owned) and self.part.messages.NULL_BLOCK not in owned, (
            f"{where}: a block has two owners: {blocks.block_tables}, free {list(blocks.free_blocks)}. {self.LOOK_STEP}"
        )

    def check_running(self, request: Any, where: str) -> None:
        """How many of a running request's tokens are computed."""
        raise NotImplementedError

    def check_waiting(self, request: Any, where: str) -> None:
        """It has nothing yet, or has lost everything."""
        status = self.part.request.RequestStatus
        state = (request.num_computed_tokens, request.row, request.num_sent_blocks)
        assert request.status in (status.WAITING, status.PREEMPTED) and state == (0, None, 0), (
            f"{where}: request {request.request_id} waits as {request.status!r} with (num_computed_tokens, row, "
            f"num_sent_blocks) {state}: expected WAITING or PREEMPTED and (0, None, 0). {self.LOOK_ROWS}"
        )

    def check_placeholders(self, engine: Any, request: Any, where: str) -> None:
        """A request has as many as it gets tokens from the steps in flight."""
        raise NotImplementedError

    def check_rows(self, engine: Any, where: str) -> None:
        """Every row is free or belongs to one running request, whose blocks the worker knows."""
        scheduler = engine.scheduler
        rows = {request.request_id: request.row for request in scheduler.running}
        assert sorted([*rows.values(), *scheduler.free_rows]) == list(range(scheduler.max_num_seqs)), (
            f"{where}: rows {rows} are taken, {scheduler.free_rows} are free, of {scheduler.max_num_seqs}. "
            f"{self.LOOK_ROWS}"
        )
        for request in scheduler.running:
            table = engine.blocks.block_tables[request.request_id][: request.num_sent_blocks]
            known = worker_table(engine, request.row)
            assert known == table, (
                f"{where}: the worker knows blocks {known} of request {request.request_id} (row {request.row}), "
                f"expected the first {request.num_sent_blocks} of its block table, {table}. {LOOK_BORDER}"
            )

    def run_dry(self, engine: Any, on_step: Callable[[int], object] = lambda number: None) -> dict[str, Any]:
        """Step until nothing is left, checking after each; every request's outputs as one.

        on_step(number) is called before each step and may return True: more requests are to come.
        """
        answers: dict[str, Any] = {}
        number = 0
        while on_step(number) or engine.has_unfinished_requests:
            for output in self.take_step(engine):
                self.merge(answers, output, f"step {number}")
            self.check_engine(engine, f"after step {number}")
            number += 1
            assert number < 500, f"{number} steps, and {ids(engine.scheduler.running)} still run. {self.LOOK_STEP}"
        blocks = engine.blocks
        assert blocks.num_free_blocks == blocks.num_blocks - 1 and not engine.in_flight, (
            f"all have ended: {blocks.num_used_blocks} blocks used, {len(engine.in_flight)} steps in flight. "
            f"{self.LOOK_STEP}"
        )
        return answers

    def merge(self, answers: dict[str, Any], output: Any, where: str) -> None:
        assert output.error is None, f"{where}: {output}. {self.LOOK_STEP}"
        self.check_tokens(output, where)
        before = answers.get(output.request_id)
        assert before is None or before.finish_reason is None, (
            f"{where}: request {output.request_id} had ended, and got another token. {self.LOOK_LATE}"
        )
        logprobs = [*(before.logprobs or [] if before else []), *(output.logprobs or [])]
        token_ids = [*(before.token_ids if before else []), *output.token_ids]
        answers[output.request_id] = msgspec.structs.replace(output, token_ids=token_ids, logprobs=logprobs or None)

    def check_tokens(self, output: Any, where: str) -> None:
        assert len(output.token_ids) == 1, f"{where}: a step brings a request one token, got {output}. {self.LOOK_STEP}"


@dataclass
class Before:
    """How a scheduler was when it was asked for a step."""

    names: list[str]  # of all
    running: dict[str, tuple[int, int]]  # num_new_tokens and num_expected_tokens of each
    at_end: set[str]  # whose last token is in flight
    waiting: dict[str, int]  # num_tokens of each


class ChunkChecks(EngineChecks):
    """Part 6 and all after it: a request may compute a part of what it lacks, and every step is within the budget."""

    LOOK_ADD: str
    LOOK_SIZE: str
    LOOK_RUNNING: str
    LOOK_ADMIT: str

    def hold(self, engine: Any) -> None:
        super().hold(engine)
        self.watch(engine.scheduler)

    def watch(self, scheduler: Any) -> None:
        """From here on every schedule() is held to the rules that have no exception."""
        computed: dict[str, Any] = {}  # see check_positions
        schedule = scheduler.schedule

        def watched() -> Any:
            before = self.look_at(scheduler)
            output = schedule()
            sizes = {request.request_id: share.num_scheduled_tokens for request, share in shares(output)}
            what = f"of {before.names} a step got {sizes}"
            self.check_budget(scheduler, output, what)
            self.check_decodes_first(scheduler, output, before, what)
            self.check_positions(scheduler, output, before, computed, what)
            self.check_admitted(scheduler, output, before)
            for request in output.preempted:
                computed.pop(request.request_id, None)
            return output

        scheduler.schedule = watched

    def look_at(self, scheduler: Any) -> Before:
        return Before(
            names=ids([*scheduler.running, *scheduler.waiting]),
            running={r.request_id: (r.num_new_tokens, r.num_expected_tokens) for r in scheduler.running},
            at_end={r.request_id for r in scheduler.running if r.num_expected_tokens >= r.max_num_tokens},
            waiting={r.request_id: r.num_tokens for r in scheduler.waiting},
        )

    def check_budget(self, scheduler: Any, output: Any, what: str) -> None:
        total, budget = output.total_num_scheduled_tokens, scheduler.max_num_batched_tokens
        assert total <= budget, f"{what}: {total} tokens, the budget is {budget}. {self.LOOK_SIZE}"
        assert len(scheduler.running) <= scheduler.max_num_seqs, (
            f"{what}: {len(scheduler.running)} run, at most {scheduler.max_num_seqs} may. {self.LOOK_ADMIT}"
        )
        for request, share in shares(output):
            name, limit = request.request_id, scheduler.long_prefill_token_threshold
            start, num_tokens = share.num_computed_tokens, share.num_scheduled_tokens
            assert num_tokens >= 1 and request.num_computed_tokens == start + num_tokens, (
                f"{what}: request {name} had {start} tokens computed and has {request.num_computed_tokens}. "
                f"{self.LOOK_ADD}"
            )
            self.check_sampled(request, share, what)
            assert share.is_sampled or scheduler.enable_chunked_prefill, (
                f"{what}: request {name} was cut, without chunked prefill. {self.LOOK_SIZE}"
            )
            has_drafts = bool(getattr(share, "draft_token_ids", None))
            assert has_drafts or num_tokens <= limit or not limit or not scheduler.enable_chunked_prefill, (
                f"{what}: request {name} got {num_tokens} tokens, long_prefill_token_threshold is {limit}. "
                f"{self.LOOK_SIZE}"
            )

    def check_sampled(self, request: Any, share: Any, what: str) -> None:
        """A step brings a token to a request that it computes to the end, and to no other."""
        start, end = share.num_computed_tokens, share.num_computed_tokens + share.num_scheduled_tokens
        num_tokens = request.num_expected_tokens - share.is_sampled  # without the token that this step brings
        assert share.is_sampled is (end == num_tokens), (
            f"{what}: request {request.request_id} has {num_tokens} tokens and computes those from {start} to {end}: "
            f"expected is_sampled {end == num_tokens}, got {share.is_sampled}. {self.LOOK_ADD}"
        )

    def check_decodes_first(self, scheduler: Any, output: Any, before: Before, what: str) -> None:
        new = {name: num_new for name, (num_new, _) in before.running.items()}
        lost, names = ids(output.preempted), ids(output.requests)
        decodes = [name for name in new if new[name] == 1 and name not in before.at_end and name not in lost]
        assert names[: len(decodes)] == decodes, (
            f"{what}: {decodes} have one new token each, so they come first, and all of them; got {names}. "
            f"{self.LOOK_RUNNING}"
        )
        unused = scheduler.max_num_batched_tokens - output.total_num_scheduled_tokens
        for name, num_new in new.items():
            if num_new > 1 and name not in lost and name not in names:
                assert not unused, (
                    f"{what}: {name} has {num_new} new tokens, {unused} of the budget are unused. {self.LOOK_RUNNING}"
                )
        victims = [name for name in lost if new[name] == 1]
        assert not lost or victims or decodes, (
            f"{what}: {lost} were preempted, and no request needed a block. {self.LOOK_RUNNING}"
        )

    def check_positions(self, scheduler: Any, output: Any, before: Before, computed: dict[str, Any], what: str) -> None:
        """computed: of each request, how many positions so far, and which request, as an id may come again."""
        for request, share in shares(output):
            name, start = request.request_id, share.num_computed_tokens
            owner, known = computed.get(name, (request, 0))
            known = known if owner is request else 0
            assert start == known, (
                f"request {name} computes positions from {start} on; those before {known} are computed: every position "
                f"once, in order, until it is preempted. {self.LOOK_ADD}"
            )
            computed[name] = (request, start + share.num_scheduled_tokens)

    def check_admitted(self, scheduler: Any, output: Any, before: Before) -> None:
        """No request is admitted in a step with a preemption, and an admitted one has blocks for all of its tokens."""
        for request in output.requests:
            name, end = request.request_id, request.num_computed_tokens
            assert name not in before.waiting or not output.preempted, (
                f"{name} is admitted while {ids(output.preempted)} are preempted. {self.LOOK_ADMIT}"
            )
            num_blocks = len(scheduler.blocks.block_tables[name])
            expected = scheduler.blocks.num_blocks_for(max(end, before.waiting.get(name, 0)))
            assert num_blocks >= expected, (
                f"request {name} was admitted with {num_blocks} blocks, expected {expected}, enough for all of its "
                f"{before.waiting.get(name, end)} tokens. {self.LOOK_ADMIT}"
            )

    def check_running(self, request: Any, where: str) -> None:
        num_computed, last = request.num_computed_tokens, request.num_expected_tokens - 1
        first = last if request.num_output_placeholders else 1  # with a token in flight, all before it are computed
        is_running = request.status is self.part.request.RequestStatus.RUNNING
        assert is_running and first <= num_computed <= last, (
            f"{where}: request {request.request_id} runs as {request.status}, with {request.num_tokens} tokens and "
            f"{request.num_output_placeholders} placeholders: expected num_computed_tokens from {first} to {last}, got "
            f"{num_computed}. {self.LOOK_ADD}"
        )

    def check_placeholders(self, engine: Any, request: Any, where: str) -> None:
        num_in_flight = sum(request in step.scheduled.sampled_requests for step in engine.in_flight)
        assert request.num_output_placeholders == num_in_flight, (
            f"{where}: request {request.request_id} gets a token from {num_in_flight} of the steps in flight: expected "
            f"as many placeholders, got {request.num_output_placeholders}. {self.LOOK_ADD}"
        )


class PrefixChecks(ChunkChecks):
    """Part 7 and all after it: blocks that several requests hold, that are free and still cached, and their hashes."""

    LOOK_HIT: str
    LOOK_NAME: str
    LOOK_HASH: str
    LOOK_FREE: str
    LOOK_QUEUE: str
    LOOK_TOLD: str

    def take_step(self, engine: Any) -> list[Any]:
        outputs = super().take_step(engine)
        self.check_reads(engine, outputs)
        return outputs

    def check_reads(self, engine: Any, outputs: Sequence[Any]) -> None:
        """A request that gets a token has read nothing but its own keys and values.

        What a step in flight reads for one that has ended does not matter."""
        if isinstance(engine.executor, PrefixExecutor):
            found = engine.executor.problems
            problems = [found[output.request_id] for output in outputs if output.request_id in found]
            assert not problems, f"{problems[0]} {self.LOOK_NAME}"

    def check_positions(self, scheduler: Any, output: Any, before: Before, computed: dict[str, Any], what: str) -> None:
        """computed: of each request, how many positions so far."""
        for request, share in shares(output):
            name, start = request.request_id, share.num_computed_tokens
            if name in before.waiting:
                self.check_hit(scheduler, request, start, what)
            else:
                assert start == computed[name], (
                    f"request {name} computes positions from {start} on; those before {computed[name]} are computed: "
                    f"every position once, in order, until it is preempted. {self.LOOK_HIT}"
                )
            computed[name] = start + share.num_scheduled_tokens

    def check_hit(self, scheduler: Any, request: Any, num_cached: int, what: str) -> None:
        """A request is admitted: num_cached of its tokens were found in the cache."""
        block_size = scheduler.blocks.block_size
        assert num_cached % block_size == 0 and 0 <= num_cached < request.num_tokens, (
            f"{what}: request {request.request_id} has {request.num_tokens} tokens (block_size={block_size}), and "
            f"{num_cached} of them were found: expected whole blocks, and at least one token less. {self.LOOK_HIT}"
        )

    def check_cache(self, engine: Any, where: str) -> None:
        self.check_blocks(engine.blocks, where)
        if isinstance(engine.executor, PrefixExecutor):
            self.learn_hashes(engine, where)
            self.check_hashes(engine, where)

    def check_blocks(self, blocks: Any, where: str) -> None:
        """Every block is free or in tables, as many as it has references; the free queue is in one piece."""
        total = blocks.num_blocks - 1
        free = [block.block_id for block in blocks.free_queue]
        assert len(free) == blocks.num_free_blocks, (
            f"{where}: the free queue says it has {blocks.num_free_blocks} blocks, it has {free}. {self.LOOK_QUEUE}"
        )
        tables = [block_id for table in blocks.block_tables.values() for block_id in table]
        owned = [*free, *set(tables)]
        assert sorted(owned) == list(range(1, total + 1)), (
            f"{where}: each of blocks 1 to {total} is free or in a table, tables {blocks.block_tables}, free {free}. "
            f"{self.LOOK_FREE}"
        )
        for table in blocks.block_tables.values():
            assert len(set(table)) == len(table), (
                f"{where}: a block stands twice in one table: {table}. {self.LOOK_FREE}"
            )
        for block in blocks.pool[1:]:
            expected = tables.count(block.block_id)
            assert block.ref_count == expected, (
                f"{where}: block {block.block_id} is in {expected} tables, its ref_count is {block.ref_count}. "
                f"{self.LOOK_FREE}"
            )
        hashed = {block.block_hash: block.block_id for block in blocks.pool if block.block_hash is not None}
        found = {block_hash: block.block_id for block_hash, block in blocks.cached_blocks.items()}
        assert hashed == found, (
            f"{where}: blocks {sorted(hashed.values())} have a hash, {sorted(found.values())} are found by theirs. "
            f"{self.LOOK_NAME}"
        )

    def learn_hashes(self, engine: Any, where: str) -> None:
        """Note which contents the hashes of the requests' blocks stand for: one hash, one prefix."""
        block_size, meaning = engine.blocks.block_size, engine.executor.meaning
        for request in [*engine.scheduler.running, *engine.scheduler.waiting]:
            held = contents(request.token_ids, request.params.cache_salt)[block_size - 1 :: block_size]
            for number, (block_hash, content) in enumerate(zip(request.block_hashes, held, strict=False)):
                assert meaning.setdefault(block_hash, content) == content, (
                    f"{where}: block {number} of request {request.request_id} has the hash of another prefix (its "
                    f"tokens, those before it or the salt differ). {self.LOOK_HASH}"
                )

    def check_hashes(self, engine: Any, where: str) -> None:
        """A block that can be found holds what its hash says, unless a step in flight is about to write it."""
        executor, blocks = engine.executor, engine.blocks
        to_come = {slot for step in executor.pending for work in step.work for slot in work.input_slots}
        for block_hash, block in blocks.cached_blocks.items():
            slots = range(block.block_id * blocks.block_size, (block.block_id + 1) * blocks.block_size)
            if to_come.isdisjoint(slots):
                got = executor.cache.get(slots[-1], NOTHING)[1]
                assert got == executor.meaning.get(block_hash, got) != NOTHING[1], (
                    f"{where}: block {block.block_id} can be found under the hash of other keys and values than it "
                    f"holds, or it was never written. {self.LOOK_NAME}"
                )

    def merge(self, answers: dict[str, Any], output: Any, where: str) -> None:
        before = answers.get(output.request_id)
        super().merge(answers, output, where)
        assert (output.num_cached_tokens is None) is (before is not None), (
            f"{where}: num_cached_tokens comes with the first output, and with no other; output "
            f"{len(before.token_ids) if before else 0} has {output.num_cached_tokens}. {self.LOOK_TOLD}"
        )
        if before is not None:
            answers[output.request_id].num_cached_tokens = before.num_cached_tokens


def without_contents(step: StepTrace) -> StepTrace:
    """A step's counts. Its blocks and tokens are compared in tests/contract/test_traces.py."""
    bare = {"new_block_ids": [], "prompt_token_ids": [], "token_ids": []}
    return replace(step, requests=[replace(request, **bare) for request in step.requests])
