"""The names of operations and backends, and what --kernels says of them."""

from __future__ import annotations

from collections.abc import Mapping

from common.errors import FieldError

NAMES = ("attention", "norm", "rotary", "activation", "sampling", "quantized_linear", "grouped_linear")
BACKENDS = ("torch", "numba", "triton", "cuda")
AUTO, TUNED = "auto", "tuned"


def parse_kernels(text: str) -> dict[str, str]:
    """The value of --kernels as operation → backend, "auto" or "tuned": one name for all operations, or a list such as
    attention=cuda,norm=torch, where all others are "auto". Raises FieldError."""
    names = (AUTO, TUNED, *BACKENDS)
    wanted = dict.fromkeys(NAMES, text if "=" not in text else AUTO)
    if "=" not in text:
        if text not in names:
            raise FieldError("kernels", f"expected one of {', '.join(names)}, or operation=backend,…; got {text!r}")
        return wanted
    for entry in text.split(","):
        operation, _, backend = (part.strip() for part in entry.partition("="))
        if operation not in NAMES:
            raise FieldError("kernels", f"there is no operation {operation!r}: expected one of {', '.join(NAMES)}")
        if backend not in names:
            raise FieldError("kernels", f"{operation}={backend}: expected one of {', '.join(names)}")
        wanted[operation] = backend
    return wanted


def show_kernels(choices: Mapping[str, tuple[str, str]]) -> str:
    """The backends, each with its operations, in a few words. choices: operation → backend and reason."""
    by_backend: dict[str, list[str]] = {}
    for operation, (backend, _) in choices.items():
        by_backend.setdefault(backend, []).append(operation)
    if len(by_backend) == 1:
        return next(iter(by_backend))
    return ", ".join(f"{backend} for {' and '.join(operations)}" for backend, operations in by_backend.items())
