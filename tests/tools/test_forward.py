"""`tools.forward` on made-up parts in a temporary git repository."""

import os
import subprocess
from pathlib import Path

import pytest

from tools import forward, snapshots

ONE, TWO, THREE, FOUR = PARTS = ("part01_one", "part02_two", "part03_three", "part04_four")
BODY = '"""Engine."""\n\n\ndef first():\n    return 1\n\n\ndef middle():\n    return 2\n\n\ndef last():\n    return 3\n'


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of four parts: engine.py grows in parts 2 and 3, same.py never changes, gone.py is not in part 3."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)  # a git hook sets GIT_DIR, which would lead to the wrong repository
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    (tmp_path / "CONTRIBUTING.md").write_text(f"{snapshots.MAP_BEGIN}\n{snapshots.MAP_END}\n")
    engines = [BODY, BODY + "\n\ndef two():\n    pass\n"]
    engines += [engines[1].replace("last", "final"), engines[1].replace("last", "final")]
    for part, engine in zip(PARTS, engines, strict=True):
        write(tmp_path, f"{part}/engine.py", engine)
        write(tmp_path, f"{part}/same.py", BODY)
        if part != THREE:
            write(tmp_path, f"{part}/gone.py", BODY)
    write(tmp_path, f"{TWO}/README.md", table("| `engine.py` | changed | x |"))
    write(tmp_path, f"{THREE}/README.md", table("| `engine.py` | changed | x |", "| `gone.py` | removed | x |"))
    write(tmp_path, f"{FOUR}/README.md", table("| `gone.py` | new | x |"))
    git(tmp_path, "init", "-q")
    commit(tmp_path)
    return tmp_path


def table(*rows: str) -> str:
    return "\n".join(["## What changed", "", "| file | | why |", "|---|---|---|", *rows, ""])


def git(root: Path, *arguments: str) -> None:
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false", *arguments]
    subprocess.run(command, cwd=root, check=True)


def commit(root: Path) -> None:
    git(root, "add", "-A")
    git(root, "commit", "-qm", "state")


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def edit(root: Path, name: str, old: str, new: str) -> None:
    text = (root / name).read_text()
    assert old in text, f"the test expects {old!r} in {name}"
    write(root, name, text.replace(old, new))


def run(root: Path, *arguments: str) -> int:
    return forward.main(["--root", str(root), "--no-tests", *arguments])


def read(root: Path, path: str) -> list[str]:
    return [(root / part / path).read_text() for part in PARTS]


def test_a_fix_reaches_every_later_part(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = read(root, "engine.py")
    edit(root, f"{ONE}/engine.py", "return 1", "return 10")
    status = run(root, f"{ONE}/engine.py")
    out, err = capsys.readouterr()
    assert status == 0, f"a clean carry exits 0, got {status}: {err}"
    expected = [text.replace("return 1\n", "return 10\n") for text in before]
    assert read(root, "engine.py") == expected, "each part must get the fix and keep what it had added itself"
    assert f"{TWO}: merged" in out, f"the report must say what happened in each part: {out}"
    assert f"{FOUR}: copied" in out, f"parts 3 and 4 were identical, so part 4 gets a copy: {out}"


def test_step_diffs_and_map_are_regenerated(root: Path) -> None:
    edit(root, f"{ONE}/engine.py", "return 2", "return 20")
    assert run(root, f"{ONE}/engine.py") == 0
    diff = (root / THREE / "step.diff").read_text()
    assert "     return 20\n" in diff, f"step.diff of part 3 must show the fixed text around its own change:\n{diff}"
    assert "| `engine.py` | new | changed | changed | same |" in (root / "CONTRIBUTING.md").read_text()


def test_identical_copies_stay_identical(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(root, f"{ONE}/same.py", "return 2", "return 20")
    assert run(root, f"{ONE}/same.py") == 0
    assert set(read(root, "same.py")) == {BODY.replace("return 2", "return 20")}, "all four must get the fix"
    assert capsys.readouterr().out.count("copied") == 3, "three later parts get a copy"


def test_carrying_twice_changes_nothing_more(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(root, f"{ONE}/engine.py", "return 1", "return 10")
    run(root, f"{ONE}/engine.py")
    once = read(root, "engine.py")
    capsys.readouterr()
    assert run(root, f"{ONE}/engine.py") == 0
    assert read(root, "engine.py") == once, "a second run must find the fix in place"
    assert capsys.readouterr().out.count("already has it") == 3


def test_a_conflict_stops_and_the_carry_goes_on_from_there(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(root, f"{ONE}/engine.py", "def last", "def close")  # part 3 renamed the same line
    edit(root, f"{ONE}/same.py", "return 2", "return 20")
    untouched = (root / FOUR / "engine.py").read_text()
    status = run(root, f"{ONE}/engine.py", f"{ONE}/same.py")
    err = capsys.readouterr().err
    conflicted = (root / THREE / "engine.py").read_text()
    assert status == 1, f"a conflict exits 1, got {status}"
    assert "def close" in (root / TWO / "engine.py").read_text(), "part 2, before the conflict, keeps the fix"
    assert f"<<<<<<< {THREE}/engine.py" in conflicted, f"the markers must be in part 3's file:\n{conflicted}"
    first = conflicted.splitlines().index(f"<<<<<<< {THREE}/engine.py") + 1
    assert f"CONFLICT in {THREE}/engine.py, lines {first}-{first + 4}" in err, f"name file and lines: {err}"
    assert f"python -m tools.forward {THREE}/engine.py {ONE}/same.py" in err, f"name the next command: {err}"
    assert (root / FOUR / "engine.py").read_text() == untouched, "nothing is carried past a conflict"
    assert (root / TWO / "same.py").read_text() == BODY, "files after the conflict wait"

    assert run(root, f"{ONE}/engine.py") == 2, "carrying again over unresolved markers must be refused"
    assert f"{THREE}/engine.py: conflict markers" in capsys.readouterr().err

    write(root, f"{THREE}/engine.py", untouched.replace("final", "close_final"))
    assert run(root, f"{THREE}/engine.py", f"{ONE}/same.py") == 0, capsys.readouterr().err
    assert "def close_final" in (root / FOUR / "engine.py").read_text(), "the resolution, not the first fix, goes on"
    touched = forward.touched_parts(root, [forward.PartFile(THREE, "engine.py")])
    assert touched == list(PARTS), f"the parts carried before the conflict are tested too, got {touched}"


def test_a_gap_ends_the_chain(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(root, f"{ONE}/gone.py", "return 2", "return 20")
    assert run(root, f"{ONE}/gone.py") == 0
    assert "return 20" in (root / TWO / "gone.py").read_text()
    assert (root / FOUR / "gone.py").read_text() == BODY, "part 4's gone.py is another module: part 3 has none"
    assert f"{THREE}: has no gone.py; the chain ends here" in capsys.readouterr().out


def test_a_part_that_has_the_fix_at_head_ends_the_chain(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(root, f"{TWO}/same.py", "return 2", "return 20")
    commit(root)
    edit(root, f"{ONE}/same.py", "return 2", "return 20")
    run(root, f"{ONE}/same.py")
    assert (root / THREE / "same.py").read_text() == BODY, "part 2 changes nothing, so nothing is merged into part 3"
    assert f"{TWO}: already had the fix" in capsys.readouterr().out, "the user must learn that the chain ended"


def test_a_part_not_committed_yet_is_carried_through(root: Path) -> None:
    write(root, "part05_five/same.py", BODY.replace("last", "draft"))
    write(root, "part06_six/same.py", BODY.replace("last", "draft"))
    edit(root, f"{ONE}/same.py", "return 2", "return 20")
    run(root, f"{ONE}/same.py")
    expected = BODY.replace("last", "draft").replace("return 2", "return 20")
    for part in ("part05_five", "part06_six"):
        assert (root / part / "same.py").read_text() == expected, f"{part}: expected its own text with the fix"


def marked(body: str, function: str, exercise: str) -> str:
    """The body with markers around the one line of a function."""
    before, definition, after = body.partition(f"def {function}():\n")
    line, _, rest = after.partition("\n")
    return f"{before}{definition}    # exercise: {exercise}\n{line}\n    # exercise: end\n{rest}"


def test_every_part_keeps_its_own_exercise_markers(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fixes of lines that are between markers in one part or the other."""
    write(root, f"{ONE}/same.py", marked(BODY, "middle", "two"))
    write(root, f"{TWO}/same.py", marked(BODY, "first", "one"))
    write(root, f"{FOUR}/same.py", marked(marked(BODY, "last", "three"), "middle", "two_again"))
    commit(root)
    before = read(root, "same.py")
    edit(root, f"{ONE}/same.py", "return 1", "return 10")
    edit(root, f"{ONE}/same.py", "return 2", "return 20")
    assert run(root, f"{ONE}/same.py") == 0, capsys.readouterr().err
    expected = [text.replace("return 1\n", "return 10\n").replace("return 2", "return 20") for text in before]
    assert read(root, "same.py") == expected, "each part must get the fix and keep its own markers"
    out = capsys.readouterr().out
    assert out.count("copied (the two were identical)") == 3 and "check where" not in out, out
    assert run(root, f"{ONE}/same.py") == 0 and capsys.readouterr().out.count("already has it") == 3


def test_a_conflict_inside_an_exercise_keeps_its_markers(root: Path) -> None:
    write(root, f"{TWO}/engine.py", marked(BODY.replace("return 2", "return 22"), "middle", "two"))
    commit(root)
    edit(root, f"{ONE}/engine.py", "return 2", "return 20")
    assert run(root, f"{ONE}/engine.py") == 1
    conflicted = (root / TWO / "engine.py").read_text()
    assert "    # exercise: two\n    return 22\n    # exercise: end\n=======\n    return 20\n" in conflicted, conflicted


def test_a_line_added_next_to_a_marker_is_reported(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(root, f"{TWO}/same.py", marked(BODY, "middle", "two"))
    commit(root)
    edit(root, f"{ONE}/same.py", "def middle():\n", "def middle():\n    check()\n")
    run(root, f"{ONE}/same.py")
    text = (root / TWO / "same.py").read_text()
    assert "    check()\n    # exercise: two\n    return 2\n    # exercise: end\n" in text, text
    out = capsys.readouterr().out
    assert f"{TWO}: copied (the two were identical); check where the exercise two begins and ends" in out, out


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (f"{ONE}/same.py", "same as in HEAD"),
        (f"{ONE}/exercise.py", "only exercise markers changed"),
        (f"{ONE}/fresh.py", "not in HEAD"),
        (f"{ONE}/marked.py", "conflict markers at lines 1-5"),
        (f"{ONE}/absent.py", "no such file"),
        (f"{TWO}/README.md", "not a source file"),
        ("README.md", "not a file of a part"),
        ("common/util.py", "not a file of a part"),
        ("../elsewhere.py", "not a file of a part"),
        (ONE, "not a file of a part"),
    ],
)
def test_wrong_usage_is_one_clear_line(
    root: Path, capsys: pytest.CaptureFixture[str], argument: str, message: str
) -> None:
    write(root, f"{ONE}/marked.py", "x = 1\n")
    write(root, f"{ONE}/exercise.py", BODY)
    commit(root)
    write(root, f"{ONE}/marked.py", "<<<<<<< ours\nx = 1\n=======\nx = 2\n>>>>>>> theirs\n")
    write(root, f"{ONE}/fresh.py", BODY)
    write(root, f"{ONE}/exercise.py", marked(BODY, "first", "one"))
    edit(root, f"{ONE}/engine.py", "return 1", "return 10")
    before = read(root, "engine.py")
    status = run(root, f"{ONE}/engine.py", argument)
    err = capsys.readouterr().err
    assert status == 2, f"wrong usage exits 2, got {status}: {err}"
    assert err.startswith(f"forward: {argument}") and message in err, f"expected {message!r} about {argument}: {err}"
    assert err.count("\n") == 1, f"expected one line: {err}"
    assert read(root, "engine.py") == before, "all arguments are checked before any file is written"


def test_a_wrong_table_after_the_carry_is_reported(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(root, f"{TWO}/same.py", "return 2", "return 20")
    assert run(root, f"{TWO}/same.py") == 1, "part 2 now differs from part 1 in same.py, which its table does not say"
    assert "does not list `same.py`: add the row | `same.py` | changed |" in capsys.readouterr().err


def test_tests_of_touched_parts_run(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("tests/part02", "tests/part04", "tests/contract"):
        (root / folder).mkdir(parents=True)
    ran: list[list[str]] = []

    def fail_tests(root: Path, parts: list[str]) -> bool:
        ran.append(forward.folders_to_test(root, parts))
        return False

    monkeypatch.setattr(forward, "run_tests", fail_tests)
    edit(root, f"{ONE}/gone.py", "return 2", "return 20")
    status = forward.main(["--root", str(root), f"{ONE}/gone.py"])
    assert ran == [["tests/part02", "tests/contract"]], "parts 1 and 2 were touched and part 1 has no tests"
    assert status == 1, "failing tests must fail the command"
    assert run(root, f"{ONE}/gone.py") == 0 and len(ran) == 1, "--no-tests must not run them"
