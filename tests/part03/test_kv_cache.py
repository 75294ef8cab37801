"""worker/kv_cache.py: one pool for all layers, a token's key and value in its slot, and how many bytes that takes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from part03_paged_attention.worker.kv_cache import (
    CPU_KV_CACHE_BYTES,
    KVCache,
    kv_bytes_per_block,
    slot_mapping,
)
from part03_paged_attention.worker.model import head_dim

LOOK = 'Look at worker/kv_cache.py::KVCache; README "Attention through a table".'
LOOK_STORE = 'Look at worker/kv_cache.py::KVCache.store; README "Attention through a table".'
LOOK_SLOTS = 'Look at worker/kv_cache.py::slot_mapping; README "Attention through a table".'
LOOK_BYTES = 'Look at worker/kv_cache.py::kv_bytes_per_block; README "Blocks".'


def model(**changes: Any) -> Any:
    """What a KV cache has to know about a model: 3 layers, 2 KV heads of 8 numbers each, float32."""
    return SimpleNamespace(
        **{"num_layers": 3, "num_kv_heads": 2, "head_dim": 8, "dtype": torch.float32, "device": "cpu", **changes}
    )


def make(num_blocks: int = 5, block_size: int = 4, **changes: Any) -> KVCache:
    return KVCache(model(**changes), num_blocks, block_size)


def test_shapes() -> None:
    cache = make()
    for name, got, expected in (
        ("data", cache.data.shape, (3, 5, 4, 2, 2, 8)),
        ("layer(1)", cache.layer(1).shape, (5, 4, 2, 2, 8)),
    ):
        assert tuple(got) == expected, f"{name}: expected shape {expected}, got {tuple(got)}. {LOOK}"
    assert (cache.num_blocks, cache.block_size) == (5, 4), f"got {cache.num_blocks}, {cache.block_size}. {LOOK}"
    assert make(dtype=torch.bfloat16).data.dtype == torch.bfloat16, f"the pool has the model's dtype. {LOOK}"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm")
def test_a_new_pool_takes_no_memory_yet() -> None:
    """The default pool is 1 GiB; a page that is never touched costs nothing."""

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before, num_blocks = resident_bytes(), CPU_KV_CACHE_BYTES // kv_bytes_per_block(model(), 16)
    cache = make(num_blocks, block_size=16)
    grown = resident_bytes() - before
    assert cache.data.nbytes > 1_000_000_000, f"expected a pool of 1 GiB, got {cache.data.nbytes:,} bytes"
    assert grown < 50_000_000, f"a new pool of {cache.data.nbytes:,} bytes: {grown:,} bytes are in use already. {LOOK}"


def test_a_layer_is_a_view_of_the_pool() -> None:
    cache = make()
    cache.data.zero_()
    cache.layer(1)[2, 3] = 7.0
    assert (cache.data[1, 2, 3] == 7).all(), f"block 2, offset 3 of layer 1 was written, and the pool differs. {LOOK}"
    assert cache.data.count_nonzero() == 2 * 2 * 8, f"one slot of one layer was written, and more changed. {LOOK}"


@pytest.mark.parametrize("slots", [[19, 4, 11], [7], [0, 3]], ids=["shuffled", "one", "null block"])
def test_store_writes_exactly_its_slots(slots: list[int]) -> None:
    """The slots are in no order and not adjacent. Those of the null block can be written like any other."""
    torch.manual_seed(0)
    cache = make()
    cache.data.normal_()
    before = cache.data.clone()
    key, value = torch.randn(len(slots), 2, 8), torch.randn(len(slots), 2, 8)
    cache.store(1, key, value, torch.tensor(slots))
    for row, slot in enumerate(slots):
        got = cache.layer(1)[slot // 4, slot % 4]
        where = f"token {row} with slot {slot} (block {slot // 4}, offset {slot % 4})"
        assert torch.equal(got[0], key[row]), f"{where}: its key is not there. {LOOK_STORE}"
        assert torch.equal(got[1], value[row]), f"{where}: its value is not there. {LOOK_STORE}"
    others = [slot for slot in range(20) if slot not in slots]
    assert torch.equal(cache.layer(1).flatten(0, 1)[others], before[1].flatten(0, 1)[others]), (
        f"slots {slots} were to be written, and others changed. {LOOK_STORE}"
    )
    for layer in (0, 2):
        assert torch.equal(cache.layer(layer), before[layer]), (
            f"layer 1 was stored to, layer {layer} changed. {LOOK_STORE}"
        )


# Slots

TABLES = [[2, 4, 5], [7, 1, 3]]


@pytest.mark.parametrize(("position", "expected"), [(35, 51), (15, 127), (16, 16), (0, 112), (31, 31), (32, 48)])
def test_the_slot_of_one_token(position: int, expected: int) -> None:
    got = slot_mapping(torch.tensor(TABLES), torch.tensor([1]), torch.tensor([position]), 16).tolist()
    block = TABLES[1][position // 16]
    assert got == [expected], (
        f"position {position} with block table {TABLES[1]} (block_size=16): expected slot {expected} (block {block}, "
        f"offset {position % 16}), got {got}. {LOOK_SLOTS}"
    )


def test_the_slots_of_a_flattened_batch() -> None:
    """Each token looks into its own row's table; rows come in any order and as often as they have tokens."""
    rows, positions = [1, 1, 1, 0, 1, 0], [30, 31, 32, 0, 2, 47]
    expected = [30, 31, 48, 32, 114, 95]
    got = slot_mapping(torch.tensor(TABLES), torch.tensor(rows), torch.tensor(positions), 16)
    assert got.tolist() == expected, (
        f"tables {TABLES} (block_size=16), rows {rows}, positions {positions}: expected slots {expected}, got "
        f"{got.tolist()}. {LOOK_SLOTS}"
    )


def test_slots_with_other_block_sizes() -> None:
    for block_size, expected in ((1, [3, 1, 2]), (2, [6, 7, 2, 3]), (4, [12, 13, 14, 15, 4, 5])):
        positions = torch.arange(len(expected))
        got = slot_mapping(torch.tensor([[3, 1, 2]]), torch.zeros_like(positions), positions, block_size).tolist()
        assert got == expected, (
            f"table [3, 1, 2], block_size={block_size}: expected slots {expected} for positions 0 to "
            f"{len(expected) - 1}, got {got}. {LOOK_SLOTS}"
        )


def test_slots_are_64_bit() -> None:
    """Block tables are int32, and block · block_size can exceed 2³¹."""
    tables = torch.tensor([[2**27 + 1]], dtype=torch.int32)
    got = slot_mapping(tables, torch.tensor([0, 0]), torch.tensor([0, 2]), 16)
    expected = [2**31 + 16, 2**31 + 18]
    assert got.dtype == torch.int64, f"expected int64, got {got.dtype}. {LOOK_SLOTS}"
    assert got.tolist() == expected, (
        f"block 2²⁷ + 1 with block_size=16: expected slots {expected}, got {got.tolist()}; block · block_size must not "
        f"be computed in int32. {LOOK_SLOTS}"
    )


def test_every_position_of_every_request_has_a_slot_of_its_own() -> None:
    tables, positions = torch.tensor([[5, 1, 6], [2, 4, 3]], dtype=torch.int32), torch.arange(9).repeat(2)
    slots = slot_mapping(tables, torch.arange(2).repeat_interleave(9), positions, 4).tolist()
    assert len(set(slots)) == 18, f"two of 18 positions share a slot: {sorted(slots)}. {LOOK_SLOTS}"
    in_null_block = [slot for slot in slots if slot < 4]
    assert not in_null_block, f"slots {in_null_block} belong to the null block. {LOOK_SLOTS}"


# Sizes


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, 8), ({"head_dim": 16}, 16), ({"head_dim": None}, 8), ({"hidden_size": 96}, 16)],
    ids=str,
)
def test_head_dim(changes: dict[str, Any], expected: int) -> None:
    config = SimpleNamespace(**{"num_attention_heads": 6, "hidden_size": 48, **changes})
    got = head_dim(config)
    assert got == expected, f"{changes}: expected head_dim {expected}, got {got}. Look at worker/model.py::head_dim."


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 6}, {"head_dim": 16}, {"num_layers": 1}], ids=str)
def test_bytes_of_a_block(block_size: int, dtype: torch.dtype, changes: dict[str, Any]) -> None:
    """The formula equals what a pool really takes."""
    got = kv_bytes_per_block(model(dtype=dtype, **changes), block_size)
    expected = make(3, block_size, dtype=dtype, **changes).data.nbytes // 3
    assert got == expected, (
        f"{changes}, block_size={block_size}, {dtype}: a block takes {expected} bytes, got {got}: 2 (key and value) · "
        f"layers · KV heads · head_dim · block_size · bytes. {LOOK_BYTES}"
    )


def test_bytes_of_a_block_by_hand() -> None:
    got = kv_bytes_per_block(model(), 16)
    assert got == 2 * 3 * 2 * 8 * 16 * 4 == 6_144, f"expected 6,144 bytes, got {got}. {LOOK_BYTES}"
