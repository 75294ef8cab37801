"""worker/attention.py: attention through a block table equals dense attention, whatever lies where nobody looks."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from part03_paged_attention.worker.attention import (
    AttentionMetadata,
    PagedAttention,
    choose_backend,
    decode_attention,
    prefill_attention,
)
from part03_paged_attention.worker.kv_cache import KVCache

LOOK_SLOTS = 'Look at worker/attention.py::AttentionMetadata.context_slots; README "Attention through a table".'
LOOK_MASK = 'Look at worker/attention.py::AttentionMetadata.context_mask; README "Attention through a table".'
LOOK_DECODE = 'Look at worker/attention.py::decode_attention; README "Attention through a table".'
LOOK_PAGED = 'Look at worker/attention.py::PagedAttention._decode; README "Attention through a table".'
LOOK_PREFILL = 'Look at worker/attention.py::prefill_attention; README "Attention through a table".'
LENGTHS = [1, 15, 16, 17, 33]
HEAD_DIM, SCALE = 8, 0.3  # a scale that is no default
TOLERANCE = 1e-5
group_sizes = pytest.mark.parametrize("group_size", [1, 2, 3])
block_sizes = pytest.mark.parametrize("block_size", [1, 8, 16])


def metadata_for(
    tables: list[list[int]], lengths: list[int], block_size: int = 16, is_prefill: bool = False
) -> AttentionMetadata:
    """The metadata of a decode step over these tables, or of a prefill of all their tokens."""
    firsts = [0 if is_prefill else length - 1 for length in lengths]
    slots, starts = [], [0]
    for table, first, length in zip(tables, firsts, lengths, strict=True):
        slots += [table[p // block_size] * block_size + p % block_size for p in range(first, length)]
        starts.append(len(slots))
    width = max(map(len, tables))
    padded = [table + [0] * (width - len(table)) for table in tables]
    return AttentionMetadata(
        is_prefill=is_prefill,
        slot_mapping=torch.tensor(slots),
        query_start_loc=starts,
        block_tables=torch.tensor(padded, dtype=torch.int32),
        context_lens=torch.tensor(lengths, dtype=torch.int32),
        block_size=block_size,
    )


def dense(query: Tensor, key: Tensor, value: Tensor, scale: float = SCALE) -> Tensor:
    """The last len(query) positions of one sequence, each over all positions up to its own, head by head."""
    group_size = query.shape[1] // key.shape[1]
    output = torch.empty_like(query)
    for row in range(len(query)):
        end = len(key) - len(query) + row + 1
        for head in range(query.shape[1]):
            keys, values = key[:end, head // group_size], value[:end, head // group_size]
            output[row, head] = (keys @ query[row, head] * scale).softmax(dim=0) @ values
    return output


class Sequences:
    """Random keys, values and a newest query for sequences of these lengths, in a pool with shuffled tables."""

    def __init__(
        self, lengths: list[int], group_size: int = 2, block_size: int = 16, seed: int = 0, num_spare: int = 5
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.lengths, self.block_size, num_kv_heads = lengths, block_size, 2
        num_heads = num_kv_heads * group_size
        self.keys = [random(length, num_kv_heads, HEAD_DIM) for length in lengths]
        self.values = [random(length, num_kv_heads, HEAD_DIM) for length in lengths]
        self.queries = [random(length, num_heads, HEAD_DIM) for length in lengths]
        counts = [-(-length // block_size) for length in lengths]
        config = SimpleNamespace(
            num_hidden_layers=2, num_attention_heads=num_heads, num_key_value_heads=num_kv_heads, head_dim=HEAD_DIM
        )
        num_blocks = 1 + sum(counts) + num_spare
        self.cache = KVCache(config, num_blocks, block_size, torch.float32, "cpu")
        shuffled = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()
        self.tables = [[shuffled.pop() for _ in range(count)] for count in counts]
        self.attention = PagedAttention(self.cache, SCALE, "torch")

    def prefill(self, layer: int, num_left_out: int = 0) -> Tensor:
        """All positions of each sequence but the last num_left_out, one sequence after the other."""
        lengths = [length - num_left_out for length in self.lengths]
        parts = [
            torch.cat([tensor[:length] for tensor, length in zip(tensors, lengths, strict=True)])
            for tensors in (self.queries, self.keys, self.values)
        ]
        metadata = metadata_for(self.tables, lengths, self.block_size, is_prefill=True)
        return self.attention.attend(metadata, layer, *parts)

    def decode(self, layer: int, which: list[int] | None = None) -> Tensor:
        """The last position of some sequences (of all, if not said which)."""
        which = list(range(len(self.lengths))) if which is None else which
        parts = [
            torch.stack([tensors[number][-1] for number in which])
            for tensors in (self.queries, self.keys, self.values)
        ]  # fmt: skip
        tables, lengths = [self.tables[i] for i in which], [self.lengths[i] for i in which]
        return self.attention.attend(metadata_for(tables, lengths, self.block_size), layer, *parts)

    def expected(self, which: list[int] | None = None) -> Tensor:
        """What dense attention gives for the last positions."""
        which = list(range(len(self.lengths))) if which is None else which
        return torch.cat([dense(self.queries[i][-1:], self.keys[i], self.values[i]) for i in which])

    def fill(self, layer: int) -> None:
        """Put all keys and values but the newest where the tables say, by other means than a prefill."""
        for table, key, value in zip(self.tables, self.keys, self.values, strict=True):
            for position in range(len(key) - 1):
                place = self.cache.data[layer, table[position // self.block_size], position % self.block_size]
                place[0], place[1] = key[position], value[position]

    def poison(self) -> None:
        """NaN in every slot that no token of these sequences has; the null block stays as it is."""
        owned = torch.zeros(self.cache.num_blocks, self.block_size, dtype=torch.bool)
        owned[0] = True
        for table, length in zip(self.tables, self.lengths, strict=True):
            for position in range(length):
                owned[table[position // self.block_size], position % self.block_size] = True
        self.cache.data[:, ~owned] = torch.nan


def check(got: Tensor, expected: Tensor, lengths: list[int], what: str, look: str) -> None:
    assert got.shape == expected.shape, f"{what}: expected shape {list(expected.shape)}, got {list(got.shape)}. {look}"
    for number, length in enumerate(lengths):
        difference = float((got[number] - expected[number]).abs().max())
        assert difference < TOLERANCE, (  # NaN is not
            f"{what}, sequence {number} ({length} tokens): paged and dense attention differ by {difference:.2e}, "
            f"expected less than {TOLERANCE:g}. {look}"
        )


# The slots of a context


def test_context_slots_by_hand() -> None:
    metadata = metadata_for([[7, 1, 3], [2]], [6, 1], block_size=2)
    got = metadata.context_slots.tolist()
    expected = [[14, 15, 2, 3, 6, 7], [4, 0, 0, 0, 0, 0]]
    assert got == expected, (
        f"tables [7, 1, 3] and [2, 0, 0], lengths 6 and 1, block_size=2: expected slots {expected}, got {got}. "
        f"{LOOK_SLOTS}"
    )


def test_context_slots_of_a_block_that_is_not_full() -> None:
    metadata = metadata_for([[7, 1, 3], [5, 2]], [35, 18])
    got, where = metadata.context_slots, "tables [7, 1, 3] and [5, 2], lengths 35 and 18, block_size=16"
    assert got.shape == (2, 35), f"{where}: expected shape [2, 35], got {list(got.shape)}. {LOOK_SLOTS}"
    expected = [*range(112, 128), *range(16, 32), 48, 49, 50]
    assert got[0].tolist() == expected, f"{where}: expected slots {expected}, got {got[0].tolist()}. {LOOK_SLOTS}"
    expected = [*range(80, 96), 32, 33] + [0] * 17
    assert got[1].tolist() == expected, (
        f"{where}: the second ends at position 17, from there on slot 0 (the null block's): expected {expected}, got "
        f"{got[1].tolist()}. {LOOK_SLOTS}"
    )


def test_context_slots_past_the_end_are_the_null_blocks() -> None:
    """In the same block as the last token too, and whatever pads the table."""
    metadata = metadata_for([[3, 4], [5]], [8, 2], block_size=4)
    metadata.block_tables[1, 1] = 6  # a stale entry past the end of a table that was longer once
    got = metadata.context_slots[1].tolist()
    assert got == [20, 21, 0, 0, 0, 0, 0, 0], (
        f"2 tokens in block 5 (block_size=4): expected [20, 21, 0, 0, 0, 0, 0, 0], got {got}. {LOOK_SLOTS}"
    )


def test_context_slots_are_64_bit() -> None:
    metadata = metadata_for([[2**27 + 1]], [3])
    got, expected = metadata.context_slots[0].tolist(), [2**31 + 16, 2**31 + 17, 2**31 + 18]
    assert got == expected, (
        f"block 2²⁷ + 1 of 16 tokens: expected slots {expected}, got {got}; block · block_size must not be computed in "
        f"int32. {LOOK_SLOTS}"
    )


def test_context_mask_by_hand() -> None:
    metadata = metadata_for([[1], [2], [3]], [1, 4, 3], block_size=4)
    got, expected = metadata.context_mask.int().tolist(), [[1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]]
    assert metadata.context_mask.dtype == torch.bool, f"expected bool, got {metadata.context_mask.dtype}. {LOOK_MASK}"
    assert got == expected, f"lengths 1, 4 and 3: expected {expected}, got {got}. {LOOK_MASK}"


# Attention over a context


def check_decode_attention(lengths: list[int], group_size: int, padding: float) -> None:
    sequences = Sequences(lengths, group_size)
    context = torch.full((len(lengths), max(lengths), 2, 2, HEAD_DIM), padding)
    mask = torch.zeros(len(lengths), max(lengths), dtype=torch.bool)
    for number, length in enumerate(lengths):
        context[number, :length, 0], context[number, :length, 1] = sequences.keys[number], sequences.values[number]
        mask[number, :length] = True
    query = torch.stack([queries[-1] for queries in sequences.queries])
    got = decode_attention(query, context, mask, SCALE)
    what = f"{query.shape[1]} query heads over 2 KV heads, padded with {padding:g}"
    check(got, sequences.expected(), lengths, what, LOOK_DECODE)


@group_sizes
def test_decode_attention_equals_dense(group_size: int) -> None:
    for lengths in ([7], [5, 5, 5], LENGTHS):
        check_decode_attention(lengths, group_size, padding=0.0)


def test_decode_attention_masks_what_is_padding() -> None:
    check_decode_attention(LENGTHS, group_size=2, padding=50.0)


def test_decode_attention_with_one_kv_head_for_all() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 6, HEAD_DIM), torch.randn(9, 1, HEAD_DIM), torch.randn(9, 1, HEAD_DIM)
    context = torch.stack((key, value), dim=1).unsqueeze(0)
    got = decode_attention(query, context, torch.ones(1, 9, dtype=torch.bool), SCALE)
    check(got, dense(query, key, value), [9], "6 query heads over one KV head", LOOK_DECODE)


# Through the table


@block_sizes
@group_sizes
def test_paged_decode_equals_dense(group_size: int, block_size: int) -> None:
    for seed in range(3):  # other tables each time
        sequences = Sequences(LENGTHS, group_size, block_size, seed)
        sequences.fill(layer=1)
        what = f"tables {sequences.tables}, block_size={block_size}, {2 * group_size} heads over 2 KV heads"
        check(sequences.decode(layer=1), sequences.expected(), LENGTHS, what, LOOK_PAGED)


@block_sizes
@group_sizes
def test_what_nobody_owns_is_never_read(group_size: int, block_size: int) -> None:
    """NaN in all free blocks and in the tail of each last block: a weight of 0 times NaN would still be NaN."""
    sequences = Sequences(LENGTHS, group_size, block_size)
    sequences.fill(layer=0)
    sequences.poison()
    assert sequences.cache.data[0].isnan().any(), "there must be something to stumble over"
    got = sequences.decode(layer=0)
    check(got, sequences.expected(), LENGTHS, f"NaN in foreign slots, block_size={block_size}", LOOK_SLOTS)
    assert not sequences.cache.data[:, 0].any(), f"the null block's zeros were overwritten. {LOOK_PAGED}"


def test_a_context_that_someone_else_left_behind() -> None:
    """A block is not wiped when it changes hands."""
    sequences = Sequences(LENGTHS)
    sequences.cache.data[:, 1:] = 1e30
    sequences.fill(layer=0)
    check(sequences.decode(layer=0), sequences.expected(), LENGTHS, "over what an earlier request left", LOOK_SLOTS)


def test_the_buffer_of_a_larger_batch_serves_a_smaller_one() -> None:
    sequences = Sequences(LENGTHS)
    for layer in (0, 1):
        sequences.fill(layer)
    sequences.poison()
    for which in ([4], [0, 1, 2, 3, 4], [0], [1, 2], [3], [0, 1, 2, 3, 4], [2, 0]):
        lengths = [LENGTHS[number] for number in which]
        for layer in (0, 1):
            what = f"sequences {which} after larger and smaller batches, layer {layer}"
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # torch warns of a buffer that is too small
                got = sequences.decode(layer, which)
            check(got, sequences.expected(which), lengths, what, LOOK_PAGED)


def test_two_answers_do_not_share_memory() -> None:
    """The buffer is used again in the next layer; what was returned before must not change."""
    sequences = Sequences(LENGTHS)
    sequences.fill(layer=0)
    first = sequences.decode(layer=0)
    before = first.clone()
    sequences.decode(layer=1)
    assert torch.equal(first, before), f"layer 1 changed the output of layer 0. {LOOK_PAGED}"


def test_decode_in_bfloat16_after_float32_is_computed_in_bfloat16() -> None:
    sequences = Sequences(LENGTHS)
    sequences.fill(layer=0)
    sequences.decode(layer=0)
    for name in ("keys", "values", "queries"):
        setattr(sequences, name, [tensor.bfloat16() for tensor in getattr(sequences, name)])
    sequences.cache.data = sequences.cache.data.bfloat16()
    got = sequences.decode(layer=0)
    difference = float((got.float() - sequences.expected().float()).abs().max())
    assert got.dtype == torch.bfloat16, f"expected bfloat16 out as in, got {got.dtype}. {LOOK_PAGED}"
    assert difference < 0.1, f"bfloat16: expected dense attention up to rounding, off by {difference:.2e}. {LOOK_PAGED}"


# Prefill


@group_sizes
def test_prefill_of_a_batch_equals_each_sequence_alone(group_size: int) -> None:
    sequences = Sequences([3, 1, 17, 33, 2], group_size)
    got = sequences.prefill(layer=0).split(sequences.lengths)
    for number, length in enumerate(sequences.lengths):
        query, key, value = (tensors[number] for tensors in (sequences.queries, sequences.keys, sequences.values))
        alone = prefill_attention(query, key, value, [0, length], SCALE)
        for what, expected in (("alone", alone), ("dense", dense(query, key, value))):
            difference = float((got[number] - expected).abs().max())
            assert difference < TOLERANCE, (
                f"sequence {number} of 5 ({length} tokens), in one flat batch and {what}: off by {difference:.2e}, "
                f"expected less than {TOLERANCE:g}; a sequence sees itself alone. {LOOK_PREFILL}"
            )


def test_prefill_fills_the_cache_that_decode_reads() -> None:
    sequences = Sequences([2, 16, 17, 18, 33])
    for layer in (0, 1):
        sequences.prefill(layer, num_left_out=1)
        sequences.poison()
        check(sequences.decode(layer), sequences.expected(), sequences.lengths, f"layer {layer}", LOOK_PAGED)


def test_prefill_does_not_look_into_the_cache() -> None:
    """A request that was preempted computes all its keys again; what the pool holds by then is not its own."""
    sequences = Sequences(LENGTHS)
    sequences.cache.data.fill_(torch.nan)
    got = sequences.prefill(layer=0)
    assert got.isfinite().all(), f"prefill attends to the keys and values at hand, not to the pool. {LOOK_PREFILL}"


# The choice


@pytest.mark.parametrize(
    ("name", "device", "expected"),
    [
        ("auto", "cpu", "torch"),
        ("auto", "cuda", "triton"),
        ("auto", "cuda:1", "triton"),
        ("torch", "cuda", "torch"),
        ("torch", "cpu", "torch"),
        ("triton", "cuda", "triton"),
    ],
)
def test_choose_backend(name: str, device: str, expected: str) -> None:
    got = choose_backend(name, device)
    assert got == expected, (
        f"--attention-backend {name} on {device}: expected {expected}, got {got}. "
        'Look at worker/attention.py::choose_backend; README "Attention through a table".'
    )
