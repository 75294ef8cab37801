"""Log probabilities of a prompt's own tokens, for requests that ask for them (vLLM's prompt_logprobs)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..messages import PromptLogprobs, ScheduledRequest
from .request_states import RequestStates
from .sampler import LogprobsTensors, to_logprobs


@dataclass(frozen=True, slots=True)
class PromptSpan:
    """Tokens of a step that are each followed by another prompt token: their logits show how likely that token was.

    index: the request's index in the step. start: the index of the first of these tokens in the step. position: the
    position in the request of the token after it. num_top: how many of the likeliest tokens to report with each.
    """

    index: int
    start: int
    num_tokens: int
    position: int
    num_top: int


def prompt_spans(requests: Sequence[ScheduledRequest], states: RequestStates, max_tokens: int) -> list[PromptSpan]:
    """The spans of requests that ask, in pieces of at most max_tokens, since a row of logits covers the vocabulary."""
    spans, start = [], 0
    for index, request in enumerate(requests):
        num_top, first = states.params[request.row].prompt_logprobs, request.num_computed_tokens
        end = min(first + request.num_scheduled_tokens, states.num_prompt_tokens[request.row] - 1)
        if num_top is not None:
            spans += [
                PromptSpan(index, start + at - first, min(max_tokens, end - at), at + 1, num_top)
                for at in range(first, end, max_tokens)
            ]
        start += request.num_scheduled_tokens
    return spans


def to_prompt_logprobs(span: PromptSpan, logprobs: LogprobsTensors) -> PromptLogprobs:
    """A span's log probabilities as plain data."""
    rows = [to_logprobs(*row, span.num_top) for row in logprobs.tolist()]
    return PromptLogprobs(span.index, span.position, rows)
