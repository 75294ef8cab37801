"""tools/comparison.py: every engine runs, and README shows what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.results import read_result
from common.workloads import WorkloadRequest, nano_vllm_cpu
from tools import comparison

ROOT = Path(__file__).parents[2]


def shortest(num_requests: int) -> list[WorkloadRequest]:
    return sorted(nano_vllm_cpu(), key=lambda request: request.max_tokens)[:num_requests]


@pytest.mark.parametrize("name", comparison.engine_names("tiny"))
def test_every_engine_answers(name: str) -> None:
    """A part's engine checks the number of tokens itself and resets the prefix cache, so it can run twice."""
    engine = comparison.load(name, "tiny")
    for _ in range(2):
        engine(shortest(2))


def test_engines_run_in_separate_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "engine_names", lambda model: ["part 3", "part 8, ngram"])
    monkeypatch.setattr(comparison, "WORKLOADS", {"one request": 1})
    [(workload, rates)] = comparison.measure("tiny", 1).items()
    assert workload == "one request" and list(rates) == ["part 3", "part 8, ngram"], f"got {workload}: {rates}"
    assert min(rates.values()) > 0, f"tokens per second: {rates}"


def test_readme_shows_what_was_measured() -> None:
    table = comparison.markdown(read_result(comparison.RESULT))
    assert table in (ROOT / "README.md").read_text("utf-8"), (
        "README's comparison is not that of results/comparison.json: python -m tools.comparison --table"
    )
    assert comparison.RESULT.with_suffix(".png").is_file()
