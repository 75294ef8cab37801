"""A map of the KV pool: which slots are used, which are reserved and empty, and which request owns them."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.engine import LLMEngine


@dataclass(frozen=True, slots=True)
class Cell:
    """Some consecutive slots of one block: the number of the request that owns them, and how many hold a token."""

    owner: int
    num_used: int


def memory_map(engine: LLMEngine, slots_per_cell: int) -> list[Cell | None]:
    """The pool in order of its blocks, without the null block; None for free slots."""
    blocks, cells_per_block = engine.blocks, engine.blocks.block_size // slots_per_cell
    cells: list[Cell | None] = [None] * (blocks.num_blocks * cells_per_block)
    for request in engine.running:
        num_stored = request.num_tokens - 1  # the next step computes the newest token's key and value
        for i, block in enumerate(blocks.block_tables[request.request_id]):
            for j in range(cells_per_block):
                first = i * blocks.block_size + j * slots_per_cell
                used = min(max(num_stored - first, 0), slots_per_cell)
                cells[block * cells_per_block + j] = Cell(int(request.request_id), used)
    return cells[cells_per_block:]


def num_slots(engine: LLMEngine) -> tuple[int, int]:
    """Slots that hold a token, and slots that are reserved."""
    used = sum(request.num_tokens - 1 for request in engine.running)
    return used, engine.blocks.num_used_blocks * engine.blocks.block_size
