"""exercises.md and the markers: reading, blanking, and the messages about mistakes in them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from workshop.bodies import blank_bodies, find_bodies, replace_bodies
from workshop.course import LABELS, Part, WorkshopError, find_part, read_exercises, read_parts
from workshop.workspace import reference_bodies, sources, start

ROOT = Path(__file__).resolve().parents[2]
PARTS = read_parts(ROOT)


def test_an_exercise_is_read_with_all_its_labels(part: Part) -> None:
    add, total = part.exercises
    assert (add.name, add.file, add.symbol, add.lesson) == ("add", "engine.py", "add", "Adding")
    assert add.task == "Add two numbers.", f"the task is the first sentence under the heading, got {add.task!r}"
    assert (add.difficulty, add.minutes, total.minutes) == ("easy", 5, 120)
    hints = ("There is an operator\nfor it.", "It is +.", "a, +, b.")
    assert add.hints == hints, f"a hint goes on to the next label: {add.hints}"
    expected = ("tests/part01/test_total.py::test_three", "tests/part01/test_total.py::test_none")
    assert total.tests == expected, f"`Test:` takes several, with commas between: got {total.tests}"
    assert "'Adding many'" in total.task, f"without a sentence of its own the task names the lesson: {total.task!r}"


@pytest.mark.parametrize("label", LABELS)
def test_a_missing_label_is_named(root: Path, label: str) -> None:
    path = root / "part01_made_up" / "exercises.md"
    path.write_text(path.read_text().replace(f"{label}: ", f"{label.lower()} ", 1))
    with pytest.raises(WorkshopError, match=f"exercise add has no line `{label}: …`"):
        read_exercises(path.parent)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Difficulty: simple", "add: expected easy or medium or hard, got 'simple'"),
        ("Time: soon", "add: expected `Time: N minutes`, got 'soon'"),
    ],
)
def test_a_label_that_says_something_else(root: Path, line: str, message: str) -> None:
    path = root / "part01_made_up" / "exercises.md"
    label = line.partition(":")[0]
    path.write_text(re.sub(rf"^{label}: .*$", line, path.read_text(), count=1, flags=re.MULTILINE))
    with pytest.raises(WorkshopError, match=message):
        read_exercises(path.parent)


def test_an_exercise_described_twice_is_refused(root: Path) -> None:
    path = root / "part01_made_up" / "exercises.md"
    path.write_text(path.read_text().replace("## total", "## add"))
    with pytest.raises(WorkshopError, match="add is described twice"):
        read_exercises(path.parent)


def test_unknown_parts_and_exercises_are_refused_with_the_known_ones(root: Path, part: Part) -> None:
    assert [p.name for p in read_parts(root)] == ["part01_made_up", "part02_bare"], "parts are folders named partNN_…"
    with pytest.raises(WorkshopError, match="no part 3; the parts so far: 1, 2"):
        find_part(root, 3)
    with pytest.raises(WorkshopError, match="no exercise 'addd': expected add, total"):
        part.select(["addd"])


def test_blanking_keeps_all_but_the_bodies(part: Part) -> None:
    text = (part.path / "engine.py").read_text()
    blanked = blank_bodies(text, part.exercises, "engine.py")
    bodies = find_bodies(blanked, "engine.py")
    assert bodies["add"].lines == ('    raise NotImplementedError("part01 add: Add two numbers.")',)
    assert all(bodies[e.name].is_blank(e) for e in part.exercises), "what blanking wrote must be known as blank"
    full = find_bodies(text, "engine.py")
    restored, _ = replace_bodies(blanked, {name: body.lines for name, body in full.items()}, "engine.py")
    assert restored == text, "blanking and putting the bodies back must give the same file"


def test_replaced_lines_keep_their_line_numbers() -> None:
    text = "a\n# exercise: x\nold\n# exercise: end\nb"
    new, numbers = replace_bodies(text, {"x": ["1", "2", "3"], "y": ["no such marker"]}, "f.py")
    assert new == "a\n# exercise: x\n1\n2\n3\n# exercise: end\nb"
    assert numbers == [1, 2, 2, 2, 2, 4, 5], f"new lines count as the marker above them, got {numbers}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# exercise: x\n", "f.py:1: .* has no `# exercise: end`"),
        ("# exercise: end\n", "f.py:1: .* has no start marker"),
        ("# exercise: x\n# exercise: y\n# exercise: end\n", "f.py:2: .* comes before the end of `# exercise: x`"),
        ("# exercise: x\n# exercise: end\n" * 2, "f.py:3: exercise x appears a second time"),
    ],
)
def test_unmatched_markers_are_named_with_their_line(text: str, message: str) -> None:
    with pytest.raises(WorkshopError, match=message):
        find_bodies(text, "f.py")


def test_an_undescribed_exercise_is_refused() -> None:
    with pytest.raises(WorkshopError, match="exercise x is not described in exercises.md"):
        blank_bodies("# exercise: x\n# exercise: end\n", [], "f.py")


@pytest.mark.parametrize("real", PARTS, ids=lambda part: part.name)
def test_the_parts_of_the_course_blank_to_code_that_compiles(real: Part) -> None:
    assert real.exercises, f"{real.name}/exercises.md describes no exercise"
    where = {name for path in sources(real.path) for name in find_bodies(path.read_text("utf-8"), str(path))}
    assert where == {e.name for e in real.exercises}, f"{real.name}: exercises.md and the markers name different ones"
    for path in sources(real.path):
        blanked = blank_bodies(path.read_text("utf-8"), real.exercises, str(path))
        if path.suffix == ".py":  # CUDA C++ is compiled by the tests of each exercise, see test_exercises.py
            compile(blanked, str(path), "exec")


@pytest.mark.parametrize("real", PARTS, ids=lambda part: part.name)
def test_the_exercises_of_the_course_name_existing_files(real: Part) -> None:
    reference_bodies(real)
    for exercise in real.exercises:
        where = f"{real.name}/exercises.md, {exercise.name}"
        text = (real.path / exercise.file).read_text("utf-8")
        assert exercise.name in find_bodies(text, exercise.file), f"{where}: {exercise.file} has no such exercise"
        for test in exercise.tests:
            assert (ROOT / test.partition("::")[0]).is_file(), f"{where}: {test} is not there"
        page, _, section = exercise.lesson.rpartition(".md: ")  # `Section` of README.md, or `PAGE.md: Section`
        page = f"{page}.md" if page else "README.md"
        sections = (real.path / page).read_text("utf-8").splitlines()
        assert f"## {section}" in sections, f"{where}: {page} has no section {section!r}"


@pytest.mark.parametrize("real", PARTS, ids=lambda part: part.name)
def test_the_lessons_of_the_course_show_their_images_in_a_copy(real: Part, tmp_path: Path) -> None:
    for name in ("common", "docs", "results", "GLOSSARY.md", *(part.name for part in PARTS)):
        (tmp_path / name).symlink_to(ROOT / name)
    learner = Part(tmp_path, real.name, real.exercises)
    start(learner)
    for page in sorted(learner.copy.rglob("*.md")):
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        links = re.findall(r"\]\(([^)#\s:]+)[)#]", text)
        lost = [link for link in links if not (page.parent / link).exists()]
        place = page.relative_to(learner.copy)
        assert not lost, f"{place} of workspace/{real.name} links to {lost}, which are not there"
