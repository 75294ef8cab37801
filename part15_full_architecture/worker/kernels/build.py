"""From a .cu file to a library that can be loaded: by nvcc for a GPU, by a C++ compiler for this CPU.

A library is built once: its name is a hash of the source, the headers that it includes, the flags and the compiler's
version.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from llvmlite.binding import get_host_cpu_name

SOURCES_VARIABLE = "LLM_COURSE_KERNEL_SOURCES"  # a folder in place of cuda/; `workshop check` prepares one
SOURCES = Path(os.environ.get(SOURCES_VARIABLE) or Path(__file__).parent / "cuda")
INCLUDE = re.compile(rb'^[ \t]*#[ \t]*include[ \t]*"([^"\n]+)"', re.MULTILINE)
CACHE_VARIABLE, BUILDING = "LLM_COURSE_KERNEL_CACHE", "building-"
# -O1 and -g1 (lines, no variables): half the compile time of -O2 -g, and 5% slower kernels, most of whose time goes to
# switching threads.
CPU_FLAGS = ("-std=c++17", "-O1", "-g1", "-march=native", "-fno-strict-aliasing", "-fPIC", "-shared", "-pthread")
WARNINGS = ("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror=return-type")
CUDA_FLAGS = ("-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC", "-shared", "-cudart", "static")


STALE_S = 3_600.0  # a folder in the cache that is older belongs to a build that was killed


class NoCompilerError(RuntimeError):
    """There is no compiler for this target, or it does not work; the message says which, or how to get one."""


class CompileError(RuntimeError):
    """The compiler has refused a source; the message has what it printed."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a library is for. arch: "cpu", or a GPU's compute capability such as "sm_90". sanitizer: for a CPU, "thread"
    or "address"; "" for none. defines: macros that the source knows."""

    arch: str
    sanitizer: str = ""
    defines: tuple[str, ...] = ()


def build(source: Path, target: Target) -> Path:
    """The library of a source, which is compiled if that has not been done before.

    Raises NoCompilerError, CompileError, or OSError if the cache cannot be written. Several processes may build the
    same library at once.
    """
    command = compile_command(target)
    library = cache_directory() / f"{source.stem}-{target.arch}-{digest(source, command)}.so"
    if is_intact(library):
        return library
    with temporary_directory(library.parent) as directory:
        output = Path(directory) / library.name
        # Relative paths, so that neither the library nor the compiler's messages depend on where the sources are.
        arguments = [*command, os.path.relpath(source, SOURCES), "-o", str(output)]
        done = subprocess.run(arguments, cwd=SOURCES, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CompileError(f"{source.name} for {target.arch}: {command[0]} failed:\n{done.stderr or done.stdout}")
        if not output.exists():
            raise CompileError(f"{source.name} for {target.arch}: {command[0]} succeeded, but wrote no library")
        checksum_path(output).write_text(checksum(output))
        for path in (output, checksum_path(output)):
            path.replace(library.parent / path.name)
    return library


def is_intact(library: Path) -> bool:
    """Whether a library exists and is whole: one that was cut off would kill the process that loads it."""
    path = checksum_path(library)
    return library.exists() and path.exists() and path.read_text() == checksum(library)


def checksum_path(library: Path) -> Path:
    return library.with_suffix(".sha256")


def checksum(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()


def temporary_directory(parent: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder in the cache. Removes what killed builds have left there. Raises OSError that names the variable."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for path in parent.glob(f"{BUILDING}*"):
            if time.time() - path.stat().st_mtime > STALE_S:
                shutil.rmtree(path, ignore_errors=True)
        return tempfile.TemporaryDirectory(prefix=BUILDING, dir=parent)
    except OSError as error:
        raise OSError(f"cannot write compiled kernels to {parent}: {error.strerror}; set {CACHE_VARIABLE}") from error


def compile_command(target: Target) -> list[str]:
    """The compiler and all flags, without the source and the output, to be run in SOURCES. Raises NoCompilerError."""
    defines = [f"-D{define}" for define in target.defines]
    if target.arch != "cpu":
        return [find_nvcc(), f"-arch={target.arch}", *CUDA_FLAGS, *nvcc_paths(), *defines, "-I."]
    sanitize = [f"-fsanitize={target.sanitizer}"] if target.sanitizer else []
    return [find_cxx(), *CPU_FLAGS, *WARNINGS, *sanitize, *defines, "-I.", "-x", "c++"]


def digest(source: Path, command: list[str]) -> str:
    """A hash of all that a library depends on; -march=native depends on the CPU."""
    cpu = get_host_cpu_name() if "-march=native" in command else ""
    found = hashlib.sha256("\0".join([cpu, version(command[0]), *command[1:]]).encode())
    for path in with_headers(source):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def with_headers(source: Path) -> list[Path]:
    """A source and what it includes by a name in quotes, directly or in turn."""
    found = [source.resolve()]
    for path in found:  # it grows
        for name in map(os.fsdecode, INCLUDE.findall(path.read_bytes())):
            places = [(folder / name).resolve() for folder in (path.parent, SOURCES)]
            header = next((place for place in places if place.is_file()), path)
            found += [header] if header not in found else []
    return found


@cache
def version(compiler: str) -> str:
    """The compiler's version string. Raises NoCompilerError if it does not run."""
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise NoCompilerError(f"{compiler} --version failed: {error}") from None


def find_cxx() -> str:
    """A C++ compiler: the one in CXX, or g++, or clang++. Raises NoCompilerError."""
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["g++", "clang++"]:
        if path := shutil.which(name):
            return path
    if wanted:
        raise NoCompilerError(f"CXX is {wanted!r}: expected the name or path of a C++ compiler")
    raise NoCompilerError("no C++ compiler was found: install g++ (apt install g++) or clang, or set CXX")


def find_nvcc() -> str:
    """nvcc: of CUDA_HOME, of the wheel nvidia-cuda-nvcc, or in PATH. Raises NoCompilerError."""
    home = os.environ.get("CUDA_HOME")
    wheel = wheel_directory()
    places = [Path(home) / "bin" / "nvcc" if home else None, wheel / "bin" / "nvcc" if wheel else None]
    for place in places:
        if place is not None and place.exists():
            return str(place)
    if path := shutil.which("nvcc"):
        return path
    raise NoCompilerError("nvcc was not found: pip install -e '.[cuda]' brings it, or set CUDA_HOME")


def wheel_directory() -> Path | None:
    """Where the wheels of CUDA 13 put their files, if they are installed."""
    for path in sys.path:
        if (directory := Path(path) / "nvidia" / "cu13").joinpath("bin", "nvcc").exists():
            return directory
    return None


def nvcc_paths() -> list[str]:
    """Where nvcc of a wheel finds its libraries; an installed CUDA knows that itself."""
    wheel = wheel_directory()
    if wheel is None or not find_nvcc().startswith(str(wheel)):
        return []
    return [f"-I{wheel / 'include'}", f"-L{wheel / 'lib'}"]


def cache_directory() -> Path:
    """Where libraries are kept: LLM_COURSE_KERNEL_CACHE, or a directory in the user's cache."""
    if directory := os.environ.get(CACHE_VARIABLE):
        return Path(directory).expanduser().resolve()
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "llm-engine-course" / "kernels"
