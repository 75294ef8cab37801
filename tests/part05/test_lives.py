"""The engine's bookkeeping with a scripted model: requests come, go, end and fail in any order, ahead or not."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from part05_async_scheduling.engine import LLMEngine, StepFailedError
from part05_async_scheduling.messages import EngineCoreOutput
from tests.lives import run_lives
from tests.part05.scripted import (
    END,
    answer_alone,
    check_engine,
    ids,
    merge,
    params_for,
    runner_of,
    scripted_engine,
    take_step,
)

LOOK = 'Look at engine.py::LLMEngine.step, _update, _append and scheduler.py; README "A token too late".'
LOOK_LENGTH = 'Look at scheduler.py::Scheduler._schedule_running; README "What the future may assume".'
MAX_MODEL_LEN = 24


class Life(RuleBasedStateMachine):
    """Whoever drives the engine: adds, aborts and steps, and aborts the requests of a step that failed."""

    counts: Counter[str] = Counter()  # of all lives together

    @initialize(
        num_usable=st.integers(3, 14),
        block_size=st.sampled_from([1, 2, 4]),
        max_num_seqs=st.integers(1, 6),
        spare_tokens=st.integers(0, 20),
        is_async=st.booleans(),
        watermark_blocks=st.integers(0, 3),
    )
    def start(self, is_async: bool, watermark_blocks: int, spare_tokens: int, num_usable: int, **flags: Any) -> None:
        self.engine: LLMEngine = scripted_engine(
            MAX_MODEL_LEN,
            num_kv_blocks=1 + num_usable,
            max_num_batched_tokens=MAX_MODEL_LEN + spare_tokens,
            async_scheduling=is_async,
            **flags,
        )
        self.engine.scheduler.watermark_blocks = watermark_blocks
        self.capacity = self.engine.limits.num_kv_tokens
        self.expected: dict[str, list[int]] = {}
        self.answers: dict[str, EngineCoreOutput] = {}
        self.ended: set[str] = set()
        self.aborted: set[str] = set()
        self.failed: set[str] = set()

    @rule(
        length=st.integers(1, 16), max_tokens=st.integers(1, 16), ignore_eos=st.booleans(), min_tokens=st.integers(0, 3)
    )
    def arrive(self, length: int, max_tokens: int, ignore_eos: bool, min_tokens: int) -> None:
        """min_tokens: the script does not hold END back, so it only keeps an early one from ending the answer."""
        length = min(length, self.capacity)
        max_tokens = max(1, min(max_tokens, self.capacity + 1 - length))  # the last token is never stored
        name, min_tokens = str(len(self.expected)), min(min_tokens, max_tokens)
        prompt = [100 + (int(name) * 31 + position * 7) % 150 for position in range(length)]
        self.engine.add_request(
            name, prompt, params_for(max_tokens, ignore_eos=ignore_eos, min_tokens=min_tokens)
        )  # fmt: skip
        whole = answer_alone(prompt, min(max_tokens, MAX_MODEL_LEN - length), ignore_eos=True)
        stops = [n for n, token in enumerate(whole, 1) if token == END and n >= min_tokens and not ignore_eos]
        self.expected[name] = whole[: min(stops, default=len(whole))]

    @rule(length=st.integers(1, 12), max_tokens=st.integers(1, 16), count=st.integers(2, 5))
    def arrive_together(self, length: int, max_tokens: int, count: int) -> None:
        for number in range(count):
            self.arrive(length + number % 2, max_tokens, number % 3 == 0, 0)

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        """Anybody who has ever come: waiting, running, in flight, preempted, ended, aborted."""
        name = data.draw(st.sampled_from(sorted(self.expected, key=int)), "request")
        self.engine.abort_requests([name])
        if name not in self.ended | self.failed | self.aborted:
            self.aborted.add(name)
            Life.counts["aborts"] += 1
        check_engine(self.engine, f"after the abort of {name}")

    @rule(count=st.integers(1, 10))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    @precondition(lambda self: self.engine.scheduler.has_unfinished_requests)
    @rule(at_launch=st.booleans())
    def step_that_fails(self, at_launch: bool) -> None:
        """The next step that is launched; if its result fails, that may come a step later."""
        name = "launch_error" if at_launch else "result_error"
        setattr(runner_of(self.engine), name, ValueError("the cat sat on it"))
        self.step()

    def step(self) -> None:
        engine, runner = self.engine, runner_of(self.engine)
        may_fail = runner.launch_error or runner.result_error or any(step.error for step in runner.launched[-2:])
        try:
            outputs = LLMEngine.step(engine) if may_fail else take_step(engine)
        except StepFailedError as failure:
            assert "the cat sat on it" in str(failure.__cause__), f"{failure.__cause__!r}. {LOOK}"
            engine.abort_requests(failure.request_ids)
            self.failed |= set(failure.request_ids) - self.ended - self.aborted
            Life.counts["failures"] += 1
            outputs = []
        for output in outputs:
            name = output.request_id
            assert name not in self.aborted | self.failed, (
                f"request {name} was aborted, or its step failed, and it got {output}. {LOOK}"
            )
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
        limit = 10 + 2 * sum(map(len, self.expected.values()))
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
            wasted = runner.num_samples(name) - len(expected)
            may_waste = answer.finish_reason == "stop" and engine.max_steps_in_flight == 2
            assert 0 <= wasted <= may_waste, (
                f"request {name} ended with {answer.finish_reason!r}: {len(expected)} tokens, and {wasted} more were "
                f"sampled, at most {int(may_waste)} may be. {LOOK_LENGTH}"
            )
            Life.counts["wasted"] += wasted
        Life.counts["preemptions"] += engine.scheduler.num_preemptions
        engine.add_request("last", [100], params_for(1))  # its launch tells the runner who has left
        self.step()
        rows = set(runner.tokens.rows)
        assert rows == {"last"}, f"one request is there, rows of the token buffer are held by {rows}. {LOOK}"


def test_random_lives() -> None:
    """Whatever comes, in whatever order: all get what they get alone, exactly once."""
    Life.counts.clear()
    run_lives(Life, max_examples=80, stateful_step_count=25)
    wanted = {"steps": 2_000, "preemptions": 100, "aborts": 50, "failures": 40, "wasted": 30}
    got = {name: Life.counts[name] for name in wanted}
    assert all(got[name] >= count for name, count in wanted.items()), (
        f"all lives together: {got}, too few to prove anything; expected at least {wanted}"
    )
