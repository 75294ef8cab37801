"""What is new in a step, so that a trace does not repeat what is in earlier lines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


class StepDeltas:
    """Remembers what a trace already has of each request, of the queue and of the prefix cache."""

    def __init__(self) -> None:
        self._num_blocks: dict[str, int] = {}
        self._waiting = frozenset[str]()
        self._cached = frozenset[int]()

    def of_request(self, request_id: str, block_table: Sequence[int], prompt_token_ids: list[int]) -> dict[str, Any]:
        """Fields of RequestTrace. The prompt is left out if the trace has it."""
        num_known = self._num_blocks.get(request_id)
        self._num_blocks[request_id] = len(block_table)
        return {
            "num_blocks": len(block_table), "new_block_ids": list(block_table[num_known or 0 :]),
            "prompt_token_ids": prompt_token_ids if num_known is None else [],
        }  # fmt: skip

    def forget(self, request_ids: Iterable[str]) -> None:
        """These requests have lost their blocks: they were preempted, or have ended."""
        for request_id in request_ids:
            self._num_blocks.pop(request_id, None)

    def queued(self, waiting: Sequence[str]) -> list[str]:
        """Those that did not wait at the last call."""
        new = [request_id for request_id in waiting if request_id not in self._waiting]
        self._waiting = frozenset(waiting)
        return new

    def cached(self, block_ids: Iterable[int]) -> tuple[list[int], list[int]]:
        """block_ids: all blocks that are in the prefix cache now. Returns those that were not in it at the last call,
        and those that were and no longer are."""
        before, self._cached = self._cached, frozenset(block_ids)
        return sorted(self._cached - before), sorted(before - self._cached)

    def forget_cached(self) -> None:
        """The trace has no cached blocks."""
        self._cached = frozenset()
