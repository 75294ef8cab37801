"""`workshop bundle`. (That a bundle suffices for `make setup` takes minutes and gigabytes: it is tried by hand.)"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from workshop import bundle
from workshop.__main__ import ROOT
from workshop.bundle import download_command, make_bundle, requirements
from workshop.course import WorkshopError
from workshop.doctor import direct_dependencies


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """With one commit."""
    root = tmp_path / "course"
    root.mkdir()
    (root / "constraints.txt").write_text("")
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@example.com"]
    for words in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], check=True)
    return root


def test_it_asks_for_what_set_up_installs() -> None:
    names = {Requirement(each).name for each in requirements()}
    assert direct_dependencies(ROOT) - {"nvidia-cuda-nvcc"} <= names | {"ray", "lm-eval"}, names
    assert "torch" in names and "pytest" in names and "ray" not in names, f"dependencies and dev, no more: {names}"
    command = download_command(ROOT, Path("wheels"), ["--index-url=https://example.com"])
    assert command[1:4] == ["-m", "pip", "download"] and "--index-url=https://example.com" in command
    assert command[command.index("-c") + 1] == str(ROOT / "constraints.txt"), "the tested versions"
    assert any(each.startswith("setuptools") for each in command), "to build the course itself"


def test_a_bundle_has_the_repository_and_instructions(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip downloads nothing here."""
    python = [sys.executable, "-c", "import sys, pathlib; pathlib.Path(sys.argv[1]).mkdir()"]
    monkeypatch.setattr(bundle, "download_command", lambda root, wheels, args: [*python, str(wheels)])
    folder, said = tmp_path / "stick" / "bundle", []
    make_bundle(repository, folder, [], said.append)
    assert (folder / "wheels").is_dir() and "GB" in said[-1]
    text = (folder / "README.txt").read_text()
    assert f"Python {sys.version_info[0]}.{sys.version_info[1]}" in text and "make setup" in text, text
    [clone] = [line.split() for line in text.splitlines() if "git clone" in line]
    subprocess.run([*clone, "-q"], cwd=folder, check=True)
    assert (folder / "llm-engine-course" / "constraints.txt").is_file(), "the repository can be cloned from it"


def test_a_folder_in_use_is_left_alone(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    for folder in (tmp_path / "full", tmp_path / "full" / "file"):
        with pytest.raises(WorkshopError, match="has other contents than a bundle: name a new folder"):
            make_bundle(repository, folder, [], print)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]


def test_what_fails_is_named(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WorkshopError, match="is not a git repository"):
        make_bundle(tmp_path, tmp_path / "bundle", [], print)
    failing = [sys.executable, "-c", "import sys; sys.exit('ERROR: no matching distribution for torch')"]
    monkeypatch.setattr(bundle, "download_command", lambda *args: failing)
    with pytest.raises(WorkshopError, match="status 1: ERROR: no matching distribution for torch"):
        make_bundle(repository, tmp_path / "bundle", [], print)


def test_a_download_that_failed_is_continued(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import sys, pathlib; folder = pathlib.Path(sys.argv[1]); folder.mkdir(exist_ok=True)"
    script += "; [each] = [*folder.iterdir()] or sys.exit((folder / 'one.whl').write_text('x'))"
    monkeypatch.setattr(bundle, "download_command", lambda root, wheels, args: [sys.executable, "-c", script, wheels])
    with pytest.raises(WorkshopError, match="failed with status 1"):
        make_bundle(repository, tmp_path / "bundle", [], print)
    make_bundle(repository, tmp_path / "bundle", [], print)
    assert sorted(each.name for each in (tmp_path / "bundle").iterdir()) == sorted(bundle.CONTENTS)
