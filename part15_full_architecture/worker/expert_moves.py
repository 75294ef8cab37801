"""Expert-parallel load balancing on the ranks: count tokens, move experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .expert_parallel import Placement
from .moe import MixtureOfExperts
from .parallel import raising


def take_loads(mixtures: Sequence[MixtureOfExperts]) -> list[list[int]]:
    """How many tokens went to each expert of each layer from all ranks, and start counting again."""
    loads = torch.stack([mixture.loads for mixture in mixtures])
    for mixture in mixtures:
        mixture.loads.zero_()
    return mixtures[0].groups.experts.all_reduce(loads).tolist()


def plan_moves(before: Sequence[int], after: Sequence[int], slots_per_rank: int) -> dict[int, int]:
    """For each slot that gets another expert, the slot that has it: on the same rank if possible, else the copies take
    turns. before, after: the expert of each slot, on all ranks."""
    sources = {}
    for slot, expert in enumerate(after):
        if before[slot] != expert:
            holders = [held for held, each in enumerate(before) if each == expert]
            local = [held for held in holders if held // slots_per_rank == slot // slots_per_rank]
            sources[slot] = local[0] if local else holders[slot % len(holders)]
    return sources


@torch.inference_mode()
def move_experts(mixture: MixtureOfExperts, experts: list[int]) -> None:
    """Give the slots of a layer other experts. All ranks call this together.

    experts: of each slot, on all ranks. A rank that does not have an expert yet gets it from one that does.
    """
    group, slots_per_rank = mixture.groups.experts, len(mixture.experts.expert_ids)
    sources = plan_moves(mixture.placement.experts, experts, slots_per_rank)
    arrived: dict[int, list[Tensor]] = {}  # in each slot of this rank
    transfers: list[dist.P2POp] = []
    for slot, source in sources.items():
        receiver, sender = slot // slots_per_rank, source // slots_per_rank
        if group.rank == sender:
            weights = [weight[source % slots_per_rank] for weight in mixture.experts.tensors]
            if sender == receiver:
                arrived[slot] = [weight.clone() for weight in weights]
            else:
                transfers += [
                    dist.P2POp(dist.isend, weight, group=group.process_group, group_peer=receiver) for weight in weights
                ]
        elif group.rank == receiver:
            arrived[slot] = [torch.empty_like(weight[0]) for weight in mixture.experts.tensors]
            transfers += [
                dist.P2POp(dist.irecv, weight, group=group.process_group, group_peer=sender) for weight in arrived[slot]
            ]
    if transfers:
        with raising("moving experts"):
            for work in dist.batch_isend_irecv(transfers):  # one by one, two GPUs could wait for each other
                work.wait()
    for slot, weights in arrived.items():
        for parameter, weight in zip(mixture.experts.tensors, weights, strict=True):
            parameter[slot % slots_per_rank] = weight
    mixture.placement = Placement(experts, mixture.num_experts, mixture.gate.weight.device)
    first = group.rank * slots_per_rank
    mixture.experts.expert_ids = experts[first : first + slots_per_rank]
