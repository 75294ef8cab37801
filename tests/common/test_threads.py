"""common/threads.py: how many threads compute, and how long they spin."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import common
from common import threads
from common.errors import FieldError
from common.threads import SPIN_LIMITS, SPIN_VARIABLES, check_num_threads, leave_a_core, limit_spinning, set_num_threads

LOOK = "Look at common/threads.py::{}."
ROOT = Path(common.__file__).parents[1]
NUM_CPUS = os.cpu_count() or 1


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An empty environment."""
    environ: dict[str, str] = {}
    monkeypatch.setattr(threads, "os", SimpleNamespace(environ=environ))
    return environ


def run_python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process without settings for how OpenMP waits or how many threads compute."""
    unset = (*SPIN_VARIABLES, "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    env = {name: value for name, value in os.environ.items() if name not in unset}
    env |= {"PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{code!r} ended with {done.returncode}: {done.stderr[-1000:]}"
    return done


# limit_spinning


def test_spinning_is_limited_by_default(environ: dict[str, str]) -> None:
    limit_spinning()
    assert environ == SPIN_LIMITS, f"expected {SPIN_LIMITS}, got {environ}. {LOOK.format('limit_spinning')}"


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY"])
def test_the_users_setting_wins(environ: dict[str, str], name: str) -> None:
    environ[name] = "0"
    limit_spinning()
    assert environ == {name: "0"}, (
        f"{name} is set: expected no other variable, got {environ}. {LOOK.format('limit_spinning')}"
    )


@pytest.mark.skipif(not list(Path(torch.__file__).parent.glob("lib/libgomp*")), reason="this torch has no libgomp")
def test_openmp_reads_the_limit() -> None:
    """With OMP_DISPLAY_ENV, libgomp prints the settings that it was loaded with."""
    code = "from common.threads import limit_spinning\nlimit_spinning()\nimport torch"
    report = run_python(code, OMP_DISPLAY_ENV="VERBOSE").stderr
    [line] = [line for line in report.splitlines() if "GOMP_SPINCOUNT" in line]
    assert f"'{SPIN_LIMITS['GOMP_SPINCOUNT']}'" in line, f"libgomp says {line!r}. {LOOK.format('limit_spinning')}"


# The number of threads


@pytest.mark.parametrize("num_threads", [None, 1, NUM_CPUS])
def test_valid_numbers_of_threads(num_threads: int | None) -> None:
    check_num_threads(num_threads)


@pytest.mark.parametrize("num_threads", [0, -1, NUM_CPUS + 1, 10**12])
def test_a_number_of_threads_out_of_range_is_an_error_that_names_it(num_threads: int) -> None:
    with pytest.raises(FieldError, match=rf"^num_threads: expected 1 to {NUM_CPUS} .*, got {num_threads}$"):
        check_num_threads(num_threads)


def in_a_new_thread(num_threads: int | None) -> int:
    """The number of torch threads in a thread that has called set_num_threads."""
    found: list[int] = []

    def compute() -> None:
        set_num_threads(num_threads)
        found.append(torch.get_num_threads())

    thread = threading.Thread(target=compute)
    thread.start()
    thread.join()
    return found[0]


def test_a_thread_computes_with_its_number_of_threads() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert in_a_new_thread(None) == 1, f"None means the process's setting. {LOOK.format('set_num_threads')}"
        assert in_a_new_thread(2) == 2, LOOK.format("set_num_threads")
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(sys.platform != "linux" or NUM_CPUS < 2, reason="counts OpenMP's threads in /proc")
@pytest.mark.parametrize("num_threads", ["1", "None"])
def test_the_first_matrix_product_of_a_thread_uses_its_number_of_threads(num_threads: str) -> None:
    """torch.set_num_threads(1) in the main thread alone is not enough."""
    code = (
        "import os, threading, torch\n"
        "from common.threads import set_num_threads\n"
        "def compute():\n"
        f"    set_num_threads({num_threads})\n"
        "    before = len(os.listdir('/proc/self/task'))\n"
        "    torch.nn.functional.linear(ones, ones)\n"
        "    print(len(os.listdir('/proc/self/task')) - before)\n"
        "torch.set_num_threads(1)\n"
        "ones = torch.ones(512, 512)\n"
        "thread = threading.Thread(target=compute)\n"
        "thread.start()\n"
        "thread.join()\n"
    )
    got = run_python(code).stdout.strip()
    assert got == "0", (
        f"one thread computes: expected no other thread, got {got} more. {LOOK.format('set_num_threads')}"
    )


@pytest.mark.parametrize(("num_cores", "expected"), [(1, 1), (2, 2), (3, 2), (16, 15)])
def test_one_of_more_than_two_cores_stays_free(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], num_cores: int, expected: int
) -> None:
    setting = [num_cores]
    monkeypatch.setattr(torch, "get_num_threads", lambda: setting[-1])
    monkeypatch.setattr(torch, "set_num_threads", setting.append)
    leave_a_core()
    assert setting[-1] == expected, (
        f"{num_cores} cores: expected {expected} threads, got {setting}. {LOOK.format('leave_a_core')}"
    )


def test_omp_num_threads_wins(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]) -> None:
    environ["OMP_NUM_THREADS"] = "4"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: pytest.fail(f"expected 4. {LOOK.format('leave_a_core')}"))
    leave_a_core()
