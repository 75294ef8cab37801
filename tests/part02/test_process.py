"""Part 2 as a user starts it: processes, sockets, exit statuses. A start takes seconds, so each serves many checks.

What can be wrong with a model's files is tested in part 1.
"""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import part02_streaming
from common.serve import listen
from part02_streaming.config import EngineConfig
from tests.process_checks import (
    TIMEOUT_S,
    ServerProcess,
    check_command_lines,
    check_loopback_only,
    course_environment,
    serve,
)

JSON_HEADERS = b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n"
PART_DIR = Path(part02_streaming.__file__).parent
LOOK = 'Look at __main__.py and common/serve.py; README "See it first".'
LOOK_DRAIN = 'Look at common/serve.py::serve_app and server.py::create_app; README "When the client goes away".'
READY = r"serving \S+ on http://(?P<host>\S+):(?P<port>\d+) \(\w+, \d+ tokens of context\)\n"
COMPLETIONS = "/v1/completions"
STREAM = {"prompt": "Once upon a time", "temperature": 0, "ignore_eos": True, "stream": True}


def start(*flags: str, stderr: Path) -> contextlib.AbstractContextManager[ServerProcess]:
    """`python -m part02_streaming` with these flags."""
    return serve(["-m", PART_DIR.name, *flags], READY, stderr, PART_DIR.parent, course_environment(PART_DIR), LOOK)


def ask(server: ServerProcess, **fields: Any) -> httpx.Response:
    return server.post(COMPLETIONS, {"prompt": "Once upon a time", "temperature": 0, **fields})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with start("--port", "0", "--max-model-len", "300", stderr=tmp_path_factory.mktemp("server") / "stderr") as server:
        yield server


def test_it_serves_on_loopback_with_the_flags_it_was_given(server: ServerProcess) -> None:
    line = server.lines[-1]
    assert server.lines == [line], f"expected one line on stdout, got {server.lines}. {LOOK}"
    assert server.ready["host"] == "127.0.0.1", f"got {line!r}. {LOOK}"
    assert "(cpu, 300 tokens of context)" in line or "cuda" in line, line
    check_loopback_only(server.port, LOOK)
    health = server.get("/health")
    assert (health.status_code, health.json()["status"]) == (200, "ok"), health.text
    models = server.get("/v1/models").json()["data"]
    assert [(model["id"], model["max_model_len"]) for model in models] == [("tiny", 300)], f"got {models}. {LOOK}"


def test_it_answers_whatever_clients_do(server: ServerProcess) -> None:
    answer = ask(server, max_tokens=4)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 4, answer.text
    assert ask(server, max_tokens=-4).status_code == 400, "max_tokens=-4"
    with socket.create_connection(("127.0.0.1", server.port)) as broken:
        broken.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n" + JSON_HEADERS + b"{")  # and disconnects
    with socket.create_connection(("127.0.0.1", server.port)) as no_http:
        no_http.sendall(b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n")
    with socket.create_connection(("127.0.0.1", server.port)):  # sends nothing
        again = ask(server, max_tokens=4)
    assert again.json()["choices"] == answer.json()["choices"], f"later: {again.text} against {answer.text}"


def test_help_and_bad_command_lines(server: ServerProcess, tmp_path: Path) -> None:
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
    check_command_lines(PART_DIR, EngineConfig, cases, LOOK)


def test_sigterm_finishes_what_is_open_and_ends_it(server: ServerProcess) -> None:
    """The last test of this server."""
    server.check_finishes_a_stream_after_sigterm(COMPLETIONS, {**STREAM, "max_tokens": 200}, LOOK_DRAIN)


def test_sigkill_leaves_nothing(tmp_path: Path) -> None:
    """Killed in the middle of a stream: the client sees it, the port is free, and no process is left."""
    with start("--port", "0", "--max-queued-requests", "0", stderr=tmp_path / "stderr") as server:
        with server.stream(COMPLETIONS, {**STREAM, "max_tokens": 1900}) as response:
            chunks = response.iter_raw()
            next(chunks)
            refused = ask(server, max_tokens=1)
            assert refused.status_code == 429, f"--max-queued-requests 0: got {refused.text}. {LOOK}"
            children = children_of(server.process.pid)
            server.process.kill()
            with pytest.raises(httpx.HTTPError):
                for _ in chunks:
                    pass
        assert server.process.wait(TIMEOUT_S) == -signal.SIGKILL
        assert not [pid for pid in children if Path(f"/proc/{pid}").exists()], (
            f"children {children} are still alive. {LOOK}"
        )
        listen("127.0.0.1", server.port).close()


def children_of(pid: int) -> list[str]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return path.read_text().split() if path.exists() else []
