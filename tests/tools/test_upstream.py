"""What the lessons name in vLLM is looked for in the installed version."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import upstream
from tools.upstream import Mention, cell_mentions, mentions, problem

CELL = (
    "[`v1/core/sched/scheduler.py::Scheduler.schedule`](https://github.com/vllm-project/vllm/blob/main/vllm/v1/core/"
    "sched/scheduler.py), `Scheduler._preempt`, `--kv-offload`, [other's `Name`](https://example.org)"
)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    file = tmp_path / "vllm" / "v1" / "core" / "sched" / "scheduler.py"
    file.parent.mkdir(parents=True)
    file.write_text("class Scheduler:\n    def schedule(self):\n        kv_offload = 1\n")
    return tmp_path


def test_what_a_cell_mentions() -> None:
    assert list(cell_mentions("p", CELL)) == [
        Mention("p", "vllm/v1/core/sched/scheduler.py", "Scheduler.schedule"),
        Mention("p", None, "Scheduler._preempt"),
        Mention("p", None, "kv_offload"),
    ]


def test_what_is_not_there_is_named(package: Path) -> None:
    upstream.words_of.cache_clear()
    assert [problem(package, each) for each in cell_mentions("p", CELL)] == [
        None, "p: vLLM has no Scheduler._preempt", None,
    ]  # fmt: skip
    path = "vllm/v1/core/sched/scheduler.py"
    assert problem(package, Mention("p", path, "Scheduler.run")) == f"p: {path} has no Scheduler.run"
    assert problem(package, Mention("p", "vllm/v0", None)) == "p: vLLM has no vllm/v0"


def test_every_lesson_has_mentions() -> None:
    pages = {mention.page for mention in mentions()}
    assert len(pages) == 15, f"lessons whose table was read: {sorted(pages)}"


@pytest.mark.skipif(upstream.find_package() is None, reason="needs vLLM (make peers)")
def test_all_mentions_exist_in_the_installed_vllm() -> None:
    package = upstream.find_package()
    assert package is not None
    assert [found for each in mentions() if (found := problem(package, each))] == []
