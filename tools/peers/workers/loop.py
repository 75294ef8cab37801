"""What all workers share: load a model, say so, then one JSON line in, one JSON line out. Standard library only.

A worker runs as `python -m tools.peers.workers.NAME MODEL DTYPE FILES`, in its engine's environment. MODEL is a
directory with float32 weights; in FILES, a directory too, the worker keeps the model in its engine's own format. Its
first line is {"versions": {…}, "settings": {…}}. Then, for each {"prompts": [[id, …], …], "max_tokens": [n, …]}, it
answers {"seconds": s, "token_ids": [[id, …], …]}; or {"error": traceback}, and ends. It also ends at the end of its
input.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Prompts, and how many tokens each answer has; returns the answers. Greedy; the end-of-sequence token doesn't end one.
Generate = Callable[[list[list[int]], list[int]], list[list[int]]]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in an engine. settings: those that differ from the engine's defaults, as strings or numbers. close: ends
    the engine's processes, if it has any."""

    generate: Generate
    settings: Mapping[str, Any]
    close: Callable[[], object] = lambda: None


def num_cores() -> int:
    return len(os.sched_getaffinity(0))


def serve(load: Callable[[Path, str, Path], Loaded], *packages: str) -> int:
    """Run a worker. load gets MODEL, DTYPE and FILES. packages: those whose versions are reported."""
    model, dtype, files = sys.argv[1:]
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to stderr: stdout has only the protocol

    def emit(message: Mapping[str, Any]) -> None:
        print(json.dumps(message), file=out, flush=True)

    try:
        loaded = load(Path(model), dtype, Path(files))
        versions = {package: importlib.metadata.version(package) for package in packages}
        emit({"versions": versions, "settings": dict(loaded.settings)})
        for line in sys.stdin:
            work = json.loads(line)
            start_s = time.perf_counter()
            token_ids = loaded.generate(work["prompts"], work["max_tokens"])
            emit({"seconds": time.perf_counter() - start_s, "token_ids": token_ids})
        loaded.close()
    except Exception:  # whatever the engine raises: the parent reports it
        emit({"error": traceback.format_exc()})
        return 1
    return 0
