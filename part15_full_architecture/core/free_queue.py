"""The free KV blocks, in the order in which they are reused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class KVBlock:
    """A block of the pool. ref_count: how many block tables and copies use it. block_hash: what finds it, or None.

    previous, next: its neighbors in the free queue, None while it is in use.
    """

    block_id: int
    ref_count: int = 0
    block_hash: bytes | None = None
    previous: KVBlock | None = None
    next: KVBlock | None = None


class FreeBlockQueue:
    """A doubly linked list whose links are in the blocks themselves (vLLM's FreeKVCacheBlockQueue).

    A cached block that is found again leaves from the middle of the queue; a deque would have to search for it. The
    first block is reused next.
    """

    def __init__(self, blocks: Iterable[KVBlock]) -> None:
        self._head, self._tail = KVBlock(-1), KVBlock(-1)  # so that every block has two neighbors
        self._head.next, self._tail.previous = self._tail, self._head
        self._num_blocks = 0
        for block in blocks:
            self.append(block)

    def __len__(self) -> int:
        return self._num_blocks

    def __iter__(self) -> Iterator[KVBlock]:
        block = self._head.next
        while block is not None and block is not self._tail:
            yield block
            block = block.next

    def append(self, block: KVBlock) -> None:
        assert self._tail.previous is not None
        self._link(self._tail.previous, block, self._tail)

    def appendleft(self, block: KVBlock) -> None:
        assert self._head.next is not None
        self._link(self._head, block, self._head.next)

    @property
    def first(self) -> KVBlock:
        """The block that is reused next."""
        block = self._head.next
        assert block is not None and block is not self._tail, "no block is free"
        return block

    def remove(self, block: KVBlock) -> None:
        """Remove a block from anywhere in the queue, in constant time."""
        assert block.previous is not None and block.next is not None, f"block {block.block_id} is not free"
        block.previous.next, block.next.previous = block.next, block.previous
        block.previous = block.next = None
        self._num_blocks -= 1

    def _link(self, before: KVBlock, block: KVBlock, after: KVBlock) -> None:
        assert block.previous is None and block.next is None, f"block {block.block_id} is already free"
        before.next, block.previous, block.next, after.previous = block, before, after, block
        self._num_blocks += 1
