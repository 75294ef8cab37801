"""core/scheduler.py with several pipeline stages: whose turn it is, and which tokens go to the first stages."""

from __future__ import annotations

from collections import deque

import pytest

from common.sampling_params import SamplingParams
from part09_tensor_parallelism.config import EngineConfig
from part09_tensor_parallelism.core.block_manager import BlockManager
from part09_tensor_parallelism.core.engine import LLMEngine
from part09_tensor_parallelism.core.request import Request
from part09_tensor_parallelism.core.scheduler import Scheduler, SchedulerOutput
from part09_tensor_parallelism.core.speculation import Speculation
from part09_tensor_parallelism.messages import ScheduledRequest
from tests.part09.scripted import LOOK_TOKENS, LOOK_TURN, checks, scripted_engine, shares_of
from tests.scripted import answer_alone, executor_of, params_for


def scheduler_of(num_stages: int, num_decodes: int, budget: int = 64) -> Scheduler:
    """With requests that decode: their prompts are computed, and no step is in flight."""
    speculation = Speculation(EngineConfig(device="cpu"))
    scheduler = Scheduler(
        BlockManager(200, 4), 16, budget, speculation=speculation, watermark=0, num_stages=num_stages
    )  # fmt: skip
    for number in range(num_decodes):
        add(scheduler, str(number), 4)
    if num_decodes:
        finish(scheduler.schedule())
    return scheduler


def add(scheduler: Scheduler, name: str, num_tokens: int) -> None:
    prompt = [10 * int(name) + number for number in range(num_tokens)]
    scheduler.add_request(Request(name, prompt, SamplingParams(max_tokens=50), num_tokens + 50))


def finish(output: SchedulerOutput) -> None:
    """The step's tokens arrive: 90 for each request."""
    for request, share in output.pairs:
        if share.is_sampled:
            request.num_output_placeholders -= 1
            request.output_token_ids.append(90)


def names_of(output: SchedulerOutput) -> list[str]:
    return [request.request_id for request in output.requests]


@pytest.mark.parametrize(
    ("num_stages", "num_decodes", "expected"),
    [(1, 4, [4]), (2, 4, [2, 2]), (2, 5, [3, 2]), (3, 7, [3, 3, 1]), (3, 2, [1, 1, 0]), (4, 1, [1, 0, 0, 0])],
)
def test_every_step_in_the_pipeline_has_an_equal_share(num_stages: int, num_decodes: int, expected: list[int]) -> None:
    """And a request is in one of them, until its token arrives."""
    scheduler = scheduler_of(num_stages, num_decodes)
    outputs = [scheduler.schedule() for _ in range(num_stages)]
    got = [len(output.requests) for output in outputs]
    assert got == expected, f"{num_decodes} decodes, {num_stages} stages: expected {expected}, got {got}. {LOOK_TURN}"
    names = [name for output in outputs for name in names_of(output)]
    assert len(set(names)) == num_decodes, f"each request once, got {names}. {LOOK_TURN}"
    first = names_of(outputs[0])
    finish(outputs[0])
    again = names_of(scheduler.schedule())
    assert again == first, f"the tokens of {first} have arrived: they are next, got {again}. {LOOK_TURN}"


def run_pipeline(scheduler: Scheduler, num_steps: int) -> list[dict[str, ScheduledRequest]]:
    """The steps, of which as many are in flight as there are stages."""
    in_flight, steps = deque[SchedulerOutput](), []
    for _ in range(num_steps):
        if len(in_flight) == scheduler.num_stages:
            finish(in_flight.popleft())
        in_flight.append(scheduler.schedule())
        steps.append(shares_of(in_flight[-1]))
    return steps


def test_a_prefill_has_a_chunk_in_every_step() -> None:
    """It needs no token of a step in flight, so it does not wait for its turn."""
    scheduler = scheduler_of(2, 4, budget=16)
    add(scheduler, "9", 40)
    got = [step["9"].num_scheduled_tokens for step in run_pipeline(scheduler, 3)]
    assert got == [14, 14, 12], (
        f"a prompt of 40 tokens, and 2 decodes in each step of 16: expected [14, 14, 12], got {got}. {LOOK_TURN}"
    )


def test_the_first_stages_get_each_token_once() -> None:
    steps = run_pipeline(scheduler_of(2, 2), 4)
    got = [{name: share.new_token_ids for name, share in step.items()} for step in steps]
    expected = [{"0": [90]}, {"1": [90]}] * 2
    assert got == expected, f"each step brings a request's newest token: expected {expected}, got {got}. {LOOK_TOKENS}"


def test_a_single_stage_needs_no_tokens() -> None:
    scheduler = scheduler_of(1, 2)
    output = scheduler.schedule()
    got = [share.new_token_ids for share in shares_of(output).values()]
    assert got == [[], []], f"its token buffer has them, got {got}. {LOOK_TOKENS}"


@pytest.mark.parametrize("num_stages", [2, 3])
@pytest.mark.parametrize("is_async", [True, False])
def test_as_many_steps_in_flight_as_stages(num_stages: int, is_async: bool) -> None:
    """Without enough requests there are fewer: a step that has nothing to compute is not launched."""
    engine: LLMEngine = scripted_engine(pipeline_parallel_size=num_stages, async_scheduling=is_async)
    prompts = [[10 + number, 11, 12] for number in range(6)]
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), prompt, params_for(12, ignore_eos=True))
    most = 0

    def note(number: int) -> None:
        nonlocal most
        most = max(most, len(engine.in_flight) + 1)

    answers = checks.run_dry(engine, note)
    assert most == num_stages, f"{num_stages} stages, async {is_async}: {most} steps in flight. {LOOK_TURN}"
    for number, prompt in enumerate(prompts):
        got, expected = answers[str(number)].token_ids, answer_alone(prompt, 12, ignore_eos=True)
        assert got == expected, f"request {number}: expected {expected}, got {got}. {LOOK_TURN}"
    sizes = [len(step.work) for step in executor_of(engine).launched]
    assert all(sizes), f"steps of {sizes} requests. {LOOK_TURN}"


def test_a_preempted_request_is_sent_again_as_a_whole() -> None:
    """Its row may be another one by then, and the first stages forget what a row held."""
    engine: LLMEngine = scripted_engine(
        pipeline_parallel_size=2, num_kv_blocks=9, block_size=4, max_num_seqs=4, enable_prefix_caching=False
    )
    engine.scheduler.watermark_blocks = 0
    prompts = [[10 + number] * 6 for number in range(4)]
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), prompt, params_for(14, ignore_eos=True))
    answers = checks.run_dry(engine)
    assert engine.scheduler.num_preemptions, "the pool is too large for this test"
    for number, prompt in enumerate(prompts):
        got, expected = answers[str(number)].token_ids, answer_alone(prompt, 14, ignore_eos=True)
        assert got == expected, f"request {number}: expected {expected}, got {got}. {LOOK_TOKENS}"
