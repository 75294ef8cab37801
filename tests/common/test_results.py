"""common/results.py: what a result file contains, what it must not contain, and what is refused."""

import getpass
import json
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common import results
from common.results import git_commit, machine_stamp, median, read_result, timed_repeats, write_result


def write_example(path: Path, **changes: Any) -> None:
    fields: dict[str, Any] = {
        "benchmark": "part04",
        "config": {"model": "tiny", "block_size": 16},
        "seed": 0,
        "repeats": 3,
        "measurements": {"tokens_per_s": [10.0, 11.5, 10.5]},
    }
    write_result(path, **(fields | changes))


def git(root: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    git(tmp_path, "init")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "part01.json").write_text("{}")
    (tmp_path / "code.py").write_text("one = 1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    return tmp_path


def test_a_result_reads_back_as_written(tmp_path: Path) -> None:
    path = tmp_path / "results" / "part04.json"
    write_example(path)
    result = read_result(path)
    assert result["benchmark"] == "part04"
    assert result["config"] == {"model": "tiny", "block_size": 16}
    assert result["measurements"] == {"tokens_per_s": [10.0, 11.5, 10.5]}
    assert (result["seed"], result["repeats"], result["schema_version"]) == (0, 3, results.SCHEMA_VERSION)
    assert result["machine"] == machine_stamp()
    assert result["commit"] == git_commit()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", result["date"]), f"date {result['date']!r} is more than a day"


def test_the_same_result_gives_the_same_bytes(tmp_path: Path) -> None:
    write_example(tmp_path / "a.json", config={"x": 1, "y": 2})
    write_example(tmp_path / "b.json", config={"y": 2, "x": 1})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes(), "keys are not sorted"
    assert (tmp_path / "a.json").read_text().endswith("}\n"), "the file must end with a newline"


def test_a_value_that_json_cannot_hold_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "part04.json"
    write_example(path)
    before = path.read_bytes()
    with pytest.raises(ValueError):
        write_example(path, measurements={"tokens_per_s": float("nan")})
    with pytest.raises(TypeError):
        write_example(path, config={"path": Path("x")})
    assert path.read_bytes() == before, "a failed write_result() destroyed the result before it"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 99}, "schema_version=99, expected 1"),
        ({"extra": 1}, "unknown fields: extra"),
        ({"seed": None}, "seed=None has the wrong type NoneType"),
        ({"repeats": True}, "repeats=True has the wrong type bool"),
        ({"measurements": [1]}, r"measurements=\[1\] has the wrong type list"),
    ],
)
def test_read_result_names_file_and_field(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "part04.json"
    write_example(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=f"part04.json: .*{message}"):
        read_result(path)


def test_read_result_names_a_missing_field(tmp_path: Path) -> None:
    path = tmp_path / "part04.json"
    write_example(path)
    result = json.loads(path.read_text())
    del result["machine"]
    path.write_text(json.dumps(result))
    with pytest.raises(ValueError, match="missing or unknown fields: machine"):
        read_result(path)


@pytest.mark.parametrize(("text", "message"), [("{", "not JSON"), ("[]", "expected a JSON object, got list")])
def test_read_result_refuses_other_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "part04.json").write_text(text)
    with pytest.raises(ValueError, match=f"part04.json: {message}"):
        read_result(tmp_path / "part04.json")


def test_machine_stamp_has_hardware_and_versions_but_no_identity() -> None:
    stamp = machine_stamp()
    expected = {"cpu", "cpu_cores", "memory_gib", "gpu", "os", "python", "torch", "torch_num_threads", "transformers"}
    assert stamp.keys() == expected
    assert stamp["python"] == platform.python_version()
    assert stamp["cpu"], "the CPU model is empty"
    values = [str(value) for value in stamp.values()]
    for private in (platform.node(), getpass.getuser(), str(Path.home())):
        assert private not in values, f"the stamp reveals {private!r}"


def test_git_commit_of_a_clean_tree(repository: Path) -> None:
    commit = git_commit(repository)
    assert commit is not None and re.fullmatch(r"[0-9a-f]{7,}", commit), f"expected a short hash, got {commit!r}"


@pytest.mark.parametrize("changed", ["code.py", "new.py"])
def test_git_commit_marks_a_changed_tree(repository: Path, changed: str) -> None:
    (repository / changed).write_text("two = 2\n")
    commit = git_commit(repository)
    assert commit is not None and commit.endswith("-dirty"), f"{changed} differs from the commit, yet got {commit!r}"


def test_a_new_result_does_not_make_the_tree_dirty(repository: Path) -> None:
    clean = git_commit(repository)
    (repository / "results" / "part01.json").write_text("{ }")
    (repository / "results" / "part02.json").write_text("{}")
    assert git_commit(repository) == clean, "the first benchmark of a session would mark the second one dirty"


def test_git_commit_outside_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit(tmp_path) is None


def test_timed_repeats_calls_warmup_and_repeats_and_synchronizes_around_each() -> None:
    calls: list[str] = []
    seconds = timed_repeats(
        lambda: calls.append("fn"), repeats=2, warmup=1, synchronize=lambda: calls.append("synchronize")
    )
    assert calls == ["fn"] + ["synchronize", "fn", "synchronize"] * 2
    assert len(seconds) == 2 and all(second >= 0 for second in seconds), f"expected two durations, got {seconds}"


@pytest.mark.parametrize(("repeats", "warmup"), [(0, 1), (1, -1)])
def test_timed_repeats_refuses(repeats: int, warmup: int) -> None:
    with pytest.raises(ValueError, match=f"repeats={repeats} .* warmup={warmup}"):
        timed_repeats(lambda: None, repeats, warmup)


def test_median() -> None:
    assert (median([3.0, 1.0, 2.0]), median([4.0, 1.0])) == (2.0, 2.5)
    with pytest.raises(ValueError, match="no values"):
        median([])


def test_importing_results_does_not_import_torch() -> None:
    code = "import sys, common.results; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=results.REPOSITORY_ROOT, check=False)
    assert done.returncode == 0, "import common.results imports torch, which takes seconds"
