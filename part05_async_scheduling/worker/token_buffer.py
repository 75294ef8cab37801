"""The tokens of the running requests, where the model can read them without asking the scheduler."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .device import upload


class TokenBuffer:
    """All tokens of all running requests on the model's device: data [max_num_seqs, max_model_len], a row a request.

    A step reads its input tokens from here, and the sampler writes its tokens here. So the next step can be launched
    before anybody has told the scheduler what they are (vLLM's request states, SGLang's token pool).

    Rows are given out on the scheduler's side; the data is touched on the model's side, in the order of the steps. So a
    row may change hands while a step that uses it still runs.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, device: str) -> None:
        self.max_model_len, self.device = max_model_len, device
        # Zeros: behind a step that failed, the next one reads what was never written, and must find token ids.
        self.data = torch.zeros((max_num_seqs, max_model_len), dtype=torch.int64, device=device)
        self.rows: dict[str, int] = {}
        self._free_rows = list(reversed(range(max_num_seqs)))

    def release(self, request_ids: Iterable[str]) -> None:
        """Take back the rows of requests that stopped running. One that has none is no error."""
        for request_id in request_ids:
            if (row := self.rows.pop(request_id, None)) is not None:
                self._free_rows.append(row)

    def acquire(self, request_id: str) -> int:
        """A row for a request that begins to run, or runs again."""
        self.rows[request_id] = self._free_rows.pop()
        return self.rows[request_id]

    def place(self, row: int, position: int) -> int:
        """Where in the flattened buffer a token is."""
        return row * self.max_model_len + position

    def fill(self, row: int, token_ids: list[int]) -> None:
        """Write the tokens that a request begins with."""
        self.data[row, : len(token_ids)] = upload(token_ids, self.device)

    def read(self, places: Tensor) -> Tensor:
        """places: [n]. Returns the tokens there: [n], int64."""
        return self.data.view(-1)[places]

    def write(self, places: Tensor, token_ids: Tensor) -> None:
        """Write one token to each place."""
        self.data.view(-1)[places] = token_ids
