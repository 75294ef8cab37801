"""Part 2 as a user starts it: processes, sockets, exit statuses. A start takes seconds, so each serves many checks.

What can be wrong with a model's files is tested in part 1.
"""

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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

import common
import part02_streaming
from common.serve import listen
from part02_streaming.config import EngineConfig

PART = "part02_streaming"
PART_DIR = Path(part02_streaming.__file__).parent
LOOK = 'Look at __main__.py and common/serve.py; README "What you will see".'
LOOK_DRAIN = 'Look at common/serve.py::serve_app and server.py::create_app; README "When the client goes away".'
TIMEOUT_S = 300  # until a process that does not do as it should is killed; busy machines are slow
READY = re.compile(r"serving (\S+) on http://(\S+):(\d+) \(\w+, \d+ tokens of context\)\n")
STREAM = {"prompt": "Once upon a time", "temperature": 0, "ignore_eos": True, "stream": True}


def environment(*python_path: Path) -> dict[str, str]:
    fixed = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, python_path))}
    return {**os.environ, **fixed}


HERE = environment(PART_DIR.parent, Path(common.__file__).parents[1])


@dataclass
class Server:
    process: subprocess.Popen[str]
    first_line: str
    stderr: Path
    host: str
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def post(self, **fields: Any) -> httpx.Response:
        body = {"prompt": "Once upon a time", "temperature": 0, **fields}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=TIMEOUT_S, trust_env=False)

    def open_stream(self, max_tokens: int) -> contextlib.AbstractContextManager[httpx.Response]:
        body = {**STREAM, "max_tokens": max_tokens}
        return httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=TIMEOUT_S, trust_env=False)


@contextlib.contextmanager
def serve(*flags: str, stderr: Path) -> Iterator[Server]:
    """Starts `python -m part02_streaming`, waits until it says that it is ready, and leaves no process behind."""
    command = [sys.executable, "-m", PART, *flags]
    with stderr.open("w") as errors:
        process = subprocess.Popen(
            command, cwd=PART_DIR.parent, env=HERE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    alarm = threading.Timer(TIMEOUT_S, process.kill)
    alarm.start()
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        ready = READY.fullmatch(line)
        assert ready, f"{command}: expected 'serving …', got {line!r} and {stderr.read_text()!r}. {LOOK}"
        yield Server(process, line, stderr, ready[2], int(ready[3]))
    finally:
        alarm.cancel()
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve("--port", "0", "--max-model-len", "300", stderr=tmp_path_factory.mktemp("server") / "stderr") as server:
        yield server


def refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S).close()
    except ConnectionRefusedError:
        return True
    return False


def test_it_serves_on_loopback_with_the_flags_it_was_given(server: Server) -> None:
    assert server.host == "127.0.0.1", f"got {server.first_line!r}. {LOOK}"
    assert "(cpu, 300 tokens of context)" in server.first_line or "cuda" in server.first_line, server.first_line
    if sys.platform == "linux":  # where all of 127.0.0.0/8 is this machine
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", server.port), timeout=TIMEOUT_S).close()
    health = httpx.get(f"{server.url}/health", timeout=TIMEOUT_S, trust_env=False)
    assert (health.status_code, health.json()["status"]) == (200, "ok"), health.text
    models = httpx.get(f"{server.url}/v1/models", timeout=TIMEOUT_S, trust_env=False).json()["data"]
    assert [(model["id"], model["max_model_len"]) for model in models] == [("tiny", 300)], f"got {models}. {LOOK}"


def test_it_answers_whatever_clients_do(server: Server) -> None:
    answer = server.post(max_tokens=4)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 4, answer.text
    assert server.post(max_tokens=-4).status_code == 400, "max_tokens=-4"
    with socket.create_connection(("127.0.0.1", server.port)) as broken:
        broken.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")  # and goes away
    with socket.create_connection(("127.0.0.1", server.port)) as no_http:
        no_http.sendall(b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n")
    with socket.create_connection(("127.0.0.1", server.port)):  # says nothing
        again = server.post(max_tokens=4)
    assert again.json()["choices"] == answer.json()["choices"], f"later: {again.text} against {answer.text}"


# One interpreter runs all of these command lines in turn, as `python -m` would, each with a standard error of its own.
RUN_ALL = f"""
import contextlib, io, json, os, runpy, sys, tempfile, traceback
results = []
for argv in json.load(sys.stdin):
    sys.argv, output = [{PART!r}, *argv], io.StringIO()
    with tempfile.TemporaryFile("w+") as errors:
        stderr = os.dup(2)
        os.dup2(errors.fileno(), 2)
        try:
            with contextlib.redirect_stdout(output):
                runpy.run_module({PART!r}, run_name="__main__", alter_sys=True)
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


def run_all(command_lines: list[list[str]]) -> list[tuple[int, str, str]]:
    """(exit status, standard output, standard error) of each."""
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL], input=json.dumps(command_lines),
        cwd=PART_DIR.parent, env=HERE, capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, f"the runs of {command_lines} ended with {done.returncode}: {done.stderr}"
    return [tuple(result) for result in json.loads(done.stdout)]


def test_help_and_bad_command_lines(server: Server, tmp_path: Path) -> None:
    cases: dict[str, tuple[list[str], list[str]]] = {
        "port in use": (["--port", str(server.port)], ["cannot listen on 127.0.0.1", str(server.port), "in use"]),
        "unknown flag": (["--max-queue", "5"], ["--max-queue"]),
        "stray word": (["tiny"], ["tiny"]),
        "port too high": (["--port", "65536"], ["--port", "65535", "65536"]),
        "negative queue": (["--max-queued-requests", "-1"], ["--max-queued-requests", "0 or more", "-1"]),
        "queue is a word": (["--max-queued-requests", "many"], ["--max-queued-requests", "'many'"]),
        "context of one token": (["--max-model-len", "1"], ["--max-model-len", "at least 2", "1"]),
        "unknown dtype": (["--dtype", "int3"], ["--dtype", "int3", "bfloat16"]),
        "unknown device": (["--device", "abacus"], ["--device", "'abacus'"]),
        "unknown host": (["--host", "256.256.256.256", "--port", "0"], ["cannot listen", "256.256.256.256"]),
        "a host that no name can be": (["--host", "a" * 70, "--port", "0"], ["cannot listen", "aaa"]),
        "unknown model": (["--port", "0", "--model", str(tmp_path / "none")], ["model", "none", "directory"]),
    }
    (status, output, errors), *results = run_all([["--help"], *(argv for argv, _ in cases.values())])
    assert (status, errors) == (0, ""), f"--help: expected status 0, got {status}, stderr {errors!r}. {LOOK}"
    for field in dataclasses.fields(EngineConfig):
        flag = "--" + field.name.replace("_", "-")
        assert f"  {flag} " in output, f"--help does not explain {flag}: {output}. {LOOK}"
    for (name, (argv, words)), (status, output, errors) in zip(cases.items(), results, strict=True):
        got = f"{name}, {' '.join(argv)}: got status {status}, stdout {output!r}, stderr {errors!r}. {LOOK}"
        assert status == 2, f"expected exit status 2. {got}"
        assert "Traceback" not in errors and errors.count("\n") == 1, f"expected one line on stderr. {got}"
        assert errors.startswith(f"{PART}: error: ") and output == "", f"expected '{PART}: error: …' only. {got}"
        for word in words:
            assert word in errors, f"expected {word!r} in the error. {got}"


def test_sigterm_finishes_what_is_open_and_ends_it(server: Server) -> None:
    """The last test of this server."""
    with server.open_stream(200) as response:
        chunks = response.iter_text()
        text = next(chunks)
        server.process.send_signal(signal.SIGTERM)
        text += "".join(chunks)
    assert text.endswith("data: [DONE]\n\n"), (
        f"expected the stream to end with [DONE], got {text[-300:]!r}. {LOOK_DRAIN}"
    )
    events = [json.loads(frame.removeprefix("data: ")) for frame in text.split("\n\n")[:-2]]
    assert events[-1]["choices"][0]["finish_reason"] == "length", f"got {events[-1]}. {LOOK_DRAIN}"
    try:
        status = server.process.wait(TIMEOUT_S)
    except subprocess.TimeoutExpired:
        pytest.fail(f"SIGTERM did not end the server in {TIMEOUT_S} s. {LOOK_DRAIN}")
    errors = server.stderr.read_text()
    assert status == 0, f"SIGTERM: expected exit status 0, got {status}; stderr: {errors!r}. {LOOK_DRAIN}"
    assert "Traceback" not in errors, f"the server wrote a traceback: {errors}. {LOOK_DRAIN}"
    assert server.process.stdout is not None and server.process.stdout.read() == "", f"one line on stdout only. {LOOK}"
    assert refuses(server.port), f"the port is still open. {LOOK_DRAIN}"


def test_sigkill_leaves_nothing(tmp_path: Path) -> None:
    """Killed in the middle of a stream: the client learns of it, the port is free, and so is every process."""
    with serve("--port", "0", "--max-queued-requests", "0", stderr=tmp_path / "stderr") as server:
        with server.open_stream(1900) as response:
            chunks = response.iter_raw()
            next(chunks)
            refused = server.post(max_tokens=1)
            assert refused.status_code == 429, f"--max-queued-requests 0: got {refused.text}. {LOOK}"
            children = children_of(server.process.pid)
            server.process.kill()
            with pytest.raises(httpx.HTTPError):
                for _ in chunks:
                    pass
        assert server.process.wait(TIMEOUT_S) == -signal.SIGKILL
        assert not [pid for pid in children if Path(f"/proc/{pid}").exists()], f"children {children} live on. {LOOK}"
        listen("127.0.0.1", server.port).close()


def children_of(pid: int) -> list[str]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return path.read_text().split() if path.exists() else []
