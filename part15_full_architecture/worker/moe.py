"""A mixture of experts: for each token, a gate chooses a few of many small MLPs (Qwen2-MoE, Qwen3-MoE, Mixtral)."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.checkpoint_reader import CheckpointReader
from common.errors import FieldError

from .expert_parallel import Placement, RoundTrip, share_of
from .kernels.ops import Kernels
from .mlp import MLP
from .parallel import Groups, ParallelGroup, Shard
from .weight import Part, Weight

MOE_FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe")


def is_sparse(config: Any, layer: int) -> bool:
    """Whether a layer's feed-forward network is a mixture of experts."""
    if config.model_type not in MOE_FAMILIES:
        return False
    if config.model_type == "mixtral":
        return True
    return layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0


def num_experts(config: Any) -> int:
    return config.num_local_experts if config.model_type == "mixtral" else config.num_experts


class TopKGate(nn.Module):
    """Which experts a token goes to, and with which weights."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(num_experts(config), config.hidden_size))
        self.top_k = config.num_experts_per_tok
        self.is_normalized = config.model_type == "mixtral" or config.norm_topk_prob

    def load(self, reader: CheckpointReader, path: str) -> None:
        self.weight.copy_(reader.read(f"{stored(path, self.config)}.weight", tuple(self.weight.shape)))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The top_k experts with the highest probabilities, which are their weights; scaled to add up to 1 if
        is_normalized.

        hidden: [num_tokens, hidden_size]. Returns weights and expert ids (int64), both [num_tokens, top_k].
        """
        logits = F.linear(hidden, self.weight)
        probs = logits.softmax(dim=-1, dtype=torch.float32)
        weights, expert_ids = probs.topk(self.top_k, dim=-1)
        if self.is_normalized:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights.to(hidden.dtype), expert_ids


class Experts(nn.Module):
    """The experts of this rank. Each is an MLP like the dense one, down(silu(gate(x)) · up(x)), with a slot of the
    stacked weights.

    expert_ids: which expert each slot has. shard: this rank's part of each expert's intermediate_size. has_others:
    whether rows may also need experts of other ranks.
    """

    kernels = Kernels()

    def __init__(self, config: Any, expert_ids: list[int], shard: Shard, has_others: bool = False) -> None:
        super().__init__()
        self.config, self.expert_ids, self.shard, self.has_others = config, expert_ids, shard, has_others
        self.names = ("w1", "w3", "w2") if config.model_type == "mixtral" else ("gate_proj", "up_proj", "down_proj")
        self.gate_up = Weight(len(expert_ids), 2 * len(shard), config.hidden_size)
        self.down = Weight(len(expert_ids), config.hidden_size, len(shard))

    @property
    def tensors(self) -> list[Tensor]:
        """What there is for each slot: [num_slots, …]. The order of columns is the same for all."""
        return [parameter.data for name, parameter in self.named_parameters() if not name.endswith("order")]

    def load(self, reader: CheckpointReader, path: str) -> None:
        size, hidden_size, own = self.shard.total, self.config.hidden_size, len(self.shard)
        outer, inner = Part(size, hidden_size, rows=self.shard.slice), Part(hidden_size, size, columns=self.shard.slice)
        prefix = f"{stored(path, self.config)}."
        for expert in sorted(set(self.expert_ids)):
            gate, up, down = (f"{prefix}{expert}.{name}" for name in self.names)
            slots = [slot for slot, held in enumerate(self.expert_ids) if held == expert]
            self.gate_up.read(reader, gate, outer, (slots[0], slice(0, own)))
            self.gate_up.read(reader, up, outer, (slots[0], slice(own, 2 * own)))
            self.down.read(reader, down, inner, (slots[0],))
            for copy, tensor in product(slots[1:], self.tensors):
                tensor[copy] = tensor[slots[0]]
        others = {str(expert) for expert in range(num_experts(self.config)) if expert not in self.expert_ids}
        if others:  # which other ranks read
            reader.unread -= {
                name for name in reader.unread
                if name.startswith(prefix) and name.removeprefix(prefix).partition(".")[0] in others
            }  # fmt: skip

    def forward(self, hidden: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        """Each row through its experts on this rank, and their sum with its weights.

        hidden: [n, hidden_size]. slots: [n, top_k], int64, -1 for experts of other ranks. weights: [n, top_k]. Returns
        the shape of hidden.
        """
        by_slot = slots.flatten().argsort(stable=True)
        if self.has_others:
            by_slot = by_slot[int((slots < 0).sum()) :]  # which waits for the device
        rows, counts = by_slot // slots.shape[1], count(slots.flatten()[by_slot], len(self.expert_ids))
        activated = self.kernels.silu_and_mul(self.gate_up.grouped(hidden[rows], counts))
        outputs = self.down.grouped(activated, counts) * weights.flatten()[by_slot].unsqueeze(1)
        return torch.zeros_like(hidden).index_add_(0, rows, outputs)


class SharedExpert(MLP):
    """Qwen2-MoE's MLP for all tokens, weighted by a gate of its own."""

    def __init__(self, config: Any, group: ParallelGroup) -> None:
        name = "shared_expert_intermediate_size"
        super().__init__(config.hidden_size, getattr(config, name), False, group, name)
        self.gate = nn.Parameter(torch.empty(1, config.hidden_size))

    def load(self, reader: CheckpointReader, path: str) -> None:
        self.gate.copy_(reader.read(f"{path}_gate.weight", tuple(self.gate.shape)))

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: [num_tokens, hidden_size]; returns the same shape."""
        return F.linear(hidden, self.gate).sigmoid() * super().forward(hidden)


class MixtureOfExperts(nn.Module):
    """The gate and the experts of a layer, and in Qwen2-MoE the shared expert.

    Without expert parallelism, every rank has a part of each expert, as it has of a dense MLP. With it, every rank has
    some experts whole. Then it sends its share of its tensor-parallel group's tokens to the ranks of their experts.

    placement: which rank has which expert. loads: how many tokens went to each expert from this rank.
    """

    def __init__(self, config: Any, groups: Groups) -> None:
        super().__init__()
        self.groups, self.num_experts = groups, num_experts(config)
        size = config.intermediate_size if config.model_type == "mixtral" else config.moe_intermediate_size
        self.gate = TopKGate(config)
        if groups.has_expert_parallelism:
            slots = split_slots(self.num_experts, groups)
            self.placement = Placement.in_order(slots.total, self.num_experts)
            self.experts = Experts(config, self.placement.experts[slots.slice], Shard(size, 0, size), has_others=True)
        else:
            shard = groups.tensor.split("the experts' intermediate_size", size)
            self.placement = Placement.in_order(self.num_experts, self.num_experts)
            self.experts = Experts(config, self.placement.experts, shard)
        self.shared_expert = SharedExpert(config, groups.tensor) if config.model_type == "qwen2_moe" else None
        self.loads = torch.zeros(self.num_experts, dtype=torch.int64, device="cpu")

    def load(self, reader: CheckpointReader, path: str) -> None:
        """The layers inside load their weights themselves; the tables belong on the same device."""
        device = self.gate.weight.device
        self.placement = Placement(self.placement.experts, self.num_experts, device)
        self.loads = self.loads.to(device)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: [num_tokens, hidden_size]; returns the same shape."""
        if self.groups.has_expert_parallelism:
            share = self.exchange(hidden[share_of(len(hidden), self.groups.tensor)])
            output = self.groups.tensor.all_gather_rows(share, len(hidden))
        else:
            weights, expert_ids = self.choose(hidden)
            output = self.groups.tensor.all_reduce(self.experts(hidden, expert_ids, weights))
        return output if self.shared_expert is None else output + self.shared_expert(hidden)

    def choose(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The gate's choice, which is counted."""
        weights, expert_ids = self.gate(hidden)
        self.loads += count(expert_ids.flatten(), self.num_experts)
        return weights, expert_ids

    def exchange(self, hidden: Tensor) -> Tensor:
        """Tokens of this rank alone, through experts on all ranks. hidden: [n, hidden_size]; returns the same shape.

        All ranks call this together, also those that have no tokens. With several micro-batches, one's tokens travel
        while another one's are computed.
        """
        weights, expert_ids = self.choose(hidden)
        columns = (hidden, self.placement.choose(expert_ids, self.groups.experts.rank), weights)
        parts = zip(*(each.tensor_split(self.groups.num_micro_batches) for each in columns), strict=True)
        trips = [RoundTrip(self.groups.experts, len(self.experts.expert_ids), *part) for part in parts]
        num_received = self.groups.experts.exchange_counts(torch.stack([trip.counts for trip in trips]))
        for trip, counts in zip(trips, num_received, strict=True):
            trip.dispatch(counts)
        for trip in trips:
            trip.send_back(self.experts(*trip.receive()))
        return torch.cat([trip.finish() for trip in trips])


def count(numbers: Tensor, size: int) -> Tensor:
    """How often each number below size occurs: [size], int64. Unlike bincount, it doesn't wait for the device."""
    return torch.zeros(size, dtype=torch.int64, device=numbers.device).index_add_(0, numbers, torch.ones_like(numbers))


def split_slots(num_experts: int, groups: Groups) -> Shard:
    """This rank's slots. Raises FieldError if they can't be divided equally."""
    total, num_ranks = num_experts + groups.num_redundant_experts, groups.experts.size
    if total % num_ranks and not groups.num_redundant_experts:
        raise FieldError(
            "enable_expert_parallel",
            f"{num_experts} experts can't be divided among {num_ranks} ranks (tensor_parallel_size × "
            "data_parallel_size): expected other sizes, or enable_eplb with num_redundant_experts",
        )
    if total % num_ranks:
        raise FieldError(
            "num_redundant_experts",
            f"expected a number that makes {num_experts} experts a multiple of {num_ranks} ranks, "
            f"got {groups.num_redundant_experts}",
        )
    size = total // num_ranks
    return Shard(total, groups.experts.rank * size, (groups.experts.rank + 1) * size)


def stored(path: str, config: Any) -> str:
    """Where a checkpoint has what is at this path in the model."""
    return path.replace(".mlp.", ".block_sparse_moe.") if config.model_type == "mixtral" else path
