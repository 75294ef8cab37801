"""The model's side of the engine: steps run there one after the other, while the scheduler goes on here."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from .sampler import SamplerOutput

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step sampled, on the CPU, and when (time.perf_counter) the device began with it and was done."""

    sampled: SamplerOutput
    start_s: float
    end_s: float


class StepHandle(Protocol):
    """A step that was launched."""

    def result(self) -> StepResult:
        """Wait for it. Raises what the step raised."""
        ...


class Stream(Protocol):
    """Where steps run: in the order in which they were launched, one at a time."""

    def launch(self, work: Callable[[], SamplerOutput]) -> StepHandle:
        """Returns at once, before the work is done."""
        ...

    def run(self, call: Callable[[], Result]) -> Result:
        """Have something else done on the model's side, after what was launched before, and wait for it."""
        ...


class ThreadStream:
    """A CPU's stand-in for a CUDA stream: a thread that takes work from a queue. torch lets others run meanwhile.

    All that computes belongs on it, loading included: OpenMP keeps helpers for each thread that has used any, and with
    more of them than cores they no longer spin but sleep between two operations, which makes a small step take thrice
    as long.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")

    def launch(self, work: Callable[[], SamplerOutput]) -> Future[StepResult]:
        return self._thread.submit(self._run, work)

    def run(self, call: Callable[[], Result]) -> Result:
        return self._thread.submit(call).result()

    @staticmethod
    def _run(work: Callable[[], SamplerOutput]) -> StepResult:
        start_s = time.perf_counter()
        sampled = work()
        return StepResult(sampled, start_s, time.perf_counter())


class CudaStream:
    """Work is put on the device's stream and its result copied to pinned memory; an event tells when it has arrived.

    It is the stream on which a step's numbers were uploaded. On another one the work would not wait for them, and
    their memory could go to the next step while this one still reads it.
    """

    def __init__(self, device: str) -> None:
        self._stream = torch.cuda.current_stream(device)
        self._began = torch.cuda.Event(enable_timing=True)
        self._began.record(self._stream)
        self._began.synchronize()
        self._began_s = time.perf_counter()

    def launch(self, work: Callable[[], SamplerOutput]) -> CudaHandle:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(self._stream)
        sampled = work().to_cpu()
        end.record(self._stream)
        return CudaHandle(sampled, start, end, self._began, self._began_s)

    def run(self, call: Callable[[], Result]) -> Result:
        return call()


@dataclass(frozen=True, slots=True)
class CudaHandle:
    """sampled: tensors in pinned memory, complete once the event `end` has come."""

    sampled: SamplerOutput
    start: torch.cuda.Event
    end: torch.cuda.Event
    began: torch.cuda.Event
    began_s: float

    def result(self) -> StepResult:
        self.end.synchronize()
        start_s, end_s = (self.began_s + self.began.elapsed_time(event) / 1e3 for event in (self.start, self.end))
        return StepResult(self.sampled, start_s, end_s)


def make_stream(device: str) -> Stream:
    return CudaStream(device) if device.startswith("cuda") else ThreadStream()
