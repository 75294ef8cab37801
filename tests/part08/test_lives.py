"""The engine's bookkeeping, with a scripted model and guesses of all kinds: everything at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from part08_speculative_decoding.engine import LLMEngine, StepFailedError
from part08_speculative_decoding.messages import EngineCoreOutput
from part08_speculative_decoding.request import Request
from tests.lives import run_lives
from tests.part08.scripted import (
    BY_PROMPT,
    END,
    answer_alone,
    check_engine,
    check_reads,
    ids,
    merge,
    params_for,
    proposer_of,
    runner_of,
    scripted_engine,
    take_step,
)

LOOK = 'Look at engine.py::LLMEngine.step, _update, _append and scheduler.py; README "What the step brought".'
LOOK_FAIL = (
    'Look at engine.py::LLMEngine._blaming and scheduler.py::Scheduler.fail_step; README "What the step brought".'
)
LOOK_LENGTH = 'Look at scheduler.py::Scheduler._schedule_running; README of part 5, "What the future may assume".'
MAX_MODEL_LEN = 80
KINDS = [
    ["right"], ["half"], ["right", "wrong", "half", "few", "none"], [BY_PROMPT, "right", "wrong"],
    [BY_PROMPT, "right", "wrong", "half"], [],
]  # fmt: skip
CAT = "the cat sat on it"
STOP = 7  # a token that ends the answers of those who ask for it


def beginning_of(base: int) -> list[int]:
    """50 tokens, the first 6 · base + 2 of which are all bases'."""
    return [100 + position if position < 6 * base + 2 else 100 + position + base for position in range(50)]


class Life(RuleBasedStateMachine):
    """Whoever drives the engine: adds, aborts and steps, and aborts the requests of a step that failed."""

    counts: Counter[str] = Counter()  # of all lives together

    @initialize(
        num_tokens_kv=st.integers(4, 64),
        block_size=st.sampled_from([1, 2, 4, 8]),
        max_num_seqs=st.integers(1, 6),
        spare_tokens=st.one_of(st.integers(0, 6), st.integers(0, 6), st.integers(0, 60)),
        is_chunked=st.sampled_from([True, True, True, False]),
        threshold=st.sampled_from([0, 0, 1, 2, 3, 7, 30]),
        is_async=st.booleans(),
        watermark_blocks=st.integers(0, 3),
        kinds=st.sampled_from(KINDS),
        num_guesses=st.integers(1, 6),
        max_guessing=st.sampled_from([1, 2, 3, 4, 8, 8, 8]),
    )
    def start(
        self, num_tokens_kv: int, block_size: int, max_num_seqs: int, spare_tokens: int, is_chunked: bool,
        threshold: int, is_async: bool, watermark_blocks: int, kinds: list[str], num_guesses: int, max_guessing: int,
    ) -> None:  # fmt: skip
        smallest = max_num_seqs if is_chunked else MAX_MODEL_LEN
        self.engine: LLMEngine = scripted_engine(
            MAX_MODEL_LEN,
            num_kv_blocks=1 + max(2, num_tokens_kv // block_size),
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=smallest + spare_tokens,
            enable_chunked_prefill=is_chunked,
            long_prefill_token_threshold=threshold,
            async_scheduling=is_async,
            kinds=kinds,
            num_speculative_tokens=num_guesses,
            speculative_max_num_seqs=max_guessing,
        )
        self.engine.scheduler.watermark_blocks = watermark_blocks
        self.preempt = self.engine.scheduler.preempt
        self.engine.scheduler.preempt = self.counted_preempt  # type: ignore[method-assign]
        self.capacity = self.engine.limits.num_kv_tokens
        self.prompts: dict[str, tuple[list[int], str | None]] = {}
        self.expected: dict[str, list[int]] = {}
        self.answers: dict[str, EngineCoreOutput] = {}
        self.ended: set[str] = set()
        self.aborted: set[str] = set()
        self.failed: set[str] = set()
        self.num_tokens = 0  # of all prompts and answers
        self.num_outputs: Counter[str] = Counter()

    def counted_preempt(self, request: Request) -> None:
        Life.counts["preempted half-way"] += request.num_missing_tokens > 1
        Life.counts["preempted with guesses in flight"] += request.num_output_placeholders > 1
        blocks = self.engine.blocks
        Life.counts["preempted sharers"] += any(
            blocks.pool[block_id].ref_count > 1 for block_id in blocks.block_tables[request.request_id]
        )
        self.preempt(request)

    @rule(
        base=st.integers(0, 3), length=st.integers(0, 50), tail=st.integers(0, 5), max_tokens=st.integers(1, 24),
        ignore_eos=st.booleans(), min_tokens=st.integers(0, 3), salt=st.sampled_from([None, None, None, "a", "b"]),
        has_stop=st.booleans(),
    )  # fmt: skip
    def arrive(
        self, base: int, length: int, tail: int, max_tokens: int, ignore_eos: bool, min_tokens: int, salt: str | None,
        has_stop: bool,
    ) -> None:  # fmt: skip
        """Prompts begin alike: those of base 1 with all of base 0's first 6 tokens, and so on; a tail is their own."""
        own = [200 + (len(self.expected) + number) % 20 for number in range(tail)]
        self.ask(beginning_of(base)[:length] + own or [5], max_tokens, ignore_eos, min_tokens, salt, [STOP] * has_stop)

    def ask(
        self, prompt: list[int], max_tokens: int, ignore_eos: bool, min_tokens: int, salt: str | None,
        stop_token_ids: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """min_tokens: the script does not hold END back, so it only keeps an early one from ending the answer."""
        prompt = prompt[: self.capacity]
        max_tokens = max(1, min(max_tokens, self.capacity + 1 - len(prompt)))  # the last token is never stored
        name, min_tokens = str(len(self.expected)), min(min_tokens, max_tokens)
        self.num_tokens += len(prompt) + max_tokens
        params = params_for(
            max_tokens, ignore_eos=ignore_eos, min_tokens=min_tokens, cache_salt=salt, stop_token_ids=stop_token_ids
        )
        self.engine.add_request(name, prompt, params)
        whole = answer_alone(prompt, min(max_tokens, MAX_MODEL_LEN - len(prompt)), ignore_eos=True)
        ends = {*stop_token_ids, *([] if ignore_eos else [END])}
        stops = [n for n, token in enumerate(whole, 1) if token in ends and n >= min_tokens]
        self.prompts[name], self.expected[name] = (prompt, salt), whole[: min(stops, default=len(whole))]

    @rule(base=st.integers(0, 3), length=st.integers(1, 24), max_tokens=st.integers(1, 24), count=st.integers(2, 5))
    def arrive_together(self, base: int, length: int, max_tokens: int, count: int) -> None:
        for number in range(count):
            self.ask(beginning_of(base)[: length + number % 2], max_tokens, number % 3 == 0, 0, None)

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), num_new=st.integers(0, 4), max_tokens=st.integers(1, 9))
    def next_turn(self, data: st.DataObject, num_new: int, max_tokens: int) -> None:
        """A prompt that goes on where an earlier answer ended, or is at the moment."""
        name = data.draw(st.sampled_from(sorted(self.expected, key=int)), "request")
        (prompt, salt), answer = self.prompts[name], self.expected[name]
        if len(prompt) + len(answer) + num_new < MAX_MODEL_LEN - 1:
            Life.counts["turns"] += 1
            self.ask(prompt + answer + [220 + number for number in range(num_new)], max_tokens, True, 0, salt)

    @precondition(lambda self: self.engine.scheduler.running)
    @rule(length=st.integers(1, 20), max_tokens=st.integers(1, 24))
    def join_guessers(self, length: int, max_tokens: int) -> None:
        """Somebody joins the step in which guesses are checked, so that more run when the next one is scheduled."""
        for _ in range(30):
            if any(
                request.draft_token_ids and not request.num_output_placeholders
                for request in self.engine.scheduler.running
            ):
                Life.counts["joined guessers"] += 1
                break
            self.step()
        self.ask(beginning_of(1)[:length], max_tokens, True, 0, None)
        self.step()
        self.step()

    @precondition(lambda self: self.engine.scheduler.running and not self.engine.scheduler.waiting)
    @rule(max_tokens=st.integers(1, 16))
    def fill_up(self, max_tokens: int) -> None:
        """A prompt takes all that it may: who needs another block soon throws it out again, maybe half-way."""
        blocks = self.engine.blocks
        num_blocks = blocks.num_free_blocks - self.engine.scheduler.watermark_blocks
        length = min(max(1, num_blocks * blocks.block_size), 50)
        self.ask(beginning_of(3)[:length], max_tokens, True, 0, f"salt {len(self.expected)}")
        for _ in range(4):
            self.step()

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        """Anybody who has ever come: waiting, running, in flight, preempted, ended, aborted."""
        self.abort_one(data.draw(st.sampled_from(sorted(self.expected, key=int)), "request"))

    @precondition(lambda self: self.half_way())
    @rule(data=st.data())
    def abort_half_way(self, data: st.DataObject) -> None:
        self.abort_one(data.draw(st.sampled_from(self.half_way()), "request"))

    def half_way(self) -> list[str]:
        return [request.request_id for request in self.engine.scheduler.running if request.num_missing_tokens > 1]

    def abort_one(self, name: str) -> None:
        half_way = self.half_way()
        self.engine.abort_requests([name])
        if name not in self.ended | self.failed | self.aborted:
            self.aborted.add(name)
            Life.counts["aborted half-way"] += name in half_way
            Life.counts["aborts"] += 1
        check_engine(self.engine, f"after the abort of {name}")

    @rule(count=st.one_of(st.integers(1, 2), st.integers(1, 4), st.integers(1, 10)))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    @precondition(lambda self: self.engine.scheduler.has_unfinished_requests)
    @rule(which=st.sampled_from(["launch_error", "result_error", "preemption_error", "error"]))
    def step_that_fails(self, which: str) -> None:
        """The next step that is launched, or the next in which somebody is preempted; a result fails a step later.

        error: the next guesses fail.
        """
        if which == "error" and self.engine.proposer is None:
            return
        setattr(runner_of(self.engine) if which != "error" else proposer_of(self.engine), which, ValueError(CAT))
        self.step()

    def step(self) -> None:
        engine, runner = self.engine, runner_of(self.engine)
        errors = (runner.launch_error, runner.result_error, runner.preemption_error)
        guesses_fail = engine.proposer is not None and proposer_of(engine).error is not None
        may_fail = any(errors) or guesses_fail or any(step.error for step in runner.launched[-2:])
        try:
            outputs = LLMEngine.step(engine) if may_fail else take_step(engine)
        except StepFailedError as failure:
            assert CAT in str(failure.__cause__), f"{failure.__cause__!r}. {LOOK}"
            twice = set(failure.request_ids) & (self.ended | self.aborted | self.failed)
            assert not twice, f"requests {sorted(twice)} had ended, and end again with a step that failed. {LOOK_FAIL}"
            shared = set(failure.request_ids) - {work.request_id for step in runner.launched[-2:] for work in step.work}
            Life.counts["failures of sharers"] += bool(shared)
            engine.abort_requests(failure.request_ids)
            self.failed |= set(failure.request_ids)
            Life.counts["failures"] += 1
            outputs = []
        check_reads(engine, outputs)
        for output in outputs:
            name = output.request_id
            assert name not in self.aborted | self.failed, (
                f"request {name} was aborted, or its step failed, and it got {output}. {LOOK}"
            )
            self.num_outputs[name] += 1
            Life.counts["outputs of several tokens"] += len(output.token_ids) > 1
            Life.counts["ended among guesses that stood"] += bool(output.finish_reason) and len(output.token_ids) > 1
            merge(self.answers, output, f"step {engine.num_steps}")
            if output.finish_reason:
                self.ended.add(name)
        check_engine(engine, f"after step {engine.num_steps}")
        self.check_scheduled()
        Life.counts["steps"] += 1

    def check_scheduled(self) -> None:
        for step in self.engine.in_flight:
            requests, names = step.scheduled.requests, ids(step.scheduled.requests)
            assert len(set(names)) == len(names), f"somebody is in a step twice: {names}. {LOOK}"
            for request in requests:
                assert request.num_expected_tokens <= request.max_num_tokens, (
                    f"request {request.request_id} is to get no longer than {request.max_num_tokens} tokens, and "
                    f"steps in flight will make them {request.num_expected_tokens}. {LOOK_LENGTH}"
                )

    @invariant()
    def adds_up(self) -> None:
        if hasattr(self, "engine"):
            check_engine(self.engine, "between two calls")

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        engine, runner = self.engine, runner_of(self.engine)
        limit = 10 + 4 * self.num_tokens
        for _ in range(limit):
            if not engine.has_unfinished_requests:
                break
            self.step()
        left = ids([*engine.scheduler.running, *engine.scheduler.waiting])
        assert not left and not engine.in_flight, f"{left} have not ended after {limit} steps. {LOOK}"
        blocks = engine.blocks
        assert blocks.num_free_blocks == blocks.num_blocks - 1, f"{blocks.num_used_blocks} blocks are not free. {LOOK}"
        for name, expected in self.expected.items():
            answer = self.answers.get(name)
            got = answer.token_ids if answer else []
            if name in self.aborted | self.failed:
                assert got == expected[: len(got)], f"request {name}, cut off: {got} does not begin {expected}. {LOOK}"
                continue
            assert got == expected, f"request {name}: expected what it gets alone, {expected}, got {got}. {LOOK}"
            assert answer is not None and answer.finish_reason, f"request {name} was never told to have ended. {LOOK}"
            wasted = runner.num_steps_for(name) - self.num_outputs[name]
            may_waste = answer.finish_reason == "stop" and engine.max_steps_in_flight == 2
            assert 0 <= wasted <= may_waste, (
                f"request {name} ended with {answer.finish_reason!r}: {self.num_outputs[name]} steps brought it "
                f"tokens, and {wasted} more were made for it, at most {int(may_waste)} may be. {LOOK_LENGTH}"
            )
            Life.counts["wasted"] += wasted
            Life.counts["answers"] += 1
            Life.counts["hits"] += bool(answer.num_cached_tokens)
        hits = sum(answer.num_cached_tokens or 0 for answer in self.answers.values())
        assert hits <= engine.scheduler.num_hit_tokens, f"{hits} tokens of hits told, more than counted. {LOOK}"
        Life.counts["chunks"] += sum(not work.output_places for step in runner.launched for work in step.work)
        Life.counts["preemptions"] += engine.scheduler.num_preemptions
        self.check_stats()
        runner.launch_error = runner.result_error = runner.preemption_error = None
        engine.add_request("last", [100], params_for(1))  # its launch tells the runner who has left
        self.step()
        rows = set(runner.tokens.rows)
        assert rows == {"last"}, f"one request is there, rows of the token buffer are held by {rows}. {LOOK}"

    def check_stats(self) -> None:
        """The counts are those of the guesses that were in steps; some of them nobody looked at any more."""
        stats = self.engine.speculation.stats
        num_made = sum(len(work.draft_ids) for step in runner_of(self.engine).launched for work in step.work)
        assert stats.num_accepted_tokens <= stats.num_draft_tokens <= num_made, f"{stats}, {num_made} made. {LOOK}"
        assert sum(stats.num_accepted_at) == stats.num_accepted_tokens, f"{stats} does not add up. {LOOK}"
        Life.counts["guesses"] += num_made
        Life.counts["guesses that stood"] += stats.num_accepted_tokens


def test_random_lives() -> None:
    """Whatever comes, in whatever order: all get what they get alone, exactly once."""
    Life.counts.clear()
    run_lives(Life, max_examples=90, stateful_step_count=22)
    wanted = {
        "steps": 2_000, "chunks": 1_000, "answers": 500, "hits": 300, "turns": 50, "preemptions": 80,
        "preempted half-way": 10, "preempted sharers": 60, "preempted with guesses in flight": 1, "aborts": 50,
        "failures": 40, "failures of sharers": 10, "wasted": 5, "guesses": 1_000, "guesses that stood": 500,
        "outputs of several tokens": 300, "joined guessers": 8, "ended among guesses that stood": 50,
    }  # fmt: skip
    got = {name: Life.counts[name] for name in wanted}
    assert all(got[name] >= count for name, count in wanted.items()), (
        f"all lives together: {got}, too few to prove anything; expected at least {wanted}"
    )
