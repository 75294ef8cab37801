"""Call a kernel's launcher, a C function, from Python: tensors become pointers, and the stream comes last."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..build import SOURCES, Target, build

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3, torch.uint8: 4}  # see common.cuh
UNSUPPORTED = -1  # what a launcher returns if it has no kernel for a dtype or a size


class KernelError(RuntimeError):
    """A launch failed, or the emulation found a mistake; the message says which."""


class Library:
    """The launchers of one .cu file, built for the device of their first tensor and for the dtypes of the call.

    call("f", a, 3, 0.5) is `f(a.data_ptr(), 3, 0.5f, stream)`.
    """

    def __init__(self, name: str, sanitizer: str = "") -> None:
        self.source, self.sanitizer = SOURCES / f"{name}.cu", sanitizer

    def call(self, symbol: str, *args: Tensor | torch.dtype | int | float | None) -> None:
        """Launch. Tensors must be on the same device; None is a null pointer, a dtype its code.

        Raises KernelError if the launcher has no kernel for these dtypes and sizes, if the launch fails, or if the
        emulation finds a mistake in the kernel; and what build() raises.
        """
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        library = load(self.source, Target(architecture(device), self.sanitizer, only(args)))
        with torch.cuda.device_of(torch.empty(0, device=device)):
            stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
            status = getattr(library, symbol)(*map(to_c, args), ctypes.c_void_p(stream))
        if status == UNSUPPORTED:
            shapes = [tuple(arg.shape) for arg in args if isinstance(arg, Tensor)]
            raise KernelError(f"{symbol} has no kernel for these dtypes and sizes: {shapes}, {args}")
        if status:
            raise KernelError(f"{symbol}: {library.kernel_error(status).decode()}")


def to_c(arg: Tensor | torch.dtype | int | float | None) -> object:
    match arg:
        case Tensor():
            return ctypes.c_void_p(arg.data_ptr())
        case torch.dtype():
            return ctypes.c_int(DTYPE_CODES[arg])
        case float():
            return ctypes.c_float(arg)
        case None:
            return ctypes.c_void_p(None)
    return ctypes.c_longlong(arg)


def only(args: Sequence[object]) -> tuple[str, ...]:
    """The macros that leave out kernels for other dtypes: see common.cuh. The second dtype is that of a KV cache."""
    codes = [DTYPE_CODES[arg] for arg in args if isinstance(arg, torch.dtype)]
    return tuple(f"{name}={code}" for name, code in zip(("ONLY_DTYPE", "ONLY_CACHE_DTYPE"), codes, strict=False))


@cache
def load(source: Path, target: Target) -> ctypes.CDLL:
    library = ctypes.CDLL(str(build(source, target)))
    library.kernel_error.restype = ctypes.c_char_p
    return library


@cache
def architecture(device: torch.device) -> str:
    if device.type != "cuda":
        return "cpu"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
