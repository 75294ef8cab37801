"""Writing a trace file without holding up the engine, and reading one."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from common.errors import FieldError
from common.trace.deltas import StepDeltas
from common.trace.schema import SCHEMA_VERSION, StepTrace, Trace

FLUSH_INTERVAL_S = 0.1
LIVE_NAME, MAX_LIVE_BYTES = "live-for-the-viewer.trace", 16_000_000


class TokenTexts:
    """The texts of a model's tokens. Without a tokenizer, there are none. known: tokens whose texts are in the file."""

    def __init__(self, model: str) -> None:
        from common.checkpoint import load_tokenizer, resolve_checkpoint  # here: reading a trace doesn't need torch

        self.known = set[int]()
        self._tokenizer: Any = None
        with contextlib.suppress(FieldError, OSError):
            self._tokenizer = load_tokenizer(resolve_checkpoint(model))

    def added_to(self, step: StepTrace) -> StepTrace:
        """The step, with the texts of tokens that are in no step before it."""
        if self._tokenizer is not None:
            ids = {token for each in step.requests for token in (*each.prompt_token_ids, *each.token_ids)}
            step.texts = {token: self._tokenizer.decode([token]) for token in sorted(ids - self.known)}
            self.known |= ids
        return step


class TraceWriter:
    """Writes a trace file, replacing an existing one. A separate thread writes, so that no step waits for the disk.

    Raises FieldError if the file cannot be opened. If a later write fails (disk full), it prints one warning to stderr
    and drops the rest of the trace; the engine continues. write() may be called from any thread; after close() it does
    nothing. deltas: what of the engine is in the file. A file whose name begins with LIVE_NAME, which the viewer reads
    while it is written, begins again when it has MAX_LIVE_BYTES; its header counts how often it has ("restarts").
    """

    def __init__(self, path: Path | str, *, part: str, model: str, block_size: int | None = None) -> None:
        try:
            self._file = Path(path).open("wb")  # noqa: SIM115, close() closes it
        except OSError as error:
            raise FieldError("trace", f"cannot write {str(path)!r}: {error.strerror}") from error
        self._path = path
        self._is_live = Path(path).name.startswith(LIVE_NAME)
        self._began = time.perf_counter()
        self._texts, self.deltas = TokenTexts(model), StepDeltas()
        self._lock = threading.Lock()
        self._is_open, self._is_full = True, False
        self._restarts, self._restarted_s = -1, 0.0
        date = time.strftime("%Y-%m-%d", time.gmtime())
        self._header = {"trace": SCHEMA_VERSION, "part": part, "model": model, "date": date, "began_s": self._began}
        if block_size is not None:
            self._header["block_size"] = block_size
        self._steps: list[StepTrace | None] = [None]  # None: the file begins here
        self.flush()
        self._closing = threading.Event()
        self._flusher = threading.Thread(target=self._flush_each_interval, name="trace-writer", daemon=True)
        self._flusher.start()

    def elapsed_s(self) -> float:
        """Seconds since the start of the trace, for StepTrace.start_s."""
        return time.perf_counter() - self._began

    def write(self, step: StepTrace) -> None:
        """Queue a step, which must not change any more; it is written at most FLUSH_INTERVAL_S later."""
        if not self._is_open:
            return
        with self._lock:
            if step.start_s < self._restarted_s:  # it was in flight, and says only what was new for the old file
                self.deltas.forget_cached()
                return
            self._steps.append(step)
            if self._is_full:
                self._steps.append(None)
                self._is_full, self.deltas, self._restarted_s = False, StepDeltas(), self.elapsed_s()

    def close(self) -> None:
        """Write the remaining steps and close the file. A second call does nothing."""
        self._closing.set()
        self._flusher.join()
        self.flush()
        self._is_open = False
        with contextlib.suppress(OSError):  # flush() has already warned
            self._file.close()

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _flush_each_interval(self) -> None:
        while not self._closing.wait(FLUSH_INTERVAL_S):
            self.flush()

    def flush(self) -> None:
        """Write what is queued. A separate thread does so every FLUSH_INTERVAL_S."""
        with self._lock:
            steps, self._steps = self._steps, []
        if not steps or not self._is_open:
            return
        try:
            for step in steps:
                if step is None:
                    self._begin()
                else:
                    self._file.write(msgspec.json.encode(self._texts.added_to(step)) + b"\n")
            self._file.flush()
            self._is_full |= self._is_live and self._file.tell() > MAX_LIVE_BYTES
        except OSError as error:
            self._is_open = False
            print(
                f"warning: trace {self._path}: {error.strerror}; tracing stops, the engine continues", file=sys.stderr
            )

    def _begin(self) -> None:
        """With the header, and nothing else."""
        self._texts.known.clear()
        self._restarts += 1
        if self._is_live:  # other files begin once, and may be pipes
            self._file.seek(0)
            self._file.truncate()
            self._header["restarts"] = self._restarts
        self._file.write(msgspec.json.encode(self._header) + b"\n")


def read_trace(path: Path | str) -> Trace:
    """Read a trace file, even while it is being written: an incomplete last line is skipped, with a note.

    Raises FieldError, a ValueError, naming the file and the line, if the format is wrong anywhere else.
    """
    *lines, rest = Path(path).read_bytes().split(b"\n")
    if not lines:
        raise FieldError(f"{path}:1", "no header line, this is not a trace file")
    header = _read_header(f"{path}:1", lines[0])
    decoder = msgspec.json.Decoder(StepTrace)
    steps = [_read_step(decoder, f"{path}:{number}", line) for number, line in enumerate(lines[1:], start=2)]
    note = f"{path}:{len(lines) + 1}: the line is incomplete and was skipped" if rest else None
    return Trace(header, steps, note)


def _read_header(where: str, line: bytes) -> dict[str, Any]:
    try:
        header = msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise FieldError(where, f"not the header of a trace: {error}") from error
    if header.get("trace") != SCHEMA_VERSION:
        raise FieldError(where, f'expected a header with "trace": {SCHEMA_VERSION}, got {header.get("trace")!r}')
    return header


def _read_step(decoder: msgspec.json.Decoder[StepTrace], where: str, line: bytes) -> StepTrace:
    try:
        return decoder.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise FieldError(where, f"not a step of a trace: {error}") from error
