"""Ranks on several machines: two torchrun launchers on two addresses of this one."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import httpx
import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from common.errors import FieldError
from part09_tensor_parallelism.config import EngineConfig
from part09_tensor_parallelism.core import ranks as core_ranks
from part09_tensor_parallelism.core.executor import make_executor
from part09_tensor_parallelism.core.ranks import RankDied, Ranks
from part09_tensor_parallelism.messages import AllocateCache, CacheAllocated
from part09_tensor_parallelism.torchrun import Torchrun, encrypt
from part09_tensor_parallelism.worker import rank_process
from part09_tensor_parallelism.worker.launcher import find_addresses
from part09_tensor_parallelism.worker.rank_process import Rank
from tests.process_checks import TIMEOUT_S

LOOK = 'Look at worker/launcher.py, core/ranks.py::Ranks and worker/rank_process.py; README "Several machines".'
LOOK_SECRET = 'Look at torchrun.py::encrypt; README "Several machines".'
HANDSHAKE_FAILURES = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)  # fmt: skip
ROOT = Path(__file__).parents[2]
BODY = {"prompt": [5] * 7, "max_tokens": 8, "temperature": 0, "ignore_eos": True}


class Launchers:
    """Two torchrun processes with a rank each, and what they print."""

    def __init__(self, flags: tuple[list[str], list[str]]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
                 "--node-rank", str(node), "--local-addr", f"127.0.0.{node + 1}", "--master-addr", "127.0.0.1",
                 "--master-port", str(port), "-m", "part09_tensor_parallelism", "--tensor-parallel-size", "2",
                 "--port", "0", "--num-threads", "1", "--distributed-timeout", "30", *flags[node]],
                cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, start_new_session=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
            for node in range(2)
        ]  # fmt: skip
        self.said = ["", ""]
        self.readers = [threading.Thread(target=self._read, args=(node,)) for node in range(2)]
        self.ready = threading.Event()
        for reader in self.readers:
            reader.start()

    def _read(self, node: int) -> None:
        stdout = self.processes[node].stdout
        assert stdout is not None
        for line in stdout:
            self.said[node] += line
            if "serving" in line:
                self.ready.set()
        self.ready.set()

    @property
    def url(self) -> str:
        assert self.ready.wait(TIMEOUT_S), f"not ready: {self.said}. {LOOK}"
        match = re.search(r"http://\S+:\d+", self.said[0])
        assert match, f"rank 0 does not serve: {self.said}. {LOOK}"
        return match[0]

    def wait(self) -> list[int]:
        statuses = [process.wait(TIMEOUT_S) for process in self.processes]
        for reader in self.readers:
            reader.join(TIMEOUT_S)
        return statuses

    def kill(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def launched(first: list[str], second: list[str]) -> Iterator[Launchers]:
    launchers = Launchers((first, second))
    try:
        yield launchers
    finally:
        launchers.kill()
        launchers.wait()


def test_two_launchers_serve_one_model() -> None:
    flags = ["--distributed-secret", "a secret"]
    with launched(flags, flags) as launchers:
        answer = httpx.post(f"{launchers.url}/v1/completions", json=BODY, timeout=TIMEOUT_S, trust_env=False)
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 8, f"{answer.text}. {LOOK}"
        for process in launchers.processes:
            process.send_signal(signal.SIGTERM)
        launchers.wait()
        for node, said in enumerate(launchers.said):  # torchrun's own traceback is not ours
            assert "/part09_tensor_parallelism/" not in said, f"rank {node} ended with {said}. {LOOK}"


def test_ranks_with_different_command_lines() -> None:
    words = "block_size: rank 1: expected 16, as on rank 0, got 32"
    with launched([], ["--block-size", "32"]) as launchers:
        statuses = launchers.wait()
        assert all(statuses) and words in launchers.said[0], f"{statuses}, {launchers.said}. {LOOK}"


# Without launchers


def torchrun_at(master_addr: str = "127.0.0.1", world_size: int = 2, port: int = 1) -> Torchrun:
    return Torchrun(rank=1, local_rank=0, world_size=world_size, master_addr=master_addr, master_port=port)


@pytest.mark.parametrize(
    ("torchrun", "secret", "words"),
    [
        (torchrun_at(world_size=4), None, "tensor_parallel_size: 2 × pipeline_parallel_size 1 are 2 ranks, torchrun"),
        (torchrun_at("10.0.0.1"), None, "distributed_secret: expected one, .* 10.0.0.1 is not a loopback address"),
        (torchrun_at("10.0.0.1"), "a secret", ""),
        (torchrun_at("localhost"), None, ""),
        (torchrun_at("::1"), None, ""),
        (torchrun_at("a-machine"), None, "distributed_secret: expected one, .* a-machine is not a loopback address"),
    ],
)
def test_what_torchrun_says_is_checked(torchrun: Torchrun, secret: str | None, words: str) -> None:
    config = EngineConfig(device="cpu", tensor_parallel_size=2, distributed_secret=secret)
    if not words:
        torchrun.check(config)
        return
    with pytest.raises(FieldError, match=words):
        torchrun.check(config)


@pytest.mark.parametrize(
    ("ours", "theirs", "is_in"), [("a", "a", True), ("a", "b", False), ("a", None, False), (None, "a", False)]
)
def test_only_who_knows_the_secret_can_talk_to_core(ours: str | None, theirs: str | None, is_in: bool) -> None:
    """The handshake says so, on core's side; without one nothing is ever delivered."""
    context = zmq.Context()
    server, client = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    try:
        for socket_, secret in ((server, ours), (client, theirs)):
            if secret is not None:
                encrypt(socket_, secret, is_server=socket_ is server)
        monitor = server.get_monitor_socket()
        port = server.bind_to_random_port("tcp://127.0.0.1")
        client.connect(f"tcp://127.0.0.1:{port}")
        client.send(b"a step", zmq.NOBLOCK if is_in else 0)
        ends = zmq.EVENT_HANDSHAKE_SUCCEEDED, *HANDSHAKE_FAILURES
        while (event := recv_monitor_message(monitor)["event"]) not in ends:
            pass
        got = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
        assert got is is_in, f"core has the secret {ours!r}, a client {theirs!r}: handshake {got}. {LOOK_SECRET}"
        if is_in:
            assert server.recv() == b"a step"
    finally:
        context.destroy(linger=0)


def test_one_rank_in_a_world_of_two_is_refused() -> None:
    """On rank 0 as well, which needs no other ranks and could serve alone."""
    world = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    with mock.patch.dict(os.environ, {**world, "MASTER_PORT": "1"}), pytest.raises(FieldError, match="started 2"):
        make_executor(EngineConfig(device="cpu"))


def test_a_port_at_which_nobody_listens() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot reach 127.0.0.1 port {port}"):
            find_addresses(torchrun_at(port=port), timeout_s=1)


def test_a_rank_that_hears_nothing_ends() -> None:
    config = EngineConfig(device="cpu", tensor_parallel_size=2, distributed_timeout=1)
    with tempfile.TemporaryDirectory() as directory:
        rank = Rank(1, f"ipc://{directory}/orders ipc://{directory}/answers", None, 0, config)
        with pytest.raises(SystemExit, match="rank 1 has heard nothing from rank 0"):
            rank.run()


def test_ranks_that_never_come() -> None:
    """Torchrun starts them on other machines; here it starts none."""
    environment = {
        "TORCHELASTIC_RUN_ID": "x", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }  # fmt: skip
    config = EngineConfig(device="cpu", tensor_parallel_size=2, distributed_timeout=3)
    fork = multiprocessing.get_context("fork")  # a fork server would keep this environment
    words = r"1 of 2 ranks have come within 3 s \(distributed_timeout\)"
    patches = mock.patch.dict(os.environ, environment), mock.patch.object(core_ranks, "_FORKSERVER", fork)
    with patches[0], patches[1], pytest.raises(RankDied, match=words):
        Ranks(config, rank_process.run_rank, lambda *args: None)


def test_a_rank_collects_garbage_once_it_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process began without: __main__ does not know yet whether it is the server or a rank."""
    calls = list[Any]()
    rank = object.__new__(Rank)
    rank.rank = 1
    rank.worker = SimpleNamespace(allocate_cache=calls.append)  # type: ignore[assignment]
    monkeypatch.setattr(rank, "send", calls.append, raising=False)
    monkeypatch.setattr("common.startup.end", lambda: calls.append("end"))
    rank.handle(AllocateCache(7))
    assert calls == [7, "end", CacheAllocated(1)], f"got {calls}. Look at worker/rank_process.py::Rank.handle."
