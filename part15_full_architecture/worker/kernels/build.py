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
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SOURCES_VARIABLE = "LLM_COURSE_KERNEL_SOURCES"  # a folder in place of cuda/; `workshop check` prepares one
SOURCES = Path(os.environ.get(SOURCES_VARIABLE) or Path(__file__).parent / "cuda")
INCLUDE = re.compile(rb'^[ \t]*#[ \t]*include[ \t]*"([^"\n]+)"', re.MULTILINE)
CACHE_VARIABLE = "LLM_COURSE_KERNEL_CACHE"
CPU_FLAGS = ("-std=c++17", "-O2", "-g", "-march=native", "-fno-strict-aliasing", "-fPIC", "-shared", "-pthread")
WARNINGS = ("-Wall", "-Wextra", "-Wno-unknown-pragmas")
CUDA_FLAGS = ("-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC", "-shared", "-cudart", "static")


class NoCompilerError(RuntimeError):
    """There is no compiler for this target; the message says how to get one."""


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

    Raises NoCompilerError or CompileError. Several processes may build the same library at once.
    """
    command = compile_command(target)
    library = cache_directory() / f"{source.stem}-{target.arch}-{digest(source, command)}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as directory:
        output = Path(directory).resolve() / library.name
        # Relative paths, so that neither the library nor the compiler's messages depend on where the sources are.
        arguments = [*command, os.path.relpath(source, SOURCES), "-o", str(output)]
        done = subprocess.run(arguments, cwd=SOURCES, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CompileError(f"{source.name} for {target.arch}: {command[0]} failed:\n{done.stderr or done.stdout}")
        output.replace(library)
    return library


def compile_command(target: Target) -> list[str]:
    """The compiler and all flags, without the source and the output, to be run in SOURCES. Raises NoCompilerError."""
    defines = [f"-D{define}" for define in target.defines]
    if target.arch != "cpu":
        return [find_nvcc(), f"-arch={target.arch}", *CUDA_FLAGS, *nvcc_paths(), *defines, "-I."]
    sanitize = [f"-fsanitize={target.sanitizer}"] if target.sanitizer else []
    return [find_cxx(), *CPU_FLAGS, *WARNINGS, *sanitize, *defines, "-I.", "-x", "c++"]


def digest(source: Path, command: list[str]) -> str:
    """A hash of all that a library depends on."""
    found = hashlib.sha256("\0".join([version(command[0]), *command[1:]]).encode())
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
    """What a compiler says of itself."""
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout


def find_cxx() -> str:
    """A C++ compiler: the one in CXX, or g++, or clang++. Raises NoCompilerError."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
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
        return Path(directory)
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "llm-engine-course" / "kernels"
