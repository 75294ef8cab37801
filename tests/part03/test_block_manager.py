"""core/block_manager.py: who owns which block, all or nothing, and nobody owns a block that another one has."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from part03_paged_attention.core.block_manager import NULL_BLOCK, BlockManager

LOOK_ALLOCATE = 'Look at core/block_manager.py::BlockManager.allocate; README "Blocks".'
LOOK_FREE = 'Look at core/block_manager.py::BlockManager.free; README "Blocks".'
LOOK_SLOT = 'Look at core/block_manager.py::BlockManager.slot; README "Blocks".'
LOOK = 'Look at core/block_manager.py::BlockManager; README "Blocks".'


def pool(num_usable: int, block_size: int = 16) -> BlockManager:
    """A pool with num_usable blocks to hand out, and the null block."""
    return BlockManager(num_usable + 1, block_size)


def allocate(blocks: BlockManager, request_id: str, num_tokens: int, expected: bool = True) -> list[int]:
    """Returns the request's table afterwards."""
    free = blocks.num_free_blocks
    got = blocks.allocate(request_id, num_tokens)
    assert got is expected, (
        f"request {request_id} wants room for {num_tokens} tokens (block_size={blocks.block_size}), {free} blocks are "
        f"free: expected {expected}, got {got}. {LOOK_ALLOCATE}"
    )
    return list(blocks.block_tables.get(request_id, []))


def check_counts(blocks: BlockManager, used: int, look: str = LOOK_ALLOCATE) -> None:
    expected = (used, blocks.num_blocks - 1 - used)
    got = (blocks.num_used_blocks, blocks.num_free_blocks)
    assert got == expected, f"(used, free) blocks of {blocks.num_blocks - 1}: expected {expected}, got {got}. {look}"


@pytest.mark.parametrize(
    ("num_tokens", "block_size", "expected"),
    [(0, 16, 0), (1, 16, 1), (15, 16, 1), (16, 16, 1), (17, 16, 2), (64, 16, 4), (65, 16, 5), (5, 1, 5), (9, 8, 2)],
)
def test_num_blocks_for(num_tokens: int, block_size: int, expected: int) -> None:
    got = pool(10, block_size).num_blocks_for(num_tokens)
    assert got == expected, (
        f"{num_tokens} tokens in blocks of {block_size}: expected {expected} blocks, got {got}. "
        'Look at core/block_manager.py::BlockManager.num_blocks_for; README "Blocks".'
    )


def test_a_new_pool_is_all_free() -> None:
    blocks = pool(10)
    check_counts(blocks, 0, LOOK)
    assert blocks.block_tables == {}, f"nobody holds a block yet, got {blocks.block_tables}. {LOOK}"


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 64, 160])
def test_a_request_gets_the_blocks_that_its_tokens_fill(num_tokens: int) -> None:
    blocks = pool(10)
    table = allocate(blocks, "a", num_tokens)
    expected = -(-num_tokens // 16)
    assert len(table) == expected, (
        f"request a holds {num_tokens} tokens (block_size=16): expected {expected} blocks, got {table}. {LOOK_ALLOCATE}"
    )
    assert len(set(table)) == len(table), f"a block stands twice in one table: {table}. {LOOK_ALLOCATE}"
    check_counts(blocks, expected)


def test_all_or_nothing() -> None:
    """Three prompts of 64 tokens are four blocks each, and there are ten."""
    blocks = pool(10)
    first, second = allocate(blocks, "first", 64), allocate(blocks, "second", 64)
    third = allocate(blocks, "third", 64, expected=False)
    assert third == [], f"the third prompt was refused and yet holds {third}: all four blocks or none. {LOOK_ALLOCATE}"
    check_counts(blocks, 8)
    tables = (blocks.block_tables["first"], blocks.block_tables["second"])
    assert tables == (first, second), f"a refusal must not touch others: {(first, second)} → {tables}. {LOOK_ALLOCATE}"
    assert len(allocate(blocks, "small", 32)) == 2, f"two blocks are free and two suffice. {LOOK_ALLOCATE}"
    check_counts(blocks, 10)


def test_a_refused_request_keeps_what_it_had() -> None:
    blocks = pool(3)
    table = allocate(blocks, "a", 20)
    allocate(blocks, "b", 1)
    got = allocate(blocks, "a", 33, expected=False)
    assert got == table, f"request a held {table} and was refused a third block: it now holds {got}. {LOOK_ALLOCATE}"
    check_counts(blocks, 3)


def test_growth_token_by_token() -> None:
    """Only the token that begins a block costs one, and what is in a table stays where it is."""
    blocks = pool(10)
    table: list[int] = []
    for num_tokens in range(1, 66):
        grown = allocate(blocks, "a", num_tokens)
        expected = (num_tokens + 15) // 16
        assert len(grown) == expected, (
            f"request a grows to {num_tokens} tokens (block_size=16): expected {expected} blocks, got {len(grown)}. "
            f"It lacks only what it does not hold yet. {LOOK_ALLOCATE}"
        )
        assert grown[: len(table)] == table, (
            f"request a grows to {num_tokens} tokens: its keys are in {table}, its table is now {grown}; a table only "
            f"grows at its end. {LOOK_ALLOCATE}"
        )
        table = grown
    check_counts(blocks, 5)


def test_the_last_free_block_can_be_had() -> None:
    blocks = pool(2)
    allocate(blocks, "a", 17)
    check_counts(blocks, 2)
    allocate(blocks, "a", 32)  # nothing is free, and nothing is needed
    allocate(blocks, "a", 33, expected=False)


def test_fewer_tokens_than_before_take_nothing_away() -> None:
    blocks = pool(4)
    table = allocate(blocks, "a", 40)
    got = allocate(blocks, "a", 3)
    assert got == table, f"room for 3 tokens is there already: expected {table} to stay, got {got}. {LOOK_ALLOCATE}"
    check_counts(blocks, 3)


def test_the_null_block_is_never_handed_out() -> None:
    blocks = pool(5, block_size=1)
    for turn in range(3):
        table = allocate(blocks, "a", 5)
        assert NULL_BLOCK not in table, f"turn {turn}: the null block was handed out in {table}. {LOOK_ALLOCATE}"
        assert sorted(table) == [1, 2, 3, 4, 5], f"turn {turn}: expected blocks 1 to 5, got {table}. {LOOK_ALLOCATE}"
        blocks.free("a")


def test_free_gives_all_back() -> None:
    blocks = pool(10)
    allocate(blocks, "a", 64)
    table = allocate(blocks, "b", 20)
    blocks.free("a")
    check_counts(blocks, 2, LOOK_FREE)
    assert blocks.block_tables == {"b": table}, f"only b holds blocks now, got {blocks.block_tables}. {LOOK_FREE}"
    allocate(blocks, "c", 8 * 16)
    check_counts(blocks, 10, LOOK_FREE)


def test_to_free_twice_is_no_error() -> None:
    blocks = pool(4)
    allocate(blocks, "a", 20)
    for request_id in ("a", "a", "nobody"):
        blocks.free(request_id)
        check_counts(blocks, 0, LOOK_FREE)
    tables = [allocate(blocks, request_id, 16) for request_id in "bcde"]
    assert len(set(map(tuple, tables))) == 4, f"freed twice, handed out twice: {tables}. {LOOK_FREE}"


@pytest.mark.parametrize(("position", "expected"), [(35, 51), (15, 127), (16, 16), (0, 112), (31, 31), (32, 48)])
def test_slot(position: int, expected: int) -> None:
    blocks = pool(10)
    blocks.block_tables = {"other": [2, 4, 5], "a": [7, 1, 3]}
    got = blocks.slot("a", position)
    block = [7, 1, 3][position // 16]
    assert got == expected, (
        f"position {position} with table [7, 1, 3] (block_size=16): expected slot {expected} (block {block}, offset "
        f"{position % 16}), got {got}. {LOOK_SLOT}"
    )


def test_slot_with_other_block_sizes() -> None:
    for block_size, expected in ((1, [3, 1, 2]), (2, [6, 7, 2, 3]), (4, [12, 13, 14, 15, 4, 5])):
        blocks = pool(3, block_size)
        blocks.block_tables = {"a": [3, 1, 2]}
        got = [blocks.slot("a", position) for position in range(len(expected))]
        assert got == expected, (
            f"table [3, 1, 2], block_size={block_size}: expected slots {expected} for positions 0 to "
            f"{len(expected) - 1}, got {got}. {LOOK_SLOT}"
        )


def test_every_position_of_every_request_has_a_slot_of_its_own() -> None:
    blocks = pool(6, block_size=4)
    for num_tokens in (1, 3, 5, 9):  # in turns, so that the tables interleave
        allocate(blocks, "a", num_tokens)
        allocate(blocks, "b", num_tokens)
    slots = [blocks.slot(request_id, position) for request_id in "ab" for position in range(9)]
    assert len(set(slots)) == 18, f"two of 18 positions share a slot: {sorted(slots)}. {LOOK_SLOT}"
    in_null_block = [slot for slot in slots if slot < 4]
    assert not in_null_block, f"slots {in_null_block} are the null block's. {LOOK_SLOT}"


class Pool(RuleBasedStateMachine):
    """Any order of calls on a small pool, beside a model that only counts."""

    requests = st.sampled_from("abcd")

    @initialize(num_usable=st.integers(1, 12), block_size=st.sampled_from([1, 2, 4, 16]))
    def start(self, num_usable: int, block_size: int) -> None:
        self.blocks = BlockManager(num_usable + 1, block_size)
        self.tables: dict[str, list[int]] = {}

    @rule(request_id=requests, num_tokens=st.integers(1, 80))
    def allocate(self, request_id: str, num_tokens: int) -> None:
        table = self.tables.get(request_id, [])
        num_new = max(0, -(-num_tokens // self.blocks.block_size) - len(table))
        num_free = self.blocks.num_blocks - 1 - sum(map(len, self.tables.values()))
        got = self.blocks.allocate(request_id, num_tokens)
        assert got is (num_new <= num_free), (
            f"request {request_id} lacks {num_new} blocks, {num_free} are free: got {got}. {LOOK_ALLOCATE}"
        )
        after = list(self.blocks.block_tables.get(request_id, []))
        num_expected = len(table) + (num_new if got else 0)
        assert len(after) == num_expected and after[: len(table)] == table, (
            f"request {request_id} held {table} and lacked {num_new} blocks, allocate said {got}: it holds {after}, "
            f"expected {num_expected} blocks. {LOOK_ALLOCATE}"
        )
        self.tables[request_id] = after

    @rule(request_id=requests)
    def grow(self, request_id: str) -> None:
        """By one token, from wherever it is: into a new block."""
        self.allocate(request_id, len(self.tables.get(request_id, [])) * self.blocks.block_size + 1)

    @rule(request_id=requests)
    def free(self, request_id: str) -> None:
        self.blocks.free(request_id)
        self.tables.pop(request_id, None)

    @invariant()
    def counts_add_up(self) -> None:
        used, free = self.blocks.num_used_blocks, self.blocks.num_free_blocks
        assert used + free == self.blocks.num_blocks - 1, (
            f"used {used} + free {free} blocks: expected {self.blocks.num_blocks - 1} together. {LOOK}"
        )
        expected = sum(map(len, self.tables.values()))
        assert used == expected, f"expected {expected} used blocks, got {used}. {LOOK}"

    @invariant()
    def nobody_shares(self) -> None:
        owned = [block for table in self.blocks.block_tables.values() for block in table]
        assert len(set(owned)) == len(owned), f"a block has two owners: {self.blocks.block_tables}. {LOOK}"
        assert NULL_BLOCK not in owned, f"the null block has an owner: {self.blocks.block_tables}. {LOOK}"


Pool.TestCase.settings = settings(
    deadline=None, derandomize=True, database=None, max_examples=60, stateful_step_count=25
)  # fmt: skip
TestPool = Pool.TestCase
