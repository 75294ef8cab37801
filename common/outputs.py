"""What an engine answers, under vLLM's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """How likely a token was: the logarithm of its probability, and its rank among all tokens (1 is the likeliest)."""

    logprob: float
    rank: int


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One answer. token_ids holds every sampled token, the stop token too; text leaves the stop token out.

    stop_reason is the id from stop_token_ids or the stop string that ended the answer, None for the end-of-sequence
    token and for length. A stop string and what follows it is not in text either.
    logprobs, if asked for: one dict for each of token_ids, first the sampled token's Logprob, then those of the
    likeliest tokens (the sampled one may be among them; it stands in the dict once).
    num_cached_tokens: how many of the prompt's tokens were found in a cache instead of computed; None if there is no
    cache, or if an earlier output of the same answer has told.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    logprobs: list[dict[int, Logprob]] | None = None
    num_cached_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """The answers to one prompt."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool

    @property
    def usage(self) -> dict[str, int]:
        """Token counts as the OpenAI API reports them."""
        prompt, completion = len(self.prompt_token_ids), sum(len(output.token_ids) for output in self.outputs)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
