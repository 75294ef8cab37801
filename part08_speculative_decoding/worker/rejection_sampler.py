"""Judging guesses so that the answer is distributed exactly as without them."""

from __future__ import annotations

import torch
from torch import Tensor


def count_accepted(is_right: Tensor, num_drafts: Tensor) -> Tensor:
    """How many guesses stand: those before the first wrong one. is_right: [batch, k], bool; num_drafts: [batch]."""
    exists = torch.arange(is_right.shape[1], device=is_right.device) < num_drafts.unsqueeze(1)
    return (is_right & exists).long().cumprod(dim=1).sum(dim=1)


def rejection_sample(
    target_probs: Tensor, draft_probs: Tensor, draft_ids: Tensor, num_drafts: Tensor, uniform: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Speculative sampling (Leviathan et al., 2023; Chen et al., 2023).

    target_probs: [batch, k + 1, vocab_size], p at each guess's place and after the last, not necessarily normalised to
    1 exactly; draft_probs: [batch, k, vocab_size], q, from which draft_ids: [batch, k] were drawn; num_drafts: [batch],
    how many of the k are guesses; uniform: [batch, k] from [0, 1); noise: [batch, vocab_size] from Exp(1).
    Returns (how many guesses stand: [batch], the token after them: [batch]).

    A guess d stands with probability min(1, p(d) / q(d)). In place of the first that does not, a token is drawn from
    max(p - q, 0): what p has more than q. If all stand, one more is drawn from p.
    """
    # exercise: rejection_sample
    p = target_probs[:, :-1].gather(2, draft_ids.unsqueeze(2)).squeeze(2)
    q = draft_probs.gather(2, draft_ids.unsqueeze(2)).squeeze(2)
    num_accepted = count_accepted((q > 0) & (uniform * q < p), num_drafts)
    rows = torch.arange(len(num_accepted), device=num_accepted.device)
    after = target_probs[rows, num_accepted]
    if draft_probs.shape[1]:
        was_rejected = (num_accepted < num_drafts).unsqueeze(1)
        rejected_q = draft_probs[rows, num_accepted.clamp(max=draft_probs.shape[1] - 1)]
        after = torch.where(was_rejected, (after - rejected_q).clamp(min=0), after)
    return num_accepted, (after / noise).argmax(dim=-1)
    # exercise: end
