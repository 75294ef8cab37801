"""How a section reports to the run: its cases, one JSON line each."""

from __future__ import annotations

import contextlib
import json
import math
import re
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[2]


class SkipSection(Exception):
    """The section cannot run here; the message says why."""


class Recorder:
    """Records a section's results, case by case.

    device: "cuda", or "cpu" for a dry run, in which a section runs at the smallest size.
    """

    def __init__(self, out: TextIO, budget_s: float, device: str) -> None:
        self.device = device
        self.num_failed = 0
        self._out = out
        self._ends_at = time.monotonic() + budget_s

    @property
    def on_cpu(self) -> bool:
        return self.device == "cpu"

    def seconds_left(self) -> float:
        return self._ends_at - time.monotonic()

    def record(self, name: str, **values: Any) -> None:
        self.emit({"case": name, "values": {"passed": True, **values}})

    @contextlib.contextmanager
    def case(self, name: str) -> Iterator[dict[str, Any]]:
        """Record the contents of the dict. An error is recorded with its traceback, and the section continues."""
        values: dict[str, Any] = {}
        try:
            yield values
        except SkipSection:
            raise
        except Exception:  # any error: the next case may pass
            self.num_failed += 1
            self.emit({"case": name, "values": {"passed": False, **values, "traceback": format_error()}})
        else:
            self.record(name, **values)

    def skip_case(self, name: str, reason: str) -> None:
        """Record a case that was skipped."""
        self.emit({"case": name, "values": {"passed": None, "skipped": reason}})

    def emit(self, line: dict[str, Any]) -> None:
        print(json.dumps(_finite(line)), file=self._out, flush=True)


def format_error() -> str:
    """The traceback of the error that is being handled."""
    return without_paths(traceback.format_exc())


def without_paths(text: str) -> str:
    """Remove the machine's own folders from paths: keep what is inside the repository or site-packages."""
    return re.sub(r'(?<=")/[^"]*/site-packages/', "site-packages/", text.replace(f"{ROOT}/", ""))


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: write them as text."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
