"""How many threads torch computes with, and how long they spin when one waits for the others.

torch splits an operation among OpenMP threads, and they meet at a barrier at its end. A thread that arrives early
spins: it checks again and again instead of sleeping, because waking up takes longer than most operations. That is fast
while every thread has a core. When another process takes one, the spinning threads use up the cores that the late
thread needs, and a step takes many times as long.
"""

from __future__ import annotations

import os

from common.errors import FieldError

# Per barrier. libgomp, in torch's Linux wheels: checks (its default is 300,000). libomp, in the wheels for macOS and in
# conda's builds: milliseconds (its default is 200); vLLM sets the same.
SPIN_LIMITS = {"GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "1"}
SPIN_VARIABLES = (*SPIN_LIMITS, "OMP_WAIT_POLICY")


def limit_spinning() -> None:
    """Let OpenMP threads spin for a short time only, unless the environment already says how they wait.

    Call it before torch is imported: OpenMP reads the variables when it is loaded. Child processes inherit them.
    """
    if not any(name in os.environ for name in SPIN_VARIABLES):
        os.environ.update(SPIN_LIMITS)


def check_num_threads(num_threads: int | None) -> None:
    """Raises FieldError for fewer than 1 thread or more threads than CPUs."""
    num_cpus = os.cpu_count() or 1
    if num_threads is not None and not 1 <= num_threads <= num_cpus:
        raise FieldError("num_threads", f"expected 1 to {num_cpus} (this machine's CPUs), got {num_threads}")


def set_num_threads(num_threads: int | None) -> None:
    """Make the calling thread compute with this many threads (None: the process's setting).

    The thread that runs the model must call it. OpenMP and MKL keep the number per thread: after
    torch.set_num_threads(1) in one thread, the first matrix product of another still uses all cores.
    """
    import torch  # not at the top: limit_spinning has to run before torch is imported

    torch.set_num_threads(num_threads or torch.get_num_threads())


def leave_a_core() -> None:
    """In the engine core's process: one thread fewer than cores, unless there are only two cores or OMP_NUM_THREADS is
    set.

    The API process and the scheduler need a core too, and whenever they take one from a compute thread, all the others
    wait at the next barrier. On two cores, both compute, because larger matrix products, as in long prompts, can use
    both. For small decodes, one thread is about as fast, and other processes do not slow it down: part 5's bench
    measures this (`busy` in results/part05.json), and --num-threads 1 chooses it.
    """
    import torch

    if torch.get_num_threads() > 2 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(torch.get_num_threads() - 1)
