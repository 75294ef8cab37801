"""How many rows a dispatch sends: once for each rank, as here, or once for each expert."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import Any

import torch
from torch import Tensor

from ..worker.expert_parallel import plan_dispatch
from ..worker.model import DecoderModel
from .expert_map import count_experts


def dispatched_rows(model: DecoderModel, prompts: Sequence[list[int]], num_ranks: int) -> tuple[int, int]:
    """Rows that leave their rank, if each rank has equally many tokens: sent once for each rank, and for each expert.

    Tokens take turns on the ranks.
    """
    per_rank = per_expert = 0

    def note(module: Any, args: Any, output: tuple[Tensor, Tensor]) -> None:
        nonlocal per_rank, per_expert
        ranks = output[1] // (module.weight.shape[0] // num_ranks)
        own = torch.arange(len(ranks)) % num_ranks
        per_expert += int((ranks != own[:, None]).sum())
        for rank in range(num_ranks):
            _, counts = plan_dispatch(ranks[own == rank], num_ranks)
            per_rank += int(counts.sum() - counts[rank])

    hooks = [mixture.gate.register_forward_hook(note) for mixture in model.mixtures]
    count_experts(model, prompts)
    for hook in hooks:
        hook.remove()
    return per_rank, per_expert


def expected_share(num_experts: int, top_k: int, num_ranks: int) -> float:
    """Rows sent for each rank, relative to rows sent for each expert, if all sets of top_k experts are equally likely.

    A rank is not needed if all top_k experts are among the other ranks' ones.
    """
    elsewhere = num_experts - num_experts // num_ranks
    is_needed = 1 - comb(elsewhere, top_k) / comb(num_experts, top_k)
    return num_ranks * is_needed / top_k
