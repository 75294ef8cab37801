"""The tokens of the requests in the batch, on the model's device."""

from __future__ import annotations

import torch
from torch import Tensor

from .device import to_device


class TokenBuffer:
    """data [max_num_seqs, max_model_len]: all tokens of all requests in the batch, one row per request.

    A step reads its input tokens here and writes its sampled tokens here, so they do not have to go to the scheduler
    and back (vLLM's request states, mini-sglang's token pool). A flat index is row · max_model_len + position.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, device: str) -> None:
        self.max_model_len, self.device = max_model_len, device
        self.data = torch.zeros((max_num_seqs, max_model_len), dtype=torch.int64, device=device)

    def flat_index(self, row: int, position: int) -> int:
        return row * self.max_model_len + position

    def fill(self, row: int, token_ids: list[int]) -> None:
        """Write the tokens that a request has when it joins the batch."""
        self.data[row, : len(token_ids)] = to_device(token_ids, self.device)

    def read(self, indices: Tensor) -> Tensor:
        """indices: [n], flat. Returns the tokens there: [n], int64."""
        return self.data.view(-1)[indices]

    def write(self, indices: Tensor, token_ids: Tensor) -> None:
        """indices: [n], flat; token_ids: [n]."""
        if len(indices):
            self.data.view(-1)[indices] = token_ids
