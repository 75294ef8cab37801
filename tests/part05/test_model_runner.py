"""worker/model_runner.py and worker.py: what a launch takes from a StepInput, and what a step does when it runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from common.checkpoint import MODELS_DIR, resolve_checkpoint
from common.sampling_params import SamplingParams
from common.testing import reference_greedy, small_model
from part05_async_scheduling.config import EngineConfig, resolve_config
from part05_async_scheduling.messages import NewRequest, ScheduledRequest, StepInput
from part05_async_scheduling.worker.model_runner import Batch
from part05_async_scheduling.worker.sampler import SamplingState
from part05_async_scheduling.worker.worker import Worker
from tests.part05.no_reads import reads_of

LESSON = 'README "The token buffer"'
LOOK_PREPARE = f"Look at worker/model_runner.py::ModelRunner.prepare; {LESSON}."
LOOK_RUN = f"Look at worker/model_runner.py::ModelRunner.run; {LESSON}."
LOOK_LAUNCH = 'Look at worker/worker.py::Worker.launch; README "One step ahead".'
MAX_LEN, MAX_NUM_SEQS, BLOCK_SIZE, NUM_BLOCKS = 32, 3, 4, 40
DEADLINE_S = 20  # for what takes milliseconds; only a mistake makes a test wait this long
WORDS = [11, 12, 13, 14, 15, 16, 17]


@dataclass
class Seq:
    """A request as core knows it. num_in_flight: tokens that launched steps will bring."""

    row: int
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    num_computed: int = 0
    num_in_flight: int = 0
    block_ids: list[int] = field(default_factory=list)


class Steps:
    """A worker over a small random model, and core's bookkeeping by hand."""

    def __init__(self, directory: Path) -> None:
        checkpoint = resolve_checkpoint(str(directory))
        config = EngineConfig(
            model=str(directory), device="cpu", block_size=BLOCK_SIZE, max_num_seqs=MAX_NUM_SEQS, max_model_len=MAX_LEN
        )
        self.worker = Worker(resolve_config(config, checkpoint))
        self.worker.allocate_cache(NUM_BLOCKS)
        self.runner = self.worker.runner
        self.runner.tokens.data.fill_(WORDS[-1])  # what earlier requests wrote there
        self.runner.states.block_tables.fill_(NUM_BLOCKS - 1)
        self.free_blocks = list(range(1, NUM_BLOCKS))

    def seq(self, row: int, prompt: Sequence[int], output: Sequence[int] = (), **fields: Any) -> Seq:
        params = SamplingParams(**{"temperature": 0, "max_tokens": 20, **fields})
        return Seq(row, [*prompt, *output], len(prompt), params)

    def step(self, *seqs: Seq) -> StepInput:
        """What Scheduler._start and _add do, written out."""
        step = StepInput([], [])
        for seq in seqs:
            num_expected, num_sent = len(seq.token_ids) + seq.num_in_flight, len(seq.block_ids)
            while len(seq.block_ids) * BLOCK_SIZE < num_expected:
                seq.block_ids.append(self.free_blocks.pop(0))
            if not seq.num_computed:
                step.new_requests.append(NewRequest(seq.row, list(seq.token_ids), seq.num_prompt_tokens, seq.params))
            num_scheduled = num_expected - seq.num_computed
            step.requests.append(ScheduledRequest(seq.row, seq.num_computed, num_scheduled, seq.block_ids[num_sent:]))
            seq.num_computed = num_expected
            seq.num_in_flight += 1
        return step

    def leave(self, seq: Seq) -> None:
        """An end or a preemption: row and blocks can be given to others."""
        self.free_blocks = [*seq.block_ids, *self.free_blocks]
        seq.block_ids, seq.num_computed, seq.num_in_flight = [], 0, 0

    def prepare(self, *seqs: Seq) -> Batch:
        try:
            return self.runner.prepare(self.step(*seqs))
        except (LookupError, RuntimeError, ValueError, TypeError) as error:
            if isinstance(error, NotImplementedError):
                raise
            pytest.fail(f"a step of rows {[seq.row for seq in seqs]}: {error!r}. {LOOK_PREPARE}")

    def run(self, batch: Batch) -> list[int]:
        return self.runner.run(batch).token_ids.tolist()


def flat(row: int, *positions: int) -> list[int]:
    """Indices in the flattened token buffer."""
    return [row * MAX_LEN + position for position in positions]


def slots(seq: Seq, *positions: int) -> list[int]:
    return [seq.block_ids[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE for position in positions]


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
    values = {**vars_of(batch), **vars_of(batch.metadata)}
    for name, want in expected.items():
        got = values[name].tolist() if isinstance(values[name], torch.Tensor) else values[name]
        assert got == want, f"{case}, {name}: expected {want}, got {got}. {LOOK_PREPARE}"


def vars_of(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__dataclass_fields__}


def tensors_of(batch: Batch) -> dict[str, torch.Tensor]:
    values = {**vars_of(batch), **vars_of(batch.metadata)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


# Prepare


def test_a_step_of_new_requests(make_steps: Callable[[], Steps]) -> None:
    """Whole prompts are written to the rows, and read from there."""
    steps = make_steps()
    first, second = steps.seq(1, WORDS[:3]), steps.seq(0, WORDS[:5])
    batch = steps.prepare(first, second)
    expected = {
        "new_rows": [(1, WORDS[:3]), (0, WORDS[:5])],
        "input_indices": [*flat(1, 0, 1, 2), *flat(0, 0, 1, 2, 3, 4)],
        "positions": [0, 1, 2, 0, 1, 2, 3, 4],
        "logits_indices": [2, 7],
        "output_indices": [*flat(1, 3), *flat(0, 5)],
        "slot_mapping": [*slots(first, 0, 1, 2), *slots(second, 0, 1, 2, 3, 4)],
        "num_decodes": 0,
        "query_start_loc": [0, 3, 8],
    }
    check_batch(batch, expected, "prompts of 3 and 5 tokens")


def test_a_step_behind_one_in_flight(make_steps: Callable[[], Steps]) -> None:
    """Its input is what the step before will write; a third request joins."""
    steps = make_steps()
    first, second, third = (steps.seq(row, WORDS[:count]) for row, count in ((0, 3), (2, 4), (1, 2)))
    steps.prepare(first, second)
    batch = steps.prepare(first, second, third)
    expected = {
        "new_rows": [(1, WORDS[:2])],
        "input_indices": [*flat(0, 3), *flat(2, 4), *flat(1, 0, 1)],
        "positions": [3, 4, 0, 1],
        "logits_indices": [0, 1, 3],
        "output_indices": [*flat(0, 4), *flat(2, 5), *flat(1, 2)],
        "slot_mapping": [*slots(first, 3), *slots(second, 4), *slots(third, 0, 1)],
        "num_decodes": 2,
        "context_lens": [4, 5],
    }
    check_batch(batch, expected, "rows 0 and 2 decode a token in flight, row 1 is new")
    tables = batch.metadata.block_tables.tolist()
    for seq, table in zip((first, second), tables, strict=True):
        assert table[: len(seq.block_ids)] == seq.block_ids, (
            f"row {seq.row}: expected block table {seq.block_ids}, got {table}. {LOOK_PREPARE}"
        )


def test_what_the_sampler_knows(make_steps: Callable[[], Steps]) -> None:
    steps = make_steps()
    first, second = steps.seq(0, WORDS[:3]), steps.seq(1, WORDS[:2], WORDS[2:4], min_tokens=3)
    steps.prepare(second)
    got = steps.prepare(second, first).sampling
    expected = [SamplingState(second.params, 1, 2, 2 + 2 + 1), SamplingState(first.params, 0, 3, 3)]
    assert got == expected, (
        "row 1 has a prompt of 2, two tokens, and one in flight; row 0 is new with a prompt of 3: expected (params, "
        f"row, num_prompt_tokens, num_tokens) {expected}, got {got}. {LOOK_PREPARE}"
    )


def test_a_preempted_request_comes_back(make_steps: Callable[[], Steps]) -> None:
    """Its row, another one, is written with prompt and output; its block table begins anew."""
    steps = make_steps()
    request = steps.seq(0, WORDS[:3])
    steps.prepare(request)
    steps.leave(request)
    request.row = 2
    request.token_ids.append(42)
    batch = steps.prepare(request)
    expected = {
        "new_rows": [(2, [*WORDS[:3], 42])],
        "positions": [0, 1, 2, 3],
        "input_indices": flat(2, 0, 1, 2, 3),
        "output_indices": flat(2, 4),
        "slot_mapping": slots(request, 0, 1, 2, 3),
        "sampling": [SamplingState(request.params, 2, 3, 4)],
    }
    check_batch(batch, expected, "preempted with one token, and back")


def test_a_row_goes_to_another_request(make_steps: Callable[[], Steps]) -> None:
    """Nothing is said when a request leaves: the next NewRequest for its row replaces blocks and parameters."""
    steps = make_steps()
    first, second = steps.seq(1, WORDS, temperature=1.0), steps.seq(1, WORDS[:2])
    steps.prepare(first)
    steps.leave(first)
    steps.prepare(second)
    batch = steps.prepare(second)
    expected = {
        "slot_mapping": slots(second, 2),
        "block_tables": [second.block_ids],
        "sampling": [SamplingState(second.params, 1, 2, 3)],
    }
    check_batch(batch, expected, "the second request in row 1")


def test_a_prepared_step_is_not_changed_by_later_ones(make_steps: Callable[[], Steps]) -> None:
    """It waits for its turn, and core goes on: blocks are appended, and its rows go to other requests."""
    steps = make_steps()
    first, second = steps.seq(0, WORDS[:3]), steps.seq(1, WORDS[:4])
    steps.prepare(first, second)
    batch = steps.prepare(first, second)
    before = {name: tensor.clone() for name, tensor in tensors_of(batch).items()}
    others = {name: list(getattr(batch, name)) for name in ("new_rows", "sampling")}
    first.token_ids.append(43)
    for _ in range(6):
        steps.prepare(first, second)
    steps.leave(first)
    steps.leave(second)
    steps.prepare(steps.seq(1, WORDS, temperature=1.0), steps.seq(0, WORDS[:2], seed=3, temperature=1.0))
    steps.runner.states.block_tables.fill_(0)
    for name, tensor in tensors_of(batch).items():
        assert torch.equal(tensor, before[name]), (
            f"a later step changed {name} of a step that has not run: {before[name].tolist()} became "
            f"{tensor.tolist()}; a step needs a copy of its own. {LOOK_PREPARE}"
        )
    for name, value in others.items():
        assert getattr(batch, name) == value, f"a later step changed {name} of a step that has not run. {LOOK_PREPARE}"


def test_two_steps_share_no_memory(make_steps: Callable[[], Steps]) -> None:
    """Neither with each other nor with what the worker updates at the next launch."""
    steps = make_steps()
    first, second = steps.seq(0, WORDS[:3]), steps.seq(1, WORDS[:4])
    steps.prepare(first, second)
    batches = [tensors_of(steps.prepare(first, second)) for _ in range(2)]
    batches.append({"RequestStates.block_tables": steps.runner.states.block_tables})
    memory: dict[int, str] = {}
    for number, tensors in enumerate(batches):
        for name, tensor in tensors.items():
            owner = f"{name} of step {number}"
            found = memory.setdefault(tensor.untyped_storage().data_ptr(), owner)
            assert found == owner or not tensor.numel(), f"{owner} and {found} share their memory. {LOOK_PREPARE}"


# Run


def test_one_step(make_steps: Callable[[], Steps], model: Any) -> None:
    steps = make_steps()
    first, second = steps.seq(2, WORDS[:3]), steps.seq(0, WORDS[:5])
    got = steps.run(steps.prepare(first, second))
    expected = [reference_greedy(model, seq.token_ids, 1)[0] for seq in (first, second)]
    assert got == expected, f"expected {expected}, got {got}. {LOOK_RUN}"
    in_buffer = steps.runner.tokens.data[[2, 0], [3, 5]].tolist()
    assert in_buffer == expected, (
        f"the next step reads its tokens from the buffer: expected {expected} there, got {in_buffer}. {LOOK_RUN}"
    )
    prompt = steps.runner.tokens.data[0, :5].tolist()
    assert prompt == WORDS[:5], f"the row has the prompt before the output: expected {WORDS[:5]}, got {prompt}."
    assert steps.runner.num_tokens_computed == 8, f"got {steps.runner.num_tokens_computed}. {LOOK_RUN}"


def test_steps_that_were_prepared_before_the_first_one_ran(make_steps: Callable[[], Steps], model: Any) -> None:
    """Four of them, none of whose tokens core knows."""
    steps = make_steps()
    first, second, third = (steps.seq(row, WORDS[:count]) for row, count in enumerate((3, 5, 1)))
    batches = [steps.prepare(first), steps.prepare(first, second), steps.prepare(first, second, third)]
    batches.append(steps.prepare(second, first, third))
    got = [steps.run(batch) for batch in batches]
    a, b, c = (reference_greedy(model, seq.token_ids, 4) for seq in (first, second, third))
    expected = [[a[0]], [a[1], b[0]], [a[2], b[1], c[0]], [b[2], a[3], c[1]]]
    assert got == expected, f"steps of 1, 2, 3 and 3 requests: expected {expected}, got {got}. {LOOK_RUN}"


@pytest.mark.parametrize("num_run", [0, 1])
def test_row_and_blocks_are_reused_while_steps_are_in_flight(
    make_steps: Callable[[], Steps], model: Any, num_run: int
) -> None:
    """The first request has ended, one of its steps or both are still to run. The second one has its row and blocks,
    and a longer prompt: written too early, it would replace the input of the step in flight."""
    steps = make_steps()
    steps.free_blocks = [7, 9, 8]
    first, second = steps.seq(0, WORDS[:5], presence_penalty=1.5), steps.seq(0, WORDS)
    batches = [steps.prepare(first)]
    got = [steps.run(batches.pop()) for _ in range(num_run)]
    batches.append(steps.prepare(first))
    steps.leave(first)
    batches += [steps.prepare(second), steps.prepare(second)]
    assert set(second.block_ids) >= {7, 9}, "the second request is to have the first one's blocks"
    got += [steps.run(batch) for batch in batches]
    alone = make_steps()
    expected = [alone.run(alone.prepare(seq)) for seq in [alone.seq(1, WORDS[:5], presence_penalty=1.5)] * 2]
    expected += [[token_id] for token_id in reference_greedy(model, WORDS, 2)]
    assert got == expected, f"two steps of each request: expected {expected}, got {got}. {LOOK_PREPARE}"


def test_penalties_count_the_token_in_flight(make_steps: Callable[[], Steps]) -> None:
    """Steps are prepared ahead. No token may come twice."""
    steps = make_steps()
    penalties = {"presence_penalty": 2.0, "frequency_penalty": 2.0, "repetition_penalty": 2.0}
    request = steps.seq(0, WORDS[:3], logit_bias={token: 60.0 for token in (20, 21, 22, 23)}, **penalties)
    batches = [steps.prepare(request) for _ in range(4)]
    got = [token_id for batch in batches for token_id in steps.run(batch)]
    assert sorted(got) == [20, 21, 22, 23], (
        f"four tokens are likely, and each is penalized once it was sampled: expected all of them, got {got}. "
        f"{LOOK_RUN}"
    )


def test_a_step_reads_nothing_back(make_steps: Callable[[], Steps], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a GPU's step. On a CPU the attention kernel does: it runs there, and there is nothing to wait for."""
    steps = make_steps()
    attention = steps.runner.attention
    assert attention is not None
    monkeypatch.setattr(attention, "decode", lambda query, *_: query)
    seqs = [steps.seq(0, WORDS[:3]), steps.seq(1, WORDS, temperature=1.0, top_k=3, logprobs=2)]
    seqs.append(steps.seq(2, WORDS[:2], repetition_penalty=1.3, min_tokens=4, temperature=0.5, seed=3))
    for batch in (steps.prepare(*seqs[:2]), steps.prepare(*seqs)):
        found = reads_of(lambda batch=batch: steps.runner.run(batch))  # type: ignore[misc]
        assert not found, (
            f"{found} read a tensor's values: on a GPU the launch then waits for the step before. {LOOK_RUN}"
        )


# Launch


def test_a_launch_returns_before_the_model_has_run(
    make_steps: Callable[[], Steps], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps are launched, and the model has not begun."""
    steps, gate = make_steps(), threading.Event()
    forward, threads = steps.runner.model.forward, set[str]()

    def wait(*args: Any) -> Any:
        assert gate.wait(DEADLINE_S), f"the launch waits for the model. {LOOK_LAUNCH}"
        threads.add(threading.current_thread().name)
        return forward(*args)

    monkeypatch.setattr(steps.runner.model, "forward", wait)
    request = steps.seq(0, WORDS[:3])
    handles = [steps.worker.launch(steps.step(request)) for _ in range(2)]
    gate.set()
    got = [token_id for handle in handles for token_id in handle.result().token_ids]
    assert got == reference_greedy(model, WORDS[:3], 2), f"got {got}. {LOOK_LAUNCH}"
    assert steps.runner.num_tokens_computed == 3 + 1, f"got {steps.runner.num_tokens_computed}. {LOOK_LAUNCH}"
    assert threading.current_thread().name not in threads, f"the model ran in {threads}. {LOOK_LAUNCH}"


def test_where_an_error_is_raised(make_steps: Callable[[], Steps], monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the preparation at the launch, one of the model with the result."""
    steps = make_steps()
    with pytest.raises(IndexError):
        steps.worker.launch(StepInput([], [ScheduledRequest(MAX_NUM_SEQS, 3, 1, [])]))
    monkeypatch.setattr(steps.runner.model, "forward", lambda *_: 1 / 0)
    handle = steps.worker.launch(steps.step(steps.seq(0, WORDS[:3])))
    with pytest.raises(ZeroDivisionError):
        handle.result()


def test_the_answer_is_plain_data(make_steps: Callable[[], Steps]) -> None:
    """A token for each request; log-probabilities for those that ask, as many as they ask for."""
    steps = make_steps()
    seqs = [steps.seq(0, WORDS[:3]), steps.seq(1, WORDS[:2], logprobs=2), steps.seq(2, WORDS[:4], logprobs=0)]
    output = steps.worker.launch(steps.step(*seqs)).result()
    assert all(type(token_id) is int for token_id in output.token_ids), f"got {output}. {LOOK_LAUNCH}"
    first, second, third = output.logprobs
    assert first is None and second and third, f"got {output.logprobs}. {LOOK_LAUNCH}"
    assert (next(iter(second)), next(iter(third))) == tuple(output.token_ids[1:]), f"the sampled one is first: {output}"
    assert len(second) in (2, 3) and len(third) == 1, f"logprobs=2 and 0: got {second} and {third}. {LOOK_LAUNCH}"
    assert 0 < output.start_s <= output.end_s, f"got {output}. {LOOK_LAUNCH}"
