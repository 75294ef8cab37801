"""tools/comparison.py: every way runs, and README shows what was measured."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from common.results import read_result
from common.workloads import WorkloadRequest, nano_vllm_cpu
from tools import comparison

ROOT = Path(__file__).parents[2]


def short(num_requests: int) -> list[WorkloadRequest]:
    return sorted(nano_vllm_cpu(), key=lambda request: request.max_tokens)[:num_requests]


def test_every_way_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "WORKLOADS", {"32 requests": lambda: short(2), "one request": lambda: short(1)})
    monkeypatch.setattr(comparison, "nano_vllm_cpu", lambda *_args, **_options: short(1))
    found = comparison.measure("tiny", 1)
    names = [f"part {number}" for number in range(3, 9)] + ["part 8, ngram", "part 8, draft_model"]
    names += [f"transformers, {way}" for way in ("one by one", "padded", "continuous")]
    for workload, rates in found.items():
        assert sorted(rates) == sorted(names), f"{workload}: expected these ways: {sorted(names)}, got {sorted(rates)}"
        assert all(math.isfinite(rate) and rate > 0 for rate in rates.values()), f"{workload}: {rates}"


def test_readme_shows_what_was_measured() -> None:
    table = comparison.markdown(read_result(comparison.RESULT))
    assert table in (ROOT / "README.md").read_text("utf-8"), (
        "README's comparison is not that of results/comparison.json: python -m tools.comparison --table"
    )
    assert comparison.RESULT.with_suffix(".png").is_file()
