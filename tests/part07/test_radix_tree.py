"""lab/radix_tree.py: another way to find a shared prefix, compared with a plain dictionary of prefixes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from part07_prefix_caching.lab import radix_tree
from part07_prefix_caching.lab.radix_tree import Node, RadixTree
from tests.lives import run_lives

LESSON = 'README "A radix tree instead"'
LOOK_MATCH = f"Look at lab/radix_tree.py::RadixTree.match_prefix and _split; {LESSON}."
LOOK_INSERT = f"Look at lab/radix_tree.py::RadixTree.insert; {LESSON}."
LOOK_LOCK = f"Look at lab/radix_tree.py::RadixTree.lock, unlock and _split; {LESSON}."
LOOK_EVICT = f"Look at lab/radix_tree.py::RadixTree.evict; {LESSON}."


def match(tree: RadixTree, tokens: list[int], expected: list[int]) -> Node:
    got, node = tree.match_prefix(tokens)
    assert got == expected, f"{tokens}: expected blocks {expected}, got {got}. {LOOK_MATCH}"
    return node


def insert(tree: RadixTree, tokens: list[int], blocks: list[int], expected: int = 0) -> None:
    got = tree.insert(tokens, blocks)
    assert got == expected, f"{tokens}: expected {expected} of its pages to be cached already, got {got}. {LOOK_INSERT}"


def test_the_longest_prefix_in_whole_pages() -> None:
    tree = RadixTree(2)
    insert(tree, [1, 2, 3, 4, 5, 6, 7], [10, 11, 12])
    for tokens, expected in (
        ([], []), ([1], []), ([1, 2], [10]), ([1, 2, 3], [10]), ([1, 2, 3, 9], [10]), ([2, 2, 3, 4], []),
        ([1, 2, 3, 4, 5, 6, 7, 8], [10, 11, 12]), ([1, 2, 3, 4, 9, 9], [10, 11]), ([1, 2, 3, 4, 5, 6], [10, 11, 12]),
    ):  # fmt: skip
        match(tree, tokens, expected)


def test_two_prompts_differ_in_the_middle_of_an_edge() -> None:
    tree = RadixTree(1)
    insert(tree, [1, 2, 3, 4], [10, 11, 12, 13])
    insert(tree, [1, 2, 8, 9], [20, 21, 22, 23], expected=2)
    match(tree, [1, 2, 3, 4], [10, 11, 12, 13])
    match(tree, [1, 2, 8, 9], [10, 11, 22, 23])
    match(tree, [1, 2], [10, 11])
    assert tree.num_blocks == 6, f"1 to 4, 8 and 9: expected 6 blocks, got {tree.num_blocks}. {LOOK_INSERT}"


def test_a_prompt_that_is_cached_already() -> None:
    tree = RadixTree(2)
    insert(tree, [1, 2, 3, 4], [10, 11])
    insert(tree, [1, 2, 3, 4], [20, 21], expected=2)
    insert(tree, [1, 2], [30], expected=1)
    insert(tree, [1, 2, 3, 4, 5, 6], [40, 41, 42], expected=2)
    match(tree, [1, 2, 3, 4, 5, 6], [10, 11, 42])
    assert tree.num_blocks == 3, f"expected 3 blocks, got {tree.num_blocks}. {LOOK_INSERT}"


def test_a_prompt_shorter_than_a_page_is_not_cached() -> None:
    tree = RadixTree(4)
    insert(tree, [1, 2, 3], [])
    assert tree.num_blocks == 0 and tree.evict(1) == [], f"expected no blocks, got {tree.num_blocks}. {LOOK_INSERT}"
    with pytest.raises(AssertionError, match="1 pages, but 2 blocks"):
        tree.insert([1, 2, 3, 4], [5, 6])


def test_the_least_recently_used_leaf_is_evicted_first_and_parents_become_leaves() -> None:
    tree = RadixTree(1)
    insert(tree, [1, 2, 3], [10, 11, 12])
    insert(tree, [1, 2, 4], [0, 0, 13], expected=2)
    insert(tree, [5], [14])
    match(tree, [1, 2, 3], [10, 11, 12])  # the least recently used is 4, then 5, then 3 and the nodes above it
    for expected in ([13], [14], [12], [10, 11], []):
        got = tree.evict(1)
        assert got == expected, f"expected {expected} to be evicted next, got {got}. {LOOK_EVICT}"
    assert tree.num_blocks == 0, f"all is evicted: expected no blocks, got {tree.num_blocks}. {LOOK_EVICT}"


def test_evict_evicts_enough() -> None:
    tree = RadixTree(1)
    insert(tree, [1, 2, 3], [10, 11, 12])
    insert(tree, [1, 4, 5], [0, 20, 21], expected=1)
    got = tree.evict(5)
    assert sorted(got) == [10, 11, 12, 20, 21], f"5 blocks are wanted: expected all 5, got {got}. {LOOK_EVICT}"
    match(tree, [1, 2, 3], [])


def test_a_lock_protects_the_nodes_above() -> None:
    tree = RadixTree(1)
    insert(tree, [1, 2, 3, 4], [10, 11, 12, 13])
    node = match(tree, [1, 2], [10, 11])
    tree.lock(node)
    tree.lock(node)
    insert(tree, [1, 8], [0, 20], expected=1)  # splits the locked edge
    got = tree.evict(9)
    assert sorted(got) == [12, 13, 20], f"1 and 2 are in use: expected the blocks of 3, 4 and 8, got {got}. {LOOK_LOCK}"
    tree.unlock(node)
    assert tree.evict(9) == [], f"another request still uses 1 and 2. {LOOK_LOCK}"
    tree.unlock(node)
    got = tree.evict(9)
    assert sorted(got) == [10, 11], f"no request uses 1 and 2 any more: expected [10, 11], got {got}. {LOOK_LOCK}"


def test_the_file_is_short() -> None:
    num_lines = len(Path(radix_tree.__file__).read_text(encoding="utf-8").splitlines())
    assert num_lines <= 150, f"lab/radix_tree.py is for comparison, in at most 150 lines; it has {num_lines}"


class Prompts(RuleBasedStateMachine):
    """Any order of calls, compared with a dictionary: prefix (in pages) → its last block."""

    num_evicted = 0

    @initialize(page_size=st.sampled_from([1, 2, 3]))
    def start(self, page_size: int) -> None:
        self.tree, self.page_size = RadixTree(page_size), page_size
        self.model: dict[tuple[int, ...], int] = {}
        self.used: dict[tuple[int, ...], int] = {}  # when each was last used
        self.locks: list[tuple[Node, tuple[int, ...]]] = []
        self.next_block, self.now = 0, 0

    tokens = st.lists(st.integers(0, 1), max_size=9)

    def prefixes(self, tokens: list[int]) -> list[tuple[int, ...]]:
        return [tuple(tokens[:end]) for end in range(self.page_size, len(tokens) + 1, self.page_size)]

    def known(self, tokens: list[int]) -> list[tuple[int, ...]]:
        """The prefixes that are cached; a lookup uses them."""
        self.now += 1
        found = [each for each in self.prefixes(tokens) if each in self.model]
        self.used |= dict.fromkeys(found, self.now)
        return found

    @rule(tokens=tokens)
    def look_up(self, tokens: list[int]) -> None:
        match(self.tree, tokens, [self.model[each] for each in self.known(tokens)])

    @rule(tokens=tokens)
    def insert_one(self, tokens: list[int]) -> None:
        prefixes, known = self.prefixes(tokens), self.known(tokens)
        blocks = list(range(self.next_block, self.next_block + len(prefixes)))
        self.next_block += len(blocks)
        insert(self.tree, tokens, blocks, len(known))
        for each, block in zip(prefixes, blocks, strict=True):
            if each not in self.model:
                self.model[each], self.used[each] = block, self.now

    @rule(tokens=tokens)
    def lock(self, tokens: list[int]) -> None:
        known = self.known(tokens)
        node = match(self.tree, tokens, [self.model[each] for each in known])
        self.tree.lock(node)
        self.locks.append((node, known[-1] if known else ()))

    @precondition(lambda self: self.locks)
    @rule(data=st.data())
    def unlock(self, data: st.DataObject) -> None:
        node, _ = self.locks.pop(data.draw(st.integers(0, len(self.locks) - 1), "lock"))
        self.tree.unlock(node)

    def is_locked(self, prefix: tuple[int, ...]) -> bool:
        return any(lock[: len(prefix)] == prefix for _, lock in self.locks)

    @rule(number=st.integers(1, 4))
    def evict(self, number: int) -> None:
        """Leaves before their parents, the least recently used first."""
        got = self.tree.evict(number)
        Prompts.num_evicted += len(got)
        of_block = {block: each for each, block in self.model.items()}
        free = [each for each in self.model if not self.is_locked(each)]
        assert len(got) >= min(number, len(free)), (
            f"{number} wanted, {len(free)} not locked, {len(got)} evicted. {LOOK_EVICT}"
        )
        gone = [of_block[block] for block in got]
        locked = [each for each in gone if self.is_locked(each)]
        assert not locked, f"{locked} are locked and were evicted. {LOOK_LOCK}"
        for each in gone:
            del self.model[each]
        orphans = [each for each in self.model if each[: -self.page_size] and each[: -self.page_size] not in self.model]
        assert not orphans, f"{orphans} remain, and the prefixes before them were evicted. {LOOK_EVICT}"
        stay = [e for e in free if e in self.model and not any(o[: len(e)] == e and o != e for o in self.model)]
        if gone and stay:  # leaves that stayed were used no earlier than the last evicted one
            oldest, last = min(self.used[each] for each in stay), max(self.used[each] for each in gone)
            assert oldest >= last, f"{gone} were evicted, {stay} were not, last used at {self.used}. {LOOK_EVICT}"

    @invariant()
    def is_in_one_piece(self) -> None:
        if not hasattr(self, "tree"):
            return
        got = self.tree.num_blocks
        assert got == len(self.model), f"expected {len(self.model)} blocks, num_blocks is {got}. {LOOK_INSERT}"
        todo: list[Any] = [self.tree.root]
        while todo:
            node = todo.pop()
            for first, child in node.children.items():
                assert child.parent is node and child.pages[0] == first and len(child.pages) == len(child.blocks), (
                    f"a child of {node.pages} is listed under {first}: {child.pages}, {child.blocks}. {LOOK_MATCH}"
                )
                todo.append(child)


def test_any_order_of_calls() -> None:
    Prompts.num_evicted = 0
    run_lives(Prompts, max_examples=100, stateful_step_count=30)
    assert Prompts.num_evicted > 300, f"{Prompts.num_evicted} evictions are too few to prove anything"
