"""How core calls the worker."""

from __future__ import annotations

from ..config import EngineConfig
from ..messages import StepInput, StepOutput
from ..worker.worker import Worker


class Executor:
    """Runs the worker in this process, so a step is a plain function call (vLLM's UniProcExecutor).

    num_blocks: the size of the KV pool, which is decided before the cache is allocated.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.worker = Worker(config)
        self.num_blocks = self.worker.num_blocks_available()
        self.worker.allocate_cache(self.num_blocks)

    def execute(self, step: StepInput) -> StepOutput:
        """Run one step and wait for it. Raises whatever the worker raises."""
        return self.worker.execute(step)
