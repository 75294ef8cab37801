"""common/trace/view.py and __main__.py: the summary's numbers, the chart's cells, the picture and the command line."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from common.errors import FieldError
from common.plotting import COLORS
from common.trace import Phase, StepTrace, Trace
from common.trace.__main__ import main
from common.trace.view import bucket, chart, chart_rows, draw, print_view, summary
from tests.common.test_trace import request, step, write

# a: prefill, decode, end. b: two chunks, preempted for two steps, recomputed, aborted. c: skips a step. d: never ran.
STEPS = [
    step(0, request("a", 0, 5), request("b", 0, 8, sampled=0)),
    step(1, request("a", 5, 1), request("b", 8, 3)),
    step(2, request("a", 6, 1), request("c", 0, 3), preempted=["b"], num_waiting=1),
    step(3, request("a", 7, 1), num_waiting=1, finished=["a"]),
    step(4, request("b", 0, 12), request("c", 3, 1)),
    step(5, request("b", 12, 1), request("c", 4, 1)),
    step(6, request("c", 5, 1), finished=["c"], aborted=["b", "d"]),
]
HEADER = {"trace": 1, "part": "part04_continuous_batching", "model": "tiny"}
MANY = [step(i, *(request(f"request-{j}", i - j, 1) for j in range(max(0, i - 99), i + 1))) for i in range(1000)]


def view(
    steps: list[StepTrace], width: int = 80, first: int | None = None, last: int | None = None, max_rows: int = 40
) -> list[str]:
    output = io.StringIO()
    console = Console(file=output, width=width, highlight=False)
    print_view(Trace(HEADER, steps), console, first=first, last=last, max_rows=max_rows)
    return output.getvalue().splitlines()


def chart_lines(steps: list[StepTrace], width: int = 80, max_rows: int = 40) -> list[str]:
    return [line.plain for line in chart(steps, 0, len(steps), width, max_rows)]


def test_view_of_a_small_trace() -> None:
    assert view(STEPS) == [
        "part part04_continuous_batching, model tiny",
        "steps              7 (0 to 6) in 0.069 s",
        "tokens computed    38",
        "output tokens      11, 159.4 tokens/s",
        "requests           3 seen, 2 finished, 2 aborted, 1 preemptions",
        "running            mean 1.7, max 2",
        "waiting            mean 0.3, max 1",
        "KV blocks used     mean 21%, max 25% of 8",
        "time in            schedule 10.1%, execute 60.9%, update 20.3%, gaps 8.7%",
        "gap between steps  mean 1.000 ms, max 1.000 ms",
        "",
        "request step",
        "        0",
        "a       P--E",
        "b       cP..P-x",
        "c         P --E",
        "",
        "P prefill   c prefill chunk   - decode   . preempted, waiting",
        "E finished   x aborted   blank: not in this step",
    ]


def test_a_range_of_steps_takes_earlier_steps_into_account() -> None:
    lines = view(STEPS, first=3, last=5)
    assert lines[1] == "steps              3 (3 to 5) in 0.029 s"
    chart_start = lines.index("request step")
    assert lines[chart_start : chart_start + 5] == [
        "request step",
        "        3",
        "a       E",
        "b       .P-",
        "c        --",
    ]


def test_a_trace_without_such_steps_is_refused() -> None:
    with pytest.raises(FieldError, match="trace: no steps yet"):
        view([])
    with pytest.raises(FieldError, match="no step from 7 to the last; its steps are 0 to 6"):
        view(STEPS, first=7)


def test_the_note_about_an_incomplete_line_is_shown() -> None:
    output = io.StringIO()
    print_view(Trace(HEADER, STEPS, "cut"), Console(file=output), first=None, last=None, max_rows=9)
    assert output.getvalue().endswith("note: cut\n")


def test_summary_without_blocks_gaps_or_time() -> None:
    still = step(0, request("a", 0, 5, cached=3), schedule_s=0.0, execute_s=0.0, update_s=0.0)
    rows = dict(summary([step(0, num_blocks_total=0, num_blocks_free=0)]))
    assert rows["KV blocks used"] == "no blocks" and rows["gap between steps"] == "none"
    rows = dict(summary([still]))
    assert rows["time in"] == "no time passed" and rows["output tokens"] == "1"
    assert rows["tokens computed"] == "5, 3 cached"


def test_an_engine_that_runs_ahead_has_no_gap() -> None:
    starts = (0.0, 0.001, 0.020)
    steps = [step(i, request("a", i, 1), start_s=start_s) for i, start_s in enumerate(starts)]
    assert dict(summary(steps))["gap between steps"] == "mean 5.000 ms, max 10.000 ms"


def test_time_without_requests_is_not_a_gap() -> None:
    """a ends, and b comes five seconds later; then c waits while b is aborted."""
    steps = [
        step(0, request("a", 0, 3), finished=["a"]),
        step(1, request("b", 0, 3), start_s=5.0, num_waiting=1),
        step(2, request("c", 0, 3), start_s=5.1, aborted=["b"]),
        step(3, request("d", 0, 3), start_s=9.0, aborted=["c"]),
    ]
    length_s = steps[1].end_s - steps[1].start_s
    assert (
        dict(summary(steps))["gap between steps"]
        == f"mean {100 - 1e3 * length_s:.3f} ms, max {100 - 1e3 * length_s:.3f} ms"
    )


def test_gaps_use_the_models_times_if_known() -> None:
    """Two steps under way at once: their executions overlap, the model's times do not."""
    steps = [
        step(i, request("a", i, 1), start_s=0.01 * i, execute_s=0.02, forward_start_s=0.01 * i + 0.002, forward_s=0.007)
        for i in range(4)
    ]
    rows = dict(summary(steps))
    assert rows["gap between steps"] == "mean 3.000 ms, max 3.000 ms"
    seconds = steps[-1].end_s - steps[0].start_s
    assert f"model {4 * 0.007 / seconds:.1%}" in rows["time in"] and "execute" not in rows["time in"], rows["time in"]


def test_a_bucket_shows_its_highest_phase() -> None:
    phases = {3: Phase.PREFILL, 4: Phase.DECODE, 5: Phase.DECODE, 6: Phase.DECODE, 7: Phase.PREEMPTED, 11: Phase.DECODE}
    expected = {0: Phase.PREFILL, 1: Phase.DECODE, 2: Phase.PREEMPTED, 4: Phase.DECODE}
    assert bucket(phases, start=3, size=2) == expected
    assert bucket({0: Phase.DECODE, 1: Phase.FINISHED}, start=0, size=2) == {0: Phase.FINISHED}


def test_more_steps_than_columns_share_columns() -> None:
    steps = [step(i, request("a", 5 * (i > 0) + i, 5 if i == 0 else 1)) for i in range(64)]
    steps[-1] = step(63, request("a", 70, 1), finished=["a"])
    assert chart_lines(steps, width=40) == [
        "request step, 2 per column",
        "        0         20        40        60",
        "a       P" + 30 * "-" + "E",
    ]


def test_a_trace_of_many_requests_and_steps_fits() -> None:
    lines = chart_lines(MANY, width=60, max_rows=5)
    assert len(lines) == 2 + 5 + 1
    assert max(map(len, lines)) <= 60, "a line is longer than the width"
    assert lines[0] == "request   step, 3 per column", "columns past the last step of the rows shown would be blank"
    assert lines[2] == "request-0 P" + 33 * "-"
    assert lines[-1] == "… and 995 more, from step 5 on"
    assert max(map(len, view(MANY, width=80))) <= 80


def test_long_and_odd_request_ids_take_one_short_cell() -> None:
    ids = ["cmpl-0123456789abcdef-1", "two\nlines", "[red]x"]
    assert chart_lines([step(0, *(request(name, 0, 5) for name in ids))])[2:] == [
        "…3456789abcdef-1 P",
        "'two\\nlines'     P",
        "[red]x           P",
    ]


def test_rows_are_in_order_of_first_appearance() -> None:
    assert [row.request_id for row in chart_rows(STEPS)] == ["a", "b", "c"]


def colors(path: Path) -> set[str]:
    with Image.open(path) as image:
        counted = image.convert("RGB").getcolors(image.width * image.height)
    assert counted is not None
    return {"#{:02X}{:02X}{:02X}".format(*color) for count, color in counted if count > 500}  # type: ignore[misc]


def test_draw_a_small_trace(tmp_path: Path) -> None:
    draw(Trace(HEADER, STEPS), tmp_path / "small.png")
    prefill, decode, chunk, preempted = COLORS[1], COLORS[0], COLORS[4], "#D9D9D9"
    missing = {prefill, decode, chunk, preempted} - colors(tmp_path / "small.png")
    assert not missing, f"colors {missing} are not in the picture"


def test_draw_a_large_trace(tmp_path: Path) -> None:
    draw(Trace(HEADER, MANY), tmp_path / "large.png", title="Many")
    assert {COLORS[0], COLORS[1]} <= colors(tmp_path / "large.png"), "prefills of one step in 1,000 must stay visible"
    with Image.open(tmp_path / "large.png") as image:
        assert image.height < 2000, f"60 rows at most, but the picture is {image.height} pixels high"


def test_draw_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no requests to draw"):
        draw(Trace(HEADER, [step(0)]), tmp_path / "nothing.png")


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "common.trace", *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_line_views_and_exports(tmp_path: Path) -> None:
    path = write(tmp_path / "trace.jsonl", STEPS)
    viewed = run("view", str(path), "--from", "1", "--to", "4", "--width", "60", "--chart", "--rows", "1")
    assert viewed.returncode == 0 and viewed.stderr == ""
    assert "\na       --E\n… and 2 more, from step 1 on\n" in viewed.stdout
    summary = run("view", str(path)).stdout
    assert "\nrequests " in summary and "request step" not in summary, f"no chart without --chart: {summary}"
    done = run("export", str(path), str(tmp_path / "out.json"))
    assert done.stdout == f"{tmp_path / 'out.json'}: open it in https://ui.perfetto.dev\n"
    assert json.loads((tmp_path / "out.json").read_text())["traceEvents"]
    before = path.read_bytes()
    onto_itself = run("export", str(path), str(path))
    assert onto_itself.returncode == 2 and "expected another file than the trace" in onto_itself.stderr
    assert path.read_bytes() == before
    path.write_bytes(before[:-5])
    assert "note: " in run("export", str(path), str(tmp_path / "out.json")).stdout, "the last line is incomplete"


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        ("view missing", "No such file or directory: 'missing'"),
        ("view {bad}", "{bad}:2: not a step of a trace"),
        ("view {good} --from 99", "no step from 99 to the last"),
        ("view {good} --width 10", "--width: expected at least 40, got 10"),
        ("view {good} --rows 0", "--rows: expected at least 1, got 0"),
        ("view {good} --to last", "invalid int value: 'last'"),
        ("export {good} {good}/out.json", "Not a directory"),
        ("export {good}", "required: OUT.json"),
        ("show {good}", "invalid choice: 'show'"),
        ("", "required: command"),
    ],
)
def test_a_mistake_prints_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: str, problem: str) -> None:
    good = write(tmp_path / "good", STEPS)
    bad = tmp_path / "bad"
    bad.write_text('{"trace": 1}\n{"step": 1}\n')
    with pytest.raises(SystemExit) as caught:
        main(argv.format(good=good, bad=bad).split())
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.startswith("python -m common.trace") and error.count("\n") == 1, f"expected one line, got {error!r}"
    assert problem.format(good=good, bad=bad) in error
