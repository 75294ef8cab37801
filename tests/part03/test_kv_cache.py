"""worker/kv_cache.py: one pool for all layers, a token's key and value at its slot, and how many bytes that takes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.errors import FieldError
from part03_paged_attention.worker.kv_cache import CPU_KV_CACHE_BYTES, KVCache, kv_bytes_per_block, num_blocks_in
from part03_paged_attention.worker.model import head_dim

LOOK = 'Look at worker/kv_cache.py::KVCache; README "Attention through a table".'
LOOK_STORE = 'Look at worker/kv_cache.py::KVCache.store; README "Attention through a table".'
LOOK_BYTES = 'Look at worker/kv_cache.py::kv_bytes_per_block; README "Blocks".'
LOOK_BUDGET = 'Look at worker/kv_cache.py::num_blocks_in; README "Blocks".'


def shape(**changes: Any) -> SimpleNamespace:
    """A config with 3 layers, 6 query heads and 2 KV heads of 8 numbers each."""
    numbers = dict(num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, hidden_size=48)
    return SimpleNamespace(**{**numbers, **changes})


def make(num_blocks: int = 5, block_size: int = 4, dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache(shape(), num_blocks, block_size, dtype, "cpu")


def test_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory full of NaN, as torch.empty may give it at any time."""
    monkeypatch.setattr(torch, "empty", lambda shape, **how: torch.full(shape, torch.nan, **how))
    cache = make()
    for name, got, expected in (
        ("data", cache.data.shape, (3, 5, 4, 2, 2, 8)),
        ("layer(1)", cache.layer(1).shape, (5, 4, 2, 2, 8)),
        ("slots(1)", cache.slots(1).shape, (20, 2, 2, 8)),
    ):
        assert tuple(got) == expected, f"{name}: expected shape {expected}, got {tuple(got)}. {LOOK}"
    assert not cache.data[:, 0].any(), f"the null block is all zeros, in every layer. {LOOK}"
    assert make(dtype=torch.bfloat16).data.dtype == torch.bfloat16, f"the pool has the dtype asked for. {LOOK}"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm")
def test_a_new_pool_takes_no_memory_yet() -> None:
    """Of the default pool of 1 GiB only the null block is written; a page that nobody touches costs nothing."""

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before, num_blocks = resident_bytes(), CPU_KV_CACHE_BYTES // kv_bytes_per_block(shape(), 16, torch.float32)
    cache = make(num_blocks, block_size=16)
    grown = resident_bytes() - before
    assert cache.data.nbytes > 1_000_000_000, f"expected a pool of 1 GiB, got {cache.data.nbytes:,} bytes"
    assert grown < 50_000_000, f"a new pool of {cache.data.nbytes:,} bytes: {grown:,} bytes are in use already. {LOOK}"


def test_layers_and_slots_are_the_same_memory() -> None:
    cache = make()
    cache.data.zero_()
    cache.slots(1)[2 * 4 + 3] = 7.0
    assert (cache.layer(1)[2, 3] == 7).all(), f"slot 11 of layer 1 is block 2, offset 3. {LOOK}"
    assert cache.data.count_nonzero() == 2 * 2 * 8, f"one slot of one layer was written, and more changed. {LOOK}"


def test_store_writes_exactly_its_slots() -> None:
    torch.manual_seed(0)
    cache = make()
    cache.data.normal_()
    before = cache.data.clone()
    key, value = torch.randn(3, 2, 8), torch.randn(3, 2, 8)
    slots = [19, 4, 11]  # in no order, and not side by side
    cache.store(1, key, value, torch.tensor(slots))
    for row, slot in enumerate(slots):
        got = cache.layer(1)[slot // 4, slot % 4]
        where = f"token {row} with slot {slot} (block {slot // 4}, offset {slot % 4})"
        assert torch.equal(got[0], key[row]), f"{where}: its key is not there. {LOOK_STORE}"
        assert torch.equal(got[1], value[row]), f"{where}: its value is not there. {LOOK_STORE}"
    others = [slot for slot in range(20) if slot not in slots]
    assert torch.equal(cache.slots(1)[others], before[1].flatten(0, 1)[others]), (
        f"slots {slots} were to be written, and others changed. {LOOK_STORE}"
    )
    for layer in (0, 2):
        assert torch.equal(cache.layer(layer), before[layer]), (
            f"layer 1 was stored to, layer {layer} changed. {LOOK_STORE}"
        )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, 8), ({"head_dim": 16}, 16), ({"head_dim": None}, 8), ({"hidden_size": 96}, 16)],
    ids=str,
)
def test_head_dim(changes: dict[str, Any], expected: int) -> None:
    got = head_dim(shape(**changes))
    assert got == expected, f"{changes}: expected head_dim {expected}, got {got}. Look at worker/model.py::head_dim."


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 6}, {"head_dim": 16}], ids=str)
def test_bytes_of_a_block(block_size: int, dtype: torch.dtype, changes: dict[str, Any]) -> None:
    """The formula equals what a pool really takes."""
    got = kv_bytes_per_block(shape(**changes), block_size, dtype)
    pool = KVCache(shape(**changes), 3, block_size, dtype, "cpu").data
    expected = pool.numel() * pool.element_size() // 3
    assert got == expected, (
        f"{changes}, block_size={block_size}, {dtype}: a block takes {expected} bytes, got {got}: 2 (key and value) · "
        f"layers · KV heads · head_dim · block_size · bytes. {LOOK_BYTES}"
    )


def test_bytes_of_a_block_by_hand() -> None:
    got = kv_bytes_per_block(shape(), 16, torch.float32)
    assert got == 2 * 3 * 2 * 8 * 16 * 4 == 6_144, f"expected 6,144 bytes, got {got}. {LOOK_BYTES}"


@pytest.mark.parametrize(
    ("num_bytes", "expected"), [(2_000, 2), (2_999, 2), (3_000, 3), (1_000_000, 1_000), (123_456, 123)]
)  # fmt: skip
def test_num_blocks_in(num_bytes: int, expected: int) -> None:
    got = num_blocks_in(num_bytes, 1_000, "kv_cache_memory")
    assert got == expected, (
        f"blocks of 1,000 bytes in {num_bytes:,}: expected {expected} (whole ones), got {got}. {LOOK_BUDGET}"
    )


@pytest.mark.parametrize("num_bytes", [0, 999, 1_000, 1_999])
@pytest.mark.parametrize("field", ["kv_cache_memory", "gpu_memory_utilization"])
def test_a_budget_without_a_block_to_hand_out(num_bytes: int, field: str) -> None:
    """One block would be the null block alone."""
    with pytest.raises(FieldError) as caught:
        num_blocks_in(num_bytes, 1_000, field)
    message = str(caught.value)
    assert caught.value.field == field, f"expected the error to blame {field}, got {caught.value.field}. {LOOK_BUDGET}"
    for part in (f"{num_bytes:,}", f"{num_bytes // 1_000} blocks", "1,000 bytes", "expected at least 2"):
        assert part in message, f"{num_bytes} bytes: the message must say {part!r}, got {message!r}. {LOOK_BUDGET}"
