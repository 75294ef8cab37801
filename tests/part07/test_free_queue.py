"""core/free_queue.py: a linked list with its links in the blocks, so that any block can be removed in constant time."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from part07_prefix_caching.core.free_queue import FreeBlockQueue, KVBlock

LESSON = 'README "Free, but still cached"'
LOOK_REMOVE = f"Look at core/free_queue.py::FreeBlockQueue.remove; {LESSON}."
LOOK_LINK = f"Look at core/free_queue.py::FreeBlockQueue._link; {LESSON}."
LOOK_FIRST = f"Look at core/free_queue.py::FreeBlockQueue.first; {LESSON}."


def blocks_and_queue(number: int) -> tuple[list[KVBlock], FreeBlockQueue]:
    blocks = [KVBlock(block_id) for block_id in range(1, number + 1)]
    return blocks, FreeBlockQueue(blocks)


def check(queue: FreeBlockQueue, expected: list[int], what: str, look: str = LOOK_REMOVE) -> None:
    """expected: block ids from the front to the back. The links in the other direction must agree."""
    got = [block.block_id for block in islice(queue, len(expected) + 5)]  # a broken list may be endless
    assert got == expected, f"{what}: expected {expected} from the front on, got {got}. {look}"
    assert len(queue) == len(expected), f"{what}: {len(expected)} blocks are free, len() is {len(queue)}. {look}"
    backwards, block = list[int](), queue._tail.previous
    while block is not None and block is not queue._head and len(backwards) <= len(expected):
        backwards.append(block.block_id)
        block = block.previous
    assert backwards == expected[::-1], f"{what}: backwards, expected {expected[::-1]}, got {backwards}. {look}"


def check_unlinked(block: KVBlock, what: str) -> None:
    assert block.previous is None and block.next is None, (
        f"{what}: block {block.block_id} is not in the queue: expected both of its links to be None, got previous "
        f"{block.previous and block.previous.block_id} and next {block.next and block.next.block_id}. {LOOK_REMOVE}"
    )


@pytest.mark.parametrize("index", range(5))
def test_a_block_is_removed_from_anywhere(index: int) -> None:
    blocks, queue = blocks_and_queue(5)
    queue.remove(blocks[index])
    others = [block.block_id for block in blocks if block is not blocks[index]]
    check(queue, others, f"block {index + 1} of 5 was removed")
    check_unlinked(blocks[index], "after remove()")


def test_the_only_block_is_removed() -> None:
    [block], queue = blocks_and_queue(1)
    queue.remove(block)
    check(queue, [], "the only block was removed")
    queue.append(block)
    check(queue, [1], "and appended again")


def test_a_removed_block_can_be_added_at_either_end() -> None:
    blocks, queue = blocks_and_queue(4)
    queue.remove(blocks[1])
    queue.append(blocks[1])
    check(queue, [1, 3, 4, 2], "2 was removed and appended")
    queue.remove(blocks[2])
    queue.appendleft(blocks[2])
    check(queue, [3, 1, 4, 2], "3 was removed and appended on the left")


def test_first_is_the_front_and_stays_there() -> None:
    _, queue = blocks_and_queue(3)
    for expected in (1, 2, 3):
        for _ in range(2):
            block = queue.first
            assert block.block_id == expected, f"expected block {expected} first, got {block.block_id}. {LOOK_FIRST}"
        check(queue, list(range(expected, 4)), "first was read, and nothing removed", LOOK_FIRST)
        queue.remove(block)
    check(queue, [], "all are removed")
    with pytest.raises(AssertionError, match="no block is free"):
        _ = queue.first


def error_of(queue: FreeBlockQueue, block: KVBlock) -> Exception | None:
    """What remove() raises."""
    try:
        queue.remove(block)
    except Exception as error:
        return error
    return None


def test_a_block_that_is_not_free_cannot_be_removed() -> None:
    blocks, queue = blocks_and_queue(3)
    queue.remove(blocks[1])
    for block in (blocks[1], KVBlock(9)):
        error = error_of(queue, block)
        assert isinstance(error, AssertionError), (
            f"remove() of block {block.block_id}, which is not in the queue: expected an AssertionError, got "
            f"{error!r}. {LOOK_REMOVE}"
        )
    check(queue, [1, 3], "2 was removed twice: expected the second time to change nothing")


@pytest.mark.parametrize("name", ["append", "appendleft"])
def test_a_free_block_cannot_be_added(name: str) -> None:
    blocks, queue = blocks_and_queue(3)
    for block in blocks:
        with pytest.raises(AssertionError, match=f"block {block.block_id} is already free"):
            getattr(queue, name)(block)
    check(queue, [1, 2, 3], f"{name}() of blocks in the queue: expected no change", LOOK_LINK)


class Counted(KVBlock):
    """A block that counts accesses to its links. num_accesses: of all blocks together."""

    num_accesses = 0

    def __getattribute__(self, name: str) -> Any:
        if name in ("previous", "next"):
            Counted.num_accesses += 1
        return super().__getattribute__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("previous", "next"):
            Counted.num_accesses += 1
        super().__setattr__(name, value)


@pytest.mark.parametrize("index", [0, 500, 999])
def test_remove_and_append_take_constant_time(index: int) -> None:
    """Nothing searches the queue: a few links are accessed, however many blocks there are and wherever the block is."""
    look: dict[str, tuple[Callable[[FreeBlockQueue, KVBlock], object], str]] = {
        "remove": (FreeBlockQueue.remove, LOOK_REMOVE),
        "append": (FreeBlockQueue.append, LOOK_LINK),
    }
    blocks = [Counted(block_id) for block_id in range(1_000)]
    queue = FreeBlockQueue(blocks)
    for name, (call, where) in look.items():
        Counted.num_accesses = 0
        call(queue, blocks[index])
        assert Counted.num_accesses <= 20, (
            f"{name}() of block {index} of 1,000: {Counted.num_accesses} accesses to links, expected at most 20, "
            f"whatever the number of blocks. {where}"
        )


class Queue(RuleBasedStateMachine):
    """Any order of calls, compared with a plain list."""

    @initialize(number=st.integers(1, 8))
    def start(self, number: int) -> None:
        self.blocks, self.queue = blocks_and_queue(number)
        self.model = [block.block_id for block in self.blocks]

    def outside(self) -> list[KVBlock]:
        return [block for block in self.blocks if block.block_id not in self.model]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        block_id = data.draw(st.sampled_from(self.model), "block")
        self.queue.remove(self.blocks[block_id - 1])
        self.model.remove(block_id)

    @precondition(lambda self: self.model)
    @rule()
    def remove_first(self) -> None:
        block, expected = self.queue.first, self.model.pop(0)
        assert block.block_id == expected, f"expected block {expected} first, got {block.block_id}. {LOOK_FIRST}"
        self.queue.remove(block)

    @precondition(lambda self: self.outside())
    @rule(data=st.data(), is_left=st.booleans())
    def add(self, data: st.DataObject, is_left: bool) -> None:
        block = data.draw(st.sampled_from(self.outside()), "block")
        (self.queue.appendleft if is_left else self.queue.append)(block)
        self.model.insert(0 if is_left else len(self.model), block.block_id)

    @invariant()
    def equals_the_list(self) -> None:
        if hasattr(self, "queue"):
            check(self.queue, self.model, "after some calls", f"Look at core/free_queue.py::FreeBlockQueue; {LESSON}.")
            for block in self.outside():
                check_unlinked(block, "after some calls")


TestQueue = Queue.TestCase
TestQueue.settings = settings(deadline=None, derandomize=True, database=None, max_examples=40, stateful_step_count=30)
