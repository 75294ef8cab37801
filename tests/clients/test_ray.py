"""router/ray_backend.py on a Ray cluster of two nodes, both on this machine: each gets a replica, and a replica that is
lost is replaced."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.clients.conftest import ROOT
from tests.contract.test_process import processes_with
from tests.part10.test_fleet import BODY, FLAGS, TIMEOUT_S, RouterProcess, check_answers
from tests.process_checks import course_environment

ray = pytest.importorskip("ray", reason="ray is not installed: make test-clients")

from ray.cluster_utils import Cluster  # noqa: E402

LOOK = 'Look at router/ray_backend.py; README "Replicas come and go".'
PART = "part10_data_parallelism"
HEAD, NODE, NEW_NODE = "127.0.0.2", "127.0.0.3", "127.0.0.4"  # a replica's URL says which node it is on
NODE_ARGS: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc, uses 127.0.0.2")


def environment() -> dict[str, str]:
    return course_environment(ROOT / PART) | {"RAY_USAGE_STATS_ENABLED": "0"}


def until(condition: Callable[[], object], what: str) -> None:
    """Ray takes its time."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, f"expected {what}"
        time.sleep(0.05)


def router_command(address: str) -> list[str]:
    return [
        sys.executable, "-m", f"{PART}.router", "--port", "0", "--api-key", "key", "--replicas", "2",
        "--replica-backend", "ray", "--ray-address", address, "--", *FLAGS,
    ]  # fmt: skip


class RayRouter(RouterProcess):
    """A router whose replicas are held by actors."""

    process: subprocess.Popen[str]

    def __init__(self, url: str, pid: int, mark: str) -> None:
        super().__init__(url, pid)
        self.mark = mark

    def replicas(self) -> list[int]:
        """Ray starts their actors, so they are found by the mark in their environment."""
        found = []
        for pid in processes_with(self.mark):
            with contextlib.suppress(OSError):
                if PART in Path(f"/proc/{pid}/cmdline").read_text().split("\0"):
                    found.append(pid)
        return found

    def hosts(self) -> list[str]:
        """Of the replicas that are well."""
        return sorted(httpx.URL(worker["url"]).host for worker in self.workers() if worker["is_healthy"])

    def actors(self) -> set[int]:
        """The processes that hold the servers."""
        return {int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in self.replicas()}

    @contextlib.contextmanager
    def check_a_replica_is_replaced(self) -> Iterator[None]:
        """The block ends one of the two replicas. Then another actor starts another one. No request fails meanwhile."""
        before, actors = self.workers(), self.actors()
        with self.asked_all_the_time():
            yield
            urls = {worker["url"] for worker in before}
            until(lambda: len({worker["url"] for worker in self.workers()} - urls) == 1, f"a new replica. {LOOK}")
            until(lambda: len(self.hosts()) == 2, f"it to be well. {LOOK}")
        check_answers(self.answers)
        until(lambda: len(self.replicas()) == 2, f"two servers, got {self.replicas()}. {LOOK}")
        assert len(self.actors() - actors) == 1, f"before {actors}, after {self.actors()}. {LOOK}"


@pytest.fixture(scope="module")
def mark() -> str:
    """In the environment of the cluster's processes, and so of all replicas."""
    return f"ray-{os.getpid()}"


@pytest.fixture(scope="module")
def cluster(mark: str) -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (environment() | {"LLM_ENGINE_TEST": mark}).items():
            patch.setenv(name, value)
        cluster = Cluster(initialize_head=True, head_node_args={"node_ip_address": HEAD, **NODE_ARGS})
        try:
            cluster.add_node(node_ip_address=NODE, **NODE_ARGS)
            yield cluster
        finally:
            cluster.shutdown()


@pytest.fixture(scope="module")
def router(cluster: Cluster, mark: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayRouter]:
    with (tmp_path_factory.mktemp("router") / "stderr").open("w+") as errors:
        process = subprocess.Popen(
            router_command(cluster.address), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=errors,
            text=True,
        )  # fmt: skip
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert "routing on" in line, f"{line!r}, {errors.seek(0)}{errors.read()}"
            router = RayRouter(line.split()[2], process.pid, mark)
            router.process = process
            until(lambda: len(router.hosts()) == 2, f"both replicas to serve. {LOOK}")
            yield router
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def test_each_node_has_a_replica(router: RayRouter) -> None:
    assert router.hosts() == [HEAD, NODE], f"got {router.workers()}. {LOOK}"
    texts = set()
    for worker in router.workers():
        answer = httpx.post(f"{worker['url']}/v1/completions", json=BODY, timeout=TIMEOUT_S, trust_env=False)
        texts.add(answer.json()["choices"][0]["text"])
    assert len(texts) == 1, f"the replicas' answers differ: {texts}. {LOOK}"
    assert router.ask().json()["choices"][0]["text"] in texts, LOOK


def test_a_server_that_is_killed_is_replaced(router: RayRouter) -> None:
    """Its actor ends too: it has the CPU that the new one needs."""
    with router.check_a_replica_is_replaced():
        os.kill(router.replicas()[0], signal.SIGKILL)


def test_an_actor_that_is_killed_is_replaced(router: RayRouter) -> None:
    with router.check_a_replica_is_replaced():
        os.kill(router.actors().pop(), signal.SIGKILL)


def test_the_replica_of_a_lost_node_starts_on_a_new_one(router: RayRouter, cluster: Cluster) -> None:
    with router.check_a_replica_is_replaced():
        [node] = cluster.worker_nodes
        cluster.remove_node(node, allow_graceful=False)
        until(lambda: router.hosts() == [HEAD], f"the lost replica to be removed: {router.workers()}. {LOOK}")
        cluster.add_node(node_ip_address=NEW_NODE, **NODE_ARGS)
    assert router.hosts() == [HEAD, NEW_NODE], f"got {router.workers()}. {LOOK}"


def test_nothing_is_left_after_sigterm(router: RayRouter, cluster: Cluster, mark: str) -> None:
    """SIGTERM comes while one replica serves and the other one is started."""
    os.kill(router.replicas()[0], signal.SIGKILL)
    until(lambda: len(router.workers()) == 1, f"it to be removed. {LOOK}")
    router.process.send_signal(signal.SIGTERM)
    assert router.process.wait(TIMEOUT_S) == 0, LOOK

    def left() -> list[str]:
        """The command lines of servers and actors."""
        commands = []
        for pid in processes_with(mark):
            with contextlib.suppress(OSError):
                commands.append(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " "))
        return [command for command in commands if PART in command or "ReplicaActor" in command]

    until(lambda: not left(), f"no server and no actor to be left: {left()}. {LOOK}")


def check_refused(env: dict[str, str], address: str, *words: str) -> None:
    done = subprocess.run(
        router_command(address), cwd=ROOT, env=env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), f"got {done}. {LOOK}"
    for word in words:
        assert word in done.stderr, f"expected {word!r}, got {done.stderr}. {LOOK}"


def test_there_is_no_cluster() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    for wrong in (address, "127.0.0.1", "127.0.0.1:0"):
        check_refused(environment(), wrong, f"ray_address: no Ray cluster at {wrong}: ")


def test_ray_is_not_installed(tmp_path: Path) -> None:
    (tmp_path / "ray.py").write_text("raise ModuleNotFoundError('No module named ray')", encoding="utf-8")
    env = environment()
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), env["PYTHONPATH"]])
    check_refused(env, "auto", "replica_backend: ray is not installed: pip install ray")
