"""A rank's process in which something goes wrong."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from part09_tensor_parallelism.worker.rank_process import run_rank
from part09_tensor_parallelism.worker.worker import Worker


def go_wrong(what: str) -> None:
    match what:
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "failing":
            raise ZeroDivisionError("the cat sat on the rank")
        case "hanging":
            time.sleep(3_600)


def run_faulty_rank(fault: str, rank: int, *args: Any) -> None:
    """run_rank, with a fault: rank:where:what. where: start, load, or the number of a step."""
    who, where, what = fault.split(":")
    if int(who) == rank and where == "start":
        go_wrong(what)
    elif int(who) == rank and where == "load":
        init = Worker.__init__

        def load(self: Worker, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **kwargs)
            go_wrong(what)

        Worker.__init__ = load  # type: ignore[method-assign]
    elif int(who) == rank:
        steps, make_run = iter(range(1, 1_000_000)), Worker.allocate_cache

        def allocate(self: Worker, num_blocks: int) -> None:
            make_run(self, num_blocks)
            run = self.runner.run

            def run_step(batch: Any) -> Any:
                if next(steps) == int(where):
                    go_wrong(what)
                return run(batch)

            self.runner.run = run_step  # type: ignore[method-assign]

        Worker.allocate_cache = allocate  # type: ignore[method-assign]
    run_rank(rank, *args)
