"""router/fleet.py, processes.py: replicas that the router starts, in real processes, are replaced and renewed.

The router and its replicas are forked (tests/forked_servers.py). test_sigterm_while_replicas_start starts them as a
user does, and so does tests/part13/test_process.py.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from common.checkpoint import load_model, load_tokenizer, resolve_checkpoint
from common.testing import reference_greedy
from part10_data_parallelism.router.fleet import with_model
from tests.contract.test_process import processes_with
from tests.forked_servers import Host, until
from tests.process_checks import course_environment
from workshop.failures.servers import children_of

ROOT = Path(__file__).parents[2]
PART = "part10_data_parallelism"
LOOK = 'Look at router/fleet.py::Fleet; README "Replicas come and go".'
KEY = {"Authorization": "Bearer key"}
TIMEOUT_S = 300.0
BODY: dict[str, Any] = {"model": "tiny", "prompt": [5] * 7, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
FLAGS = ["--device", "cpu", "--num-threads", "1", "--num-kv-blocks", "64", "--no-log-stats"]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], ["--model", "new", "--served-model-name", "tiny"]),
        (
            ["--model", "old", "--num-threads", "1"],
            ["--num-threads", "1", "--model", "new", "--served-model-name", "old"],
        ),
        (["--model=old"], ["--model", "new", "--served-model-name", "old"]),
        (["--model", "a/b", "--served-model-name", "x"], ["--model", "new", "--served-model-name", "x"]),
    ],
)
def test_a_new_version_has_the_old_name(flags: list[str], expected: list[str]) -> None:
    got = with_model(flags, "new")
    assert got == expected, f"{flags}: expected {expected}, got {got}. {LOOK}"


class RouterProcess:
    """`python -m part10_data_parallelism.router --replicas 2`, and who asks it again and again."""

    def __init__(self, url: str, pid: int) -> None:
        self.url, self.pid = url, pid
        self.answers: list[httpx.Response | Exception] = []

    def ask(self, **fields: Any) -> httpx.Response:
        return httpx.post(
            f"{self.url}/v1/completions", json={**BODY, **fields}, headers=KEY, timeout=TIMEOUT_S, trust_env=False,
            verify=False,
        )  # fmt: skip

    def workers(self) -> list[dict[str, Any]]:
        found = httpx.get(f"{self.url}/workers", headers=KEY, timeout=TIMEOUT_S, trust_env=False, verify=False)
        return found.json()["workers"]

    def replicas(self) -> list[int]:
        """The processes of the replicas' servers, without their cores."""
        return children_of(self.pid)

    @contextlib.contextmanager
    def asked_all_the_time(self) -> Iterator[None]:
        """Also before and after what happens in the block."""
        stop, self.answers = threading.Event(), []

        def wait_for_more() -> None:
            count = len(self.answers) + 3
            until(lambda: len(self.answers) >= count, f"three more answers, after {self.answers}. {LOOK}")

        def ask() -> None:
            while not stop.wait(0.01):
                try:
                    self.answers.append(self.ask())
                except httpx.HTTPError as error:
                    self.answers.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        try:
            wait_for_more()
            yield
            wait_for_more()
        finally:
            stop.set()
            thread.join()


@pytest.fixture(scope="module")
def router(one_host: Host) -> Iterator[RouterProcess]:
    process = one_host.route(f"{PART}.router", "--api-key", "key", "--replicas", "2", "--", *FLAGS)
    started = RouterProcess(process.url, process.pid)
    until(lambda: len(started.workers()) == 2, f"both replicas to serve. {LOOK}")
    yield started
    os.kill(process.pid, signal.SIGTERM)
    status = process.wait()
    assert status == 0, f"{status}, {process.stderr.read_text()}. {LOOK}"
    until(lambda: not one_host.ask(alive=True)["alive"], f"all processes to end. {LOOK}")


@functools.cache
def expected_text() -> str:
    """transformers' answer, which is part 1's."""
    checkpoint = resolve_checkpoint("tiny")
    token_ids = reference_greedy(load_model(checkpoint, torch.float32, "cpu"), BODY["prompt"], BODY["max_tokens"])
    return load_tokenizer(checkpoint).decode(token_ids, skip_special_tokens=True)


def check_answers(answers: list[httpx.Response | Exception]) -> None:
    for answer in answers:
        assert isinstance(answer, httpx.Response) and answer.status_code == 200, f"got {answer!r}. {LOOK}"
        text = answer.json()["choices"][0]["text"]
        assert text == expected_text(), f"expected {expected_text()!r}, got {text!r}. {LOOK}"


def test_a_replica_that_does_not_start(one_host: Host) -> None:
    router = one_host.route(f"{PART}.router", "--replicas", "2", "--", "--x", "1")
    cause = "unrecognized arguments: --x 1 (--help lists the flags)"
    expected = (1, f"error: a replica did not start: {PART}: error: {cause}\n")
    got = (router.wait(), router.stderr.read_text())
    assert got == expected, f"expected {expected}, got {got}. {LOOK}"


def test_sigterm_while_replicas_start() -> None:
    mark = f"starting-{os.getpid()}"
    command = [sys.executable, "-m", f"{PART}.router", "--port", "0", "--replicas", "2"]
    env = course_environment(ROOT / PART) | {"LLM_ENGINE_TEST": mark}
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and "2 replicas start" in process.stdout.readline()
        until(lambda: len(processes_with(mark)) >= 3, f"the replicas' processes. {LOOK}")
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 0, LOOK
    until(lambda: not processes_with(mark), f"all processes to end: {processes_with(mark)}. {LOOK}")


def test_a_replica_that_is_killed_is_replaced_and_no_request_fails(router: RouterProcess) -> None:
    """One without an answer yet is sent to the other replica."""
    before = {worker["url"] for worker in router.workers()}
    with router.asked_all_the_time():
        os.kill(router.replicas()[0], signal.SIGKILL)
        until(lambda: len({worker["url"] for worker in router.workers()} - before) == 1, f"a new replica. {LOOK}")
        until(lambda: all(worker["is_healthy"] for worker in router.workers()), f"it to be well. {LOOK}")
    assert len(router.replicas()) == 2, LOOK
    check_answers(router.answers)


def test_a_new_version_is_rolled_in_and_no_request_fails(router: RouterProcess) -> None:
    before = {worker["url"] for worker in router.workers()}
    with router.asked_all_the_time():
        refused = httpx.post(
            f"{router.url}/rollout", json={"model": "no-such-model"}, headers=KEY, timeout=TIMEOUT_S, trust_env=False
        )
        assert refused.status_code == 400 and "no-such-model" in refused.text, f"{refused.text}. {LOOK}"
        assert {worker["url"] for worker in router.workers()} == before, f"the old ones still serve. {LOOK}"
        done = httpx.post(
            f"{router.url}/rollout", json={"model": str(ROOT / "models" / "tiny")}, headers=KEY, timeout=TIMEOUT_S,
            trust_env=False,
        )  # fmt: skip
    assert done.status_code == 200, f"{done.text}. {LOOK}"
    after = {worker["url"] for worker in done.json()["workers"]}
    assert len(after) == 2 and not after & before, f"before {before}, after {after}. {LOOK}"
    check_answers(router.answers)
    assert router.ask().json()["model"] == "tiny", f"it is known by the same name. {LOOK}"
