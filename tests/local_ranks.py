"""Ranks in threads of this process: their collectives add and join the threads' tensors. No process is started.

For part 9 and later: the classes are made for a part, on top of its own.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

TIMEOUT_S = 60.0


class Meeting:
    """Where the threads of a group meet. A thread that doesn't come is an error for all.

    boxes[i][j]: what rank j has put there for rank i. (A barrier would wake each thread twice.)
    """

    def __init__(self, size: int) -> None:
        self.boxes: list[list[queue.SimpleQueue[Tensor | None]]]
        self.boxes = [[queue.SimpleQueue() for _ in range(size)] for _ in range(size)]

    def exchange(self, rank: int, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks."""
        copied = tensor.clone()
        for boxes in self.boxes:
            boxes[rank].put(copied)
        tensors = list[Tensor]()
        for box in self.boxes[rank]:
            try:
                found = box.get(timeout=TIMEOUT_S)
            except queue.Empty:
                found = None
            if found is None:
                self.abort()
                raise threading.BrokenBarrierError
            tensors.append(found)
        return tensors

    def abort(self) -> None:
        """No thread waits any longer."""
        for boxes in self.boxes:
            for box in boxes:
                box.put(None)


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

        def exchange_counts(self, counts: Tensor) -> list[list[int]]:
            self.calls.append(("exchange_counts", tuple(counts.shape)))
            return torch.stack([each[:, self.rank] for each in self.meeting.exchange(self.rank, counts)], 1).tolist()

        def all_to_all(self, rows: Tensor, counts: list[int], num_received: list[int]) -> Any:
            self.calls.append(("all_to_all", tuple(rows.shape)))
            self.num_bytes_sent += (len(rows) - counts[self.rank]) * rows[:1].nbytes
            all_rows = self.meeting.exchange(self.rank, rows)
            all_counts = self.meeting.exchange(self.rank, torch.tensor(counts))
            parts = [each.split(sizes.tolist())[self.rank] for each, sizes in zip(all_rows, all_counts, strict=True)]
            assert [len(part) for part in parts] == num_received, f"rank {self.rank} expects {num_received} rows"
            return SimpleNamespace(wait=functools.partial(torch.cat, parts))

        def all_gather_rows(self, share: Tensor, num_rows: int) -> Tensor:
            self.calls.append(("all_gather_rows", tuple(share.shape)))
            return torch.cat(self.meeting.exchange(self.rank, share))[:num_rows]

        def any(self, is_so: bool, device: str) -> bool:
            return bool(torch.stack(self.meeting.exchange(self.rank, torch.tensor(is_so))).any())

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


def make_expert_grid(part: str, tp_size: int, num_cores: int, **fields: int) -> list[Any]:
    """The groups of each rank, core by core: all share the experts, and those of a core its layers. fields: further
    ones of Groups."""
    group, stage = classes_of(part)
    groups = importlib.import_module(f"{part}.worker.parallel").Groups
    everyone, size = Meeting(tp_size * num_cores), tp_size * num_cores
    cores = [Meeting(tp_size) for _ in range(num_cores)]
    return [
        groups(
            group(rank, tp_size, meeting=cores[core]), group(core * tp_size + rank, size, meeting=everyone), stage(),
            **fields,
        )
        for core in range(num_cores)
        for rank in range(tp_size)
    ]  # fmt: skip


def on_expert_ranks(
    part: str, tp_size: int, num_cores: int, work: Callable[[Any, int], Any], **fields: int
) -> list[Any]:
    """What work(groups, core) returns on each rank, core by core. Raises the first rank's error."""

    @torch.inference_mode()
    def run(number: int, groups: Any) -> Any:
        try:
            return work(groups, number // tp_size)
        except BaseException:
            for each in (groups.tensor, groups.experts):
                each.meeting.abort()
            raise

    return _results(
        [functools.partial(run, *each) for each in enumerate(make_expert_grid(part, tp_size, num_cores, **fields))]
    )


def _results(calls: list[Callable[[], Any]]) -> list[Any]:
    """What they return, each in a thread. Raises the first one's error."""
    with ThreadPoolExecutor(len(calls)) as threads:
        futures = [threads.submit(call) for call in calls]
    errors = [future.exception() for future in futures]
    for error in sorted(filter(None, errors), key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]


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
            group.meeting.abort()  # the others must not wait
            raise

    return _results([functools.partial(run, *rank) for rank in make_grid(part, tp_size, num_stages)])


def with_experts(part: str, config: Any, group: Any, stage: Any) -> Any:
    """The groups of a rank; the ranks that share its layers also share its experts, if the config says so."""
    parallel = importlib.import_module(f"{part}.worker.parallel")
    experts = group if config.enable_expert_parallel else parallel.ParallelGroup()
    return parallel.Groups(group, experts, stage, config.num_redundant_experts, 2 if config.enable_dbo else 1)


class LocalExecutor:
    """An executor whose ranks are threads of this process. worker: the one that answers."""

    def __init__(self, part: str, config: Any, cores: Any = None) -> None:
        worker_class = importlib.import_module(f"{part}.worker.worker").Worker
        tp_size, num_stages = config.tensor_parallel_size, config.pipeline_parallel_size
        ranks = make_grid(part, tp_size, num_stages)
        if hasattr(config, "enable_expert_parallel"):  # from part 11 on, a rank has its groups in one object
            ranks = [(with_experts(part, config, *rank),) for rank in ranks]
        self.workers = _results([functools.partial(worker_class, config, *rank, seed=0) for rank in ranks])
        self.answering = self.workers[-tp_size:]
        self.worker = self.answering[0]
        self.num_blocks = min(worker.num_blocks_available() for worker in self.workers)
        self.num_host_blocks = self.weight_bytes = self.bytes_per_block = 0
        self.kernels: dict[str, tuple[str, str]] = {}
        self._done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._answers: dict[int, list[Any]] = {}
        if getattr(config, "kv_offload_gib", 0):  # from part 12 on
            executor = importlib.import_module(f"{part}.core.executor")
            self.num_host_blocks = executor.num_host_blocks(config, sum(each.bytes_per_block for each in self.workers))
        has_transfers = self.num_host_blocks or getattr(config, "kv_connector", "none") != "none"  # from part 13 on
        for worker in self.workers:
            worker.allocate_cache(self.num_blocks, *((self.num_host_blocks, self._done.put) if has_transfers else ()))
        agents = [getattr(worker, "agent", None) for worker in self.workers]
        self.kv_sources = [agent.source for agent in agents if agent is not None]

    def transfer(self, transfer: Any) -> None:
        for worker in self.workers:
            worker.transfer(transfer)

    def finished_transfers(self, timeout_s: float) -> list[Any]:
        """Those that all ranks have finished, as the rank that has the fewest blocks says."""
        finished = []
        with contextlib.suppress(queue.Empty):
            while True:
                done = self._done.get(timeout=timeout_s) if timeout_s and not finished else self._done.get_nowait()
                answers = self._answers.setdefault(done.transfer_id, [])
                answers.append(done)
                if len(answers) == len(self.workers):
                    worst = min(answers, key=lambda each: (each.num_blocks, getattr(each, "num_tokens", 0)))
                    finished.append(worst)
                    del self._answers[done.transfer_id]
        return finished

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
