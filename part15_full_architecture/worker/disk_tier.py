"""KV blocks in files of a directory, which survive a restart and are shared by all engines that use the directory."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

SUFFIX = ".kv"
TEMPORARY = ".tmp"  # of files that are being written, or were when the engine was killed
LEFT_OVER_S = 3_600.0  # after that, nobody is still writing
SLACK = 0.9  # of the limit: what is left after files were deleted


class DiskTier:
    """One file for each block. The files' times of modification say when they were last used.

    num_bytes: the limit for all files together, whichever engine has written them. When it is exceeded, the least
    recently used files are deleted. Several engines, and several ranks of one, may use the directory. Each counts all
    files after it has written a tenth of the limit, so each may exceed the limit by that much.
    """

    def __init__(self, directory: str, num_bytes: int) -> None:
        """Raises OSError if there can't be such a directory."""
        self.name, self.directory, self.limit = f"disk {directory}", Path(directory), num_bytes
        self.directory.mkdir(parents=True, exist_ok=True)
        for path in self.directory.glob(f"*{TEMPORARY}"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < time.time() - LEFT_OVER_S:
                    path.unlink()
        self._num_bytes = self.limit + 1  # of all files, as far as is known: _make_room() counts
        self._num_written = 0  # bytes since they were last counted
        self._make_room(0)

    def contains(self, keys: Sequence[str]) -> list[bool]:
        return [self._path(key).is_file() for key in keys]

    def read(self, keys: Sequence[str]) -> list[bytes | None]:
        return [self._read(self._path(key)) for key in keys]

    def _read(self, path: Path) -> bytes | None:
        try:
            data = path.read_bytes()
            os.utime(path)  # it was used now
        except FileNotFoundError:
            return None
        return data

    def write(self, key: str, data: bytes) -> None:
        """Write under a temporary name, then rename: another engine sees the whole file or none. Does nothing if the
        limit is too small for it."""
        if len(data) > self.limit:
            return
        self._make_room(len(data))
        self.directory.mkdir(parents=True, exist_ok=True)  # it may have been deleted
        descriptor, name = tempfile.mkstemp(TEMPORARY, dir=self.directory)
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            temporary.replace(self._path(key))
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        self._num_bytes += len(data)
        self._num_written += len(data)

    def delete(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)

    def _make_room(self, num_bytes: int) -> None:
        """If a file of num_bytes exceeds the limit, count what is there, and delete the least recently used files."""
        is_recent = self._num_written + num_bytes <= (1 - SLACK) * self.limit  # others write, too
        if is_recent and self._num_bytes + num_bytes <= self.limit:
            return
        files = list[tuple[float, int, Path]]()
        for path in self.directory.glob(f"*{SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):  # another engine may delete it
                stat = path.stat()
                files.append((stat.st_mtime, stat.st_size, path))
        self._num_bytes, self._num_written = sum(size for _, size, _ in files), 0
        if self._num_bytes + num_bytes <= self.limit:
            return
        for _, size, path in sorted(files):
            if self._num_bytes + num_bytes <= SLACK * self.limit:
                break
            path.unlink(missing_ok=True)
            self._num_bytes -= size

    def _path(self, key: str) -> Path:
        return self.directory / f"{key}{SUFFIX}"
