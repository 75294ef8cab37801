"""The repository's own tests that are skipped without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tools.gpu.recorder import Recorder, SkipSection

ROOT = Path(__file__).resolve().parents[2]
NUM_LAST_CHARACTERS = 4_000


def run(recorder: Recorder) -> None:
    if recorder.on_cpu:
        raise SkipSection("these tests are skipped without a GPU")
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # installed plugins may not fit this pytest
    for path in files_with_gpu_tests():
        name = path.relative_to(ROOT).as_posix()
        with recorder.case(name) as values:
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "gpu", name]
            done = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            output = done.stdout.strip()
            values["summary"] = output.rpartition("\n")[2]
            assert done.returncode == 0, output[-NUM_LAST_CHARACTERS:]


def files_with_gpu_tests() -> list[Path]:
    """Test files with GPU tests, which have "gpu" in their names."""
    found = sorted(ROOT.glob("tests/part[0-9][0-9]/test_*.py"))
    return [path for path in found if "cuda.is_available" in path.read_text("utf-8")]
