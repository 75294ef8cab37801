"""core/host_blocks.py: slots, eviction, pins; the cases in vLLM's tests of CPUOffloadingManager (its slots differ)."""

from __future__ import annotations

import random

import pytest

from part12_cpu_offloading.core.host_blocks import HostBlocks, HostStore

LOOK = 'Look at core/host_blocks.py::HostBlocks.{}; README "Host memory".'
LOOK_VICTIMS, LOOK_STORE = LOOK.format("_choose_victims"), LOOK.format("prepare_store and complete_store")


def hashes(*numbers: int) -> list[bytes]:
    return [bytes([number]) for number in numbers]


def numbers(found: list[bytes]) -> list[int]:
    return [each[0] for each in found]


def check_store(store: HostStore | None, new: list[int], slots: list[int], evicted: list[int], look: str) -> None:
    assert store is not None, f"expected blocks {new} to be stored, and {evicted} to be evicted; got None. {look}"
    got = (numbers(store.hashes), store.slots, numbers(store.evicted))
    assert got == (new, slots, evicted), (
        f"expected blocks {new} to get slots {slots}, and {evicted} to be evicted; got {got}. {look}"
    )


def filled(*ready: int, num_slots: int = 4) -> HostBlocks:
    host = HostBlocks(num_slots)
    host.prepare_store(hashes(*ready))
    host.complete_store(hashes(*ready))
    return host


def test_a_life_of_four_slots() -> None:
    host = HostBlocks(4)
    check_store(host.prepare_store(hashes(1, 2)), [1, 2], [0, 1], [], LOOK_STORE)
    assert host.lookup(hashes(1, 2)) == 0, f"blocks that have not arrived can't be found. {LOOK_STORE}"
    host.complete_store(hashes(1, 2))
    assert host.lookup(hashes(1, 2)) == 2, f"blocks that have arrived can be found. {LOOK_STORE}"
    check_store(host.prepare_store(hashes(2, 3, 4, 5)), [3, 4, 5], [2, 3, 0], [1], LOOK_VICTIMS)
    assert host.prepare_store(hashes(1, 6)) is None, (
        f"of four blocks, 3, 4 and 5 have not arrived, so only 2 could be evicted for two new ones: expected None. "
        f"{LOOK_VICTIMS}"
    )
    assert host.lookup(hashes(2)) == 1, f"a store without enough room evicts nothing; block 2 is gone. {LOOK_STORE}"
    host.complete_store(hashes(3, 4, 5))
    assert host.prepare_load(hashes(2, 3)) == [1, 2]
    assert host.prepare_store(hashes(6, 7, 8)) is None, (
        f"blocks 2 and 3 are being loaded, so they can't be evicted: expected None. {LOOK_VICTIMS}"
    )
    host.complete_load(hashes(2, 3))
    check_store(host.prepare_store(hashes(6, 7, 8)), [6, 7, 8], [1, 2, 3], [2, 3, 4], LOOK_VICTIMS)


def test_blocks_of_the_same_list_are_not_evicted() -> None:
    host = filled(1, 2, 3, 4)
    host.touch(hashes(1))
    check_store(host.prepare_store(hashes(2, 3, 4, 5)), [5], [0], [1], LOOK_VICTIMS)


def test_the_beginning_of_a_prefix_is_evicted_last() -> None:
    host = filled(1, 2, 3, 4)
    host.touch(hashes(1, 2, 3))  # a prompt
    evicted = [numbers(store.evicted) for n in (5, 6, 7) if (store := host.prepare_store(hashes(n))) is not None]
    assert evicted == [[4], [3], [2]], (
        f"expected 4, then the prompt from its end; got {evicted}. {LOOK.format('touch')}"
    )


def test_lookup_stops_at_the_first_gap() -> None:
    host = filled(1, 2, 4)
    assert host.lookup(hashes(1, 2, 3, 4)) == 2, LOOK.format("lookup")
    assert host.lookup(hashes(3, 4)) == 0 and host.lookup([]) == 0, LOOK.format("lookup")


def test_a_store_that_fails_gives_its_slots_back() -> None:
    host = filled(1, 2)
    host.prepare_store(hashes(3, 4))
    host.complete_store(hashes(3))
    host.complete_store(hashes(4), success=False)
    assert host.lookup(hashes(1)) == host.lookup(hashes(3)) == 1 and not host.lookup(hashes(4)), LOOK_STORE
    assert list(host.free_slots) == [3], f"slot 3 is free again, got {host.free_slots}. {LOOK_STORE}"


def test_two_loads_of_a_block_are_two_pins() -> None:
    host = filled(1, num_slots=1)
    host.prepare_load(hashes(1))
    host.prepare_load(hashes(1))
    host.complete_load(hashes(1))
    assert host.prepare_store(hashes(2)) is None, f"the second load still reads block 1. {LOOK_VICTIMS}"
    host.complete_load(hashes(1))
    check_store(host.prepare_store(hashes(2)), [2], [0], [1], LOOK_VICTIMS)


@pytest.mark.parametrize("seed", range(3))
def test_random_lives(seed: int) -> None:
    """Slots add up, and what is read or written is never evicted."""
    rng, host = random.Random(seed), HostBlocks(8)
    storing: list[list[bytes]] = []
    loading: list[list[bytes]] = []
    for _ in range(2_000):
        some = hashes(*rng.sample(range(20), rng.randint(1, 6)))
        match rng.randrange(5):
            case 0 if (store := host.prepare_store(some)) is not None:
                pinned = {each for group in [*storing, *loading] for each in group}
                assert not pinned & {*store.evicted}, f"{store} evicts what copies use. {LOOK_VICTIMS}"
                assert not {*some} & {*store.evicted}, f"{store} evicts what it stores. {LOOK_VICTIMS}"
                storing.append(store.hashes)
            case 1 if storing:
                host.complete_store(storing.pop(rng.randrange(len(storing))), success=rng.random() < 0.8)
            case 2 if found := some[: host.lookup(some)]:
                host.prepare_load(found)
                loading.append(found)
            case 3 if loading:
                host.complete_load(loading.pop(rng.randrange(len(loading))))
            case 4:
                host.touch(some)
        slots = sorted([*host.free_slots, *(block.slot for block in host.blocks.values())])
        assert slots == list(range(8)), f"slots {slots}: each is free or has one block. {LOOK_STORE}"
