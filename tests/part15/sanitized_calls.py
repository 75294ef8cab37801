"""Calls of kernels in a process with ThreadSanitizer or AddressSanitizer.

A sanitizer's runtime must be loaded before everything else, and should not watch torch. So the process has neither
torch nor NumPy: it gets calls on stdin, each as a line of JSON and the bytes of its tensors, and answers with the bytes
as the kernel left them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
ALIGNMENT = 64  # of a tensor's memory; what follows it is watched


class SanitizedProcess:
    """Stands in for the process that runs kernels. call() has the arguments of Library.call."""

    def __init__(self, sanitizer: str, compiler: str) -> None:
        self.sanitizer = sanitizer
        runtime = {"thread": "libtsan.so", "address": "libasan.so"}[sanitizer]
        found = subprocess.run([compiler, f"-print-file-name={runtime}"], capture_output=True, text=True, check=True)
        options = "halt_on_error=1 exitcode=66 detect_leaks=0 report_signal_unsafe=0"
        env = {**os.environ, "LD_PRELOAD": found.stdout.strip(), "TSAN_OPTIONS": options, "ASAN_OPTIONS": options}
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD], cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip

    def call(self, library: Path, symbol: str, *args: object) -> int:
        """Call a launcher there, and copy back what it wrote. Returns its status. Raises AssertionError with the
        sanitizer's report."""
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        described = [describe(arg) for arg in args]
        header = json.dumps({"library": str(library), "symbol": symbol, "args": described}).encode()
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(header + b"\n" + b"".join(map(to_bytes, tensors)))
            self.process.stdin.flush()
            status = json.loads(self.process.stdout.readline())
            for tensor in tensors:
                from_bytes(tensor, self.process.stdout)
        except (BrokenPipeError, ValueError):
            _, report = self.process.communicate()
            raise AssertionError(f"{symbol}: {self.sanitizer} sanitizer:\n{report.decode(errors='replace')}") from None
        return int(status)

    def close(self) -> None:
        self.process.communicate()


def describe(arg: object) -> list[Any]:
    """The kind and the value of an argument; a tensor's value is its size in bytes."""
    match arg:
        case Tensor():
            return ["tensor", arg.untyped_storage().nbytes() - arg.storage_offset() * arg.element_size()]
        case torch.dtype():
            from part15_full_architecture.worker.kernels.cuda.library import DTYPE_CODES

            return ["int", DTYPE_CODES[arg]]
        case float():
            return ["float", arg]
        case None:
            return ["null", 0]
    return ["longlong", int(str(arg))]


def whole(tensor: Tensor) -> Tensor:
    """A tensor's memory from its first element on, as bytes: with the gaps that strides leave."""
    storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())  # type: ignore[call-overload]
    return storage[tensor.storage_offset() * tensor.element_size() :]


def to_bytes(tensor: Tensor) -> bytes:
    return bytes(whole(tensor).numpy())


def from_bytes(tensor: Tensor, stream: IO[bytes]) -> None:
    memory = whole(tensor)
    data = stream.read(len(memory))
    assert len(data) == len(memory), "the process has ended"
    if data:
        memory.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))


CHILD = f"""
import ctypes, json, sys
libc, libraries, ALIGNMENT = ctypes.CDLL(None), {{}}, {ALIGNMENT}
kinds = {{"int": ctypes.c_int, "longlong": ctypes.c_longlong, "float": ctypes.c_float}}
while line := sys.stdin.buffer.readline():
    call, values, memories = json.loads(line), [], []
    for kind, value in call["args"]:
        if kind == "tensor":
            memory = ctypes.c_void_p()
            assert libc.posix_memalign(ctypes.byref(memory), ALIGNMENT, value) == 0
            ctypes.memmove(memory, sys.stdin.buffer.read(value), value)
            memories.append((memory, value))
            values.append(memory)
        else:
            values.append(ctypes.c_void_p(None) if kind == "null" else kinds[kind](value))
    path = call["library"]
    library = libraries[path] = libraries.get(path) or ctypes.CDLL(path)
    status = getattr(library, call["symbol"])(*values, ctypes.c_void_p(None))
    sys.stdout.buffer.write(json.dumps(status).encode() + b"\\n")
    for memory, size in memories:
        sys.stdout.buffer.write(ctypes.string_at(memory, size))
        libc.free(memory)
    sys.stdout.buffer.flush()
"""
