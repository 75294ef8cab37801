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
    if not isinstance(text, str) or ("=" not in text and text.strip() not in names):
        got = repr(text)[:100]
        raise FieldError("kernels", f"expected one of {', '.join(names)}, or operation=backend,…; got {got}")
    if "=" not in text:
        return dict.fromkeys(NAMES, text.strip())
    wanted, given = dict.fromkeys(NAMES, AUTO), set[str]()
    for entry in text.split(","):
        operation, _, backend = (part.strip() for part in entry.partition("="))
        if operation not in NAMES:
            wanted_names = ", ".join(NAMES)
            raise FieldError("kernels", f"there is no operation {operation[:100]!r}: expected one of {wanted_names}")
        if backend not in names:
            raise FieldError("kernels", f"{operation}={backend[:100]}: expected one of {', '.join(names)}")
        if operation in given:
            raise FieldError("kernels", f"{operation}: expected one backend, got two")
        given.add(operation)
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
