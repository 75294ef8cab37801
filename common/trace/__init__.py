"""The step trace that `--trace FILE` writes, one JSON object per line: a header, then one line per engine step.

    python -m common.trace view FILE                 a summary and a chart, one row per request
    python -m common.trace export FILE OUT.json      for https://ui.perfetto.dev

The schema is the same for all parts and only grows: a new field has a default, and readers skip unknown
fields.
"""

from __future__ import annotations

import contextlib
import enum
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from common.errors import FieldError

SCHEMA_VERSION = 1
FLUSH_INTERVAL_S = 0.1

_ENGINE, _REQUESTS, _RANKS = 1, 2, 3  # the groups of tracks in an export, "processes" in the format's terms
_DETAILS = ("num_computed", "num_cached", "num_blocks", "num_sampled")  # of a request's slice


class RequestTrace(msgspec.Struct, frozen=True, kw_only=True):
    """One request in one step.

    num_computed: tokens whose KV existed before the step. num_scheduled: tokens computed in it. num_cached: tokens
    taken from the prefix cache instead. num_sampled: output tokens, 0 for a prefill chunk that is not the last.
    num_drafts: how many of num_scheduled were draft tokens.
    """

    id: str
    num_computed: int
    num_scheduled: int
    num_cached: int = 0
    num_blocks: int
    num_sampled: int = 1
    num_drafts: int = 0


class CollectiveTrace(msgspec.Struct, frozen=True, kw_only=True):
    """A collective on one rank, with the time that it waited for the other ranks."""

    name: str
    num_bytes: int
    start_s: float
    duration_s: float


class RankTrace(msgspec.Struct, frozen=True, kw_only=True):
    """A step on one rank."""

    rank: int
    start_s: float
    duration_s: float
    collectives: list[CollectiveTrace] = []


class TransferTrace(msgspec.Struct, frozen=True, kw_only=True):
    """KV that has come from another engine, for one request."""

    id: str
    num_tokens: int
    num_bytes: int
    start_s: float
    duration_s: float


class StepTrace(msgspec.Struct, kw_only=True):
    """One engine step. start_s counts from the start of the trace; num_running and num_waiting are after scheduling.

    requests: those scheduled in this step. num_blocks_*: without the null block. preempted, finished: request ids in
    this step; aborted: since the previous step. discarded: ids of requests in this step that ended before it did.
    execute_s: from scheduling until the results arrive; forward_s: the model's share of it, from forward_start_s on.
    An engine that runs ahead launches a step while the previous one runs; the launch counts as scheduling. ranks: the
    step on each rank, if there are several. transfers: those that have ended since the previous step.
    """

    step: int
    start_s: float
    schedule_s: float
    execute_s: float
    update_s: float
    num_running: int
    num_waiting: int
    requests: list[RequestTrace] = []
    num_blocks_total: int
    num_blocks_free: int
    preempted: list[str] = []
    aborted: list[str] = []
    finished: list[str] = []
    forward_start_s: float | None = None
    forward_s: float | None = None
    discarded: list[str] = []
    ranks: list[RankTrace] = []
    transfers: list[TransferTrace] = []

    @property
    def end_s(self) -> float:
        return self.start_s + self.schedule_s + self.execute_s + self.update_s

    @property
    def num_blocks_used(self) -> int:
        return self.num_blocks_total - self.num_blocks_free


@dataclass(frozen=True, slots=True)
class Trace:
    """The contents of a trace file. note: what read_trace() skipped, None if nothing."""

    header: dict[str, Any]
    steps: list[StepTrace]
    note: str | None = None


class TraceWriter:
    """Writes a trace file, replacing an existing one. A separate thread writes, so that no step waits for the disk.

    Raises FieldError if the file cannot be opened. If a later write fails (disk full), it prints one warning to stderr
    and drops the rest of the trace; the engine continues. write() may be called from any thread; after close() it does
    nothing.
    """

    def __init__(self, path: Path | str, *, part: str, model: str) -> None:
        try:
            self._file = Path(path).open("wb")  # noqa: SIM115, close() closes it
        except OSError as error:
            raise FieldError("trace", f"cannot write {str(path)!r}: {error.strerror}") from error
        self._path = path
        self._began = time.perf_counter()
        self._encoder = msgspec.json.Encoder()
        self._lock = threading.Lock()
        self._is_open = True
        date = time.strftime("%Y-%m-%d", time.gmtime())
        header = {"trace": SCHEMA_VERSION, "part": part, "model": model, "date": date, "began_s": self._began}
        self._lines = [self._encoder.encode(header)]
        self._flush()
        self._closing = threading.Event()
        self._flusher = threading.Thread(target=self._flush_each_interval, name="trace-writer", daemon=True)
        self._flusher.start()

    def elapsed_s(self) -> float:
        """Seconds since the start of the trace, for StepTrace.start_s."""
        return time.perf_counter() - self._began

    def write(self, step: StepTrace) -> None:
        """Queue a step; it is written at most FLUSH_INTERVAL_S later."""
        if not self._is_open:
            return
        line = self._encoder.encode(step)
        with self._lock:
            self._lines.append(line)

    def close(self) -> None:
        """Write the remaining steps and close the file. A second call does nothing."""
        self._closing.set()
        self._flusher.join()
        self._flush()
        self._is_open = False
        with contextlib.suppress(OSError):  # _flush() has already warned
            self._file.close()

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _flush_each_interval(self) -> None:
        while not self._closing.wait(FLUSH_INTERVAL_S):
            self._flush()

    def _flush(self) -> None:
        with self._lock:
            lines, self._lines = self._lines, []
        if not lines or not self._is_open:
            return
        try:
            self._file.write(b"\n".join(lines) + b"\n")
            self._file.flush()
        except OSError as error:
            self._is_open = False
            print(
                f"warning: trace {self._path}: {error.strerror}; tracing stops, the engine continues", file=sys.stderr
            )


def read_trace(path: Path | str) -> Trace:
    """Read a trace file, even while it is being written: an incomplete last line is skipped, with a note.

    Raises FieldError, a ValueError, naming the file and the line, if the format is wrong anywhere else.
    """
    *lines, rest = Path(path).read_bytes().split(b"\n")
    if not lines:
        raise FieldError(f"{path}:1", "no header line, this is not a trace file")
    header = _read_header(f"{path}:1", lines[0])
    decoder = msgspec.json.Decoder(StepTrace)
    steps = [_read_step(decoder, f"{path}:{number}", line) for number, line in enumerate(lines[1:], start=2)]
    note = f"{path}:{len(lines) + 1}: the line is incomplete and was skipped" if rest else None
    return Trace(header, steps, note)


def _read_header(where: str, line: bytes) -> dict[str, Any]:
    try:
        header = msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise FieldError(where, f"not the header of a trace: {error}") from error
    if header.get("trace") != SCHEMA_VERSION:
        raise FieldError(where, f'expected a header with "trace": {SCHEMA_VERSION}, got {header.get("trace")!r}')
    return header


def _read_step(decoder: msgspec.json.Decoder[StepTrace], where: str, line: bytes) -> StepTrace:
    try:
        return decoder.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise FieldError(where, f"not a step of a trace: {error}") from error


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


def export_perfetto(trace: Trace, path: Path | str) -> None:
    """Write the trace as Chrome trace events (JSON, times in µs) for https://ui.perfetto.dev."""
    events = [_name_event("process_name", _ENGINE, 0, "engine"), _name_event("process_name", _REQUESTS, 0, "requests")]
    events.append(_name_event("thread_name", _ENGINE, 1, "steps"))
    if any(step.forward_s is not None for step in trace.steps):
        events.append(_name_event("thread_name", _ENGINE, 2, "model"))
    ranks = sorted({each.rank for step in trace.steps for each in step.ranks})
    events += [_name_event("process_name", _RANKS, 0, "ranks")] * bool(ranks)
    events += [_name_event("thread_name", _RANKS, _RANKS + 1 + rank, f"rank {rank}") for rank in ranks]
    tracks: dict[str, int] = {}
    engine_free_s = 0.0
    for step, phases in zip(trace.steps, step_phases(trace.steps), strict=True):
        for name in [*phases, *step.preempted]:
            if name not in tracks:
                tracks[name] = _REQUESTS + 1 + len(tracks)  # Perfetto treats the group's own number differently
                events.append(_name_event("thread_name", _REQUESTS, tracks[name], f"request {name}"))
        # Slices on a track must not overlap. Those of an engine that runs ahead would, so they are cut.
        starts = [max(engine_free_s, start_s) for start_s in _slice_starts(step)]
        engine_free_s = starts[-1]
        events += _engine_events(step, starts)
        events += _rank_events(step)
        events += _request_events(step, phases, tracks, starts)
    Path(path).write_bytes(msgspec.json.encode({"traceEvents": events, "otherData": trace.header}))


def _slice_starts(step: StepTrace) -> list[float]:
    execute_start_s = step.start_s + step.schedule_s
    return [step.start_s, execute_start_s, execute_start_s + step.execute_s, step.end_s]


def _engine_events(step: StepTrace, starts: Sequence[float]) -> list[dict[str, Any]]:
    events = [
        _slice(name, _ENGINE, 1, start_s, end_s, {"step": step.step})
        for name, start_s, end_s in zip(("schedule", "execute", "update"), starts, starts[1:], strict=False)
    ]
    if step.forward_start_s is not None and step.forward_s is not None:
        end_s = step.forward_start_s + step.forward_s
        events.append(_slice("forward", _ENGINE, 2, step.forward_start_s, end_s, {"step": step.step}))
    counters = {"running": step.num_running, "waiting": step.num_waiting, "used blocks": step.num_blocks_used}
    for name, value in counters.items():
        events.append({"ph": "C", "name": name, "pid": _ENGINE, "ts": _us(starts[1]), "args": {name: value}})
    return events


def _rank_events(step: StepTrace) -> Iterator[dict[str, Any]]:
    """The step on each rank, and its collectives inside."""
    for each in step.ranks:
        track, end_s = _RANKS + 1 + each.rank, each.start_s + each.duration_s
        yield _slice("step", _RANKS, track, each.start_s, end_s, {"step": step.step})
        for call in each.collectives:
            details = {"bytes": call.num_bytes}
            yield _slice(call.name, _RANKS, track, call.start_s, call.start_s + call.duration_s, details)


def _request_events(
    step: StepTrace, phases: dict[str, Phase], tracks: dict[str, int], starts: Sequence[float]
) -> Iterator[dict[str, Any]]:
    """A slice over the execution for each request in the step, and a mark where one was preempted or ended."""
    _, execute_start_s, execute_end_s, end_s = starts
    for request in step.requests:
        tokens = "token" if request.num_scheduled == 1 else "tokens"
        name = f"{phases[request.id].name.lower()} {request.num_scheduled} {tokens}"
        details = {"step": step.step, **{key: getattr(request, key) for key in _DETAILS}}
        yield _slice(name, _REQUESTS, tracks[request.id], execute_start_s, execute_end_s, details)
    marks = {"preempted": (step.preempted, starts[0]), "aborted": (step.aborted, starts[0])}
    marks["finished"] = (step.finished, end_s)
    for name, (ids, at_s) in marks.items():
        for track in [tracks[request_id] for request_id in ids if request_id in tracks]:
            yield {"ph": "i", "s": "t", "name": name, "pid": _REQUESTS, "tid": track, "ts": _us(at_s)}


def _slice(name: str, group: int, track: int, start_s: float, end_s: float, details: dict[str, Any]) -> dict[str, Any]:
    start_us = _us(start_s)
    duration_us = round(_us(end_s) - start_us, 3)
    return {"ph": "X", "name": name, "pid": group, "tid": track, "ts": start_us, "dur": duration_us, "args": details}


def _name_event(kind: str, group: int, track: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": group, "tid": track, "args": {"name": name}}


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)
