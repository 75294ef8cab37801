"""How much memory there is for a KV cache."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from common.errors import FieldError


def peak_memory(device: str, run: Callable[[], None]) -> int:
    """Bytes of GPU memory in use at the peak of a call, including those of other processes and of CUDA itself."""
    torch.cuda.reset_peak_memory_stats(device)
    run()
    free, total = torch.cuda.mem_get_info(device)
    outside = total - free - torch.cuda.memory_reserved(device)
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    return peak + outside


def check_memory(field: str, value: object, num_bytes: int, device: str) -> None:
    """Raises FieldError naming the flag whose value needs more memory than the device has.

    An operating system may grant more memory than there is, and kill the process only when it uses the memory.
    """
    if device.startswith("cuda"):
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if num_bytes > total:
        raise FieldError(field, f"{value:,} needs {num_bytes:,} bytes, and {device} has {total:,}")


def num_blocks_in(num_bytes: int, bytes_per_block: int, field: str) -> int:
    """How many blocks fit into num_bytes. Raises FieldError naming the flag if there are fewer than two."""
    num_blocks = num_bytes // bytes_per_block
    if num_blocks < 2:
        raise FieldError(
            field, f"{num_bytes:,} bytes hold {num_blocks} blocks of {bytes_per_block:,} bytes, expected at least 2"
        )
    return num_blocks
