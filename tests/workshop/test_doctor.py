"""The doctor on machines that lack something."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from workshop import doctor
from workshop.doctor import Level

ROOT = Path(__file__).resolve().parents[2]


def weights(num_bytes: int = 8) -> bytes:
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "__metadata__": {}}).encode()
    return len(header).to_bytes(8, "little") + header + b"\0" * num_bytes


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A repository with one good model and two pinned packages."""
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "models" / "tiny" / "config.json").write_text("{}")
    (tmp_path / "models" / "tiny" / "model.safetensors").write_bytes(weights())
    (tmp_path / "constraints.txt").write_text(
        '# pins\none==1.0\ntwo==2.0; python_version >= "3.0"\nold==1; python_version < "3"\n'
    )
    (tmp_path / "pyproject.toml").write_text('dependencies = [\n    "one>=1",\n]\n')
    return tmp_path


def install(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_it_runs_without_packages_and_accepts_this_machine() -> None:
    code = "import sys; sys.modules['rich'] = None; from workshop.__main__ import main; sys.exit(main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"this machine runs the tests, so it can run the course: {done.stdout}{done.stderr}"
    for what in ("Python", "cores", "memory", "disk", "ports", "compiler", "CUDA C++", "GPU", "packages", "models"):
        assert f" {what} " in done.stdout, f"the doctor must look at {what}: {done.stdout}"


def test_something_missing_ends_with_1_and_says_what_to_do(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "CHECKS", [doctor.check_packages, doctor.check_models])
    install(monkeypatch, one="1.0", two="2.0")
    assert doctor.main(machine) == 0, capsys.readouterr().out
    install(monkeypatch, two="2.0")
    assert doctor.main(machine) == 1
    out = capsys.readouterr().out
    assert "MISSING  packages   not installed: one" in out and "-> run `make setup`" in out, out


@pytest.mark.parametrize(
    ("versions", "level", "found"),
    [
        ({"one": "1.0", "two": "2.0"}, Level.OK, "as in constraints.txt"),
        ({"one": "1.0+cpu", "two": "2.0"}, Level.OK, "as in constraints.txt"),
        ({"one": "1.0"}, Level.OK, "as in constraints.txt"),  # two is needed by others only
        ({"one": "1.1", "two": "2.0"}, Level.NOTE, "other versions: one 1.1 (tested: 1.0)"),
        ({"two": "2.0"}, Level.MISSING, "not installed: one"),
    ],
)
def test_packages(
    machine: Path, monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], level: Level, found: str
) -> None:
    install(monkeypatch, **versions)
    (finding,) = doctor.check_packages(machine)
    assert (finding.level, finding.found) == (level, found), f"got {finding}"
    assert bool(finding.advice) is (level is not Level.OK), f"every problem must come with advice: {finding}"


def test_the_real_project_needs_what_it_lists() -> None:
    needed = doctor.direct_dependencies(ROOT)
    assert {"torch", "rich", "pytest"} <= needed, f"from both lists of pyproject.toml, got {needed}"
    assert "guidellm" not in needed, f"make test-clients has an environment of its own, got {needed}"
    assert "triton" not in needed, "what is for one platform only is not missing elsewhere"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (weights(), ""),
        (weights(4), "bytes, expected"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not a safetensors file"),
        (b"\x02\0\0\0\0\0\0\0{]", "broken header"),
        (None, "no model.safetensors"),
    ],
    ids=["whole", "cut short", "LFS pointer", "broken", "absent"],
)
def test_models(machine: Path, content: bytes | None, problem: str) -> None:
    path = machine / "models" / "tiny" / "model.safetensors"
    path.unlink() if content is None else path.write_bytes(content)
    (finding,) = doctor.check_models(machine)
    expected = Level.MISSING if problem else Level.OK
    assert finding.level is expected and problem in finding.found, f"got {finding}"


def test_no_models_at_all(tmp_path: Path) -> None:
    (finding,) = doctor.check_models(tmp_path)
    assert finding.level is Level.MISSING, f"got {finding}"


def test_a_port_in_use(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(doctor, "SERVER_PORT", taken.getsockname()[1])
        (finding,) = doctor.check_ports(machine)
    assert finding.level is Level.NOTE and "--port" in finding.advice, f"got {finding}"


@pytest.mark.parametrize(
    ("version", "level"), [((3, 9, 1), Level.MISSING), ((3, 10, 0), Level.OK), ((3, 99, 0), Level.NOTE)]
)
def test_python(machine: Path, monkeypatch: pytest.MonkeyPatch, version: tuple[int, ...], level: Level) -> None:
    monkeypatch.setattr(sys, "version_info", version)
    (finding,) = doctor.check_python(machine)
    assert finding.level is level, f"{version}: got {finding}"


def test_a_small_machine_gets_notes(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    monkeypatch.setattr(os, "sysconf", lambda name: 4096 if name == "SC_PAGE_SIZE" else 250_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(1e9))
    monkeypatch.setattr(shutil, "which", lambda _: None)
    for check in (
        doctor.check_cores, doctor.check_memory, doctor.check_disk, doctor.check_compiler, doctor.check_cuda_compiler,
    ):  # fmt: skip
        (finding,) = check(machine)
        assert finding.level is Level.NOTE and finding.advice, f"expected a note with advice, got {finding}"
    (finding,) = doctor.check_gpu(machine)
    assert finding.level is Level.OK, f"a missing GPU is not a problem, got {finding}"


@pytest.mark.parametrize(("usable", "level"), [("True", Level.OK), ("False", Level.NOTE), ("", Level.NOTE)])
def test_a_gpu(machine: Path, monkeypatch: pytest.MonkeyPatch, usable: str, level: Level) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(doctor, "run_quietly", lambda command: "H200, 141 GB" if "smi" in command[0] else usable)
    (finding,) = doctor.check_gpu(machine)
    assert finding.level is level and "H200" in finding.found, f"torch says {usable!r}: got {finding}"


@pytest.mark.parametrize(
    ("cxx", "installed", "expected"),
    [
        ("", {"g++", "clang++"}, "/bin/g++"),
        ("", {"c++", "clang++"}, "/bin/clang++"),
        ("my-cxx", {"my-cxx", "g++"}, "/bin/my-cxx"),
        ("absent", {"g++"}, None),  # part 15's build.py::find_cxx would not take another one, either
        ("", {"c++"}, None),  # part 15's build.py::find_cxx would not find it either
    ],
)
def test_a_compiler_for_the_cuda_exercises(
    machine: Path, monkeypatch: pytest.MonkeyPatch, cxx: str, installed: set[str], expected: str | None
) -> None:
    monkeypatch.setenv("CXX", cxx)
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if name in installed else None)
    (finding,) = doctor.check_cuda_compiler(machine)
    if expected is None:
        assert finding.level is Level.NOTE and "install" in finding.advice, f"it must say what to install: {finding}"
    else:
        assert finding.level is Level.OK and finding.found.startswith(f"{expected}, "), f"CXX={cxx!r}: got {finding}"
