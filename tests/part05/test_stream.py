"""worker/stream.py: steps run in the order of their launch, one at a time, while the caller goes on."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from common.checkpoint import MODELS_DIR
from common.sampling_params import SamplingParams
from common.testing import small_model
from part05_async_scheduling.config import EngineConfig
from part05_async_scheduling.core.engine import LLMEngine
from part05_async_scheduling.messages import StepOutput
from part05_async_scheduling.worker import model_runner
from part05_async_scheduling.worker import stream as stream_module
from part05_async_scheduling.worker.sampler import LogprobsTensors, SamplerOutput
from part05_async_scheduling.worker.stream import CudaStream, ThreadStream, make_stream
from tests.part05.scripted import run_dry

LOOK = 'Look at worker/stream.py::ThreadStream; README "One step ahead".'
LOOK_CUDA = 'Look at worker/stream.py::CudaStream and worker/worker.py::Worker.launch; README "One step ahead".'
ROOT = Path(__file__).parents[2]
DEADLINE_S = 20  # for what takes milliseconds; only a mistake makes a test wait this long
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: streams and events")


def sampled(token_id: int) -> SamplerOutput:
    return SamplerOutput(torch.tensor([token_id]), None)


def plain(sampled: SamplerOutput) -> StepOutput:
    """The finish of these tests."""
    return StepOutput(sampled.token_ids.tolist(), [None] * len(sampled.token_ids))


def test_a_launch_returns_before_the_work_is_done() -> None:
    stream, gate, begun = ThreadStream(), threading.Event(), threading.Event()

    def work() -> SamplerOutput:
        begun.set()
        assert gate.wait(DEADLINE_S), f"launch() waits for the work. {LOOK}"
        return sampled(7)

    handle = stream.launch(work, plain)
    assert begun.wait(DEADLINE_S), f"the work begins before its result is asked for. {LOOK}"
    gate.set()
    result = handle.result()
    assert result.token_ids == [7], f"got {result}. {LOOK}"
    assert result.start_s <= result.end_s <= time.perf_counter(), f"times {result.start_s}, {result.end_s}. {LOOK}"


def test_work_is_done_in_order_and_one_at_a_time() -> None:
    stream, order, gate = ThreadStream(), list[int](), threading.Event()
    gates = [gate, *(threading.Event() for _ in range(3))]

    def work_of(number: int) -> Callable[[], SamplerOutput]:
        def work() -> SamplerOutput:
            order.append(number)
            assert gates[number].wait(DEADLINE_S)
            order.append(number)
            return sampled(number)

        return work

    handles = [stream.launch(work_of(number), plain) for number in range(4)]
    for each in reversed(gates[1:]):  # the later ones are free to end long before the first is
        each.set()
    gate.set()
    got = [handle.result().token_ids for handle in reversed(handles)]
    assert got == [[3], [2], [1], [0]], f"each handle has its own work's result, got {got}. {LOOK}"
    assert order == [0, 0, 1, 1, 2, 2, 3, 3], f"begun and ended: expected one after the other, got {order}. {LOOK}"


def test_an_error_is_raised_with_the_result() -> None:
    stream = ThreadStream()

    def fail() -> SamplerOutput:
        raise ZeroDivisionError("the cat sat on it")

    failed, after = stream.launch(fail, plain), stream.launch(lambda: sampled(1), plain)
    assert after.result().token_ids == [1], f"the next step goes on. {LOOK}"
    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="the cat sat on it"):
            failed.result()


def test_the_thread_has_a_name_and_ends_with_its_stream() -> None:
    stream, threads = ThreadStream(), list[threading.Thread]()

    def work() -> SamplerOutput:
        threads.append(threading.current_thread())
        return sampled(1)

    for _ in range(3):
        stream.launch(work, plain).result()
    assert len(set(threads)) == 1 and threads[0].name.startswith("model"), f"got {threads}. {LOOK}"
    assert threads[0] is not threading.current_thread()
    del stream
    threads[0].join(DEADLINE_S)
    assert not threads[0].is_alive(), f"the stream is gone, and its thread still waits. {LOOK}"


def test_other_work_is_done_there_too_and_waited_for() -> None:
    stream, order = ThreadStream(), list[str]()
    handle = stream.launch(lambda: order.append("step") or sampled(1), plain)
    name = stream.run(lambda: order.append("other") or threading.current_thread().name)
    assert order == ["step", "other"] and handle.result(), f"expected the step first, got {order}. {LOOK}"
    assert name.startswith("model"), f"expected the stream's own thread, got {name!r}. {LOOK}"
    with pytest.raises(ZeroDivisionError):
        stream.run(lambda: 1 // 0)


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_only_the_streams_thread_computes() -> None:
    """So the scheduler's thread has no OpenMP worker pool. In a process of its own, since a pool stays to its end."""
    code = (
        "import os, torch\n"
        "torch.set_num_threads(2)\n"
        "from part05_async_scheduling.config import EngineConfig\n"
        "from part05_async_scheduling.core.engine import LLMEngine\n"
        "from common.sampling_params import SamplingParams\n"
        "count = lambda: len(os.listdir('/proc/self/task'))\n"
        "before = count()\n"
        "engine = LLMEngine(EngineConfig(model='tiny', device='cpu'))\n"
        "engine.add_request('0', [5] * 40, SamplingParams(temperature=0, max_tokens=4))\n"
        "while engine.has_unfinished_requests:\n"
        "    engine.step()\n"
        "print(count() - before)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    got = run.stdout.strip()
    assert got == "2", (
        f"the stream's thread and its one OpenMP worker: expected 2 threads more, got {got} {run.stderr[-400:]}. "
        "Look at worker/worker.py::Worker.__init__: what is computed before the first step belongs on the stream."
    )


def test_which_stream() -> None:
    assert isinstance(make_stream("cpu"), ThreadStream), "Look at worker/stream.py::make_stream."


# A GPU's stream, with stand-ins for CUDA


class FakeEvent:
    def __init__(self, enable_timing: bool = False) -> None:
        self.log = FakeCuda.log
        assert enable_timing, "elapsed_time needs events with timing"

    def record(self, stream: Any) -> None:
        self.log.append("record")

    def synchronize(self) -> None:
        self.log.append("wait")

    def elapsed_time(self, other: FakeEvent) -> float:
        return 250.0


DEFAULT = "default stream"


class FakeStream:
    def __init__(self, device: str) -> None:
        self.device = device


class FakeCuda:
    """torch.cuda, as far as CudaStream uses it. current: the streams that work is put on, innermost last."""

    log: list[str] = []
    current: list[Any] = []


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> type[FakeCuda]:
    @contextlib.contextmanager
    def on(stream: Any) -> Iterator[None]:
        FakeCuda.current.append(stream)
        yield
        FakeCuda.current.pop()

    FakeCuda.log, FakeCuda.current = [], []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: FakeCuda.log.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda *_: FakeCuda.current[-1] if FakeCuda.current else "default"
    )
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "stream", on)
    return FakeCuda


def test_a_launch_on_a_gpu_does_not_wait(cuda: type[FakeCuda]) -> None:
    stream = CudaStream("cuda")
    cuda.log.clear()

    def work() -> SamplerOutput:
        cuda.log.append("work")
        return sampled(7)

    handle = stream.launch(work, plain)
    assert cuda.log == ["record", "work", "record"], (
        f"events before and after, and no wait: expected record, work, record, got {cuda.log}. {LOOK_CUDA}"
    )
    result = handle.result()
    assert cuda.log[3:] == ["wait"], f"the result waits for its event, got {cuda.log[3:]}. {LOOK_CUDA}"
    assert result.token_ids == [7], f"got {result}"
    assert result.start_s <= result.end_s, f"times {result.start_s}, {result.end_s}. {LOOK_CUDA}"


def test_a_step_on_a_gpu_is_prepared_on_the_stream_that_runs_it(
    cuda: type[FakeCuda], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Copies of a step's inputs on another stream are not ordered with it: it could read them before they arrive, and
    their memory could be reused for the next step while this one still reads it."""
    model = small_model("llama", seed=2)
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").symlink_to(MODELS_DIR / "tiny" / "tokenizer.json")
    engine = LLMEngine(EngineConfig(model=str(tmp_path), device="cpu", num_kv_blocks=20, block_size=4))
    worker = engine.executor.worker
    worker.stream = CudaStream("cuda")
    copies, runs = list[Any](), list[Any]()
    to_device, forward = model_runner.to_device, worker.model.forward

    def note_copy(*args: Any) -> torch.Tensor:
        copies.append(torch.cuda.current_stream())
        return to_device(*args)

    def note_forward(*args: Any) -> torch.Tensor:
        runs.append(torch.cuda.current_stream())
        return forward(*args)

    monkeypatch.setattr(model_runner, "to_device", note_copy)
    monkeypatch.setattr(worker.model, "forward", note_forward)
    engine.add_request("0", [5, 6, 7], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    run_dry(engine)
    assert runs and copies
    assert set(map(id, copies)) == set(map(id, runs)), (
        f"a step's inputs are copied on {set(copies)} and read on {set(runs)}: expected one stream. {LOOK_CUDA}"
    )


@needs_gpu
def test_a_gpu_runs_steps_in_order_and_copies_to_pinned_memory() -> None:
    stream, results = CudaStream("cuda"), list[SamplerOutput]()
    total = torch.zeros(1, dtype=torch.int64, device="cuda")

    def work() -> SamplerOutput:
        torch.cuda._sleep(1_000_000)
        total.add_(1)
        values = torch.zeros(1, 2, device="cuda")
        return SamplerOutput(total.clone(), LogprobsTensors(total.expand(1, 2), values, total.clone()))

    def finish(sampled: SamplerOutput) -> StepOutput:
        results.append(sampled)
        return plain(sampled)

    with torch.cuda.stream(stream._stream):
        torch.cuda.set_sync_debug_mode("error")
        try:
            handles = [stream.launch(work, finish) for _ in range(5)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    outputs = [handle.result() for handle in handles]
    assert [output.token_ids for output in outputs] == [[1], [2], [3], [4], [5]], f"got {outputs}. {LOOK_CUDA}"
    for sampled in results:
        assert sampled.token_ids.is_pinned(), f"a copy to pageable memory waits. {LOOK_CUDA}"
        assert sampled.logprobs is not None and sampled.logprobs.logprobs.is_pinned(), f"got {sampled}. {LOOK_CUDA}"
    times = [time for output in outputs for time in (output.start_s, output.end_s)]
    assert times == sorted(times), f"steps overlap: {times}. {LOOK_CUDA}"


@needs_gpu
def test_a_launch_on_a_gpu_reads_nothing_back() -> None:
    """Every kind of request in one engine. A read would make the launch wait for the step before."""
    flags = {"num_kv_blocks": 200, "device": "cuda", "dtype": "float32"}
    engine, waiting = LLMEngine(EngineConfig(model="tiny", **flags)), LLMEngine(EngineConfig(model="tiny", **flags))
    waiting.max_steps_in_flight = 1
    launch = engine.executor.launch

    def launch_without_waiting(*args: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"seed": 3},
        {"temperature": 0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "logit_bias": {100: 3.0}},
        {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "seed": 4, "logprobs": 2},
        {"temperature": 0, "min_tokens": 3, "stop_token_ids": [7], "logprobs": 0},
    ]
    answers = []
    for each in (waiting, engine):
        for number, fields in enumerate(kinds * 2):
            params = SamplingParams(**{"max_tokens": 20, "ignore_eos": True, **fields})
            each.add_request(str(number), [100 + number] * (3 + number), params)
        if each is engine:
            for _ in range(2):  # kernels are compiled, libraries loaded
                each.step()
            each.executor.launch = launch_without_waiting  # type: ignore[method-assign]
        answers.append({name: output.token_ids for name, output in run_dry(each).items()})
    for name, tokens in answers[1].items():
        assert answers[0][name][-len(tokens) :] == tokens, f"request {name}: {tokens} against {answers[0][name]}"


@needs_gpu
def test_make_stream_on_a_gpu() -> None:
    assert isinstance(make_stream("cuda:0"), stream_module.CudaStream), "Look at worker/stream.py::make_stream."
