"""Which request uses which KV block, and which blocks can be found by their content."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from ..messages import NULL_BLOCK
from .free_queue import FreeBlockQueue, KVBlock
from .request import Request

BlockHash = bytes


class BlockManager:
    """A pool of KV blocks of block_size tokens each, and a block table for every request that holds some.

    A full block is found by a hash of its tokens and all tokens before them. ref_count is the number of leases on a
    block: one for each block table that it is in, and one for each copy that reads or writes it. When it falls to 0,
    the block joins the free queue, but it can still be found until it is reused for something else; until then, a
    request that begins with the same tokens takes it back. Modeled on vLLM's KVCacheManager and BlockPool.

    Position p of a request lives in block table[p // block_size] at offset p % block_size. After every call
    num_used_blocks + num_free_blocks == num_blocks - 1: the null block is never handed out.
    """

    def __init__(
        self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True, hash_seed: int = 0
    ) -> None:
        assert num_blocks >= 2, f"a pool of {num_blocks} blocks has none to hand out besides the null block"
        self.num_blocks, self.block_size = num_blocks, block_size
        self.enable_prefix_caching, self.hash_seed = enable_prefix_caching, hash_seed
        self.pool = [KVBlock(block_id) for block_id in range(num_blocks)]
        self.free_queue = FreeBlockQueue(self.pool[NULL_BLOCK + 1 :])
        self.block_tables: dict[str, list[int]] = {}
        self.cached_blocks: dict[BlockHash, KVBlock] = {}

    @property
    def num_free_blocks(self) -> int:
        return len(self.free_queue)

    @property
    def num_used_blocks(self) -> int:
        return self.num_blocks - 1 - self.num_free_blocks

    def num_blocks_for(self, num_tokens: int) -> int:
        """How many blocks it takes to hold num_tokens tokens."""
        return -(-num_tokens // self.block_size)

    def hash_blocks(self, request: Request) -> list[BlockHash]:
        """The hashes of a request's full blocks, as far as its tokens are known. They are stored in the request."""
        hashes = request.block_hashes
        while (len(hashes) + 1) * self.block_size <= request.num_tokens:
            start = len(hashes) * self.block_size
            parent = hashes[-1] if hashes else self._first_parent(request.params.cache_salt)
            hashes.append(hash_block(parent, request.tokens_between(start, start + self.block_size)))
        return hashes

    def _first_parent(self, cache_salt: str | None) -> BlockHash:
        """The parent of the first block. Through it, the seed and the salt are part of the hashes of all blocks."""
        root = f"seed {self.hash_seed}" + ("" if cache_salt is None else f", salt {cache_salt}")
        return hashlib.sha256(root.encode()).digest()  # text alone: it cannot equal a block's input, hash + tokens

    def find_cached(self, request: Request) -> list[KVBlock]:
        """The cached blocks of the longest cached prefix of the request's tokens. It never includes the last token,
        because its logits are needed."""
        found: list[KVBlock] = []
        if not self.enable_prefix_caching:
            return found
        for block_hash in self.hash_blocks(request)[: (request.num_tokens - 1) // self.block_size]:
            block = self.cached_blocks.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def num_blocks_needed(self, num_tokens: int, cached: Sequence[KVBlock]) -> int:
        """How many free blocks a new request takes: the new ones, and the cached ones that are in no block table."""
        return self.num_blocks_for(num_tokens) - sum(block.ref_count > 0 for block in cached)

    def admit(self, request_id: str, num_tokens: int, cached: Sequence[KVBlock] = ()) -> bool:
        """Give a new request a block table for num_tokens tokens. Returns False if there are not enough free blocks.

        cached: the blocks from find_cached(); the table begins with them.
        """
        assert request_id not in self.block_tables, f"request {request_id} already has a block table"
        if self.num_blocks_needed(num_tokens, cached) > self.num_free_blocks:
            return False
        for block in cached:  # before new blocks are taken: one of these could be among them
            self._lease(block)
        self.block_tables[request_id] = [block.block_id for block in cached]
        return self.grow(request_id, num_tokens)

    def grow(self, request_id: str, num_tokens: int, num_reserved: int = 0) -> bool:
        """Append the blocks a request lacks for num_tokens tokens. If too few are free, append none, return False.

        num_reserved: how many blocks must stay free if any block is taken.
        """
        table = self.block_tables[request_id]
        num_new = self.num_blocks_for(num_tokens) - len(table)
        if num_new > 0 and num_new + num_reserved > self.num_free_blocks:
            return False
        for _ in range(num_new):
            block = self.free_queue.first
            self.uncache(block)
            self._lease(block)
            table.append(block.block_id)
        return True

    def cache_full_blocks(self, request: Request, num_tokens: int) -> range:
        """Make the full blocks of a request's first num_tokens tokens findable. Returns the indices of those that are
        full only now.

        If two blocks have the same content, only the first one can be found.
        """
        if not self.enable_prefix_caching:
            return range(0)
        hashes, table = self.hash_blocks(request), self.block_tables[request.request_id]
        full = range(request.num_cached_blocks, num_tokens // self.block_size)
        for index in full:
            block, block_hash = self.pool[table[index]], hashes[index]
            if block.block_hash is None and block_hash not in self.cached_blocks:
                block.block_hash = block_hash
                self.cached_blocks[block_hash] = block
            request.num_cached_blocks = index + 1
        return full

    def free(self, request_id: str) -> None:
        """Release a request's blocks. Does nothing if it has none.

        The last block is freed first, so that the end of a shared prefix is evicted before its beginning. Blocks that
        cannot be found are reused before those that can.
        """
        self.end_lease(self.block_tables.pop(request_id, []))

    def lease(self, block_ids: Sequence[int]) -> None:
        """Keep blocks from being reused while a copy reads or writes them, until end_lease()."""
        for block_id in block_ids:
            self._lease(self.pool[block_id])

    def end_lease(self, block_ids: Sequence[int]) -> None:
        """Remove a lease from each block, from the last one to the first. A block without any is free."""
        for block_id in reversed(block_ids):
            block = self.pool[block_id]
            block.ref_count -= 1
            if block.ref_count == 0:
                if block.block_hash is None:
                    self.free_queue.appendleft(block)
                else:
                    self.free_queue.append(block)

    def uncache(self, block: KVBlock) -> None:
        """Make a block unfindable: its content is about to be overwritten. Every eviction goes through here."""
        if block.block_hash is not None:
            del self.cached_blocks[block.block_hash]
            block.block_hash = None

    def reset(self) -> None:
        """Free all blocks of all requests, and uncache every block."""
        for request_id in list(self.block_tables):
            self.free(request_id)
        for block in list(self.cached_blocks.values()):
            self.uncache(block)

    def _lease(self, block: KVBlock) -> None:
        """Add a lease, of a block table or of a copy. A free block leaves the free queue."""
        if block.ref_count == 0:
            self.free_queue.remove(block)
        block.ref_count += 1


def hash_block(parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """SHA-256 over the parent's hash and this block's tokens: equal only if all tokens up to here are equal."""
    return hashlib.sha256(parent + array("I", token_ids).tobytes()).digest()
