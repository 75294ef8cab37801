"""From the scheduler's numbers to tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(values: Sequence[object], device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers as a tensor on the device. For a GPU by way of pinned memory, so that nobody waits for the copy."""
    if torch.device(device).type != "cuda":
        return torch.tensor(values, dtype=dtype)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)
