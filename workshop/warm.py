"""A process that has already imported what the tests need, most of all torch, and forks for each run.

Started by `workshop.runner`. Each line of its standard input is a Job; for each it prints the pid that runs it and, at
the end, an exit status. It then imports whatever else the run imported, so that later runs start faster. Where forking
is not safe, it runs one job itself and exits, and the runner starts the next process at once.
"""

from __future__ import annotations

import ast
import faulthandler
import gc
import hashlib
import importlib
import json
import os
import sys
import tempfile
import traceback
import warnings
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TextIO

# macOS has fork, but its system libraries are not fork-safe; WORKSHOP_NO_FORK is for the tests.
CAN_FORK = sys.platform.startswith("linux") and "WORKSHOP_NO_FORK" not in os.environ


@dataclass(frozen=True, slots=True)
class Job:
    """One run of pytest. modules: what must be importable first; lent: exercises whose bodies come from the reference.

    limit_s: its time limit.
    """

    workspace: str
    reference: str
    modules: list[str]
    lent: list[str]
    tests: list[str]
    max_failures: int
    limit_s: float
    events: str
    log: str


def main() -> None:
    """Arguments: files and folders whose imports are made in advance."""
    replies = os.fdopen(os.dup(1), "w")
    redirect(os.devnull, 1)  # imports must not print between the replies
    preload([Path(argument) for argument in sys.argv[1:]])
    gc.freeze()  # these objects stay: children need not scan them
    warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)  # idle threads of BLAS
    for line in sys.stdin:
        job = Job(**json.loads(line))
        if not CAN_FORK:
            reply(replies, pid=os.getpid())
            reply(replies, status=run(job))
            break
        with tempfile.TemporaryFile("w+") as imported:
            pid = os.fork()
            if pid == 0:
                run_and_exit(job, imported)
            reply(replies, pid=pid)
            reply(replies, status=os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            imported.seek(0)
            for module in imported.read().split():
                try_import(module)
        gc.freeze()


def reply(replies: TextIO, **fields: int) -> None:
    replies.write(json.dumps(fields) + "\n")
    replies.flush()


def redirect(path: str, *descriptors: int) -> None:
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    for descriptor in descriptors:
        os.dup2(file, descriptor)
    os.close(file)


def preload(paths: list[Path]) -> None:
    """Import what these files import at the top, except course parts, their tests, and modules that fail."""
    for module in ("pytest", "hypothesis", *(entry.module for entry in entry_points(group="pytest11"))):
        try_import(module)  # pytest and its plugins
    files = [file for path in paths for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    for file in files:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                modules = [node.module]
            for module in modules:
                if not module.startswith(("part", "tests.part")) and module not in sys.modules:
                    try_import(module)


def importable() -> list[str]:
    """The imported modules, except course parts (most of all the learner's) and their tests."""
    names = [name for name, module in sys.modules.items() if getattr(module, "__spec__", None)]
    return [name for name in names if name != "conftest" and not name.startswith(("part", "tests."))]


def try_import(module: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError:
        return


def run_and_exit(job: Job, imported: TextIO) -> None:
    """Run a job in the forked child, and write the names of its imports to a file."""
    status, before = 1, set(importable())
    try:
        redirect(os.devnull, 0)
        status = run(job)
        imported.write("\n".join(name for name in importable() if name not in before))
        imported.flush()
    finally:
        os._exit(status)  # no exit handlers: they belong to the parent


def use_kernel_cache(job: Job) -> None:
    """Give Numba a cache folder for these kernels alone. Numba finds a compiled kernel by its file's path and time, and
    does not see which bodies of that file are lent."""
    digest = hashlib.sha256()
    for path in sorted((Path(job.workspace) / Path(job.reference).name).rglob("*.py")):
        text = path.read_bytes()
        if b"numba" in text:
            lent = [name for name in job.lent if f"# exercise: {name}\n".encode() in text]
            digest.update(repr((str(path), text, lent)).encode())
    folder = str(Path(job.events).parent / f"numba-{digest.hexdigest()[:16]}")
    os.environ["NUMBA_CACHE_DIR"] = folder  # for child processes, and for an import of Numba that is still to come
    if "numba" in sys.modules:
        sys.modules["numba"].config.CACHE_DIR = folder


def run(job: Job) -> int:
    """Run pytest on the learner's copy. Returns its exit status."""
    redirect(job.log, 1, 2)
    log = os.open(job.log, os.O_WRONLY | os.O_APPEND)  # pytest takes 1 and 2 for itself
    faulthandler.dump_traceback_later(job.limit_s, exit=True, file=log)
    import pytest

    from workshop.lending import CopyFinder, install
    from workshop.pytest_plugin import EventWriter

    reference = Path(job.reference)
    writer = EventWriter(Path(job.events), Path(job.workspace) / reference.name)
    install(CopyFinder(Path(job.workspace), reference, job.lent))
    use_kernel_cache(job)
    for module in job.modules:  # pytest would report such a failure at length, or abort if it is in a conftest.py
        try:
            importlib.import_module(module)
        except Exception as error:
            writer.write_failure(module, error, "".join(traceback.format_exception(error)))
            return 1
    options = ["--rootdir=.", "--import-mode=importlib", f"--maxfail={job.max_failures}"]
    options += ["-p", "no:faulthandler", "-p", "no:cacheprovider", "-p", "no:xdist"]
    return int(pytest.main([*options, *job.tests], [writer]))


if __name__ == "__main__":
    main()
