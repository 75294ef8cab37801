"""core/block_manager.py: which request owns which block. A request gets all blocks it asks for or none, and no block
has two owners."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from part03_paged_attention.core.block_manager import BlockManager
from part03_paged_attention.messages import NULL_BLOCK

LOOK_GROW = 'Look at core/block_manager.py::BlockManager.grow; README "Blocks".'
LOOK_ADMIT = 'Look at core/block_manager.py::BlockManager.admit; README "Blocks".'
LOOK_FREE = 'Look at core/block_manager.py::BlockManager.free; README "Blocks".'
LOOK_RESET = 'Look at core/block_manager.py::BlockManager.reset; README "Blocks".'
LOOK = 'Look at core/block_manager.py::BlockManager; README "Blocks".'


def pool(num_usable: int, block_size: int = 16) -> BlockManager:
    """A pool with num_usable blocks to hand out, and the null block."""
    return BlockManager(num_usable + 1, block_size)


def hold(blocks: BlockManager, request_id: str, num_tokens: int, expected: bool = True) -> list[int]:
    """Admit a new request, or grow one that has a table. Returns its table afterwards, [] if it has none."""
    is_new = request_id not in blocks.block_tables
    call, name, look = (blocks.admit, "admit", LOOK_ADMIT) if is_new else (blocks.grow, "grow", LOOK_GROW)
    free = blocks.num_free_blocks
    got = call(request_id, num_tokens)
    assert got is expected, (
        f"{name}({request_id!r}, {num_tokens}) with block_size={blocks.block_size} and {free} free blocks: expected "
        f"{expected}, got {got}. {look}"
    )
    return list(blocks.block_tables.get(request_id, []))


def check_counts(blocks: BlockManager, used: int, look: str = LOOK_GROW) -> None:
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
    assert blocks.block_tables == {}, f"no request has a block table yet, got {blocks.block_tables}. {LOOK}"


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 64, 160])
def test_a_request_gets_the_blocks_that_its_tokens_fill(num_tokens: int) -> None:
    blocks = pool(10)
    table = hold(blocks, "a", num_tokens)
    expected = -(-num_tokens // 16)
    assert len(table) == expected, (
        f"request a holds {num_tokens} tokens (block_size=16): expected {expected} blocks, got {table}. {LOOK_GROW}"
    )
    assert len(set(table)) == len(table), f"a block is in one table twice: {table}. {LOOK_GROW}"
    check_counts(blocks, expected)


def test_all_or_nothing() -> None:
    """Three prompts of 64 tokens need four blocks each, and there are ten."""
    blocks = pool(10)
    first, second = hold(blocks, "first", 64), hold(blocks, "second", 64)
    third = hold(blocks, "third", 64, expected=False)
    assert third == [], f"the third prompt was refused and yet holds {third}: all four blocks or none. {LOOK_GROW}"
    check_counts(blocks, 8)
    tables = (blocks.block_tables["first"], blocks.block_tables["second"])
    assert tables == (first, second), f"a refusal must not change other tables: {(first, second)} → {tables}. {LOOK}"
    assert len(hold(blocks, "small", 32)) == 2, f"two blocks are free, and two are enough. {LOOK_GROW}"
    check_counts(blocks, 10)


def test_a_request_that_is_not_admitted_has_no_block_table() -> None:
    blocks = pool(2)
    hold(blocks, "a", 33, expected=False)
    assert blocks.block_tables == {}, f"request a was not admitted, got tables {blocks.block_tables}. {LOOK_ADMIT}"
    assert len(hold(blocks, "a", 32)) == 2, f"later it needs fewer blocks and is admitted. {LOOK_ADMIT}"


def test_to_admit_a_request_twice_is_a_bug() -> None:
    blocks = pool(4)
    table = hold(blocks, "a", 20)
    with pytest.raises(AssertionError, match="request a already has a block table"):
        blocks.admit("a", 1)
    assert blocks.block_tables == {"a": table}, f"expected table {table} to stay, got {blocks.block_tables}. {LOOK}"


def test_a_request_that_cannot_grow_keeps_what_it_had() -> None:
    """It needs two more blocks, and one is free."""
    blocks = pool(4)
    table = hold(blocks, "a", 20)
    hold(blocks, "b", 1)
    got = hold(blocks, "a", 49, expected=False)
    assert got == table, f"request a held {table} and was refused two more blocks: it now holds {got}. {LOOK_GROW}"
    check_counts(blocks, 3)


def test_growth_token_by_token() -> None:
    """Only the first token of a block costs one, and the blocks in a table stay where they are."""
    blocks = pool(10)
    table: list[int] = []
    for num_tokens in range(1, 66):
        grown = hold(blocks, "a", num_tokens)
        expected = (num_tokens + 15) // 16
        assert len(grown) == expected, (
            f"request a grows to {num_tokens} tokens (block_size=16): expected {expected} blocks, got {len(grown)}. "
            f"It needs only the blocks that it does not hold yet. {LOOK_GROW}"
        )
        assert grown[: len(table)] == table, (
            f"request a grows to {num_tokens} tokens: its keys are in blocks {table}, its table is now {grown}; a "
            f"table only grows at its end. {LOOK_GROW}"
        )
        table = grown
    check_counts(blocks, 5)


def test_the_last_free_block_can_be_had() -> None:
    blocks = pool(2)
    hold(blocks, "a", 17)
    check_counts(blocks, 2)
    hold(blocks, "a", 32)  # no block is free, and none is needed
    hold(blocks, "a", 33, expected=False)


def test_the_null_block_is_never_handed_out() -> None:
    blocks = pool(5, block_size=1)
    for turn in range(3):
        table = hold(blocks, "a", 5)
        assert NULL_BLOCK not in table, f"turn {turn}: the null block was handed out in {table}. {LOOK_GROW}"
        assert sorted(table) == [1, 2, 3, 4, 5], f"turn {turn}: expected blocks 1 to 5, got {table}. {LOOK_GROW}"
        blocks.free("a")


def test_free_gives_all_blocks_back() -> None:
    blocks = pool(10)
    hold(blocks, "a", 64)
    table = hold(blocks, "b", 20)
    blocks.free("a")
    check_counts(blocks, 2, LOOK_FREE)
    assert blocks.block_tables == {"b": table}, f"only b holds blocks now, got {blocks.block_tables}. {LOOK_FREE}"
    hold(blocks, "c", 8 * 16)
    check_counts(blocks, 10, LOOK_FREE)


def test_to_free_twice_is_no_error() -> None:
    blocks = pool(4)
    hold(blocks, "a", 20)
    for request_id in ("a", "a", "unknown"):
        blocks.free(request_id)
        check_counts(blocks, 0, LOOK_FREE)
    tables = [hold(blocks, request_id, 16) for request_id in "bcde"]
    assert len(set(map(tuple, tables))) == 4, f"freed twice, handed out twice: {tables}. {LOOK_FREE}"


def test_reset_frees_the_blocks_of_all_requests() -> None:
    blocks = pool(6)
    for request_id, num_tokens in (("a", 20), ("b", 1), ("c", 40)):
        hold(blocks, request_id, num_tokens)
    for _ in range(2):  # an empty pool can be reset too
        blocks.reset()
        check_counts(blocks, 0, LOOK_RESET)
        assert blocks.block_tables == {}, f"after reset(): expected no tables, got {blocks.block_tables}. {LOOK_RESET}"
    assert sorted(hold(blocks, "d", 6 * 16)) == [1, 2, 3, 4, 5, 6], f"a reset pool can be used again. {LOOK_RESET}"


class Pool(RuleBasedStateMachine):
    """Any order of calls on a small pool, beside a model that only counts."""

    requests = st.sampled_from("abcd")

    @initialize(num_usable=st.integers(1, 12), block_size=st.sampled_from([1, 2, 4, 16]))
    def start(self, num_usable: int, block_size: int) -> None:
        self.blocks = BlockManager(num_usable + 1, block_size)
        self.tables: dict[str, list[int]] = {}
        self.num_tokens: dict[str, int] = {}

    @rule(request_id=requests, num_more=st.integers(1, 80))
    def hold(self, request_id: str, num_more: int) -> None:
        """Admit a request that has no table, grow one that has."""
        table = self.tables.get(request_id, [])
        num_tokens = self.num_tokens.get(request_id, 0) + num_more
        num_new = max(0, -(-num_tokens // self.blocks.block_size) - len(table))
        num_free = self.blocks.num_blocks - 1 - sum(map(len, self.tables.values()))
        after = hold(self.blocks, request_id, num_tokens, expected=num_new <= num_free)
        num_expected = len(table) + (num_new if num_new <= num_free else 0)
        assert len(after) == num_expected and after[: len(table)] == table, (
            f"request {request_id} held {table} and needed {num_new} blocks, {num_free} were free: it holds {after}, "
            f"expected {num_expected} blocks. {LOOK_GROW}"
        )
        if num_new <= num_free:
            self.tables[request_id], self.num_tokens[request_id] = after, num_tokens

    @rule(request_id=requests)
    def grow_by_one(self, request_id: str) -> None:
        """By one token, from wherever it is: into a new block."""
        num_slots = len(self.tables.get(request_id, [])) * self.blocks.block_size
        self.hold(request_id, num_slots + 1 - self.num_tokens.get(request_id, 0))

    @rule(request_id=requests)
    def free(self, request_id: str) -> None:
        self.blocks.free(request_id)
        self.tables.pop(request_id, None)
        self.num_tokens.pop(request_id, None)

    def teardown(self) -> None:
        if hasattr(self, "blocks"):
            self.blocks.reset()
            check_counts(self.blocks, 0, LOOK_RESET)

    @invariant()
    def counts_add_up(self) -> None:
        used, free = self.blocks.num_used_blocks, self.blocks.num_free_blocks
        assert used + free == self.blocks.num_blocks - 1, (
            f"used {used} + free {free} blocks: expected {self.blocks.num_blocks - 1} together. {LOOK}"
        )
        expected = sum(map(len, self.tables.values()))
        assert used == expected, f"expected {expected} used blocks, got {used}. {LOOK}"

    @invariant()
    def no_block_has_two_owners(self) -> None:
        owned = [block for table in self.blocks.block_tables.values() for block in table]
        assert len(set(owned)) == len(owned), f"a block has two owners: {self.blocks.block_tables}. {LOOK}"
        assert NULL_BLOCK not in owned, f"the null block has an owner: {self.blocks.block_tables}. {LOOK}"


Pool.TestCase.settings = settings(
    deadline=None, derandomize=True, database=None, max_examples=60, stateful_step_count=25
)  # fmt: skip
TestPool = Pool.TestCase
