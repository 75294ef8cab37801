"""Threads that compute one kernel together, and the work that they share: atomic counters instead of barriers.

A kernel is a series of phases, and a phase is a number of tasks. Each thread takes the next task that no other has
taken; when none is left, it waits until all are done. So a thread that comes late finds phases that are over, and one
that the system has stopped holds up the others with its own task only.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import cache
from queue import SimpleQueue
from typing import Any

import numba
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from ...cpu_attention import OPTIONS

Job = tuple[Callable[..., None], Tensor, tuple[Any, ...]]
CACHE_LINE = 8  # int64 numbers. Two counters in one line would travel between the cores as one.
NUM_COUNTERS = 2  # of a phase: tasks that are taken, tasks that are done
NUM_SPINS = 2_000  # looks, before a waiting thread gives its core to others between two looks
_sched_yield = types.ExternalFunction("sched_yield", types.int32())


class Team:
    """num_threads: with the one that calls run(). The others sleep between two kernels, as long as the process lives.

    Several threads may call run() at once: then the helpers come late, or not at all, and each computes by itself.
    """

    def __init__(self, num_threads: int) -> None:
        self._queues: list[SimpleQueue[Job]] = [SimpleQueue() for _ in range(num_threads - 1)]
        for queue in self._queues:
            threading.Thread(target=_help, args=(queue,), name="kernel", daemon=True).start()

    def run(self, kernel: Callable[..., None], counters: Tensor, *args: Any) -> None:
        """All threads call the kernel, which releases the GIL, with the counters' address and the arguments.

        Returns when all tasks are done. A thread may come later than that: so no other run may have the same
        counters, and before its first task, a kernel may read no memory but them and arrays among its arguments.
        """
        for queue in self._queues:
            queue.put((kernel, counters, args))
        kernel(counters.data_ptr(), *args)


@cache
def get_team(num_threads: int) -> Team:
    """The team of this process."""
    return Team(num_threads)


os.register_at_fork(after_in_child=get_team.cache_clear)  # a child has no threads but the one that forked


def _help(queue: SimpleQueue[Job]) -> None:
    while True:
        kernel, counters, args = queue.get()
        kernel(counters.data_ptr(), *args)
        del kernel, counters, args  # not while it sleeps: they may belong to a model that nobody else needs


def make_counters(num_phases: int) -> Tensor:
    return torch.zeros(num_phases, NUM_COUNTERS, CACHE_LINE, dtype=torch.int64)


@numba.njit(**OPTIONS)
def tasks(counters, phase, num_tasks):
    """The tasks of a phase that this thread takes. Ends when those of all threads are done.

    counters: the address of make_counters(). All threads go through all phases, in order.
    """
    num_taken = counters + phase * NUM_COUNTERS * CACHE_LINE * 8
    num_done = num_taken + CACHE_LINE * 8
    task = add_to_counter(num_taken, 1)
    while task < num_tasks:
        yield task
        add_to_counter(num_done, 1)
        task = add_to_counter(num_taken, 1)
    num_looks = 0
    while read_counter(num_done) < num_tasks:
        num_looks += 1
        if num_looks > NUM_SPINS:
            _sched_yield()


@intrinsic
def add_to_counter(typing_context, address, number):
    """Add to the int64 at an address; no other thread can come between. Returns what was there before. A thread that
    reads the sum also sees what this one has written until now."""

    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "acq_rel")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def read_counter(typing_context, address):
    """The int64 at an address, read anew each time."""

    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), generate
