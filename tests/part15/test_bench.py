"""bench.py --check: what it compares, and what it refuses to compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from llvmlite.binding import get_host_cpu_name

from common.errors import FieldError
from part15_full_architecture import bench
from part15_full_architecture.bench import BenchConfig, check

LOOK = "Look at bench.py::check"


def operations(speedup: float) -> dict[str, Any]:
    return {"tiny": {"norm, 1 rows": {"speedup": {"numba": speedup}}}}


@pytest.mark.parametrize(
    ("target", "speedup", "error"),
    [
        (get_host_cpu_name(), 7.1, None),
        (get_host_cpu_name(), 6.9, r"tiny, norm, 1 rows: numba is 6\.9 times as fast as torch, was 10"),
        ("pdp11", 7.1, "measured on pdp11, and this is .*: make bench PART=15"),
        (None, 7.1, "measured on another CPU"),
    ],
)
def test_an_advantage_that_is_lost(
    target: str | None, speedup: float, error: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = {"config": {"target": target}, "measurements": {"operations": operations(10.0)}}
    (tmp_path / "part15.json").write_text(json.dumps(result))
    monkeypatch.setattr(bench, "measure_operations", lambda repeats: operations(speedup))
    config = BenchConfig(results_dir=str(tmp_path))
    if error is None:
        check(config)
        return
    with pytest.raises(FieldError, match=error):
        check(config)
