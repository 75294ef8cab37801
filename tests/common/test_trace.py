"""common/trace: a trace is read back, a broken file is refused by line, a full disk does not stop the engine."""

from __future__ import annotations

import errno
import io
import json
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest

from common.errors import FieldError
from common.trace import (
    CollectiveTrace,
    Phase,
    RankTrace,
    RequestTrace,
    StepTrace,
    Trace,
    TraceWriter,
    TransferTrace,
    export_perfetto,
    files,
    read_trace,
    step_phases,
)


def request(id: str, computed: int, scheduled: int, sampled: int = 1, cached: int = 0) -> RequestTrace:
    return RequestTrace(
        id=id, num_computed=computed, num_scheduled=scheduled, num_cached=cached, num_blocks=1, num_sampled=sampled
    )


def step(number: int, *requests: RequestTrace, **changes: Any) -> StepTrace:
    plain = StepTrace(
        step=number,
        start_s=number * 0.010,
        schedule_s=0.001,
        execute_s=0.006,
        update_s=0.002,
        num_running=len(requests),
        num_waiting=0,
        requests=list(requests),
        num_blocks_total=8,
        num_blocks_free=8 - len(requests),
    )
    return msgspec.structs.replace(plain, **changes)


STEPS = [
    step(0, request("a", 0, 5), request("b", 0, 8, sampled=0, cached=16)),
    step(1, request("a", 5, 1), request("b", 8, 3), preempted=["c"], num_waiting=2),
    step(2, request("b", 11, 1), finished=["b"], aborted=["a"]),
]


def write(path: Path, steps: list[StepTrace]) -> Path:
    with TraceWriter(path, part="part04_continuous_batching", model="tiny") as writer:
        for each in steps:
            writer.write(each)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "trace.jsonl", STEPS)


def refusal(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        read_trace(path)
    return str(caught.value)


def test_what_is_written_is_read_back(path: Path) -> None:
    assert read_trace(path).steps == STEPS
    assert read_trace(path).note is None


def test_the_header_and_the_lines(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) == 1 + len(STEPS), f"expected a header and a line for each step, got {len(lines)} lines"
    header = json.loads(lines[0])
    assert header == read_trace(path).header
    assert list(header) == ["trace", "part", "model", "date", "began_s"]
    assert (header["trace"], header["part"], header["model"]) == (1, "part04_continuous_batching", "tiny")
    assert json.loads(lines[2]) == msgspec.to_builtins(STEPS[1])


def test_unknown_fields_and_missing_optional_ones_are_accepted(path: Path) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["engine"] = {"of": "a later part"}
    lines[1]["num_draft_tokens"] = lines[1]["requests"][0]["priority"] = 7
    for name in ("requests", "preempted", "aborted", "finished"):
        lines[2].pop(name, None)  # a default is not written
    for name in ("num_cached", "num_sampled"):
        lines[3]["requests"][0].pop(name, None)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    read = read_trace(path)

    assert read.header["engine"] == {"of": "a later part"}
    bare = msgspec.structs.replace(STEPS[1], requests=[], preempted=[], aborted=[], finished=[])
    assert read.steps == [STEPS[0], bare, STEPS[2]]


@pytest.mark.parametrize("kept", [1, 40, -1])
def test_an_incomplete_last_line_is_skipped_with_a_note(path: Path, kept: int) -> None:
    *whole, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole) + last[:kept])
    read = read_trace(path)
    assert read.steps == STEPS[:-1]
    assert read.note == f"{path}:4: the line is incomplete and was skipped"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"", "not a step of a trace: Input data was truncated"),
        (b'{"step": 1', "not a step of a trace: Input data was truncated"),
        (b'{"step": 1}', "not a step of a trace: Object missing required field `start_s`"),
        (b'{"step": "one"}', "not a step of a trace: Expected `int`, got `str` - at `$.step`"),
        (b"[1]", "not a step of a trace: Expected `object`, got `array`"),
        (b'{"step": 1, "finished": ["\xff"]}', "not a step of a trace: "),
    ],
)
def test_a_malformed_line_is_refused_by_its_number(path: Path, line: bytes, problem: str) -> None:
    lines = path.read_bytes().splitlines()
    lines[2] = line
    path.write_bytes(b"\n".join(lines) + b"\n")
    assert refusal(path).startswith(f"{path}:3: {problem}")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "no header line, this is not a trace file"),
        (b'{"trace": 1', "no header line, this is not a trace file"),
        (b'{"trace": 2}\n', 'expected a header with "trace": 1, got 2'),
        (b'{"step": 0}\n', 'expected a header with "trace": 1, got None'),
        (b"hello\n", "not the header of a trace: "),
        (b"\xff\xfe\n", "not the header of a trace: "),
    ],
)
def test_another_file_is_not_a_trace(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "other").write_bytes(content)
    assert refusal(tmp_path / "other").startswith(f"{tmp_path / 'other'}:1: {problem}")


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(FieldError, match="trace: cannot write '.*': Is a directory") as caught:
        TraceWriter(tmp_path, part="part04", model="tiny")
    assert caught.value.field == "trace"


def test_closed_twice_and_written_to_afterwards(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "trace.jsonl", part="part04", model="tiny")
    writer.write(STEPS[0])
    writer.close()
    writer.close()
    writer.write(STEPS[1])
    writer.close()
    assert read_trace(tmp_path / "trace.jsonl").steps == STEPS[:1]


def test_steps_reach_the_file_while_the_engine_is_idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "FLUSH_INTERVAL_S", 0.01)
    path = tmp_path / "trace.jsonl"
    with TraceWriter(path, part="part04", model="tiny") as writer:
        assert read_trace(path).steps == [], "the header must be there at once"
        writer.write(STEPS[0])
        for _ in range(3000):
            if read_trace(path).steps:
                break
            time.sleep(0.01)
        assert read_trace(path).steps == STEPS[:1], "no close() and no further write(), so the step never arrived"


def test_threads_write_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "FLUSH_INTERVAL_S", 0.0001)
    path = tmp_path / "trace.jsonl"

    def run(first: int) -> None:
        for number in range(first, first + 500):
            writer.write(step(number, *(request(f"request-{i}", number, 1) for i in range(8))))

    with TraceWriter(path, part="part04", model="tiny") as writer:
        threads = [threading.Thread(target=run, args=(first,)) for first in (0, 1000, 2000)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    numbers = [each.step for each in read_trace(path).steps]
    assert sorted(numbers) == [first + i for first in (0, 1000, 2000) for i in range(500)], "steps were lost or doubled"
    for first in (0, 1000, 2000):
        own = [number for number in numbers if first <= number < first + 1000]
        assert own == sorted(own), "one thread's steps must keep their order"


class FullDisk(io.BytesIO):
    """A disk that is full after the header."""

    def write(self, data: Any) -> int:
        if self.tell() > 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


def test_a_full_disk_ends_the_trace_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    open_path = Path.open

    def open_full(path: Path, *args: Any, **kwargs: Any) -> Any:
        return FullDisk() if path.name == "trace.jsonl" else open_path(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_full)
    monkeypatch.setattr(files, "FLUSH_INTERVAL_S", 0.001)
    with TraceWriter("trace.jsonl", part="part04", model="tiny") as writer:
        for _ in range(3000):
            writer.write(STEPS[0])
            time.sleep(0.001)
            if not writer._is_open:
                break
        num_steps = len(writer._steps)
        writer.write(STEPS[1])
        assert not writer._is_open and len(writer._steps) == num_steps, "a disabled writer must not collect steps"
    warning = "warning: trace trace.jsonl: No space left on device; tracing stops, the engine continues\n"
    assert capsys.readouterr().err == warning


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is a device of Linux")
def test_a_disk_that_is_full_from_the_start(capsys: pytest.CaptureFixture[str]) -> None:
    with TraceWriter("/dev/full", part="part04", model="tiny") as writer:
        writer.write(STEPS[0])
    assert capsys.readouterr().err.count("No space left on device") == 1


def test_elapsed_s_grows_from_zero(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "trace.jsonl", part="part04", model="tiny") as writer:
        assert 0 <= writer.elapsed_s() <= writer.elapsed_s()


@pytest.mark.parametrize(
    ("what", "requests", "expected"),
    [
        ("a whole prompt", [(0, 5, 1), (5, 1, 1), (6, 1, 1)], "PDD"),
        ("a prompt of one token", [(0, 1, 1), (1, 1, 1)], "PD"),
        ("chunks", [(0, 4, 0), (4, 4, 0), (8, 1, 1), (9, 1, 1)], "CCPD"),
        ("a prefix from a cache", [(16, 4, 1), (20, 1, 1)], "PD"),
        ("recomputed after a preemption", [(0, 5, 1), (5, 1, 1), (0, 7, 1), (7, 1, 1)], "PDPD"),
        ("recomputed in chunks", [(0, 5, 1), (5, 1, 1), (0, 4, 0), (4, 3, 1), (7, 1, 1)], "PDCPD"),
        ("recomputed, with a cached prefix", [(0, 20, 1), (20, 1, 1), (16, 6, 1), (22, 1, 1)], "PDPD"),
        ("moved back from host memory", [(0, 5, 1), (5, 1, 1), (6, 1, 1)], "PDD"),
        ("rejected draft tokens", [(0, 5, 1), (5, 4, 1), (6, 4, 3), (9, 4, 1)], "PDDD"),
        ("a stop token that is not emitted", [(0, 5, 1), (5, 1, 0)], "PD"),
    ],
)
def test_phases(what: str, requests: list[tuple[int, int, int]], expected: str) -> None:
    steps = [step(i, request("a", *numbers)) for i, numbers in enumerate(requests)]
    letters = {Phase.PREFILL: "P", Phase.CHUNK: "C", Phase.DECODE: "D"}
    got = "".join(letters[phases["a"]] for phases in step_phases(steps))
    assert got == expected, f"{what}: expected {expected}, got {got}"


def exported(tmp_path: Path, steps: list[StepTrace]) -> list[dict[str, Any]]:
    export_perfetto(Trace({"trace": 1, "model": "tiny"}, steps), tmp_path / "out.json")
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["otherData"] == {"trace": 1, "model": "tiny"}
    return content["traceEvents"]


def slices(events: list[dict[str, Any]], track_name: str) -> list[tuple[str, float, float]]:
    """(name, start, end) in µs of one track's slices."""
    names = {e["args"]["name"]: (e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    own = [event for event in events if event["ph"] == "X" and (event["pid"], event["tid"]) == names[track_name]]
    return [(event["name"], event["ts"], round(event["ts"] + event["dur"], 3)) for event in own]


def test_export_has_the_engines_and_the_requests_slices(tmp_path: Path) -> None:
    events = exported(tmp_path, STEPS)
    assert slices(events, "steps")[:4] == [
        ("schedule", 0, 1000),
        ("execute", 1000, 7000),
        ("update", 7000, 9000),
        ("schedule", 10_000, 11_000),
    ]
    assert slices(events, "request b") == [
        ("chunk 8 tokens", 1000, 7000),
        ("prefill 3 tokens", 11_000, 17_000),
        ("decode 1 token", 21_000, 27_000),
    ]
    details = next(event["args"] for event in events if event["name"] == "chunk 8 tokens")
    assert details == {"step": 0, "num_computed": 0, "num_cached": 16, "num_blocks": 1, "num_sampled": 0}


def test_export_counts_and_marks(tmp_path: Path) -> None:
    events = exported(tmp_path, STEPS)
    counters = [(e["name"], e["ts"], e["args"][e["name"]]) for e in events if e["ph"] == "C"]
    assert counters[:3] == [("running", 1000, 2), ("waiting", 1000, 0), ("used blocks", 1000, 2)]
    assert counters[4] == ("waiting", 11_000, 2)
    marks = [(event["name"], event["ts"]) for event in events if event["ph"] == "i"]
    assert marks == [("preempted", 10_000), ("aborted", 20_000), ("finished", 29_000)]


@pytest.mark.parametrize("step_s", [0.010, 0.009, 0.004, 0.0001])
def test_exported_slices_never_overlap_on_a_track(tmp_path: Path, step_s: float) -> None:
    """Not even when the engine schedules a step while the previous one is running."""
    steps = [step(i, request("a", i, 1), request("b", i, 1), start_s=i * step_s) for i in range(20)]
    events = exported(tmp_path, steps)
    for track in ("steps", "request a", "request b"):
        own = slices(events, track)
        assert len(own) == (60 if track == "steps" else 20)
        for (name, start, end), (_, next_start, _) in pairwise(own):
            assert start <= end <= next_start, f"{track}: {name} ends at {end}, the next slice begins at {next_start}"


def test_exported_transfers(tmp_path: Path) -> None:
    """A track for each kind; those of several requests that overlap are cut."""

    def transfer(kind: Any, name: str | None, start_s: float, duration_s: float) -> TransferTrace:
        return TransferTrace(kind=kind, id=name, num_tokens=32, num_bytes=4_096, start_s=start_s, duration_s=duration_s)

    first, second = step(0, request("a", 0, 5)), step(1, request("b", 0, 5))
    first.transfers = [transfer("fetch", "a", 0.001, 0.004), transfer("fetch", "b", 0.003, 0.003)]
    second.transfers = [transfer("save", None, 0.004, 0.001), transfer("fetch", "c", 0.004, 0.001)]
    events = exported(tmp_path, [first, second])
    assert slices(events, "saves") == [("save 32 tokens", 4000, 5000)]
    assert slices(events, "fetches") == [
        ("fetch 32 tokens", 1000, 5000), ("fetch 32 tokens", 5000, 6000), ("fetch 32 tokens", 5000, 5000)
    ]  # fmt: skip
    assert {event["args"]["name"] for event in events if event["name"] == "thread_name"} == {
        "steps", "request a", "request b", "saves", "fetches"
    }  # fmt: skip
    details = next(event["args"] for event in events if event["name"] == "fetch 32 tokens")
    assert details == {"bytes": 4_096, "request": "a"}


OVERLAPPING = [  # as an engine writes them that schedules ahead: step 1 is launched while step 0 runs
    step(0, request("a", 0, 5), execute_s=0.014, forward_start_s=0.002, forward_s=0.012),
    step(1, request("a", 5, 1), execute_s=0.020, forward_start_s=0.0145, forward_s=0.010, discarded=["a"]),
    step(2, request("b", 0, 1)),
]


def test_model_times_are_read_back(tmp_path: Path) -> None:
    read = read_trace(write(tmp_path / "trace.jsonl", OVERLAPPING)).steps
    assert read == OVERLAPPING
    got = [(each.forward_start_s, each.forward_s, each.discarded) for each in read]
    assert got == [(0.002, 0.012, []), (0.0145, 0.010, ["a"]), (None, None, [])], f"got {got}"


def test_steps_of_an_older_trace_have_no_model_times(path: Path) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines[1:]:
        for name in ("forward_start_s", "forward_s", "discarded"):
            line.pop(name, None)  # a default is not written
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_trace(path).steps == STEPS


RANKS = [
    RankTrace(
        rank=rank, start_s=0.002, duration_s=0.004,
        collectives=[CollectiveTrace(name="all_reduce", num_bytes=512, start_s=0.003, duration_s=0.001 + 0.001 * rank)],
    )
    for rank in range(2)
]  # fmt: skip


def test_ranks_are_read_back(tmp_path: Path) -> None:
    steps = [step(0, request("a", 0, 5), ranks=RANKS), step(1, request("a", 5, 1))]
    read = read_trace(write(tmp_path / "trace.jsonl", steps)).steps
    assert [each.ranks for each in read] == [RANKS, []], f"got {[each.ranks for each in read]}"


def test_export_has_a_track_for_each_rank(tmp_path: Path) -> None:
    """With the collectives inside of its steps."""
    events = exported(tmp_path, [step(0, request("a", 0, 5), ranks=RANKS)])
    assert slices(events, "rank 0") == [("step", 2000, 6000), ("all_reduce", 3000, 4000)]
    assert slices(events, "rank 1") == [("step", 2000, 6000), ("all_reduce", 3000, 5000)]
    sizes = [event["args"] for event in events if event["name"] == "all_reduce"]
    assert sizes == [{"bytes": 512}] * 2
    names = [event["args"]["name"] for event in exported(tmp_path, STEPS) if event["name"] == "thread_name"]
    assert not [name for name in names if "rank" in name], f"one process has no ranks to show: {names}"


def test_export_has_the_model_on_a_track_of_its_own(tmp_path: Path) -> None:
    events = exported(tmp_path, OVERLAPPING)
    expected = [("forward", 2_000, 14_000), ("forward", 14_500, 24_500)]
    got = slices(events, "model")
    assert got == expected, f"the two steps that say when the model was at them: expected {expected}, got {got}"
    steps = [event["args"]["step"] for event in events if event["name"] == "forward"]
    assert steps == [0, 1], f"each slice names its step, got {steps}"
    assert {event["pid"] for event in events if event["name"] == "forward"} == {1}, "the model's track is the engine's"
    for (name, start, end), (_, next_start, _) in pairwise(slices(events, "steps")):
        assert start <= end <= next_start, f"steps: {name} ends at {end}, the next slice begins at {next_start}"


def test_an_export_without_the_model_s_times_has_no_track_for_it(tmp_path: Path) -> None:
    names = [event["args"]["name"] for event in exported(tmp_path, STEPS) if event["name"] == "thread_name"]
    assert names == ["steps", "request a", "request b", "request c"], f"got {names}"


def test_tracks_have_separate_numbers(tmp_path: Path) -> None:
    names = [event for event in exported(tmp_path, STEPS) if event["ph"] == "M"]
    groups = {event["pid"] for event in names if event["name"] == "process_name"}
    tracks = [event["tid"] for event in names if event["name"] == "thread_name" and event["pid"] == 2]
    assert len(set(tracks)) == 3 and not groups & set(tracks)
