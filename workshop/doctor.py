"""`workshop doctor`: check that this machine has what the course needs, and say how to fix the rest.

It needs no packages, so it runs before anything is installed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from workshop import COMMAND

PYTHON_VERSIONS = ((3, 10), (3, 13))
MIN_CORES, MIN_MEMORY_GB, MIN_DISK_GB, SERVER_PORT = 2, 4.0, 5.0, 8000
INSTALL = f"run `make setup`, then use {COMMAND}"


class Level(Enum):
    OK = "ok"
    NOTE = "note"  # the course works, with a limit
    MISSING = "MISSING"


@dataclass(frozen=True)  # without slots, so that it runs on a Python that is too old, and says so
class Finding:
    """The result of one check. advice: what to do, empty if nothing."""

    level: Level
    what: str
    found: str
    advice: str = ""


def main(root: Path) -> int:
    """Print all findings. Returns 1 if something required is missing, else 0."""
    findings = [finding for check in CHECKS for finding in check(root)]
    for finding in findings:
        print(f"{finding.level.value:<8} {finding.what:<10} {finding.found}")
        if finding.advice:
            print(f"{'':<19} -> {finding.advice}")
    num_missing = sum(finding.level is Level.MISSING for finding in findings)
    print(f"\n{num_missing} of these must be fixed first" if num_missing else "\nThis machine can run the course: "
          f"{COMMAND} start 1")  # fmt: skip
    return 1 if num_missing else 0


def check_python(root: Path) -> list[Finding]:
    oldest, newest = PYTHON_VERSIONS
    found = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info[:2] < oldest:
        return [Finding(Level.MISSING, "Python", found, "3.10 or newer is needed: make setup PYTHON=python3.12")]
    if sys.version_info[:2] > newest:
        return [
            Finding(Level.NOTE, "Python", found, "tested up to 3.13; if a package fails: make setup PYTHON=python3.13")
        ]
    return [Finding(Level.OK, "Python", found)]


def check_cores(root: Path) -> list[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores < MIN_CORES:
        advice = "all parts run; parts 9 to 14 start several processes and will be slow"
        return [Finding(Level.NOTE, "cores", str(cores), advice)]
    return [Finding(Level.OK, "cores", str(cores))]


def check_memory(root: Path) -> list[Finding]:
    names = ("SC_PHYS_PAGES", "SC_PAGE_SIZE")
    if not hasattr(os, "sysconf") or not all(name in os.sysconf_names for name in names):
        return [Finding(Level.NOTE, "memory", "unknown", f"{MIN_MEMORY_GB:g} GB are enough for the shipped models")]
    memory_gb = os.sysconf(names[0]) * os.sysconf(names[1]) / 1e9
    if memory_gb < MIN_MEMORY_GB:
        advice = f"{MIN_MEMORY_GB:g} GB are recommended: close other programs, or add swap"
        return [Finding(Level.NOTE, "memory", f"{memory_gb:.1f} GB", advice)]
    return [Finding(Level.OK, "memory", f"{memory_gb:.1f} GB")]


def check_disk(root: Path) -> list[Finding]:
    free_gb = shutil.disk_usage(root).free / 1e9
    if free_gb < MIN_DISK_GB:
        advice = f"torch alone takes several GB: free {MIN_DISK_GB:g} GB, unless `make setup` is done"
        return [Finding(Level.NOTE, "disk", f"{free_gb:.1f} GB free", advice)]
    return [Finding(Level.OK, "disk", f"{free_gb:.1f} GB free")]


def check_ports(root: Path) -> list[Finding]:
    try:
        with socket.create_server(("127.0.0.1", SERVER_PORT)):
            return [Finding(Level.OK, "ports", f"127.0.0.1:{SERVER_PORT} is free")]
    except OSError as error:
        advice = f'use another port: make serve PART=1 ARGS="--port {SERVER_PORT + 1}", or stop what uses it'
        return [Finding(Level.NOTE, "ports", f"127.0.0.1:{SERVER_PORT}: {error.strerror}", advice)]


def check_compiler(root: Path) -> list[Finding]:
    compiler = find_compiler("c++", "g++", "clang++")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if compiler is None:
        advice = f"only part 15's C++ kernels need one: {compiler_advice()}"
        return [Finding(Level.NOTE, "compiler", "no C++ compiler", advice)]
    if not header.is_file():
        advice = f"part 15 needs it: sudo apt install python3.{sys.version_info.minor}-dev (or your system's package)"
        return [Finding(Level.NOTE, "compiler", f"{compiler}, but no Python.h", advice)]
    return [Finding(Level.OK, "compiler", compiler)]


def check_cuda_compiler(root: Path) -> list[Finding]:
    """The exercises in CUDA C++ are emulated on the CPU, so nvcc is not needed."""
    compiler = find_compiler("g++", "clang++")
    if compiler is None:
        advice = f"only part 15's CUDA exercises need one: {compiler_advice()}"
        return [Finding(Level.NOTE, "CUDA C++", "no g++ or clang++", advice)]
    return [Finding(Level.OK, "CUDA C++", f"{compiler}, which builds part 15's CUDA exercises for the CPU")]


def find_compiler(*names: str) -> str | None:
    """The path of the compiler in CXX, if that is set, else of the first of these names."""
    wanted = os.environ.get("CXX")
    return next((path for name in ([wanted] if wanted else names) if (path := shutil.which(name))), None)


def compiler_advice() -> str:
    return "xcode-select --install" if sys.platform == "darwin" else "sudo apt install g++ (or your system's package)"


def check_gpu(root: Path) -> list[Finding]:
    """Ask nvidia-smi for the GPU and, in a separate process, torch whether it can use it."""
    tool = shutil.which("nvidia-smi")
    query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"] if tool else []
    cards = run_quietly(query).splitlines() if query else []
    if not cards:
        return [Finding(Level.OK, "GPU", "none; not needed, every part runs on the CPU")]
    if run_quietly([sys.executable, "-c", "import torch; print(torch.cuda.is_available())"]) != "True":
        advice = "the CPU works too; for the GPU install torch's CUDA build: pip install -c constraints.txt torch"
        return [Finding(Level.NOTE, "GPU", f"{cards[0]}, which torch cannot use", advice)]
    return [Finding(Level.OK, "GPU", "; ".join(cards))]


def run_quietly(command: list[str]) -> str:
    """The output of a command, empty if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def check_packages(root: Path) -> list[Finding]:
    """Compare the installed packages with constraints.txt, which pins all that the course needs."""
    if importlib.util.find_spec("packaging") is None:
        return [Finding(Level.MISSING, "packages", "not installed", INSTALL)]
    from packaging.requirements import Requirement

    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line.strip() and not line.lstrip().startswith("#")]
    needed = direct_dependencies(root)
    missing, other = [], []
    for pin in pins:
        if pin.marker is not None and not pin.marker.evaluate():
            continue
        try:
            version = importlib.metadata.version(pin.name)
        except importlib.metadata.PackageNotFoundError:
            missing += [pin.name] if pin.name in needed else []
            continue
        if not pin.specifier.contains(version.partition("+")[0], prereleases=True):
            other.append(f"{pin.name} {version} (tested: {str(pin.specifier).lstrip('=')})")
    findings = []
    if missing:
        findings.append(Finding(Level.MISSING, "packages", f"not installed: {', '.join(missing)}", INSTALL))
    if other:
        findings.append(
            Finding(Level.NOTE, "packages", f"other versions: {', '.join(other)}", f"probably fine; if not, {INSTALL}")
        )
    return findings or [Finding(Level.OK, "packages", "as in constraints.txt")]


def direct_dependencies(root: Path) -> set[str]:
    """The names under `dependencies` and `dev` in pyproject.toml, without platform-specific ones."""
    from packaging.requirements import InvalidRequirement, Requirement

    names, is_needed = set(), True
    for line in (root / "pyproject.toml").read_text(encoding="utf-8").splitlines():
        text = line.strip().rstrip(",")
        if line[:1].strip():
            is_needed = not line.startswith("clients")  # those have an environment of their own
        if is_needed and line.startswith("    ") and text[:1] == text[-1:] == '"':  # tomllib needs Python 3.11
            try:
                requirement = Requirement(text.strip('"'))
            except InvalidRequirement:
                continue
            names |= {requirement.name} if requirement.marker is None else set()
    return names


def check_models(root: Path) -> list[Finding]:
    folders = sorted(path.parent for path in (root / "models").glob("*/config.json"))
    if not folders:
        return [
            Finding(Level.MISSING, "models", "models/ is empty", "clone the repository again: the models ship in it")
        ]
    findings = []
    for folder in folders:
        if problem := weights_problem(folder / "model.safetensors"):
            advice = f"git checkout models/{folder.name}, or git lfs pull if your clone uses LFS"
            findings.append(Finding(Level.MISSING, "models", f"{folder.name}: {problem}", advice))
    return findings or [Finding(Level.OK, "models", ", ".join(folder.name for folder in folders))]


def weights_problem(path: Path) -> str:
    """What is wrong with a safetensors file (8 bytes of length, a JSON header, the data); empty if nothing."""
    if not path.is_file():
        return "no model.safetensors"
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        if length > size:
            return f"model.safetensors is not a safetensors file ({size:,} bytes)"
        try:
            tensors = json.loads(file.read(length))
            end = max(tensor["data_offsets"][1] for name, tensor in tensors.items() if name != "__metadata__")
        except (ValueError, KeyError, TypeError):
            return "model.safetensors has a broken header"
    expected = 8 + length + end
    return "" if size == expected else f"model.safetensors has {size:,} bytes, expected {expected:,}"


CHECKS: list[Callable[[Path], list[Finding]]] = [
    check_python, check_cores, check_memory, check_disk, check_ports, check_compiler, check_cuda_compiler, check_gpu,
    check_packages, check_models,
]  # fmt: skip
