"""worker/block_copier.py: real copies, in the right order, and an answer in any case."""

from __future__ import annotations

import queue
import threading
from typing import Any

import pytest
import torch

from part12_cpu_offloading.messages import Load, LookUp, Save, TransferDone
from part12_cpu_offloading.worker.block_copier import BlockCopier, KVBlocks
from part12_cpu_offloading.worker.kv_tiers import KVTiers
from part12_cpu_offloading.worker.stream import CudaStream, ThreadStream
from tests.part12.test_tiers import DictTier

LOOK = 'Look at worker/block_copier.py::BlockCopier; README "A copy holds a lease".'
TIMEOUT_S = 30


class Gate:
    """A mark that is reached when the test says so."""

    def __init__(self) -> None:
        self.reached = threading.Event()

    def wait(self) -> None:
        assert self.reached.wait(TIMEOUT_S)


class Setup:
    """Two pools with random contents: of a model of 3 layers, and of a draft model of 2 layers in another dtype."""

    def __init__(self, *tiers: Any) -> None:
        generator = torch.Generator().manual_seed(1)
        self.pools = [
            torch.rand(3, 8, 4, 2, 2, 6, generator=generator),
            torch.rand(2, 8, 4, 2, 1, 4, generator=generator).bfloat16(),
        ]
        self.before = [pool.clone() for pool in self.pools]
        self.done: queue.Queue[TransferDone] = queue.Queue()
        self.gate = Gate()
        self.gate.reached.set()
        num_bytes = KVBlocks(self.pools).bytes_per_block
        self.tiers = KVTiers(tiers, "test", num_bytes)
        self.copier = BlockCopier(self.pools, 6, self.tiers, lambda: self.gate, self.done.put)

    def do(self, transfer: Any) -> TransferDone:
        self.copier.start(transfer)
        return self.done.get(timeout=TIMEOUT_S)

    def clear(self) -> None:
        for pool in self.pools:
            pool.zero_()

    def check(self, block_id: int, origin: int) -> None:
        for pool, before in zip(self.pools, self.before, strict=True):
            assert torch.equal(pool[:, block_id], before[:, origin]), (
                f"block {block_id} should hold what block {origin} held, in all layers of both pools. {LOOK}"
            )


def test_blocks_come_back_bit_by_bit() -> None:
    setup = Setup()
    assert setup.do(Save(1, [b"a", b"b"], [2, 5], [4, 0])).num_blocks == 2
    setup.clear()
    done = setup.do(Load(2, [b"b", b"a"], [7, 1], [0, 4]))
    assert (done.transfer_id, done.num_blocks) == (2, 2) and done.host_s > 0 == done.tier_s, f"{done}. {LOOK}"
    setup.check(7, origin=5)
    setup.check(1, origin=2)
    assert not setup.pools[0][:, 2].any(), f"no other block was written. {LOOK}"


@pytest.mark.parametrize("order", [Save(1, [b"a"], [2], [0]), Load(1, [b"a"], [2], [0])], ids=["save", "load"])
def test_a_copy_waits_for_the_steps_before_it(order: Any) -> None:
    setup = Setup()
    setup.do(Save(9, [b"z"], [5], [0]))
    setup.gate = Gate()
    setup.copier.start(order)
    with pytest.raises(queue.Empty):
        setup.done.get(timeout=0.05)
    assert torch.equal(setup.pools[0][:, 2], setup.before[0][:, 2]), f"block 2 may still be written. {LOOK}"
    setup.pools[0][:, 2] = 7.0  # the step before writes it
    setup.gate.reached.set()
    setup.done.get(timeout=TIMEOUT_S)
    if isinstance(order, Save):
        setup.do(Load(3, [b"a"], [3], [0]))
        assert (setup.pools[0][:, 3] == 7.0).all(), f"what was saved is what the step wrote. {LOOK}"
    else:
        setup.check(2, origin=5)


def test_loads_do_not_wait_for_saves() -> None:
    setup, gate = Setup(), Gate()
    setup.do(Save(1, [b"a"], [2], [0]))
    setup.gate = gate
    setup.copier.start(Save(2, [b"b"], [3], [1]))  # waits for a long step
    setup.gate = Gate()
    setup.gate.reached.set()
    assert setup.do(Load(3, [b"a"], [4], [0])).transfer_id == 3, LOOK
    gate.reached.set()
    assert setup.done.get(timeout=TIMEOUT_S).transfer_id == 2, LOOK


def test_a_prefix_from_host_memory_and_tiers() -> None:
    tier = DictTier("tier")
    setup = Setup(tier)
    setup.do(Save(1, [b"a", b"b", b"c"], [1, 2, 3], [0, 1, 2]))
    setup.copier.flush()
    assert len(tier.data) == 3, f"what is saved goes on to the tiers. {LOOK}"
    assert setup.do(LookUp(2, [b"a", b"c", b"x"])).num_blocks == 2
    setup.clear()
    done = setup.do(Load(3, [b"a", b"b", b"c"], [5, 6, 7], [0, None, 2]))
    assert done.num_blocks == 3 and done.tier_s > 0, f"{done}. {LOOK}"
    for block_id, origin in ((5, 1), (6, 2), (7, 3)):
        setup.check(block_id, origin)


def test_a_load_ends_at_the_first_gap() -> None:
    tier = DictTier("tier")
    setup = Setup(tier)
    setup.do(Save(1, [b"a", b"b", b"c"], [1, 2, 3], [0, 1, 2]))
    setup.copier.flush()
    tier.data["test-62"] = b"poison" + tier.data["test-62"][6:]
    setup.clear()
    done = setup.do(Load(3, [b"a", b"b", b"c"], [5, 6, 7], [None, None, 2]))
    assert done.num_blocks == 1, f"block b is damaged, so only a is there: got {done}. {LOOK}"
    setup.check(5, origin=1)
    assert not setup.pools[0][:, 6].any(), f"a damaged block must not reach the device. {LOOK}"


@pytest.mark.parametrize("order", [Save(1, [b"a"], [99], [0]), Load(1, [b"a"], [1], [99]), LookUp(1, [b"a"])])
def test_whatever_goes_wrong_is_answered(order: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    setup = Setup()

    def fail(*_: object) -> int:
        raise RuntimeError("the cat sat on it")

    monkeypatch.setattr(setup.tiers, "lookup", fail)
    assert setup.do(order) == TransferDone(1, 0), f"core waits for an answer. {LOOK}"
    assert len(caplog.records) == 1, caplog.messages
    assert setup.do(Save(2, [b"b"], [1], [1])).num_blocks == 1, f"and the next one is done. {LOOK}"


def test_a_slow_tier_is_not_given_more_than_it_can_take(monkeypatch: pytest.MonkeyPatch) -> None:
    tier, gate, is_writing = DictTier("tier"), threading.Event(), threading.Event()
    setup = Setup(tier)
    setup.copier.max_pending_writes = 3
    write = setup.tiers.write
    monkeypatch.setattr(setup.tiers, "write", lambda *each: is_writing.set() or gate.wait(TIMEOUT_S) and write(*each))
    setup.do(Save(99, [b"first"], [1], [0]))
    assert is_writing.wait(TIMEOUT_S)  # the tier has one block in its hands
    for number in range(20):
        assert setup.do(Save(number, [bytes([number])], [1], [0])).num_blocks == 1, f"no save waits for it. {LOOK}"
    gate.set()
    setup.copier.flush()
    assert len(tier.data) == 4, f"expected 3 more blocks to be kept for it, got {len(tier.data) - 1}. {LOOK}"


@pytest.mark.parametrize("count", [15, 16, 17, 40])
def test_long_prefixes_come_in_batches(count: int) -> None:
    """Every second block is in host memory."""
    tier = DictTier("tier")
    setup = Setup(tier)
    names = [bytes([number]) for number in range(count)]
    for number, name in enumerate(names):
        setup.do(Save(number, [name], [1 + number % 7], [number % 6]))
    setup.copier.flush()
    setup.do(Save(99, [b"x"], [5], [0]))
    setup.clear()
    slots = [0 if number % 2 else None for number in range(count)]
    done = setup.do(Load(100, names, [1 + number % 7 for number in range(count)], slots))
    assert done.num_blocks == count, f"{done}. {LOOK}"
    assert tier.calls.count("read") == -(-count // 16), f"expected a read for each 16 blocks: {tier.calls}. {LOOK}"


def test_a_mark_in_the_stream_of_steps() -> None:
    stream, gate, order = ThreadStream(), threading.Event(), list[str]()
    stream._thread.submit(lambda: (gate.wait(TIMEOUT_S), order.append("step")))
    mark = stream.mark()
    waiting = threading.Thread(target=lambda: (mark.wait(), order.append("copy")))
    waiting.start()
    gate.set()
    waiting.join(TIMEOUT_S)
    assert order == ["step", "copy"], "Look at worker/stream.py::ThreadStream.mark."


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: streams, events and pinned memory")
def test_copies_on_a_gpu_wait_for_the_stream_of_steps() -> None:
    """A long kernel writes a block, and another one reads what was loaded."""
    pool, stream, done = torch.zeros(2, 4, 8, device="cuda"), CudaStream("cuda"), queue.Queue[TransferDone]()
    num_bytes = KVBlocks([pool]).bytes_per_block
    copier = BlockCopier([pool], 4, KVTiers([], "", num_bytes), stream.mark, done.put)
    torch.cuda._sleep(200_000_000)  # about 0.1 s
    pool[:, 1] = 7.0
    copier.start(Save(1, [b"a"], [1], [0]))
    assert done.get(timeout=TIMEOUT_S).num_blocks == 1
    assert (copier.host[0].view(torch.float32) == 7.0).all(), f"the copy has not waited for the step before it. {LOOK}"
    torch.cuda._sleep(200_000_000)
    pool[:, 2] = 5.0  # the last owner's step
    copier.start(Load(2, [b"a"], [2], [0]))
    assert done.get(timeout=TIMEOUT_S).num_blocks == 1
    assert (pool[:, 2] == 7.0).all(), f"a step before the load has overwritten it. {LOOK}"
    copier.close()
