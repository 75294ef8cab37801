"""Which KV blocks are in host memory, and which of them must stay."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from .block_manager import BlockHash


@dataclass(slots=True)
class HostBlock:
    """A block in a slot of host memory. is_ready: its content has arrived. num_loads: copies to the device that read it
    now."""

    slot: int
    is_ready: bool = False
    num_loads: int = 0


@dataclass(frozen=True, slots=True)
class HostStore:
    """Blocks that will be copied to host memory. slots: one for each hash. evicted: what had to leave for them."""

    hashes: list[BlockHash]
    slots: list[int]
    evicted: list[BlockHash]


class HostBlocks:
    """The blocks in host memory, each in a slot, the least recently used first. Modeled on vLLM's CPUOffloadingManager.

    A copy has two ends. prepare_store() gives blocks their slots, and complete_store() says that their content is
    there. prepare_load() keeps blocks in their slots until complete_load(). A block that isn't ready, or that is being
    loaded, is never evicted.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.blocks: OrderedDict[BlockHash, HostBlock] = OrderedDict()
        self.free_slots = deque(range(num_slots))

    def is_ready(self, block_hash: BlockHash) -> bool:
        block = self.blocks.get(block_hash)
        return block is not None and block.is_ready

    def lookup(self, hashes: Sequence[BlockHash]) -> int:
        """How many of the first hashes are ready, without a gap."""
        for number, block_hash in enumerate(hashes):
            if not self.is_ready(block_hash):
                return number
        return len(hashes)

    def touch(self, hashes: Sequence[BlockHash]) -> None:
        """Blocks have been used. The first one becomes the most recent, so the end of a prefix is evicted first."""
        for block_hash in reversed(hashes):
            if block_hash in self.blocks:
                self.blocks.move_to_end(block_hash)

    def prepare_store(self, hashes: Sequence[BlockHash], prefix: Sequence[BlockHash] = ()) -> HostStore | None:
        """Give a slot to each block that has none, and evict others if necessary: none of `hashes`, and none of
        `prefix`, the request's other blocks.

        Returns None, and evicts nothing, if there is not enough room.
        """
        new = [block_hash for block_hash in hashes if block_hash not in self.blocks]
        num_evicted = max(0, len(new) - len(self.free_slots))
        victims = self._choose_victims(num_evicted, protected=frozenset((*hashes, *prefix)))
        if len(victims) < num_evicted:
            return None
        for block_hash in victims:
            self.free_slots.append(self.blocks.pop(block_hash).slot)
        for block_hash in new:
            self.blocks[block_hash] = HostBlock(self.free_slots.popleft())
        return HostStore(new, [self.blocks[block_hash].slot for block_hash in new], victims)

    def _choose_victims(self, count: int, protected: frozenset[BlockHash]) -> list[BlockHash]:
        """Up to `count` blocks that may be evicted, the least recently used first."""
        victims = list[BlockHash]()
        for block_hash, block in self.blocks.items():
            if len(victims) == count:
                break
            if block.is_ready and not block.num_loads and block_hash not in protected:
                victims.append(block_hash)
        return victims

    def complete_store(self, hashes: Sequence[BlockHash], success: bool = True) -> None:
        """The content of blocks has arrived. If it hasn't, their slots are free again."""
        for block_hash in hashes:
            block = self.blocks[block_hash]
            assert not block.is_ready, f"block {block_hash.hex()[:8]} was complete already"
            if success:
                block.is_ready = True
            else:
                self.free_slots.append(self.blocks.pop(block_hash).slot)

    def prepare_load(self, hashes: Sequence[BlockHash]) -> list[int]:
        """The slots of ready blocks, which stay there until complete_load()."""
        for block_hash in hashes:
            assert self.is_ready(block_hash), f"block {block_hash.hex()[:8]} is not ready"
            self.blocks[block_hash].num_loads += 1
        return [self.blocks[block_hash].slot for block_hash in hashes]

    def complete_load(self, hashes: Sequence[BlockHash]) -> None:
        for block_hash in hashes:
            assert self.blocks[block_hash].num_loads > 0, f"block {block_hash.hex()[:8]} is not being loaded"
            self.blocks[block_hash].num_loads -= 1
