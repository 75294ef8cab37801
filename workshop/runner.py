"""The client of `workshop.warm`: starts it, sends it jobs, reads their results, and can cancel a job."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from workshop.course import Exercise, Part
from workshop.results import Result, read_result
from workshop.warm import CAN_FORK, Job

LIMIT_S = 45.0  # of a test
POLL_S = 0.1
IN_OTHER_PROCESSES = "test_process.py"  # tests of servers, which import the reference
REPOSITORY = Path(__file__).resolve().parents[1]


class Runner:
    """Runs the tests of one part in a warm process. num_starts counts how often it was started.

    Between runs, part may be changed to another under the same root.
    """

    def __init__(self, part: Part, limit_s: float = LIMIT_S) -> None:
        self.part, self.limit_s = part, limit_s
        self.num_starts = 0
        self.folder = tempfile.TemporaryDirectory(prefix="workshop-")
        self.replies: queue.Queue[dict[str, int] | None] = queue.Queue()
        self.process = self._start()

    def _start(self) -> subprocess.Popen:
        """Start it in the repository's root, as the tests expect, and offline, as the tests' conftest requires."""
        self.num_starts += 1
        root = self.part.root
        tests = {test.partition("::")[0] for exercise in self.part.exercises for test in exercise.tests}
        preload = [str(path) for path in [self.part.path, *(root / test for test in sorted(tests))] if path.exists()]
        paths = [self.part.workspace, root, REPOSITORY]
        fixed = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        fixed |= {
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
            "PYTEST_ADDOPTS": "",
        }  # the first: checking for a GPU stays fork-safe
        process = subprocess.Popen(
            [sys.executable, "-m", "workshop.warm", *preload], cwd=root, env=os.environ | fixed, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        threading.Thread(target=self._read, args=(process,), daemon=True).start()
        return process

    def _read(self, process: subprocess.Popen) -> None:
        for line in process.stdout or ():
            self.replies.put(json.loads(line))
        self.replies.put(None)

    def run(
        self,
        tests: list[str],
        lent: list[str],
        *,
        marks: str = "",
        workspace: Path | None = None,
        max_failures: int = 0,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Result | None:
        """Run tests on the learner's copy, or on the one in another workspace. None if cancelled before the end.

        lent: exercises whose bodies come from the reference; marks: as pytest's -m.
        """
        workspace = workspace or self.part.workspace
        events, log = (Path(self.folder.name) / name for name in ("events", "log"))
        for file in (events, log):
            file.unlink(missing_ok=True)
        files = dict.fromkeys(e.file for e in self.part.exercises if e.file.endswith(".py"))
        modules = [f"{self.part.name}.{file.removesuffix('.py').replace('/', '.')}" for file in files]
        paths = {"workspace": workspace, "reference": self.part.path, "events": events, "log": log}
        job = Job(
            **{name: str(path) for name, path in paths.items()},
            modules=modules, lent=lent, tests=tests, marks=marks, max_failures=max_failures, limit_s=self.limit_s,
        )  # fmt: skip
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asdict(job)) + "\n")
        self.process.stdin.flush()
        status = self._wait(cancelled)
        if status is None:
            return None
        return read_result(events, log, workspace / self.part.name, status, self.limit_s)

    def _wait(self, cancelled: Callable[[], bool]) -> int | None:
        """The job's exit status, or None if it was cancelled. Starts the next warm process if this one has ended."""
        pid, status, was_cancelled = None, None, False
        while status is None or not CAN_FORK:
            try:
                reply = self.replies.get(timeout=POLL_S)
            except queue.Empty:
                if pid is not None and not was_cancelled and cancelled():
                    was_cancelled = True
                    kill(pid)
                continue
            if reply is None:
                status = self.process.wait() if status is None else status
                self._close_pipes()
                self.process = self._start()
                break
            pid, status = reply.get("pid", pid), reply.get("status", status)
        return None if was_cancelled else status

    def _close_pipes(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(OSError):
                pipe.close()  # type: ignore[union-attr]

    def run_exercise(
        self,
        exercise: Exercise,
        *,
        tests: list[str] | None = None,
        workspace: Path | None = None,
        max_failures: int = 0,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Result | None:
        """Run one exercise's tests without the slow ones, or only the named ones, with every other body lent."""
        return self.run(
            tests or list(exercise.tests), self._all_but([exercise.name]), marks="not slow", workspace=workspace,
            max_failures=max_failures, cancelled=cancelled,
        )  # fmt: skip

    def run_together(self, exercises: list[Exercise], cancelled: Callable[[], bool]) -> Result | None:
        """Run the tests of several exercises on the learner's copy as it is, up to the first failure."""
        tests = list(dict.fromkeys(test for exercise in exercises for test in exercise.tests))
        names = [exercise.name for exercise in exercises]
        return self.run(tests, self._all_but(names), marks="not slow", max_failures=1, cancelled=cancelled)

    def run_rest(self, names: list[str], cancelled: Callable[[], bool]) -> Result | None:
        """Run all tests of the part, with every body but the named ones lent."""
        tests = [str(path.relative_to(self.part.root)) for path in sorted(self.part.tests.glob("test_*.py"))]
        tests = [test for test in tests if not test.endswith(IN_OTHER_PROCESSES)]
        return self.run(tests, self._all_but(names), cancelled=cancelled)

    def _all_but(self, names: list[str]) -> list[str]:
        return [exercise.name for exercise in self.part.exercises if exercise.name not in names]

    def close(self) -> None:
        """Kill the warm process and its job."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._close_pipes()
        self.folder.cleanup()

    def __enter__(self) -> Runner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
