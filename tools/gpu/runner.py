"""Run sections one after the other within a time limit, and write the result file after every case."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from common.results import git_commit, write_result
from tools.gpu.recorder import without_paths

ROOT = Path(__file__).resolve().parents[2]
NUM_LAST_LINES = 30  # of stderr, kept if a section dies without a traceback
READ_TIMEOUT_S = 5.0  # to read a finished section's output; its children may hold the pipe open


@dataclass(frozen=True, slots=True)
class Section:
    """function: "module:name", called with a Recorder. budget_s: its time limit; with less than min_s left it is
    skipped. is_required: if it fails, the others are skipped.
    """

    name: str
    function: str
    budget_s: float
    min_s: float
    is_required: bool = False


@dataclass(slots=True)
class Report:
    """The result file: sections in order, each with status, seconds and cases. save() writes its current state."""

    path: Path
    config: dict[str, Any]
    commit: str | None
    machine: dict[str, Any] = field(default_factory=dict)
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def save(self) -> None:
        write_result(
            self.path, benchmark="gpu", config=self.config, seed=0, repeats=1, machine=self.machine,
            commit=self.commit, measurements={"sections": self.sections},
        )  # fmt: skip

    def take(self, section: str, line: str) -> None:
        """Add what a section printed: a case, or how the section ended."""
        found = json.loads(line)
        with self.lock:
            entry = self.sections[section]
            if "case" in found:
                entry["cases"][found["case"]] = found["values"]
                self.machine = found["values"].get("machine", self.machine)
                print(f"  {found['case']}: {describe(found['values'])}", flush=True)
            else:
                entry.update(found)
            self.save()


def describe(values: Mapping[str, Any]) -> str:
    """One line for the terminal."""
    shown = {key: value for key, value in values.items() if key not in ("passed", "traceback", "machine")}
    words = [f"{key} {value:,.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()]
    if values["passed"] is not False:
        return ", ".join(words) or "ok"
    return ", ".join(["FAILED: " + values["traceback"].strip().rpartition("\n")[2], *words])


def run_sections(
    sections: Sequence[Section], path: Path, *, device: str, ends_at: float, config: Mapping[str, Any] | None = None,
    commit: str | None = None, environment: Mapping[str, str] | None = None,
) -> int:  # fmt: skip
    """Run the sections until time.monotonic() is ends_at. Returns how many failed.

    commit: to write into the file, by default from git. environment: added to that of the sections' processes.
    """
    report = Report(path, {"device": device, **(config or {})}, commit or git_commit())
    stopped = ""
    for section in sections:
        left_s = ends_at - time.monotonic()
        entry: dict[str, Any] = {"status": "skipped", "budget_s": section.budget_s, "seconds": 0.0, "cases": {}}
        report.sections[section.name] = entry
        if not stopped and left_s < section.min_s:
            entry["reason"] = f"{max(left_s, 0.0):.0f} s left, it needs at least {section.min_s:.0f}"
        elif stopped:
            entry["reason"] = stopped
        else:
            print(f"{section.name}: at most {min(section.budget_s, left_s):.0f} s", flush=True)
            run_section(section, report, device, min(section.budget_s, left_s), environment or {})
        if entry["status"] == "failed" and section.is_required:
            stopped = f"{section.name} failed"
        reason = f": {entry['reason']}" if "reason" in entry else ""
        print(f"{section.name}: {entry['status']} after {entry['seconds']:.0f} s{reason}", flush=True)
        report.save()
    return sum(entry["status"] == "failed" for entry in report.sections.values())


def run_section(section: Section, report: Report, device: str, budget_s: float, environment: Mapping[str, str]) -> None:
    """Run one section in its own process and record how it ended; after its budget it is killed."""
    entry, started = report.sections[section.name], time.monotonic()
    entry["status"] = "running"
    report.save()
    command = [sys.executable, "-m", "tools.gpu.child", section.function, str(budget_s), device]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    last_lines: deque[str] = deque(maxlen=NUM_LAST_LINES)
    readers = [
        threading.Thread(target=_take_cases, args=(process.stdout, section.name, report), daemon=True),
        threading.Thread(target=_pass_on, args=(process.stderr, last_lines), daemon=True),
    ]
    for reader in readers:
        reader.start()
    try:
        process.wait(budget_s)
        is_late = False
    except subprocess.TimeoutExpired:
        is_late = True
    finally:  # on Ctrl-C too
        process.kill()
        process.wait()
    for reader in readers:
        reader.join(READ_TIMEOUT_S)
    entry["seconds"] = round(time.monotonic() - started, 1)
    entry |= how_it_ended(entry, process.returncode, list(last_lines))
    if is_late:
        entry |= {"status": "failed", "reason": f"killed: not done after {budget_s:.0f} s"}


def how_it_ended(entry: dict[str, Any], exit_status: int, last_lines: list[str]) -> dict[str, Any]:
    """Status and reason of a section whose process has ended."""
    if "skipped" in entry:
        return {"status": "skipped", "reason": entry.pop("skipped")}
    if exit_status == 0:
        return {"status": "passed"}
    if num_failed := sum(values["passed"] is False for values in entry["cases"].values()):
        return {"status": "failed", "reason": f"{num_failed} cases failed"}
    if "traceback" in entry:
        return {"status": "failed", "reason": "it raised an exception"}
    lines = [without_paths(line) for line in last_lines]
    return {"status": "failed", "reason": f"exit status {exit_status}", "stderr": lines}


def _take_cases(stream: IO[str], section: str, report: Report) -> None:
    for line in stream:
        if line.endswith("\n"):  # otherwise the process was killed while writing
            report.take(section, line)


def _pass_on(stream: IO[str], last_lines: deque[str]) -> None:
    for line in stream:
        last_lines.append(line.rstrip())
        print(line, end="", file=sys.stderr, flush=True)
