"""Expert parallelism: each rank has some of the experts. Tokens travel to the ranks of their experts, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .parallel import ParallelGroup


class Placement:
    """Which slots have which expert. A rank has equally many slots, numbered rank by rank; an expert has one or more.

    experts: of each slot. num_experts: different ones.
    """

    def __init__(self, experts: Sequence[int], num_experts: int, device: str | torch.device = "cpu") -> None:
        self.experts = list(experts)
        slots_of = [[slot for slot, held in enumerate(experts) if held == expert] for expert in range(num_experts)]
        assert all(slots_of), f"an expert has no slot: {slots_of}"
        most = max(len(slots) for slots in slots_of)
        padded = [slots + [-1] * (most - len(slots)) for slots in slots_of]
        self.slots = torch.tensor(padded, device=device)  # [num_experts, most]
        self.num_copies = torch.tensor([len(slots) for slots in slots_of], device=device)

    @classmethod
    def in_order(cls, num_slots: int, num_experts: int) -> Placement:
        """As at the start: all experts in turn, over and over."""
        return cls([slot % num_experts for slot in range(num_slots)], num_experts)

    def choose(self, expert_ids: Tensor, first: int = 0) -> Tensor:
        """A slot for each expert of each token; tokens take the copies of an expert in turn.

        expert_ids: [n, top_k], int64. first: which copy is first; each rank begins with another one. Returns the shape
        of expert_ids.
        """
        turn = first + torch.arange(len(expert_ids), device=expert_ids.device).unsqueeze(1)
        return self.slots[expert_ids, turn % self.num_copies[expert_ids]]


def plan_dispatch(ranks: Tensor, num_ranks: int) -> tuple[Tensor, Tensor]:
    """Which tokens go where. A token is sent to a rank once, however many of its experts are there.

    ranks: [n, top_k], int64, where each token's experts are. Returns the tokens to send, [num_rows], those for rank 0
    first, each rank's in order; and how many there are for each rank, [num_ranks].
    """
    is_needed = F.one_hot(ranks, num_ranks).any(dim=1)  # [n, num_ranks]
    _, tokens = is_needed.t().nonzero(as_tuple=True)
    return tokens, is_needed.sum(dim=0)


def combine(outputs: Tensor, tokens: Tensor, num_tokens: int) -> Tensor:
    """Add up what came back for each token.

    outputs: [num_rows, hidden_size], in the order in which plan_dispatch's tokens were sent. Returns [num_tokens,
    hidden_size].
    """
    combined = torch.zeros(num_tokens, outputs.shape[1], dtype=outputs.dtype, device=outputs.device)
    return combined.index_add_(0, tokens, outputs)


class RoundTrip:
    """Tokens of this rank, on their way to the ranks of their experts and back. On all ranks, these steps come in turn:
    the exchange of counts, dispatch, receive, send_back, finish.

    hidden: [n, hidden_size]. slots: [n, top_k], int64, on all ranks, num_slots on each. weights: [n, top_k].
    counts: [size], how many tokens go to each rank.
    """

    def __init__(self, group: ParallelGroup, num_slots: int, hidden: Tensor, slots: Tensor, weights: Tensor) -> None:
        self.group, self.num_slots = group, num_slots
        self.columns = (hidden, slots, weights)
        self.tokens, self.counts = plan_dispatch(slots // num_slots, group.size)

    def dispatch(self, num_received: list[int]) -> None:
        """num_received: how many tokens come from each rank."""
        self.num_sent, self.num_received = self.counts.tolist(), num_received
        rows = pack_rows(*(column[self.tokens] for column in self.columns))
        self.transfer = self.group.all_to_all(rows, self.num_sent, num_received)

    def receive(self) -> tuple[Tensor, Tensor, Tensor]:
        """What came from all ranks: hidden, slots of this rank (-1: another one's), weights."""
        hidden, slots, weights = unpack_rows(self.transfer.wait(), *self.columns)
        own_slots = slots - self.group.rank * self.num_slots
        is_own = (own_slots >= 0) & (own_slots < self.num_slots)
        return hidden, own_slots.where(is_own, -1), weights

    def send_back(self, outputs: Tensor) -> None:
        """outputs: [num_rows, hidden_size], of the rows received."""
        self.transfer = self.group.all_to_all(outputs, self.num_received, self.num_sent)

    def finish(self) -> Tensor:
        """The tokens' outputs: [n, hidden_size]."""
        return combine(self.transfer.wait(), self.tokens, len(self.columns[0]))


def pack_rows(*columns: Tensor) -> Tensor:
    """Tensors of n rows each as one tensor of bytes, so that they travel together: [n, num_bytes], uint8."""
    return torch.cat([column.contiguous().view(torch.uint8) for column in columns], dim=1)


def unpack_rows(packed: Tensor, *like: Tensor) -> list[Tensor]:
    """What pack_rows has packed. like: tensors of the same dtypes and numbers of columns."""
    sizes = [column.shape[1] * column.element_size() for column in like]
    parts = packed.split(sizes, dim=1)
    return [
        part.clone(memory_format=torch.contiguous_format).view(column.dtype)
        for part, column in zip(parts, like, strict=True)
    ]


def share_of(num_tokens: int, group: ParallelGroup) -> slice:
    """The tokens that this rank sends, of those that all ranks of its tensor-parallel group have."""
    size = -(-num_tokens // group.size)
    return slice(min(group.rank * size, num_tokens), min((group.rank + 1) * size, num_tokens))
