"""Servers of the parts, in processes of their own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from common.serve import end_with_parent
from workshop.failures.checks import CheckFailed, until
from workshop.failures.clients import HTTP, ask

ROOT = Path(__file__).resolve().parents[2]
END_S = 20.0  # until a server that doesn't end is killed
READY = re.compile(r"on (http://\S+:\d+)(?: .*?([\d,]+) KV blocks)?(?:.*engine core in process (\d+))?")


@dataclass
class Server:
    """`python -m part… --port 0 flags…`. url, num_blocks, core: once it is ready; core is the process of its engine.

    common.serve.server_process starts servers as well, but gives neither their process nor their log.
    """

    command: Sequence[str]
    process: subprocess.Popen[bytes]
    log: Path
    url: str = ""
    num_blocks: int = 0
    core: int | None = None

    @classmethod
    def start(cls, module: str, flags: Sequence[str], folder: Path, number: int, env: Mapping[str, str]) -> Server:
        """Returns at once. folder: for its log and all its temporary files."""
        command, log = [sys.executable, "-m", module, "--port", "0", *flags], folder / f"server{number}.log"
        with log.open("w") as errors, log.with_suffix(".out").open("w") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=errors, start_new_session=True, preexec_fn=end_with_parent(),
                env={**os.environ, "HF_HUB_OFFLINE": "1", "TMPDIR": str(folder), **env},
            )  # fmt: skip
        return cls(command, process, log)

    def wait_until_ready(self) -> None:
        """Raises CheckFailed, with the end of its log, if it does not start."""
        output = self.log.with_suffix(".out")
        until(lambda: output.read_text().endswith("\n") or self.has_ended, f"{self.name} to start")
        match = READY.search(output.read_text())
        if match is None:
            raise CheckFailed(f"the start of {self.name}", "a server", f"in its log: {self.said()[-1_000:]}")
        self.url, self.core = match[1], int(match[3]) if match[3] else None
        self.num_blocks = int((match[2] or "0").replace(",", ""))

    @property
    def name(self) -> str:
        return " ".join(["python", *self.command[1:]])

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def said(self) -> str:
        """Its log so far."""
        return self.log.read_text(errors="replace")

    def metrics(self) -> dict[str, float]:
        """Name → value, of metrics without labels, and of those with labels the name and the labels."""
        text = httpx.get(f"{self.url}/metrics", **HTTP).text
        found = re.findall(r"^(?:engine|router):(\w+?)(?:_total)?((?:\{.*\})?) (\S+)$", text, re.MULTILINE)
        return {name + labels: float(value) for name, labels, value in found}

    def counters(self) -> dict[str, float]:
        """The same, after a request for one token: from part 5 on, the engine reports its numbers with its outputs."""
        ask(self.url, "Hi", 1)
        return self.metrics()

    def blocks_in_use(self, found: Mapping[str, float] | None = None) -> int:
        """How many KV blocks the requests hold. found: the metrics, if they have been read already."""
        return round(self.num_blocks * (self.metrics() if found is None else found)["kv_cache_usage_perc"])

    def tokenize(self, text: str) -> list[int]:
        response = httpx.post(f"{self.url}/tokenize", json={"prompt": text}, **HTTP)
        return list(response.raise_for_status().json()["tokens"])

    def reset_prefix_cache(self) -> None:
        """All requests must have ended; their last copies may not have."""

        def is_reset() -> bool:
            url = f"{self.url}/reset_prefix_cache"
            return httpx.post(url, json={}, **HTTP).status_code == 200

        until(is_reset, f"POST {self.url}/reset_prefix_cache to be accepted")

    def end(self) -> None:
        """End the server, however many requests it has, and its engine."""
        for _ in range(2):  # the second signal ends open requests
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(END_S / 2)
        if not self.has_ended:
            self.process.kill()
            self.process.wait()
        deadline_s = time.monotonic() + END_S
        while self.core is not None and is_running(self.core):  # it ends with the server
            if time.monotonic() > deadline_s:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.core, signal.SIGKILL)
            time.sleep(0.02)


def state_of(pid: int) -> str:
    """As /proc says: R or S while it runs, T when it is stopped, Z when it has ended. Without /proc, R; empty if there
    is no such process."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "R" if not Path("/proc/self").exists() else ""
    except (ProcessLookupError, PermissionError):
        return ""


def is_running(pid: int) -> bool:
    return state_of(pid) not in ("", "Z")


def children_of(pid: int) -> list[int]:
    """The processes that a process has started, oldest first."""
    found = list[tuple[int, int]]()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid:
                found.append((int(fields[19]), int(path.parent.name)))
    return [child for _, child in sorted(found)]


def command_line(pid: int) -> str:
    """Empty if the process has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return ""


def resume(pid: int) -> None:
    """Let a process go on that may have been stopped, and may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
