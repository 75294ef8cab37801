"""Measure the candidates for an operation once, and keep the result on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from llvmlite.binding import get_host_cpu_name
from torch import Tensor

from common.results import machine_stamp

from .build import cache_directory

if TYPE_CHECKING:
    from .ops import Situation

NUM_SEQS, CONTEXT_LEN, BLOCK_SIZE = 16, 512, 16  # of the batch that is measured
REPEATS = 7
Functions = Mapping[str, Callable[..., Tensor]]


class Tuner:
    """Keeps what it has measured in a file, and in memory, because the file may be one that can't be written. path: of
    the file; None: a file in the user's cache directory."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or cache_directory() / "autotune.json"
        self.num_measured = 0
        self._known: dict[str, dict[str, float]] = {}

    def measure(
        self, name: str, candidates: Mapping[str, Any], make_case: Callable[[], Callable[[Any], object]],
        device: torch.device,
    ) -> dict[str, float]:  # fmt: skip
        """Seconds for each candidate that runs, by its name: from the file, if they have been measured before with the
        same code on such a device. name: what is measured, with its sizes. make_case: returns a function that runs a
        candidate."""
        key = " ".join([name, *candidates, device_name(device), sources()])
        if key not in self._known:  # a model asks for each of its matrices
            self._known |= self._read()
        if key not in self._known:
            self.num_measured += 1
            self._known[key] = time_all(make_case(), candidates, device)
            self._write(self._known)
        return dict(self._known[key])

    def _read(self) -> dict[str, dict[str, float]]:
        try:
            known = json.loads(self.path.read_text())
        except (OSError, ValueError, RecursionError):
            return {}
        return {key: times for key, times in known.items() if has_times(times)} if isinstance(known, dict) else {}

    def _write(self, known: dict[str, dict[str, float]]) -> None:
        """A reader sees the old file or the new one. If it can't be written, the next start measures again."""
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}")
            try:
                temporary.write_text(json.dumps(known, indent=1))
                temporary.replace(self.path)
            finally:
                temporary.unlink(missing_ok=True)


def has_times(times: object) -> bool:
    """Whether an entry of the file is what _write() puts there."""
    return isinstance(times, dict) and all(isinstance(each, float) and each > 0 for each in times.values())


def shape(situation: Situation) -> tuple[Any, ...]:
    return (
        situation.dtype, situation.kv_dtype, situation.num_heads, situation.num_kv_heads, situation.head_dim,
        situation.hidden_size, situation.vocab_size,
    )  # fmt: skip


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


@cache
def cpu_name() -> str:
    """The CPU's model as the system names it, which in a virtual machine may be vague, and as LLVM does; its cores."""
    return f"{machine_stamp()['cpu']} ({get_host_cpu_name()}), {os.cpu_count()} cores"


@cache
def sources() -> str:
    """A hash of the kernels' code."""
    found = hashlib.sha256(torch.__version__.encode())
    paths = [path for suffix in ("py", "cu", "cuh", "h") for path in Path(__file__).parent.rglob(f"*.{suffix}")]
    for path in sorted(paths):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def time_all(run: Callable[[Any], object], candidates: Mapping[str, Any], device: torch.device) -> dict[str, float]:
    """The fastest of several interleaved runs of each candidate: another program can only slow a run down. A candidate
    that fails is left out."""
    times: dict[str, list[float]] = {}
    for name, candidate in candidates.items():
        with contextlib.suppress(RuntimeError, NotImplementedError):
            run(candidate)  # compiles
            times[name] = []
    for _ in range(REPEATS):
        for name in times:
            times[name].append(seconds(partial(run, candidates[name]), device))
    return {name: min(own) for name, own in times.items()}


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """How long a call takes, on a GPU until its kernels are done."""
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def attention_case(situation: Situation) -> Callable[[Functions], object]:
    """A decode of 16 sequences and, in the same measurement, a prefill: a chunk of 16 tokens of one sequence. All have
    a context of 512 tokens."""
    heads, device = (situation.num_heads, situation.head_dim), situation.device
    num_blocks = NUM_SEQS * CONTEXT_LEN // BLOCK_SIZE
    query = torch.randn(NUM_SEQS, *heads, dtype=situation.dtype, device=device)
    kv_cache = torch.zeros(
        num_blocks, BLOCK_SIZE, 2, situation.num_kv_heads, situation.head_dim, dtype=situation.kv_dtype, device=device
    )
    tables = torch.arange(num_blocks, dtype=torch.int32, device=device).view(NUM_SEQS, -1)
    starts = torch.arange(NUM_SEQS + 1, dtype=torch.int32, device=device)
    lens = torch.full((NUM_SEQS,), CONTEXT_LEN, dtype=torch.int32, device=device)
    chunk = torch.tensor([0, NUM_SEQS], dtype=torch.int32, device=device)  # of the first sequence, at its end

    def run(functions: Functions) -> None:
        functions["paged_attention"](query, kv_cache, tables, starts, lens, 1, 1.0)
        functions["paged_attention"](query, kv_cache, tables[:1], chunk, lens[:1], NUM_SEQS, 1.0)

    return run


def norm_case(situation: Situation) -> Callable[[Functions], object]:
    rows, residual = (
        torch.randn(NUM_SEQS, situation.hidden_size, dtype=situation.dtype, device=situation.device) for _ in range(2)
    )
    weight = torch.ones(situation.hidden_size, dtype=situation.dtype, device=situation.device)
    return lambda functions: functions["add_rms_norm"](rows, residual, weight, 1e-5)


def activation_case(situation: Situation) -> Callable[[Functions], object]:
    rows = torch.randn(NUM_SEQS, 8 * situation.hidden_size, dtype=situation.dtype, device=situation.device)
    return lambda functions: functions["silu_and_mul"](rows)


def rotary_case(situation: Situation) -> Callable[[Functions], object]:
    dtype, device, size = situation.dtype, situation.device, situation.head_dim
    query = torch.randn(NUM_SEQS, situation.num_heads, size, dtype=dtype, device=device)
    key, value = (torch.randn(NUM_SEQS, situation.num_kv_heads, size, dtype=dtype, device=device) for _ in range(2))
    positions = torch.arange(NUM_SEQS, device=device)
    table = torch.ones(NUM_SEQS, size, dtype=dtype, device=device)
    kv_cache = torch.empty(1, NUM_SEQS, 2, situation.num_kv_heads, size, dtype=situation.kv_dtype, device=device)
    has_codes = situation.kv_dtype in (torch.int8, torch.uint8)
    scales = torch.ones(2, situation.num_kv_heads, device=device) if has_codes else None
    return lambda functions: functions["rotate_and_store"](
        query, key, value, positions, table, kv_cache, positions, scales
    )


def sampling_case(situation: Situation) -> Callable[[Functions], object]:
    logits = torch.randn(NUM_SEQS, situation.vocab_size, device=situation.device)
    ones = torch.ones(NUM_SEQS, device=situation.device)
    top_k = torch.full((NUM_SEQS,), min(50, situation.vocab_size), dtype=torch.int32, device=situation.device)
    seeds = torch.arange(NUM_SEQS, device=situation.device)
    return lambda functions: functions["sample"](logits, ones, top_k, ones * 0.9, ones * 0, seeds, seeds)


CASES: dict[str, Callable[[Any], Callable[[Functions], object]]] = {
    "attention": attention_case,
    "norm": norm_case,
    "activation": activation_case,
    "rotary": rotary_case,
    "sampling": sampling_case,
}
