"""tools/comparison.py: every engine runs, and the page of results shows what was measured."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from common.results import read_result
from common.workloads import WorkloadRequest, nano_vllm_cpu
from tests.tools import light_engine
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


def test_an_engine_is_warmed_up_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[WorkloadRequest]] = []
    monkeypatch.setattr(comparison, "load", lambda name, model: ran.append)
    monkeypatch.setattr(comparison, "_engine", None)
    comparison._load("part 3", "tiny")
    seconds = comparison._seconds(2)
    assert ran == [nano_vllm_cpu(1, seed=1), nano_vllm_cpu(2)], f"the warm-up has another prompt: it ran {ran}"
    assert seconds > 0, f"it took {seconds} s"


def test_engines_run_in_separate_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engines are made up: their tokens per second are the id of their process. Real ones take seconds to load."""
    names = ["part 3", "part 8, ngram"]
    monkeypatch.setattr(comparison, "engine_names", lambda model: names)
    monkeypatch.setattr(comparison, "_load", light_engine.load)
    monkeypatch.setattr(comparison, "_seconds", light_engine.seconds)
    found = comparison.measure("tiny", 3)
    assert list(found) == list(comparison.WORKLOADS), f"got {found}"
    for workload, rates in found.items():
        assert list(rates) == names, f"got {workload}: {rates}"
    processes = [{round(rates[name]) for rates in found.values()} for name in names]
    assert [len(ids) for ids in processes] == [1, 1], f"each engine stays in its process: got {processes}"
    assert len(set.union(*processes, {os.getpid()})) == 3, f"two engines, two processes: got {processes}"


def test_real_engines_can_be_loaded_in_a_process_of_their_own() -> None:
    for function in (comparison._load, comparison._seconds):
        assert pickle.loads(pickle.dumps(function)) is function, f"{function} cannot be sent to another process"


def test_the_page_shows_what_was_measured() -> None:
    table = comparison.markdown(read_result(comparison.RESULT))
    assert table in (ROOT / "results" / "README.md").read_text("utf-8"), (
        "The comparison in results/README.md is not that of results/comparison.json: python -m tools.comparison --table"
    )
    assert comparison.RESULT.with_suffix(".png").is_file()
