"""The engine core as another process, from part 5 on: its start, its refusals, its death, and its end.

The core is a thread here, behind the real sockets. tests/part05/test_process.py does the same to real processes.
"""

from __future__ import annotations

import asyncio
import importlib
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from common.errors import FieldError
from common.sampling_params import SamplingParams
from common.serving import GenerationError
from tests.async_checks import until
from tests.contract.engines import SmallModels
from tests.contract.gated_server import (
    LOOK_FAIL,
    LOOK_SHUTDOWN,
    LOOK_STATS,
    GatedServer,
    on_an_event_loop,
    run_on_an_event_loop,
)
from tests.gated import CoreGate, CoreThread, gated_engine
from tests.scripted import Part

LESSON = 'README of part 5, "When a process dies"'
LOOK_DEATH = f"Look at api/async_engine.py::AsyncLLM._core_died and _die; {LESSON}."
LOOK_START = f"Look at api/core_client.py::CoreClient; {LESSON}."


@pytest.mark.since(5)
@on_an_event_loop()
async def test_a_request_that_the_core_refuses_gets_an_error(server: GatedServer) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module(f"{server.part}.api.async_engine"), "check_request", lambda *_: None)
        refused = server.llm.generate([], SamplingParams(max_tokens=3))
    server.gate.open()
    _, message = await server.read_error(refused, "a request that the core refuses")
    assert "prompt" in message, f"{server.part}: the error names the field, got {message!r}. {LOOK_FAIL}"
    await server.check_next()
    await server.until_idle()


@pytest.mark.since(5)
@on_an_event_loop(max_num_seqs=2)
async def test_when_the_core_dies_all_requests_get_the_cause(server: GatedServer) -> None:
    """Those that run, those that wait, and later ones."""
    part, words = server.part, "killed by SIGKILL"
    streams = await server.generate_together(dict.fromkeys(range(4), 24))
    server.gate.allow(1)
    await server.until_begun(3)
    assert server.llm.is_alive and server.llm.cause_of_death is None
    server.llm.core.process.kill()
    for name, stream in enumerate(streams):
        token_ids, message = await server.read_error(stream, f"request {name} of a dead core")
        expected = server.answer(name, 24)[1]
        assert token_ids == expected[: len(token_ids)], f"{part}, request {name}: {expected}, got {token_ids}"
        assert "engine core has died" in message and words in message, (
            f"{part}, request {name} gets the cause: expected {words!r}, got {message!r}. {LOOK_DEATH}"
        )
    assert not server.llm.is_alive and words in str(server.llm.cause_of_death), (
        f"{part}: {server.llm.cause_of_death}. {LOOK_DEATH}"
    )
    with pytest.raises(GenerationError, match=words):
        server.generate(5)
    server.llm.abort(streams[0])
    assert not server.llm._streams and not server.llm.processor._detokenizers, (
        f"{part}: something is kept. {LOOK_DEATH}"
    )
    assert server.llm.stats()["num_requests_waiting"] == 0, f"{part}: {server.llm.stats()}. {LOOK_STATS}"


@pytest.mark.since(5)
@on_an_event_loop()
async def test_the_last_answers_of_a_core_that_dies_arrive(server: GatedServer) -> None:
    """They were sent before it died: a request whose whole answer was sent must not end with an error."""
    stream, core = server.generate(1, max_tokens=3), server.llm.core
    receive, arrived = core.receive, list[Any]()
    core.receive = lambda: arrived.extend(receive()) or []  # type: ignore[func-returns-value]
    server.gate.allow(3)
    await until(lambda: sum(len(message.outputs) for message in arrived) == 3, "the core to have sent the answer")
    core.receive = lambda: [arrived.pop(0) for _ in arrived[:]]
    core.process.kill()
    got = await server.read(stream, "a request whose answer was sent")
    assert got == server.answer(1, 3), f"{server.part}: expected {server.answer(1, 3)}, got {got}. {LOOK_DEATH}"


@pytest.mark.since(5)
def test_shutdown_without_an_event_loop(part: str, small_models: SmallModels) -> None:
    """start() was not called, or the loop has ended."""
    server = GatedServer(part, small_models)
    with server.running():
        process = server.llm.core.process
        server.llm.shutdown()
        assert not process.is_alive(), f"{part}: the core is alive. {LOOK_SHUTDOWN}"
        server.llm.shutdown()


# Start


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this process makes temporary files, except torch, which makes a directory at its first use of inductor."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / "torchinductor"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.since(5)
def test_only_this_user_can_enter_the_directory_and_it_is_removed_at_once(
    part: str, small_models: SmallModels, temporary: Path
) -> None:
    server = GatedServer(part, small_models)
    with server.running():
        process = server.llm.core.process
        assert isinstance(process, CoreThread) and Path(process.directory).parent == temporary
        assert process.mode == 0o700, f"{part}: the directory of the sockets has mode {process.mode:o}. {LOOK_START}"
        found = list(temporary.iterdir())
        assert not found, f"{part}: both ends are connected, and {found} is still there. {LOOK_START}"

        async def ask() -> None:
            server.llm.start()
            server.gate.open()
            await server.check_next()

        asyncio.run(ask())
        server.llm.shutdown()


@pytest.mark.since(5)
@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (FieldError("kv_cache_memory", "10 bytes"), FieldError, "kv_cache_memory: 10 bytes"),
        (OSError("no such file: x"), OSError, "no such file: x"),
        (ZeroDivisionError(), OSError, "the engine core did not start (exit status 1)"),
        (None, OSError, "the engine core did not start (exit status 0)"),
    ],
    ids=["field", "os", "bug", "silence"],
)
def test_a_core_that_does_not_start(
    part: str, error: Exception | None, kind: type[Exception], text: str, temporary: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    gate, processes, init = CoreGate(Part(part), None), list[CoreThread](), CoreThread.__init__
    gate.start_error, gate.is_killed = error, error is None

    def note(self: CoreThread, *args: Any) -> None:
        init(self, *args)
        processes.append(self)

    monkeypatch.setattr(CoreThread, "__init__", note)
    with pytest.raises(kind) as caught, gated_engine(gate):
        pytest.fail(f"{part}: the core did not start, and there was no error. {LOOK_START}")
    assert type(caught.value) is kind and str(caught.value) == text, (
        f"{part}: expected {text!r}, got {caught.value!r}. {LOOK_START}"
    )
    if isinstance(error, FieldError):
        assert isinstance(caught.value, FieldError) and caught.value.field == "kv_cache_memory", f"{caught.value.field}"
    assert not list(temporary.iterdir()), f"{part}: left behind: {list(temporary.iterdir())}. {LOOK_START}"
    assert not processes[0].is_alive(), f"{part}: the core is alive. {LOOK_START}"


@pytest.mark.since(5)
def test_collections_go_on_when_the_core_is_ready(
    part: str, small_models: SmallModels, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    calls = list[str]()
    monkeypatch.setattr("common.startup.end", lambda: calls.append("end"))

    async def nothing(server: GatedServer) -> None:
        assert calls == ["end"], f"{part}: look at core/engine_core.py::_run."

    run_on_an_event_loop(GatedServer(part, small_models), nothing)


@pytest.mark.since(5)
def test_ctrl_c_while_the_core_loads(part: str, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, processes = CoreGate(Part(part), None), list[Any]()

    def interrupt(self: Any) -> None:
        processes.append(self.process)
        raise KeyboardInterrupt

    client = gate.part.core_client.CoreClient
    wait = "wait_until_ready" if hasattr(client, "wait_until_ready") else "_wait_until_ready"
    monkeypatch.setattr(client, wait, interrupt)
    gate.start_error = OSError("never asked for")
    with pytest.raises(KeyboardInterrupt), gated_engine(gate):
        pytest.fail("not interrupted")
    assert not processes[0].is_alive(), f"{part}: the core still runs. {LOOK_START}"
    assert not list(temporary.iterdir()), f"{part}: left behind: {list(temporary.iterdir())}. {LOOK_START}"


@pytest.mark.since(5)
def test_a_second_signal_while_it_shuts_down(part: str, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`timeout` sends SIGTERM twice. The process must still end: with a message that nobody takes in its socket, and
    with a core that multiprocessing would wait for."""
    gate, clients, at_exit = CoreGate(Part(part), None), list[Any](), list[Any]()
    module = gate.part.core_client

    def interrupt(self: Any) -> None:
        clients.append(self)
        raise SystemExit("the first signal")

    def interrupt_again(self: CoreThread, timeout: float | None = None) -> None:
        monkeypatch.setattr(CoreThread, "join", join)
        raise SystemExit("the second signal")

    join, gate.start_error = CoreThread.join, OSError("never asked for")
    if hasattr(module, "atexit"):
        monkeypatch.setattr(module, "atexit", SimpleNamespace(register=at_exit.append, unregister=at_exit.remove))
    wait = "wait_until_ready" if hasattr(module.CoreClient, "wait_until_ready") else "_wait_until_ready"
    monkeypatch.setattr(module.CoreClient, wait, interrupt)
    monkeypatch.setattr(CoreThread, "join", interrupt_again)
    with pytest.raises(SystemExit, match="the second signal"), gated_engine(gate):
        pytest.fail("not interrupted")
    (client,) = clients
    lingers = [socket.getsockopt(zmq.LINGER) for socket in (client._requests, client._outputs)]
    assert lingers == [0, 0], f"{part}: the process waits {lingers} ms for messages to be taken. {LOOK_SHUTDOWN}"
    if hasattr(module, "atexit"):
        assert at_exit == [client.shutdown], f"{part}: expected a second try at the process's end. {LOOK_SHUTDOWN}"
    client.shutdown()
    assert not client.process.is_alive(), f"{part}: the core still runs. {LOOK_SHUTDOWN}"
    assert not at_exit, f"{part}: shut down, and still registered with atexit. {LOOK_SHUTDOWN}"


@pytest.mark.since(5)
def test_a_temporary_directory_whose_name_is_too_long(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long, client = tmp_path / ("x" * 100), importlib.import_module(f"{part}.api.core_client")
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    never_started = SimpleNamespace(Process=lambda **_: SimpleNamespace(pid=None))
    monkeypatch.setattr(client.multiprocessing, "get_context", lambda _: never_started)
    with pytest.raises(OSError, match="characters.*TMPDIR") as caught:
        client.CoreClient(None)
    assert str(long) in str(caught.value), f"{part}: the error names the path, got {caught.value}. {LOOK_START}"
    assert not list(long.iterdir()), f"{part}: left behind: {list(long.iterdir())}. {LOOK_START}"


@pytest.mark.since(5)
@on_an_event_loop()
async def test_a_fresh_server_has_all_gauges(server: GatedServer) -> None:
    """A dashboard that asks before the first request must find every series."""
    before = set(server.llm.stats())
    server.gate.open()
    await server.check_next()
    after = set(server.llm.stats())
    assert before == after and "num_preemptions" in before, (
        f"{server.part}: before the first request {before}, after it {after}. Look at messages.py::Ready."
    )
