"""worker/kv_shard.py: tokens leave one pool of blocks and arrive in another one, whatever the two have in common."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.checkpoint import resolve_checkpoint
from part13_disaggregation.worker import kv_shard
from part13_disaggregation.worker.kv_shard import KVShard, convert, overlap
from part13_disaggregation.worker.parallel import Groups, ParallelGroup
from tests.contract.engines import SmallModels
from tests.part13.wires import (
    GUARD,
    HEAD_DIM,
    NUM_HEADS,
    NUM_LAYERS,
    check_guards,
    fill,
    held,
    make_shard,
    part_of,
    prompt_kv,
    slots_of,
)

LOOK_READ = 'Look at worker/kv_shard.py::KVShard.read, write and _slots; README "On the wire".'
LOOK_LAYOUT = 'Look at worker/kv_shard.py::make_shard; README "From engine to engine".'
LOOK_CONVERT = 'Look at worker/kv_shard.py::convert; README "On the wire".'
FROM, TO = [3, 1, 7, 2, 9, 4, 12, 6, 5, 10, 8], [11, 6, 2, 9, 13, 4, 1, 7, 3, 5, 8]


def send(source: KVShard, target: KVShard, positions: range, heads: range | None = None) -> None:
    """One piece for each layer that both have."""
    for layer in overlap(source.layers, target.layers):
        both = heads or overlap(source.heads, target.heads)
        target.write(layer, both, TO, positions, source.read(layer, both, FROM, positions), source.dtype)


@pytest.mark.parametrize("positions", [range(20), range(7, 20), range(4, 5), range(3, 17)])
@pytest.mark.parametrize("sizes", [(4, 4), (4, 8), (16, 2), (2, 16), (1, 4)])
def test_other_block_sizes(sizes: tuple[int, int], positions: range) -> None:
    """Position p is in block table[p // block_size] on either side, at offset p % block_size."""
    source, target = (make_shard(block_size=size, num_blocks=40) for size in sizes)
    tables = [list(range(30, 30 - 20 // size - 1, -1)) for size in sizes]
    kv = prompt_kv()
    fill(source, tables[0], kv)
    for layer in range(NUM_LAYERS):
        data = source.read(layer, range(NUM_HEADS), tables[0], positions)
        target.write(layer, range(NUM_HEADS), tables[1], positions, data, source.dtype)
    got, expected = held(target, tables[1], 20)[:, positions], kv[:, positions]
    wrong = [p for index, p in enumerate(positions) if not torch.equal(got[:, index], expected[:, index])]
    assert not wrong, f"block sizes {sizes}: the tokens at positions {wrong} of {positions} are others. {LOOK_READ}"
    slots = slots_of(target, tables[1], 20)
    check_guards(target, {slots[position] for position in positions}, LOOK_READ)


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_equal_dtypes_keep_every_bit(name: str) -> None:
    """Any pattern of bits, also those that are no numbers."""
    dtype = getattr(torch, name)
    integers = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    source, target = make_shard(dtype=dtype), make_shard(dtype=dtype)
    bits = source.cache.data.view(integers)
    bits.copy_(torch.randint(-(2**15), 2**15, bits.shape, generator=torch.Generator().manual_seed(1)))
    send(source, target, range(20))
    got = target.cache.data.flatten(1, 2)[:, slots_of(target, TO, 20)].view(integers)
    assert torch.equal(got, source.cache.data.flatten(1, 2)[:, slots_of(source, FROM, 20)].view(integers)), (
        f"{name} to {name}: bits have changed on the way, and nothing had to be converted. {LOOK_READ}"
    )


@pytest.mark.parametrize(
    "dtypes", [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "float32"), ("bfloat16", "float16")]
)
def test_other_dtypes_are_converted(dtypes: tuple[str, str]) -> None:
    """By value, as torch rounds; the bytes of one read as the other would be garbage."""
    sent, stored = getattr(torch, dtypes[0]), getattr(torch, dtypes[1])
    source, target = make_shard(dtype=sent), make_shard(dtype=stored)
    source.cache.data.copy_(torch.randn(source.cache.data.shape, generator=torch.Generator().manual_seed(2)))
    expected = source.cache.data.flatten(1, 2)[:, slots_of(source, FROM, 20)].to(stored)
    send(source, target, range(20))
    got = target.cache.data.flatten(1, 2)[:, slots_of(target, TO, 20)]
    assert torch.equal(got, expected), (
        f"{dtypes[0]} to {dtypes[1]}: got other values than torch's .to(). {LOOK_CONVERT}"
    )
    check_guards(target, set(slots_of(target, TO, 20)), LOOK_READ)


@pytest.mark.parametrize("stored", [range(4), range(2, 4), range(1, 3)])
@pytest.mark.parametrize("heads", [range(2, 4), range(2, 3)])
def test_only_the_heads_that_were_asked_for(stored: range, heads: range) -> None:
    """Heads are numbered as in the whole model; each rank has a range of them, and its pool begins at 0."""
    both = overlap(heads, stored)
    source, target, kv = make_shard(), make_shard(heads=stored), prompt_kv()
    fill(source, FROM, kv)
    send(source, target, range(20), both)
    pool = target.cache.data.flatten(1, 2)[:, slots_of(target, TO, 20)]
    for index, head in enumerate(stored):
        expected = kv[:, :, :, head] if head in both else torch.full_like(kv[:, :, :, head], GUARD)
        assert torch.equal(pool[:, :, :, index], expected), (
            f"a rank with heads {stored} gets heads {both}: head {head}, at {index} in its pool, is wrong. {LOOK_READ}"
        )


def test_only_the_layers_that_a_stage_has() -> None:
    """The second of two stages has layers 2 and 3, at 0 and 1 in its pool."""
    source, target, kv = make_shard(), make_shard(layers=range(2, 4)), prompt_kv()
    fill(source, FROM, kv)
    send(source, target, range(20))
    assert torch.equal(held(target, TO, 20), part_of(target, kv)), f"layers 2 and 3 are others. {LOOK_READ}"
    back = make_shard()
    for layer in (2, 3):
        back.write(layer, range(4), FROM, range(20), target.read(layer, range(4), TO, range(20)), torch.float32)
    expected = kv.clone()
    expected[:2] = GUARD
    assert torch.equal(held(back, FROM, 20), expected), f"and back: layers 0 and 1 stay as they are. {LOOK_READ}"


def test_what_is_read_is_a_copy() -> None:
    """A piece waits in a socket while the model goes on, and the block may have another owner by then."""
    source, kv = make_shard(), prompt_kv()
    fill(source, FROM, kv)
    data = bytes(read := source.read(0, range(4), FROM, range(20)))
    source.cache.data.fill_(1.0)
    assert bytes(read) == data, f"the bytes of a piece changed when the pool did. {LOOK_READ}"
    assert isinstance(read, memoryview) and read.contiguous and read.format == "B", f"{read}. {LOOK_READ}"


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_bytes_per_token(name: str) -> None:
    """A key and a value for each head, in one layer."""
    dtype = getattr(torch, name)
    shard = make_shard(dtype=dtype)
    for num_heads in (1, 3, 4):
        expected, got = 2 * num_heads * HEAD_DIM * dtype.itemsize, shard.bytes_per_token(num_heads)
        assert got == expected, (
            f"{num_heads} heads of {HEAD_DIM} {name}: expected {expected} bytes, got {got}. {LOOK_READ}"
        )
        num_bytes = shard.read(1, range(num_heads), FROM, range(5)).nbytes
        assert num_bytes == 5 * expected, f"5 tokens have {num_bytes} bytes, expected {5 * expected}. {LOOK_READ}"


def test_a_piece_of_another_size_is_not_written() -> None:
    """A piece that says 20 tokens and has the bytes of 19."""
    source, target = make_shard(), make_shard()
    data = source.read(0, range(4), FROM, range(19))
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises((ValueError, RuntimeError)):
            target.write(0, range(4), TO, range(20), data, dtype)
    check_guards(target, set(), LOOK_READ)


def test_convert_in_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """More elements at once would wake torch's threads, and the model needs the cores."""
    sizes, to = list[int](), torch.Tensor.to

    def noted(tensor: torch.Tensor, *args: Any) -> torch.Tensor:
        sizes.append(tensor.numel())
        return to(tensor, *args)

    values = torch.randn(3 * kv_shard.CONVERTED_AT_ONCE + 5)
    expected = values.to(torch.bfloat16)
    monkeypatch.setattr(torch.Tensor, "to", noted)
    got = convert(values, torch.bfloat16)
    monkeypatch.undo()
    assert torch.equal(got, expected), f"other values than torch's .to(). {LOOK_CONVERT}"
    assert max(sizes) <= kv_shard.CONVERTED_AT_ONCE, f"{max(sizes)} elements were converted at once. {LOOK_CONVERT}"
    assert convert(values, torch.float32) is values, f"nothing to convert, nothing to copy. {LOOK_CONVERT}"


def test_big_values_become_infinite_as_torch_makes_them() -> None:
    """float16 ends at 65,504, so a model of float32 or bfloat16 may have more than it holds."""
    values = torch.tensor([70_000.0, -70_000.0, 65_504.0, 1e-8, float("inf"), float("nan")])
    got = convert(values, torch.float16)
    assert torch.equal(got[:5], values[:5].to(torch.float16)) and got[5].isnan(), f"{got}. {LOOK_CONVERT}"
    wide = torch.tensor([3e38, -1e-30])
    assert torch.equal(convert(wide, torch.bfloat16), wide.to(torch.bfloat16)), f"bfloat16 holds them. {LOOK_CONVERT}"


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (range(0, 4), range(2, 6), range(2, 4)), (range(2, 6), range(0, 4), range(2, 4)),
        (range(0, 8), range(3, 5), range(3, 5)), (range(0, 2), range(2, 4), range(0)),
        (range(6, 8), range(0, 3), range(0)),
        (range(1, 4), range(1, 4), range(1, 4)), (range(0), range(0, 4), range(0)),
    ],
)  # fmt: skip
def test_overlap(a: range, b: range, expected: range) -> None:
    got = overlap(a, b)
    assert list(got) == list(expected) and got.start >= max(a.start, b.start), (
        f"{a} and {b}: expected {expected}, got {got}. "
        'Look at worker/kv_shard.py::overlap; README "From engine to engine".'
    )


def test_another_model_has_another_layout(tmp_path: Path) -> None:
    """KV of other weights is garbage, and nothing in it shows that. One bit of one weight is enough."""
    models = SmallModels(tmp_path)
    checkpoint = resolve_checkpoint(models.target)
    cache: Any = SimpleNamespace(data=torch.empty(1, 1, 1, 2, 1, 8))
    first = kv_shard.make_shard(cache, checkpoint, Groups(), 8)
    again = kv_shard.make_shard(cache, resolve_checkpoint(models.target), Groups(), 8)
    assert first.layout == again.layout, f"the same files: {first.layout} and {again.layout}. {LOOK_LAYOUT}"
    config = checkpoint.config
    assert first.layers == range(config.num_hidden_layers), f"{first.layers}. {LOOK_LAYOUT}"
    assert first.heads == range(config.num_key_value_heads), f"{first.heads}. {LOOK_LAYOUT}"
    assert kv_shard.make_shard(cache, checkpoint, Groups(), 4).layout != first.layout, (
        f"another head_dim, and the same layout. {LOOK_LAYOUT}"
    )
    other = kv_shard.make_shard(cache, resolve_checkpoint("tiny"), Groups(), 8)
    assert other.layout != first.layout, f"another model has the same layout. {LOOK_LAYOUT}"
    flip_a_weight(Path(models.target))
    changed = kv_shard.make_shard(cache, resolve_checkpoint(models.target), Groups(), 8)
    assert changed.layout != first.layout, f"other weights of the same shapes have the same layout. {LOOK_LAYOUT}"


@pytest.mark.parametrize(
    ("rank", "size", "num_heads", "expected"), [(1, 2, 4, range(2, 4)), (3, 4, 2, range(1, 2)), (2, 4, 2, range(1, 2))]
)
def test_the_heads_of_a_rank(rank: int, size: int, num_heads: int, expected: range) -> None:
    """Ranks have equal shares of the KV heads; if there are fewer heads than ranks, several have the same one."""
    checkpoint: Any = resolve_checkpoint("tiny")
    shard = make_part(checkpoint, Groups(ParallelGroup(rank, size)), num_heads)
    assert shard.heads == expected, f"rank {rank} of {size}, {num_heads} KV heads: {shard.heads}. {LOOK_LAYOUT}"
    whole = make_part(checkpoint, Groups(), num_heads)
    assert shard.layout == whole.layout, f"the number of ranks changes the layout, and not the KV. {LOOK_LAYOUT}"
    source = shard.source("tcp://here:1")
    got = (source.address, source.layout, source.first_layer, source.num_layers, source.first_head, source.num_heads)
    assert got == ("tcp://here:1", shard.layout, 0, len(shard.layers), expected.start, len(expected)), (
        f"what other engines are told: {got}. {LOOK_LAYOUT}"
    )


def make_part(checkpoint: Any, groups: Groups, num_heads: int) -> KVShard:
    """Of a model with so many KV heads."""
    config = checkpoint.config
    other = dataclasses.replace(config, num_key_value_heads=num_heads)
    cache: Any = SimpleNamespace(data=torch.empty(1, 1, 1, 2, 1, 8))
    return kv_shard.make_shard(cache, dataclasses.replace(checkpoint, config=other), groups, 8)


def flip_a_weight(directory: Path) -> None:
    [path] = directory.glob("*.safetensors")
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name].clone()
    tensors[name].flatten()[0] += 1.0
    save_file(tensors, path, metadata={"format": "pt"})
