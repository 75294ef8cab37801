"""How core calls the worker."""

from __future__ import annotations

from ..config import EngineConfig
from ..messages import StepInput
from ..worker.stream import StepHandle
from ..worker.worker import Worker


class Executor:
    """Runs the worker in this process, so a step is a plain function call (vLLM's UniProcExecutor).

    num_blocks: the size of the KV pool, which is decided before the cache is allocated.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.worker = Worker(config)
        self.num_blocks = self.worker.num_blocks_available()
        self.worker.allocate_cache(self.num_blocks)

    def launch(self, step: StepInput) -> StepHandle:
        """Start a step and return before it is done. The handle's result() waits for it and raises its error."""
        return self.worker.launch(step)
