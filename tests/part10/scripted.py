"""Replicas that exist only on paper, and texts of a given number of chunks."""

from __future__ import annotations

import random
from collections.abc import Sequence

from part10_data_parallelism.router.prefix_index import CHUNK_CHARS
from part10_data_parallelism.router.replica import Replica


def replicas_with(*loads: int) -> list[Replica]:
    """One replica for each load: its number of unfinished requests."""
    return [Replica(f"http://127.0.0.1:{8_000 + number}", num_pending=load) for number, load in enumerate(loads)]


def loads_of(replicas: Sequence[Replica]) -> list[int]:
    return [replica.num_pending for replica in replicas]


def text_of(seed: int, num_chunks: int) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice("abcdefgh ") for _ in range(num_chunks * CHUNK_CHARS))
