"""worker/attention.py: decodes, first chunks and later chunks in one batch equal dense attention, whatever lies elsewhere."""  # noqa: E501

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from common.checkpoint import Checkpoint
from common.testing import FAMILIES
from part06_chunked_prefill.worker import attention as attention_module
from part06_chunked_prefill.worker.attention import (
    AttentionMetadata,
    PagedAttention,
    causal_mask,
    choose_backend,
    chunk_attention,
    decode_attention,
)
from part06_chunked_prefill.worker.kv_cache import KVCache
from part06_chunked_prefill.worker.model import DecoderModel
from part06_chunked_prefill.worker.weights import load_decoder

LOOK_MASK = 'Look at worker/attention.py::causal_mask; README "The mask\'s other corner".'
LOOK_CHUNK = 'Look at worker/attention.py::chunk_attention; README "The mask\'s other corner".'
LOOK_ATTEND = 'Look at worker/attention.py::PagedAttention.attend; README "The mask\'s other corner".'
LOOK_GATHER = 'Look at worker/attention.py::PagedAttention._gather; README "The mask\'s other corner".'
LOOK_SLOTS = 'Look at worker/attention.py::AttentionMetadata; README of part 3, "Attention through a table".'
LOOK_DECODE = 'Look at worker/attention.py::decode_attention; README of part 3, "Attention through a table".'
LOOK_TRITON = 'Look at worker/attention.py::PagedAttention.attend; README "One kernel for decodes and chunks".'
HEAD_DIM, SCALE = 8, 0.3  # a scale that is no default
TOLERANCE = 1e-5
MIXED = [(1, 33), (1, 1), (1, 16), (7, 7), (5, 20), (1, 18), (16, 48), (3, 17), (1, 1), (17, 17)]  # new, context
group_sizes = pytest.mark.parametrize("group_size", [1, 2, 3])
block_sizes = pytest.mark.parametrize("block_size", [1, 8, 16])


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


def num_leading_decodes(seqs: list[tuple[int, int]]) -> int:
    return next((number for number, (num_new, _) in enumerate(seqs) if num_new > 1), len(seqs))


class Sequences:
    """Random queries, keys and values of sequences (new tokens, context), in a pool with shuffled tables.

    What they computed before this step lies in the cache, what is new does not yet, and NaN is wherever nobody writes.
    """

    def __init__(
        self, seqs: list[tuple[int, int]], group_size: int = 2, block_size: int = 16, seed: int = 0,
        stale: float = torch.nan, backend: str = "torch",
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.seqs, self.block_size, num_kv_heads = seqs, block_size, 2
        num_heads = num_kv_heads * group_size
        self.queries = [random(num_new, num_heads, HEAD_DIM) for num_new, _ in seqs]
        self.keys = [random(length, num_kv_heads, HEAD_DIM) for _, length in seqs]
        self.values = [random(length, num_kv_heads, HEAD_DIM) for _, length in seqs]
        counts = [-(-length // block_size) for _, length in seqs]
        config = SimpleNamespace(
            num_hidden_layers=2, num_attention_heads=num_heads, num_key_value_heads=num_kv_heads, head_dim=HEAD_DIM
        )
        num_blocks = 1 + sum(counts) + 5
        self.cache = KVCache(config, num_blocks, block_size, torch.float32, "cpu")
        shuffled = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()
        self.tables = [[shuffled.pop() for _ in range(count)] for count in counts]
        self.cache.data[:, 1:] = stale
        for layer in (0, 1):
            for (num_new, length), table, key, value in zip(seqs, self.tables, self.keys, self.values, strict=True):
                for position in range(length - num_new):
                    place = self.cache.data[layer, table[position // block_size], position % block_size]
                    place[0], place[1] = key[position], value[position]
        self.attention = PagedAttention(self.cache, SCALE, backend)

    def metadata(self, which: list[int], num_decodes: int | None = None) -> AttentionMetadata:
        seqs, tables = [self.seqs[i] for i in which], [self.tables[i] for i in which]
        slots = [
            table[p // self.block_size] * self.block_size + p % self.block_size
            for table, (num_new, length) in zip(tables, seqs, strict=True)
            for p in range(length - num_new, length)
        ]
        width = max(map(len, tables))
        return AttentionMetadata(
            num_decodes=num_leading_decodes(seqs) if num_decodes is None else num_decodes,
            query_lens=[num_new for num_new, _ in seqs],
            context_lens=[length for _, length in seqs],
            slot_mapping=torch.tensor(slots),
            block_tables=torch.tensor([table + [0] * (width - len(table)) for table in tables], dtype=torch.int32),
            block_size=self.block_size,
        )

    def flat(self, which: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """The new tokens' queries, keys and values, one sequence after the other."""
        news = [self.seqs[number][0] for number in which]
        return (
            torch.cat([self.queries[number] for number in which]),
            torch.cat([self.keys[number][-new:] for number, new in zip(which, news, strict=True)]),
            torch.cat([self.values[number][-new:] for number, new in zip(which, news, strict=True)]),
        )

    def attend(self, layer: int, which: list[int] | None = None, num_decodes: int | None = None) -> list[Tensor]:
        which = list(range(len(self.seqs))) if which is None else which
        output = self.attention.attend(self.metadata(which, num_decodes), layer, *self.flat(which))
        return list(output.split([self.seqs[number][0] for number in which]))

    def expected(self, which: list[int] | None = None) -> list[Tensor]:
        which = list(range(len(self.seqs))) if which is None else which
        return [dense(self.queries[i], self.keys[i], self.values[i]) for i in which]


def check(
    got: list[Tensor],
    expected: list[Tensor],
    seqs: list[tuple[int, int]],
    what: str,
    look: str,
    tolerance: float = TOLERANCE,
) -> None:
    for number, (num_new, length) in enumerate(seqs):
        where = f"{what}, sequence {number} ({num_new} new tokens, {length} with those before)"
        assert got[number].shape == expected[number].shape, (
            f"{where}: expected shape {list(expected[number].shape)}, got {list(got[number].shape)}. {look}"
        )
        differences = (got[number] - expected[number]).abs().flatten(1).amax(dim=1)
        wrong = [query for query, difference in enumerate(differences.tolist()) if not difference < tolerance]
        assert not wrong, (  # NaN is wrong too
            f"{where}: its queries {wrong} differ from dense attention, by up to {float(differences.max()):.2e}, "
            f"expected less than {tolerance:g}. {look}"
        )


# The mask


@pytest.mark.parametrize(
    ("num_queries", "num_context", "expected"),
    [
        (1, 1, [[1]]),
        (1, 4, [[1, 1, 1, 1]]),
        (2, 4, [[1, 1, 1, 0], [1, 1, 1, 1]]),
        (3, 3, [[1, 0, 0], [1, 1, 0], [1, 1, 1]]),
        (3, 5, [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]),
    ],
)
def test_the_mask_is_aligned_at_the_bottom_right(num_queries: int, num_context: int, expected: list[list[int]]) -> None:
    got = causal_mask(num_queries, num_context, "cpu")
    assert got.dtype == torch.bool, f"expected bool, got {got.dtype}. {LOOK_MASK}"
    assert got.int().tolist() == expected, (
        f"{num_queries} queries at the end of a context of {num_context}: expected {expected}, got "
        f"{got.int().tolist()}. {LOOK_MASK}"
    )


def test_each_query_sees_all_up_to_itself() -> None:
    for num_context in range(1, 12):
        for num_queries in range(1, num_context + 1):
            got = causal_mask(num_queries, num_context, "cpu")
            assert got.shape == (num_queries, num_context), f"got shape {list(got.shape)}. {LOOK_MASK}"
            seen = got.sum(dim=1).tolist()
            expected = list(range(num_context - num_queries + 1, num_context + 1))
            assert seen == expected, (
                f"{num_queries} queries, a context of {num_context}: they see {seen} keys, expected {expected}. "
                f"{LOOK_MASK}"
            )


# One chunk


@group_sizes
@pytest.mark.parametrize("num_context", [1, 2, 16, 17, 40])
def test_chunk_attention_equals_dense(num_context: int, group_size: int) -> None:
    generator = torch.Generator().manual_seed(num_context)
    key, value = (torch.randn(num_context, 2, HEAD_DIM, generator=generator) for _ in range(2))
    for num_queries in sorted({1, 2, 7, num_context - 1, num_context} & set(range(1, num_context + 1))):
        query = torch.randn(num_queries, 2 * group_size, HEAD_DIM, generator=generator)
        got = chunk_attention(query, key, value, SCALE)
        what = f"{2 * group_size} query heads over 2 KV heads"
        check([got], [dense(query, key, value)], [(num_queries, num_context)], what, LOOK_CHUNK)


def test_chunk_attention_is_told_the_scale() -> None:
    query, key = torch.randn(3, 2, HEAD_DIM), torch.randn(9, 2, HEAD_DIM)
    for scale in (0.05, 2.0):
        got = chunk_attention(query, key, key, scale)
        check([got], [dense(query, key, key, scale)], [(3, 9)], f"scale {scale}", LOOK_CHUNK)


def test_chunk_by_chunk_is_the_whole() -> None:
    """The queries of a prompt in chunks, each over all keys so far: nothing but the whole prompt's attention."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(50, heads, HEAD_DIM, generator=generator) for heads in (4, 2, 2))
    whole = chunk_attention(query, key, value, SCALE)
    for size in (1, 7, 16, 49):
        starts = range(0, 50, size)
        parts = [chunk_attention(query[s : s + size], key[: s + size], value[: s + size], SCALE) for s in starts]
        check([torch.cat(parts)], [whole], [(50, 50)], f"in chunks of {size}", LOOK_CHUNK)


# Decodes and chunks in one batch


@block_sizes
@group_sizes
def test_a_mixed_batch_equals_dense(group_size: int, block_size: int) -> None:
    """NaN wherever none of the sequences has written: a weight of 0 times NaN would still be NaN."""
    for seed in range(2):  # other tables each time
        sequences = Sequences(MIXED, group_size, block_size, seed)
        what = f"block_size={block_size}, {2 * group_size} heads over 2 KV heads"
        check(sequences.attend(layer=1), sequences.expected(), MIXED, what, LOOK_ATTEND)
        assert sequences.cache.data[0].isnan().any(), "there must be something to stumble over"
        assert not sequences.cache.data[:, 0].any(), f"the null block's zeros were overwritten. {LOOK_ATTEND}"


@pytest.mark.parametrize("stale", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize(
    "seqs",
    [
        [(1, 5), (1, 33), (1, 1)],
        [(4, 4), (9, 9)],
        [(4, 20), (1, 33)],
        [(1, 17), (4, 4), (4, 20)],
        [(1, 1), (1, 2)],
        [(2, 3), (1, 1)],
        [(1, 16), (16, 32)],
    ],
    ids=str,
)
def test_what_others_left_behind_is_never_read(seqs: list[tuple[int, int]], stale: float) -> None:
    """In blocks of others, and in a sequence's own, past its end."""
    sequences = Sequences(seqs, stale=stale)
    check(sequences.attend(layer=0), sequences.expected(), seqs, f"{stale} elsewhere", LOOK_SLOTS)


def test_any_one_token_sequence_may_be_taken_for_a_decode_or_a_chunk() -> None:
    """A prompt's last chunk may have one token. Behind other chunks it is one of them, and nothing is lost."""
    sequences = Sequences([(1, 9), (1, 30), (1, 1), (3, 8), (1, 20)])
    for num_decodes in range(4):
        got = Sequences(sequences.seqs).attend(0, num_decodes=num_decodes)
        what = f"the first {num_decodes} as decodes, the others as chunks"
        check(got, sequences.expected(), sequences.seqs, what, LOOK_ATTEND)


def test_the_new_tokens_go_to_their_slots() -> None:
    sequences = Sequences(MIXED, block_size=8)
    sequences.attend(layer=1)
    for number, (table, length) in enumerate(zip(sequences.tables, [c for _, c in MIXED], strict=True)):
        for position in range(length):
            place = sequences.cache.data[1, table[position // 8], position % 8]
            is_right = torch.equal(place[0], sequences.keys[number][position]) and torch.equal(
                place[1], sequences.values[number][position]
            )
            assert is_right, f"sequence {number}: position {position} is not in its slot. {LOOK_ATTEND}"


def test_a_later_chunk_reads_its_past_from_the_cache_and_a_first_one_does_not() -> None:
    """So a first chunk is right even over a pool that loses everything, as long as nobody asks for its past."""
    sequences = Sequences([(5, 5), (5, 14)])
    expected = sequences.expected()
    sequences.cache.store = lambda *_: None  # type: ignore[method-assign]
    first, later = sequences.attend(layer=0)
    assert torch.allclose(first, expected[0], atol=TOLERANCE), f"its keys and values are at hand. {LOOK_ATTEND}"
    assert later.isnan().any(), f"a later chunk reads all of its context from the cache. {LOOK_ATTEND}"


def test_the_buffer_serves_batches_of_any_size() -> None:
    seqs = [(1, 5), (1, 40), (7, 20), (3, 33), (9, 9)]
    sequences = Sequences(seqs)
    for which in ([1], [2], [0, 1, 2, 3, 4], [0], [3, 2], [4], [1, 3], [2]):
        for layer in (0, 1):
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # torch warns of a buffer that is too small
                got = sequences.attend(layer, which)
            what = f"sequences {which} after larger and smaller batches, layer {layer}"
            check(got, sequences.expected(which), [seqs[number] for number in which], what, LOOK_GATHER)


def test_two_answers_do_not_share_memory() -> None:
    """The buffer is used again for the next chunk and in the next layer; what was returned must not change."""
    sequences = Sequences(MIXED)
    first = sequences.attend(layer=0)
    before = [tensor.clone() for tensor in first]
    sequences.attend(layer=1)
    check(first, before, MIXED, "layer 0, after layer 1 was computed", LOOK_GATHER)


def test_bfloat16_after_float32_is_computed_in_bfloat16() -> None:
    sequences = Sequences(MIXED, stale=0.0)
    sequences.attend(layer=0)
    for name in ("keys", "values", "queries"):
        setattr(sequences, name, [tensor.bfloat16() for tensor in getattr(sequences, name)])
    sequences.cache.data = sequences.cache.data.bfloat16()
    got = sequences.attend(layer=0)
    assert {tensor.dtype for tensor in got} == {torch.bfloat16}, f"expected bfloat16 out as in. {LOOK_GATHER}"
    expected = [tensor.float() for tensor in sequences.expected()]
    check([tensor.float() for tensor in got], expected, MIXED, "bfloat16", LOOK_GATHER, tolerance=0.1)


@group_sizes
def test_decode_attention_masks_what_is_padding(group_size: int) -> None:
    lengths = [1, 15, 16, 33]
    sequences = Sequences([(1, length) for length in lengths], group_size)
    context = torch.full((4, 33, 2, 2, HEAD_DIM), 50.0)
    mask = torch.zeros(4, 33, dtype=torch.bool)
    for number, length in enumerate(lengths):
        context[number, :length, 0], context[number, :length, 1] = sequences.keys[number], sequences.values[number]
        mask[number, :length] = True
    got = decode_attention(torch.cat(sequences.queries), context, mask, SCALE).split(1)
    check(list(got), sequences.expected(), sequences.seqs, "padded with 50", LOOK_DECODE)


# What the metadata says


def metadata_by_hand() -> AttentionMetadata:
    """Blocks of 2: a decode at position 5, one at position 0, a chunk of 3 that ends at position 6."""
    return AttentionMetadata(
        num_decodes=2,
        query_lens=[1, 1, 3],
        context_lens=[6, 1, 7],
        slot_mapping=torch.tensor([7, 4, 12, 13, 10]),
        block_tables=torch.tensor([[7, 1, 3, 0], [2, 0, 0, 0], [8, 9, 6, 5]], dtype=torch.int32),
        block_size=2,
    )


def test_decode_slots_and_mask_by_hand() -> None:
    metadata = metadata_by_hand()
    got, expected = metadata.decode_slots.tolist(), [[14, 15, 2, 3, 6, 7], [4, 0, 0, 0, 0, 0]]
    assert got == expected, (
        f"two decodes, of 6 and 1 tokens, whatever the chunk has: expected slots {expected}, got {got}. {LOOK_SLOTS}"
    )
    mask, expected = metadata.decode_mask.int().tolist(), [[1] * 6, [1, 0, 0, 0, 0, 0]]
    assert mask == expected, f"two decodes, of 6 and 1 tokens: expected {expected}, got {mask}. {LOOK_SLOTS}"
    assert metadata.decode_mask.dtype == torch.bool, f"expected bool, got {metadata.decode_mask.dtype}. {LOOK_SLOTS}"


def test_slots_of_a_chunk_by_hand() -> None:
    got, expected = metadata_by_hand().slots(slice(2, 3), 7).tolist(), [[16, 17, 18, 19, 12, 13, 10]]
    assert got == expected, f"blocks 8, 9, 6, 5 of 2: expected {expected}, got {got}. {LOOK_SLOTS}"


def test_slots_are_64_bit() -> None:
    metadata = metadata_by_hand()
    metadata.block_tables[0, 0] = 2**30 + 1
    got = metadata.slots(slice(0, 1), 2).tolist()
    assert got == [[2**31 + 2, 2**31 + 3]], f"block · block_size must not be computed in int32: got {got}. {LOOK_SLOTS}"


def test_where_sequences_begin() -> None:
    metadata = metadata_by_hand()
    assert metadata.query_start_loc == [0, 1, 2, 5], (
        f"expected [0, 1, 2, 5], got {metadata.query_start_loc}. {LOOK_SLOTS}"
    )
    for name, expected in (("query_start_loc_tensor", [0, 1, 2, 5]), ("context_lens_tensor", [6, 1, 7])):
        got = getattr(metadata, name)
        assert (got.tolist(), got.dtype) == (expected, torch.int32), (
            f"{name}: expected {expected}, got {got}. {LOOK_SLOTS}"
        )


# The Triton kernel's arguments (the kernel itself: test_triton_attention.py)


def test_what_the_triton_kernel_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets the whole batch at once, and the new tokens are in the cache by then."""
    sequences, calls = Sequences(MIXED, group_size=3, block_size=8, backend="triton"), list[tuple[Any, ...]]()

    def paged_attention(
        query: Tensor, kv_cache: Tensor, tables: Tensor, starts: Tensor, lens: Tensor, *rest: Any
    ) -> Tensor:
        calls.append((query.shape, kv_cache.shape, starts.tolist(), lens.tolist(), *rest))
        for name, tensor in (("block_tables", tables), ("query_start_loc", starts), ("context_lens", lens)):
            assert tensor.dtype == torch.int32, f"{name} must be int32, got {tensor.dtype}. {LOOK_TRITON}"
        output = torch.empty_like(query)
        for number, length in enumerate(lens.tolist()):
            keys, values = kv_cache[tables[number].long()].unbind(1)  # [blocks, block_size, kv_heads, head_dim]
            rows = slice(int(starts[number]), int(starts[number + 1]))
            output[rows] = dense(query[rows], keys.flatten(0, 1)[:length], values.flatten(0, 1)[:length], rest[-1])
        return output

    monkeypatch.setattr(attention_module, "paged_attention", paged_attention)
    got = sequences.attend(layer=1)
    check(got, sequences.expected(), MIXED, "through the kernel's arguments", LOOK_TRITON)
    [(query, cache, starts, lens, max_query_len, scale)] = calls
    assert query == (sum(new for new, _ in MIXED), 6, HEAD_DIM), (
        f"the whole batch in one launch, got {query}. {LOOK_TRITON}"
    )
    assert cache == (sequences.cache.num_blocks, 2, 8, 2, HEAD_DIM), (
        f"expected a cache of [num_blocks, 2, block_size, num_kv_heads, head_dim], got {list(cache)}. {LOOK_TRITON}"
    )
    assert starts == [0, *torch.tensor([new for new, _ in MIXED]).cumsum(0).tolist()], f"got {starts}. {LOOK_TRITON}"
    assert lens == [length for _, length in MIXED], f"got {lens}. {LOOK_TRITON}"
    assert (max_query_len, scale) == (17, SCALE), f"expected (17, {SCALE}), got {(max_query_len, scale)}. {LOOK_TRITON}"


@pytest.mark.parametrize(
    ("name", "device", "expected"),
    [("auto", "cpu", "torch"), ("auto", "cuda:1", "triton"), ("torch", "cuda", "torch"), ("triton", "cuda", "triton")],
)
def test_choose_backend(name: str, device: str, expected: str) -> None:
    got = choose_backend(name, device)
    assert got == expected, (
        f"{name} on {device}: expected {expected}, got {got}. Look at worker/attention.py::choose_backend."
    )


# A whole model


@pytest.fixture(scope="module")
def small(
    tmp_path_factory: pytest.TempPathFactory, small_reference: Callable[[str], Any]
) -> Callable[[str], DecoderModel]:
    """Ours, with a small random model's weights."""

    def load(family: str) -> DecoderModel:
        directory, reference = tmp_path_factory.mktemp(family), small_reference(family)
        reference.save_pretrained(directory)
        checkpoint = Checkpoint(str(directory), reference.config, directory, directory, frozenset())
        return load_decoder(checkpoint, torch.float32, "cpu")

    return load


@torch.inference_mode()
def logits_in_chunks(model: DecoderModel, tokens: Tensor, size: int, block_size: int = 16) -> Tensor:
    """Logits of all positions, computed a chunk of this size at a time, each in a step with a decode before it."""
    num_blocks = -(-len(tokens) // block_size)
    config: Any = model.config
    cache = KVCache(config, 2 * num_blocks + 2, block_size, torch.float32, "cpu")
    cache.data[:, 1:] = torch.nan
    attention = PagedAttention(cache, model.layers[0].self_attn.head_dim ** -0.5, "torch")
    table = list(range(2 * num_blocks, 0, -2))  # every other block, backwards
    other, logits = 2 * num_blocks + 1, []
    for start in range(0, len(tokens), size):
        end = min(start + size, len(tokens))
        slots = [table[p // block_size] * block_size + p % block_size for p in range(start, end)]
        metadata = AttentionMetadata(
            num_decodes=1,
            query_lens=[1, end - start],
            context_lens=[1, end],
            slot_mapping=torch.tensor([other * block_size, *slots]),
            block_tables=torch.tensor([[other] + [0] * (num_blocks - 1), table], dtype=torch.int32),
            block_size=block_size,
        )
        hidden = model(
            torch.cat((tokens[:1], tokens[start:end])),
            torch.tensor([0, *range(start, end)]),
            lambda layer, query, key, value, metadata=metadata: attention.attend(metadata, layer, query, key, value),
        )
        logits.append(model.compute_logits(hidden[1:]))
    return torch.cat(logits)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_logits_of_chunks_of_7_equal_the_whole_prompts(
    family: str, small: Callable[[str], DecoderModel], small_reference: Callable[[str], Any]
) -> None:
    """100 tokens in chunks of 7, in blocks of 16: no edge falls on another."""
    model, reference = small(family), small_reference(family)
    tokens = torch.randint(320, (100,), generator=torch.Generator().manual_seed(5))
    expected = reference(tokens[None]).logits[0]
    whole = logits_in_chunks(model, tokens, 100)
    for what, got in (
        ("whole", whole),
        *((f"in chunks of {n}", logits_in_chunks(model, tokens, n)) for n in (7, 1, 33)),
    ):
        for name, other in (("transformers'", expected), ("the whole prompt's", whole)):
            differences = (got - other).abs().amax(dim=1)
            wrong = [position for position, difference in enumerate(differences.tolist()) if not difference < 1e-4]
            assert not wrong, (
                f"{family}, 100 tokens {what}, blocks of 16: logits are not {name} at positions {wrong[:5]}…, by up "
                f"to {float(differences.max()):.2e}, expected less than 1e-4. {LOOK_CHUNK}"
            )
