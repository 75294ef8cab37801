"""Notices when code reads a tensor's values: on a GPU that waits for all that was launched before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = {
    *("item", "tolist", "cpu", "numpy", "nonzero", "argwhere", "unique", "unique_consecutive", "masked_select"),
    *("__bool__", "__int__", "__float__", "__index__", "__len_of__", "equal", "allclose", "bincount", "__contains__"),
}


class _Functions(TorchFunctionMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        indexes = args[1:2] if name in ("__getitem__", "__setitem__") else ()
        has_mask = any(isinstance(index, torch.Tensor) and index.dtype is torch.bool for index in indexes)
        if name in READS or has_mask or (name == "where" and len(args) == 1):
            self.found.append(f"{name} with a mask" if has_mask else name)
        if name == "to" and any(str(each).startswith("cpu") for each in [*args[1:], *(kwargs or {}).values()]):
            self.found.append("to cpu")
        return func(*args, **(kwargs or {}))


class _Kernels(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def reads_of(work: Callable[[], object]) -> list[str]:
    """The names of all calls in this work that read values back."""
    found: list[str] = []
    with _Kernels(found), _Functions(found):
        work()
    return found
