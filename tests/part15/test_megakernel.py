"""Small steps in one kernel on a CPU, and the team of threads that computes it."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from part15_full_architecture.worker import megakernel
from part15_full_architecture.worker.attention import AttentionMetadata
from part15_full_architecture.worker.kernels.cpu.memory import numbers_at
from part15_full_architecture.worker.kernels.cpu.team import Job, Team, make_counters, tasks
from part15_full_architecture.worker.linear import Linear
from part15_full_architecture.worker.megakernel import MAX_TOKENS, MAX_TOKENS_BFLOAT16, Megakernel, can_be_one_kernel
from part15_full_architecture.worker.model import DecoderModel
from tests.contract.engines import SmallEngine, SmallModels

ROOT = Path(__file__).parents[2]
PART = "part15_full_architecture"
LOOK, LOOK_TEAM = "See worker/megakernel.py and worker/kernels/cpu/whole_step.py", "See worker/kernels/cpu/team.py"
FAMILIES = ("llama", "qwen2", "qwen3", "tiny")  # the last one has heads of 32 numbers, so that chunks are tiled
DEADLINE_S = 60
# New tokens of each sequence, and its context with them.
STEPS = {
    "one decode": ([1], [37]), "a decode of the first token": ([1], [1]), "three decodes": ([1, 1, 1], [5, 100, 16]),
    "drafts to verify": ([4, 1, 3], [44, 17, 3]), "a short prompt": ([23], [23]),
    "the largest step": ([1] * (MAX_TOKENS - 9) + [9], [70] * (MAX_TOKENS - 9) + [9]),
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SmallModels:
    family = "llama" if request.param == "tiny" else request.param
    made = SmallModels(tmp_path_factory.mktemp(request.param), family)
    made.flags = {"model": "tiny"} if request.param == "tiny" else {}  # type: ignore[attr-defined]
    return made


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> SmallModels:
    return SmallModels(tmp_path_factory.mktemp("llama"))


def make_step(query_lens: list[int], context_lens: list[int], block_size: int) -> tuple[Tensor, AttentionMetadata]:
    """Positions, and metadata with blocks that are scattered over the pool."""
    width = -(-max(context_lens) // block_size)
    generator = torch.Generator().manual_seed(len(query_lens))
    tables = 1 + torch.randperm(len(query_lens) * width, generator=generator).to(torch.int32).view(-1, width)
    pairs = list(zip(query_lens, context_lens, strict=True))
    places = [(seq, place) for seq, (new, context) in enumerate(pairs) for place in range(context - new, context)]
    seqs, positions = (torch.tensor(each) for each in zip(*places, strict=True))
    return positions, AttentionMetadata(
        slot_mapping=tables[seqs, positions // block_size].long() * block_size + positions % block_size,
        block_tables=tables,
        query_start_loc=torch.tensor([0, *np.cumsum(query_lens)], dtype=torch.int32),
        context_lens=torch.tensor(context_lens, dtype=torch.int32),
        max_query_len=max(query_lens),
    )


def fill_vectors(model: DecoderModel, has_all_biases: bool) -> None:
    """Biases are 0 and the weights of norms 1 in a new model: nobody would notice that a kernel leaves them out."""
    for module in model.modules():
        if has_all_biases and isinstance(module, Linear):
            module.bias = nn.Parameter(torch.empty(module.weight.shape[0], dtype=model.dtype), requires_grad=False)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1 and parameter.dtype == model.dtype:
            parameter.data.copy_(torch.rand(len(parameter), generator=generator) + 0.5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("what", STEPS)
def test_it_computes_what_the_layers_do(
    what: str, num_threads: int, dtype: str, models: SmallModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16, what the layers compute in float32 with the same weights: the megakernel rounds at its end only."""
    monkeypatch.setattr(megakernel, "has_bfloat16_instructions", lambda: False)  # else it leaves large steps to torch
    query_lens, context_lens = STEPS[what]
    num_blocks = 1 + len(query_lens) * -(-max(context_lens) // 4)
    flags = {"num_kv_blocks": num_blocks, "dtype": dtype, "megakernel": False, "pack_weights": False, **models.flags}  # type: ignore[attr-defined]
    runner = SmallEngine(PART, models, **flags).worker.runner
    model, attention, cache = copy.deepcopy(runner.model), runner.attention, runner.attention.kv_cache
    fill_vectors(model, has_all_biases=models.family == "llama")
    layers, kernel = copy.deepcopy(model).float(), Megakernel(model, attention, num_threads)
    positions, metadata = make_step(query_lens, context_lens, cache.block_size)
    torch.manual_seed(0)
    input_ids, before = torch.randint(0, 300, positions.shape), torch.randn_like(cache.data)
    with torch.inference_mode():
        cache.data.copy_(before)
        expected = layers(input_ids, positions, partial(attention.attend, metadata))
        expected_cache, expected_logits = cache.data.clone(), layers.compute_logits(expected)
        cache.data.copy_(before)
        found = kernel.run(input_ids, positions, metadata)
        assert found is not None, f"{what}, {len(input_ids)} tokens: the megakernel did not take the step. {LOOK}"
        logits = model.compute_logits(found)
    for name, got, wanted in (
        ("the hidden states", found, expected), ("the KV cache", cache.data, expected_cache),
        ("the logits", logits, expected_logits),
    ):  # fmt: skip
        difference = float((got - wanted).abs().max())
        limit = (1e-5 if dtype == "float32" else 1 / 128) * float(wanted.abs().max())
        assert difference <= limit, (
            f"{what}, {models.family}, {num_threads} threads, {dtype}: the largest difference in {name} is "
            f"{difference:.2g}, expected at most {limit:.2g}. {LOOK}"
        )


def test_a_step_with_more_tokens_is_left_to_the_layers(llama: SmallModels) -> None:
    runner = SmallEngine(PART, llama).worker.runner
    positions, metadata = make_step([MAX_TOKENS + 1], [MAX_TOKENS + 1], runner.attention.kv_cache.block_size)
    kernel = Megakernel(runner.model, runner.attention, 2)
    assert kernel.run(positions, positions, metadata) is None and kernel.num_runs == 0, LOOK
    assert kernel.run(positions[:0], positions[:0], metadata) is None, f"a step of no tokens. {LOOK}"


def test_a_model_whose_sizes_are_not_multiples_of_four_has_none(
    llama: SmallModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = SmallEngine(PART, llama).worker.runner
    model, attention = runner.model, runner.attention
    assert can_be_one_kernel(model, attention.kernels, None), LOOK
    monkeypatch.setattr(model.config, "intermediate_size", 90)  # twice that is a multiple of 4
    assert not can_be_one_kernel(model, attention.kernels, None), f"tasks of gate and up would overlap. {LOOK}"


def test_kernels_are_compiled_again_when_a_function_they_call_changes(tmp_path: Path) -> None:
    """Numba looks at a kernel's own file only, so the names of compiled kernels contain a digest of all files."""
    shutil.copytree(ROOT / PART, tmp_path / PART, ignore=shutil.ignore_patterns("__pycache__", "build"))
    (tmp_path / "common").symlink_to(ROOT / "common")
    code = f"from {PART}.worker.kernels.cpu.whole_step import step_kernel; print(step_kernel.py_func.__qualname__)"

    def name() -> str:
        return subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, check=True,
            capture_output=True, text=True,
        ).stdout  # fmt: skip

    before = name()
    assert before == name(), f"the same files, two names: {before}"
    with (tmp_path / PART / "worker" / "kernels" / "cpu" / "activation.py").open("a") as file:
        file.write("# changed\n")
    assert before != name(), f"activation.py has changed, {before} has not. See worker/cpu_attention.py::_jit_cached"


def test_an_engine_answers_as_transformers_does(models: SmallModels) -> None:
    if models.flags:  # type: ignore[attr-defined]
        pytest.skip("the shipped model's answers are compared by the contract tests")
    engine = SmallEngine(PART, models, speculative_method="ngram", prompt_lookup_min=1)
    prompts = {"a": [5, 6, 7], "b": [11, 12, 13] * 7, "c": [21], "d": list(range(30, 30 + 2 * MAX_TOKENS))}
    for name, prompt in prompts.items():
        engine.add(name, prompt, max_tokens=20)
    for name, answer in engine.finish().items():
        expected = models.greedy(prompts[name], 20)
        assert answer.token_ids == expected, (
            f"{models.family}, request {name}: {answer.token_ids}, not {expected}. {LOOK}"
        )
    small_steps = engine.worker.runner.small_steps
    assert isinstance(small_steps, Megakernel), f"the engine has {small_steps} instead of a megakernel. {LOOK}"
    assert small_steps.num_runs > 10, f"it computed {small_steps.num_runs} steps, expected all decodes. {LOOK}"


@pytest.mark.parametrize(
    "flags",
    [
        {"megakernel": False}, {"kernels": "torch"}, {"kernels": "norm=torch"}, {"dtype": "float16"},
        {"kv_cache_dtype": "int8"}, {"quantization": "int8"}, {"tensor_parallel_size": 2},
        {"cudagraph_capture_sizes": "1,2,4"}, {"enable_expert_parallel": True, "tensor_parallel_size": 2},
        {"pipeline_parallel_size": 2}, {"cpu_offload_gb": 0.0001},
    ],
    ids=str,
)  # fmt: skip
def test_engines_that_compute_something_else_have_none(flags: dict[str, Any], llama: SmallModels) -> None:
    engine = SmallEngine(PART, llama, **flags)
    for worker in getattr(engine.core.executor, "workers", None) or [engine.worker]:
        small_steps = worker.runner.small_steps
        assert not isinstance(small_steps, Megakernel), f"{flags}: the megakernel does not compute that. {LOOK}"


@pytest.mark.parametrize("has_instructions", [True, False])
def test_a_cpu_with_bfloat16_instructions_has_faster_products(
    has_instructions: bool, llama: SmallModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For several tokens: torch's. One token's products wait for memory, whatever computes them."""
    monkeypatch.setattr(megakernel, "has_bfloat16_instructions", lambda: has_instructions)
    for dtype, expected in (
        ("float32", MAX_TOKENS),
        ("bfloat16", MAX_TOKENS_BFLOAT16 if has_instructions else MAX_TOKENS),
    ):
        runner = SmallEngine(PART, llama, dtype=dtype).worker.runner
        kernel, size = Megakernel(runner.model, runner.attention, 2), runner.attention.kv_cache.block_size
        for num_tokens, is_taken in ((expected, True), (expected + 1, False)):
            positions, metadata = make_step([num_tokens], [num_tokens], size)
            found = kernel.run(positions, positions, metadata)
            what = f"{dtype}, instructions: {has_instructions}, {num_tokens} tokens"
            assert (found is not None) == is_taken, f"{what}: expected the megakernel to take it: {is_taken}. {LOOK}"


def test_a_draft_model_has_one_of_its_own(llama: SmallModels) -> None:
    engine = SmallEngine(PART, llama, speculative_method="draft_model", speculative_model=llama.draft)
    engine.add("a", [5, 6, 7], max_tokens=12)
    assert engine.finish()["a"].token_ids == llama.greedy([5, 6, 7], 12), LOOK
    own = engine.worker.runner.drafter.small_steps
    assert isinstance(own, Megakernel) and own.num_runs > 5, f"draft passes: {own}. {LOOK}"


@numba.njit(nogil=True)
def add_ones(counters, numbers, num_phases, num_tasks):
    """Adds 1 to each number in each phase, if the phase before has done that for its neighbors."""
    values = numbers_at(numbers, 0, num_tasks, np.int64(0))
    for phase in range(num_phases):
        for task in tasks(counters, phase, num_tasks):
            neighbor = values[(task + 1) % num_tasks]
            if neighbor >= phase:
                values[task] += 1


@pytest.mark.parametrize("num_threads", [1, 2, 3, 8])
@pytest.mark.parametrize("num_tasks", [1, 2, 7, 100])
def test_a_team_does_each_task_once_and_phases_in_order(num_threads: int, num_tasks: int) -> None:
    team, numbers = Team(num_threads), torch.zeros(num_tasks, dtype=torch.int64)
    for _ in range(20):
        numbers.zero_()
        team.run(add_ones, make_counters(50), numbers.data_ptr(), 50, num_tasks)
        assert numbers.tolist() == [50] * num_tasks, (
            f"{num_threads} threads, 50 phases of {num_tasks} tasks: tasks were done {numbers.tolist()} times, or "
            f"before the phase ahead of them had ended. {LOOK_TEAM}::tasks"
        )


@numba.njit(nogil=True)
def fail_in_a_task(counters, failing):
    for task in tasks(counters, np.int64(0), 100):
        if task == failing:
            raise ValueError("no memory, for example")
    for _ in tasks(counters, np.int64(1), 100):
        pass


@pytest.mark.parametrize("num_threads", [1, 2, 4])
def test_an_error_in_any_thread_ends_the_kernel(num_threads: int) -> None:
    team = Team(num_threads)
    for failing in (0, 1, 50, 99):
        with pytest.raises(ValueError, match="no memory, for example"):
            team.run(fail_in_a_task, make_counters(2), failing)
    numbers = torch.zeros(10, dtype=torch.int64)
    team.run(add_ones, make_counters(4), numbers.data_ptr(), 4, 10)
    assert numbers.tolist() == [4] * 10, f"after an error, the team goes on: {numbers}. {LOOK_TEAM}"


def test_after_an_error_no_thread_is_inside_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory may be freed then."""
    team, began, released, give_up = Team(2), threading.Event(), threading.Event(), Job.give_up
    ended = list[str]()

    def kernel(address: int) -> None:
        if threading.current_thread().name == "kernel":
            began.set()
            assert released.wait(DEADLINE_S)
            time.sleep(0.05)  # a team that doesn't wait returns in this time
            ended.append("the helper's task")
        else:
            assert began.wait(DEADLINE_S)
            raise ValueError("no memory, for example")

    monkeypatch.setattr(Job, "give_up", lambda job: (released.set(), give_up(job)))
    with pytest.raises(ValueError, match="no memory"):
        team.run(kernel, make_counters(1))
    had_ended = list(ended)
    released.set()
    assert had_ended, f"run() returned while its helper was in a task. {LOOK_TEAM}::Job.give_up"


def test_several_threads_use_a_team_at_once() -> None:
    team, wrong = Team(3), list[list[int]]()

    def use() -> None:
        numbers = torch.zeros(10, dtype=torch.int64)
        for number in range(1, 301):
            team.run(add_ones, make_counters(2), numbers.data_ptr(), 2, 10)
            if numbers.tolist() != [2] * 10:
                wrong.append([number, *numbers.tolist()])
            numbers.zero_()

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert not wrong and not any(thread.is_alive() for thread in threads), f"{wrong[:1]}. {LOOK_TEAM}"


def test_helpers_that_come_late_find_nothing_to_do() -> None:
    team, held, began = Team(2), threading.Event(), threading.Event()

    def hold(address: int) -> None:
        if threading.current_thread().name == "kernel":
            began.set()
            assert held.wait(DEADLINE_S)

    team.run(hold, make_counters(1))
    assert began.wait(DEADLINE_S), f"the helper did not begin. {LOOK_TEAM}"
    numbers = torch.zeros(10, dtype=torch.int64)
    for _ in range(3):
        team.run(add_ones, make_counters(4), numbers.data_ptr(), 4, 10)
    assert numbers.tolist() == [12] * 10, f"without its helper, a thread does all the work: {numbers}. {LOOK_TEAM}"
    address = numbers.data_ptr()
    del numbers
    held.set()
    came = threading.Event()
    team.run(lambda counters: came.set() if threading.current_thread().name == "kernel" else None, make_counters(1))
    assert came.wait(DEADLINE_S), f"the helper has ended while it skipped three kernels over {address}. {LOOK_TEAM}"


def test_a_forked_process_has_a_team_of_its_own() -> None:
    code = """
        import os, signal, threading
        from part15_full_architecture.worker.kernels.cpu.team import get_team, make_counters
        def helper_came():
            came = threading.Event()
            note = lambda counters: came.set() if threading.current_thread().name == "kernel" else None
            get_team(2).run(note, make_counters(1))
            return came.wait(60)
        def look_for_teams():
            while True:
                get_team(2)
        assert helper_came()
        threading.Thread(target=look_for_teams, daemon=True).start()  # so that the lock is often held
        for _ in range(20):
            if os.fork() == 0:
                signal.alarm(60)
                os._exit(0 if helper_came() else 1)
            if status := os.wait()[1]:
                raise SystemExit(1)
    """
    status = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, check=False).returncode
    assert status == 0, (
        f"threads do not survive a fork: the child waits for a helper that it lacks. {LOOK_TEAM}::get_team"
    )
