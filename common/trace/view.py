"""Show a trace: a summary and a chart in the terminal, and the same chart as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from common.errors import FieldError
from common.plotting import COLORS, TEXT_COLOR, figure, save
from common.trace import Phase, StepTrace, Trace, step_phases

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKS = {  # how a phase looks in the terminal: character, style, what the legend says
    Phase.PREFILL: ("P", f"bold {COLORS[1]}", "prefill"),
    Phase.CHUNK: ("c", COLORS[4], "prefill chunk"),
    Phase.DECODE: ("-", COLORS[0], "decode"),
    Phase.PREEMPTED: (".", "dim", "preempted, waiting"),
    Phase.FINISHED: ("E", f"bold {COLORS[2]}", "finished"),
    Phase.ABORTED: ("x", "bold red", "aborted"),
}
_FILLS = {  # and in a picture
    Phase.PREFILL: (COLORS[1], "prefill"),
    Phase.CHUNK: (COLORS[4], "prefill chunk"),
    Phase.DECODE: (COLORS[0], "decode"),
    Phase.PREEMPTED: ("#D9D9D9", "preempted, waiting"),
}
_END_MARKERS = {Phase.FINISHED: ("|", "finished"), Phase.ABORTED: ("x", "aborted")}
_TICK_COLUMNS = 10
_MAX_NAME_WIDTH = 16
_MAX_PICTURE_ROWS = 60
_MAX_PICTURE_COLUMNS = 300  # with more, a single step would be thinner than two pixels
_MAX_SEPARATE_STEPS = 80  # with more, the lines between steps would hide the bars
_HALF_BAR = 0.38


@dataclass(slots=True)
class Row:
    """One request in a chart. phases: by position in the list of steps; end: where it finished or was aborted."""

    request_id: str
    phases: dict[int, Phase] = field(default_factory=dict)
    end: tuple[int, Phase] | None = None

    def positions(self) -> list[int]:
        return [*self.phases, *([] if self.end is None else [self.end[0]])]


def chart_rows(steps: Sequence[StepTrace]) -> list[Row]:
    """One row for each request that was ever scheduled, in order of first appearance."""
    rows: dict[str, Row] = {}
    preempted: set[str] = set()
    for index, (step, phases) in enumerate(zip(steps, step_phases(steps), strict=True)):
        preempted = (preempted | set(step.preempted)) - phases.keys() - set(step.aborted)
        for request_id, phase in [*phases.items(), *((name, Phase.PREEMPTED) for name in sorted(preempted))]:
            rows.setdefault(request_id, Row(request_id)).phases[index] = phase
        for ids, end in ((step.finished, Phase.FINISHED), (step.aborted, Phase.ABORTED)):
            for row in [rows[request_id] for request_id in ids if request_id in rows]:
                row.end = (index, end)
    return list(rows.values())


def visible_rows(rows: Sequence[Row], start: int, stop: int) -> list[Row]:
    """The rows with content at positions start to stop - 1, cut to these positions."""
    clipped = []
    for row in rows:
        phases = {index: phase for index, phase in row.phases.items() if start <= index < stop}
        end = row.end if row.end is not None and start <= row.end[0] < stop else None
        if (clipped_row := Row(row.request_id, phases, end)).positions():
            clipped.append(clipped_row)
    return clipped


def bucket(phases: Mapping[int, Phase], start: int, size: int) -> dict[int, Phase]:
    """The highest phase in each column; column 0 covers positions start to start + size - 1."""
    columns: dict[int, Phase] = {}
    for index, phase in phases.items():
        column = (index - start) // size
        columns[column] = max(phase, columns.get(column, phase))
    return columns


def summary(steps: Sequence[StepTrace]) -> list[tuple[str, str]]:
    """A summary of these steps (at least one) as pairs of name and text."""
    requests = [request for step in steps for request in step.requests]
    seconds = steps[-1].end_s - steps[0].start_s
    cached = sum(request.num_cached for request in requests)
    sampled = sum(request.num_sampled for request in requests)
    rate = f", {sampled / seconds:,.1f} tokens/s" if seconds > 0 else ""
    return [
        ("steps", f"{len(steps):,} ({steps[0].step} to {steps[-1].step}) in {seconds:,.3f} s"),
        ("tokens computed", f"{sum(r.num_scheduled for r in requests):,}" + (f", {cached:,} cached" if cached else "")),
        ("output tokens", f"{sampled:,}{rate}"),
        ("requests", f"{len({request.id for request in requests}):,} seen, {_events(steps)}"),
        ("running", _mean_and_max([step.num_running for step in steps])),
        ("waiting", _mean_and_max([step.num_waiting for step in steps])),
        ("KV blocks used", _block_usage(steps)),
        ("time in", _time_shares(steps, seconds)),
        ("gap between steps", _gaps(steps)),
    ]


def _events(steps: Sequence[StepTrace]) -> str:
    finished, aborted, preempted = (
        sum(len(getattr(step, name)) for step in steps) for name in ("finished", "aborted", "preempted")
    )
    return f"{finished:,} finished, {aborted:,} aborted, {preempted:,} preemptions"


def _mean_and_max(values: Sequence[int]) -> str:
    return f"mean {sum(values) / len(values):,.1f}, max {max(values):,}"


def _block_usage(steps: Sequence[StepTrace]) -> str:
    shares = [step.num_blocks_used / step.num_blocks_total for step in steps if step.num_blocks_total]
    if not shares:
        return "no blocks"
    return f"mean {sum(shares) / len(shares):.0%}, max {max(shares):.0%} of {steps[-1].num_blocks_total:,}"


def _time_shares(steps: Sequence[StepTrace], seconds: float) -> str:
    if seconds <= 0:
        return "no time passed"
    parts = {
        "schedule": sum(step.schedule_s for step in steps),
        "execute" if steps[0].forward_s is None else "model": sum(end - start for start, end in map(_busy, steps)),
        "update": sum(step.update_s for step in steps),
        "gaps": sum(_gap_list(steps)),
    }
    return ", ".join(f"{name} {part_s / seconds:.1%}" for name, part_s in parts.items())


def _busy(step: StepTrace) -> tuple[float, float]:
    """Start and end of the time in which a step kept the model busy; without the model's times, of its execution."""
    if step.forward_start_s is None or step.forward_s is None:
        return step.start_s + step.schedule_s, step.start_s + step.schedule_s + step.execute_s
    return step.forward_start_s, step.forward_start_s + step.forward_s


def _gaps(steps: Sequence[StepTrace]) -> str:
    gaps = _gap_list(steps)
    return f"mean {sum(gaps) / len(gaps) * 1e3:,.3f} ms, max {max(gaps) * 1e3:,.3f} ms" if gaps else "none"


def _gap_list(steps: Sequence[StepTrace]) -> list[float]:
    """Idle seconds while requests were unfinished: from a step's end to the next step's start.

    If the trace has the model's own times, the seconds in which the model was idle.
    """
    gaps = []
    for before, after in pairwise(steps):
        if before.num_waiting or not {request.id for request in before.requests} <= {*before.finished, *after.aborted}:
            end, start = (before.end_s, after.start_s)
            if before.forward_s is not None:
                end, start = _busy(before)[1], _busy(after)[0]
            gaps.append(max(0.0, start - end))
    return gaps


def chart(steps: Sequence[StepTrace], start: int, stop: int, width: int, max_rows: int) -> Iterator[Text]:
    """Lines of at most width characters that show the requests at positions start to stop - 1 of steps."""
    all_rows = visible_rows(chart_rows(steps), start, stop)
    rows = all_rows[:max_rows]
    stop = 1 + max((max(row.positions()) for row in rows), default=start)
    names = [_short_name(row.request_id) for row in rows]
    name_width = max(map(len, [*names, "request"]))
    size = math.ceil((stop - start) / max(1, width - name_width - 1))
    yield Text(f"{'request':{name_width}} step, {size} per column" if size > 1 else f"{'request':{name_width}} step")
    yield Text(" " * (name_width + 1) + _ticks(steps, start, stop, size)[: width - name_width - 1])
    for name, row in zip(names, rows, strict=True):
        yield Text(f"{name:{name_width}} ") + _cells(row, start, size)
    if hidden := all_rows[max_rows:]:
        first_step = steps[min(min(row.positions()) for row in hidden)].step
        yield Text(f"… and {len(hidden):,} more, from step {first_step} on")


def _short_name(request_id: str) -> str:
    """The id on one line; a long id is cut to its end, because ids often begin the same."""
    name = request_id if request_id.isprintable() else ascii(request_id)
    return name if len(name) <= _MAX_NAME_WIDTH else "…" + name[1 - _MAX_NAME_WIDTH :]


def _ticks(steps: Sequence[StepTrace], start: int, stop: int, size: int) -> str:
    """The step number above every tenth column."""
    positions = range(start, stop, size * _TICK_COLUMNS)
    return "".join(f"{steps[position].step:<{_TICK_COLUMNS}}" for position in positions).rstrip()


def _cells(row: Row, start: int, size: int) -> Text:
    marks = dict(row.phases)
    if row.end is not None:
        marks[row.end[0]] = row.end[1]
    columns = bucket(marks, start, size)
    text = Text()
    for column in range(max(columns) + 1):
        mark, style, _ = _MARKS[columns[column]] if column in columns else (" ", "", "")
        text.append(mark, style)
    return text


def print_view(trace: Trace, console: Console, *, first: int | None, last: int | None, max_rows: int) -> None:
    """Print a summary of the steps numbered first to last (None: from the first, to the last), and unless max_rows is
    0, a chart with a legend.

    Raises FieldError if the trace has no such step.
    """
    start, stop = _positions(trace.steps, first, last)
    header = ", ".join(f"{name} {value}" for name, value in trace.header.items() if name != "trace")
    console.print(Text(header, style="bold"))
    for name, value in summary(trace.steps[start:stop]):
        console.print(Text(f"{name:18} {value}"))
    if max_rows:
        console.print()
        for line in chart(trace.steps, start, stop, console.width, max_rows):
            console.print(line, no_wrap=True, crop=True)
        console.print()
        _print_legend(console)
    if trace.note:
        console.print(Text(f"note: {trace.note}"))


def _print_legend(console: Console) -> None:
    entries = [Text.assemble((mark, style), f" {meaning}") for mark, style, meaning in _MARKS.values()]
    entries.append(Text("blank: not in this step"))
    for some in (entries[:4], entries[4:]):
        console.print(Text("   ").join(some))


def _positions(steps: Sequence[StepTrace], first: int | None, last: int | None) -> tuple[int, int]:
    if not steps:
        raise FieldError("trace", "no steps yet")
    inside = [
        position
        for position, step in enumerate(steps)
        if (first is None or first <= step.step) and (last is None or step.step <= last)
    ]
    if not inside:
        wanted = f"{'the first' if first is None else first} to {'the last' if last is None else last}"
        raise FieldError("trace", f"no step from {wanted}; its steps are {steps[0].step} to {steps[-1].step}")
    return inside[0], inside[-1] + 1


def draw(trace: Trace, path: Path, *, title: str = "Requests in each step", last_step: int | None = None) -> None:
    """Draw the chart as a PNG: one row for each of the first 60 requests.

    last_step: where the axis ends, so that several charts can share it (None: with the trace).
    Raises ValueError for a trace without requests, and as plotting.save() does.
    """
    all_rows = chart_rows(trace.steps)
    rows = all_rows[:_MAX_PICTURE_ROWS]
    if not rows:
        raise ValueError("this trace has no requests to draw")
    hidden = len(all_rows) - len(rows)
    xlabel = f"step (the first {len(rows)} requests; {hidden:,} more are not shown)" if hidden else "step"
    fig, axes = figure(title, xlabel, "request", height_px=200 + max(14 * len(rows), 120))
    num_steps = 1 + max(max(row.positions()) for row in rows)
    size = math.ceil(num_steps / _MAX_PICTURE_COLUMNS)
    for y, row in enumerate(rows):
        _draw_row(axes, y, row, trace.steps[0].step, size)
        if num_steps <= _MAX_SEPARATE_STEPS:
            _separate_steps(axes, y, row, trace.steps[0].step)
    _label_rows(axes, rows)
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.005)
    if last_step is not None:
        axes.set_xlim(right=last_step + 1)
    _draw_legend(fig, rows)
    save(fig, path)


def _draw_row(axes: Axes, y: int, row: Row, first_step: int, size: int) -> None:
    columns = sorted(bucket(row.phases, 0, size).items())
    # Runs of columns side by side with the same phase become one bar.
    for (_, phase), run in groupby(enumerate(columns), key=lambda item: (item[1][0] - item[0], item[1][1])):
        run_columns = [column for _, (column, _) in run]
        extent = (first_step + run_columns[0] * size, len(run_columns) * size)
        axes.broken_barh([extent], (y - _HALF_BAR, 2 * _HALF_BAR), color=_FILLS[phase][0], linewidth=0)
    if row.end is not None:
        position, end = row.end
        column = position // size + (end is Phase.FINISHED)  # a finished request's last column is over
        x = first_step + column * size
        axes.plot([x], [y], _END_MARKERS[end][0], color=TEXT_COLOR, markersize=7, mew=1.8, clip_on=False)


def _separate_steps(axes: Axes, y: int, row: Row, first_step: int) -> None:
    borders = [first_step + position for position in row.phases if position - 1 in row.phases]
    axes.vlines(borders, y - _HALF_BAR, y + _HALF_BAR, color="white", linewidth=0.8)


def _label_rows(axes: Axes, rows: Sequence[Row]) -> None:
    every = math.ceil(len(rows) / 30)
    ys = range(0, len(rows), every)
    axes.set_yticks(ys, [_short_name(rows[y].request_id) for y in ys], fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)


def _draw_legend(fig: Figure, rows: Sequence[Row]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    seen = {phase for row in rows for phase in row.phases.values()}
    ends = {row.end[1] for row in rows if row.end is not None}
    handles: list[Patch | Line2D] = [
        Patch(color=color, label=label, linewidth=0) for phase, (color, label) in _FILLS.items() if phase in seen
    ]
    for end, (marker, label) in _END_MARKERS.items():
        if end in ends:
            handles.append(Line2D([], [], color=TEXT_COLOR, marker=marker, linestyle="", label=label, mew=1.8))
    fig.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=10)
