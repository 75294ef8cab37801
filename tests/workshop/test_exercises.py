"""Every exercise of every part: its blank and its wrong solutions fail tests that say why; the reference passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from workshop import workspace
from workshop.bodies import find_bodies, replace_bodies
from workshop.course import Exercise, Part, read_parts
from workshop.doctor import find_compiler
from workshop.results import Failure
from workshop.runner import Runner
from workshop.wrong import WrongSolution, read_wrong_solutions, write_wrong_copy

ROOT = Path(__file__).resolve().parents[2]
MIN_WRONG = 2
PARTS = read_parts(ROOT)
CASES = [
    pytest.param(part, exercise, id=f"{part.name[:6]}-{exercise.name}") for part in PARTS for exercise in part.exercises
]


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    """One warm process for all parts, so that imports are shared."""
    with Runner(PARTS[0]) as runner:
        yield runner


@pytest.fixture(scope="module")
def blank_copy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Part], Part]:
    """Starts a part as a learner does, once for all its exercises."""
    root = tmp_path_factory.mktemp("blank")

    @cache
    def start(part: Part) -> Part:
        (root / part.name).symlink_to(part.path)
        learner = Part(root, part.name, part.exercises)
        workspace.start(learner)
        return learner

    return start


@pytest.fixture(scope="module")
def wrong_copy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Part, WrongSolution], Part]:
    """Writes a wrong solution, once for both tests of it."""

    @cache
    def write(part: Part, wrong: WrongSolution) -> Part:
        learner = Part(tmp_path_factory.mktemp(wrong.path.stem), part.name, part.exercises)
        write_wrong_copy(part, wrong, learner.workspace)
        return learner

    return write


def first_failure(runner: Runner, exercise: Exercise, folder: Path, tests: list[str], what: str) -> Failure:
    """The first failure of these tests on the copy in a folder."""
    result = runner.run_exercise(exercise, tests=tests, workspace=folder, max_failures=1)
    assert result is not None, "nothing cancelled this run"
    assert result.failures, f"{what}: all {result.num_tests} tests of {tests} pass, so they do not catch it"
    return result.failures[0]


@contextmanager
def filled(part: Part, exercise: Exercise) -> Iterator[None]:
    """With the reference's body of one exercise in a copy in which all are blank."""
    path = part.copy / exercise.file
    body = find_bodies((part.path / exercise.file).read_text("utf-8"), exercise.file)[exercise.name]
    blank = path.read_text("utf-8")
    path.write_text(replace_bodies(blank, {exercise.name: body.lines}, exercise.file)[0], encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(blank, encoding="utf-8")


@pytest.mark.parametrize(("part", "exercise"), CASES)
def test_an_exercises_tests_catch_wrong_solutions(
    part: Part,
    exercise: Exercise,
    runner: Runner,
    blank_copy: Callable[[Part], Part],
    wrong_copy: Callable[[Part, WrongSolution], Part],
) -> None:
    if not exercise.file.endswith(".py") and find_compiler("g++", "clang++") is None:
        pytest.skip("there is no C++ compiler: install g++ or clang++")
    runner.part = part
    wrongs = read_wrong_solutions(part, exercise)
    assert len(wrongs) >= MIN_WRONG, (
        f"{exercise.name}: expected {MIN_WRONG} plausible wrong solutions in tests/{part.name[:6]}/wrong/"
        f"{exercise.name}-*.patch, got {len(wrongs)}"
    )
    learner = blank_copy(part)
    failure = first_failure(runner, exercise, learner.workspace, list(exercise.tests), "left blank")
    assert failure.message.startswith(exercise.blank), (
        f"left blank, {failure.test} must say which exercise it is, {exercise.blank!r}; it says {failure.message!r}"
    )
    named = [failure.test]
    for wrong in wrongs:
        folder = wrong_copy(part, wrong).workspace
        assert wrong.caught_by.startswith(exercise.tests), (
            f"{wrong.path.name}: {wrong.caught_by} is no test of {exercise.name}, which has {exercise.tests}"
        )
        failure = first_failure(runner, exercise, folder, [wrong.caught_by], f"{wrong.path.name} ({wrong.name})")
        assert "See " in failure.message or "Look at " in failure.message or exercise.symbol in failure.message, (
            f"{wrong.path.name}: {failure.test} must say where to look; it says {failure.message!r}"
        )
        named.append(failure.test)

    with filled(learner, exercise):  # the others stay blank: an exercise's tests depend on no other exercise
        result = runner.run_exercise(exercise, tests=list(dict.fromkeys(named)), workspace=learner.workspace)
    assert result is not None and result.passes, (
        f"the reference's {exercise.name}, with the others blank, must pass {named}; got {result}"
    )


@pytest.mark.parametrize(("part", "exercise"), CASES)
def test_wrong_solutions_change_the_exercise_they_are_named_after_and_nothing_else(
    part: Part, exercise: Exercise, wrong_copy: Callable[[Part, WrongSolution], Part]
) -> None:
    for wrong in read_wrong_solutions(part, exercise):
        learner = wrong_copy(part, wrong)
        right = find_bodies((part.path / exercise.file).read_text("utf-8"), exercise.file)
        text = (learner.copy / exercise.file).read_text("utf-8")
        assert workspace.body_of(learner, exercise) != right[exercise.name], f"{wrong.path.name} changes nothing in it"
        restored, _ = replace_bodies(text, {exercise.name: right[exercise.name].lines}, exercise.file)
        for path in workspace.sources(learner.copy):
            file = path.relative_to(learner.copy).as_posix()
            got = restored if file == exercise.file else path.read_text("utf-8")
            assert got == (part.path / file).read_text("utf-8"), f"{wrong.path.name} changes {file} elsewhere too"


def test_every_wrong_solution_belongs_to_an_exercise() -> None:
    known = {wrong.path for case in CASES for wrong in read_wrong_solutions(*case.values)}
    strays = sorted(set(ROOT.glob("tests/part*/wrong/*")) - known)
    assert not strays, f"expected NAME-short-title.patch, with the NAME of an exercise of that part; got {strays}"
