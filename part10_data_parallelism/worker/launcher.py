"""How ranks find core and each other."""

from __future__ import annotations

import datetime
import os
import sys

import torch.distributed as dist

from ..config import EngineConfig
from ..torchrun import Torchrun
from .parallel import ParallelGroup, PipelineStage

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


def join_groups(config: EngineConfig, rank: int, init_method: str) -> tuple[ParallelGroup, PipelineStage]:
    """Join all ranks' processes: the group of this rank's stage, and its place in the pipeline.

    Ranks are numbered stage by stage. Raises OSError if the others don't come within distributed_timeout.
    """
    is_cuda, tp_size = str(config.device).startswith("cuda"), config.tensor_parallel_size
    torchrun = Torchrun.from_environment()
    if torchrun is None or torchrun.is_loopback:  # else gloo listens on this machine's own address
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    timeout = datetime.timedelta(seconds=config.distributed_timeout)
    try:
        dist.init_process_group(
            "nccl" if is_cuda else "gloo", init_method=init_method, rank=rank, world_size=config.num_ranks,
            timeout=timeout,
        )  # fmt: skip
        groups = [  # every rank takes part in the creation of all groups
            dist.new_group(range(stage * tp_size, (stage + 1) * tp_size), timeout=timeout)
            for stage in range(config.pipeline_parallel_size)
        ]
    except (RuntimeError, ValueError) as error:
        raise OSError(f"it does not find the other ranks within {config.distributed_timeout} s: {error}") from error
    stage, tp_rank = divmod(rank, tp_size)
    return (
        ParallelGroup(tp_rank, tp_size, groups[stage]),
        PipelineStage(stage, config.pipeline_parallel_size, rank - tp_size, rank + tp_size),
    )
