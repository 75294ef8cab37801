"""Verification of draft tokens: the output has exactly the same distribution as without them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .device import to_device


@dataclass(frozen=True, slots=True)
class SpecDecodeMetadata:
    """A step's draft tokens, by sampled request (vLLM's name).

    first_rows: where each request's rows of logits begin; row first_rows[i] + j verifies draft token j, and one row
    follows after the last. num_draft_tokens: of each request. draft_token_ids: [num_requests, k], padded. random: the
    requests whose draft tokens were drawn at random, and buffer_rows: where the draft model keeps their probabilities.
    """

    first_rows: list[int]
    num_draft_tokens: list[int]
    draft_token_ids: Tensor
    random: list[int]
    buffer_rows: list[int]


def verify_drafts(spec: SpecDecodeMetadata, token_ids: Tensor) -> Tensor:
    """How many draft tokens of each request are accepted: those that equal the tokens sampled in their rows.

    token_ids: [num_rows], the sampled ones. Returns [num_requests]. A draft token d is accepted with probability p(d),
    and the token sampled instead of a rejected one is already correct: it is drawn from p, given that it is not d.
    """
    device, num_drafts = token_ids.device, to_device(spec.num_draft_tokens, token_ids.device)
    rows = to_device(spec.first_rows, device).unsqueeze(1) + torch.arange(spec.draft_token_ids.shape[1], device=device)
    is_right = token_ids[rows.clamp(max=len(token_ids) - 1)] == spec.draft_token_ids
    return count_accepted(is_right, num_drafts)


def verify_random_drafts(
    spec: SpecDecodeMetadata, drawn: Sequence[int], probs: Tensor, draft_probs: Tensor, token_ids: Tensor,
    num_accepted: Tensor, generator: torch.Generator | None = None,
) -> None:  # fmt: skip
    """Rejection sampling for requests whose draft tokens were drawn at random. It accepts more than verify_drafts.

    probs: [len(drawn), vocab_size], the target's, of the rows that were drawn. draft_probs: [max_num_seqs, k,
    vocab_size], the draft model's. token_ids: [num_rows] and num_accepted: [num_requests] are changed in place.
    """
    device, index_of = token_ids.device, {row: index for index, row in enumerate(drawn)}
    counts = [spec.num_draft_tokens[request] for request in spec.random]
    firsts, k = [spec.first_rows[request] for request in spec.random], max(counts)
    padded = [[index_of[f + min(i, n)] for i in range(k + 1)] for f, n in zip(firsts, counts, strict=True)]
    requests, p = to_device(spec.random, device), probs[to_device(padded, device)]
    drafts, q = spec.draft_token_ids[requests, :k], draft_probs[to_device(spec.buffer_rows, device), :k]
    p, uniform = p / p.sum(dim=-1, keepdim=True), torch.rand(drafts.shape, device=device, generator=generator)
    noise = torch.empty_like(p[:, 0]).exponential_(generator=generator)
    accepted, after = rejection_sample(p, q, drafts, to_device(counts, device), uniform, noise)
    num_accepted[requests] = accepted
    is_after = torch.arange(k + 1, device=device) == accepted.unsqueeze(1)
    chosen = torch.where(is_after, after.unsqueeze(1), torch.cat((drafts, drafts[:, :1]), dim=1))
    cells = [(f + i, index, i) for index, (f, n) in enumerate(zip(firsts, counts, strict=True)) for i in range(n + 1)]
    rows, indices, columns = (to_device(values, device) for values in zip(*cells, strict=True))
    token_ids[rows] = chosen[indices, columns]


def count_accepted(is_right: Tensor, num_drafts: Tensor) -> Tensor:
    """How many draft tokens come before the first wrong one. is_right: [batch, k], bool; num_drafts: [batch]."""
    exists = torch.arange(is_right.shape[1], device=is_right.device) < num_drafts.unsqueeze(1)
    return (is_right & exists).long().cumprod(dim=1).sum(dim=1)


def rejection_sample(
    target_probs: Tensor, draft_probs: Tensor, draft_ids: Tensor, num_drafts: Tensor, uniform: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Speculative sampling (Leviathan et al., 2023; Chen et al., 2023).

    target_probs: [batch, k + 1, vocab_size], p at each draft token and after the last; draft_probs: [batch, k,
    vocab_size], q, from which draft_ids: [batch, k] were drawn; num_drafts: [batch], how many of the k count; uniform:
    [batch, k] from [0, 1); noise: [batch, vocab_size] from Exp(1).
    Returns (how many draft tokens are accepted: [batch], the token after them: [batch]).

    A draft token d is accepted with probability min(1, p(d) / q(d)). The first rejected one is replaced by a token
    drawn from max(p - q, 0), normalized. If all are accepted, one more token is drawn from p. It is drawn from p, too,
    if max(p - q, 0) is 0 everywhere, because p and q differ only by rounding. NaN in q counts as 0: a broken draft
    model costs speed but changes no answer.
    """
    draft_probs = draft_probs.nan_to_num(nan=0.0)
    p = target_probs[:, :-1].gather(2, draft_ids.unsqueeze(2)).squeeze(2)
    q = draft_probs.gather(2, draft_ids.unsqueeze(2)).squeeze(2)
    num_accepted = count_accepted((q > 0) & (uniform * q < p), num_drafts)
    rows = torch.arange(len(num_accepted), device=num_accepted.device)
    after = target_probs[rows, num_accepted]
    if draft_probs.shape[1]:
        rejected_q = draft_probs[rows, num_accepted.clamp(max=draft_probs.shape[1] - 1)]
        residual = (after - rejected_q).clamp(min=0)
        is_used = (num_accepted < num_drafts) & (residual.sum(dim=-1) > 0)
        after = torch.where(is_used.unsqueeze(1), residual, after)
    return num_accepted, (after / noise).argmax(dim=-1)
