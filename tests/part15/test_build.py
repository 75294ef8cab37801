"""From a .cu file to a library: the cache, and compilers that do not work."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from part15_full_architecture.worker.kernels import build as builder
from part15_full_architecture.worker.kernels.build import CACHE_VARIABLE, CompileError, NoCompilerError, Target, build

LOOK = "See worker/kernels/build.py::build"
PROGRAM = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a library, in an empty cache. Skips the test if there is no compiler."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(builder, "SOURCES", tmp_path)
    try:
        builder.find_cxx()
    except NoCompilerError as error:
        pytest.skip(str(error))
    path = tmp_path / "answer.cu"
    path.write_text(PROGRAM)
    return path


def answer_of(library: Path) -> int:
    """In a process of its own: a damaged library would kill this one."""
    code = f"import ctypes; print(ctypes.CDLL({str(library)!r}).answer())"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def test_a_library_is_built_once(source: Path) -> None:
    library = build(source, Target("cpu"))
    built_ns = library.stat().st_mtime_ns
    assert ctypes.CDLL(str(library)).answer() == 42
    assert build(source, Target("cpu")).stat().st_mtime_ns == built_ns, f"it was built again. {LOOK}"
    assert sorted(path.suffix for path in library.parent.iterdir()) == [".sha256", ".so"], "nothing else remains"


@pytest.mark.parametrize("size", [0, 5_000, None])
def test_a_damaged_library_is_built_again(size: int | None, source: Path) -> None:
    """size: to which it is cut; None: its checksum is missing."""
    library = build(source, Target("cpu"))
    if size is None:
        library.with_suffix(".sha256").unlink()
    else:
        os.truncate(library, size)
    assert answer_of(build(source, Target("cpu"))) == 42, f"{size}: a damaged library was used. {LOOK}"


@pytest.mark.parametrize(
    ("cxx", "message"),
    [("absent", "CXX is 'absent': expected the name or path"), ("/bin/false", "/bin/false --version failed")],
)
def test_a_compiler_that_does_not_work(cxx: str, message: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", cxx)
    with pytest.raises(NoCompilerError, match=message):
        build(source, Target("cpu"))


def test_a_compiler_that_writes_nothing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/bin/true")
    with pytest.raises(CompileError, match="answer.cu for cpu: /bin/true succeeded, but wrote no library"):
        build(source, Target("cpu"))


def test_a_function_without_a_return_is_refused(source: Path) -> None:
    source.write_text('extern "C" int answer() { }\n')
    with pytest.raises(CompileError, match=r"answer.cu:1:.*(return|non-void)"):
        build(source, Target("cpu"))


def test_a_relative_cache(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, ".")
    monkeypatch.chdir(source.parent)
    library = build(source, Target("cpu"))
    assert library.is_absolute() and answer_of(library) == 42, f"the loader looks for names without a slash: {library}"


def test_a_cache_that_is_a_file(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(OSError, match=f"cannot write compiled kernels to .*; set {CACHE_VARIABLE}"):
        build(source, Target("cpu"))


def test_what_a_killed_build_has_left_is_removed(source: Path, tmp_path: Path) -> None:
    folders = {name: tmp_path / "cache" / f"building-{name}" for name in ("old", "new")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    long_ago = time.time() - 2 * builder.STALE_S
    os.utime(folders["old"], (long_ago, long_ago))
    build(source, Target("cpu"))
    assert {name: folder.exists() for name, folder in folders.items()} == {"old": False, "new": True}, LOOK
