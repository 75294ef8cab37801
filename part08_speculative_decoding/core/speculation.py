"""How many tokens to guess: as many as pay, down to none."""

from __future__ import annotations

from dataclasses import dataclass, field

from .request import Request

SMOOTHING = 0.2  # weight of the newest step in a request's acceptance
MIN_PROBABILITY = 0.35  # a guess that stands less often is not worth a row of the step
PROBE_INTERVAL = 16  # tokens after which a request whose guesses fail is given another chance


@dataclass(slots=True)
class SpeculationStats:
    """num_drafts counts steps with guesses, num_accepted_at[i] how often guess i stood. Names after vLLM's metrics."""

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_at: list[int] = field(default_factory=list)

    def add(self, num_draft_tokens: int, num_accepted: int) -> None:
        """A request's guesses of one step were judged. None is no step with guesses."""
        if not num_draft_tokens:
            return
        self.num_drafts += 1
        self.num_draft_tokens += num_draft_tokens
        self.num_accepted_tokens += num_accepted
        self.num_accepted_at += [0] * (num_draft_tokens - len(self.num_accepted_at))
        for position in range(num_accepted):
            self.num_accepted_at[position] += 1


class Speculation:
    """The number of guesses for each request, from how many of its guesses stood and from how many requests run.

    A guess costs a row of the step whether it stands or not. Alone, a request leaves the device half idle, and rows are
    nearly free; in a large batch they are not.
    """

    def __init__(self, num_speculative_tokens: int, max_num_seqs: int) -> None:
        self.num_speculative_tokens, self.max_num_seqs = num_speculative_tokens, max_num_seqs
        self.stats = SpeculationStats()

    def num_tokens(self, request: Request, num_running: int) -> int:
        """How many tokens to guess for a request in the next step."""
        # exercise: num_tokens
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
        # exercise: end

    def judged(self, request: Request, num_drafts: int, num_accepted: int) -> None:
        """Learn from a step. Guesses behind the first wrong one say nothing."""
        # exercise: judged
        self.stats.add(num_drafts, num_accepted)
        if num_drafts:
            num_judged = min(num_accepted + 1, num_drafts)
            request.acceptance += SMOOTHING * (num_accepted / num_judged - request.acceptance)
        # exercise: end
