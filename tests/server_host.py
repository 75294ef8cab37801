"""Forks servers of any part from 3 on: it has imported what takes seconds to import, and loaded the shipped models.

Reads orders, a JSON object a line, and answers each with one: see forked_servers.py. From part 5 on the engine core of
such a server is forked as well instead of spawned, and from part 10 on so are the replicas that a router starts;
tests/contract/test_process.py starts everything as a user does. Run with `python -m tests.server_host`.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
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
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

import common.serve
from common.checkpoint import load_tokenizer, resolve_checkpoint

# What servers import only when they serve: once here instead of in each of them.
for name in ("anyio._backends._asyncio", "pydantic.v1", "uvicorn.lifespan.on", "uvicorn.loops.auto",
             "uvicorn.protocols.http.auto", "uvicorn.protocols.websockets.auto"):  # fmt: skip
    importlib.import_module(name)

POISON = 4_000  # a prompt with this token makes a step of the model fail
FORK = multiprocessing.get_context("fork")
CHECKPOINTS = {name: resolve_checkpoint(name) for name in ("tiny", "tiny-draft")}
TOKENIZER = load_tokenizer(CHECKPOINTS["tiny"])


def main() -> None:
    # What a server leaves behind becomes this process's child, and not the whole machine's.
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
    statuses: dict[int, int] = {}
    for line in sys.stdin:
        order = json.loads(line)
        answer: dict[str, Any] = {}
        if "argv" in order:
            decoders_of(order["part"])
            pid = os.fork()
            if pid == 0:
                exit_after(functools.partial(serve, order))
            answer["pid"] = pid
        elif "wait" in order:
            deadline = time.monotonic() + order["timeout"]
            reap(statuses)
            while order["wait"] not in statuses and time.monotonic() < deadline:
                time.sleep(0.005)
                reap(statuses)
            answer["status"] = statuses.get(order["wait"])
        elif "end" in order:
            end_all()
        else:
            reap(statuses)
            answer["alive"] = descendants_of(os.getpid())
        print(json.dumps(answer), flush=True)
    end_all()


def end_all() -> None:
    for pid in descendants_of(os.getpid()):
        with contextlib.suppress(ProcessLookupError):  # it has ended with its parent
            os.kill(pid, signal.SIGKILL)


def reap(statuses: dict[int, int]) -> None:
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            statuses[ended[0]] = os.waitstatus_to_exitcode(ended[1])


def descendants_of(ancestor: int) -> list[int]:
    """Those that have not ended. They are found through those that have, whose children are about to be this process's
    own."""
    processes, found = all_processes(), [ancestor]
    for parent in found:  # which grows
        found += [pid for pid, (ppid, _) in processes.items() if ppid == parent]
    return [pid for pid in found[1:] if processes[pid][1] != "Z"]


def all_processes() -> dict[int, tuple[int, str]]:
    """The parent and the state of each."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, ppid = path.read_text().rpartition(")")[2].split()[:2]
            found[int(path.parent.name)] = int(ppid), state
    return found


def module(part: str, name: str) -> ModuleType:
    return importlib.import_module(f"{part}.{name}")


def runs_a_core(part: str) -> bool:
    """Whether the engine has a process of its own, which is so from part 5 on."""
    return int(part[4:6]) >= 5


@functools.cache
def decoders_of(part: str) -> list[tuple[Any, Any]]:
    """The shipped models, as the part computes them; all of the part is imported, and its kernel is compiled."""
    importlib.import_module(f"{part}.__main__")
    module(part, "worker.cpu_attention").warm_up(torch.float32)
    warm_up_kernels(part)
    load = module(part, "worker.worker").load_decoder
    gc.freeze()  # a child's collections must not touch, and so copy, what it shares with this process
    return [(checkpoint, load(checkpoint, torch.float32, "cpu")) for checkpoint in CHECKPOINTS.values()]


def warm_up_kernels(part: str) -> None:
    """Part 15's, for `tiny`: they have no threads of their own, so that what is forked may go on with them."""
    if importlib.util.find_spec(f"{part}.worker.kernels") is None:
        return
    ops = module(part, "worker.kernels.ops")
    for kv_dtype in (torch.float32, *module(part, "worker.quantization.kv_codes").KV_DTYPES.values()):
        ops.choose_kernels("auto", ops.Situation(torch.device("cpu"), torch.float32, kv_dtype, 8, 4, 32, 256, 4_096))


def exit_after(work: Callable[[], object]) -> None:
    """As a program ends, only that it does not tear down what it has imported, which takes seconds."""
    status: Any = 0
    try:
        work()
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
    outputs = [os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND) for name in ("stdout", "stderr")]
    become_a_program(*outputs, order["env"])
    tempfile.tempdir = order["temporary"]
    part = order["part"]
    with contextlib.ExitStack() as stack:
        if order["counts_threads"]:
            count_threads(part, stack)
        else:
            use_what_is_loaded(part, order["forks_ranks"], stack)
            change_steps(part, order["step_s"], stack)
        if order["grace_s"] is not None:
            stack.enter_context(mock.patch.object(common.serve, "DEATH_GRACE_S", order["grace_s"]))
        if runs_a_core(part):
            change_core(part, order, stack)
        if importlib.util.find_spec(f"{part}.router") is not None:
            processes = module(part, "router.processes")
            stack.enter_context(mock.patch.object(processes.asyncio, "create_subprocess_exec", ForkedReplica.start))
        run(order["module"], order["argv"])


def become_a_program(stdout: int, stderr: int, env: dict[str, str]) -> None:
    """A forked process: with a session, a standard output and a standard error of its own, and no other open files."""
    os.setsid()
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    os.closerange(3, 1_024)
    sys.stdin = Path(os.devnull).open()  # noqa: SIM115
    os.environ.update(env)
    warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12 about forks beside threads
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def run(name: str, argv: list[str]) -> None:
    """`python -m name argv…`"""
    sys.argv = [name, *argv]
    importlib.import_module(f"{name}.__main__").main()


class ForkedReplica:
    """What a router gets in place of an asyncio.subprocess.Process when it starts `python -m part argv…`."""

    def __init__(self, pid: int, stdout: asyncio.StreamReader, stderr: asyncio.StreamReader) -> None:
        self.pid, self.stdout, self.stderr = pid, stdout, stderr
        self.returncode: int | None = None
        self._ended = asyncio.get_running_loop().run_in_executor(None, os.waitpid, pid, 0)

    @classmethod
    async def start(
        cls, python: str, flag: str, part: str, *argv: str, preexec_fn: Callable[[], None], env: dict[str, str],
        **streams_and_session: Any,
    ) -> ForkedReplica:  # fmt: skip
        assert (python, flag) == (sys.executable, "-m"), f"a router starts its own part, not {python} {flag}"
        pipes = [os.pipe() for _ in ("stdout", "stderr")]
        pid = os.fork()
        if pid == 0:
            asyncio._set_running_loop(None)
            signal.set_wakeup_fd(-1)
            preexec_fn()
            become_a_program(*(end for _, end in pipes), env)
            exit_after(functools.partial(run, part, [*argv]))
        readers = []
        for beginning, end in pipes:
            os.close(end)
            readers.append(asyncio.StreamReader())
            protocol = functools.partial(asyncio.StreamReaderProtocol, readers[-1])
            await asyncio.get_running_loop().connect_read_pipe(protocol, os.fdopen(beginning, "rb"))
        return cls(pid, *readers)

    async def wait(self) -> int:
        _, status = await asyncio.shield(self._ended)
        self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def count_threads(part: str, stack: contextlib.ExitStack) -> None:
    """Instead of serving, print how many threads loading has started where torch may compute with two."""
    torch.set_num_threads(2)
    tasks = Path("/proc/self/task")
    before = len([*tasks.iterdir()])

    def count(*_: object, **__: object) -> None:
        print(len([*tasks.iterdir()]) - before, flush=True)

    stack.enter_context(mock.patch.object(module(part, "__main__"), "serve_app", count))


def use_what_is_loaded(part: str, forks_ranks: bool, stack: contextlib.ExitStack) -> None:
    decoders, worker = decoders_of(part), module(part, "worker.worker")
    load = worker.load_decoder

    def load_decoder(checkpoint: Any, *rest: Any) -> Any:
        return next((decoder for known, decoder in decoders if known == checkpoint), None) or load(checkpoint, *rest)

    def find(model: str) -> Any:
        return CHECKPOINTS.get(model) or resolve_checkpoint(model)

    if not forks_ranks:  # which load their shares
        stack.enter_context(mock.patch.object(worker, "load_decoder", load_decoder))
    for name in ("api.async_engine", "core.engine", "worker.worker"):
        stack.enter_context(mock.patch.object(module(part, name), "resolve_checkpoint", find))
    stack.enter_context(mock.patch.object(module(part, "api.async_engine"), "load_tokenizer", lambda _: TOKENIZER))


def change_steps(part: str, step_s: float, stack: contextlib.ExitStack) -> None:
    """Each takes so long, and one with a poisoned prompt fails."""
    if runs_a_core(part):
        owner, name = module(part, "worker.model_runner").ModelRunner, "run"
    else:
        owner, name = module(part, "worker.worker").Worker, "execute"
    run = getattr(owner, name)

    def poisoned(self: Any, step: Any, *rest: Any) -> Any:
        new = [ids for _, ids in step.new_rows] if runs_a_core(part) else [new.token_ids for new in step.new_requests]
        if any(POISON in token_ids for token_ids in new):
            raise ZeroDivisionError("the cat sat on it")
        time.sleep(step_s)
        return run(self, step, *rest)

    stack.enter_context(mock.patch.object(owner, name, poisoned))


def change_core(part: str, order: dict[str, Any], stack: contextlib.ExitStack) -> None:
    """It is forked, and may be slow to load."""
    core_client, engine_core = module(part, "api.core_client"), module(part, "core.engine_core")
    load = engine_core.LLMEngine

    def slow(config: Any) -> Any:
        print("loading", os.getpid(), flush=True)
        time.sleep(order["slow"])
        return load(config)

    stack.enter_context(mock.patch.object(core_client.multiprocessing, "get_context", lambda _: FORK))
    stack.enter_context(mock.patch.object(core_client, "SHUTDOWN_TIMEOUT_S", order["timeout"]))
    if order["forks_ranks"]:
        stack.enter_context(mock.patch.object(module(part, "core.ranks"), "_FORKSERVER", FORK))
    if order["sigterm_after"]:
        owner = tempfile.TemporaryDirectory if order["sigterm_after"] == "directory" else FORK.Process
        name = "__init__" if order["sigterm_after"] == "directory" else "start"
        end_after(owner, name, stack)
    if order["slow"]:
        stack.enter_context(mock.patch.object(engine_core, "LLMEngine", slow))


def end_after(owner: type, name: str, stack: contextlib.ExitStack) -> None:
    """SIGTERM arrives as soon as a method has returned."""
    method = getattr(owner, name)

    def ended(*args: Any, **fields: Any) -> None:
        method(*args, **fields)
        os.kill(os.getpid(), signal.SIGTERM)

    stack.enter_context(mock.patch.object(owner, name, ended))


if __name__ == "__main__":
    main()
