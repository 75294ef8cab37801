"""From logits to token ids, for a whole batch at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.outputs import Logprob

from ..core.request import Request


@dataclass(frozen=True, slots=True)
class SamplerOutput:
    """One token id a request, and the log-probabilities of those that asked for them."""

    token_ids: list[int]
    logprobs: list[dict[int, Logprob] | None]


class Sampler:
    """Chooses one token for each row of logits. After vLLM's Sampler: log-probabilities are the raw model's; then
    logit_bias, penalties, min_tokens, temperature, top-k, top-p.

    eos_token_ids: the model's end-of-sequence tokens, which min_tokens holds back.
    """

    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self.eos_token_ids = eos_token_ids

    @torch.inference_mode()
    def sample(self, logits: Tensor, requests: list[Request]) -> SamplerOutput:
        """logits: [num_requests, vocab_size], float32; they are changed."""
        wants_logprobs = any(request.params.logprobs is not None for request in requests)
        raw_logprobs = logits.log_softmax(dim=-1) if wants_logprobs else None
        self._change_logits(logits, requests)
        token_ids = self._choose(logits, requests).tolist()
        if raw_logprobs is None:
            return SamplerOutput(token_ids, [None] * len(requests))
        logprobs = [
            None if request.params.logprobs is None else top_logprobs(row, token_id, request.params.logprobs)
            for row, token_id, request in zip(raw_logprobs, token_ids, requests, strict=True)
        ]
        return SamplerOutput(token_ids, logprobs)

    def _change_logits(self, logits: Tensor, requests: list[Request]) -> None:
        """What is asked for by few requests is done row by row."""
        for row, request in zip(logits, requests, strict=True):
            params = request.params
            for token_id, bias in params.logit_bias:
                row[token_id] += bias
            if params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty:
                apply_penalties(row, request)
            if len(request.output_token_ids) < params.min_tokens:
                held_back = set(params.stop_token_ids) | (set() if params.ignore_eos else self.eos_token_ids)
                row[list(held_back)] = -torch.inf

    def _choose(self, logits: Tensor, requests: list[Request]) -> Tensor:
        greedy = logits.argmax(dim=-1)
        drawn_rows = [row for row, request in enumerate(requests) if request.params.temperature > 0]
        if not drawn_rows:
            return greedy
        drawn = [requests[row] for row in drawn_rows]
        greedy[drawn_rows] = draw(probabilities(logits[drawn_rows], drawn), drawn)
        return greedy


def probabilities(logits: Tensor, requests: list[Request]) -> Tensor:
    """After temperature, top-k and top-p, not normalised again. logits: [num_requests, vocab_size]."""

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=logits.device).unsqueeze(1)

    vocab_size = logits.shape[-1]
    logits = logits / column([request.params.temperature for request in requests])
    top_k = [request.params.top_k or vocab_size for request in requests]
    top_p = [request.params.top_p for request in requests]
    if min(top_k) >= vocab_size and min(top_p) >= 1:
        return logits.softmax(dim=-1)
    ordered, order = logits.sort(dim=-1, descending=True)
    kth = ordered.gather(1, column(top_k).long().clamp(max=vocab_size) - 1)
    probs = ordered.masked_fill(ordered < kth, -torch.inf).softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs  # mass of the likelier tokens; 0 for the first, so it always stays
    probs = probs.masked_fill((before >= column(top_p)) & (column(top_p) < 1), 0)
    return torch.zeros_like(probs).scatter_(1, order, probs)


def draw(probs: Tensor, requests: list[Request]) -> Tensor:
    """One token a row: the largest of p / e, with e drawn from the exponential distribution, is distributed as p.

    Each seeded request draws from its own generator, so its tokens do not depend on its neighbours.
    """
    noise = torch.empty_like(probs).exponential_()
    for row, request in enumerate(requests):
        if request.generator is not None:
            noise[row].exponential_(generator=request.generator)
    return (probs / noise).argmax(dim=-1)


def apply_penalties(logits: Tensor, request: Request) -> None:
    """One row, in place. As in vLLM: repetition counts prompt and output, presence and frequency the output alone."""
    params = request.params
    seen = torch.tensor(sorted(set(request.token_ids)), device=logits.device)
    values = logits[seen]
    logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if request.output_token_ids:
        counts = torch.bincount(torch.tensor(request.output_token_ids, device=logits.device), minlength=len(logits))
        logits -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)


def top_logprobs(row: Tensor, token_id: int, num_top: int) -> dict[int, Logprob]:
    """The sampled token's first, then the num_top likeliest. row: [vocab_size], log-probabilities."""
    rank = int((row > row[token_id]).sum()) + 1
    found = {token_id: Logprob(float(row[token_id]), rank)}
    values, ids = row.topk(num_top)
    for position, (value, top_id) in enumerate(zip(values.tolist(), ids.tolist(), strict=True), start=1):
        found.setdefault(top_id, Logprob(value, position))
    return found
