"""core/offload.py: what is saved and loaded, who waits for what, and when computing is faster."""

from __future__ import annotations

from typing import Any

import pytest

from common.sampling_params import SamplingParams
from part12_cpu_offloading.core import offload
from part12_cpu_offloading.core.block_manager import BlockManager
from part12_cpu_offloading.core.cost_model import RISE
from part12_cpu_offloading.core.offload import Offloader
from part12_cpu_offloading.core.request import Request
from part12_cpu_offloading.messages import Load, LookUp, Save, TransferDone
from tests.part12.scripted import scripted_engine
from tests.scripted import answer_alone, executor_of, params_for

LOOK_LEASE = 'Look at core/offload.py::Offloader.save, load and note_done; README "A copy holds a lease".'
LOOK_FIND = 'Look at core/offload.py::Offloader.find; README "What a waiting request does".'
BLOCK_SIZE = 4


class World:
    """A block manager and an offloader without an engine. done() is the worker's answer to all orders."""

    def __init__(self, num_slots: int = 20, has_tiers: bool = False, num_blocks: int = 41) -> None:
        self.blocks = BlockManager(num_blocks, BLOCK_SIZE)
        self.offloader = Offloader(self.blocks, num_slots, has_tiers)
        self.orders: list[Any] = []

    def request(self, name: str, num_tokens: int, first: int = 0) -> Request:
        return Request(name, [first + n for n in range(num_tokens)], SamplingParams(max_tokens=1), num_tokens + 1)

    def compute(self, request: Request) -> None:
        """A step that computes all of it, and succeeds."""
        cached = self.blocks.find_cached(request)
        assert self.blocks.admit(request.request_id, request.num_tokens, cached)
        self.offloader.save(request, self.blocks.cache_full_blocks(request, request.num_tokens))
        self.offloader.note_launch()
        self.offloader.note_result()

    def take(self) -> list[Any]:
        """The orders since the last call."""
        new = list(self.offloader.new_transfers)
        self.offloader.new_transfers.clear()
        self.orders += new
        return new

    def done(self, num_blocks: int | None = None, host_s: float = 0.0, tier_s: float = 0.0) -> None:
        self.take()
        while self.orders:
            order = self.orders.pop(0)
            count = len(order.hashes) if num_blocks is None else num_blocks
            self.offloader.note_done(TransferDone(order.transfer_id, count, host_s, tier_s))

    def forget_device(self, *names: str) -> None:
        for name in names:
            self.blocks.free(name)
        self.blocks.reset()

    def find(self, request: Request) -> int | None:
        return self.offloader.find(request, len(self.blocks.find_cached(request)))

    def load(self, request: Request, num_blocks: int) -> Load:
        cached = self.blocks.find_cached(request)
        assert self.blocks.admit(request.request_id, request.num_tokens, cached)
        self.offloader.load(request, len(cached), num_blocks)
        [load] = self.take()
        assert isinstance(load, Load)
        return load


# Saving


def test_blocks_are_saved_once_their_step_has_succeeded() -> None:
    world, request = World(), World().request("a", 10)
    world.blocks.admit("a", 10)
    world.offloader.save(request, world.blocks.cache_full_blocks(request, 10))
    world.offloader.note_launch()
    assert not world.take(), f"the step is in flight: nothing to copy yet. {LOOK_LEASE}"
    world.offloader.note_result()
    [save] = world.take()
    assert isinstance(save, Save) and save.block_ids == world.blocks.block_tables["a"][:2], LOOK_LEASE
    assert save.hashes == request.block_hashes[:2] and save.slots == [0, 1], LOOK_LEASE


def test_a_block_that_is_being_saved_is_not_free() -> None:
    world = World()
    world.compute(world.request("a", 8))
    world.blocks.free("a")
    assert world.blocks.num_free_blocks == 38 and world.offloader.has_leaving_blocks, (
        f"blocks 1 and 2 are in no table, and a copy reads them; free are {world.blocks.num_free_blocks} of 40. "
        f"{LOOK_LEASE}"
    )
    world.done()
    assert world.blocks.num_free_blocks == 40 and not world.offloader.has_leaving_blocks, LOOK_LEASE


def test_what_is_saved_is_not_saved_again() -> None:
    world = World()
    for name in ("a", "b"):
        world.compute(world.request(name, 8))
        assert len(world.take()) == (name == "a"), f"b has the same blocks as a. {LOOK_LEASE}"


def test_only_what_host_memory_lacks_is_saved() -> None:
    world, request = World(), World().request("a", 12)
    world.blocks.admit("a", 12)
    full = world.blocks.cache_full_blocks(request, 12)
    world.offloader.host.prepare_store(request.block_hashes[:2])
    world.offloader.host.complete_store(request.block_hashes[:2])
    world.offloader.save(request, full)
    world.offloader.note_launch()
    world.offloader.note_result()
    [save] = world.take()
    assert isinstance(save, Save)
    got, table = (save.hashes, save.block_ids, save.slots), world.blocks.block_tables["a"]
    assert got == (request.block_hashes[2:], table[2:], [2]), (
        f"host memory has the first two of three blocks: expected the third, block {table[2]}, in slot 2; got blocks "
        f"{save.block_ids} in slots {save.slots}. {LOOK_LEASE}"
    )


def test_the_end_of_a_prefix_leaves_host_memory_first() -> None:
    """A device with room for all, a host with six slots: Ada's four blocks, then Ben's four."""
    world, ada = World(num_slots=6), World().request("ada", 16)
    world.compute(ada)
    world.done()
    world.compute(world.request("ben", 16, first=100))
    world.done()
    left = [world.offloader.host.is_ready(each) for each in ada.block_hashes]
    assert left == [True, True, False, False], (
        f"without its beginning, a prefix can't be used: of Ada's four blocks, the first two should stay, got {left}. "
        'Look at core/offload.py::Offloader.save and core/host_blocks.py::HostBlocks.touch; README "Host memory".'
    )


def test_a_save_that_fails_is_forgotten() -> None:
    world, request = World(), World().request("a", 12)
    world.compute(request)
    world.done(num_blocks=1)
    assert [world.offloader.host.is_ready(each) for each in request.block_hashes] == [True, False, False], LOOK_LEASE
    world.forget_device("a")
    assert world.blocks.num_free_blocks == 40, LOOK_LEASE


def test_blocks_of_a_step_that_fails_are_not_saved() -> None:
    world, request = World(), World().request("a", 8)
    world.blocks.admit("a", 8)
    world.offloader.save(request, world.blocks.cache_full_blocks(request, 8))
    world.offloader.note_launch()
    world.forget_device("a")
    world.offloader.reset()
    assert not world.take() and not world.offloader.is_busy and not world.offloader.host.blocks, LOOK_LEASE
    assert world.blocks.num_free_blocks == 40, LOOK_LEASE


def test_without_host_memory_nothing_is_saved() -> None:
    world = World(num_slots=0)
    world.compute(world.request("a", 8))
    assert not world.take() and world.find(world.request("b", 8)) == 0, LOOK_LEASE


# Loading


def test_blocks_come_back_from_host_memory() -> None:
    """100 tokens in blocks of 4, computed and gone: 96 are loaded, 4 computed."""
    world = World(num_slots=30)
    world.compute(world.request("a", 100))
    world.done()
    world.forget_device("a")
    request = world.request("b", 100)
    assert world.find(request) == 24, f"the last token must be computed, so not its block. {LOOK_FIND}"
    load = world.load(request, 24)
    assert load.block_ids == world.blocks.block_tables["b"][:24] and load.slots == list(range(24)), LOOK_LEASE
    world.blocks.free("b")  # aborted meanwhile
    assert world.blocks.num_free_blocks == 16, f"a copy writes to 24 of the 40 blocks. {LOOK_LEASE}"
    assert not world.offloader.has_leaving_blocks, f"a load may take long: don't wait for its blocks. {LOOK_LEASE}"
    world.done()
    assert world.blocks.num_free_blocks == 40 and request.num_found_blocks == 24, LOOK_LEASE


def test_the_device_is_asked_first() -> None:
    world = World()
    world.compute(world.request("a", 8))
    world.done()
    assert world.find(world.request("b", 9)) == 0, f"the device has both blocks. {LOOK_FIND}"


def test_a_request_waits_for_blocks_that_another_one_loads() -> None:
    world = World()
    world.compute(world.request("a", 13))
    world.done()
    world.forget_device("a")
    first, second = world.request("b", 13), world.request("c", 13)
    assert world.find(first) == 3
    world.load(first, 3)
    assert world.find(second) is None and world.offloader.is_waiting(second), (
        f"the blocks of c are on their way, for b: c should wait and not load them once more. {LOOK_FIND}"
    )
    world.done()
    assert not world.offloader.is_waiting(second), f"they have arrived. {LOOK_FIND}"


def test_a_load_that_brings_less_is_used_as_far_as_it_goes() -> None:
    world = World()
    world.compute(world.request("a", 13))
    world.done()
    world.forget_device("a")
    request = world.request("b", 13)
    assert world.find(request) == 3
    world.load(request, 3)
    world.done(num_blocks=2)
    assert request.num_found_blocks == 2, f"two of three blocks have come. {LOOK_LEASE}"
    assert world.offloader.stats.num_host_tokens == 8, LOOK_LEASE


# Tiers below


def test_the_tiers_are_asked_once() -> None:
    world, request = World(has_tiers=True), World().request("a", 13)
    assert world.find(request) is None, f"nobody knows yet what the tiers have. {LOOK_FIND}"
    [order] = world.take()
    assert isinstance(order, LookUp) and order.hashes == request.block_hashes[:3], LOOK_FIND
    assert world.offloader.is_waiting(request)
    world.done(num_blocks=2)
    assert not world.offloader.is_waiting(request) and world.find(request) == 2 and not world.take(), LOOK_FIND
    load = world.load(request, 2)
    assert load.slots == [None, None], f"blocks that host memory doesn't have come from the tiers. {LOOK_FIND}"
    world.done(tier_s=1.0)
    assert world.offloader.stats.num_tier_tokens == 8, LOOK_FIND


def test_host_memory_and_tiers_make_one_prefix() -> None:
    """The host has blocks 0 and 2, the tiers 1 and 2."""
    world, request = World(has_tiers=True), World().request("b", 17)
    world.blocks.hash_blocks(request)
    for index in (0, 2):
        world.offloader.host.prepare_store([request.block_hashes[index]])
        world.offloader.host.complete_store([request.block_hashes[index]])
    assert world.find(request) is None
    [order] = world.take()
    assert order.hashes == request.block_hashes[1:4], f"the first block is in host memory. {LOOK_FIND}"
    world.done(num_blocks=2)
    assert world.find(request) == 3, LOOK_FIND
    assert world.load(request, 3).slots == [0, None, 1], LOOK_FIND


def test_an_answer_for_a_request_that_has_gone_is_dropped() -> None:
    world, request = World(has_tiers=True), World().request("a", 13)
    world.find(request)
    world.offloader.forget(request)
    world.done()
    assert not world.offloader.is_busy and not world.offloader._searches, LOOK_FIND


# Load or compute


def test_only_what_is_in_host_memory_is_worth_loading() -> None:
    world, request = World(has_tiers=True), World().request("a", 17)
    world.blocks.hash_blocks(request)
    world.offloader.host.prepare_store(request.block_hashes[:2])
    world.offloader.host.complete_store(request.block_hashes[:2])
    world.find(request)
    world.done()
    world.offloader.cost.compute.add(1_000, 1.0)
    world.offloader.cost.tiers.add(100, 1.0)
    assert world.find(request) == 2, f"the tiers are slow: load two blocks from host memory, compute two. {LOOK_FIND}"
    world.offloader.note_start(request)
    assert world.offloader.stats.num_recomputed_tokens == 2 * BLOCK_SIZE, LOOK_FIND


def test_slow_tiers_are_not_even_asked() -> None:
    world, request = World(has_tiers=True), World().request("a", 17)
    world.offloader.cost.compute.add(1_000, 1.0)
    world.offloader.cost.tiers.add(100, 1.0)
    before = world.offloader.cost.tiers.tokens_per_s
    for _ in range(3):  # a request that waits for blocks is looked at in each step
        assert world.find(request) == 0 and not world.take(), f"computing is faster whatever they have. {LOOK_FIND}"
    assert world.offloader.cost.tiers.tokens_per_s == pytest.approx(RISE * before), (
        f"expected the estimate to rise once for the request. {LOOK_FIND}"
    )


def test_a_source_that_is_refused_is_tried_again_some_time() -> None:
    """One slow load must not be the last."""
    world = World()
    world.offloader.cost.compute.add(1_000, 1.0)
    world.offloader.cost.host.add(500, 1.0)
    world.compute(world.request("a", 9))
    world.done()
    num_refused = 0
    for number in range(100):
        world.forget_device(*list(world.blocks.block_tables))
        request = world.request(f"b{number}", 9)
        for _ in range(3):  # a request that waits for blocks is looked at in each step
            found = world.find(request)
        if found:
            break
        num_refused += 1
        world.offloader.note_start(request)
    assert 10 <= num_refused <= 20, (
        f"loading is half as fast as computing, and assumed to be {RISE} times as fast each time: expected about 15 "
        f"refusals before it is tried, got {num_refused}. {LOOK_FIND}"
    )


def test_reading_in_vain_makes_the_tiers_slower() -> None:
    world, request = World(has_tiers=True), World().request("a", 13)
    world.offloader.cost.tiers.add(100, 1.0)
    world.find(request)
    world.done()
    world.find(request)
    world.load(request, 3)
    world.done(num_blocks=0, tier_s=1.0)
    assert world.offloader.cost.tiers.tokens_per_s < 60, f"a second was spent, and nothing came. {LOOK_FIND}"


def test_a_lookup_that_takes_too_long_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(offload.time, "monotonic", lambda: now)
    world, request = World(has_tiers=True), World().request("a", 13)
    assert world.find(request) is None and world.offloader.is_waiting(request)
    now += offload.LOOKUP_TIMEOUT_S / 2
    assert world.offloader.is_waiting(request), LOOK_FIND
    now += offload.LOOKUP_TIMEOUT_S
    assert not world.offloader.is_waiting(request) and world.find(request) == 0, f"it's time to go on. {LOOK_FIND}"
    world.done()  # the answer comes after all
    assert world.find(request) == 0 and not world.offloader.is_busy, LOOK_FIND


def test_a_prompt_larger_than_host_memory_keeps_its_beginning() -> None:
    world, request = World(num_slots=4), World().request("a", 32)
    world.blocks.admit("a", 32)
    for num_tokens in (12, 24, 32):  # in three chunks
        world.offloader.save(request, world.blocks.cache_full_blocks(request, num_tokens))
        world.offloader.note_launch()
        world.offloader.note_result()
        world.done()
    ready = [world.offloader.host.is_ready(each) for each in request.block_hashes]
    assert ready == [True] * 3 + [False] * 5, f"a chunk evicts the one before it; ready are {ready}. {LOOK_LEASE}"


# In an engine


def finish(engine: Any) -> dict[str, list[int]]:
    answers: dict[str, list[int]] = {}
    for _ in range(500):
        if not engine.has_unfinished_requests:
            return answers
        for output in engine.step():
            answers.setdefault(output.request_id, []).extend(output.token_ids)
    raise AssertionError(f"500 steps, and {engine.scheduler.loading} are still loading. {LOOK_FIND}")


def test_others_run_while_a_request_waits_for_its_blocks() -> None:
    engine = scripted_engine(num_kv_blocks=30, block_size=4, num_host_blocks=30)
    executor: Any = executor_of(engine)
    prompt = list(range(100, 120))
    engine.add_request("first", prompt, params_for(2, ignore_eos=True))
    finish(engine)
    engine.reset_prefix_cache()
    executor.patience = 0.0  # no copy goes on
    engine.add_request("again", prompt, params_for(2, ignore_eos=True))
    engine.add_request("other", [50, 51], params_for(4, ignore_eos=True))
    answers: dict[str, list[int]] = {}
    for _ in range(6):
        for output in engine.step():
            answers.setdefault(output.request_id, []).extend(output.token_ids)
    assert answers == {"other": answer_alone([50, 51], 4, ignore_eos=True)}, (
        f"'again' waits for a copy, and 'other' should not wait: got {answers}. {LOOK_FIND}"
    )
    executor.patience = 1.0
    assert finish(engine)["again"] == answer_alone(prompt, 2, ignore_eos=True), LOOK_FIND
    assert engine.offloader.stats.num_host_tokens == 16, LOOK_FIND


def test_a_preempted_request_comes_back_from_host_memory() -> None:
    """Two requests grow until the pool is full: one is preempted, and not computed again."""
    computed = []
    for num_host_blocks in (0, 40):
        engine = scripted_engine(num_kv_blocks=9, block_size=4, num_host_blocks=num_host_blocks, max_num_seqs=2)
        engine.scheduler.watermark_blocks = 0
        for name, first in (("a", 100), ("b", 150)):
            engine.add_request(name, list(range(first, first + 9)), params_for(14, ignore_eos=True))
        executor: Any = executor_of(engine)
        executor.patience = 1.0
        executor.output = lambda step, executor=executor: type(executor).__mro__[1].output(executor, step)  # no times
        finish(engine)
        assert engine.scheduler.num_preemptions >= 1
        computed.append(executor.num_tokens_computed)
        assert engine.blocks.num_free_blocks == 8, LOOK_LEASE
    assert computed[1] < computed[0], f"tokens computed without and with host memory: {computed}. {LOOK_FIND}"
