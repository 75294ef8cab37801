"""Workers as processes, which end with this one, and a process that keeps one core busy."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common.serve import end_with_parent
from common.workloads import WorkloadRequest

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 900.0
END_TIMEOUT_S = 30.0
# It ends a worker's whole group when its input ends, which is when this process does, however it dies: engines have
# processes of their own, and vLLM's outlive the one that started them.
GUARD = 'cat; kill -9 "-$0"'


class PeerError(RuntimeError):
    """A worker that failed, or that computes something else."""


class Worker:
    """A model in an engine, in another process. versions, settings: as the worker reports them."""

    def __init__(self, name: str, command: Sequence[str], timeout_s: float = TIMEOUT_S) -> None:
        """Start the worker and wait until its model is loaded. Raises PeerError."""
        self.name, self.timeout_s = name, timeout_s
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, encoding="utf-8",
            cwd=ROOT, env={**environment, "HF_HUB_OFFLINE": "1"}, start_new_session=True, preexec_fn=end_with_parent(),
        )  # fmt: skip
        self.guard = subprocess.Popen(
            ["sh", "-c", GUARD, str(self.process.pid)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            loaded = self._read()
            self.versions: dict[str, str] = self._field(loaded, "versions", dict)
            self.settings: dict[str, Any] = self._field(loaded, "settings", dict)
            self._signal(signal.SIGSTOP)
        except BaseException:
            self.close()
            raise

    def run(self, requests: Sequence[WorkloadRequest]) -> tuple[float, list[list[int]]]:
        """Answer these requests, which arrive together. Returns the seconds that it took, and the answers. Raises
        PeerError, also for an answer of another length.

        Between two calls the worker is stopped: vLLM's processes go on checking for work for some time.
        """
        assert self.process.stdin is not None
        self._signal(signal.SIGCONT)
        prompts = [request.prompt_token_ids for request in requests]
        max_tokens = [request.max_tokens for request in requests]
        with contextlib.suppress(BrokenPipeError):  # it has died: _read() says how
            self.process.stdin.write(json.dumps({"prompts": prompts, "max_tokens": max_tokens}) + "\n")
            self.process.stdin.flush()
        answer = self._read()
        self._signal(signal.SIGSTOP)
        seconds, token_ids = self._field(answer, "seconds", float), self._field(answer, "token_ids", list)
        lengths = [len(ids) for ids in token_ids]
        if lengths != max_tokens:
            raise PeerError(f"{self.name} answered with {lengths} tokens: expected {max_tokens}")
        return seconds, token_ids

    def close(self) -> None:
        """End the worker and whatever it has started."""
        self._signal(signal.SIGCONT)
        for process, timeout_s in ((self.process, END_TIMEOUT_S), (self.guard, None)):
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):  # then the guard ends it
                process.wait(timeout_s)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.errors.close()

    def _signal(self, number: signal.Signals) -> None:
        """To the worker and whatever it has started."""
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.killpg(self.process.pid, number)

    def _read(self) -> dict[str, Any]:
        """The worker's next line."""
        assert self.process.stdout is not None
        timer = threading.Timer(self.timeout_s, self._signal, (signal.SIGKILL,))
        timer.start()
        try:
            line = self.process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            status = self.process.wait()
            raise PeerError(f"{self.name} ended with status {status}; the end of its output:\n{self._last_errors()}")
        try:
            message = json.loads(line)
        except json.JSONDecodeError:
            raise PeerError(f"{self.name} wrote {line!r}: expected a line of JSON") from None
        if not isinstance(message, dict) or "error" in message:
            error = message["error"] if isinstance(message, dict) else f"it wrote {line!r}: expected an object"
            raise PeerError(f"{self.name} failed: {error}\n{self._last_errors()}")
        return message

    def _field(self, message: dict[str, Any], name: str, kind: type) -> Any:
        if not isinstance(message.get(name), kind):
            raise PeerError(f"{self.name} wrote {message}: expected the field {name!r}, of type {kind.__name__}")
        return message[name]

    def _last_errors(self) -> str:
        self.errors.seek(0)
        return self.errors.read()[-2_000:]


@contextlib.contextmanager
def one_core_taken() -> Iterator[None]:
    """Another program computes all the time, on whichever core Linux gives it."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"], preexec_fn=end_with_parent()) as process:
        try:
            yield
        finally:
            process.kill()
