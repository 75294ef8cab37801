"""The outputs of an engine, with vLLM's names."""

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
    """One answer. token_ids holds every sampled token, including the stop token; text does not include the stop token.

    stop_reason is the id from stop_token_ids or the stop string that ended the answer, None for the end-of-sequence
    token and for length. text also excludes a stop string and what follows it.
    logprobs, if requested: one dict per token in token_ids, with the sampled token first, then the likeliest tokens
    (the sampled token appears only once).
    num_cached_tokens: how many prompt tokens were found in the prefix cache; None without a prefix cache, or if an
    earlier output of the same answer has reported it. prompt_logprobs, if requested, is reported in the same way: one
    dict per prompt token, that token first; None for the first token, which nothing predicts.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    logprobs: list[dict[int, Logprob]] | None = None
    num_cached_tokens: int | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None


def join_outputs(outputs: list[CompletionOutput]) -> CompletionOutput:
    """Join the pieces of a stream into one answer."""
    logprobs = [entry for output in outputs for entry in output.logprobs or []]
    return CompletionOutput(
        index=0,
        text="".join(output.text for output in outputs),
        token_ids=[token_id for output in outputs for token_id in output.token_ids],
        finish_reason=outputs[-1].finish_reason,
        stop_reason=outputs[-1].stop_reason,
        logprobs=logprobs or None,
        num_cached_tokens=outputs[0].num_cached_tokens,
        prompt_logprobs=outputs[0].prompt_logprobs,
    )


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """The answers to one prompt."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool

    @property
    def prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None:
        """Those of each prompt token, if requested; None for the first one."""
        return self.outputs[0].prompt_logprobs

    @property
    def usage(self) -> dict[str, int]:
        """Token counts as the OpenAI API reports them."""
        prompt, completion = len(self.prompt_token_ids), sum(len(output.token_ids) for output in self.outputs)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
