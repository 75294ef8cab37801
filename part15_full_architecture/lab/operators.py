"""How many operators of torch are called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class CallCounter(TorchDispatchMode):
    """Counts torch's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.num_calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_calls += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def replaced_run(runner: Any, run: Callable[..., Any]) -> Iterator[None]:
    """Inside, steps of a ModelRunner are run by another function, which may call its own."""
    runner.run = run
    try:
        yield
    finally:
        del runner.run
