"""start, catch-up and diff: a learner's work is never lost, and no solution is shown by accident."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from workshop import workspace
from workshop.course import Part, WorkshopError


def engine(part: Part) -> str:
    return (part.copy / "engine.py").read_text()


def test_start_writes_a_blanked_copy_and_leaves_the_reference_alone(part: Part) -> None:
    before = (part.path / "engine.py").read_text()
    assert workspace.start(part) is None, "there was nothing to keep a backup of"
    assert (part.path / "engine.py").read_text() == before, "start must not touch the reference"
    assert "result += b" not in engine(part) and "result = numbers.ZERO" in engine(part), f"got {engine(part)}"
    names = sorted(path.name for path in part.copy.iterdir())
    assert names == ["__init__.py", "engine.py", "exercises.md", "numbers.py"], f"got {names}"
    assert not any(workspace.is_started(part, e) for e in part.exercises), "a fresh copy has nothing started"


def test_start_never_overwrites_without_force(part: Part, solve: Callable[..., None]) -> None:
    workspace.start(part)
    solve(add="return a + b")
    mine = engine(part)
    with pytest.raises(WorkshopError, match="--force"):
        workspace.start(part)
    assert engine(part) == mine, "a refused start must leave the learner's work as it is"
    backup = workspace.start(part, force=True)
    assert backup is not None and (backup / "engine.py").read_text() == mine, "--force keeps a backup"
    assert engine(part) != mine, "--force starts over"


def test_start_with_an_unmatched_marker_changes_nothing(part: Part, solve: Callable[..., None]) -> None:
    workspace.start(part)
    mine = engine(part)
    reference = part.path / "engine.py"
    reference.write_text(reference.read_text().replace("    # exercise: end\n", "", 1))
    with pytest.raises(WorkshopError, match="comes before the end"):
        workspace.start(part, force=True)
    assert engine(part) == mine, "a start that fails must leave the copy where it is"


def test_catch_up_keeps_every_copy_even_within_a_second(part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "strftime", lambda *_: "20260101-120000")
    assert workspace.catch_up(part, []) is None
    assert engine(part) == (part.path / "engine.py").read_text(), "the copy is now the reference"
    backups = []
    for number in range(3):
        (part.copy / "engine.py").write_text(f"# {number}\n")
        backups.append(workspace.catch_up(part, []))
    assert [(b / "engine.py").read_text() for b in backups if b] == ["# 0\n", "# 1\n", "# 2\n"], f"got {backups}"


def test_catch_up_with_one_exercise_keeps_the_others(part: Part, solve: Callable[..., None]) -> None:
    workspace.start(part)
    solve(total="return sum(values)")
    workspace.catch_up(part, part.select(["add"]))
    assert "result += b" in engine(part), "the reference's add must be there"
    assert "return sum(values)" in engine(part), "the learner's total must stay"


def test_diff_hides_blank_exercises(part: Part, solve: Callable[..., None]) -> None:
    workspace.start(part)
    assert workspace.diff(part, []) == [], "with nothing written there is nothing to compare"
    solve(add="return a + b")
    lines = workspace.diff(part, [])
    assert lines[:2] == ["--- yours/engine.py", "+++ reference/engine.py"], f"got {lines}"
    assert "-    return a + b" in lines and "+    result += b" in lines, f"got {lines}"
    assert not any("for value" in line for line in lines), f"total is still blank, its solution stays hidden: {lines}"
    named = workspace.diff(part, ["total"])
    assert "+    for value in values:" in named, f"a blank exercise shows if it is named: {named}"
    assert not any("return a + b" in line for line in named), f"only what was named: {named}"


def test_a_change_concerns_the_exercise_whose_body_it_is_in(part: Part, solve: Callable[..., None]) -> None:
    workspace.start(part)
    before = workspace.fingerprints(part)
    solve(add="return a + b")
    after = workspace.fingerprints(part)
    changed = [name for name in before if before[name] != after[name]]
    assert changed == ["add"], f"a change in add's body concerns add alone, got {changed}"
    (part.copy / "numbers.py").write_text("ZERO = 1\n")
    changed = [name for name, value in workspace.fingerprints(part).items() if after[name] != value]
    assert changed == ["add", "total"], f"a change outside the bodies concerns all, got {changed}"


def test_what_is_missing_is_named_with_what_to_do(part: Part) -> None:
    with pytest.raises(WorkshopError, match=".venv/bin/workshop start 1"):
        workspace.diff(part, [])
    workspace.start(part)
    Path(part.copy / "engine.py").unlink()
    with pytest.raises(WorkshopError, match=r"engine.py is missing; `.venv/bin/workshop catch-up 1`"):
        workspace.diff(part, ["add"])


def test_the_lesson_in_the_copy_leads_where_the_original_does(part: Part) -> None:
    """Images are copied, also to where other parts look for them; other links lead to the originals."""
    for name in ("docs/diagrams/life.svg", "results/part01.png", "GLOSSARY.md", "part01_made_up/figure.png"):
        (part.root / name).parent.mkdir(parents=True, exist_ok=True)
        (part.root / name).write_text(name)
    lesson = (
        "![life of a request](../docs/diagrams/life.svg) ![plot](../results/part01.png) ![](figure.png) "
        "![gone](../results/none.png) [terms](../GLOSSARY.md#kv-cache) [here](exercises.md) [web](https://a.org/../b)"
    )
    (part.path / "README.md").write_text(lesson)
    workspace.start(part)
    got = (part.copy / "README.md").read_text()
    assert got == lesson.replace("(../GLOSSARY", "(../../GLOSSARY"), f"got {got}. See lesson.py::place"
    for name in ("../docs/diagrams/life.svg", "../results/part01.png", "figure.png", "../../GLOSSARY.md"):
        assert (part.copy / name).is_file(), f"{name} must lead to a file from workspace/part01_made_up/"
    assert (part.workspace / "docs" / "diagrams" / "life.svg").read_text() == "docs/diagrams/life.svg"
    workspace.catch_up(part, [])
    assert (part.copy / "README.md").read_text() == got, "the same after catch-up"
