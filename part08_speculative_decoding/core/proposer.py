"""Who guesses the next tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from .block_manager import BlockManager
from .request import Request


class Proposer(Protocol):
    """Guesses what comes next, for requests whose tokens are all known."""

    def propose(self, requests: list[Request], counts: list[int], blocks: BlockManager) -> None:
        """Set draft_token_ids of each request, and draft_probs where the guesses are drawn from a distribution.

        counts: how many tokens for each, at least 1; fewer, or none, may be proposed. The blocks of each request hold
        all its tokens and guesses but the last.
        """
        ...

    def release(self, request_ids: Iterable[str]) -> None:
        """Forget requests: they have ended, or lost their blocks. One that is not known is no error."""
        ...
