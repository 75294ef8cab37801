"""How core calls the worker: in this process, or one rank in each of several processes."""

from __future__ import annotations

import contextlib
import queue
from typing import Protocol

import zmq

from common.checkpoint import resolve_checkpoint
from common.errors import FieldError
from common.memory import check_memory, num_blocks_in

from ..config import EngineConfig
from ..messages import (
    AllocateCache,
    CacheAllocated,
    CoreGroup,
    KVSource,
    MeasureExperts,
    Notice,
    PlaceExperts,
    RankLoaded,
    StepInput,
    StepOutput,
    Transfer,
    TransferDone,
)
from ..torchrun import Torchrun
from ..worker import launcher, rank_process
from ..worker.expert_parallel import Placement
from ..worker.model import check_divisible
from ..worker.parallel import Groups, ParallelGroup, PipelineStage
from ..worker.quantization.choice import QuantizationFlags, prepare_layers
from ..worker.worker import Worker
from .eplb import balancedness, place_experts
from .ranks import RankDied, Ranks


class StepHandle(Protocol):
    """A step that was launched."""

    def result(self) -> StepOutput:
        """Wait for the step. Raises whatever it raised, RankDied if a rank is lost."""
        ...


class Executor(Protocol):
    """num_blocks, num_host_blocks: the size of the KV pool on the device and in host memory, which are decided before
    they are allocated. weight_bytes: of the models' weights, on all ranks together. bytes_per_block: of a KV block, on
    all ranks together. kv_sources: the ranks, if other engines may fetch KV from them."""

    num_blocks: int
    num_host_blocks: int
    weight_bytes: int
    bytes_per_block: int
    kernels: dict[str, tuple[str, str]]
    kv_sources: list[KVSource]

    def launch(self, step: StepInput) -> StepHandle:
        """Start a step and return before it is done."""
        ...

    def transfer(self, transfer: Transfer | Notice) -> None:
        """Start a transfer, and return before it is done. It touches the device's blocks when the steps that were
        launched before have run. (A Publish belongs to the step that is launched next.)"""
        ...

    def finished_transfers(self, timeout_s: float) -> list[TransferDone]:
        """The transfers that have ended since the last call. If none has, wait for one for up to timeout_s."""
        ...

    def balance_experts(self) -> tuple[float, float] | None:
        """Measure how many tokens each expert has got, and move experts so that all ranks have about equal loads.

        Returns the balancedness of these loads, before and after; None if no expert has got any, and nothing was moved.
        """
        ...

    def wait_for(self, requests: zmq.Socket[bytes]) -> None:
        """Wait until a socket has a message, while no step is in flight. Raises RankDied."""
        ...

    def shutdown(self) -> None:
        """End all processes that it has started. A second call does nothing."""
        ...


class UniProcExecutor:
    """One worker, in this process: a step is a plain function call. (The classes have vLLM's names.)"""

    def __init__(self, config: EngineConfig) -> None:
        self.worker = Worker(config)
        self.num_blocks = self.worker.num_blocks_available()
        self.weight_bytes, self.bytes_per_block = self.worker.weight_bytes, self.worker.bytes_per_block
        self.kernels = self.worker.kernel_choices
        self.num_host_blocks = num_host_blocks(config, self.bytes_per_block)
        self._finished: queue.SimpleQueue[TransferDone] = queue.SimpleQueue()
        self.worker.allocate_cache(self.num_blocks, self.num_host_blocks, self._finished.put)
        self.kv_sources = [] if self.worker.agent is None else [self.worker.agent.source]

    def launch(self, step: StepInput) -> StepHandle:
        return self.worker.launch(step)

    def transfer(self, transfer: Transfer | Notice) -> None:
        self.worker.transfer(transfer)

    def finished_transfers(self, timeout_s: float) -> list[TransferDone]:
        finished = list[TransferDone]()
        with contextlib.suppress(queue.Empty):
            finished.append(self._finished.get(timeout=timeout_s) if timeout_s else self._finished.get_nowait())
            while True:
                finished.append(self._finished.get_nowait())
        return finished

    def balance_experts(self) -> tuple[float, float] | None:
        raise AssertionError("one rank has all experts")

    def wait_for(self, requests: zmq.Socket[bytes]) -> None:
        requests.poll()

    def shutdown(self) -> None:
        self.worker.close()


class MultiprocExecutor:
    """A worker in a process of its own for each rank. All get the same steps, and one of them answers.

    ranks_loaded: what each has of the model. Raises FieldError or OSError if a rank cannot start.
    """

    def __init__(self, config: EngineConfig, cores: CoreGroup | None = None) -> None:
        self.config, model_config = config, resolve_checkpoint(config.model).config
        num_cores, self.num_redundant_experts = 1 if cores is None else cores.num_cores, config.num_redundant_experts
        self.num_expert_ranks = num_cores * config.tensor_parallel_size if config.enable_expert_parallel else 1
        groups = Groups(
            ParallelGroup(0, config.tensor_parallel_size), ParallelGroup(0, self.num_expert_ranks),
            PipelineStage(0, config.pipeline_parallel_size), config.num_redundant_experts,
        )  # fmt: skip
        flags = QuantizationFlags(config.quantization, config.quantization_group_size)
        check_divisible(model_config, groups, lambda model: prepare_layers(model, model_config, flags))
        self.placements: list[list[int]] | None = None  # None: as at the start
        self.is_traced, self.is_on_cpu = config.trace is not None, config.device == "cpu"
        try:
            self.ranks = Ranks(config, rank_process.run_rank, launcher.publish_addresses, cores)
            self._load()
        except RankDied as error:
            if error.field is not None:
                raise FieldError(error.field, str(error)) from None
            raise OSError(str(error)) from None

    def _load(self) -> None:
        """The ranks load the model, and allocate as many blocks as all of them have room for."""
        try:
            self.ranks_loaded = sorted(self.ranks.all_results(RankLoaded), key=lambda loaded: loaded.rank)
            check_weights(self.ranks_loaded)
            self.num_blocks = min(loaded.num_blocks for loaded in self.ranks_loaded)
            self.weight_bytes = sum(loaded.weight_bytes for loaded in self.ranks_loaded)
            self.bytes_per_block = sum(loaded.bytes_per_block for loaded in self.ranks_loaded)
            self.kernels = self.ranks_loaded[0].kernels
            self.num_host_blocks = num_host_blocks(self.config, self.bytes_per_block)
            self.ranks.send(AllocateCache(self.num_blocks, self.num_host_blocks))
            allocated = self.ranks.all_results(CacheAllocated)
            self.kv_sources = [each.source for each in allocated if each.source is not None]
        except BaseException:
            self.ranks.shutdown()
            raise
        if self.is_on_cpu:  # NCCL looks into the directory once more, at the first exchange between two ranks
            self.ranks.remove_directory()

    def launch(self, step: StepInput) -> StepHandle:
        self.ranks.send(step)
        return RankHandle(self.ranks, self.is_traced)

    def transfer(self, transfer: Transfer | Notice) -> None:
        self.ranks.transfer(transfer)

    def finished_transfers(self, timeout_s: float) -> list[TransferDone]:
        return self.ranks.finished_transfers(timeout_s)

    def balance_experts(self) -> tuple[float, float] | None:
        """All engine cores do this before the same step, and get the same loads, so they agree on the placement."""
        self.ranks.send(MeasureExperts())
        loads, num_ranks = self.ranks.expert_loads(), self.num_expert_ranks
        if not any(map(any, loads)):
            return None  # since the last time, there were only dummy steps
        num_experts, num_slots = len(loads[0]), len(loads[0]) + self.num_redundant_experts
        before = self.placements or [Placement.in_order(num_slots, num_experts).experts] * len(loads)
        self.placements = [place_experts(each, num_slots, num_ranks) for each in loads]
        self.ranks.send(PlaceExperts(self.placements))
        return balancedness(loads, before, num_ranks), balancedness(loads, self.placements, num_ranks)

    def wait_for(self, requests: zmq.Socket[bytes]) -> None:
        self.ranks.wait_for(requests)

    def shutdown(self) -> None:
        self.ranks.shutdown()


class RankHandle:
    """A step on all ranks. The results arrive in the order of the steps, and are read in this order."""

    def __init__(self, ranks: Ranks, is_traced: bool) -> None:
        self.ranks, self.is_traced = ranks, is_traced

    def result(self) -> StepOutput:
        output = self.ranks.result()
        output.ranks = self.ranks.times() if self.is_traced else []
        return output


def num_host_blocks(config: EngineConfig, bytes_per_block: int) -> int:
    """The size of host memory in blocks. bytes_per_block: on all ranks together. Raises FieldError if it is too small
    for two blocks, or larger than this machine's memory, unless there are several machines."""
    num_bytes = int(config.kv_offload_gib * 2**30)
    if Torchrun.from_environment() is None:
        check_memory("kv_offload_gib", config.kv_offload_gib, num_bytes, "cpu")
    return num_blocks_in(num_bytes, bytes_per_block, "kv_offload_gib") if num_bytes else 0


def check_weights(loaded: list[RankLoaded]) -> None:
    """Raises FieldError if a rank has read other weights than rank 0."""
    for other in loaded[1:]:
        if other.fingerprint != loaded[0].fingerprint:
            raise FieldError("model", f"the weights of rank {other.rank} differ from those of rank 0")


def make_executor(config: EngineConfig, cores: CoreGroup | None = None) -> Executor:
    """Raises FieldError if torchrun has started other ranks than the config says, or none can be made."""
    if (torchrun := Torchrun.from_environment()) is not None:
        torchrun.check(config)
    is_alone = config.num_ranks == 1 and cores is None
    return UniProcExecutor(config) if is_alone else MultiprocExecutor(config, cores)
