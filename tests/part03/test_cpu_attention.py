"""worker/cpu_attention.py: the Numba kernel equals dense attention, and compiles where nothing can be cached."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch
from numba.core.dispatcher import Dispatcher
from torch import Tensor

from part03_paged_attention.worker import cpu_attention
from part03_paged_attention.worker.attention import reference_decode
from part03_paged_attention.worker.cpu_attention import paged_decode

LOOK_KERNEL = 'Look at worker/cpu_attention.py::token_attention; README "Attention through a table".'
LOOK_SLOTS = 'Look at worker/cpu_attention.py::find_slots; README "Attention through a table".'
LOOK_DECODE = 'Look at worker/cpu_attention.py::paged_decode; README "Attention through a table".'
LOOK_CACHE = "Look at worker/cpu_attention.py::_jit_cached."
LENGTHS = [1, 15, 16, 17, 33, 64, 65, 300]  # around a block of 16 and a tile of 64, and several tiles
TOLERANCE = 1e-5
NUM_TABLE_ENTRIES_LEFT = 70  # more than a tile: an index past the end of a context still hits the table
group_sizes = pytest.mark.parametrize("group_size", [1, 2, 3, 8])
block_sizes = pytest.mark.parametrize("block_size", [1, 4, 16, 32])


@dataclass
class Batch:
    """One decode step over a pool with shuffled blocks, and what dense attention in float64 makes of it."""

    query: Tensor
    kv_cache: Tensor
    block_tables: Tensor
    context_lens: Tensor
    scale: float
    expected: Tensor

    def decode(self) -> Tensor:
        return paged_decode(self.query, self.kv_cache, self.block_tables, self.context_lens, self.scale)


def make_batch(
    lengths: list[int], group_size: int = 2, num_kv_heads: int = 2, head_dim: int = 16, block_size: int = 16,
    dtype: torch.dtype = torch.float32, scale: float | None = None, seed: int = 0, unused: float = torch.nan,
) -> Batch:  # fmt: skip
    """Slots that no token owns, in foreign blocks, in last blocks and in the null block, hold `unused`.

    Table entries past a context's end name a block that holds nothing else.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-length // block_size) for length in lengths]
    foreign, *pool = (torch.randperm(sum(counts) + 3, generator=generator) + 1).tolist()
    kv_cache = torch.full((len(pool) + 2, block_size, 2, num_kv_heads, head_dim), unused, dtype=dtype)
    width = max(counts, default=0) + NUM_TABLE_ENTRIES_LEFT
    block_tables = torch.full((len(lengths), width), foreign, dtype=torch.int32)
    query = torch.randn(len(lengths), num_kv_heads * group_size, head_dim, generator=generator).to(dtype)
    scale = head_dim**-0.5 if scale is None else scale
    expected = torch.empty(query.shape, dtype=torch.float64)
    for seq, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        blocks = [pool.pop() for _ in range(count)]
        block_tables[seq, :count] = torch.tensor(blocks)
        keys_and_values = torch.randn(length, 2, num_kv_heads, head_dim, generator=generator).to(dtype)
        for position in range(length):
            kv_cache[blocks[position // block_size], position % block_size] = keys_and_values[position]
        expected[seq] = dense(query[seq].double(), *keys_and_values.double().unbind(1), scale)
    return Batch(query, kv_cache, block_tables, torch.tensor(lengths, dtype=torch.int32), scale, expected)


def dense(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """query: [num_heads, head_dim]; key, value: [context_len, num_kv_heads, head_dim]."""
    output, group_size = torch.empty_like(query), len(query) // key.shape[1]
    for head in range(len(query)):
        weights = (key[:, head // group_size] @ query[head] * scale).softmax(dim=0)
        output[head] = weights @ value[:, head // group_size]
    return output


def check(batch: Batch, got: Tensor, what: str, look: str = LOOK_KERNEL, tolerance: float = TOLERANCE) -> None:
    expected = batch.expected
    assert got.shape == expected.shape, f"{what}: expected shape {list(expected.shape)}, got {list(got.shape)}. {look}"
    for seq, length in enumerate(batch.context_lens.tolist()):
        difference = (got[seq].double() - expected[seq]).abs().amax(dim=1)
        wrong = [head for head, number in enumerate(difference.tolist()) if not number < tolerance]  # NaN is not
        nan_hint = " (NaN: read from a slot that the sequence does not own)" if difference.isnan().any() else ""
        assert not wrong, (
            f"{what}, context of {length} tokens: expected dense attention within {tolerance:g}, got a difference of "
            f"{float(difference.max()):.2e}; wrong in heads {wrong} of {len(difference)}{nan_hint}. {look}"
        )


# One tile, then more


def test_one_key() -> None:
    """The weight of a single key is 1, whatever its score."""
    batch = make_batch([1], scale=3.0)
    check(batch, batch.decode(), "a context of one token: its value is the output")


def test_one_tile() -> None:
    lengths = [1, 15, 16, 17, 33, 64]
    batch = make_batch(lengths)
    check(batch, batch.decode(), "contexts of one tile")


@pytest.mark.parametrize("length", [65, 128, 129, 300])
def test_several_tiles(length: int) -> None:
    for seed in range(3):
        batch = make_batch([length], seed=seed)
        check(batch, batch.decode(), "several tiles: does a larger maximum rescale `total` and `output`?")


@pytest.mark.parametrize("order", ["rise", "fall"])
def test_scores_that_rise_or_fall_from_tile_to_tile(order: str) -> None:
    """The largest score is in the last tile, or in the first."""
    batch = make_batch([300], group_size=1, num_kv_heads=1, head_dim=16, block_size=1)
    ramp = torch.linspace(-20, 20, 300) if order == "rise" else torch.linspace(20, -20, 300)
    slots = batch.block_tables[0, :300].long()
    batch.query[:] = 1.0
    batch.kv_cache[slots, 0, 0, 0] = ramp.unsqueeze(1).expand(300, 16) / 16
    key, value = batch.kv_cache[slots, 0].double().unbind(1)
    batch.scale, batch.expected = 1.0, dense(batch.query[0].double(), key, value, 1.0).unsqueeze(0)
    check(batch, batch.decode(), f"scores that {order} by 40 over the context")


def test_large_scores_do_not_overflow() -> None:
    batch = make_batch(LENGTHS, scale=60.0)
    what = "scores of several hundred: e^score overflows a float32, e^(score - maximum) does not"
    check(batch, batch.decode(), what, tolerance=1e-3)


@block_sizes
@group_sizes
def test_every_head_size_equals_dense_attention(group_size: int, block_size: int) -> None:
    for head_dim in (16, 32, 64, 80, 128):
        batch = make_batch(LENGTHS, group_size, head_dim=head_dim, block_size=block_size)
        what = f"{2 * group_size} heads over 2 KV heads, head_dim {head_dim}, block_size {block_size}"
        check(batch, batch.decode(), what)


def test_one_kv_head_and_many() -> None:
    for group_size, num_kv_heads in ((6, 1), (1, 5), (3, 4)):
        batch = make_batch(LENGTHS, group_size, num_kv_heads)
        check(batch, batch.decode(), f"{group_size * num_kv_heads} heads over {num_kv_heads} KV heads")


def test_bfloat16() -> None:
    for group_size, head_dim in ((1, 64), (2, 32), (3, 80)):
        batch = make_batch(LENGTHS, group_size, head_dim=head_dim, dtype=torch.bfloat16)
        got = batch.decode()
        assert got.dtype == torch.bfloat16, f"expected query's dtype, bfloat16, got {got.dtype}. {LOOK_DECODE}"
        what = f"bfloat16 (only the output is rounded), {2 * group_size} heads, head_dim {head_dim}"
        check(batch, got, what, tolerance=1e-2)


def test_bfloat16_storage_is_widened_exactly() -> None:
    batch = make_batch(LENGTHS, dtype=torch.bfloat16)
    batch.query = batch.query.float()
    check(batch, batch.decode(), "a float32 query over a bfloat16 cache: sums in float32")


# What must not be read


@pytest.mark.parametrize("unused", [torch.nan, torch.inf, -torch.inf, 1e30])
@block_sizes
def test_slots_that_no_token_owns_are_never_read(block_size: int, unused: float) -> None:
    batch = make_batch(LENGTHS, block_size=block_size, unused=unused)
    before = batch.kv_cache.clone()
    what = f"{unused} in all slots but the sequences' own, block_size {block_size}"
    check(batch, batch.decode(), what, LOOK_SLOTS)
    assert torch.equal(before.nan_to_num(0.5), batch.kv_cache.nan_to_num(0.5)), f"the KV cache changed. {LOOK_DECODE}"


def test_a_table_that_is_just_wide_enough() -> None:
    batch = make_batch([64, 50])
    memory = torch.full((8 + NUM_TABLE_ENTRIES_LEFT,), int(batch.block_tables[0, -1]), dtype=torch.int32)
    memory[:8] = batch.block_tables[:, :4].flatten()
    batch.block_tables = memory[:8].view(2, 4)
    check(batch, batch.decode(), "4 blocks of 16 for 64 tokens, and the table has 4 columns", LOOK_SLOTS)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("what", ["key", "value"])
def test_a_number_that_is_broken_in_a_sequences_own_slot_shows(what: str, bad: float) -> None:
    """In the first, a middle and the last position. A plausible finite answer would hide the fault."""
    for position in (0, 70, 99):
        batch = make_batch([100, 100], block_size=1)
        batch.query.abs_()  # a key of inf then has a score of inf, not -inf, whose weight is 0
        batch.kv_cache[batch.block_tables[0, position], 0, int(what == "value")] = bad
        got = batch.decode()
        assert not got[0].isfinite().any(), (
            f"{bad} in a {what} at position {position}: expected no finite output, got {got[0, 0, :4].tolist()}. "
            f"{LOOK_KERNEL}"
        )
        assert got[1].isfinite().all(), f"{bad} in sequence 0: sequence 1 must not see it. {LOOK_SLOTS}"


def test_offsets_into_the_pool_are_64_bit() -> None:
    """A block that starts 2³¹ numbers into the pool; memory that nothing touches costs nothing."""
    num_blocks = 2**31 // (16 * 2 * 16) + 1
    kv_cache = torch.empty(num_blocks, 16, 2, 1, 16, dtype=torch.bfloat16)
    kv_cache[-1] = torch.randn(16, 2, 1, 16, generator=torch.Generator().manual_seed(0))
    query = torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(1))
    tables = torch.full((1, NUM_TABLE_ENTRIES_LEFT), num_blocks - 1, dtype=torch.int32)
    got = paged_decode(query, kv_cache, tables, torch.tensor([16], dtype=torch.int32), 0.25)
    expected = dense(query[0].double(), *kv_cache[-1].double().unbind(1), 0.25)
    difference = float((got[0] - expected).abs().max())
    assert difference < TOLERANCE, (
        f"a block 2³¹ numbers into the pool: expected dense attention within {TOLERANCE:g}, got a difference of "
        f"{difference:.2e}. {LOOK_SLOTS}"
    )


@pytest.mark.parametrize(
    ("table", "start", "num_keys", "expected"),
    [
        ([7, 1, 3], 0, 35, [*range(112, 128), *range(16, 32), 48, 49, 50]),
        ([7, 1, 3], 33, 2, [49, 50]),
        ([0] * 4 + [9, 8, 5, 6, 2], 64, 64, [*range(144, 160), *range(128, 144), *range(80, 112)]),
        ([2**27 + 1], 0, 3, [2**31 + 16, 2**31 + 17, 2**31 + 18]),
    ],
    ids=["first tile", "end of a context", "second tile", "past 2³¹"],
)
def test_find_slots_by_hand(table: list[int], start: int, num_keys: int, expected: list[int]) -> None:
    slots = np.full(cpu_attention.TILE_SIZE, -1)
    padded = np.array(table + [99] * NUM_TABLE_ENTRIES_LEFT, np.int32)
    cpu_attention.find_slots(slots, padded, start, num_keys, 16)
    got = slots.tolist()[:num_keys]
    assert got == expected, (
        f"table {table}, block_size=16, {num_keys} positions from {start} on: expected slots {expected}, got {got}. "
        f"{LOOK_SLOTS}"
    )


# Arguments


def test_a_query_that_is_a_view() -> None:
    batch = make_batch(LENGTHS)
    expected = batch.decode()
    batch.query = torch.cat((batch.query, batch.query), dim=1)[:, :4]
    assert not batch.query.is_contiguous()
    assert torch.equal(batch.decode(), expected), f"a query that is not contiguous gave another answer. {LOOK_DECODE}"
    batch.query = batch.query.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(batch.decode(), expected), f"a transposed query gave another answer. {LOOK_DECODE}"


def test_zero_sequences() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        batch = make_batch([], dtype=dtype)
        got = batch.decode()
        assert got.shape == (0, 4, 16), f"expected shape [0, 4, 16], got {list(got.shape)}. {LOOK_DECODE}"


def test_answers_do_not_share_memory() -> None:
    batch = make_batch(LENGTHS)
    first = batch.decode()
    before = first.clone()
    batch.query = batch.query + 1
    batch.decode()
    assert torch.equal(first, before), f"the second call changed the first one's output. {LOOK_DECODE}"


def test_under_inference_mode() -> None:
    with torch.inference_mode():
        batch = make_batch(LENGTHS)
        check(batch, batch.decode(), "under torch.inference_mode()")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(kv_cache=torch.zeros(3, 4, 2, 2, 16).transpose(0, 1)), "kv_cache must be contiguous"),
        (dict(kv_cache=torch.zeros(3, 4, 2, 2, 16, dtype=torch.float16)), "float32 or bfloat16 only"),
        (dict(kv_cache=torch.zeros(3, 4, 2, 3, 16)), "do not share 3 KV heads evenly"),
        (dict(block_tables=torch.zeros(1, 2, dtype=torch.int64)), "must be int32"),
    ],
    ids=["strided", "float16", "heads", "int64"],
)
def test_what_the_kernel_does_not_take_is_refused(change: dict[str, Tensor], message: str) -> None:
    batch = make_batch([3])
    for name, tensor in change.items():
        setattr(batch, name, tensor)
    with pytest.raises(AssertionError, match=message):
        batch.decode()


# Threads, compilation, the cache on disk


def test_two_threads_at_once() -> None:
    batches = [make_batch(LENGTHS * 4, head_dim=64, seed=seed) for seed in range(2)]
    gate, failures = threading.Barrier(2, timeout=60), list[str]()

    def run(batch: Batch) -> None:
        gate.wait()
        try:
            for _ in range(20):
                check(batch, batch.decode(), "two threads in the kernel at once")
        except AssertionError as error:
            failures.append(str(error))

    threads = [threading.Thread(target=run, args=(batch,)) for batch in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not failures, failures[0]


def test_how_the_kernel_is_compiled() -> None:
    options = cpu_attention._paged_decode_kernel.targetoptions
    assert options.get("nogil"), f"without nogil the server's other threads stand still during a step. {LOOK_CACHE}"
    assert not options.get("parallel"), f"Numba's own threads would compete with torch's for the cores. {LOOK_CACHE}"
    for name, item in vars(cpu_attention).items():
        if isinstance(item, Dispatcher):
            flags = item.targetoptions.get("fastmath", set())
            assert isinstance(flags, set) and not flags & {"fast", "nnan", "ninf"}, (
                f"{name} is compiled with fastmath={flags}, which lets LLVM assume that there is no NaN and no inf. "
                "Look at worker/cpu_attention.py::OPTIONS."
            )


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Imports the module anew from a directory of its own; `double` in it stands for a kernel that compiles quickly."""
    text = Path(cpu_attention.__file__).read_text(encoding="utf-8")
    text += "\n\n@_jit_cached\ndef double(number):\n    return 2 * number\n"
    (tmp_path / "cpu_attention.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setattr(numba.config, "CACHE_LOCATOR_CLASSES", "")

    def import_anew() -> Any:
        monkeypatch.delitem(sys.modules, "cpu_attention", raising=False)
        return importlib.import_module("cpu_attention")

    return import_anew


def test_the_import_compiles_nothing_and_what_is_compiled_stays_on_disk(alone: Callable[[], Any]) -> None:
    for which, from_disk in (("first", 0), ("second", 1)):
        module = alone()
        dispatchers = {name: item for name, item in vars(module).items() if isinstance(item, Dispatcher)}
        compiled = [name for name, dispatcher in dispatchers.items() if dispatcher.signatures]
        assert not compiled, f"the import compiled {compiled}: it must do nothing heavy. {LOOK_CACHE}"
        assert module.double(21) == 42
        hits = sum(module.double.stats.cache_hits.values())
        assert hits == from_disk, (
            f"first call after the {which} import: expected {from_disk} functions loaded from __pycache__, got {hits}. "
            f"{LOOK_CACHE}"
        )
    for name in ("double", "_paged_decode_kernel"):
        path = dispatchers[name].stats.cache_path
        assert path, f"{name} is compiled again in each process: expected a place on disk, got {path}. {LOOK_CACHE}"


def test_where_nothing_can_be_cached_it_compiles_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: Callable[[], Any]
) -> None:
    """As in a read-only installation with a read-only home: a file stands where each cache directory would be made."""
    for name in ("__pycache__", "home"):
        (tmp_path / name).write_text("not a directory")
    for name in ("HOME", "XDG_CACHE_HOME", "LOCALAPPDATA", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    try:
        module = alone()
    except RuntimeError as error:
        pytest.fail(f"no directory to cache in: expected an import without error, got: {error}. {LOOK_CACHE}")
    path = module._paged_decode_kernel.stats.cache_path
    assert not path, f"nothing can be written, and yet the kernel's cache is to be in {path}"
    got = module.double(21)
    assert got == 42, f"no directory to cache in: expected a function that works, 42, got {got}. {LOOK_CACHE}"


def test_warm_up_is_enough_for_all_shapes() -> None:
    """Else a request in the middle of serving waits seconds for a compiler."""
    kernel = cpu_attention._paged_decode_kernel
    for dtype in (torch.float32, torch.bfloat16):
        cpu_attention.warm_up(dtype)
        before = len(kernel.signatures)
        for lengths, head_dim in (([1], 8), ([7, 9], 1), ([], 16), ([3] * 5, 32)):
            make_batch(lengths, head_dim=head_dim, num_kv_heads=1, dtype=dtype, scale=1).decode()
        with torch.inference_mode():
            make_batch([2, 3], dtype=dtype).decode()
        assert len(kernel.signatures) == before, (
            f"{dtype}: expected {before} compiled kernels after warm_up, got {len(kernel.signatures)}. "
            "Look at worker/cpu_attention.py::warm_up."
        )


# The exponential


def test_exp() -> None:
    numbers = np.concatenate((np.linspace(-87, 0, 2001), -np.logspace(-8, 1, 100))).astype(np.float32)
    got = np.array([cpu_attention.exp(x) for x in numbers], dtype=np.float64)
    error = np.abs(got / np.exp(numbers.astype(np.float64)) - 1)
    worst = int(error.argmax())
    assert error[worst] < 5e-6, f"exp({numbers[worst]}): relative error {error[worst]:.1e}, expected less than 5e-6"


@pytest.mark.parametrize(("x", "expected"), [(0.0, 1.0), (-89.0, 0.0), (-1e30, 0.0), (-np.inf, 0.0), (np.nan, np.nan)])
def test_exp_at_the_edges(x: float, expected: float) -> None:
    got = cpu_attention.exp(np.float32(x))
    np.testing.assert_equal(got, expected, err_msg=f"exp({x}). Look at worker/cpu_attention.py::exp.")


# The reference


@group_sizes
def test_the_reference_equals_dense_attention(group_size: int) -> None:
    for block_size in (1, 4, 16):
        b = make_batch(LENGTHS, group_size, block_size=block_size)
        got = reference_decode(b.query, b.kv_cache, b.block_tables, b.context_lens, b.scale)
        check(b, got, f"the reference, block_size {block_size}", "Look at worker/attention.py::reference_decode.")
