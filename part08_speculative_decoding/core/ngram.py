"""Guessing by looking back: what followed the first time the text ended like this."""

from __future__ import annotations

from collections.abc import Iterable

from .block_manager import BlockManager
from .request import Request


class NgramIndex:
    """Where each run of min_n to max_n tokens of a text was first followed by another token. It grows with the text."""

    def __init__(self, min_n: int, max_n: int) -> None:
        self.min_n, self.max_n = min_n, max_n
        self.token_ids: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}  # the run → the position of what followed

    def extend(self, token_ids: Iterable[int]) -> None:
        """Append tokens. Each costs a look at max_n - min_n + 1 runs, however long the text is."""
        # exercise: extend
        for token_id in token_ids:
            end = len(self.token_ids)  # the runs that end here are followed by this token
            for n in range(self.min_n, min(self.max_n, end) + 1):
                self._next.setdefault(tuple(self.token_ids[end - n : end]), end)
            self.token_ids.append(token_id)
        # exercise: end

    def propose(self, num_tokens: int) -> list[int]:
        """Up to num_tokens tokens that followed the first occurrence of the longest run with which the text ends."""
        # exercise: propose
        for n in range(min(self.max_n, len(self.token_ids)), self.min_n - 1, -1):
            position = self._next.get(tuple(self.token_ids[-n:]))
            if position is not None:
                return self.token_ids[position : position + num_tokens]
        return []
        # exercise: end


class NgramProposer:
    """Prompt lookup (Saxena, 2023; vLLM's NgramProposer): costs next to nothing, and is right where text repeats."""

    def __init__(self, min_n: int, max_n: int) -> None:
        self.min_n, self.max_n = min_n, max_n
        self._indexes: dict[str, NgramIndex] = {}

    def propose(self, requests: list[Request], counts: list[int], blocks: BlockManager) -> None:
        """Set draft_token_ids of each request. counts: how many tokens for each, at most."""
        del blocks  # looking back needs no memory
        for request, count in zip(requests, counts, strict=True):
            index = self._indexes.setdefault(request.request_id, NgramIndex(self.min_n, self.max_n))
            index.extend(request.tokens_between(len(index.token_ids), request.num_tokens))
            request.draft_token_ids = index.propose(count)

    def release(self, request_ids: Iterable[str]) -> None:
        """Forget requests. One that is not known is no error."""
        for request_id in request_ids:
            self._indexes.pop(request_id, None)
