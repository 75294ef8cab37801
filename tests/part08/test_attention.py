"""worker/attention.py with draft tokens: several queries of a sequence, each of which attends to all before it.

The module is part 6's. Here are the batches that part 8 makes of it: decodes with different numbers of draft tokens,
beside chunks of prompts.
"""

from __future__ import annotations

from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from part08_speculative_decoding.worker.attention import AttentionMetadata, PagedAttention
from part08_speculative_decoding.worker.kv_cache import KVCache

LOOK = 'Look at worker/attention.py::PagedAttention.attend and the kernel; README "Propose, then verify".'
HEAD_DIM, SCALE, TOLERANCE = 8, 0.3, 1e-5
BATCHES: dict[str, list[tuple[int, int]]] = {  # (tokens in the step, tokens in the context)
    "decodes": [(1, 33), (1, 1), (1, 16), (1, 18)],
    "decodes with as many draft tokens": [(4, 9), (4, 40), (4, 17), (4, 4)],
    "with different numbers of draft tokens": [(1, 20), (5, 21), (5, 6), (3, 30), (1, 7), (3, 3)],
    "draft tokens and chunks": [(3, 19), (3, 50), (1, 8), (17, 17), (5, 5), (25, 60), (2, 2), (2, 33)],
    "one sequence": [(6, 23)],
    "a chunk alone": [(40, 40)],
}


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The last len(query) positions of one sequence, each over all up to itself, head by head."""
    group_size = query.shape[1] // key.shape[1]
    output = torch.empty_like(query)
    for row in range(len(query)):
        end = len(key) - len(query) + row + 1
        for head in range(query.shape[1]):
            keys, values = key[:end, head // group_size], value[:end, head // group_size]
            output[row, head] = (keys @ query[row, head] * SCALE).softmax(dim=0) @ values
    return output


class Sequences:
    """Random sequences in a pool with shuffled block tables. Slots that belong to none of them hold NaN."""

    def __init__(self, seqs: list[tuple[int, int]], group_size: int, block_size: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        num_kv_heads = 2
        self.query_lens = [num_new for num_new, _ in seqs]
        self.queries = [random(num_new, num_kv_heads * group_size, HEAD_DIM) for num_new in self.query_lens]
        self.keys = [random(length, num_kv_heads, HEAD_DIM) for _, length in seqs]
        self.values = [random(length, num_kv_heads, HEAD_DIM) for _, length in seqs]
        counts = [-(-length // block_size) for _, length in seqs]
        num_blocks = 1 + sum(counts) + 5
        model = SimpleNamespace(
            num_layers=1, num_kv_heads=num_kv_heads, head_dim=HEAD_DIM, dtype=torch.float32, device="cpu"
        )
        self.cache = KVCache(model, num_blocks, block_size)  # type: ignore[arg-type]
        self.cache.data.fill_(torch.nan)
        shuffled = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()
        tables = [[shuffled.pop() for _ in range(count)] for count in counts]
        slots = list[int]()
        for (num_new, length), table, key, value in zip(seqs, tables, self.keys, self.values, strict=True):
            own = [table[p // block_size] * block_size + p % block_size for p in range(length)]
            known = torch.tensor(own[: length - num_new], dtype=torch.int64)
            self.cache.store(0, key[: length - num_new], value[: length - num_new], known)
            slots += own[length - num_new :]
        width = max(map(len, tables))
        self.metadata = AttentionMetadata(
            slot_mapping=torch.tensor(slots),
            block_tables=torch.tensor([table + [0] * (width - len(table)) for table in tables], dtype=torch.int32),
            query_start_loc=torch.tensor([0, *accumulate(self.query_lens)], dtype=torch.int32),
            context_lens=torch.tensor([length for _, length in seqs], dtype=torch.int32),
            max_query_len=max(self.query_lens),
        )

    def attend(self, backend: str) -> Tensor:
        keys, values = (
            torch.cat([each[-new:] for each, new in zip(source, self.query_lens, strict=True)])
            for source in (self.keys, self.values)
        )
        attention = PagedAttention(self.cache, SCALE, backend)
        return attention.attend(self.metadata, 0, torch.cat(self.queries), keys, values)


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("block_size", [1, 8, 16])
@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("batch", BATCHES)
def test_every_token_attends_as_if_it_were_alone(batch: str, group_size: int, block_size: int, backend: str) -> None:
    sequences = Sequences(BATCHES[batch], group_size, block_size)
    got = sequences.attend(backend).split(sequences.query_lens)
    for number, (found, seq) in enumerate(zip(got, BATCHES[batch], strict=True)):
        expected = dense(sequences.queries[number], sequences.keys[number], sequences.values[number])
        wrong = [row for row in range(seq[0]) if not torch.allclose(found[row], expected[row], atol=TOLERANCE)]
        assert not wrong, (
            f"{batch}, {backend}, sequence {number}, the last {seq[0]} of {seq[1]} tokens: rows {wrong} differ from "
            f"dense attention (NaN comes from a slot of another sequence). {LOOK}"
        )
