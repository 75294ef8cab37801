"""A trace as Chrome trace events, for https://ui.perfetto.dev."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from common.trace.phases import Phase, step_phases
from common.trace.schema import StepTrace, Trace

# The groups of tracks in an export, "processes" in the format's terms.
_ENGINE, _REQUESTS, _RANKS, _TRANSFERS = 1, 2, 3, 4
_KINDS = {"save": "saves", "load": "loads", "read": "reads", "fetch": "fetches"}  # of transfers, a track for each
_DETAILS = ("num_computed", "num_cached", "num_blocks", "num_sampled")  # of a request's slice


def export_perfetto(trace: Trace, path: Path | str) -> None:
    """Write the trace as Chrome trace events (JSON, times in µs) for https://ui.perfetto.dev."""
    events = [_name_event("process_name", _ENGINE, 0, "engine"), _name_event("process_name", _REQUESTS, 0, "requests")]
    events.append(_name_event("thread_name", _ENGINE, 1, "steps"))
    if any(step.forward_s is not None for step in trace.steps):
        events.append(_name_event("thread_name", _ENGINE, 2, "model"))
    ranks = sorted({each.rank for step in trace.steps for each in step.ranks})
    events += [_name_event("process_name", _RANKS, 0, "ranks")] * bool(ranks)
    events += [_name_event("thread_name", _RANKS, _RANKS + 1 + rank, f"rank {rank}") for rank in ranks]
    kinds = [kind for kind in _KINDS if any(each.kind == kind for step in trace.steps for each in step.transfers)]
    events += [_name_event("process_name", _TRANSFERS, 0, "transfers")] * bool(kinds)
    events += [_name_event("thread_name", _TRANSFERS, _transfer_track(kind), _KINDS[kind]) for kind in kinds]
    transfers_free_s = dict.fromkeys(kinds, 0.0)
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
        events += _transfer_events(step, transfers_free_s)
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


def _transfer_track(kind: str) -> int:
    return _TRANSFERS + 1 + list(_KINDS).index(kind)


def _transfer_events(step: StepTrace, free_s: dict[str, float]) -> Iterator[dict[str, Any]]:
    """KV that was copied. Slices that would overlap are cut, see above. free_s: of each kind, when the last one ended;
    changed here."""
    for each in step.transfers:
        end_s = each.start_s + each.duration_s
        start_s, free_s[each.kind] = max(each.start_s, min(end_s, free_s[each.kind])), max(end_s, free_s[each.kind])
        name = f"{each.kind} {each.num_tokens} tokens"
        details = {"bytes": each.num_bytes, "request": each.id}
        yield _slice(name, _TRANSFERS, _transfer_track(each.kind), start_s, end_s, details)


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
