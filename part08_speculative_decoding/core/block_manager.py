"""Who owns which KV block, and what is still in those that nobody owns."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .free_queue import FreeBlockQueue, KVBlock
from .request import Request

NULL_BLOCK = 0  # never handed out: padding in block tables points here

BlockHash = bytes


@dataclass(frozen=True, slots=True)
class RegisteredBlock:
    """A block that a request fills, and the hash under which it can be found from now on."""

    request_id: str
    block_id: int
    block_hash: BlockHash


class BlockManager:
    """A pool of KV blocks of block_size tokens each, and a block table for every request that holds some.

    A full block is known by a hash of its tokens and all before them. It keeps what is in it when its last owner goes,
    until the block is needed for something else; who comes with the same beginning takes it over. After vLLM's
    KVCacheManager and BlockPool.

    Position p of a request lives in block table[p // block_size] at offset p % block_size. After every call
    num_used_blocks + num_free_blocks == num_blocks - 1 (the null block belongs to nobody).
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        assert num_blocks >= 2, f"a pool of {num_blocks} blocks has none to hand out beside the null block"
        self.num_blocks, self.block_size = num_blocks, block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.pool = [KVBlock(block_id) for block_id in range(num_blocks)]
        self.free_queue = FreeBlockQueue(self.pool[NULL_BLOCK + 1 :])
        self.block_tables: dict[str, list[int]] = {}
        self.cached_blocks: dict[BlockHash, KVBlock] = {}
        self._root = os.urandom(32)  # nobody outside can make two texts collide, or tell what is cached

    @property
    def num_free_blocks(self) -> int:
        return len(self.free_queue)

    @property
    def num_used_blocks(self) -> int:
        return self.num_blocks - 1 - self.num_free_blocks

    def num_blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold num_tokens tokens."""
        return -(-num_tokens // self.block_size)

    def hash_blocks(self, request: Request) -> list[BlockHash]:
        """The hashes of a request's full blocks, as far as its tokens are known. They are kept with the request."""
        hashes = request.block_hashes
        while (len(hashes) + 1) * self.block_size <= request.num_tokens:
            start = len(hashes) * self.block_size
            parent = hashes[-1] if hashes else self._first_parent(request.params.cache_salt)
            hashes.append(hash_block(parent, request.tokens_between(start, start + self.block_size)))
        return hashes

    def _first_parent(self, cache_salt: str | None) -> BlockHash:
        """What the first block's hash begins with. The salt is in all later ones through it."""
        return self._root if cache_salt is None else hashlib.sha256(self._root + cache_salt.encode()).digest()

    def find_cached(self, request: Request) -> list[KVBlock]:
        """The blocks of the longest beginning that is still there. At least one token is left to be computed."""
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
        """How many free blocks a new request takes: new ones, and those of its cached ones that nobody owns now."""
        return self.num_blocks_for(num_tokens) - sum(block.ref_count > 0 for block in cached)

    def allocate(
        self, request_id: str, num_tokens: int, cached: Sequence[KVBlock] = (), num_left_free: int = 0
    ) -> bool:
        """Give a request the blocks it lacks to hold num_tokens tokens: all of them, or none and False.

        cached: for a request without blocks, what find_cached() found; its table begins with them. num_left_free: how
        many have to stay free if any is taken.
        """
        table = self.block_tables.get(request_id, [])
        assert not (table and cached), f"request {request_id} has blocks already"
        num_taken = self.num_blocks_needed(num_tokens, cached) - len(table)
        if num_taken > 0 and num_taken + num_left_free > self.num_free_blocks:
            return False
        for block in cached:  # before new ones are taken, or one of these might be among them
            if block.ref_count == 0:
                self.free_queue.remove(block)
            block.ref_count += 1
        num_new = self.num_blocks_for(num_tokens) - len(table) - len(cached)
        new = [self._take_free_block() for _ in range(num_new)]
        self.block_tables[request_id] = table + [block.block_id for block in (*cached, *new)]
        return True

    def _take_free_block(self) -> KVBlock:
        """The free block that was used longest ago. What was in it can no longer be found."""
        block = self.free_queue.popleft()
        self._forget_hash(block)
        block.ref_count = 1
        return block

    def register(self, request: Request, num_tokens: int) -> list[RegisteredBlock]:
        """Make the full blocks among a request's first num_tokens tokens findable. Returns those that were not before.

        Of two blocks with the same content, the first stays the one that is found.
        """
        registered: list[RegisteredBlock] = []
        if not self.enable_prefix_caching:
            return registered
        hashes, table = self.hash_blocks(request), self.block_tables[request.request_id]
        for index in range(request.num_registered_blocks, num_tokens // self.block_size):
            block, block_hash = self.pool[table[index]], hashes[index]
            if block.block_hash is None and block_hash not in self.cached_blocks:
                block.block_hash = block_hash
                self.cached_blocks[block_hash] = block
                registered.append(RegisteredBlock(request.request_id, block.block_id, block_hash))
            request.num_registered_blocks = index + 1
        return registered

    def free(self, request_id: str) -> None:
        """A request gives up its blocks. One that holds none is no error.

        The last block goes first, so that of a beginning that many share the end is forgotten before the start. Blocks
        that cannot be found are used again before any that can.
        """
        for block_id in reversed(self.block_tables.pop(request_id, [])):
            block = self.pool[block_id]
            block.ref_count -= 1
            if block.ref_count == 0:
                if block.block_hash is None:
                    self.free_queue.appendleft(block)
                else:
                    self.free_queue.append(block)

    def forget(self, registered: Iterable[RegisteredBlock]) -> set[str]:
        """These blocks were never written: nobody may find them. Returns the requests that have found them already."""
        blocks = [self.pool[r.block_id] for r in registered if self.pool[r.block_id].block_hash == r.block_hash]
        for block in blocks:
            self._forget_hash(block)
        unwritten = {block.block_id for block in blocks}
        return {request_id for request_id, table in self.block_tables.items() if unwritten.intersection(table)}

    def reset(self) -> bool:
        """Forget all that is cached. False, and nothing is forgotten, while blocks are in use."""
        if self.num_used_blocks:
            return False
        for block in list(self.cached_blocks.values()):
            self._forget_hash(block)
        return True

    def slot(self, request_id: str, position: int) -> int:
        """Where the key and value of a position go: block · block_size + offset."""
        table = self.block_tables[request_id]
        return table[position // self.block_size] * self.block_size + position % self.block_size

    def _forget_hash(self, block: KVBlock) -> None:
        if block.block_hash is not None:
            del self.cached_blocks[block.block_hash]
            block.block_hash = None


def hash_block(parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """SHA-256 over the hash of the block before and this block's tokens: equal only if all tokens up to here are."""
    return hashlib.sha256(parent + array("I", token_ids).tobytes()).digest()
