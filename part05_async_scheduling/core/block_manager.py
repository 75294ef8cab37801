"""Who owns which KV block."""

from __future__ import annotations

from collections import deque

NULL_BLOCK = 0  # never handed out: padding in block tables points here


class BlockManager:
    """A pool of KV blocks of block_size tokens each, and a block table for every request that holds some.

    Position p of a request lives in block table[p // block_size] at offset p % block_size. After every call
    num_used_blocks + num_free_blocks == num_blocks - 1 (the null block belongs to nobody). After vLLM's KVCacheManager.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks >= 2, f"a pool of {num_blocks} blocks has none to hand out beside the null block"
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
        """How many blocks hold num_tokens tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, request_id: str, num_tokens: int) -> bool:
        """Give a request the blocks it lacks to hold num_tokens tokens: all of them, or none and False."""
        table = self.block_tables.get(request_id, [])
        num_new = self.num_blocks_for(num_tokens) - len(table)
        if num_new > self.num_free_blocks:
            return False
        self.block_tables[request_id] = table + [self.free_blocks.popleft() for _ in range(num_new)]
        return True

    def free(self, request_id: str) -> None:
        """Take back all blocks of a request. One that holds none is no error."""
        self.free_blocks.extend(self.block_tables.pop(request_id, []))

    def slot(self, request_id: str, position: int) -> int:
        """Where the key and value of a position go: block · block_size + offset."""
        table = self.block_tables[request_id]
        return table[position // self.block_size] * self.block_size + position % self.block_size
