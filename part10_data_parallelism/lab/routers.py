"""Routers as processes, for the bench: this part's, SGLang's and vLLM's, all in front of the same replicas."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from common.serve import server_process

from ..router.policies import MAX_DIFFERENCE, MAX_RATIO, MIN_MATCH
from ..router.processes import PART

START_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class RouterKind:
    """module: of the package that starts it, "" for this part's."""

    name: str
    policy: str
    module: str = ""


@contextlib.contextmanager
def running_router(kind: RouterKind, urls: Sequence[str], python: str | None) -> Iterator[str]:
    """Its URL, as soon as it answers. python: an interpreter that has the peers' packages."""
    if not kind.module:
        with server_process(f"{PART}.router", "--worker-urls", ",".join(urls), "--policy", kind.policy) as url:
            yield url
        return
    assert python is not None
    port, other_port = free_ports(2)
    url = f"http://127.0.0.1:{port}"
    command = [
        python, "-m", kind.module, "--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(other_port),
        "--worker-urls", *urls, "--policy", kind.policy, "--log-level", "error",
        "--cache-threshold", str(MIN_MATCH), "--balance-abs-threshold", str(MAX_DIFFERENCE),
        "--balance-rel-threshold", str(MAX_RATIO),  # their libraries' defaults; their commands have others
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
        try:
            wait_until_it_serves(url, process, log.name)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_until_it_serves(url: str, process: subprocess.Popen[bytes], log: str) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": 1, "temperature": 0}
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.post(f"{url}/v1/completions", json=body, timeout=30, trust_env=False).status_code == 200:
                return
        if process.poll() is not None or time.monotonic() > deadline_s:
            raise OSError(f"the router at {url} does not serve: {Path(log).read_text()[-1000:]}")
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """They may be taken by others before they are used, but not by each other."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def has_module(python: str, module: str) -> bool:
    found = subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False)
    return found.returncode == 0
