"""worker/model_runner.py: what a step takes from the requests when it is launched, and what it does when its turn comes."""  # noqa: E501

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from common.checkpoint import MODELS_DIR, resolve_checkpoint
from common.sampling_params import SamplingParams
from common.testing import reference_greedy, small_model
from part05_async_scheduling.config import EngineConfig
from part05_async_scheduling.core.block_manager import BlockManager
from part05_async_scheduling.core.request import Request
from part05_async_scheduling.core.scheduler import SchedulerOutput
from part05_async_scheduling.worker.model_runner import Batch, ModelRunner
from part05_async_scheduling.worker.sampler import SamplingState
from tests.part05.no_reads import reads_of

LESSON = 'README "Tokens that nobody has seen yet"'
LOOK_PREPARE = f"Look at worker/model_runner.py::ModelRunner._prepare; {LESSON}."
LOOK_RUN = f"Look at worker/model_runner.py::ModelRunner._run; {LESSON}."
LOOK_LAUNCH = 'Look at worker/model_runner.py::ModelRunner.launch; README "One step ahead".'
MAX_LEN, MAX_NUM_SEQS = 32, 3
DEADLINE_S = 20  # for what takes milliseconds; only a mistake makes a test wait this long
WORDS = [11, 12, 13, 14, 15, 16, 17]


class Steps:
    """A runner over a small random model, and the bookkeeping of a scheduler, by hand."""

    def __init__(self, directory: Path) -> None:
        config = EngineConfig(
            model=str(directory), device="cpu", num_kv_blocks=40, block_size=4, max_num_seqs=MAX_NUM_SEQS
        )
        self.runner = ModelRunner(config, resolve_checkpoint(str(directory)), MAX_LEN, MAX_LEN)
        self.runner.tokens.data.fill_(WORDS[-1])  # what others left there
        self.blocks = BlockManager(40, 4)
        self.left: list[str] = []

    def request(self, name: str, prompt: Sequence[int], output: Sequence[int] = (), **fields: Any) -> Request:
        params = SamplingParams(**{"temperature": 0, "max_tokens": 20, **fields})
        return Request(name, list(prompt), params, MAX_LEN, output_token_ids=list(output))

    def schedule(self, *requests: Request) -> SchedulerOutput:
        """What SchedulerOutput.add does, spelt out."""
        output, self.left = SchedulerOutput([], [], [], [], self.left), []
        for request in requests:
            expected = len(request.prompt_token_ids) + len(request.output_token_ids) + request.num_output_placeholders
            assert self.blocks.allocate(request.request_id, expected)
            output.requests.append(request)
            output.num_computed_tokens.append(request.num_computed_tokens)
            output.num_scheduled_tokens.append(expected - request.num_computed_tokens)
            request.num_computed_tokens = expected
            request.num_output_placeholders += 1
        return output

    def leave(self, request: Request) -> None:
        self.blocks.free(request.request_id)
        self.left.append(request.request_id)
        request.num_computed_tokens = 0

    def prepare(self, *requests: Request) -> Batch:
        scheduled = self.schedule(*requests)
        try:
            return self.runner._prepare(scheduled, self.blocks)
        except LookupError as error:
            pytest.fail(f"a step of {[request.request_id for request in requests]}: {error!r}. {LOOK_PREPARE}")

    def row(self, request: Request) -> int:
        return self.runner.tokens.rows[request.request_id]

    def places(self, request: Request, *positions: int) -> list[int]:
        return [self.row(request) * MAX_LEN + position for position in positions]


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model("llama", seed=5)


@pytest.fixture(scope="module")
def make_steps(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Steps]:
    directory = tmp_path_factory.mktemp("small")
    model.save_pretrained(directory)
    (directory / "tokenizer.json").symlink_to(MODELS_DIR / "tiny" / "tokenizer.json")
    return lambda: Steps(directory)


def check_batch(batch: Batch, expected: dict[str, Any], case: str) -> None:
    for name, want in expected.items():
        value = getattr(batch, name)
        got = value.tolist() if isinstance(value, torch.Tensor) else value
        assert got == want, f"{case}, {name}: expected {want}, got {got}. {LOOK_PREPARE}"


# Prepare


def test_a_step_of_new_requests(make_steps: Callable[[], Steps]) -> None:
    """Whole prompts are written to rows of their own, and read from there."""
    steps = make_steps()
    first, second = steps.request("a", WORDS[:3]), steps.request("b", WORDS[:5])
    batch = steps.prepare(first, second)
    expected = {
        "new_rows": [(steps.row(first), WORDS[:3]), (steps.row(second), WORDS[:5])],
        "input_places": [*steps.places(first, 0, 1, 2), *steps.places(second, 0, 1, 2, 3, 4)],
        "positions": [0, 1, 2, 0, 1, 2, 3, 4],
        "last_rows": [2, 7],
        "output_places": [*steps.places(first, 3), *steps.places(second, 5)],
    }
    check_batch(batch, expected, "prompts of 3 and 5 tokens")
    assert steps.row(first) != steps.row(second), f"two requests share a row. {LOOK_PREPARE}"


def test_a_step_behind_one_in_flight(make_steps: Callable[[], Steps]) -> None:
    """Its input is where the step before will write; a third request joins."""
    steps = make_steps()
    first, second, third = (steps.request(name, WORDS[:count]) for name, count in (("a", 3), ("b", 5), ("c", 2)))
    steps.prepare(first, second)
    batch = steps.prepare(first, second, third)
    expected = {
        "new_rows": [(steps.row(third), WORDS[:2])],
        "input_places": [*steps.places(first, 3), *steps.places(second, 5), *steps.places(third, 0, 1)],
        "positions": [3, 5, 0, 1],
        "last_rows": [0, 1, 3],
        "output_places": [*steps.places(first, 4), *steps.places(second, 6), *steps.places(third, 2)],
    }
    check_batch(batch, expected, "a and b decode tokens that nobody has seen, c joins")
    assert batch.metadata.num_decodes == 2 and batch.metadata.context_lens.tolist() == [4, 6], (
        f"a and b read 4 and 6 tokens from the cache, got {batch.metadata}. {LOOK_PREPARE}"
    )


def test_what_the_sampler_is_told(make_steps: Callable[[], Steps]) -> None:
    steps = make_steps()
    first, second = steps.request("a", WORDS[:3]), steps.request("b", WORDS[:2], WORDS[2:4])
    steps.prepare(second)
    got = steps.prepare(second, first).sampling
    expected = [
        SamplingState(second.params, None, steps.row(second), 2, 2 + 2 + 1),
        SamplingState(first.params, None, steps.row(first), 3, 3),
    ]
    assert got == expected, (
        "b has a prompt of 2, two tokens, and one in flight; a comes with a prompt of 3: expected (row, "
        f"num_prompt_tokens, num_tokens) {expected}, got {got}. {LOOK_PREPARE}"
    )


def test_a_request_that_comes_back(make_steps: Callable[[], Steps]) -> None:
    """Preempted: its row is written anew, with prompt and output."""
    steps = make_steps()
    request = steps.request("a", WORDS[:3])
    steps.prepare(request)
    steps.leave(request)
    request.output_token_ids.append(42)
    request.num_output_placeholders = 0
    batch = steps.prepare(request)
    expected = {
        "new_rows": [(steps.row(request), [*WORDS[:3], 42])],
        "positions": [0, 1, 2, 3],
        "input_places": steps.places(request, 0, 1, 2, 3),
        "output_places": steps.places(request, 4),
    }
    check_batch(batch, expected, "preempted with one token, and back")


def test_rows_of_who_has_left_are_free_before_new_ones_are_given_out(make_steps: Callable[[], Steps]) -> None:
    """All rows are taken. One has left, another is there in its place, in the same step."""
    steps = make_steps()
    requests = [steps.request(name, WORDS[:2]) for name in "abc"]
    steps.prepare(*requests)
    row, new = steps.row(requests[1]), steps.request("d", WORDS[:4])
    steps.leave(requests[1])
    batch = steps.prepare(requests[0], requests[2], new)
    assert batch.new_rows == [(row, WORDS[:4])], f"d takes b's row {row}: got {batch.new_rows}. {LOOK_PREPARE}"
    assert set(steps.runner.tokens.rows) == {"a", "c", "d"}, f"got {steps.runner.tokens.rows}. {LOOK_PREPARE}"


def test_what_changes_afterwards_does_not_change_the_step(make_steps: Callable[[], Steps]) -> None:
    """The step waits for its turn, and the scheduler goes on: tokens come, blocks go, the next step is scheduled."""
    steps = make_steps()
    request = steps.request("a", WORDS[:3], [42])
    batch = steps.prepare(request)
    slots, tables = batch.metadata.slot_mapping.tolist(), batch.metadata.block_tables.tolist()
    request.output_token_ids.append(43)
    request.prompt_token_ids.append(44)
    steps.schedule(request)
    steps.leave(request)
    steps.schedule(steps.request("b", WORDS))
    assert batch.new_rows == [(steps.row(request), [*WORDS[:3], 42])], f"got {batch.new_rows}. {LOOK_PREPARE}"
    assert batch.sampling == [SamplingState(request.params, None, steps.row(request), 3, 4)], (
        f"got {batch.sampling}. {LOOK_PREPARE}"
    )
    assert (batch.metadata.slot_mapping.tolist(), batch.metadata.block_tables.tolist()) == (slots, tables)


# Run


def test_one_step(make_steps: Callable[[], Steps], model: Any) -> None:
    steps = make_steps()
    first, second = steps.request("a", WORDS[:3]), steps.request("b", WORDS[:5])
    sampled = steps.runner._run(steps.prepare(first, second))
    expected = [reference_greedy(model, request.prompt_token_ids, 1)[0] for request in (first, second)]
    assert sampled.token_ids.tolist() == expected, f"expected {expected}, got {sampled.token_ids.tolist()}. {LOOK_RUN}"
    got = steps.runner.tokens.data[[steps.row(first), steps.row(second)], [3, 5]].tolist()
    assert got == expected, (
        f"the next step reads its tokens from the buffer: expected {expected} there, got {got}. {LOOK_RUN}"
    )
    prompt = steps.runner.tokens.data[steps.row(second), :5].tolist()
    assert prompt == WORDS[:5], f"the prompt stands in the row before its output: got {prompt}. {LOOK_RUN}"


def test_steps_that_were_prepared_before_the_first_one_ran(make_steps: Callable[[], Steps], model: Any) -> None:
    """Four of them, and nobody has told any request its token."""
    steps = make_steps()
    first, second, third = (steps.request(name, WORDS[:count]) for name, count in (("a", 3), ("b", 5), ("c", 1)))
    batches = [steps.prepare(first), steps.prepare(first, second), steps.prepare(first, second, third)]
    batches.append(steps.prepare(second, first, third))
    got = [steps.runner._run(batch).token_ids.tolist() for batch in batches]
    a, b, c = (reference_greedy(model, request.prompt_token_ids, 4) for request in (first, second, third))
    expected = [[a[0]], [a[1], b[0]], [a[2], b[1], c[0]], [b[2], a[3], c[1]]]
    assert got == expected, f"four steps of a, then b and c: expected {expected}, got {got}. {LOOK_RUN}"


def test_a_row_and_blocks_that_change_hands_while_steps_are_in_flight(
    make_steps: Callable[[], Steps], model: Any
) -> None:
    """a has ended, one of its steps is still to run; b has its row and its blocks in the step after that."""
    steps = make_steps()
    steps.runner.tokens._free_rows[:] = [0]
    steps.blocks.free_blocks.clear()
    steps.blocks.free_blocks.extend([7, 9])
    first, second = steps.request("a", WORDS[:5]), steps.request("b", WORDS[3:])
    batches = [steps.prepare(first), steps.prepare(first)]
    steps.leave(first)
    batches += [steps.prepare(second), steps.prepare(second)]
    got = [steps.runner._run(batch).token_ids.tolist() for batch in batches]
    a, b = (reference_greedy(model, request.prompt_token_ids, 2) for request in (first, second))
    assert got == [[a[0]], [a[1]], [b[0]], [b[1]]], f"expected {a}, then {b}, got {got}. {LOOK_RUN}"


def test_penalties_see_the_token_in_flight(make_steps: Callable[[], Steps], model: Any) -> None:
    """Steps are prepared ahead. No token may come twice."""
    steps = make_steps()
    penalties = {"presence_penalty": 2.0, "frequency_penalty": 2.0, "repetition_penalty": 2.0}
    request = steps.request("a", WORDS[:3], logit_bias={token: 60.0 for token in (20, 21, 22, 23)}, **penalties)
    batches = [steps.prepare(request) for _ in range(4)]
    got = [int(steps.runner._run(batch).token_ids) for batch in batches]
    assert sorted(got) == [20, 21, 22, 23], (
        f"four words are wanted, and each is penalised once it is out: expected all of them, got {got}. {LOOK_RUN}"
    )


def test_a_step_reads_nothing_back(make_steps: Callable[[], Steps]) -> None:
    steps = make_steps()
    requests = [steps.request("a", WORDS[:3]), steps.request("b", WORDS, temperature=1.0, top_k=3, logprobs=2)]
    requests.append(steps.request("c", WORDS[:2], repetition_penalty=1.3, min_tokens=4))
    for batch in (steps.prepare(*requests[:2]), steps.prepare(*requests)):
        found = reads_of(lambda batch=batch: steps.runner._run(batch))  # type: ignore[misc]
        assert not found, (
            f"{found} ask a tensor for its values: on a GPU the launch then waits for the step before. {LOOK_RUN}"
        )


# Launch


def test_a_launch_returns_before_the_model_has_run(
    make_steps: Callable[[], Steps], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps are under way, and the model has not begun."""
    steps, gate = make_steps(), threading.Event()
    forward, threads = steps.runner.model.forward, set[str]()

    def wait(*args: Any) -> Any:
        assert gate.wait(DEADLINE_S), f"the launch waits for the model. {LOOK_LAUNCH}"
        threads.add(threading.current_thread().name)
        return forward(*args)

    monkeypatch.setattr(steps.runner.model, "forward", wait)
    request = steps.request("a", WORDS[:3])
    handles = [steps.runner.launch(steps.schedule(request), steps.blocks) for _ in range(2)]
    assert steps.runner.num_tokens_computed == 3 + 1, f"got {steps.runner.num_tokens_computed}. {LOOK_LAUNCH}"
    gate.set()
    got = [int(handle.result().sampled.token_ids) for handle in handles]
    assert got == reference_greedy(model, WORDS[:3], 2), f"got {got}. {LOOK_LAUNCH}"
    assert threading.current_thread().name not in threads, f"the model ran in {threads}. {LOOK_LAUNCH}"


def test_a_launch_that_fails_raises_at_once_and_the_model_s_errors_come_with_the_result(
    make_steps: Callable[[], Steps], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = make_steps()
    stranger = steps.schedule(steps.request("a", WORDS[:3]))
    steps.blocks.free("a")
    with pytest.raises(KeyError):
        steps.runner.launch(stranger, steps.blocks)
    monkeypatch.setattr(steps.runner.model, "forward", lambda *_: 1 / 0)
    handle = steps.runner.launch(steps.schedule(steps.request("b", WORDS[:3])), steps.blocks)
    with pytest.raises(ZeroDivisionError):
        handle.result()
