"""What each request did in each step."""

from __future__ import annotations

import enum
import sys
from collections.abc import Iterator, Sequence

from common.trace.schema import StepTrace


class Phase(enum.IntEnum):
    """What a request did in a step. If one mark covers several steps, it shows the highest of their phases."""

    DECODE = enum.auto()
    CHUNK = enum.auto()  # a partial prefill: no token was sampled
    PREEMPTED = enum.auto()  # has no blocks and waits to be scheduled again
    PREFILL = enum.auto()  # a whole prompt, or the last chunk of one; again after a preemption
    ABORTED = enum.auto()
    FINISHED = enum.auto()


def step_phases(steps: Sequence[StepTrace]) -> Iterator[dict[str, Phase]]:
    """For each step the phase of every request scheduled in it: DECODE, CHUNK or PREFILL.

    A request prefills until its first token is sampled. It prefills again if it returns with no more computed tokens
    than before: then it was preempted. (With rejected draft tokens it still advances by at least one.)
    """
    num_computed: dict[str, int] = {}  # at the last step of each request whose prefill is done
    for step in steps:
        phases = {}
        for request in step.requests:
            if request.num_computed > num_computed.get(request.id, sys.maxsize):
                phases[request.id] = Phase.DECODE
            else:
                phases[request.id] = Phase.PREFILL if request.num_sampled else Phase.CHUNK
            if phases[request.id] is Phase.CHUNK:
                num_computed.pop(request.id, None)
            else:
                num_computed[request.id] = request.num_computed
        yield phases
