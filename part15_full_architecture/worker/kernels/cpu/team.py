"""Threads that compute a kernel together, and share its work through atomic counters: they wait for tasks, not threads.

A kernel is a series of phases, and a phase is a number of tasks. Each thread takes the next task that no other has
taken; when none is left, it waits until all are done. So a thread that comes late finds phases that are over, and one
that the system has stopped holds up the others with its own task only.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
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

COUNTER_STRIDE = 16  # int64 numbers: two counters in one cache line would travel between the cores as one
NUM_COUNTERS = 2  # of a phase: tasks that are taken, tasks that are done
NUM_SPINS = 2_000  # looks, before a waiting thread offers its core to others between two looks
ALL_DONE = 1 << 62  # more than any number of tasks
_sched_yield = types.ExternalFunction("sched_yield", types.int32())
_making_a_team = threading.Lock()


@dataclass(slots=True)
class Job:
    """A call of a kernel. inside: idents of the threads that are in it now."""

    kernel: Callable[..., None]
    counters: Tensor
    args: tuple[Any, ...]
    errors: list[BaseException] = field(default_factory=list)
    inside: set[int] = field(default_factory=set)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def compute(self) -> None:
        """Run the kernel in this thread. Threads that do so share its tasks until none is left. An error goes to
        errors."""
        try:
            with self.changed:
                self.inside.add(threading.get_ident())
            self.kernel(self.counters.data_ptr(), *self.args)
        except BaseException as error:
            self.errors.append(error)
            self.counters.fill_(ALL_DONE)  # no thread may wait for the task that this one leaves undone
        finally:
            with self.changed:
                self.inside.discard(threading.get_ident())
                self.changed.notify_all()

    def give_up(self) -> None:
        """Let no thread begin another task, and wait until none is inside the kernel.

        After that, the memory of its tasks may be freed.
        """
        self.counters.fill_(ALL_DONE)
        with self.changed:
            self.changed.wait_for(lambda: not self.inside)


class Team:
    """num_threads includes the one that calls run(). The others, its helpers, sleep between kernels, and live as long
    as the process.

    Several threads may call run() at once. Helpers finish one kernel before they begin the next, so a caller may have
    to do all the work itself.
    """

    def __init__(self, num_threads: int) -> None:
        self._queues: list[SimpleQueue[Job]] = [SimpleQueue() for _ in range(num_threads - 1)]
        for queue in self._queues:
            threading.Thread(target=_help, args=(queue,), name="kernel", daemon=True).start()

    def run(self, kernel: Callable[..., None], counters: Tensor, *args: Any) -> None:
        """All threads call the kernel, which releases the GIL, with the counters' address and the arguments.

        Returns when all tasks are done. A helper may be late, or be stopped between two phases, and go on after that:
        so outside its tasks, a kernel may read no memory but the counters, which no other run may use, and arrays among
        its arguments. Raises what was raised in any thread: the tasks that nobody had begun are then left out.
        """
        job = Job(kernel, counters, args)
        try:
            for queue in self._queues:
                queue.put(job)
            job.compute()
            if job.errors:
                raise job.errors[0]
        except BaseException:
            job.give_up()
            raise


def get_team(num_threads: int) -> Team:
    """This process's team of so many threads."""
    with _making_a_team:
        return _team(num_threads)


@cache
def _team(num_threads: int) -> Team:
    return Team(num_threads)


def _after_fork_in_child() -> None:
    _team.cache_clear()  # a child has no threads but the one that forked
    _making_a_team.release()


# Nobody holds the lock while a process forks: in the child, nobody would release it.
os.register_at_fork(
    before=_making_a_team.acquire, after_in_parent=_making_a_team.release, after_in_child=_after_fork_in_child
)


def _help(queue: SimpleQueue[Job]) -> None:
    while True:
        job = queue.get()
        job.compute()
        del job  # not while it sleeps: its arguments may belong to a model that nobody else needs


def make_counters(num_phases: int) -> Tensor:
    return torch.zeros(num_phases, NUM_COUNTERS, COUNTER_STRIDE, dtype=torch.int64)


@numba.njit(**OPTIONS)
def tasks(counters, phase, num_tasks):
    """The tasks of a phase that this thread takes. Ends when those of all threads are done.

    counters: the address of make_counters(). All threads go through all phases, in order. The loop over the tasks must
    not be left early: a task that is taken and not done would keep all threads waiting.
    """
    taken = counters + phase * NUM_COUNTERS * COUNTER_STRIDE * 8  # the addresses of the phase's counters
    done = taken + COUNTER_STRIDE * 8
    task = add_to_counter(taken, 1)
    while task < num_tasks:
        yield task
        add_to_counter(done, 1)
        task = add_to_counter(taken, 1)
    num_looks = 0
    while read_counter(done) < num_tasks:
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
