"""N-gram lookup: find the text's last few tokens earlier in the text, and propose the tokens that followed them."""

from __future__ import annotations

from collections.abc import Iterable


class NgramIndex:
    """For each run of min_n to max_n tokens in a growing text: the position that followed its first occurrence.

    Prompt lookup (Saxena, 2023; vLLM's NgramProposer): it costs almost nothing, and is right where text repeats.
    """

    def __init__(self, min_n: int, max_n: int) -> None:
        self.min_n, self.max_n = min_n, max_n
        self.token_ids: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}  # the run → the position of the token that followed

    def extend(self, token_ids: Iterable[int]) -> None:
        """Append tokens. Each costs max_n - min_n + 1 dictionary operations, however long the text is."""
        for token_id in token_ids:
            end = len(self.token_ids)  # the runs that end here are followed by this token
            for n in range(self.min_n, min(self.max_n, end) + 1):
                self._next.setdefault(tuple(self.token_ids[end - n : end]), end)
            self.token_ids.append(token_id)

    def propose(self, num_tokens: int) -> list[int]:
        """Up to num_tokens tokens: those after the first occurrence of the longest run that the text also ends with."""
        for n in range(min(self.max_n, len(self.token_ids)), self.min_n - 1, -1):
            position = self._next.get(tuple(self.token_ids[-n:]))
            if position is not None:
                return self.token_ids[position : position + num_tokens]
        return []
