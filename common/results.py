"""Result files: what was measured, on which machine, from which commit.

Every published number comes from a file results/partNN.json, written by write_result() and read by read_result().
"""

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.stats import percentile

SCHEMA_VERSION = 1
REPOSITORY_ROOT = Path(__file__).resolve().parents[1]

_FIELDS: dict[str, type | tuple[type, ...]] = {
    "schema_version": int,
    "benchmark": str,
    "date": str,
    "commit": (str, type(None)),
    "machine": dict,
    "config": dict,
    "seed": int,
    "repeats": int,
    "measurements": dict,
}


def machine_stamp() -> dict[str, str | int | float | None]:
    """The hardware and versions that results depend on, without host name, user or paths. Imports torch."""
    import torch

    return {
        "cpu": _cpu_model(),
        "cpu_cores": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torch_num_threads": torch.get_num_threads(),
        "transformers": _version("transformers"),
    }


def git_commit(root: Path = REPOSITORY_ROOT) -> str | None:
    """Short hash of the commit checked out in root, with "-dirty" if files differ from it; None outside git.

    Files under results/ do not count: otherwise each benchmark would mark the next one dirty.
    """
    commit = _git(root, "rev-parse", "--short", "HEAD")
    if commit is None:
        return None
    changes = _git(root, "status", "--porcelain", "--", ":(top)", ":(top,exclude)results")
    return commit if changes == "" else f"{commit}-dirty"


def write_result(
    path: Path,
    *,
    benchmark: str,
    config: Mapping[str, Any],
    seed: int,
    repeats: int,
    measurements: Mapping[str, Any],
    machine: Mapping[str, Any] | None = None,
    commit: str | None = None,
) -> None:
    """Write one benchmark's result as sorted JSON with date (UTC, day only), commit and machine.

    machine, commit: by default machine_stamp() and git_commit(). An existing file is replaced
    atomically, so a benchmark may write while it runs and be killed at any time.

    Raises ValueError for NaN or infinity and TypeError for values that JSON cannot hold; the old file is then kept.
    """
    result = {
        "schema_version": SCHEMA_VERSION,
        "benchmark": benchmark,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": commit or git_commit(),
        "machine": machine_stamp() if machine is None else dict(machine),
        "config": dict(config),
        "seed": seed,
        "repeats": repeats,
        "measurements": dict(measurements),
    }
    text = json.dumps(result, indent=2, sort_keys=True, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def read_result(path: Path) -> dict[str, Any]:
    """Read a result file; raises ValueError naming the file and the field if its format is wrong."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(result, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(result).__name__}")
    if result.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"{path}: schema_version={result.get('schema_version')!r}, expected {SCHEMA_VERSION}")
    if wrong := sorted(_FIELDS.keys() ^ result.keys()):
        raise ValueError(f"{path}: missing or unknown fields: {', '.join(wrong)}")
    for name, kind in _FIELDS.items():
        if not isinstance(result[name], kind) or isinstance(result[name], bool):
            raise ValueError(f"{path}: {name}={result[name]!r} has the wrong type {type(result[name]).__name__}")
    return result


def timed_repeats(
    fn: Callable[[], object], repeats: int, warmup: int = 1, *, synchronize: Callable[[], None] | None = None
) -> list[float]:
    """Seconds that each of `repeats` calls of fn took, after `warmup` calls that are not timed.

    synchronize waits for work that fn only started; on a GPU pass torch.cuda.synchronize, or only launches are timed.
    Raises ValueError if repeats is less than 1 or warmup negative.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats={repeats} must be at least 1 and warmup={warmup} not negative")
    wait = synchronize or (lambda: None)
    for _ in range(warmup):
        fn()
    seconds = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        fn()
        wait()
        seconds.append(time.perf_counter() - start)
    return seconds


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the two middle ones; raises ValueError if there are none."""
    return percentile(values, 50)


def _git(root: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # git is not installed
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (AttributeError, OSError, ValueError):  # not available on Windows and on some kernels
        return None
