"""Sampling in CUDA C++: temperature, min-p, top-k, top-p and the draw in one kernel, without a sort."""

from __future__ import annotations

import torch
from torch import Tensor

from .library import Library

PARAMETER_DTYPES = {
    "temperatures": torch.float32, "top_k": torch.int32, "top_p": torch.float32, "min_p": torch.float32,
    "seeds": torch.int64, "positions": torch.int64,
}  # fmt: skip


def sample(
    logits: Tensor, temperatures: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, positions: Tensor
) -> Tensor:  # fmt: skip
    """A token for each row of logits: the likeliest where the temperature is 0, else a random draw from those that
    min-p, top-k and top-p keep.

    logits: [num_rows, vocab_size], float32, contiguous. All others: [num_rows]: temperatures, top_p (over 0) and min_p
    float32; top_k int32, from 1 to vocab_size; seeds and positions int64: the noise of a row is a function of both.
    Returns token ids: [num_rows], int64. Of tokens that are equal, the first wins. Raises KernelError if the vocabulary
    has more than 524,288 tokens. (Without a sort, as in FlashInfer and vLLM.)
    """
    assert logits.dim() == 2 and logits.shape[1] > 0, f"logits has shape {tuple(logits.shape)}"
    assert logits.dtype == torch.float32 and logits.is_contiguous(), "logits must be float32 and contiguous"
    columns = (temperatures, top_k, top_p, min_p, seeds, positions)
    for column, (name, dtype) in zip(columns, PARAMETER_DTYPES.items(), strict=True):
        assert column.shape == logits.shape[:1] and column.is_contiguous(), f"{name} must be [num_rows], contiguous"
        assert column.dtype == dtype, f"{name} is {column.dtype}: expected {dtype}"
    token_ids = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    Library("sampling").call("sample", logits, *columns, token_ids, *logits.shape)
    return token_ids
