"""worker/attention.py: sequences with equally few tokens go together, and each token sees what it would see alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from part08_speculative_decoding.worker.attention import (
    MAX_GROUPED_QUERY_LEN,
    AttentionMetadata,
    PagedAttention,
    decode_attention,
)
from part08_speculative_decoding.worker.kv_cache import KVCache

LESSON = 'README "Guess, then check"'
LOOK_GROUPS = f"Look at worker/attention.py::AttentionMetadata.groups and _group; {LESSON}."
LOOK_DECODE = f"Look at worker/attention.py::decode_attention; {LESSON}."
LOOK_ATTEND = f"Look at worker/attention.py::PagedAttention.attend; {LESSON}."
HEAD_DIM, SCALE, TOLERANCE = 8, 0.3, 1e-5
MAX = MAX_GROUPED_QUERY_LEN
BATCHES: dict[str, list[tuple[int, int]]] = {  # (tokens in the step, tokens with them)
    "decodes": [(1, 33), (1, 1), (1, 16), (1, 18)],
    "decodes with as many guesses": [(4, 9), (4, 40), (4, 17), (4, 4)],
    "with different numbers of guesses": [(1, 20), (5, 21), (5, 6), (3, 30), (1, 7), (3, 3)],
    "guesses and chunks": [(3, 19), (3, 50), (1, 8), (MAX + 1, MAX + 1), (5, 5), (MAX + 9, 60), (2, 2), (2, 33)],
    "at the limit": [(MAX, MAX), (MAX, 40), (MAX + 1, 40), (MAX + 1, MAX + 1), (MAX, 17)],
    "one sequence": [(6, 23)],
    "a chunk alone": [(40, 40)],
}


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The last len(query) positions of one sequence, each over all up to its own, head by head."""
    group_size = query.shape[1] // key.shape[1]
    output = torch.empty_like(query)
    for row in range(len(query)):
        end = len(key) - len(query) + row + 1
        for head in range(query.shape[1]):
            keys, values = key[:end, head // group_size], value[:end, head // group_size]
            output[row, head] = (keys @ query[row, head] * SCALE).softmax(dim=0) @ values
    return output


class Sequences:
    """Random sequences in a pool with shuffled tables. NaN is wherever nobody writes."""

    def __init__(self, seqs: list[tuple[int, int]], group_size: int, block_size: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        num_kv_heads = 2
        num_heads = num_kv_heads * group_size
        self.queries = [random(num_new, num_heads, HEAD_DIM) for num_new, _ in seqs]
        self.keys = [random(length, num_kv_heads, HEAD_DIM) for _, length in seqs]
        self.values = [random(length, num_kv_heads, HEAD_DIM) for _, length in seqs]
        counts = [-(-length // block_size) for _, length in seqs]
        config = SimpleNamespace(
            num_hidden_layers=1, num_attention_heads=num_heads, num_key_value_heads=num_kv_heads, head_dim=HEAD_DIM
        )
        num_blocks = 1 + sum(counts) + 5
        self.cache = KVCache(config, num_blocks, block_size, torch.float32, "cpu")
        self.cache.data[:, 1:] = torch.nan
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
            query_lens=[num_new for num_new, _ in seqs],
            context_lens=[length for _, length in seqs],
            slot_mapping=torch.tensor(slots),
            block_tables=torch.tensor([table + [0] * (width - len(table)) for table in tables], dtype=torch.int32),
            block_size=block_size,
        )

    def attend(self) -> Tensor:
        news = self.metadata.query_lens
        keys, values = (
            torch.cat([each[-new:] for each, new in zip(source, news, strict=True)])
            for source in (self.keys, self.values)
        )
        return PagedAttention(self.cache, SCALE, "torch").attend(
            self.metadata, 0, torch.cat(self.queries), keys, values
        )


@pytest.mark.parametrize("block_size", [1, 8, 16])
@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("batch", BATCHES)
def test_every_token_sees_what_it_would_see_alone(batch: str, group_size: int, block_size: int) -> None:
    sequences = Sequences(BATCHES[batch], group_size, block_size)
    got = sequences.attend().split(sequences.metadata.query_lens)
    for number, (found, seq) in enumerate(zip(got, BATCHES[batch], strict=True)):
        expected = dense(sequences.queries[number], sequences.keys[number], sequences.values[number])
        wrong = [row for row in range(seq[0]) if not torch.allclose(found[row], expected[row], atol=TOLERANCE)]
        assert not wrong, (
            f"{batch}, sequence {number}, the last {seq[0]} of {seq[1]} tokens: rows {wrong} differ from dense "
            f"attention "
            f"(a NaN comes from a slot of somebody else). {LOOK_ATTEND}"
        )


def test_groups_are_runs_of_equally_few_tokens() -> None:
    seqs = [(1, 5), (1, 9), (4, 6), (4, 30), (1, 3), (MAX + 1, 40), (MAX, 20), (4, 4)]
    metadata = Sequences(seqs, 1, 8).metadata
    got = [(group.tokens.start, group.tokens.stop, group.query_len) for group in metadata.groups]
    first = 11 + MAX + 1
    expected = [(0, 2, 1), (2, 10, 4), (10, 11, 1), (first, first + MAX, MAX), (first + MAX, first + MAX + 4, 4)]
    assert got == expected, (
        f"sequences (new, all) {seqs}: expected groups (from, to, length) {expected}, got {got}. {LOOK_GROUPS}"
    )


def test_a_group_s_mask_is_aligned_at_the_bottom_right() -> None:
    """3 new tokens of 5 and of 3: query i sees what stands before it, and itself; past the end there is slot 0."""
    group = Sequences([(3, 5), (3, 3)], 1, 4).metadata.groups[0]
    expected = [
        [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]],
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]],
    ]
    assert group.mask.int().tolist() == expected, f"expected {expected}, got {group.mask.int().tolist()}. {LOOK_GROUPS}"
    assert group.slots.shape == (2, 5) and group.slots[1, 3:].tolist() == [0, 0], (
        f"the second has 3 tokens: expected slot 0 behind them, got {group.slots.tolist()}. {LOOK_GROUPS}"
    )


def test_a_step_of_decodes_is_one_group() -> None:
    metadata = Sequences([(1, 5)] * 30, 1, 8).metadata
    assert len(metadata.groups) == 1, f"30 decodes: expected one group, got {len(metadata.groups)}. {LOOK_GROUPS}"


@pytest.mark.parametrize("query_len", [1, 2, 5])
@pytest.mark.parametrize("group_size", [1, 2, 3])
def test_decode_attention_by_the_definition(query_len: int, group_size: int) -> None:
    """Query heads that share a KV head stand beside each other in the result as they did in the query."""
    generator = torch.Generator().manual_seed(query_len)
    query = torch.randn(3, query_len, 2 * group_size, HEAD_DIM, generator=generator)
    context = torch.randn(3, 9, 2, 2, HEAD_DIM, generator=generator)
    lengths = torch.tensor([9, 7, query_len])
    mask = torch.arange(9) <= (lengths[:, None] - query_len + torch.arange(query_len)).unsqueeze(2)
    got = decode_attention(query, context, mask, SCALE)
    assert got.shape == query.shape, f"expected {tuple(query.shape)}, got {tuple(got.shape)}. {LOOK_DECODE}"
    for number, length in enumerate(lengths.tolist()):
        expected = dense(query[number], context[number, :length, 0], context[number, :length, 1])
        assert torch.allclose(got[number], expected, atol=TOLERANCE), (
            f"{query_len} queries, {group_size} query heads a KV head, sequence {number} of {length} tokens: expected "
            f"dense attention's result. {LOOK_DECODE}"
        )
