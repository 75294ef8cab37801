"""Part 5 as a user starts it: two processes that serve, drain, and end, each however the other one does."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from common.trace import read_trace
from part05_async_scheduling import config
from tests.part05.server_host import POISON
from tests.process_checks import TIMEOUT_S, ServerProcess, course_environment, refuses, serve

PART_DIR = Path(config.__file__).parent
ROOT = PART_DIR.parent
COMPLETIONS = "/v1/completions"
LOOK = 'Look at __main__.py, api/core_client.py::CoreClient and common/serve.py; README "Two processes".'
LOOK_DRAIN = 'Look at api/async_engine.py::AsyncLLM.shutdown and common/serve.py; README "When one of them dies".'
LOOK_DEATH = 'Look at api/async_engine.py::AsyncLLM._core_died and common/serve.py; README "When one of them dies".'
LOOK_PARENT = 'Look at core/engine_core.py::run_engine_core and _end_with_parent; README "When one of them dies".'
LOOK_START = 'Look at api/core_client.py::CoreClient.__init__; README "When one of them dies".'
FLAGS = ["--port", "0", "--device", "cpu", "--max-model-len", "300", "--block-size", "8"]
READY = (
    r"serving tiny on http://127\.0\.0\.1:(?P<port>\d+) \(cpu, context of 300 tokens, [\d,]+ KV blocks of 8 tokens, "
    r"engine core in process (?P<core>\d+)\)\n"
)
DEADLINE_S = 60  # for what takes a second at most
# Everywhere verify=False: there is no TLS here, and to load the certificates takes longer than most of these tests.
GREEDY = {"temperature": 0, "ignore_eos": True}
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for what processes leave behind in /proc")


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def sockets_in(temporary: Path) -> list[str]:
    """The engine's files there; torch has a folder of its own."""
    return [str(path) for folder in temporary.glob("llm-engine-*") for path in (folder, *folder.iterdir())]


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"expected {what.rstrip('.')}. Nothing happened for {DEADLINE_S} s."
        time.sleep(0.005)


# As a user starts it


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tmp")


MARK = uuid.uuid4().hex


@pytest.fixture(scope="module")
def server(temporary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One for all tests that leave it alone; the last of them ends it."""
    directory = tmp_path_factory.mktemp("server")
    flags = [*FLAGS, "--num-kv-blocks", "17", "--max-num-seqs", "8", "--trace", str(directory / "trace.jsonl")]
    env = course_environment(PART_DIR) | {"TMPDIR": str(temporary), "LLM_ENGINE_TEST": MARK}
    with serve(["-m", PART_DIR.name, *flags], READY, directory / "stderr", ROOT, env, LOOK) as server:
        yield server


def marked() -> list[int]:
    """All processes that descend from the server."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"LLM_ENGINE_TEST={MARK}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return [pid for pid in found if is_alive(pid)]


def test_it_serves_from_two_processes(server: ServerProcess, temporary: Path) -> None:
    core = int(server.ready["core"])
    assert len(server.lines) == 1, f"one line on stdout only, got {server.lines}. {LOOK}"
    whole = server.post(COMPLETIONS, {**GREEDY, "prompt": [5] * 7, "max_tokens": 4})
    assert whole.status_code == 200 and whole.json()["usage"]["completion_tokens"] == 4, f"{whole.text}. {LOOK}"
    assert {server.process.pid, core} <= set(marked()), f"{server.process.pid} and {core} are to run, got {marked()}"
    found = sockets_in(temporary)
    assert not found, f"both ends are connected, and {found} is still there. {LOOK_START}"
    for pid in (server.process.pid, core):
        shared = [line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "/dev/shm" in line]
        assert not shared, f"process {pid} has shared memory: {shared}. {LOOK}"
    assert os.getsid(core) == core, f"Ctrl-C must not reach the core: it is in session {os.getsid(core)}. {LOOK_PARENT}"


def test_a_chat_needs_no_max_tokens(server: ServerProcess) -> None:
    server.check_a_chat_needs_no_max_tokens("Look at api/async_engine.py::AsyncLLM.__init__.")


def test_many_requests_of_all_kinds(server: ServerProcess, llm: Any, prompt_of: Any) -> None:
    """A hundred, a third of them cut off by their clients: see soak.py. Afterwards everything is free."""
    from tests.part05.soak import check_answers, make_asks, talk_to

    two = server.post(COMPLETIONS, {**GREEDY, "prompt": [[5] * 40, [6] * 40], "max_tokens": 60})  # 26 blocks
    assert two.status_code == 200 and gauge(server, "num_preemptions") > 0, f"one was to wait for the other: {two.text}"
    asks = make_asks(prompt_of)
    answers = talk_to(server.url, asks)
    until(lambda: gauge(server, "num_requests_running") == gauge(server, "num_requests_waiting") == 0, "an idle engine")
    until(lambda: gauge(server, "kv_cache_usage_perc") == 0, f"all blocks to be free. {LOOK}")
    check_answers(asks, answers, llm)


def gauge(server: ServerProcess, name: str) -> float:
    return gauge_in(server.get("/metrics").text, name)


def gauge_in(metrics: str, name: str) -> float:
    found = re.search(rf"^\S*{name}\S* ([0-9].*)$", metrics, re.MULTILINE)
    assert found, f"/metrics has no {name}: {metrics}"
    return float(found[1])


def test_it_drains_and_its_trace_is_complete(server: ServerProcess, temporary: Path) -> None:
    core = int(server.ready["core"])
    body = {**GREEDY, "prompt": [6] * 10, "max_tokens": 100, "stream": True}
    server.check_finishes_a_stream_after_sigterm(COMPLETIONS, body, LOOK_DRAIN)
    errors = server.stderr.read_text()
    assert errors == "", f"stderr: {errors!r}. {LOOK_DRAIN}"
    until(lambda: not marked(), f"all processes to end, got {marked()}. {LOOK_DRAIN}")
    assert not is_alive(core), f"the core, process {core}, is alive. {LOOK_DRAIN}"
    assert not sockets_in(temporary), f"left behind: {sockets_in(temporary)}. {LOOK_START}"
    trace = read_trace(server.stderr.parent / "trace.jsonl")
    assert (trace.note, trace.header["part"]) == (None, PART_DIR.name), (
        f"got {trace.note}, {trace.header}. {LOOK_DRAIN}"
    )
    last = trace.steps[-1]
    assert last.num_blocks_free == last.num_blocks_total == 16, f"got {last}. {LOOK_DRAIN}"
    ids = {request.id for request in last.requests}
    own = [each for step in trace.steps for each in step.requests if each.id in ids]
    num_tokens = sum(each.num_scheduled for each in own)
    assert num_tokens == 10 + 100 - 1, f"the last answer took 109 tokens, the trace has {num_tokens}. {LOOK}"


# However one of them ends


@dataclass
class Server:
    """A server that the host has forked."""

    host: Host
    pid: int
    stdout: Path
    stderr: Path
    temporary: Path
    url: str = ""
    core: int = 0

    def wait_until_ready(self) -> None:
        until(lambda: is_ready(self.stdout) or not is_alive(self.pid), f"the server to start. {LOOK}")
        match = re.search(READY, self.stdout.read_text())
        assert match, f"expected {READY!r}, got {self.stdout.read_text()!r}, {self.stderr.read_text()!r}. {LOOK}"
        self.url, self.core = f"http://127.0.0.1:{match['port']}", int(match["core"])

    def wait_until_loading(self) -> None:
        """Of a slow one."""
        until(lambda: "loading" in self.stdout.read_text(), f"the core to begin to load. {LOOK}")
        self.core = int(self.stdout.read_text().split()[1])

    def check_end(self, status: int, errors: str, look: str) -> None:
        """The exit status, what stderr says (a pattern), and that both processes are gone with all their files."""
        got = self.host.ask(wait=self.pid, timeout=DEADLINE_S)["status"]
        said = self.stderr.read_text()
        assert got == status, f"expected exit status {status}, got {got}; stderr: {said!r}. {look}"
        assert re.fullmatch(errors, said), f"expected {errors!r} on stderr, got {said!r}. {look}"
        until(lambda: not is_alive(self.core), f"the core, process {self.core}, to end. {look}")
        until(lambda: not self.host.ask(alive=True)["alive"], f"all processes to end. {look}")
        found = sockets_in(self.temporary)
        assert not found, f"left behind: {found}. {look}"
        if self.url:
            until(lambda: refuses(int(self.url.rpartition(":")[2])), f"the port to be closed. {look}")

    def ask(self, body: dict[str, Any]) -> httpx.Response:
        body = {**GREEDY, "prompt": [5] * 5, "max_tokens": 250, **body}
        return httpx.post(self.url + COMPLETIONS, json=body, timeout=DEADLINE_S, trust_env=False, verify=False)

    def stream(self, body: dict[str, Any]) -> contextlib.AbstractContextManager[httpx.Response]:
        url = self.url + COMPLETIONS
        return httpx.stream("POST", url, json=body, timeout=DEADLINE_S, trust_env=False, verify=False)


def is_ready(stdout: Path) -> bool:
    return stdout.exists() and "serving" in stdout.read_text() and stdout.read_text().endswith("\n")


class Host:
    """Forks servers; see server_host.py."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.num_servers = directory, 0
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.part05.server_host"], env=course_environment(PART_DIR),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def ask(self, **order: Any) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the host of the servers has died"
        return json.loads(line)

    def start(self, *flags: str, slow: float = 0, step_s: float = 0) -> Server:
        """slow: seconds that the core takes to load; step_s: that each step takes, so that a stream stays open."""
        directory = self.directory / str(self.num_servers)
        self.num_servers += 1
        (directory / "tmp").mkdir(parents=True)
        paths = {"stdout": directory / "stdout", "stderr": directory / "stderr", "temporary": directory / "tmp"}
        for name in ("stdout", "stderr"):
            paths[name].touch()
        order = {"argv": [*FLAGS, *flags], "slow": slow, "step_s": step_s, "timeout": TIMEOUT_S}
        pid = self.ask(**order, **{name: str(path) for name, path in paths.items()})["pid"]
        return Server(self, pid, **paths)

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait(TIMEOUT_S)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def one_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    host = Host(tmp_path_factory.mktemp("host"))
    yield host
    host.close()


@pytest.fixture
def host(one_host: Host) -> Iterator[Host]:
    """Servers that a test has started end with it."""
    yield one_host
    one_host.ask(end=True)


@contextlib.contextmanager
def in_the_background(*works: Callable[[], Any]) -> Iterator[list[Any]]:
    """What each of them returns, once the block has ended."""
    results: list[Any] = [None] * len(works)

    def run(number: int) -> None:
        try:
            results[number] = works[number]()
        except httpx.HTTPError as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(works))]
    for thread in threads:
        thread.start()
    yield results
    for thread in threads:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive(), f"a client still waits for its answer. {LOOK_DEATH}"


def test_a_failed_step_and_then_the_core_is_killed(host: Host) -> None:
    """After one failed step the server goes on. The end of the core ends all requests: streams, whole answers, and
    those that wait."""
    server = host.start("--max-num-seqs", "2", step_s=0.02)
    server.wait_until_ready()
    poisoned = server.ask({"prompt": [POISON]})
    assert poisoned.status_code == 500 and "the cat sat on it" in poisoned.text, f"got {poisoned.text}. {LOOK_DEATH}"
    assert server.ask({"max_tokens": 3}).status_code == 200, f"a failed step has ended the server. {LOOK_DEATH}"
    body = {**GREEDY, "prompt": [6] * 5, "max_tokens": 290, "stream": True}
    with contextlib.ExitStack() as stack:
        chunks = stack.enter_context(server.stream(body)).iter_text()
        text = next(chunks)
        results = stack.enter_context(in_the_background(*[lambda: server.ask({})] * 3))
        until(lambda: waiting_at(server.url) >= 2, "two requests to wait, as two are running")
        os.kill(server.core, signal.SIGKILL)
        text += "".join(chunks)
        health = httpx.get(f"{server.url}/health", timeout=TIMEOUT_S, trust_env=False, verify=False)
    assert "engine core has died (killed by SIGKILL)" in text, (
        f"the stream must say why it ends: {text[-300:]!r}. {LOOK_DEATH}"
    )
    assert health.status_code == 503, f"/health of a server without a core: {health.status_code}. {LOOK_DEATH}"
    for result in results:
        assert isinstance(result, httpx.Response) and result.status_code == 500, f"got {result!r}. {LOOK_DEATH}"
        assert "killed by SIGKILL" in result.text, f"the error names the cause: {result.text}. {LOOK_DEATH}"
    server.check_end(1, r"error: the engine core has died \(killed by SIGKILL\)\n", LOOK_DEATH)


def test_two_failed_steps_in_a_row_end_the_server(host: Host) -> None:
    server = host.start()
    server.wait_until_ready()
    for number in range(2):
        poisoned = server.ask({"prompt": [POISON]})
        assert poisoned.status_code == 500 and "the cat sat on it" in poisoned.text, (
            f"failed step {number}: got {poisoned.text}. {LOOK_DEATH}"
        )
    health = httpx.get(f"{server.url}/health", timeout=TIMEOUT_S, trust_env=False, verify=False)
    assert health.status_code == 503, f"/health after two failed steps: {health.status_code}. {LOOK_DEATH}"
    cause = "two steps in a row failed, the second with ZeroDivisionError: the cat sat on it"
    server.check_end(1, rf"(?s)(Process engine-core.*)?error: the engine core has ended: {cause}\n", LOOK_DEATH)


def waiting_at(url: str) -> float:
    return gauge_in(
        httpx.get(f"{url}/metrics", timeout=DEADLINE_S, trust_env=False, verify=False).text, "num_requests_waiting"
    )


def test_the_api_process_is_killed(host: Host) -> None:
    """The core must not go on alone, nor keep its memory."""
    server = host.start(step_s=0.01)
    server.wait_until_ready()
    body = {**GREEDY, "prompt": [6] * 5, "max_tokens": 290, "stream": True}
    with server.stream(body) as response:
        chunks = response.iter_text()
        next(chunks)
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(httpx.HTTPError):
            "".join(chunks)
    server.check_end(-signal.SIGKILL, "", LOOK_PARENT)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_the_api_process_is_ended_while_the_core_loads(host: Host, number: signal.Signals) -> None:
    """SIGINT as the terminal sends it: to all of its processes. Nothing is ready, so nothing has to be drained."""
    server = host.start(slow=TIMEOUT_S)
    server.wait_until_loading()
    (os.killpg if number == signal.SIGINT else os.kill)(server.pid, number)
    server.check_end(130 if number == signal.SIGINT else -number, "", LOOK_PARENT)


def test_the_core_is_killed_while_it_loads(host: Host) -> None:
    server = host.start(slow=TIMEOUT_S)
    server.wait_until_loading()
    os.kill(server.core, signal.SIGKILL)
    server.check_end(2, rf"{PART_DIR.name}: error: the engine core did not start \(killed by SIGKILL\)\n", LOOK_START)


def test_ctrl_c_drains_as_sigterm_does(host: Host) -> None:
    """It goes to all processes of the terminal. The core, which still has answers to finish, must not get it."""
    server = host.start(step_s=0.01)
    server.wait_until_ready()
    body = {**GREEDY, "prompt": [6] * 5, "max_tokens": 100, "stream": True}
    with server.stream(body) as response:
        chunks = response.iter_text()
        text = next(chunks)
        os.killpg(server.pid, signal.SIGINT)
        text += "".join(chunks)
    assert text.endswith("data: [DONE]\n\n"), f"the open stream ends with {text[-200:]!r}. {LOOK_DRAIN}"
    assert '"finish_reason":"length"' in text.replace(" ", ""), f"got {text[-400:]!r}. {LOOK_DRAIN}"
    server.check_end(0, "", LOOK_DRAIN)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-num-batched-tokens", "100"], "max_num_batched_tokens: .*300.*100"),
        (["--trace", "/no/such/folder/x"], "trace: .*/no/such/folder/x.*"),
        (["--kv-cache-memory", "10"], "kv_cache_memory: 10 bytes hold 0 blocks of .*"),
        (["--model", "no-such-model"], "model: 'no-such-model' is neither .*"),
        (["--host", "256.256.256.256"], r"cannot listen on 256\.256\.256\.256 port 0: .*"),
    ],
    ids=["budget", "trace", "memory", "model", "host"],
)
def test_an_error_at_the_start_is_one_line(host: Host, flags: list[str], words: str) -> None:
    """The first three are found by the core, which sends them to the API process."""
    server = host.start(*flags)
    server.check_end(2, rf"{PART_DIR.name}: error: {words}\n", LOOK_START)
    assert not server.stdout.read_text(), f"nothing serves: {server.stdout.read_text()!r}. {LOOK_START}"
