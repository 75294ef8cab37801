"""common/threads.py: how long threads spin."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import common
from common import threads
from common.threads import SPIN_LIMITS, SPIN_VARIABLES, limit_spinning

LOOK = "Look at common/threads.py::{}."
ROOT = Path(common.__file__).parents[1]


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An empty environment."""
    environ: dict[str, str] = {}
    monkeypatch.setattr(threads, "os", SimpleNamespace(environ=environ))
    return environ


def run_python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process in which nobody has said how OpenMP waits or with how many threads it computes."""
    unset = (*SPIN_VARIABLES, "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    env = {name: value for name, value in os.environ.items() if name not in unset}
    env |= {"PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{code!r} ended with {done.returncode}: {done.stderr[-1000:]}"
    return done


# limit_spinning


def test_spinning_is_limited_where_nothing_is_said(environ: dict[str, str]) -> None:
    limit_spinning()
    assert environ == SPIN_LIMITS, f"expected {SPIN_LIMITS}, got {environ}. {LOOK.format('limit_spinning')}"


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY"])
def test_what_the_user_has_set_wins(environ: dict[str, str], name: str) -> None:
    environ[name] = "0"
    limit_spinning()
    assert environ == {name: "0"}, (
        f"{name} is set: expected no other variable, got {environ}. {LOOK.format('limit_spinning')}"
    )


@pytest.mark.skipif(not list(Path(torch.__file__).parent.glob("lib/libgomp*")), reason="this torch has no libgomp")
def test_openmp_hears_of_the_limit() -> None:
    """libgomp itself says with what it was loaded, as OMP_DISPLAY_ENV asks it to."""
    code = "from common.threads import limit_spinning\nlimit_spinning()\nimport torch"
    report = run_python(code, OMP_DISPLAY_ENV="VERBOSE").stderr
    [line] = [line for line in report.splitlines() if "GOMP_SPINCOUNT" in line]
    assert f"'{SPIN_LIMITS['GOMP_SPINCOUNT']}'" in line, f"libgomp says {line!r}. {LOOK.format('limit_spinning')}"
