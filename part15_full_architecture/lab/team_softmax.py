"""python -m part15_full_architecture.lab.team_softmax: the smallest kernel for a team of threads.

It computes softmax over a whole matrix: the second phase needs what all tasks of the first have written.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from ..worker.kernels.cpu.team import get_team, make_counters, tasks

NUM_ROWS, NUM_COLUMNS = 6, 1_000


@numba.njit(nogil=True)
def softmax_kernel(counters: int, numbers: NDArray[np.float64], sums: NDArray[np.float64]) -> None:
    """numbers: [rows, columns], replaced by their softmax. sums: [rows], for the kernel's own use."""
    for row in tasks(counters, 0, len(numbers)):
        numbers[row] = np.exp(numbers[row])
        sums[row] = numbers[row].sum()
    for row in tasks(counters, 1, len(numbers)):
        numbers[row] /= sums.sum()


def main() -> None:
    numbers = torch.randn(NUM_ROWS, NUM_COLUMNS, dtype=torch.float64)
    expected = torch.softmax(numbers.flatten(), 0).view_as(numbers)
    counters = make_counters(num_phases=2)
    get_team(num_threads=2).run(softmax_kernel, counters, numbers.numpy(), np.empty(NUM_ROWS))
    print(f"Largest difference from torch.softmax: {float((numbers - expected).abs().max()):.0e}")
    for phase, (taken, done) in enumerate(counters[:, :, 0].tolist()):
        print(f"Phase {phase}: {done} tasks done. Threads asked {taken} times for one.")


if __name__ == "__main__":
    main()
