"""What the worker remembers about the requests in the batch from one step to the next."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from common.sampling_params import SamplingParams

from ..messages import NULL_BLOCK, NewRequest


class RequestStates:
    """A row for each request in the batch (vLLM's persistent batch), so that a step only has to contain what is new.

    block_tables: [max_num_seqs, max_blocks], int32; in row i, the first num_blocks[i] entries are valid. Nothing is
    erased when a request leaves: add() resets the row for the next request. It is an array, since NumPy is faster than
    torch with few numbers.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int) -> None:
        self.block_size = block_size
        max_blocks = -(-max_model_len // block_size)
        self.block_tables = np.zeros((max_num_seqs, max_blocks), np.int32)
        self.num_blocks = [0] * max_num_seqs
        self.num_prompt_tokens = [0] * max_num_seqs
        self.params = [SamplingParams()] * max_num_seqs

    def add(self, new: NewRequest) -> None:
        """Assign a row to a new request."""
        self.num_blocks[new.row] = 0
        self.block_tables[new.row] = NULL_BLOCK  # what follows a table is padding
        self.num_prompt_tokens[new.row] = new.num_prompt_tokens
        self.params[new.row] = new.params

    def append_blocks(self, row: int, block_ids: list[int]) -> None:
        if block_ids:
            start = self.num_blocks[row]
            self.num_blocks[row] += len(block_ids)
            self.block_tables[row, start : self.num_blocks[row]] = block_ids

    def tables(self, rows: list[int]) -> Tensor:
        """A copy of the block tables of some rows, as wide as the longest: [len(rows), max_blocks], int32."""
        width = max((self.num_blocks[row] for row in rows), default=0)
        return torch.from_numpy(self.block_tables[rows, :width])

    def slots(self, rows: list[int], positions: list[int]) -> list[int]:
        """The slot of each token. rows, positions: the row and the position of each.

        The same as kv_cache.py::slot_mapping, in NumPy, which is faster with few tokens.
        """
        in_sequence, block_size = np.array(positions, np.int64), self.block_size
        block_ids = self.block_tables[rows, in_sequence // block_size].astype(np.int64)
        slots: list[int] = (block_ids * block_size + in_sequence % block_size).tolist()
        return slots
