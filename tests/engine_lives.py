"""Random runs of an engine over a scripted worker: requests are added, aborted, end and fail in any order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from common.sampling_params import SamplingParams
from tests.engine_checks import EngineChecks, PrefixChecks
from tests.lives import run_lives
from tests.scripted import END, answer_alone, executor_of, ids, params_for

CAT = "the cat sat on it"


class EngineLife(RuleBasedStateMachine):
    """Drives an engine: adds, aborts and steps, and calls fail() after a step that raised.

    A part's own class has a rule `start` that calls begin, and counts of its own, of all lives together.
    """

    checks: EngineChecks
    counts: Counter[str]
    LOOK: str
    LOOK_LENGTH: str
    LOOK_FAIL = "Look at core/engine.py::LLMEngine.fail and core/scheduler.py::Scheduler.reset."
    LAST_STEPS = 6  # enough for a request of four tokens that is alone

    def begin(self, engine: Any, watermark_blocks: int) -> None:
        self.engine = engine
        engine.scheduler.watermark_blocks = watermark_blocks
        self.capacity = engine.limits.num_kv_tokens
        self.requests: dict[str, tuple[list[int], SamplingParams]] = {}
        self.expected: dict[str, list[int]] = {}
        self.answers: dict[str, Any] = {}
        self.num_outputs: Counter[str] = Counter()
        self.ended: set[str] = set()
        self.aborted: set[str] = set()
        self.failed: set[str] = set()

    def ask(self, prompt: list[int], max_tokens: int, ignore_eos: bool, min_tokens: int, **fields: Any) -> None:
        """min_tokens: the script does not hold END back, so it only keeps an early one from ending the answer."""
        prompt = prompt[: self.capacity]
        max_tokens = max(1, min(max_tokens, self.capacity + 1 - len(prompt)))  # the last token is never stored
        name, min_tokens = str(len(self.expected)), min(min_tokens, max_tokens)
        params = params_for(max_tokens, ignore_eos=ignore_eos, min_tokens=min_tokens, **fields)
        self.engine.add_request(name, prompt, params)
        whole = answer_alone(prompt, min(max_tokens, self.engine.limits.max_model_len - len(prompt)), ignore_eos=True)
        ends = {*params.stop_token_ids, *([] if ignore_eos else [END])}
        stops = [n for n, token in enumerate(whole, 1) if token in ends and n >= min_tokens]
        self.requests[name], self.expected[name] = (prompt, params), whole[: min(stops, default=len(whole))]

    def own_prompt(self, length: int) -> list[int]:
        """One that begins like no other's."""
        return [100 + (len(self.expected) * 31 + position * 7) % 150 for position in range(length)]

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        """Any request there ever was: waiting, running, in flight, preempted, ended, aborted, failed."""
        self.abort_one(data.draw(st.sampled_from(sorted(self.expected, key=int)), "request"))

    def abort_one(self, name: str) -> None:
        self.engine.abort_requests([name])
        if name not in self.ended | self.failed | self.aborted:
            self.aborted.add(name)
            self.counts["aborts"] += 1
        self.checks.check_engine(self.engine, f"after the abort of {name}")

    @precondition(lambda self: self.engine.scheduler.has_unfinished_requests)
    @rule(which=st.sampled_from(["launch_error", "result_error", "preemption_error"]))
    def step_that_fails(self, which: str) -> None:
        """The next step that is launched, or the next one with a preemption; a result fails a step later."""
        setattr(executor_of(self.engine), which, ValueError(CAT))
        self.step()

    def may_fail(self) -> bool:
        executor = executor_of(self.engine)
        errors = [executor.launch_error, executor.result_error, executor.preemption_error]
        return any([*errors, *(step.error for step in executor.launched[-self.engine.max_steps_in_flight :])])

    def step(self) -> None:
        engine = self.engine
        if not self.may_fail():
            outputs = self.checks.take_step(engine)
        else:
            num_failures = engine.num_failures
            try:
                outputs = self.checks.part.engine.LLMEngine.step(engine)
            except ValueError as error:
                assert str(error) == CAT, f"{error!r}. {self.LOOK}"
                self.fail(error, num_failures)
                outputs = []
        self.receive(outputs)
        assert not outputs or engine.num_failures == 0, (
            f"a good step brought {outputs}: expected num_failures 0, got {engine.num_failures}. {self.LOOK_FAIL}"
        )
        self.checks.check_engine(engine, f"after step {engine.num_steps}")
        self.check_scheduled()
        self.counts["steps"] += 1

    def fail(self, error: Exception, num_failures_before: int) -> None:
        """A step has raised: every request in the engine ends with the cause, once, and the engine is empty."""
        engine, scheduler = self.engine, self.engine.scheduler
        self.counts["failures"] += 1
        self.counts["failed while waiting"] += bool(scheduler.waiting) and bool(scheduler.running)
        self.counts["failed while preempted"] += any(request.num_output_placeholders for request in scheduler.waiting)
        self.counts["failed with a step in flight"] += bool(engine.in_flight)
        expected = set(self.expected) - self.ended - self.aborted - self.failed
        outputs = engine.fail(error)
        assert sorted(ids(outputs)) == sorted(expected), (
            f"a step failed: expected an error for {sorted(expected)}, once each, got {outputs}. {self.LOOK_FAIL}"
        )
        for output in outputs:
            got = (output.token_ids, output.finish_reason, output.error)
            assert got == ([], None, f"ValueError: {CAT}"), (
                f"a step failed with ValueError: {CAT}: expected the cause and no tokens, got {output}. "
                f"{self.LOOK_FAIL}"
            )
        self.check_empty("after a failed step", self.LOOK_FAIL)
        assert 1 <= engine.num_failures <= num_failures_before + 1, (
            f"num_failures was {num_failures_before}, a step failed: got {engine.num_failures}. {self.LOOK_FAIL}"
        )
        self.failed |= expected

    def check_empty(self, where: str, look: str) -> None:
        engine, scheduler, blocks = self.engine, self.engine.scheduler, self.engine.blocks
        remaining = ids([*scheduler.running, *scheduler.waiting])
        assert not remaining and not engine.in_flight, (
            f"{where}: requests {remaining} and {len(engine.in_flight)} steps are there, expected none. {look}"
        )
        assert blocks.num_free_blocks == blocks.num_blocks - 1, (
            f"{where}: {blocks.num_used_blocks} blocks are not free. {look}"
        )
        assert not engine.unfinished, f"{where}: requests {engine.unfinished} count as unfinished. {look}"
        assert sorted(scheduler.free_rows) == list(range(scheduler.max_num_seqs)), (
            f"{where}: of {scheduler.max_num_seqs} rows only {sorted(scheduler.free_rows)} are free. {look}"
        )

    def receive(self, outputs: list[Any]) -> None:
        for output in outputs:
            name = output.request_id
            assert name not in self.aborted | self.failed, (
                f"request {name} was aborted, or failed, and it got {output}. {self.LOOK}"
            )
            self.num_outputs[name] += 1
            self.checks.merge(self.answers, output, f"step {self.engine.num_steps}")
            if output.finish_reason:
                self.ended.add(name)

    def check_scheduled(self) -> None:
        for step in self.engine.in_flight:
            requests, names = step.scheduled.requests, ids(step.scheduled.requests)
            assert len(set(names)) == len(names), f"a request is in a step twice: {names}. {self.LOOK}"
            for request in requests:
                assert request.num_expected_tokens <= request.max_num_tokens, (
                    f"request {request.request_id} is to get no longer than {request.max_num_tokens} tokens, and "
                    f"steps in flight will make them {request.num_expected_tokens}. {self.LOOK_LENGTH}"
                )

    @invariant()
    def adds_up(self) -> None:
        if hasattr(self, "engine"):
            self.checks.check_engine(self.engine, "between two calls")

    def most_steps(self) -> int:
        """No run needs more of them to its end."""
        return 10 + 4 * sum(len(prompt) + params.max_tokens for prompt, params in self.requests.values())

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        engine, executor = self.engine, executor_of(self.engine)
        limit = self.most_steps()
        for _ in range(limit):
            if not engine.has_unfinished_requests:
                break
            self.step()
        self.check_empty(f"after {limit} more steps", self.LOOK)
        for name in self.expected:
            self.check_answer(name)
        self.counts["chunks"] += sum(not work.is_sampled for step in executor.launched for work in step.work)
        self.counts["preemptions"] += engine.scheduler.num_preemptions
        self.check_end()
        executor.launch_error = executor.result_error = executor.preemption_error = None
        last = str(len(self.expected))
        self.ask([100], 3, True, 0)
        for _ in range(self.LAST_STEPS):  # whatever has happened, the engine can be used
            self.step()
        self.check_answer(last)
        self.check_empty("after one more request", self.LOOK)

    def check_answer(self, name: str) -> None:
        expected, answer = self.expected[name], self.answers.get(name)
        got = answer.token_ids if answer else []
        if name in self.aborted | self.failed:
            assert got == expected[: len(got)], f"request {name}, cut off: {got} does not begin {expected}. {self.LOOK}"
            return
        assert got == expected, f"request {name}: expected what it gets alone, {expected}, got {got}. {self.LOOK}"
        assert answer is not None and answer.finish_reason, f"request {name} never got a finish_reason. {self.LOOK}"
        wasted = executor_of(self.engine).num_samples(name) - self.num_outputs[name]
        may_waste = answer.finish_reason == "stop" and self.engine.max_steps_in_flight == 2
        assert 0 <= wasted <= may_waste, (
            f"request {name} ended with {answer.finish_reason!r}: {self.num_outputs[name]} steps brought it tokens, "
            f"and {wasted} more were computed for it, at most {int(may_waste)} may be. {self.LOOK_LENGTH}"
        )
        self.counts["wasted"] += wasted
        self.counts["answers"] += 1

    def check_end(self) -> None:
        """All requests have ended."""

    @classmethod
    def run(cls, max_examples: int, stateful_step_count: int, seed: int, wanted: dict[str, int]) -> None:
        """wanted: the least counts of all runs together."""
        cls.counts.clear()
        run_lives(cls, max_examples, stateful_step_count, seed)
        got = {name: cls.counts[name] for name in wanted}
        assert all(got[name] >= count for name, count in wanted.items()), (
            f"all runs together: {got}, too few to prove anything; expected at least {wanted}"
        )


class ChunkLife(EngineLife):
    """From part 6 on: small budgets, and requests that are preempted or aborted in the middle of their prompt."""

    MAX_MODEL_LEN = 80

    def begin_chunked(
        self, scripted_engine: Callable[..., Any], num_tokens_kv: int, block_size: int, max_num_seqs: int,
        spare_tokens: int, is_chunked: bool, threshold: int, is_async: bool, watermark_blocks: int, **flags: Any,
    ) -> None:  # fmt: skip
        smallest = max_num_seqs if is_chunked else self.MAX_MODEL_LEN
        engine = scripted_engine(
            self.MAX_MODEL_LEN,
            num_kv_blocks=1 + max(2, num_tokens_kv // block_size),
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=smallest + spare_tokens,
            enable_chunked_prefill=is_chunked,
            long_prefill_token_threshold=threshold,
            async_scheduling=is_async,
            **flags,
        )
        preempt = engine.scheduler.preempt

        def noted(request: Any) -> None:
            self.note_preemption(request)
            preempt(request)

        engine.scheduler.preempt = noted
        self.begin(engine, watermark_blocks)

    def note_preemption(self, request: Any) -> None:
        self.counts["preempted half-way"] += request.num_new_tokens > 1

    def room(self) -> int:
        """A prompt of this length takes all free blocks, so it is soon preempted, maybe in the middle."""
        blocks = self.engine.blocks
        num_blocks = blocks.num_free_blocks - self.engine.scheduler.watermark_blocks
        return min(max(1, num_blocks * blocks.block_size), 50)

    @precondition(lambda self: self.half_way())
    @rule(data=st.data())
    def abort_half_way(self, data: st.DataObject) -> None:
        self.abort_one(data.draw(st.sampled_from(self.half_way()), "request"))

    def half_way(self) -> list[str]:
        return [request.request_id for request in self.engine.scheduler.running if request.num_new_tokens > 1]

    def abort_one(self, name: str) -> None:
        self.counts["aborted half-way"] += name in self.half_way()
        super().abort_one(name)

    @rule(count=st.one_of(st.integers(1, 3), st.integers(1, 10)))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()


def beginning_of(base: int) -> list[int]:
    """50 tokens, of which the first 6 · base + 2 are the same for every base."""
    return [100 + position if position < 6 * base + 2 else 100 + position + base for position in range(50)]


class PrefixLife(ChunkLife):
    """From part 7 on: prompts that share prefixes, and requests that continue an earlier one's answer."""

    checks: PrefixChecks

    def note_preemption(self, request: Any) -> None:
        super().note_preemption(request)
        blocks = self.engine.blocks
        self.counts["preempted sharers"] += any(
            blocks.pool[block_id].ref_count > 1 for block_id in blocks.block_tables[request.request_id]
        )

    def begin_alike(self, base: int, length: int, tail: int) -> list[int]:
        """A prompt that has its first 6 · base + 2 tokens in common with those of base 0; its tail is its own."""
        own = [200 + (len(self.expected) + number) % 20 for number in range(tail)]
        return beginning_of(base)[:length] + own or [5]

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), num_new=st.integers(0, 4), max_tokens=st.integers(1, 9))
    def next_turn(self, data: st.DataObject, num_new: int, max_tokens: int) -> None:
        """A prompt that continues an earlier answer, ended or not."""
        name = data.draw(st.sampled_from(sorted(self.expected, key=int)), "request")
        (prompt, params), answer = self.requests[name], self.expected[name]
        if len(prompt) + len(answer) + num_new < self.MAX_MODEL_LEN - 1:
            self.counts["turns"] += 1
            new = [220 + number for number in range(num_new)]
            self.ask(prompt + answer + new, max_tokens, True, 0, cache_salt=params.cache_salt)

    def receive(self, outputs: list[Any]) -> None:
        self.checks.check_reads(self.engine, outputs)
        super().receive(outputs)

    def check_answer(self, name: str) -> None:
        super().check_answer(name)
        if name not in self.aborted | self.failed:
            self.counts["hits"] += bool(self.answers[name].num_cached_tokens)

    def check_end(self) -> None:
        hits = sum(answer.num_cached_tokens or 0 for answer in self.answers.values())
        assert hits <= self.engine.scheduler.num_hit_tokens, (
            f"{hits} tokens of hits reported, more than counted. {self.LOOK}"
        )
