"""From Python numbers to tensors on the model's device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(
    values: Sequence[object] | Tensor, device: torch.device | str, dtype: torch.dtype | None = None
) -> Tensor:
    """values as a tensor on the device. A GPU copies them from pinned memory, so that the caller does not wait."""
    tensor = torch.as_tensor(values, dtype=dtype)
    if torch.device(device).type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
