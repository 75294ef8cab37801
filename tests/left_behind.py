"""What a server has left, however it has ended: its processes have a mark in their environment, and its files are in a
folder of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from tests.contract.test_process import processes_with
from tests.forked_servers import until
from tests.process_checks import course_environment


class Traces:
    def __init__(self, part_dir: Path, folder: Path, look: str) -> None:
        self.part_dir, self.folder, self.look, self.mark = part_dir, folder, look, uuid.uuid4().hex

    @property
    def env(self) -> dict[str, str]:
        """For the server."""
        return course_environment(self.part_dir) | {"TMPDIR": str(self.folder), "LLM_ENGINE_TEST": self.mark}

    def processes(self, name: str = "") -> list[int]:
        """Those whose command line has this in it, oldest first."""
        found = []
        for pid in processes_with(self.mark):
            with contextlib.suppress(OSError):
                if name in Path(f"/proc/{pid}/cmdline").read_text():
                    found.append((int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]), pid))
        return [pid for _, pid in sorted(found)]

    def ranks(self) -> list[int]:
        """The processes that fork servers have forked, oldest first."""
        forked = self.processes("forkserver")
        return [pid for pid in forked if _parent(pid) in forked]

    def check_nothing_is_left(self) -> None:
        until(lambda: not self.processes(), f"all processes to end, {self.processes()}. {self.look}")
        left = [str(path) for pattern in ("llm-*", "pymp-*") for path in self.folder.glob(pattern)]
        assert not left, f"files are left: {left}. {self.look}"


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


@contextlib.contextmanager
def tracing(part_dir: Path, look: str) -> Iterator[Traces]:
    """In the end, processes that are left are killed."""
    with tempfile.TemporaryDirectory(prefix="t-") as folder:  # short: a socket's path has about 100 characters
        found = Traces(part_dir, Path(folder), look)
        yield found
        for pid in found.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
