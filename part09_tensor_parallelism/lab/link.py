"""How fast the link between ranks is: the time of an all-reduce as latency + bytes / bandwidth, and what follows."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

from common.results import median

from ..config import EngineConfig
from ..worker.launcher import join_groups

SIZES = tuple(2**power for power in range(10, 23, 2))  # bytes, 1 KiB to 4 MiB


@dataclass(frozen=True, slots=True)
class Link:
    """latency_s: of an all-reduce of nothing. bytes_per_s: of a large one."""

    latency_s: float
    bytes_per_s: float

    def all_reduce_s(self, num_bytes: float) -> float:
        return self.latency_s + num_bytes / self.bytes_per_s


def predict_step_s(alone_s: float, num_ranks: int, num_collectives: int, num_bytes: float, link: Link) -> float:
    """A step on num_ranks ranks with a core each, from its time on one: the layers are split, the collectives come on
    top. num_bytes: of all collectives together."""
    return alone_s / num_ranks + num_collectives * link.latency_s + num_bytes / link.bytes_per_s


def break_even(
    alone_s: float, num_ranks: int, num_collectives: int, num_bytes: float, latency_s: float
) -> float | None:
    """The bandwidth, in bytes/s, from which on several ranks are faster than one. None: the latency is too high for
    any."""
    saved_s = alone_s * (1 - 1 / num_ranks) - num_collectives * latency_s
    return num_bytes / saved_s if saved_s > 0 else None


def measure(num_ranks: int, repeats: int) -> dict[int, float]:
    """The median time of an all-reduce between processes that compute in between, in seconds, by its size in bytes."""
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as directory:
        processes = [
            spawn.Process(
                target=_measure_on, args=(rank, num_ranks, f"file://{directory}/store", repeats, sender), daemon=True
            )
            for rank in range(num_ranks)
        ]
        for process in processes:
            process.start()
        times: dict[int, float] = receiver.recv()  # from a process that this one has started
        for process in processes:
            process.join()
    return times


def _measure_on(rank: int, num_ranks: int, init_method: str, repeats: int, sender: Connection) -> None:
    torch.set_num_threads(1)
    config = EngineConfig(tensor_parallel_size=num_ranks, device="cpu")
    group, _ = join_groups(config, rank, init_method)
    matrix, tensors = torch.zeros(256, 256), {size: torch.zeros(size // 4) for size in SIZES}
    found: dict[int, list[float]] = {size: [] for size in SIZES}
    for _ in range(repeats):
        for size, tensor in tensors.items():
            matrix @ matrix  # as in a layer: about a millisecond, so that a rank has to be woken up
            start_s = time.perf_counter()
            group.all_reduce(tensor)
            found[size].append(time.perf_counter() - start_s)
    if rank == 0:
        sender.send({size: median(seconds) for size, seconds in found.items()})


def fit(times: dict[int, float]) -> Link:
    """The latency is the median of the sizes up to 64 KiB, which take equally long; the bandwidth is the largest's."""
    latency_s, largest = median([seconds for size, seconds in times.items() if size <= 2**16]), max(times)
    return Link(latency_s, largest / max(times[largest] - latency_s, 1e-9))
