"""Ranks in threads of this process: their collectives add and join the threads' tensors. No process is started.

For part 9 and later: the classes are made for a part, on top of its own.
"""

from __future__ import annotations

import functools
import importlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

TIMEOUT_S = 60.0


class Meeting:
    """Where the threads of a group meet. A thread that doesn't come is an error for all."""

    def __init__(self, size: int) -> None:
        self.barrier, self.tensors = threading.Barrier(size), [torch.empty(0)] * size

    def exchange(self, rank: int, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks."""
        self.tensors[rank] = tensor.clone()
        self.barrier.wait(TIMEOUT_S)
        tensors = list(self.tensors)
        self.barrier.wait(TIMEOUT_S)
        return tensors


@functools.cache
def classes_of(part: str) -> tuple[type[Any], type[Any]]:
    """A group and a stage whose ranks are threads, as the part's own classes."""
    parallel = importlib.import_module(f"{part}.worker.parallel")

    @dataclass
    class LocalGroup(parallel.ParallelGroup):  # type: ignore[name-defined,misc]
        """calls: its collectives, with the shape of the tensor."""

        meeting: Meeting = field(default_factory=lambda: Meeting(1))
        calls: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)

        def all_reduce(self, partial: Tensor) -> Tensor:
            self.calls.append(("all_reduce", tuple(partial.shape)))
            partial.copy_(torch.stack(self.meeting.exchange(self.rank, partial)).sum(dim=0))
            return partial

        def all_gather(self, shard: Tensor) -> Tensor:
            self.calls.append(("all_gather", tuple(shard.shape)))
            return torch.cat(self.meeting.exchange(self.rank, shard), dim=-1)

    @dataclass
    class LocalStage(parallel.PipelineStage):  # type: ignore[name-defined,misc]
        """links[i]: from stage i to stage i + 1."""

        links: list[queue.Queue[Tensor]] = field(default_factory=list)

        def receive(self, num_tokens: int, hidden_size: int, dtype: torch.dtype, device: str) -> Tensor:
            hidden = self.links[self.index - 1].get(timeout=TIMEOUT_S)
            assert hidden.shape == (num_tokens, hidden_size), f"got {list(hidden.shape)}, expected {num_tokens} tokens"
            return hidden

        def send(self, hidden: Tensor) -> None:
            self.links[self.index].put(hidden.clone())

    return LocalGroup, LocalStage


def make_grid(part: str, tp_size: int, num_stages: int) -> list[tuple[Any, Any]]:
    """The group and the stage of each rank, stage by stage."""
    group, stage = classes_of(part)
    meetings = [Meeting(tp_size) for _ in range(num_stages)]
    links: list[list[queue.Queue[Tensor]]] = [[queue.Queue() for _ in range(num_stages)] for _ in range(tp_size)]
    return [
        (group(rank, tp_size, meeting=meetings[index]), stage(index, num_stages, links=links[rank]))
        for index in range(num_stages)
        for rank in range(tp_size)
    ]


def on_all_ranks(part: str, size: int, work: Callable[[Any], Any]) -> list[Any]:
    """What work(group) returns on each rank of a group."""
    return on_a_grid(part, size, 1, lambda group, _: work(group))


def on_a_grid(part: str, tp_size: int, num_stages: int, work: Callable[[Any, Any], Any]) -> list[Any]:
    """What work(group, stage) returns on each rank, stage by stage. Raises the first rank's error."""

    @torch.inference_mode()
    def run(group: Any, stage: Any) -> Any:
        try:
            return work(group, stage)
        except BaseException:
            group.meeting.barrier.abort()  # the others must not wait
            raise

    with ThreadPoolExecutor(tp_size * num_stages) as threads:
        futures = [threads.submit(run, *rank) for rank in make_grid(part, tp_size, num_stages)]
    errors = [future.exception() for future in futures]
    for error in sorted(filter(None, errors), key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]


class LocalExecutor:
    """An executor whose ranks are threads of this process. worker: the one that answers."""

    def __init__(self, part: str, config: Any) -> None:
        worker_class = importlib.import_module(f"{part}.worker.worker").Worker
        tp_size, num_stages = config.tensor_parallel_size, config.pipeline_parallel_size
        self.workers = [worker_class(config, *rank, seed=0) for rank in make_grid(part, tp_size, num_stages)]
        self.answering = self.workers[-tp_size:]
        self.worker = self.answering[0]
        self.num_blocks = min(worker.num_blocks_available() for worker in self.workers)
        for worker in self.workers:
            worker.allocate_cache(self.num_blocks)

    def launch(self, step: Any) -> LocalHandle:
        return LocalHandle(self, [worker.launch(step) for worker in self.workers])

    def wait_for(self, requests: Any) -> None:
        requests.poll()

    def shutdown(self) -> None:
        pass


class LocalHandle:
    def __init__(self, executor: LocalExecutor, handles: list[Any]) -> None:
        self.executor, self.handles = executor, handles

    def result(self) -> Any:
        """The step's result, which is the same on all ranks of the last stage, and leaves the same token buffers."""
        outputs = [handle.result() for handle in self.handles][-len(self.executor.answering) :]
        first, *others = outputs
        for rank, other in enumerate(others, start=1):
            same = (other.token_ids, other.logprobs, other.draft_token_ids, other.prompt_logprobs)
            assert same == (first.token_ids, first.logprobs, first.draft_token_ids, first.prompt_logprobs), (
                f"rank {rank} of the last stage has sampled {other}, rank 0 {first}"
            )
        return first
