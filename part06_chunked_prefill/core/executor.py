"""How core reaches the worker."""

from __future__ import annotations

from ..config import EngineConfig
from ..messages import StepInput
from ..worker.stream import StepHandle
from ..worker.worker import Worker


class Executor:
    """A worker in this process, so a call is all it takes (vLLM's UniProcExecutor).

    num_blocks: the size of the KV pool. It is agreed on before the cache is allocated.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.worker = Worker(config)
        self.num_blocks = self.worker.num_blocks_available()
        self.worker.allocate_cache(self.num_blocks)

    def launch(self, step: StepInput) -> StepHandle:
        """Begin a step and return before it is done; the handle's result() waits for it, and raises what it raised."""
        return self.worker.launch(step)
