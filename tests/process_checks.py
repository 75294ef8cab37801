"""Parts as a user starts them: processes of `python -m partNN_…`, what they print, and how they end."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

import common

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 300  # until a process that does not do as it should is killed; busy machines are slow


def environment(*python_path: Path) -> dict[str, str]:
    """This process's, offline, with a Python path of its own."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env.pop("PYTHONPATH", None)
    return env | ({"PYTHONPATH": os.pathsep.join(map(str, python_path))} if python_path else {})


def course_environment(part_dir: Path) -> dict[str, str]:
    """One in which the part is this one, be it the reference or a learner's copy."""
    return environment(part_dir.parent, Path(common.__file__).parents[1])


class ServerClient:
    """A server's client. verify=False: there is no TLS here, and to load the certificates takes longer than to ask."""

    url: str

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=TIMEOUT_S, trust_env=False, verify=False)

    def post(self, path: str, body: bytes | dict, headers: dict[str, str] | None = None) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **(headers or {})}
        return httpx.post(
            self.url + path, content=content, headers=headers, timeout=TIMEOUT_S, trust_env=False, verify=False
        )

    def stream(
        self, path: str, body: dict, headers: dict[str, str] | None = None
    ) -> contextlib.AbstractContextManager[httpx.Response]:
        return httpx.stream(
            "POST", self.url + path, json=body, headers=headers, timeout=TIMEOUT_S, trust_env=False, verify=False
        )

    def gauge(self, name: str, look: str) -> float:
        """Of /metrics, by its name without the prefix."""
        metrics = self.get("/metrics").text
        found = re.search(rf"^engine:{name}(?:_total)? ([0-9].*)$", metrics, re.MULTILINE)
        assert found, f"/metrics has no engine:{name}: {metrics}. {look}"
        return float(found[1])

    def check_a_chat_needs_no_max_tokens(self, look: str) -> None:
        """Also where the KV cache is smaller than the context."""
        answer = self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0})
        assert answer.status_code == 200, f"a chat that names no limit: expected an answer, got {answer.text}. {look}"

    def check_finishes_a_stream_after(self, interrupt: Callable[[], object], path: str, body: dict, look: str) -> None:
        """What interrupts the server in the middle of a stream lets it come to its end."""
        with self.stream(path, body) as response:
            chunks = response.iter_text()
            text = next(chunks)
            interrupt()
            text += "".join(chunks)
        assert text.endswith("data: [DONE]\n\n"), (
            f"expected the open stream to end with [DONE], got {text[-300:]!r}. {look}"
        )
        last = json.loads(text.split("\n\n")[-3].removeprefix("data: "))
        assert last["choices"][0]["finish_reason"] == "length", f"got {last}. {look}"


@dataclasses.dataclass
class ServerProcess(ServerClient):
    """A server that has said that it is ready.

    lines: what it printed, up to and with the line that says so; ready: how the pattern matched that line.
    """

    process: subprocess.Popen[str]
    lines: list[str]
    ready: re.Match[str]
    stderr: Path

    @property
    def url(self) -> str:  # type: ignore[override]
        return f"http://127.0.0.1:{self.ready['port']}"

    def check_ends_after_sigterm(self, look: str) -> None:
        """SIGTERM has been sent: the process ends well, writes no traceback, and frees its port."""
        try:
            status = self.process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            pytest.fail(f"SIGTERM did not end the server in {TIMEOUT_S} s. {look}")
        errors = self.stderr.read_text()
        assert status == 0, f"SIGTERM: expected exit status 0, got {status}; stderr: {errors!r}. {look}"
        assert "Traceback" not in errors, f"the server wrote a traceback: {errors}. {look}"
        assert refuses(self.port), f"the port is still open. {look}"

    def check_finishes_a_stream_after_sigterm(self, path: str, body: dict, look: str) -> None:
        """SIGTERM in the middle of a stream, which still comes to its end before the server does."""
        self.check_finishes_a_stream_after(lambda: self.process.send_signal(signal.SIGTERM), path, body, look)
        self.check_ends_after_sigterm(look)
        assert self.process.stdout is not None and self.process.stdout.read() == "", (
            f"expected no more on stdout than the line that says it is ready. {look}"
        )


@contextlib.contextmanager
def serve(
    command: list[str], ready: str, stderr: Path, cwd: Path, env: dict[str, str], look: str
) -> Iterator[ServerProcess]:
    """Runs Python with these arguments until the test is over, and leaves no process behind.

    ready: a pattern for the line that says it serves, newline included, with a group `port`.
    """
    with stderr.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    alarm = threading.Timer(TIMEOUT_S, process.kill)
    alarm.start()
    try:
        assert process.stdout is not None
        lines: list[str] = []
        while not (match := re.fullmatch(ready, lines[-1] if lines else "")):
            lines.append(process.stdout.readline())
            assert lines[-1], (
                f"{command} ended before it said {ready!r}. It wrote {lines} and {stderr.read_text()!r}. {look}"
            )
        yield ServerProcess(process, lines, match, stderr)
    finally:
        alarm.cancel()
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]


def refuses(port: int, host: str = "127.0.0.1") -> bool:
    """Whether no process listens there."""
    try:
        socket.create_connection((host, port), timeout=TIMEOUT_S).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:  # it did, and ended before it accepted
        return False
    return False


def check_loopback_only(port: int, look: str) -> None:
    """The server is not to be reached at any other address, as far as one machine can tell."""
    if sys.platform == "linux":  # where all of 127.0.0.0/8 is this machine
        assert refuses(port, "127.0.0.2"), f"the server listens on more than 127.0.0.1. {look}"


# One interpreter runs all of these command lines in turn, as `python -m` would, each with a standard error of its own.
RUN_ALL = """
import contextlib, io, json, os, runpy, sys, tempfile, traceback
part, results = sys.argv[1], []
for argv in json.load(sys.stdin):
    sys.argv, output = [part, *argv], io.StringIO()
    with tempfile.TemporaryFile("w+") as errors:
        stderr = os.dup(2)
        os.dup2(errors.fileno(), 2)
        try:
            with contextlib.redirect_stdout(output):
                runpy.run_module(part, run_name="__main__", alter_sys=True)
            status = 0
        except SystemExit as exit:
            status = exit.code or 0
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stderr.flush()
        os.dup2(stderr, 2)
        os.close(stderr)
        errors.seek(0)
        results.append([status, output.getvalue(), errors.read()])
json.dump(results, sys.stdout)
"""


def check_command_lines(
    part_dir: Path, config: type | tuple[type, ...], cases: dict[str, tuple[list[str], list[str]]], look: str
) -> None:
    """--help explains every flag of the config; every other command line ends with status 2 and one line of error.

    config: from part 3 on ServerConfig and EngineConfig. cases: what is wrong → the arguments, and words that the error
    must have.
    """
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, part_dir.name],
        input=json.dumps([["--help"], *(argv for argv, _ in cases.values())]),
        cwd=part_dir.parent, env=course_environment(part_dir), capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, f"the runs of {list(cases)} ended with {done.returncode}: {done.stderr}"
    (status, output, errors), *results = json.loads(done.stdout)
    assert (status, errors) == (0, ""), f"--help: expected status 0, got {status}, stderr {errors!r}. {look}"
    configs = config if isinstance(config, tuple) else (config,)
    for field in (field for each in configs for field in dataclasses.fields(each)):
        flag = "--" + field.name.replace("_", "-")
        assert re.search(rf"^  {flag}[ ,]", output, re.MULTILINE), f"--help does not explain {flag}: {output}. {look}"
    for (name, (argv, words)), (status, output, errors) in zip(cases.items(), results, strict=True):
        got = f"{name}, {' '.join(argv)}: got status {status}, stdout {output!r}, stderr {errors!r}. {look}"
        assert status == 2, f"expected exit status 2. {got}"
        assert "Traceback" not in errors and errors.count("\n") == 1, f"expected one line on stderr. {got}"
        assert errors.startswith(f"{part_dir.name}: error: ") and output == "", (
            f"expected '{part_dir.name}: error: …' only. {got}"
        )
        for word in words:
            assert word in errors, f"expected {word!r} in the error. {got}"
