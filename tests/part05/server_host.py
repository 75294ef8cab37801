"""Servers for test_process.py: a process that has imported the part forks each of them, so that none imports it anew.

Reads orders, a JSON object a line, and answers each with one. The engine core of such a server is forked as well
instead of spawned; one test starts everything as a user does. Run with `python -m tests.part05.server_host`.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from common.checkpoint import load_tokenizer, resolve_checkpoint
from part05_async_scheduling import __main__ as part
from part05_async_scheduling.api import async_engine, core_client
from part05_async_scheduling.core import engine, engine_core
from part05_async_scheduling.worker import model_runner, worker

POISON = 4_000  # a prompt with this token makes a step of the model fail
FORK = multiprocessing.get_context("fork")
TINY = resolve_checkpoint("tiny")
TOKENIZER = load_tokenizer(TINY)
DECODER = worker.load_decoder(TINY, torch.float32, "cpu")


def main() -> None:
    # What a server leaves behind becomes this process's child, and not the whole machine's.
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
    statuses: dict[int, int] = {}
    for line in sys.stdin:
        order = json.loads(line)
        answer: dict[str, Any] = {}
        if "argv" in order:
            pid = os.fork()
            if pid == 0:
                serve_and_exit(order)
            answer["pid"] = pid
        elif "wait" in order:
            deadline = time.monotonic() + order["timeout"]
            while order["wait"] not in statuses and time.monotonic() < deadline:
                reap(statuses)
                time.sleep(0.005)
            answer["status"] = statuses.get(order["wait"])
        elif "end" in order:
            end_all()
        else:
            reap(statuses)
            answer["alive"] = children_of(os.getpid())
        print(json.dumps(answer), flush=True)
    end_all()


def end_all() -> None:
    for pid in children_of(os.getpid()):
        os.kill(pid, signal.SIGKILL)


def reap(statuses: dict[int, int]) -> None:
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            statuses[ended[0]] = os.waitstatus_to_exitcode(ended[1])


def children_of(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, ppid = path.read_text().rpartition(")")[2].split()[:2]
            if int(ppid) == parent and state != "Z":
                found.append(int(path.parent.name))
    return found


def serve_and_exit(order: dict[str, Any]) -> None:
    """As a program ends, only that it does not tear down what it has imported, which takes seconds."""
    status: Any = 0
    try:
        serve(order)
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def serve(order: dict[str, Any]) -> None:
    """In the child, which has what takes long to load from its parent."""
    os.setsid()
    sys.stdin = Path(os.devnull).open()  # noqa: SIM115
    for stream in (1, 2):
        fd = os.open(order["stdout" if stream == 1 else "stderr"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(fd, stream)
        os.close(fd)
    warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12 about forks beside threads
    tempfile.tempdir = order["temporary"]
    sys.argv = ["part05_async_scheduling", *order["argv"]]
    run, load = model_runner.ModelRunner.run, engine_core.LLMEngine

    def poisoned(self: Any, batch: Any) -> Any:
        if any(POISON in token_ids for _, token_ids in batch.new_rows):
            raise ZeroDivisionError("the cat sat on it")
        time.sleep(order["step_s"])
        return run(self, batch)

    def find(model: str) -> Any:
        return TINY if model == "tiny" else resolve_checkpoint(model)

    def slow(config: Any) -> Any:
        print("loading", os.getpid(), flush=True)
        time.sleep(order["slow"])
        return load(config)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(core_client.multiprocessing, "get_context", lambda _: FORK))
        stack.enter_context(mock.patch.object(model_runner.ModelRunner, "run", poisoned))
        stack.enter_context(mock.patch.object(worker, "load_decoder", lambda *_: DECODER))
        for module in (async_engine, engine, worker):
            stack.enter_context(mock.patch.object(module, "resolve_checkpoint", find))
        stack.enter_context(mock.patch.object(async_engine, "load_tokenizer", lambda _: TOKENIZER))
        stack.enter_context(mock.patch.object(core_client, "SHUTDOWN_TIMEOUT_S", order["timeout"]))
        if order.get("slow"):
            stack.enter_context(mock.patch.object(engine_core, "LLMEngine", slow))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        part.main()


if __name__ == "__main__":
    main()
