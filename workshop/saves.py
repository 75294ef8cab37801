"""Notice when the learner saves a file."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

import watchfiles

from workshop.bodies import LANGUAGES
from workshop.course import Part


class Saves:
    """Watches the source files of the learner's copy in a thread, also if the copy is replaced."""

    def __init__(self, part: Part) -> None:
        self.copy = part.copy
        self._saved, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(part.workspace,), daemon=True)
        self._thread.start()

    def _watch(self, workspace: Path) -> None:
        changes = watchfiles.watch(workspace, watch_filter=self._is_source, stop_event=self._stop)
        for _ in changes:
            self._saved.set()

    def _is_source(self, change: watchfiles.Change, path: str) -> bool:
        return path.endswith(tuple(LANGUAGES)) and Path(path).is_relative_to(self.copy)

    def any(self) -> bool:
        """Whether a file was saved since forget()."""
        return self._saved.is_set()

    def forget(self) -> None:
        self._saved.clear()

    def wait(self) -> None:
        """Until a file is saved."""
        self._saved.wait()

    def __enter__(self) -> Saves:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
