"""Where the model runs: steps are computed one after the other while the scheduler continues."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ..messages import StepOutput
from .sampler import SamplerOutput

Result = TypeVar("Result")
Work = Callable[[], SamplerOutput]
Finish = Callable[[SamplerOutput], StepOutput]


class StepHandle(Protocol):
    """A step that was launched."""

    def result(self) -> StepOutput:
        """Wait for the step. Raises whatever it raised."""
        ...


class Mark(Protocol):
    """A place in a stream."""

    def wait(self) -> None:
        """Wait until everything launched before it has run."""
        ...


class Stream(Protocol):
    """Where steps run: one at a time, in the order in which they were launched."""

    def launch(self, work: Work, finish: Finish) -> StepHandle:
        """Returns at once, before the work is done. finish: turns the work's result into plain data."""
        ...

    def run(self, call: Callable[[], Result]) -> Result:
        """Run a function on the stream, after everything that was launched before, and wait for its result."""
        ...

    def mark(self) -> Mark:
        """The place in the stream after everything that was launched before. Doesn't wait."""
        ...


class ThreadStream:
    """The CPU's counterpart of a CUDA stream: a thread that takes work from a queue. torch releases the GIL meanwhile.

    Everything that computes runs on it, including loading. OpenMP keeps a worker pool per calling thread; with more
    workers than cores, they sleep instead of spinning, and a small step takes three times as long.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")

    def launch(self, work: Work, finish: Finish) -> Future[StepOutput]:
        return self._thread.submit(self._run, work, finish)

    def run(self, call: Callable[[], Result]) -> Result:
        return self._thread.submit(call).result()

    def mark(self) -> Mark:
        return ThreadMark(self._thread.submit(lambda: None))

    @staticmethod
    def _run(work: Work, finish: Finish) -> StepOutput:
        start_s = time.perf_counter()
        output = finish(work())
        output.start_s, output.end_s = start_s, time.perf_counter()
        return output


class CudaStream:
    """Work goes to the device's current stream, its result to pinned memory; an event shows when it has arrived.

    A step's inputs are copied on the same stream. On another stream, the work would not wait for the inputs, and their
    memory could be reused for the next step while this step still reads it.
    """

    def __init__(self, device: str) -> None:
        self._stream = torch.cuda.current_stream(device)
        self._began = torch.cuda.Event(enable_timing=True)
        self._began.record(self._stream)
        self._began.synchronize()
        self._began_s = time.perf_counter()

    def launch(self, work: Work, finish: Finish) -> CudaHandle:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(self._stream)
        sampled = to_cpu(work())
        end.record(self._stream)
        return CudaHandle(sampled, finish, start, end, self._began, self._began_s)

    def run(self, call: Callable[[], Result]) -> Result:
        return call()

    def mark(self) -> Mark:
        event = torch.cuda.Event(blocking=True)  # a thread that waits for it sleeps
        event.record(self._stream)
        return CudaMark(event)


@dataclass(frozen=True, slots=True)
class ThreadMark:
    reached: Future[None]

    def wait(self) -> None:
        self.reached.result()


@dataclass(frozen=True, slots=True)
class CudaMark:
    event: torch.cuda.Event

    def wait(self) -> None:
        self.event.synchronize()


@dataclass(frozen=True, slots=True)
class CudaHandle:
    """sampled: tensors in pinned memory, complete after the event `end`."""

    sampled: SamplerOutput
    finish: Finish
    start: torch.cuda.Event
    end: torch.cuda.Event
    began: torch.cuda.Event
    began_s: float

    def result(self) -> StepOutput:
        self.end.synchronize()
        output = self.finish(self.sampled)
        times = (self.began_s + self.began.elapsed_time(event) / 1e3 for event in (self.start, self.end))
        output.start_s, output.end_s = times
        return output


def to_cpu(value: Any) -> Any:
    """Start copying a tensor, or all tensors of a dataclass or list, to pinned memory. An event shows when the copies
    are complete."""
    if isinstance(value, Tensor):
        return value.to("cpu", non_blocking=True)
    if isinstance(value, list):
        return [to_cpu(item) for item in value]
    if not is_dataclass(value) or isinstance(value, type):
        return value
    return replace(value, **{spec.name: to_cpu(getattr(value, spec.name)) for spec in fields(value)})


def make_stream(device: str) -> Stream:
    return CudaStream(device) if device.startswith("cuda") else ThreadStream()
