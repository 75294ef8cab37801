"""Traces as long as those of a server that has run for a while."""

from __future__ import annotations

import random
from pathlib import Path

from common.trace import RequestTrace, StepDeltas, StepTrace, TraceWriter


def write_long_trace(path: Path, num_steps: int) -> None:
    """Requests of random lengths come and go in 16 slots, with three blocks each or more."""
    rng, deltas, tables = random.Random(0), StepDeltas(), dict[str, list[int]]()
    lengths: dict[str, int] = {}
    free = list(range(1, 401))
    with TraceWriter(path, part="part04_continuous_batching", model="tiny", block_size=16) as writer:
        for number in range(num_steps):
            while len(tables) < 16:
                name = f"r{number}-{len(tables)}"
                tables[name], lengths[name] = [free.pop() for _ in range(3)], rng.randrange(5, 200)
            requests = []
            for name, table in tables.items():
                lengths[name] -= 1
                if number % 16 == 0 and free:
                    table.append(free.pop())
                fields = deltas.of_request(name, table, [5, 6, 7])
                requests.append(
                    RequestTrace(id=name, num_computed=9, num_scheduled=1, token_ids=[number % 300], **fields)
                )
            finished = [name for name in tables if lengths[name] <= 0]
            for name in finished:
                free += tables.pop(name)
            deltas.forget(finished)
            writer.write(
                StepTrace(
                    step=number + 1, start_s=number * 0.01, schedule_s=0.001, execute_s=0.008, update_s=0.001,
                    num_running=16, num_waiting=0, requests=requests, num_blocks_total=400, num_blocks_free=len(free),
                    finished=finished,
                )
            )  # fmt: skip
