"""The worker's CUDA stream: a launch returns before its work is done, and results come back through pinned memory."""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tools.gpu.parts import part_names
from tools.gpu.recorder import Recorder

SLEEP_CYCLES = 200_000_000  # about a tenth of a second
DEADLINE_S = 10.0


# Adapter: the only code that depends on how a part launches work. If that changes, change these three functions.


def open_stream(part: str, device: str) -> Any:
    return importlib.import_module(f"{part}.worker.stream").make_stream(device)


def launch(part: str, stream: Any, work: Callable[[], Tensor]) -> Any:
    """Run work() on the stream and copy its tensor to the CPU. Returns a handle at once."""
    output = importlib.import_module(f"{part}.worker.sampler").SamplerOutput
    return stream.launch(lambda: output(work(), None), lambda sampled: SimpleNamespace(token_ids=sampled.token_ids))


def wait_for(handle: Any) -> Tensor:
    """The tensor, on the CPU."""
    return handle.result().token_ids


# End of the adapter.


class SlowWork:
    """Work that is still running when we look. On a GPU the device sleeps; on a CPU a thread waits for release()."""

    def __init__(self, device: str) -> None:
        self.device, self.gate = device, threading.Event()
        self.was_released = True

    def __call__(self) -> None:
        if self.device == "cpu":
            self.was_released &= self.gate.wait(DEADLINE_S)
        else:
            torch.cuda._sleep(SLEEP_CYCLES)

    def is_running(self) -> bool:
        """Whether the work launched so far is still running."""
        if self.device == "cpu":
            return not self.gate.is_set()
        event = torch.cuda.Event()
        event.record()
        return not event.query()

    def release(self) -> None:
        self.gate.set()


def run(recorder: Recorder) -> None:
    part, device = part_names()[-1], recorder.device
    stream = open_stream(part, device)
    total = torch.zeros(1, dtype=torch.int64, device=device)

    def add(slow: SlowWork | None = None) -> Tensor:
        if slow is not None:
            slow()
        return total.add_(1).clone()

    wait_for(launch(part, stream, add))  # warm-up
    total.zero_()
    with recorder.case("a launch returns before its work is done") as values:
        slow, started = SlowWork(device), time.perf_counter()
        handle = launch(part, stream, lambda: add(slow))
        values["launch_ms"] = (time.perf_counter() - started) * 1e3
        is_running = slow.is_running()
        slow.release()
        got = wait_for(handle)
        values["work_ms"] = (time.perf_counter() - started) * 1e3
        assert is_running and slow.was_released, f"launch() took {values['launch_ms']:.1f} ms and waited for the work"
        assert got.tolist() == [1], f"expected [1], got {got.tolist()}"
    with recorder.case("two steps in flight, results in order") as values:
        total.zero_()
        slow = SlowWork(device)
        handles = [launch(part, stream, lambda: add(slow)) for _ in range(2)]
        is_running = slow.is_running()
        slow.release()
        values["results"] = [wait_for(handle).tolist() for handle in reversed(handles)][::-1]
        assert is_running and slow.was_released, "the second launch waited for the first one's work"
        assert values["results"] == [[1], [2]], f"expected [[1], [2]], got {values['results']}"
    if recorder.on_cpu:
        return
    with recorder.case("results arrive in pinned memory") as values:
        values["is_pinned"] = wait_for(launch(part, stream, add)).is_pinned()
        assert values["is_pinned"], "a copy into pageable memory makes the launch wait"
    with recorder.case("launches that may not synchronize") as values:
        torch.cuda.set_sync_debug_mode("error")
        try:
            handles = [launch(part, stream, add) for _ in range(8)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        values["launches"] = len([wait_for(handle) for handle in handles])
