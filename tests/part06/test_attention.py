"""worker/attention.py: decodes, first chunks and later chunks in one batch equal dense attention, whatever other slots hold."""  # noqa: E501

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from common.checkpoint import Checkpoint
from common.testing import FAMILIES
from part06_chunked_prefill.messages import NULL_BLOCK
from part06_chunked_prefill.worker import triton_attention
from part06_chunked_prefill.worker.attention import (
    AttentionMetadata,
    PagedAttention,
    causal_mask,
    choose_backend,
    reference_attention,
)
from part06_chunked_prefill.worker.kv_cache import KVCache
from part06_chunked_prefill.worker.model import DecoderModel
from part06_chunked_prefill.worker.weights import load_decoder

LOOK_MASK = 'Look at worker/attention.py::causal_mask; README "The causal mask of a chunk".'
LOOK_REFERENCE = 'Look at worker/attention.py::reference_attention; README "The causal mask of a chunk".'
LOOK_ATTEND = 'Look at worker/attention.py::PagedAttention.attend; README "The causal mask of a chunk".'
LOOK_TRITON = 'Look at worker/attention.py::PagedAttention; README "One kernel for decodes and chunks".'
HEAD_DIM, SCALE = 8, 0.3  # a scale that is no default
TOLERANCE = 1e-5
MIXED = [(1, 33), (1, 1), (1, 16), (7, 7), (5, 20), (1, 18), (16, 48), (3, 17), (1, 1), (17, 17)]  # new, context
group_sizes = pytest.mark.parametrize("group_size", [1, 2, 3])
block_sizes = pytest.mark.parametrize("block_size", [1, 8, 16])
backends = pytest.mark.parametrize("backend", ["torch", "numba"])


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


def metadata_for(seqs: list[tuple[int, int]], tables: list[list[int]], block_size: int) -> AttentionMetadata:
    """seqs: of each sequence its new tokens, and its context with these included."""
    slots = [
        table[p // block_size] * block_size + p % block_size
        for table, (num_new, length) in zip(tables, seqs, strict=True)
        for p in range(length - num_new, length)
    ]
    width = max(map(len, tables))
    return AttentionMetadata(
        slot_mapping=torch.tensor(slots),
        block_tables=torch.tensor([table + [NULL_BLOCK] * (width - len(table)) for table in tables], dtype=torch.int32),
        query_start_loc=torch.tensor([0, *accumulate(num_new for num_new, _ in seqs)], dtype=torch.int32),
        context_lens=torch.tensor([length for _, length in seqs], dtype=torch.int32),
        max_query_len=max(num_new for num_new, _ in seqs),
    )


class Sequences:
    """Random queries, keys and values of sequences (new tokens, context), in a pool with shuffled block tables.

    The cache holds what was computed before this step, and not the new tokens. All other slots hold `stale`.
    """

    def __init__(
        self, seqs: list[tuple[int, int]], group_size: int = 2, block_size: int = 16, seed: int = 0,
        stale: float = torch.nan, backend: str = "torch", dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        self.seqs, self.block_size, num_kv_heads = seqs, block_size, 2
        num_heads = num_kv_heads * group_size
        self.queries = [random(num_new, num_heads, HEAD_DIM) for num_new, _ in seqs]
        self.keys = [random(length, num_kv_heads, HEAD_DIM) for _, length in seqs]
        self.values = [random(length, num_kv_heads, HEAD_DIM) for _, length in seqs]
        counts = [-(-length // block_size) for _, length in seqs]
        model: Any = SimpleNamespace(
            num_layers=2, num_kv_heads=num_kv_heads, head_dim=HEAD_DIM, dtype=dtype, device="cpu"
        )
        num_blocks = 1 + sum(counts) + 5
        self.cache = KVCache(model, num_blocks, block_size)
        shuffled = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()
        self.tables = [[shuffled.pop() for _ in range(count)] for count in counts]
        self.cache.data.fill_(stale)
        for layer in (0, 1):
            for (num_new, length), table, key, value in zip(seqs, self.tables, self.keys, self.values, strict=True):
                for position in range(length - num_new):
                    slot = self.cache.data[layer, table[position // block_size], position % block_size]
                    slot[0], slot[1] = key[position], value[position]
        self.attention = PagedAttention(self.cache, SCALE, backend)

    def flat(self) -> tuple[Tensor, Tensor, Tensor]:
        """The new tokens' queries, keys and values, one sequence after the other."""
        news = [num_new for num_new, _ in self.seqs]
        return (
            torch.cat(self.queries),
            torch.cat([key[-new:] for key, new in zip(self.keys, news, strict=True)]),
            torch.cat([value[-new:] for value, new in zip(self.values, news, strict=True)]),
        )

    def attend(self, layer: int) -> list[Tensor]:
        metadata = metadata_for(self.seqs, self.tables, self.block_size)
        output = self.attention.attend(metadata, layer, *self.flat())
        return list(output.split([num_new for num_new, _ in self.seqs]))

    def expected(self) -> list[Tensor]:
        parts = zip(self.queries, self.keys, self.values, strict=True)
        return [dense(query.float(), key.float(), value.float()) for query, key, value in parts]


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
        differences = (got[number].float() - expected[number]).abs().flatten(1).amax(dim=1)
        wrong = [query for query, difference in enumerate(differences.tolist()) if not difference < tolerance]
        assert not wrong, (  # NaN is wrong too
            f"{where}: its queries {wrong} differ from dense attention, by up to {float(differences.max()):.2e}, "
            f"expected less than {tolerance:g}. {look}"
        )


# The mask


@pytest.mark.parametrize(
    ("num_queries", "context_len", "expected"),
    [
        (1, 1, [[1]]),
        (1, 4, [[1, 1, 1, 1]]),
        (2, 4, [[1, 1, 1, 0], [1, 1, 1, 1]]),
        (3, 3, [[1, 0, 0], [1, 1, 0], [1, 1, 1]]),
        (3, 5, [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]),
    ],
)
def test_the_mask_is_aligned_at_the_bottom_right(num_queries: int, context_len: int, expected: list[list[int]]) -> None:
    got = causal_mask(num_queries, context_len, torch.device("cpu"))
    assert got.dtype == torch.bool, f"expected bool, got {got.dtype}. {LOOK_MASK}"
    assert got.int().tolist() == expected, (
        f"{num_queries} queries at the end of a context of {context_len}: expected {expected}, got "
        f"{got.int().tolist()}. {LOOK_MASK}"
    )


def test_each_query_sees_all_positions_up_to_its_own() -> None:
    for context_len in range(1, 12):
        for num_queries in range(1, context_len + 1):
            got = causal_mask(num_queries, context_len, torch.device("cpu"))
            assert got.shape == (num_queries, context_len), f"got shape {list(got.shape)}. {LOOK_MASK}"
            seen = got.sum(dim=1).tolist()
            expected = list(range(context_len - num_queries + 1, context_len + 1))
            assert seen == expected, (
                f"{num_queries} queries, a context of {context_len}: they see {seen} keys, expected {expected}. "
                f"{LOOK_MASK}"
            )


# One sequence


def attend_one(query: Tensor, key: Tensor, value: Tensor, scale: float = SCALE) -> Tensor:
    """reference_attention over one sequence, in one block that is just as long."""
    kv_cache = torch.stack((key, value), dim=1).unsqueeze(0)
    table, starts = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([0, len(query)], dtype=torch.int32)
    lens = torch.tensor([len(key)], dtype=torch.int32)
    return reference_attention(query, kv_cache, table, starts, lens, len(query), scale)


@group_sizes
@pytest.mark.parametrize("context_len", [1, 2, 16, 17, 40])
def test_the_reference_equals_dense_attention(context_len: int, group_size: int) -> None:
    generator = torch.Generator().manual_seed(context_len)
    key, value = (torch.randn(context_len, 2, HEAD_DIM, generator=generator) for _ in range(2))
    for num_queries in sorted({1, 2, 7, context_len - 1, context_len} & set(range(1, context_len + 1))):
        query = torch.randn(num_queries, 2 * group_size, HEAD_DIM, generator=generator)
        got = attend_one(query, key, value)
        what = f"{2 * group_size} query heads over 2 KV heads"
        check([got], [dense(query, key, value)], [(num_queries, context_len)], what, LOOK_REFERENCE)


def test_the_reference_uses_the_scale_it_is_given() -> None:
    query, key = torch.randn(3, 2, HEAD_DIM), torch.randn(9, 2, HEAD_DIM)
    for scale in (0.05, 2.0):
        got = attend_one(query, key, key, scale)
        check([got], [dense(query, key, key, scale)], [(3, 9)], f"scale {scale}", LOOK_REFERENCE)


def test_chunks_equal_the_whole_prompt() -> None:
    """The queries of a prompt in chunks, each over all keys so far, give the whole prompt's attention."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(50, heads, HEAD_DIM, generator=generator) for heads in (4, 2, 2))
    whole = attend_one(query, key, value)
    for size in (1, 7, 16, 49):
        starts = range(0, 50, size)
        parts = [attend_one(query[s : s + size], key[: s + size], value[: s + size]) for s in starts]
        check([torch.cat(parts)], [whole], [(50, 50)], f"in chunks of {size}", LOOK_REFERENCE)


# Decodes and chunks in one batch


@backends
@block_sizes
@group_sizes
def test_a_mixed_batch_equals_dense_attention(group_size: int, block_size: int, backend: str) -> None:
    """NaN in all slots that no sequence has written: a weight of 0 times NaN would still be NaN."""
    for seed in range(2):  # other tables each time
        sequences = Sequences(MIXED, group_size, block_size, seed, backend=backend)
        what = f"{backend}, block_size={block_size}, {2 * group_size} heads over 2 KV heads"
        check(sequences.attend(layer=1), sequences.expected(), MIXED, what, LOOK_ATTEND)
        assert sequences.cache.data[0].isnan().any(), "this test needs NaN in the cache"


@backends
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
def test_other_slots_are_never_read(seqs: list[tuple[int, int]], stale: float, backend: str) -> None:
    """Slots of other sequences, those past a sequence's end in its own last block, and the null block's."""
    sequences = Sequences(seqs, stale=stale, backend=backend)
    check(sequences.attend(layer=0), sequences.expected(), seqs, f"{backend}, {stale} elsewhere", LOOK_ATTEND)


def test_the_new_tokens_go_to_their_slots() -> None:
    sequences = Sequences(MIXED, block_size=8)
    sequences.attend(layer=1)
    for number, (table, length) in enumerate(zip(sequences.tables, [c for _, c in MIXED], strict=True)):
        for position in range(length):
            slot = sequences.cache.data[1, table[position // 8], position % 8]
            is_right = torch.equal(slot[0], sequences.keys[number][position]) and torch.equal(
                slot[1], sequences.values[number][position]
            )
            assert is_right, (
                f"sequence {number}: expected position {position}'s key and value in block {table[position // 8]} at "
                f"offset {position % 8}, and something else is there. {LOOK_ATTEND}"
            )


@backends
def test_the_outputs_of_two_layers_do_not_share_memory(backend: str) -> None:
    sequences = Sequences(MIXED, backend=backend)
    first = sequences.attend(layer=0)
    before = [tensor.clone() for tensor in first]
    sequences.attend(layer=1)
    check(first, before, MIXED, "layer 0, after layer 1 was computed", LOOK_ATTEND)


@backends
def test_bfloat16(backend: str) -> None:
    sequences = Sequences(MIXED, backend=backend, dtype=torch.bfloat16)
    got = sequences.attend(layer=0)
    dtypes = {tensor.dtype for tensor in got}
    assert dtypes == {torch.bfloat16}, f"bfloat16 in: expected bfloat16 out, got {dtypes}. {LOOK_ATTEND}"
    check(got, sequences.expected(), MIXED, f"{backend}, bfloat16", LOOK_ATTEND, tolerance=0.1)


def test_float16_on_a_cpu() -> None:
    """The kernel does not have it, so auto takes the reference."""
    backend = choose_backend("auto", "cpu", torch.float16)
    sequences = Sequences(MIXED, backend=backend, dtype=torch.float16)
    check(sequences.attend(layer=0), sequences.expected(), MIXED, "float16", LOOK_ATTEND, tolerance=0.01)


# The Triton kernel's arguments (the kernel itself: test_triton_attention.py)


def test_the_triton_kernel_gets_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one call, and the new tokens are in the cache by then."""
    calls = list[tuple[Any, ...]]()

    def paged_attention(
        query: Tensor, kv_cache: Tensor, tables: Tensor, starts: Tensor, lens: Tensor, *rest: Any
    ) -> Tensor:
        calls.append((query.shape, kv_cache.shape, starts.tolist(), lens.tolist(), *rest))
        for name, tensor in (("block_tables", tables), ("query_start_loc", starts), ("context_lens", lens)):
            assert tensor.dtype == torch.int32, f"{name} must be int32, got {tensor.dtype}. {LOOK_TRITON}"
        output = torch.empty_like(query)
        for number, length in enumerate(lens.tolist()):
            keys, values = kv_cache[tables[number].long()].unbind(2)  # [blocks, block_size, kv_heads, head_dim]
            rows = slice(int(starts[number]), int(starts[number + 1]))
            output[rows] = dense(query[rows], keys.flatten(0, 1)[:length], values.flatten(0, 1)[:length], rest[-1])
        return output

    monkeypatch.setattr(triton_attention, "paged_attention", paged_attention)
    sequences = Sequences(MIXED, group_size=3, block_size=8, backend="triton")
    got = sequences.attend(layer=1)
    check(got, sequences.expected(), MIXED, "through the kernel's arguments", LOOK_TRITON)
    [(query, cache, starts, lens, max_query_len, scale)] = calls
    news = [num_new for num_new, _ in MIXED]
    assert query == (sum(news), 6, HEAD_DIM), f"expected the whole batch in one call, got {list(query)}. {LOOK_TRITON}"
    assert cache == (sequences.cache.num_blocks, 8, 2, 2, HEAD_DIM), (
        f"expected a cache of [num_blocks, block_size, 2, num_kv_heads, head_dim], got {list(cache)}. {LOOK_TRITON}"
    )
    assert starts == [0, *accumulate(news)], f"expected query_start_loc of {news}, got {starts}. {LOOK_TRITON}"
    assert lens == [length for _, length in MIXED], (
        f"expected the context lengths of {MIXED}, got {lens}. {LOOK_TRITON}"
    )
    assert (max_query_len, scale) == (17, SCALE), f"expected (17, {SCALE}), got {(max_query_len, scale)}. {LOOK_TRITON}"


@pytest.mark.parametrize(
    ("name", "device", "dtype", "expected"),
    [
        ("auto", "cpu", "float32", "numba"), ("auto", "cpu", "bfloat16", "numba"), ("auto", "cpu", "float16", "torch"),
        ("auto", "cuda:1", "float16", "triton"), ("torch", "cuda", "float32", "torch"),
        ("torch", "cpu", "float32", "torch"), ("numba", "cpu", "float32", "numba"),
    ],
)  # fmt: skip
def test_choose_backend(name: str, device: str, dtype: str, expected: str) -> None:
    got = choose_backend(name, device, getattr(torch, dtype))
    assert got == expected, (
        f"{name} on {device} in {dtype}: expected {expected}, got {got}. Look at worker/attention.py::choose_backend."
    )


# A whole model


@pytest.fixture(scope="module")
def small(
    tmp_path_factory: pytest.TempPathFactory, small_reference: Callable[[str], Any]
) -> Callable[[str], DecoderModel]:
    """Our model with the weights of a small random one."""

    def load(family: str) -> DecoderModel:
        directory, reference = tmp_path_factory.mktemp(family), small_reference(family)
        reference.save_pretrained(directory)
        checkpoint = Checkpoint(str(directory), reference.config, directory, directory, frozenset())
        return load_decoder(checkpoint, torch.float32, "cpu")

    return load


@torch.inference_mode()
def logits_in_chunks(
    model: DecoderModel, tokens: Tensor, size: int, backend: str = "torch", block_size: int = 16
) -> Tensor:
    """Logits of all positions, computed a chunk of this size at a time, each in a step with a decode before it."""
    num_blocks = -(-len(tokens) // block_size)
    cache = KVCache(model, 2 * num_blocks + 2, block_size)
    cache.data.fill_(torch.nan)
    attention = PagedAttention(cache, model.head_dim**-0.5, backend)
    table = list(range(2 * num_blocks, 0, -2))  # every other block, backwards
    other, logits = 2 * num_blocks + 1, []
    for start in range(0, len(tokens), size):
        end = min(start + size, len(tokens))
        metadata = metadata_for([(1, 1), (end - start, end)], [[other], table], block_size)
        hidden = model(
            torch.cat((tokens[:1], tokens[start:end])),
            torch.tensor([0, *range(start, end)]),
            partial(attention.attend, metadata),
        )
        logits.append(model.compute_logits(hidden[1:]))
    return torch.cat(logits)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_logits_of_chunks_equal_the_whole_prompts(
    family: str, small: Callable[[str], DecoderModel], small_reference: Callable[[str], Any]
) -> None:
    """100 tokens in chunks of 7, in blocks of 16: chunks and blocks end at different positions."""
    model, reference = small(family), small_reference(family)
    tokens = torch.randint(320, (100,), generator=torch.Generator().manual_seed(5))
    expected = reference(tokens[None]).logits[0]
    whole = logits_in_chunks(model, tokens, 100)
    for what, got in (
        ("whole", whole),
        *((f"in chunks of {n}", logits_in_chunks(model, tokens, n)) for n in (7, 1, 33)),
        ("in chunks of 7, numba", logits_in_chunks(model, tokens, 7, "numba")),
    ):
        for name, other in (("transformers'", expected), ("the whole prompt's", whole)):
            differences = (got - other).abs().amax(dim=1)
            wrong = [position for position, difference in enumerate(differences.tolist()) if not difference < 1e-4]
            assert not wrong, (
                f"{family}, 100 tokens {what}, blocks of 16: logits at positions {wrong[:5]}… differ from {name} by "
                f"up to {float(differences.max()):.2e}, expected less than 1e-4. {LOOK_ATTEND}"
            )
