"""worker/attention.py: attention through a block table equals dense attention, whatever the other slots hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from part03_paged_attention import config
from part03_paged_attention.messages import NULL_BLOCK
from part03_paged_attention.worker.attention import (
    AttentionMetadata,
    PagedAttention,
    choose_backend,
    prefill_attention,
    reference_decode,
)
from part03_paged_attention.worker.kv_cache import KVCache
from tests.process_checks import course_environment

PART_DIR = Path(config.__file__).parent
PACKAGE = f"{PART_DIR.name}.worker"
LOOK_REFERENCE = 'Look at worker/attention.py::reference_decode; README "Attention through a table".'
LOOK_PAGED = 'Look at worker/attention.py::PagedAttention.attend; README "Attention through a table".'
LOOK_PREFILL = 'Look at worker/attention.py::prefill_attention; README "Attention through a table".'
LENGTHS = [1, 15, 16, 17, 33]
HEAD_DIM, SCALE = 8, 0.3  # a scale that is no default
TOLERANCE = 1e-5
group_sizes = pytest.mark.parametrize("group_size", [1, 2, 3])
block_sizes = pytest.mark.parametrize("block_size", [1, 8, 16])
backends = pytest.mark.parametrize("backend", ["torch", "numba"])


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
    padded = [table + [NULL_BLOCK] * (width - len(table)) for table in tables]
    return AttentionMetadata(
        is_prefill=is_prefill,
        slot_mapping=torch.tensor(slots),
        query_start_loc=starts,
        block_tables=torch.tensor(padded, dtype=torch.int32),
        context_lens=torch.tensor(lengths, dtype=torch.int32),
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
        self,
        lengths: list[int],
        group_size: int = 2,
        block_size: int = 16,
        seed: int = 0,
        num_kv_heads: int = 2,
        dtype: torch.dtype = torch.float32,
        backend: str = "torch",
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        self.lengths, self.block_size = lengths, block_size
        self.keys = [random(length, num_kv_heads, HEAD_DIM) for length in lengths]
        self.values = [random(length, num_kv_heads, HEAD_DIM) for length in lengths]
        self.queries = [random(length, num_kv_heads * group_size, HEAD_DIM) for length in lengths]
        counts = [-(-length // block_size) for length in lengths]
        num_blocks = 1 + sum(counts) + 5  # the null block, and five that belong to no sequence
        model = SimpleNamespace(
            num_layers=2, num_kv_heads=num_kv_heads, head_dim=HEAD_DIM, dtype=dtype, device="cpu"
        )  # fmt: skip
        self.cache = KVCache(model, num_blocks, block_size)  # type: ignore[arg-type]
        self.cache.data.fill_(0.25)
        shuffled = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()
        self.tables = [[shuffled.pop() for _ in range(count)] for count in counts]
        self.attention = PagedAttention(self.cache, SCALE, backend)

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
        """The last position of some sequences (all of them by default)."""
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

    def fill(self, layer: int, num_left_out: int = 1) -> None:
        """Write all keys and values but the newest to the slots that the tables name, by other means than a prefill."""
        for table, key, value in zip(self.tables, self.keys, self.values, strict=True):
            for position in range(len(key) - num_left_out):
                slot = self.cache.data[layer, table[position // self.block_size], position % self.block_size]
                slot[0], slot[1] = key[position], value[position]

    def poison(self, number: float = torch.nan) -> None:
        """The number in every slot that no token of these sequences has: in free blocks, in the rest of last blocks,
        and in the null block."""
        owned = torch.zeros(self.cache.num_blocks, self.block_size, dtype=torch.bool)
        for table, length in zip(self.tables, self.lengths, strict=True):
            for position in range(length):
                owned[table[position // self.block_size], position % self.block_size] = True
        self.cache.data[:, ~owned] = number


def check(
    got: Tensor, expected: Tensor, lengths: list[int], what: str, look: str, tolerance: float = TOLERANCE
) -> None:
    assert got.shape == expected.shape, f"{what}: expected shape {list(expected.shape)}, got {list(got.shape)}. {look}"
    assert got.dtype == expected.dtype, f"{what}: expected {expected.dtype}, got {got.dtype}. {look}"
    for number, length in enumerate(lengths):
        difference = float((got[number].float() - expected[number].float()).abs().max())
        assert difference < tolerance, (  # NaN is not
            f"{what}, sequence {number} ({length} tokens): paged and dense attention differ by {difference:.2e}, "
            f"expected less than {tolerance:g}. {look}"
        )


# The reference


def check_reference(sequences: Sequences, what: str, tolerance: float = TOLERANCE) -> None:
    """reference_decode over a cache that holds all keys and values, with NaN everywhere else."""
    sequences.fill(layer=1, num_left_out=0)
    sequences.poison()
    metadata = metadata_for(sequences.tables, sequences.lengths, sequences.block_size)
    query = torch.stack([queries[-1] for queries in sequences.queries])
    kv_cache = sequences.cache.layer(1)
    got = reference_decode(query, kv_cache, metadata.block_tables, metadata.context_lens, SCALE)
    check(got, sequences.expected(), sequences.lengths, what, LOOK_REFERENCE, tolerance)


@block_sizes
@group_sizes
def test_the_reference_equals_dense_attention(group_size: int, block_size: int) -> None:
    for lengths in ([7], [5, 5, 5], LENGTHS):
        what = f"{2 * group_size} query heads over 2 KV heads, block_size={block_size}"
        check_reference(Sequences(lengths, group_size, block_size), what)


def test_the_reference_with_one_kv_head_and_many() -> None:
    for group_size, num_kv_heads in ((6, 1), (1, 5)):
        sequences = Sequences([9, 40], group_size, num_kv_heads=num_kv_heads)
        check_reference(sequences, f"{group_size * num_kv_heads} query heads over {num_kv_heads} KV heads")


def test_the_reference_in_bfloat16() -> None:
    check_reference(Sequences(LENGTHS, dtype=torch.bfloat16), "bfloat16", tolerance=0.1)


def test_the_reference_reads_no_table_entry_past_the_end() -> None:
    """An entry left over from a longer request: no pool is that large."""
    sequences = Sequences([5, 40])
    sequences.tables[0] += [10**6] * 2
    check_reference(sequences, "a block table with entries past the end of its context")


# Through the table


@backends
@block_sizes
@group_sizes
def test_paged_decode_equals_dense(group_size: int, block_size: int, backend: str) -> None:
    for seed in range(3):  # other tables each time
        sequences = Sequences(LENGTHS, group_size, block_size, seed, backend=backend)
        sequences.fill(layer=1)
        what = f"tables {sequences.tables}, block_size={block_size}, {2 * group_size} heads over 2 KV heads, {backend}"
        check(sequences.decode(layer=1), sequences.expected(), LENGTHS, what, LOOK_PAGED)


@backends
@pytest.mark.parametrize("number", [torch.nan, torch.inf, 1e30])
@block_sizes
def test_slots_that_no_token_owns_are_never_read(block_size: int, number: float, backend: str) -> None:
    """Free blocks, the rest of each last block and the null block: a weight of 0 times NaN would still be NaN."""
    sequences = Sequences(LENGTHS, block_size=block_size, backend=backend)
    sequences.fill(layer=0)
    sequences.poison(number)
    assert not sequences.cache.data[0, NULL_BLOCK].eq(0.25).any(), "the null block must hold the number too"
    what = f"{number} in all slots but the sequences' own, block_size={block_size}, {backend}"
    check(sequences.decode(layer=0), sequences.expected(), LENGTHS, what, LOOK_PAGED)


@backends
def test_the_null_block_may_be_written(backend: str) -> None:
    """Two padding tokens go to the null block; the others' answers are the same."""
    sequences = Sequences([4, 20], backend=backend)
    sequences.fill(layer=0)
    metadata = metadata_for(sequences.tables, sequences.lengths)
    query, key, value = (
        torch.stack([tensors[number][-1] for number in (0, 1)])
        for tensors in (sequences.queries, sequences.keys, sequences.values)
    )
    sequences.cache.store(0, torch.full_like(key, torch.nan), torch.full_like(value, torch.nan), torch.tensor([0, 3]))
    got = sequences.attention.attend(metadata, 0, query, key, value)
    check(got, sequences.expected(), sequences.lengths, f"NaN written to the null block, {backend}", LOOK_PAGED)


@backends
def test_batches_of_any_size_and_order_follow_each_other(backend: str) -> None:
    sequences = Sequences(LENGTHS, backend=backend)
    for layer in (0, 1):
        sequences.fill(layer)
    sequences.poison()
    for which in ([4], [0, 1, 2, 3, 4], [0], [1, 2], [3], [0, 1, 2, 3, 4], [2, 0]):
        lengths = [LENGTHS[number] for number in which]
        for layer in (0, 1):
            what = f"sequences {which} after larger and smaller batches, layer {layer}, {backend}"
            check(sequences.decode(layer, which), sequences.expected(which), lengths, what, LOOK_PAGED)


@backends
def test_two_answers_do_not_share_memory(backend: str) -> None:
    sequences = Sequences(LENGTHS, backend=backend)
    sequences.fill(layer=0)
    first = sequences.decode(layer=0)
    before = first.clone()
    sequences.decode(layer=1)
    assert torch.equal(first, before), f"{backend}: layer 1 changed the output of layer 0. {LOOK_PAGED}"


@backends
def test_decode_in_bfloat16(backend: str) -> None:
    sequences = Sequences(LENGTHS, dtype=torch.bfloat16, backend=backend)
    sequences.fill(layer=0)
    check(sequences.decode(layer=0), sequences.expected(), LENGTHS, f"bfloat16, {backend}", LOOK_PAGED, tolerance=0.1)


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
                f"expected less than {TOLERANCE:g}; a sequence attends to itself alone. {LOOK_PREFILL}"
            )


@backends
def test_prefill_fills_the_cache_that_decode_reads(backend: str) -> None:
    sequences = Sequences([2, 16, 17, 18, 33], backend=backend)
    for layer in (0, 1):
        sequences.prefill(layer, num_left_out=1)
        sequences.poison()
        check(sequences.decode(layer), sequences.expected(), sequences.lengths, f"layer {layer}, {backend}", LOOK_PAGED)


def test_prefill_does_not_read_the_cache() -> None:
    """A preempted request computes all its keys and values again; its old ones are not in the pool any more."""
    sequences = Sequences(LENGTHS)
    sequences.cache.data.fill_(torch.nan)
    got = sequences.prefill(layer=0)
    assert got.isfinite().all(), f"prefill attends to the keys and values at hand, not to the pool. {LOOK_PREFILL}"


# The choice


@pytest.mark.parametrize(
    ("name", "device", "dtype", "expected"),
    [
        ("auto", "cpu", "float32", "numba"),
        ("auto", "cpu", "bfloat16", "numba"),
        ("auto", "cpu", "float16", "torch"),
        ("auto", "cuda", "float16", "triton"),
        ("auto", "cuda:1", "bfloat16", "triton"),
        ("numba", "cpu", "float32", "numba"),
        ("torch", "cuda", "float32", "torch"),
        ("torch", "cpu", "float32", "torch"),
        ("triton", "cuda", "float32", "triton"),
    ],
)
def test_choose_backend(name: str, device: str, dtype: str, expected: str) -> None:
    got = choose_backend(name, device, getattr(torch, dtype))
    assert got == expected, (
        f"--attention-backend {name} on {device} in {dtype}: expected {expected}, got {got}. "
        'Look at worker/attention.py::choose_backend; README "Attention through a table".'
    )


def test_float16_on_a_cpu() -> None:
    """There is no kernel for it, so auto takes the reference."""
    sequences = Sequences(LENGTHS, dtype=torch.float16, backend=choose_backend("auto", "cpu", torch.float16))
    sequences.fill(layer=0)
    check(sequences.decode(layer=0), sequences.expected(), LENGTHS, "float16", LOOK_PAGED, tolerance=0.01)


SCRIPT = """
import sys, torch
from types import SimpleNamespace
from {package}.attention import PagedAttention

cache = SimpleNamespace(data=torch.zeros(1, 2, 4, 2, 1, 8))
for backend in ("torch", "numba", "triton"):
    PagedAttention(cache, 1.0, backend)
    print(backend, *sorted(name for name in sys.modules if name in ("numba", "triton", "{package}.triton_attention")))
print(len(sys.modules["{package}.cpu_attention"]._paged_decode_kernel.signatures))
"""


def test_only_the_chosen_kernel_is_imported() -> None:
    """Numba and Triton take a second or more to import. Numba's kernel is compiled before the first step."""
    command = [sys.executable, "-c", SCRIPT.format(package=PACKAGE)]
    done = subprocess.run(command, capture_output=True, text=True, env=course_environment(PART_DIR))
    assert done.returncode == 0, f"making each backend in turn: {done.stderr[-2000:]}"
    look = "Look at worker/attention.py::load_backend."
    torch_line, numba_line, triton_line, num_kernels = done.stdout.splitlines()
    assert torch_line == "torch", f"the reference needs neither kernel, imported are {torch_line!r}. {look}"
    assert numba_line == "numba numba", f"the CPU's kernel needs Numba alone, imported are {numba_line!r}. {look}"
    assert f"{PACKAGE}.triton_attention" in triton_line, f"the GPU's kernel, imported are {triton_line!r}. {look}"
    assert num_kernels == "1", f"expected 1 compiled kernel before the first step, got {num_kernels}. {look}"
