"""How ranks find core and each other."""

from __future__ import annotations

import datetime
import os
import sys

import torch.distributed as dist

from ..config import EngineConfig
from ..torchrun import Torchrun
from .parallel import Groups, ParallelGroup, PipelineStage

ADDRESSES_KEY = "llm-engine/addresses"


def publish_addresses(torchrun: Torchrun, addresses: str, timeout_s: float) -> None:
    """Tell the ranks on all machines where core listens. Raises OSError if torchrun's store cannot be reached."""
    _store(torchrun, timeout_s).set(ADDRESSES_KEY, addresses)


def find_addresses(torchrun: Torchrun, timeout_s: float) -> str:
    """Where core listens. Raises OSError if it does not say so within timeout_s."""
    store = _store(torchrun, timeout_s)
    try:
        return store.get(ADDRESSES_KEY).decode()
    except RuntimeError as error:
        raise OSError(f"rank 0 has not started within {timeout_s:g} s: {error}") from error


def _store(torchrun: Torchrun, timeout_s: float) -> dist.TCPStore:
    """The key-value store that torchrun runs."""
    timeout = datetime.timedelta(seconds=timeout_s)
    try:
        return dist.TCPStore(torchrun.master_addr, torchrun.master_port, is_master=False, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        where = f"{torchrun.master_addr} port {torchrun.master_port}"
        raise OSError(f"cannot reach {where}: {error}") from error


def join_groups(config: EngineConfig, rank: int, init_method: str, core: int, num_cores: int) -> Groups:
    """Join the processes of all ranks, also those of other engine cores that share the experts.

    Ranks are numbered core by core, and in a core stage by stage. core: the number of this rank's. Raises OSError if
    the others don't come within distributed_timeout.
    """
    is_cuda, tp_size = str(config.device).startswith("cuda"), config.tensor_parallel_size
    torchrun = Torchrun.from_environment()
    if torchrun is None or torchrun.is_loopback:  # else gloo listens on this machine's own address
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    timeout = datetime.timedelta(seconds=config.distributed_timeout)
    first, world_size = core * config.num_ranks, num_cores * config.num_ranks
    stage, tp_rank = divmod(rank, tp_size)
    try:
        dist.init_process_group(
            "nccl" if is_cuda else "gloo", init_method=init_method, rank=first + rank, world_size=world_size,
            timeout=timeout,
        )  # fmt: skip
        tensor = _new_groups([range(start, start + tp_size) for start in range(0, world_size, tp_size)], timeout)
        experts = ParallelGroup()
        if config.enable_expert_parallel:
            size = num_cores * tp_size
            experts = _new_groups([range(start, start + size) for start in range(0, world_size, size)], timeout)
    except (RuntimeError, ValueError) as error:
        raise OSError(f"it does not find the other ranks within {config.distributed_timeout} s: {error}") from error
    return Groups(
        tensor, experts, PipelineStage(stage, config.pipeline_parallel_size, rank - tp_size, rank + tp_size),
        config.num_redundant_experts, 2 if config.enable_dbo else 1,
    )  # fmt: skip


def _new_groups(all_ranks: list[range], timeout: datetime.timedelta) -> ParallelGroup:
    """Make groups of ranks, in which every rank takes part. Returns this rank's."""
    groups = [(ranks, dist.new_group(ranks, timeout=timeout)) for ranks in all_ranks]
    [(ranks, group)] = [each for each in groups if dist.get_rank() in each[0]]
    return ParallelGroup(ranks.index(dist.get_rank()), len(ranks), group)
