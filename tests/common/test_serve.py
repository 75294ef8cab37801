"""common/serve.py: the listening socket, an app in a thread, and an app that ends on a signal."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import common
from common.errors import FieldError
from common.serve import ServerConfig, listen, running_app, server_process

LOOK = "Look at common/serve.py."
DEADLINE_S = 20  # for what takes milliseconds; only a mistake makes a test wait this long
PROCESS_TIMEOUT_S = 120


class App:
    """Answers "hello" when allowed; records its event loop and the order of events."""

    def __init__(self, fails_at_startup: bool = False) -> None:
        self.fails_at_startup = fails_at_startup
        self.gate = threading.Event()
        self.gate.set()
        self.happened: list[str] = []
        self.thread: threading.Thread | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.lifespan(receive, send)
            return
        self.happened.append("request")
        while not self.gate.is_set():
            await asyncio.sleep(0.005)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
        await send({"type": "http.response.body", "body": b"hello"})
        self.happened.append("response")

    async def lifespan(self, receive: Any, send: Any) -> None:
        self.thread = threading.current_thread()
        assert (await receive())["type"] == "lifespan.startup"
        if self.fails_at_startup:
            await send({"type": "lifespan.startup.failed", "message": "no luck"})
            return
        self.happened.append("startup")
        await send({"type": "lifespan.startup.complete"})
        assert (await receive())["type"] == "lifespan.shutdown"
        self.happened.append("shutdown")
        await send({"type": "lifespan.shutdown.complete"})


def get(url: str) -> str:
    """verify=False: there is no TLS here, and to load the certificates takes longer than to ask."""
    return httpx.get(url, timeout=DEADLINE_S, trust_env=False, verify=False).text


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"expected {what}; nothing happened for {DEADLINE_S} s. {LOOK}"
        time.sleep(0.005)


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


def refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S).close()
    except OSError:
        return True
    return False


def open_sockets() -> list[socket.socket]:
    return [thing for thing in gc.get_objects() if type(thing) is socket.socket and thing.fileno() >= 0]


# ServerConfig


def test_the_server_s_own_flags() -> None:
    config = ServerConfig()
    assert (config.host, config.port, config.api_key, config.log_stats) == ("127.0.0.1", 8000, None, True), (
        f"got {config}. {LOOK}"
    )
    for port in (0, 1, 65_535):
        assert ServerConfig(port=port).port == port


@pytest.mark.parametrize("port", [-1, 65_536, 10**9])
def test_a_port_out_of_range_is_refused(port: int) -> None:
    with pytest.raises(FieldError, match=f"^port: expected 0 to 65535, got {port}$") as caught:
        ServerConfig(port=port)
    assert caught.value.field == "port", f"got {caught.value.field}. {LOOK}"


# listen


def test_port_0_picks_a_free_one() -> None:
    with listen("127.0.0.1", 0) as first, listen("127.0.0.1", 0) as second:
        (host, port), (_, other) = first.getsockname(), second.getsockname()
        assert host == "127.0.0.1" and port != other and min(port, other) > 0, f"got {host}, {port}, {other}. {LOOK}"
        with socket.create_connection((host, port), timeout=DEADLINE_S):  # it listens before accept() is called
            pass
        if sys.platform == "linux":  # where all of 127.0.0.0/8 is this machine
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.2", port), timeout=DEADLINE_S).close()


def test_a_busy_port_is_an_error_that_names_it() -> None:
    with listen("127.0.0.1", 0) as first:
        port, before = first.getsockname()[1], len(open_sockets())
        with pytest.raises(OSError, match=rf"cannot listen on 127\.0\.0\.1 port {port}: .*in use"):
            listen("127.0.0.1", port)
        assert len(open_sockets()) == before, f"the socket of the failed attempt is still open. {LOOK}"
    listen("127.0.0.1", port).close()  # and free once it is closed


def test_a_port_is_free_again_at_once_after_a_server_with_clients() -> None:
    """Connections that the server closed first stay in TIME_WAIT, and must not keep the next server waiting."""
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S)
        listener.accept()[0].close()
        client.close()
    with listen("127.0.0.1", port) as again:
        assert again.getsockname()[1] == port, f"expected port {port} again, got {again.getsockname()}. {LOOK}"


@pytest.mark.parametrize("host", ["256.256.256.256", "no such host", "a" * 70, "a..b"])
def test_an_unknown_host_is_an_error_that_names_it(host: str) -> None:
    with pytest.raises(OSError, match=f"cannot listen on {re.escape(host)} port 0: .+") as caught:
        listen(host, 0)
    assert "None" not in str(caught.value), f"expected the reason, got {caught.value}. {LOOK}"


def test_ipv6() -> None:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError as error:
        pytest.skip(f"this machine has no IPv6 loopback: {error}")
    with listen("::1", 0) as listener:
        assert listener.family == socket.AF_INET6, f"got {listener}. {LOOK}"
        with socket.create_connection(("::1", listener.getsockname()[1]), timeout=DEADLINE_S):
            pass


def test_localhost_by_name() -> None:
    with listen("localhost", 0) as listener:
        assert listener.getsockname()[0] in ("127.0.0.1", "::1"), f"got {listener.getsockname()}. {LOOK}"


# running_app


def test_accepted_sockets_have_nagle_s_algorithm_off() -> None:
    with running_app(App()) as url, httpx.Client(trust_env=False, timeout=DEADLINE_S, verify=False) as client:
        assert client.get(url).text == "hello"
        inet = [sock for sock in open_sockets() if sock.family == socket.AF_INET]
        here = [sock for sock in inet if sock.getsockname()[1] == port_of(url)]
        accepted = [sock for sock in here if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)]
        assert len(accepted) == 1, f"the client keeps one connection open, got {accepted}"
        no_delay = accepted[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert no_delay, f"TCP_NODELAY is not set: events of a stream can wait for each other. {LOOK}"


def test_an_app_runs_in_a_thread_until_the_block_ends() -> None:
    app, threads = App(), set(threading.enumerate())
    with running_app(app) as url:
        assert re.fullmatch(r"http://127\.0\.0\.1:[1-9]\d*", url), f"got {url!r}. {LOOK}"
        assert app.happened == ["startup"], f"the app has started when the block begins, got {app.happened}. {LOOK}"
        assert get(url) == "hello"
        assert app.thread is not threading.current_thread(), f"the app needs a thread of its own. {LOOK}"
    assert app.happened == ["startup", "request", "response", "shutdown"], f"got {app.happened}. {LOOK}"
    assert refuses(port_of(url)), f"the port is still open. {LOOK}"
    assert set(threading.enumerate()) <= threads, f"threads are left: {set(threading.enumerate()) - threads}. {LOOK}"


def test_two_apps_at_once() -> None:
    with running_app(App()) as first, running_app(App()) as second:
        assert first != second and (get(first), get(second)) == ("hello", "hello")


def test_the_thread_ends_also_when_the_block_raises() -> None:
    app = App()
    with pytest.raises(ZeroDivisionError), running_app(app) as url:
        assert get(url) == "hello"
        raise ZeroDivisionError
    assert app.thread is not None and not app.thread.is_alive(), f"the app's thread is still alive. {LOOK}"
    assert app.happened[-1] == "shutdown" and refuses(port_of(url)), f"got {app.happened}. {LOOK}"


def test_open_requests_are_finished_first() -> None:
    app, answers = App(), []
    app.gate.clear()
    with running_app(app) as url:
        reader = threading.Thread(target=lambda: answers.append(get(url)), daemon=True)
        reader.start()
        until(lambda: "request" in app.happened, "the request to arrive")
        opener = threading.Thread(target=lambda: (until_refused(url), app.gate.set()), daemon=True)
        opener.start()
    reader.join(DEADLINE_S)
    assert answers == ["hello"], f"the request was open when the block ended: got {answers}. {LOOK}"
    assert app.happened[-2:] == ["response", "shutdown"], f"the response comes first, got {app.happened}. {LOOK}"


def until_refused(url: str) -> None:
    with contextlib.suppress(AssertionError):
        until(lambda: refuses(port_of(url)), "the server to stop listening")


def test_an_app_that_fails_at_startup_is_an_error() -> None:
    app, threads = App(fails_at_startup=True), set(threading.enumerate())
    before = len(open_sockets())
    with pytest.raises(RuntimeError, match="exited before it was ready"), running_app(app):
        pytest.fail(f"the block ran without a server. {LOOK}")
    assert set(threading.enumerate()) <= threads, f"threads are left: {set(threading.enumerate()) - threads}. {LOOK}"
    assert len(open_sockets()) == before, f"the listening socket is still open. {LOOK}"


# serve_app

# Only single_threaded() needs torch, and to load it takes a process longer than all the rest.
SCRIPT = """
import asyncio, signal, sys
sys.modules["torch"] = sys
from common.serve import listen, serve_app

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        print("startup", flush=True)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        print("shutdown", flush=True)
        return await send({"type": "lifespan.shutdown.complete"})
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"begun ", "more_body": True})
    if scope["path"] == "/slow":
        while not server_is_closed():
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
    await send({"type": "http.response.body", "body": b"done"})

def server_is_closed():
    return listener.fileno() < 0

before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
listener = listen("127.0.0.1", 0)
serve_app(app, listener, f"serving on {listener.getsockname()[1]}")
assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)], "handlers are put back"
print("after", flush=True)
"""


@contextlib.contextmanager
def process(script: str = SCRIPT) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that serves, and its port."""
    env = {**os.environ, "PYTHONPATH": str(Path(common.__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", script], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    alarm = threading.Timer(PROCESS_TIMEOUT_S, process.kill)
    alarm.start()
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline(), process.stdout.readline()]
        ready = re.fullmatch(r"serving on (\d+)\n", lines[1])
        assert ready and lines[0] == "startup\n", f"the message comes once the app has started, got {lines}. {LOOK}"
        yield process, int(ready[1])
    finally:
        alarm.cancel()
        process.kill()
        process.communicate()


def check_end(process: subprocess.Popen[str]) -> None:
    output, errors = process.communicate(timeout=PROCESS_TIMEOUT_S)
    assert process.returncode == 0, f"expected status 0, got {process.returncode}: {errors}. {LOOK}"
    assert (output, errors) == ("shutdown\nafter\n", ""), f"got {output!r}, {errors!r}. {LOOK}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_what_is_open_and_ends_the_server(number: signal.Signals) -> None:
    with process() as (server, port):
        assert get(f"http://127.0.0.1:{port}/") == "begun done", "the first request after the message"
        url = f"http://127.0.0.1:{port}/slow"
        with httpx.stream("GET", url, timeout=PROCESS_TIMEOUT_S, trust_env=False, verify=False) as response:
            chunks = response.iter_text()
            text = next(chunks)
            server.send_signal(number)
            text += "".join(chunks)
        assert text == "begun done", f"{number.name}: the open request got {text!r}. {LOOK}"
        check_end(server)
        assert refuses(port), f"the port is still open. {LOOK}"


def test_only_serve_app_logs_statistics() -> None:
    hook = (
        "import types\napp.state = types.SimpleNamespace(log_stats=lambda now_s: print(type(now_s), file=sys.stderr))\n"
    )
    with process(SCRIPT.replace("before = [", f"{hook}before = [")) as (server, port):
        assert get(f"http://127.0.0.1:{port}/") == "begun done"
        server.send_signal(signal.SIGTERM)
        _, errors = server.communicate(timeout=PROCESS_TIMEOUT_S)
    assert set(errors.splitlines()) == {repr(float)}, f"expected calls with a time, got {errors!r}. {LOOK}"
    app, calls = App(), list[float]()
    app.state = types.SimpleNamespace(log_stats=calls.append)  # type: ignore[attr-defined]
    with running_app(app) as url:
        assert get(url) == "hello"
    assert calls == [], f"a server of a test or a benchmark logs nothing, got {calls}. {LOOK}"


def test_statistics_are_logged_while_open_requests_are_finished() -> None:
    """The open request ends only after a call that came after the signal."""
    hook = (
        "import types\nlate = []\n"
        "app.state = types.SimpleNamespace(log_stats=lambda _: late.append(1) if server_is_closed() else None)\n"
    )
    waiting = SCRIPT.replace("await asyncio.sleep(0.2)", "while not late:\n            await asyncio.sleep(0.01)")
    with process(waiting.replace("before = [", f"{hook}before = [")) as (server, port):
        url = f"http://127.0.0.1:{port}/slow"
        with httpx.stream("GET", url, timeout=PROCESS_TIMEOUT_S, trust_env=False, verify=False) as response:
            chunks = response.iter_text()
            text = next(chunks)
            server.send_signal(signal.SIGTERM)
            text += "".join(chunks)
        assert text == "begun done", f"got {text!r}. {LOOK}"
        check_end(server)


# An engine that dies

DYING = (
    SCRIPT.replace(
        'f"serving on {listener.getsockname()[1]}")', 'f"serving on {listener.getsockname()[1]}", lambda: cause)'
    )
    .replace(
        'await send({"type": "http.response.start", "status": 200, "headers": []})',
        """global cause
    if scope["path"] == "/die":
        cause = "the engine sat on the cat"
    await send({"type": "http.response.start", "status": 200, "headers": []})""",
    )
    .replace("def server_is_closed", "cause = None\n\ndef server_is_closed")
)


def test_a_server_whose_engine_has_died_ends_and_says_why() -> None:
    with process(DYING) as (server, port):
        url = f"http://127.0.0.1:{port}"
        assert get(f"{url}/") == "begun done", "the engine is alive"
        with httpx.stream("GET", f"{url}/slow", timeout=PROCESS_TIMEOUT_S, trust_env=False, verify=False) as response:
            chunks = response.iter_text()
            text = next(chunks)
            assert get(f"{url}/die") == "begun done", "the answer that says so is given"
            assert get(f"{url}/") == "begun done", f"it still answers for a moment: /health must report it. {LOOK}"
            text += "".join(chunks)
        assert text == "begun done", f"an open request is finished, got {text!r}. {LOOK}"
        output, errors = server.communicate(timeout=PROCESS_TIMEOUT_S)
        assert server.returncode == 1, f"expected status 1, got {server.returncode}: {errors}. {LOOK}"
        expected = ("shutdown\n", "error: the engine sat on the cat\n")
        assert (output, errors) == expected, f"expected {expected}, got {output!r}, {errors!r}. {LOOK}"
        assert refuses(port), f"the port is still open. {LOOK}"


def test_a_server_whose_engine_is_alive_ends_normally() -> None:
    with process(DYING) as (server, port):
        assert get(f"http://127.0.0.1:{port}/") == "begun done"
        server.send_signal(signal.SIGTERM)
        check_end(server)


# server_process


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Makes a module of some code, which `python -m` finds, and returns its name."""

    def make(code: str) -> str:
        (tmp_path / "some_part.py").write_text(code)
        return "some_part"

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(common.__file__).parents[1])]))
    return make


def test_a_server_process_ends_with_its_block(module: Callable[[str], str]) -> None:
    code = "import os, sys\n" + SCRIPT.replace('f"serving on {', 'f"{os.getpid()} {sys.argv[1:]} http://127.0.0.1:{')
    with (
        pytest.raises(ZeroDivisionError),
        server_process(module(code.replace('print("startup", flush=True)', ""))) as url,
    ):
        assert get(f"{url}/") == "begun done", f"got another answer from {url}. {LOOK}"
        raise ZeroDivisionError
    assert refuses(port_of(url)), f"the process serves on after its block. {LOOK}"


def test_a_server_process_has_the_environment_that_it_is_given(module: Callable[[str], str]) -> None:
    code = "import os, sys\nsys.exit(' and '.join(os.environ.get(name, 'none') for name in ('COLOR', 'SHAPE')))"
    env = {"COLOR": "green", "PYTHONPATH": os.environ["PYTHONPATH"]}
    with pytest.raises(RuntimeError, match="green and none"), server_process(module(code), env=env):
        pytest.fail(f"the block ran without a server. {LOOK}")


def test_a_server_process_that_does_not_start(module: Callable[[str], str]) -> None:
    code = "import sys\nsys.exit('no luck with ' + ' '.join(sys.argv[1:]))"
    words = r"some_part --port 0 --model none.*no luck with --port 0 --model none"
    with (
        pytest.raises(RuntimeError, match=f"(?s){words}"),
        server_process(module(code), "--model", "none"),
    ):
        pytest.fail(f"the block ran without a server. {LOOK}")


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's parent-death signal")
def test_a_process_whose_parent_dies_before_it_has_asked_for_the_signal_ends_too() -> None:
    """Called in the child of another process than the one that prepared it, as after that one's death."""
    code = """
        import os, subprocess, sys
        from common.serve import end_with_parent
        prepared = end_with_parent()
        command = [sys.executable, "-c", "print('it runs')"]
        if os.fork() == 0:
            os._exit(subprocess.call(command, preexec_fn=prepared))
        _, status = os.wait()
        print("ended with", os.waitstatus_to_exitcode(status), flush=True)
        subprocess.run(command, preexec_fn=prepared, check=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    lines = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout.splitlines()
    assert lines == ["ended with 1", "it runs"], (
        f"Look at common/serve.py::end_with_parent: it must compare parents: {lines}"
    )
