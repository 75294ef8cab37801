"""`tools.snapshots` on made-up parts in a temporary folder."""

from pathlib import Path

import pytest

from tools import snapshots

ONE, TWO, THREE = PARTS = ("part01_one", "part02_two", "part03_three")
ENGINE = "class Engine:\n    def step(self):\n        a = 1\n        b = 2\n\n        d = 4\n        return a\n"
TABLE = (
    "# Part\n\n## What changed\n\nWords.\n\n| file | | why |\n|---|---|---|\n{rows}\n## Next\n\n| `x.py` | new | y |\n"
)
ROWS_TWO = "| `engine.py` | changed | it returns d |\n| `kernels/fast.py` | new | speed |\n"
ROWS_THREE = "| `engine.py` | changed | it returns c |\n| `cache.py` | new | room |\n| `old.py` | removed | unused |\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three parts with right tables and everything generated: engine.py changes, old.py goes, two modules come."""
    same = {"old.py": "x = 1\n", "util.py": "y = 1\n"}
    fast = {"kernels/fast.py": "z = 1\n"}
    write_part(tmp_path, ONE, {**same, "engine.py": ENGINE})
    write_part(tmp_path, TWO, {**same, **fast, "engine.py": ENGINE.replace("return a", "return d")}, ROWS_TWO)
    changed = {"engine.py": ENGINE.replace("return a", "return c"), "util.py": same["util.py"], "cache.py": "k = 1\n"}
    write_part(tmp_path, THREE, {**fast, **changed}, ROWS_THREE)
    text = f"# Front\n\n{snapshots.MAP_BEGIN}\nstale\n{snapshots.MAP_END}\n\ntail\n"
    (tmp_path / "CONTRIBUTING.md").write_text(text)
    assert snapshots.main(["--root", str(tmp_path)]) == 0, "the made-up parts must start out right"
    return tmp_path


def write_part(root: Path, part: str, files: dict[str, str], rows: str = "") -> None:
    for name, text in {**files, "README.md": TABLE.format(rows=rows)}.items():
        (root / part / name).parent.mkdir(parents=True, exist_ok=True)
        (root / part / name).write_text(text)


def check(root: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run --check; returns its exit status and its messages."""
    capsys.readouterr()
    status = snapshots.main(["--check", "--root", str(root)])
    return status, capsys.readouterr().err


def test_step_diff_shows_the_step_and_nothing_else(root: Path) -> None:
    expected = (
        f"diff --git a/{ONE}/engine.py b/{TWO}/engine.py\n"
        f"--- a/{ONE}/engine.py\n"
        f"+++ b/{TWO}/engine.py\n"
        "@@ -4,4 +4,4 @@ def step(self):\n"
        "         b = 2\n \n         d = 4\n-        return a\n+        return d\n"
        f"diff --git a/{TWO}/kernels/fast.py b/{TWO}/kernels/fast.py\n"
        "new file mode 100644\n"
        "--- /dev/null\n"
        f"+++ b/{TWO}/kernels/fast.py\n"
        "@@ -0,0 +1 @@\n+z = 1\n"
    )
    assert (root / TWO / "step.diff").read_text() == expected
    assert "deleted file mode" in (root / THREE / "step.diff").read_text(), "part 3 removes old.py"
    assert not (root / ONE / "step.diff").exists(), "the first part has no previous part, so it has no step.diff"


def test_lessons_pictures_and_leftovers_are_ignored(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("plot.png", "notes.md", "__pycache__/engine.py", ".hidden/x.py", "build/gen.py", "engine.py.orig"):
        (root / TWO / name).parent.mkdir(exist_ok=True)
        (root / TWO / name).write_bytes(b"\x00\xff")
    status, err = check(root, capsys)
    assert status == 0, f"none of these is a source file, so nothing may be out of date: {err}"


def test_crlf_checkout_gives_the_same_result(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in [*root.rglob("*.py"), *root.rglob("*.diff"), *root.rglob("*.md")]:
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    status, err = check(root, capsys)
    assert status == 0, f"line ends alone must not make anything out of date: {err}"


def test_step_diff_ignores_the_users_git(
    root: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    home = tmp_path_factory.mktemp("home")
    (home / "attributes").write_text("*.py binary\n")
    (home / "config").write_text(
        "[diff]\n noprefix = true\n mnemonicPrefix = true\n context = 0\n renames = copies\n algorithm = minimal\n"
        " external = false\n colorMoved = zebra\n interHunkContext = 9\n suppressBlankEmpty = true\n wordRegex = .\n"
        "[color]\n ui = always\n"
        f"[core]\n abbrev = 40\n quotePath = false\n attributesFile = {home / 'attributes'}\n pager = false\n"
    )
    (home / ".gitconfig").write_bytes((home / "config").read_bytes())
    (home / "git").mkdir()
    (home / "git" / "attributes").write_text("*.py binary\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(home / "config"))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home))
    monkeypatch.setenv("GIT_EXTERNAL_DIFF", "false")
    monkeypatch.setenv("GIT_DIFF_OPTS", "-u0")
    monkeypatch.setenv("GIT_DIR", str(home / "nowhere"))
    status, err = check(root, capsys)
    assert status == 0, f"the user's git settings must not change step.diff: {err}"


@pytest.mark.parametrize("stale", ["edited", "missing", "source changed"])
def test_check_catches_a_stale_diff(root: Path, capsys: pytest.CaptureFixture[str], stale: str) -> None:
    diff = root / THREE / "step.diff"
    good = diff.read_bytes()
    if stale == "edited":
        diff.write_bytes(good + b"+\n")
    elif stale == "missing":
        diff.unlink()
    else:
        engine = root / THREE / "engine.py"
        engine.write_text(engine.read_text() + "# more\n")
    status, err = check(root, capsys)
    word = "missing" if stale == "missing" else "out of date"
    assert status == 1
    assert err == f"{THREE}/step.diff is {word}: run `python -m tools.snapshots`\n", "name the file and the command"
    assert diff.exists() == (stale != "missing"), "--check writes nothing"
    assert snapshots.main(["--root", str(root)]) == 0, "writing must fix it"
    assert check(root, capsys)[0] == 0, "what was just written is up to date"


def test_first_part_must_not_have_a_step_diff(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / ONE / "step.diff").write_text("")
    status, err = check(root, capsys)
    assert status == 1 and err.startswith(f"{ONE}/step.diff: the first part has no previous part"), err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("| `cache.py` | new | room |\n", "", "does not list `cache.py`: add the row | `cache.py` | new | why |"),
        ("| `old.py` | removed | unused |\n", "", "does not list `old.py`: add the row | `old.py` | removed | why |"),
        ("`cache.py` | new", "`cache.py` | changed", f"lists `cache.py` as changed, but compared with {TWO} it is new"),
        ("`old.py` | removed", "`old.py` | changed", "lists `old.py` as changed"),
        ("| `cache.py`", "| `util.py` | changed | x |\n| `cache.py`", f"lists `util.py`, which is the same in {TWO}"),
        ("| `cache.py`", "| `ghost.py` | new | x |\n| `cache.py`", "lists `ghost.py`, which is not a source file"),
        ("| `cache.py`", "| `step.diff` | new | x |\n| `cache.py`", "lists `step.diff`, which is not a source file"),
        ("| `cache.py`", "| `cache.py` | new | x |\n| `cache.py`", "lists `cache.py` twice"),
        ("| `cache.py`", "| README.md | new | x |\n| `cache.py`", "cannot read the row '| README.md | new | x |'"),
        ("`cache.py` | new", "`cache.py` | added", "expected | `file.py` | new, changed or removed | why |"),
        ("## What changed", "## Changes", "has no section `## What changed`"),
    ],
)
def test_check_catches_a_wrong_table(
    root: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, message: str
) -> None:
    readme = root / THREE / "README.md"
    readme.write_text(readme.read_text().replace(old, new, 1))
    status, err = check(root, capsys)
    assert status == 1, "a table that does not agree with the files must fail the check"
    assert f'{THREE}/README.md, "What changed": ' in err, f"name the part's README: {err}"
    assert message in err, f"expected {message!r} in: {err}"


def test_a_part_without_a_readme_is_reported(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / TWO / "README.md").unlink()
    status, err = check(root, capsys)
    assert status == 1 and f"{TWO}/README.md is missing" in err, err


def test_evolution_map(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = (
        "| module | 1 | 2 | 3 |\n"
        "| --- | --- | --- | --- |\n"
        "| `engine.py` | new | changed | changed |\n"
        "| `old.py` | new | same |  |\n"
        "| `util.py` | new | same | same |\n"
        "| `cache.py` |  |  | new |\n"
        "| `kernels/fast.py` |  | new | same |\n"
        "| files unchanged from the part before |  | 50% | 50% |\n"
    )
    page = root / "CONTRIBUTING.md"
    good = page.read_text()
    assert good == f"# Front\n\n{snapshots.MAP_BEGIN}\n\n{expected}\n{snapshots.MAP_END}\n\ntail\n"
    page.write_text(good.replace("changed", "same"))
    status, err = check(root, capsys)
    assert (status, err) == (1, "CONTRIBUTING.md is out of date: run `python -m tools.snapshots`\n")
    page.write_text("# Front\n")
    status, err = check(root, capsys)
    assert status == 1 and f"CONTRIBUTING.md needs the lines `{snapshots.MAP_BEGIN}`" in err, err


def test_exercise_markers_do_not_count(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marked = ENGINE.replace("        a = 1\n", "        # exercise: step\n        a = 1\n        # exercise: end\n")
    (root / ONE / "engine.py").write_text(marked)
    (root / THREE / "util.py").write_text("# exercise: why\ny = 1\n# exercise: end")
    status, err = check(root, capsys)
    assert status == 0, f"markers alone must not change a diff, the map or a table: {err}"
    assert "exercise" not in (root / TWO / "step.diff").read_text()
    (root / THREE / "util.py").write_text("y = 1  # exercise: why\n")
    status, err = check(root, capsys)
    assert "does not list `util.py`" in err, f"only a line that is nothing but a marker is one: {err}"


def test_a_folder_without_parts_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "part1_short").mkdir()
    assert snapshots.main(["--root", str(tmp_path)]) == 2
    assert "no folder named partNN_" in capsys.readouterr().err
