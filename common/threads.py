"""How long the threads that torch computes with spin when one waits for the others.

torch splits an operation among OpenMP threads, and they meet at a barrier at its end. A thread that arrives early
spins: it checks again and again instead of sleeping, because waking up takes longer than most operations. That is fast
while every thread has a core. When another process takes one, the spinning threads use up the cores that the late
thread needs, and a step takes many times as long.
"""

from __future__ import annotations

import os

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
