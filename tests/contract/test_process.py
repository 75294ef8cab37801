"""Every part from 3 on as a user starts it: how it serves, drains and ends, what it leaves behind, and how it fails."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys
import uuid
from pathlib import Path

import pytest

from common.trace import read_trace
from tests.contract.conftest import PARTS, ROOT
from tests.contract.engines import number_of
from tests.forked_servers import GREEDY, READY, Host, in_the_background, is_alive, sockets_in, until
from tests.http_checks import COMPLETIONS
from tests.process_checks import TIMEOUT_S, ServerProcess, course_environment, serve
from tests.server_host import POISON

LOOK = "Look at __main__.py, common/serve.py and, from part 5 on, api/core_client.py::CoreClient."
LOOK_CORE = 'Look at api/core_client.py::CoreClient and core/engine_core.py::run_engine_core; README "Two processes".'
LOOK_CHAT = "Look at api/async_engine.py::AsyncLLM.__init__."
LOOK_DRAIN = "Look at api/async_engine.py::AsyncLLM.shutdown and common/serve.py::serve_app."
LOOK_TRACE = (
    "Look at core/step_tracer.py::StepTracer.close and api/async_engine.py::AsyncLLM._run or, from part 5 on, "
    "core/engine_core.py::_run."
)
LOOK_DEATH = (
    "Look at api/async_engine.py::AsyncLLM._step or, from part 5 on, _core_died, and at __main__.py::serve and "
    "common/serve.py::serve_app."
)
LOOK_LOAD = "Look at __main__.py::serve and common/serve.py::single_threaded."
FLAGS = ["--max-model-len", "300", "--block-size", "8", "--num-kv-blocks", "41"]
READY_LINE = r"serving tiny on http://127\.0\.0\.1:\d+ \(cpu, context of 300 tokens, 40 KV blocks of 8 tokens\b.*\)\n"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for what processes leave behind in /proc")


# As a user starts it


def processes_with(mark: str) -> list[int]:
    """All that descend from the server."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"LLM_ENGINE_TEST={mark}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return [pid for pid in found if is_alive(pid)]


def starts_as_the_part_before(part: str) -> bool:
    """With the same code, so that one start, which takes seconds, is enough. The newest part is always started."""
    [before] = ROOT.glob(f"part{number_of(part) - 1:02d}_*")
    files = [(folder / name) for name in ("__main__.py", "api/core_client.py") for folder in (before, ROOT / part)]
    sources = [file.read_bytes() if file.is_file() else b"" for file in files]
    return part != PARTS[-1] and sources[::2] == sources[1::2]


@pytest.mark.since(3, unless=starts_as_the_part_before)
def test_it_serves_drains_and_leaves_a_complete_trace(part: str, tmp_path: Path) -> None:
    """SIGTERM comes in the middle of a stream. It ends with status 0, and no process and no file of it is left."""
    mark, trace_path, temporary = uuid.uuid4().hex, tmp_path / "trace.jsonl", tmp_path / "tmp"
    temporary.mkdir()
    flags = ["--port", "0", "--device", "cpu", "--no-log-stats", *FLAGS]
    if number_of(part) >= 4:
        flags += ["--trace", str(trace_path)]
    env = course_environment(ROOT / part) | {"TMPDIR": str(temporary), "LLM_ENGINE_TEST": mark}
    with serve(["-m", part, *flags], READY, tmp_path / "stderr", ROOT, env, LOOK) as server:
        assert len(server.lines) == 1 and re.fullmatch(READY_LINE, server.lines[0]), (
            f"{part}: expected one line on stdout, {READY_LINE!r}, got {server.lines}. {LOOK}"
        )
        whole = server.post(COMPLETIONS, {**GREEDY, "prompt": [5] * 7, "max_tokens": 4})
        assert whole.status_code == 200 and whole.json()["usage"]["completion_tokens"] == 4, (
            f"{part}: expected an answer of 4 tokens, got {whole.text}. {LOOK}"
        )
        server.check_a_chat_needs_no_max_tokens(f"That was {part}. {LOOK_CHAT}")
        if number_of(part) >= 5:
            check_core(part, server, processes_with(mark), temporary)
        body = {**GREEDY, "prompt": [6] * 10, "max_tokens": 60, "stream": True}
        server.check_finishes_a_stream_after_sigterm(COMPLETIONS, body, f"That was {part}. {LOOK_DRAIN}")
    errors = server.stderr.read_text()
    assert errors == "", f"{part}: expected nothing on stderr, got {errors!r}. {LOOK_DRAIN}"
    until(lambda: not processes_with(mark), f"all processes of {part} to end. {LOOK_DRAIN}")
    assert not sockets_in(temporary), f"{part} left behind: {sockets_in(temporary)}. {LOOK_CORE}"
    if number_of(part) >= 4:
        check_trace(part, trace_path)


def check_core(part: str, server: ServerProcess, running: list[int], temporary: Path) -> None:
    """It is another process that shares nothing with the server, and that Ctrl-C does not reach."""
    assert server.ready["core"], f"{part}: expected the core's process in {server.lines}. {LOOK_CORE}"
    core = int(server.ready["core"])
    assert {server.process.pid, core} <= set(running) and core != server.process.pid, (
        f"{part}: the processes {server.process.pid} and {core} are to run, got {running}. {LOOK_CORE}"
    )
    found = sockets_in(temporary)
    assert not found, f"{part}: both ends are connected, and {found} is still there. {LOOK_CORE}"
    for pid in (server.process.pid, core):
        shared = [line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "/dev/shm" in line]
        assert not shared, f"{part}: process {pid} has shared memory: {shared}. {LOOK_CORE}"
    assert os.getsid(core) == core, (
        f"{part}: Ctrl-C must not reach the core, which is in session {os.getsid(core)}. {LOOK_CORE}"
    )


def check_trace(part: str, path: Path) -> None:
    """All three requests have ended, and each position was computed once."""
    trace = read_trace(path)
    finished = [request_id for step in trace.steps for request_id in step.finished]
    assert (trace.note, trace.header["part"], len(finished)) == (None, part, 3), (
        f"{part}: three requests have ended, and the trace says {finished}, {trace.note}, {trace.header}. {LOOK_TRACE}"
    )
    for request_id, num_tokens in ((finished[0], 7 + 4 - 1), (finished[2], 10 + 60 - 1)):
        own = [each for step in trace.steps for each in step.requests if each.id == request_id]
        got = sum(each.num_scheduled for each in own)
        assert got == num_tokens, (
            f"{part}: {num_tokens} tokens of request {request_id} were computed, the trace has {got}. {LOOK_TRACE}"
        )
    last = trace.steps[-1]
    assert last.num_blocks_free == last.num_blocks_total == 40, (
        f"{part}: expected 40 of 40 blocks to be free at the end, got {last}. {LOOK_TRACE}"
    )


# What it does without being started anew: see forked_servers.py


@pytest.mark.since(5)
def test_a_core_that_dies_while_the_server_drains(part: str, host: Host) -> None:
    """The open requests get the cause, and the server ends with status 1, as it does without SIGTERM."""
    server = host.serve(part, *FLAGS, step_s=0.2)
    body = {**GREEDY, "prompt": [6] * 5, "max_tokens": 290, "stream": True}
    with contextlib.ExitStack() as stack:
        idle = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), TIMEOUT_S))
        chunks = stack.enter_context(server.stream(COMPLETIONS, body)).iter_text()
        text = next(chunks)
        os.kill(server.pid, signal.SIGTERM)
        assert not idle.recv(1), "a server that drains closes its idle connections"
        os.kill(server.core, signal.SIGKILL)
        text += "".join(chunks)
    cause = r"the engine core has died (killed by SIGKILL)"
    assert cause in text, f"{part}: expected an error event with the cause, got {text[-300:]!r}. {LOOK_DEATH}"
    server.check_end(1, re.escape(f"error: {cause}\n"), LOOK_DEATH)


@pytest.mark.since(3)
def test_a_second_sigterm_ends_open_requests_with_an_error(part: str, host: Host) -> None:
    """Left alone, they would take a minute."""
    server = host.serve(part, *FLAGS, step_s=0.2)
    body = {**GREEDY, "prompt": [6] * 5, "max_tokens": 290}
    with contextlib.ExitStack() as stack:
        idle = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), TIMEOUT_S))
        chunks = stack.enter_context(server.stream(COMPLETIONS, {**body, "stream": True})).iter_text()
        text = next(chunks)
        results = stack.enter_context(in_the_background(lambda: server.post(COMPLETIONS, body), look=LOOK_DRAIN))
        gauges = "num_requests_running", "num_requests_waiting"
        until(lambda: sum(server.gauge(name, LOOK_DRAIN) for name in gauges) == 2, "both requests to be admitted")
        os.kill(server.pid, signal.SIGTERM)
        assert not idle.recv(1), "a server that drains closes its idle connections"  # so it has seen the signal
        os.kill(server.pid, signal.SIGTERM)
        text += "".join(chunks)
    events = [event.removeprefix("data: ") for event in text.split("\n\n")[:-1]]
    assert events[-1] == "[DONE]" and "error" in json.loads(events[-2]), (
        f"{part}: expected the open stream to end with an error event and [DONE], got {events[-2:]}. {LOOK_DRAIN}"
    )
    [answer] = results
    assert answer.status_code == 503 and answer.json()["error"]["type"] == "service_unavailable", (
        f"{part}: expected the open request to end with 503 service_unavailable, got {answer.text}. {LOOK_DRAIN}"
    )
    server.check_end(0, "", LOOK_DRAIN)


@pytest.mark.since(3)
def test_two_failed_steps_in_a_row_end_the_process_with_status_1(part: str, host: Host) -> None:
    """Failed steps with a good one between them don't."""
    server = host.serve(part, *FLAGS, grace_s=0)
    prompts = {500: [POISON] * 7, 200: [5] * 7}
    statuses = [500, 200, 500, 200, 500]
    got = [server.post(COMPLETIONS, {"prompt": prompts[status], "max_tokens": 1}).status_code for status in statuses]
    assert got == statuses, f"{part}: steps 1, 3 and 5 fail: expected {statuses}, got {got}. {LOOK_DEATH}"
    health = server.get("/health").status_code
    assert health == 200, f"{part}: no two failed steps in a row yet, /health answers {health}. {LOOK_DEATH}"
    answer = server.post(COMPLETIONS, {"prompt": prompts[500], "max_tokens": 1})
    assert answer.status_code == 500 and "the cat sat on it" in answer.text, (
        f"{part}: expected the cause, got {answer.text}. {LOOK_DEATH}"
    )
    cause = "two steps in a row failed, the second with ZeroDivisionError: the cat sat on it"
    of_core = "((a step failed|Process engine-core).*)?error: the engine core has ended: "
    server.check_end(1, rf"(?s){of_core if number_of(part) >= 5 else '.*error: '}{cause}\n", LOOK_DEATH)


def has_a_core_that_loads(part: str) -> bool:
    return number_of(part) >= 5


@pytest.mark.since(3, unless=has_a_core_that_loads)
def test_loading_leaves_the_processor_to_the_engines_thread(part: str, host: Host) -> None:
    """No OpenMP workers, in a process that may compute with two threads: the engine's thread will have its own."""
    server = host.start(part, *FLAGS, counts_threads=True)
    status, said = server.wait(), (server.stdout.read_text(), server.stderr.read_text())
    assert (status, *said) == (0, "0\n", ""), (
        f"{part}: the model is loaded by a thread that will not run it: expected no thread more than before, got "
        f"status {status}, {said}. OpenMP's workers stay, and the engine's own then sleep. {LOOK_LOAD}"
    )
