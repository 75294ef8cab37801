"""Turn Python numbers into tensors on the model's device."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_device(
    values: Sequence[object] | Tensor, device: torch.device | str, dtype: torch.dtype | None = None
) -> Tensor:
    """values as a tensor on the device. For a GPU, they are copied from pinned memory, so the caller does not wait."""
    tensor = torch.as_tensor(values, dtype=dtype)
    if not str(device).startswith("cuda"):
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def to_device_at_once(
    lists: Mapping[str, Sequence[int]], device: torch.device | str, dtype: Any = np.int64
) -> dict[str, Tensor]:
    """Each list as a tensor on the device, with one copy for all of them: the tensors are views of one buffer.

    dtype: NumPy's. With few numbers, NumPy is faster than torch.
    """
    sizes = [len(each) for each in lists.values()]
    joined = np.fromiter(chain.from_iterable(lists.values()), dtype, sum(sizes))
    return dict(zip(lists, to_device(torch.from_numpy(joined), device).split_with_sizes(sizes), strict=True))


def pin(tensor: Tensor) -> Tensor:
    """Pin a tensor's memory where it is, and return it. (pin_memory() makes a copy, and rounds its size up to a power
    of two.) Raises RuntimeError if the system refuses."""
    cudart, address = torch.cuda.cudart(), tensor.data_ptr()
    torch.cuda.check_error(cudart.cudaHostRegister(address, tensor.nbytes, 0))
    weakref.finalize(tensor, cudart.cudaHostUnregister, address).atexit = False  # when the tensor is no longer used
    return tensor
