"""Which request owns which KV block."""

from __future__ import annotations

from collections import deque

from ..messages import NULL_BLOCK


class BlockManager:
    """A pool of KV blocks of block_size tokens each, and a block table for every request that holds some.

    Position p of a request lives in block table[p // block_size] at offset p % block_size. After every call
    num_used_blocks + num_free_blocks == num_blocks - 1: the null block is never handed out. Modeled on vLLM's
    KVCacheManager.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks >= 2, f"a pool of {num_blocks} blocks has none to hand out besides the null block"
        self.num_blocks, self.block_size = num_blocks, block_size
        self.free_blocks = deque(range(NULL_BLOCK + 1, num_blocks))
        self.block_tables: dict[str, list[int]] = {}

    @property
    def num_free_blocks(self) -> int:
        return len(self.free_blocks)

    @property
    def num_used_blocks(self) -> int:
        return sum(map(len, self.block_tables.values()))

    def num_blocks_for(self, num_tokens: int) -> int:
        """How many blocks it takes to hold num_tokens tokens."""
        return -(-num_tokens // self.block_size)

    def admit(self, request_id: str, num_tokens: int) -> bool:
        """Give a new request a block table for num_tokens tokens. Returns False if there are not enough free blocks."""
        assert request_id not in self.block_tables, f"request {request_id} already has a block table"
        self.block_tables[request_id] = []
        if self.grow(request_id, num_tokens):
            return True
        del self.block_tables[request_id]
        return False

    def grow(self, request_id: str, num_tokens: int) -> bool:
        """Append the blocks a request lacks for num_tokens tokens. If too few are free, append none, return False."""
        table = self.block_tables[request_id]
        num_new = self.num_blocks_for(num_tokens) - len(table)
        if num_new > self.num_free_blocks:
            return False
        table.extend(self.free_blocks.popleft() for _ in range(num_new))
        return True

    def free(self, request_id: str) -> None:
        """Free all blocks of a request. Does nothing if it has none."""
        self.free_blocks.extend(self.block_tables.pop(request_id, []))

    def reset(self) -> None:
        """Free all blocks of all requests."""
        for request_id in list(self.block_tables):
            self.free(request_id)
