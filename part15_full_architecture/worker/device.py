"""Turn Python numbers into tensors on the model's device."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(
    values: Sequence[object] | Tensor, device: torch.device | str, dtype: torch.dtype | None = None
) -> Tensor:
    """values as a tensor on the device. For a GPU, they are copied from pinned memory, so the caller does not wait."""
    tensor = torch.as_tensor(values, dtype=dtype)
    if torch.device(device).type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def pin(tensor: Tensor) -> Tensor:
    """Pin a tensor's memory where it is, and return it. (pin_memory() makes a copy, and rounds its size up to a power
    of two.) Raises RuntimeError if the system refuses."""
    cudart, address = torch.cuda.cudart(), tensor.data_ptr()
    torch.cuda.check_error(cudart.cudaHostRegister(address, tensor.nbytes, 0))
    weakref.finalize(tensor, cudart.cudaHostUnregister, address).atexit = False  # when the tensor is no longer used
    return tensor
