"""Lent bodies replace blanks, whatever their layout."""

from __future__ import annotations

from pathlib import Path

from workshop.lending import CopyFinder, LendingLoader

REFERENCE = """def add(a, b):
    # exercise: add
    result = sum(
        [
            a,
            b,
        ]
    )
    return result
    # exercise: end
"""
BLANK = """def add(a, b):
    # exercise: add
    raise NotImplementedError
    # exercise: end
"""


def test_a_lent_statement_may_end_left_of_its_beginning(tmp_path: Path) -> None:
    reference, workspace = tmp_path / "part01_made_up", tmp_path / "workspace"
    copy = workspace / reference.name / "engine.py"
    for path, text in ((reference / "engine.py", REFERENCE), (copy, BLANK)):
        path.parent.mkdir(parents=True)
        path.write_text(text, encoding="utf-8")
    loader = LendingLoader("part01_made_up.engine", str(copy), CopyFinder(workspace, reference, ["add"]))
    names: dict[str, object] = {}
    exec(loader.source_to_code(copy.read_bytes(), str(copy)), names)  # noqa: S102
    add = names["add"]
    assert callable(add) and add(2, 3) == 5, "expected the lent body, which adds"
