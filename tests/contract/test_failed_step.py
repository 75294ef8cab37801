"""A step that fails fails what is in the engine, simply: every request ends once, with the cause, and the next one is
answered as if nothing had happened."""

from __future__ import annotations

import asyncio
import importlib
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from common.sampling_params import SamplingParams
from common.serving import GenerationError
from tests.contract.engines import SmallEngine, SmallModels, kinds_of, number_of, prompts_of

LOOK = "Look at core/engine.py::LLMEngine.fail and, from part 4 on, core/scheduler.py::Scheduler.reset."
LOOK_DEAD = (
    "Look at api/async_engine.py::AsyncLLM._step (parts 3 and 4), core/engine_core.py::EngineCore.step (from 5 on)."
)
CAUSE = "ZeroDivisionError: the cat sat on it"
NUM_TOKENS = 12
CALLS = {  # where a step can fail → which calls do; call 6 of append comes right after a request has ended
    "schedule": (1, 4), "prepare": (1, 4), "run": (2, 5), "append": (1, 6),
}  # fmt: skip


def break_step(engine: SmallEngine, place: str, call: int = 1, times: int = 1) -> Callable[[], None]:
    """From the call-th call from now on a function of the step fails, `times` times or until the returned is called."""
    owner, name = target_of(engine, place)
    real, count = getattr(owner, name), 0

    def fail(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if call <= count < call + times:
            raise ZeroDivisionError("the cat sat on it")
        return real(*args, **kwargs)

    setattr(owner, name, fail)
    return lambda: setattr(owner, name, real)


def target_of(engine: SmallEngine, place: str) -> tuple[Any, str]:
    """The object and the name of the function that a place stands for in this part."""
    runner = engine.worker.runner
    is_async = number_of(engine.part) >= 5  # the runner's halves are called by the worker there
    return {
        "schedule": (engine.core, "_schedule") if number_of(engine.part) == 3 else (engine.core.scheduler, "schedule"),
        "prepare": (runner, "prepare" if is_async else "_prepare"),
        "run": (runner, "run" if is_async else "_run"),
        "append": (engine.core, "_append"),
        "drafter": (getattr(engine.worker, "drafter", None), "propose"),
        "second pass of the drafter": (getattr(engine.worker, "drafter", None), "_forward"),
    }[place]


def step_until_it_fails(engine: SmallEngine) -> Exception:
    for _ in range(100):
        try:
            engine.step()
        except ZeroDivisionError as error:
            return error
    pytest.fail(f"{engine.part}: no step failed")


def fail_and_check(engine: SmallEngine, error: Exception, where: str) -> None:
    """LLMEngine.fail: each request that has not ended ends with the cause, and nothing is left."""
    unfinished = {request_id for request_id, answer in engine.answers.items() if not answer.ends}
    outputs = engine.core.fail(error)
    got = sorted((output.request_id, tuple(output.token_ids), output.error) for output in outputs)
    assert got == sorted((request_id, (), CAUSE) for request_id in unfinished), (
        f"{where}: requests {sorted(unfinished)} have not ended, and fail() says {got}. {LOOK}"
    )
    again = engine.core.fail(error)
    engine.core.num_failures -= 1  # the line above counted too
    assert not again, f"{where}: a request ends once, and a second fail() says {again}. {LOOK}"
    engine.note(outputs)
    for request_id, answer in engine.answers.items():
        assert len(answer.ends) == 1, f"{where}: request {request_id} must end exactly once, got {answer}. {LOOK}"
    engine.check_empty(f"{where}. {LOOK}")
    cached = getattr(engine.core.blocks, "cached_blocks", {})
    assert not cached, f"{where}: {len(cached)} blocks can still be found, whose content is not known. {LOOK}"


def check_next(engine: SmallEngine, models: SmallModels, prompt: list[int], where: str) -> None:
    """The next request gets its own answer, though its prompt was in the engine when the step failed."""
    expected, name = models.greedy(prompt, NUM_TOKENS), f"next {len(engine.answers)}"
    engine.add(name, prompt, max_tokens=NUM_TOKENS)
    answer = engine.finish()[name]
    assert (answer.token_ids, answer.ends) == (expected, ["length"]), (
        f"{where}: the next request expects {expected}, got {answer}. {LOOK}"
    )
    assert not answer.num_cached_tokens, f"{where}: it found {answer.num_cached_tokens} tokens in the cache. {LOOK}"
    assert engine.core.num_failures == 0, f"{where}: num_failures is {engine.core.num_failures}. {LOOK}"
    engine.check_empty(f"{where}, after the next request. {LOOK}")


def loaded_engine(part: str, models: SmallModels, **flags: Any) -> tuple[SmallEngine, list[list[int]]]:
    """Five requests in two rows: one ends soon, one goes on, three wait."""
    engine, prompts = SmallEngine(part, models, max_num_seqs=2, **flags), list(prompts_of(5))
    for number, prompt in enumerate(prompts):
        engine.add(str(number), prompt, max_tokens=3 if number == 0 else 30)
    return engine, prompts


@pytest.mark.since(3)
def test_a_failed_step_ends_every_request_once(part: str, small_models: SmallModels) -> None:
    """Wherever it fails, early and late, also right after a request has ended in the same step."""
    for kind, flags in kinds_of(part, small_models, with_ranks=False).items():
        for place, calls in CALLS.items():
            for call in calls:
                engine, prompts = loaded_engine(part, small_models, **flags)
                break_step(engine, place, call)
                error = step_until_it_fails(engine)
                where = f"{part} {kind}: call {call} of {place} fails"
                fail_and_check(engine, error, where)
                check_next(engine, small_models, prompts[1], where)


@pytest.mark.since(3)
def test_two_failed_steps_in_a_row(part: str, small_models: SmallModels) -> None:
    for kind, flags in kinds_of(part, small_models, with_ranks=False).items():
        for place in ("schedule", "run"):
            engine, prompts = loaded_engine(part, small_models, **flags)
            repair = break_step(engine, place, call=2, times=100)
            for count in (1, 2):
                where = f"{part} {kind}: failure {count} of {place} in a row"
                fail_and_check(engine, step_until_it_fails(engine), where)
                if place == "run":  # a step with nothing to do ends before it gets there
                    num_steps = engine.core.num_steps
                    assert not engine.core.step(), f"{where}: an idle engine has nothing to say. {LOOK}"
                    assert engine.core.num_steps == num_steps, f"{where}: a step with nothing to do counts. {LOOK}"
                assert engine.core.num_failures == count, f"{where}: num_failures={engine.core.num_failures}. {LOOK}"
                engine.add(f"between {count}", prompts[0])
            repair()
            engine.core.abort_requests(["between 2"])
            check_next(engine, small_models, prompts[1], f"{part} {kind}: after two failures")


@pytest.mark.since(5)
def test_a_step_fails_while_another_is_in_flight(part: str, small_models: SmallModels) -> None:
    """The one after it is waited for and dropped, though it fails as well: one failure, and none of its tokens."""
    engine, prompts = loaded_engine(part, small_models)
    run, may_go_on, num_run = engine.worker.runner.run, threading.Event(), 0

    def run_slowly(batch: Any) -> Any:
        nonlocal num_run
        is_in_flight = num_run == 2
        if is_in_flight:
            may_go_on.wait(60)
        output = run(batch)
        num_run += 1
        if is_in_flight:
            raise ValueError("the dog ate it")
        return output

    engine.worker.runner.run = run_slowly
    break_step(engine, "run", call=3)
    error = step_until_it_fails(engine)
    assert len(engine.core.in_flight) == 1, f"{part}: expected a step in flight, got {engine.core.in_flight}"
    threading.Timer(0.05, may_go_on.set).start()
    fail_and_check(engine, error, f"{part}: the third step fails, the fourth is in flight")
    assert num_run == 3, f"{part}: fail() returns, and the step in flight has not run to its end: {num_run}. {LOOK}"
    engine.worker.runner.run = run
    check_next(engine, small_models, prompts[1], f"{part}: after a failure with a step in flight")


@pytest.mark.since(3)
def test_a_step_fails_while_a_preempted_request_waits(part: str, small_models: SmallModels) -> None:
    status = importlib.import_module(f"{part}.core.request").RequestStatus
    for kind, flags in kinds_of(part, small_models, with_ranks=False).items():
        prompt = list(range(10, 18))
        engine = SmallEngine(part, small_models, **{"num_kv_blocks": 1 + 8, "max_num_seqs": 3, **flags})
        for name in "012":
            engine.add(name, [*prompt, int(name)], max_tokens=20)
        while not any(request.status is status.PREEMPTED for request in engine.queues.waiting):
            engine.step()
            assert engine.core.has_unfinished_requests, f"{part} {kind}: this test needs a preemption"
        where = f"{part} {kind}: a step fails, a preempted request waits"
        break_step(engine, "run")
        fail_and_check(engine, step_until_it_fails(engine), where)
        check_next(engine, small_models, [*prompt, 2], where)


@pytest.mark.since(8)
@pytest.mark.parametrize("place", ["drafter", "second pass of the drafter"])
def test_a_step_fails_while_the_drafter_runs(part: str, small_models: SmallModels, place: str) -> None:
    for kind, flags in kinds_of(part, small_models, with_ranks=False).items():
        if flags.get("speculative_method") == "draft_model":
            engine, prompts = loaded_engine(part, small_models, **flags)
            break_step(engine, place, call=6)
            where = f"{part} {kind}: call 6 of {place} fails"
            fail_and_check(engine, step_until_it_fails(engine), where)
            check_next(engine, small_models, prompts[1], where)


# The second failure in a row ends the engine


DEAD = f"two steps in a row failed, the second with {CAUSE}"


@pytest.mark.since(5)
def test_a_second_failure_in_a_row_ends_the_core(part: str, small_models: SmallModels) -> None:
    """The first is answered with errors, the second with EngineCoreDead, and the core's process ends with the cause."""
    module, messages = (importlib.import_module(f"{part}.{name}") for name in ("core.engine_core", "messages"))
    engine, prompts = loaded_engine(part, small_models)
    sent = list[bytes]()
    core = module.EngineCore(engine.core, SimpleNamespace(), SimpleNamespace(send=sent.append))
    break_step(engine, "run", times=3)
    outputs = take_steps(core, lambda outputs: outputs)
    assert sorted(output.request_id for output in outputs) == ["0", "1", "2", "3", "4"], f"got {outputs}. {LOOK_DEAD}"
    assert {output.error for output in outputs} == {CAUSE} and not sent, f"got {outputs}, sent {sent}. {LOOK_DEAD}"
    engine.add("next", prompts[0])
    with pytest.raises(ZeroDivisionError):
        take_steps(core, lambda outputs: False)
    [message] = map(messages.decode_from_core, sent)
    assert message == messages.EngineCoreDead(DEAD), f"expected the cause {DEAD!r}, got {message}. {LOOK_DEAD}"


def take_steps(core: Any, is_enough: Callable[[list[Any]], Any]) -> list[Any]:
    for _ in range(10):
        if is_enough(outputs := core.step()):
            return outputs
    pytest.fail(f"ten steps, and none failed. {LOOK_DEAD}")


@pytest.mark.since(3)
def test_a_second_failure_in_a_row_ends_async_llm(part: str, small_models: SmallModels) -> None:
    """Where it has the engine in a thread. Streams in the engine get the cause, and so does every later request."""
    if number_of(part) > 4:
        return  # the core's process ends: see above
    module = importlib.import_module(f"{part}.api.async_engine")
    config = importlib.import_module(f"{part}.config").EngineConfig(small_models.target, device="cpu", num_kv_blocks=50)
    llm = module.AsyncLLM(config)

    def fail(step: Any) -> None:
        raise ZeroDivisionError("the cat sat on it")

    async def read(prompt: list[int]) -> str:
        try:
            stream = llm.generate(prompt, SamplingParams(max_tokens=3))
            async for output in stream:
                return f"an output: {output}"
        except GenerationError as error:
            return str(error)
        return "no error"

    async def ask() -> list[str]:
        llm.start()
        return [await read(prompt) for prompt in prompts_of(3)]

    llm.engine.executor.execute = fail
    try:
        got = asyncio.run(asyncio.wait_for(ask(), timeout=60))
    finally:
        llm.shutdown()
    assert got[0] == got[1] == CAUSE, f"{part}: the first two streams end with the cause, got {got}. {LOOK_DEAD}"
    assert (got[2], llm.cause_of_death, llm.is_alive) == (DEAD, DEAD, False), f"{part}: got {got}. {LOOK_DEAD}"
