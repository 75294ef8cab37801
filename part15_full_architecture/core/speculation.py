"""How many draft tokens a request gets: as many as pay off, possibly none."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..config import EngineConfig
from .ngram import NgramIndex
from .request import Request

SMOOTHING = 0.2  # weight of the newest step in a request's acceptance rate
MIN_PROBABILITY = 0.35  # a draft token that is accepted less often is not worth computing
PROBE_INTERVAL = 16  # a request whose draft tokens are rejected tries one again after this many tokens


@dataclass(slots=True)
class SpeculationStats:
    """Counters under vLLM's names. num_drafts: steps with draft tokens, counted for each request."""

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_tokens_per_pos: list[int] = field(default_factory=list)

    def add(self, num_draft_tokens: int, num_accepted: int) -> None:
        """Count the verified draft tokens of one request in one step."""
        if not num_draft_tokens:
            return
        self.num_drafts += 1
        self.num_draft_tokens += num_draft_tokens
        self.num_accepted_tokens += num_accepted
        self.num_accepted_tokens_per_pos += [0] * (num_draft_tokens - len(self.num_accepted_tokens_per_pos))
        for position in range(num_accepted):
            self.num_accepted_tokens_per_pos[position] += 1


class Speculation:
    """Chooses the number of draft tokens per request, from its acceptance rate and the number of running requests.

    A draft token costs as much as any token, whether it is accepted or not. A single request leaves most of the device
    idle, so extra tokens are almost free; in a large batch they are not.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.method = config.speculative_method
        self.num_speculative_tokens = 0 if self.method == "none" else config.num_speculative_tokens
        self.max_num_seqs = config.speculative_max_num_seqs
        self.ngram_sizes = config.prompt_lookup_min, config.prompt_lookup_max
        self.stats = SpeculationStats()

    def num_tokens(self, request: Request, num_running: int) -> int:
        """How many draft tokens a request should get in its next step."""
        if num_running > self.max_num_seqs:
            return 0
        num_tokens, probability = 0, request.acceptance
        while num_tokens < self.num_speculative_tokens and probability >= MIN_PROBABILITY:
            num_tokens += 1
            probability *= request.acceptance
        num_output_tokens = request.num_expected_tokens - len(request.prompt_token_ids)
        if num_tokens == 0 and num_output_tokens % PROBE_INTERVAL == 0:
            return min(1, self.num_speculative_tokens)
        return num_tokens

    def verified(self, request: Request, num_draft_tokens: int, num_accepted: int) -> None:
        """Update the acceptance rate after a step. Draft tokens after the first rejected one do not count."""
        self.stats.add(num_draft_tokens, num_accepted)
        if num_draft_tokens:
            num_verified = min(num_accepted + 1, num_draft_tokens)
            request.acceptance += SMOOTHING * (num_accepted / num_verified - request.acceptance)

    def look_up(self, request: Request, num_running: int) -> list[int]:
        """Draft tokens from n-gram lookup in the request's known tokens; none if another method proposes them."""
        num_tokens = self.num_tokens(request, num_running) if self.method == "ngram" else 0
        if not num_tokens:
            return []
        if request.ngram_index is None:
            request.ngram_index = NgramIndex(*self.ngram_sizes)
        index = request.ngram_index
        index.extend(request.tokens_between(len(index.token_ids), request.num_tokens))
        return index.propose(num_tokens)
