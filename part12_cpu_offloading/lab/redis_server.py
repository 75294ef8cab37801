"""A Redis server for a benchmark, a demo or a test."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator

from common.serve import end_with_parent

START_TIMEOUT_S = 10.0


def is_installed() -> bool:
    return shutil.which("redis-server") is not None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def redis_server(*flags: str, port: int | None = None) -> Iterator[str]:
    """Starts `redis-server`, which keeps nothing on disk, on a free port. Yields its URL. It ends with this process.

    Raises OSError if it isn't installed or doesn't start.
    """
    port = port or free_port()
    with tempfile.TemporaryDirectory(prefix="redis-") as directory:
        command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", directory]
        process = subprocess.Popen([*command, *flags], stdout=subprocess.DEVNULL, preexec_fn=end_with_parent())
        try:
            wait_for_port(port, process)
            yield f"redis://127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait()


def wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    """Raises OSError if nothing listens there in time, or the process has ended."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline_s:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.02)
    raise OSError(f"redis-server does not listen on port {port}")
