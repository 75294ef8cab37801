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
import inspect
import json
import os
import signal
import sys
import tempfile
import traceback
import warnings
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import entry_points
from itertools import takewhile
from pathlib import Path
from typing import TextIO

from common import startup
from workshop.course import WorkshopError
from workshop.kernel_sources import use_kernel_sources
from workshop.lending import CopyFinder, install

# macOS has fork, but its system libraries are not fork-safe; WORKSHOP_NO_FORK is for the tests.
CAN_FORK = sys.platform.startswith("linux") and "WORKSHOP_NO_FORK" not in os.environ
WAIT_FACTOR = 4


@dataclass(frozen=True, slots=True)
class Job:
    """One run of pytest. modules: what must be importable first; lent: exercises whose bodies come from the reference.

    marks: as pytest's -m; limit_s: the processor time of each test, since the machine may be busy with other things;
    a test that only waits is stopped after WAIT_FACTOR times as long.
    """

    workspace: str
    reference: str
    modules: list[str]
    lent: list[str]
    tests: list[str]
    marks: str
    max_failures: int
    limit_s: float
    events: str
    log: str


def main() -> None:
    """Arguments: files and folders whose imports are made in advance."""
    replies = os.fdopen(os.dup(1), "w")
    redirect(os.devnull, 1)  # imports must not print between the replies
    startup.begin()
    preload([Path(argument) for argument in sys.argv[1:]])
    know_files()
    startup.end()  # these objects stay: children need not scan them
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
        know_files()
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


def imported_after(last: str) -> list[str]:
    """The modules imported after another, except course parts (most of all the learner's) and their tests.

    It looks at no others: a fork copies the memory of each object that it looks at.
    """
    new = list(takewhile(lambda name: name != last, reversed(sys.modules)))[::-1]
    names = [name for name in new if getattr(sys.modules[name], "__spec__", None)]
    return [name for name in names if name != "conftest" and not name.startswith(("part", "tests."))]


def try_import(module: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError:
        return


def know_files() -> None:
    """Let `inspect` note the files of all modules so far: else each child does, when pytest shows a failure."""
    inspect.getmodule(compile("", "no module's file", "exec"))


def run_and_exit(job: Job, imported: TextIO) -> None:
    """Run a job in the forked child, and write the names of its imports to a file."""
    status, last = 1, next(reversed(sys.modules))
    try:
        redirect(os.devnull, 0)
        status = run(job)
        imported.write("\n".join(imported_after(last)))
        imported.flush()
    finally:
        os._exit(status)  # no exit handlers: they belong to the parent


def use_kernel_cache(folder: Path, finder: CopyFinder) -> None:
    """Let copies share compiled kernels, which take seconds, if these are compiled from the same code.

    Numba finds a compiled kernel by its file's path and content, and does not see which bodies of the file are lent.
    """
    digest = hashlib.sha256(finder.reference.name.encode())
    copy = finder.workspace / finder.reference.name
    for path in sorted(copy.rglob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if "numba" in text:
            with suppress(WorkshopError):  # a missing marker: the import reports it
                text, _ = finder.lend(text, path)
            digest.update(repr((str(path.relative_to(copy)), text)).encode())
    os.environ["NUMBA_CACHE_DIR"] = str(folder / f"numba-{digest.hexdigest()[:16]}")
    os.environ["NUMBA_CACHE_LOCATOR_CLASSES"] = "workshop.kernel_locator.KernelLocator"
    if "numba" in sys.modules:
        sys.modules["numba"].config.reload_config()


def run(job: Job) -> int:
    """Run pytest on the learner's copy. Returns its exit status."""
    redirect(job.log, 1, 2)
    log = os.open(job.log, os.O_WRONLY | os.O_APPEND)  # pytest takes 1 and 2 for itself

    def start_clock() -> None:
        if hasattr(signal, "setitimer"):  # not on Windows
            signal.setitimer(signal.ITIMER_PROF, job.limit_s)
        faulthandler.dump_traceback_later(WAIT_FACTOR * job.limit_s, exit=True, file=log)

    if hasattr(signal, "setitimer"):
        faulthandler.register(signal.SIGPROF, file=log, chain=True)  # the signal then ends the process
    start_clock()
    import pytest

    from workshop.explain import Locator
    from workshop.pytest_plugin import EventWriter

    reference = Path(job.reference)
    locator = Locator(Path(job.workspace) / reference.name, job.lent)
    writer = EventWriter(Path(job.events), locator, start_clock)
    finder = CopyFinder(Path(job.workspace), reference, job.lent)
    install(finder)
    use_kernel_cache(Path(job.events).parent, finder)
    use_kernel_sources(Path(job.events).parent, finder)
    for module in job.modules:  # pytest would report such a failure at length, or abort if it is in a conftest.py
        try:
            importlib.import_module(module)
        except Exception as error:
            writer.write_failure(module, error, "".join(traceback.format_exception(error)))
            return 1
    options = [
        "--rootdir=.",
        "--import-mode=importlib",
        f"--maxfail={job.max_failures}",
        "--assert=plain",
        "-m",
        job.marks,
    ]
    # Rewriting the asserts, and looking for garbage five times at the end, take longer than most of these tests.
    unused = ("faulthandler", "cacheprovider", "xdist", "unraisableexception", "threadexception")
    options += [word for name in unused for word in ("-p", f"no:{name}")]
    return int(pytest.main([*options, *job.tests], [writer]))


if __name__ == "__main__":
    main()
