"""Made-up sections, which test_gpu.py runs in separate processes."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from tools.gpu.recorder import Recorder, SkipSection


def two_cases(recorder: Recorder) -> None:
    """The first case must be in the result file while the section still runs."""
    recorder.record("first", gb_s=float("nan"))
    print("what a library prints")
    path, seen = Path(os.environ["RESULT"]), False
    while not seen and recorder.seconds_left() > 0:
        seen = path.is_file() and "first" in json.loads(path.read_text())["measurements"]["sections"]["a"]["cases"]
        time.sleep(0.02)
    recorder.record("second", first_was_written=seen, machine={"gpu": "made up"})


def a_case_fails(recorder: Recorder) -> None:
    with recorder.case("bad") as values:
        values["got"] = 3
        raise ZeroDivisionError("by zero")
    with recorder.case("good") as values:
        values["device"] = recorder.device
    recorder.skip_case("late", "no time")


def raises(recorder: Recorder) -> None:
    recorder.record("first")
    raise LookupError("nothing there")


def dies(recorder: Recorder) -> None:
    print("last words", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(recorder: Recorder) -> None:
    recorder.record("first")
    time.sleep(600)


def skips(recorder: Recorder) -> None:
    raise SkipSection("not here")
