"""How core calls the worker: in this process, or one rank in each of several processes."""

from __future__ import annotations

from typing import Protocol

import zmq

from common.checkpoint import resolve_checkpoint
from common.errors import FieldError

from ..config import EngineConfig
from ..messages import AllocateCache, CacheAllocated, RankLoaded, StepInput, StepOutput
from ..torchrun import Torchrun
from ..worker import launcher, rank_process
from ..worker.model import check_divisible
from ..worker.worker import Worker
from .ranks import RankDied, Ranks


class StepHandle(Protocol):
    """A step that was launched."""

    def result(self) -> StepOutput:
        """Wait for the step. Raises whatever it raised, RankDied if a rank is lost."""
        ...


class Executor(Protocol):
    """num_blocks: the size of the KV pool, which is decided before the cache is allocated."""

    num_blocks: int

    def launch(self, step: StepInput) -> StepHandle:
        """Start a step and return before it is done."""
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
        self.worker.allocate_cache(self.num_blocks)

    def launch(self, step: StepInput) -> StepHandle:
        return self.worker.launch(step)

    def wait_for(self, requests: zmq.Socket[bytes]) -> None:
        requests.poll()

    def shutdown(self) -> None:
        pass


class MultiprocExecutor:
    """A worker in a process of its own for each rank. All get the same steps, and one of them answers.

    ranks_loaded: what each has of the model. Raises FieldError or OSError if a rank cannot start.
    """

    def __init__(self, config: EngineConfig) -> None:
        model_config = resolve_checkpoint(config.model).config
        check_divisible(model_config, config.tensor_parallel_size, config.pipeline_parallel_size)
        self.is_traced, self.is_on_cpu = config.trace is not None, config.device == "cpu"
        try:
            self.ranks = Ranks(config, rank_process.run_rank, launcher.publish_addresses)
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
            self.ranks.send(AllocateCache(self.num_blocks))
            self.ranks.all_results(CacheAllocated)
        except BaseException:
            self.ranks.shutdown()
            raise
        if self.is_on_cpu:  # NCCL looks into the directory once more, at the first exchange between two ranks
            self.ranks.remove_directory()

    def launch(self, step: StepInput) -> StepHandle:
        self.ranks.send(step)
        return RankHandle(self.ranks, self.is_traced)

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


def check_weights(loaded: list[RankLoaded]) -> None:
    """Raises FieldError if a rank has read other weights than rank 0."""
    for other in loaded[1:]:
        if other.fingerprint != loaded[0].fingerprint:
            raise FieldError("model", f"the weights of rank {other.rank} differ from those of rank 0")


def make_executor(config: EngineConfig) -> Executor:
    """Raises FieldError if torchrun has started other ranks than the config says, or none can be made."""
    if (torchrun := Torchrun.from_environment()) is not None:
        torchrun.check(config)
    return UniProcExecutor(config) if config.num_ranks == 1 else MultiprocExecutor(config)
