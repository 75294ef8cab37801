"""Real clients against the newest part's server: `make test-clients`, in an environment that has them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.serve import server_process

ROOT = Path(__file__).parents[2]
NEWEST_PART = sorted(path.name for path in ROOT.glob("part[0-9][0-9]_*"))[-1]
TIMEOUT_S = 1800  # for a client that takes seconds; only a mistake makes a test wait this long


@pytest.fixture(scope="session")
def server_url() -> Iterator[str]:
    """The newest part's server over the tiny model. It ends with the tests."""
    with server_process(NEWEST_PART, "--model", "tiny", "--no-log-stats", cwd=ROOT) as url:
        yield url


@pytest.fixture
def run_client(tmp_path: Path) -> Callable[..., str]:
    """Runs `python -m NAME arguments…` without a network. Returns its output; fails with the end of it."""
    private = {
        "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "*",
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip

    def run(*arguments: str) -> str:
        command, env = [sys.executable, "-m", *arguments], {**os.environ, **private}
        done = subprocess.run(
            command, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=TIMEOUT_S, check=False
        )  # fmt: skip
        output = done.stdout + done.stderr
        assert done.returncode == 0, f"{arguments[0]} ended with status {done.returncode}: {output[-3000:]}"
        return output

    return run
