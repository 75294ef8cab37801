"""The worker: everything that lives on the model's device."""

from __future__ import annotations

import torch

from common.checkpoint import DTYPES, default_dtype, resolve_checkpoint
from common.errors import FieldError
from common.memory import check_memory, num_blocks_in, peak_memory
from common.threads import set_num_threads

from ..config import EngineConfig
from ..messages import StepInput
from .kv_cache import CPU_KV_CACHE_BYTES, KVCache, kv_bytes_per_block
from .model_runner import ModelRunner, to_step_output
from .stream import StepHandle, make_stream
from .weights import load_decoder


class Worker:
    """Loads the model, determines how large the KV cache can be, allocates it, and runs steps on its stream.

    config: as resolve_config returns it. allocate_cache() comes before the first step.
    """

    def __init__(self, config: EngineConfig) -> None:
        assert config.device and config.max_model_len, "resolve_config fills them in"
        self.config, self.device = config, config.device
        num_bytes = 8 * config.max_num_seqs * config.max_model_len  # of the token buffer
        check_memory("max_num_seqs", config.max_num_seqs, num_bytes, self.device)
        self.checkpoint = resolve_checkpoint(config.model)
        dtype = default_dtype(self.device) if config.dtype == "auto" else DTYPES[config.dtype]
        self.stream = make_stream(self.device)
        self.stream.run(lambda: set_num_threads(config.num_threads))
        self.model = self.stream.run(lambda: load_decoder(self.checkpoint, dtype, self.device))
        eos_token_ids = self.checkpoint.eos_token_ids
        self.runner = self.stream.run(lambda: ModelRunner(self.model, config, eos_token_ids))

    def num_blocks_available(self) -> int:
        """The size of the KV pool in blocks: as configured, or as many as fit in memory."""
        config = self.config
        bytes_per_block = kv_bytes_per_block(self.model, config.block_size)
        if config.num_kv_blocks is not None:
            check_memory("num_kv_blocks", config.num_kv_blocks, config.num_kv_blocks * bytes_per_block, self.device)
            return config.num_kv_blocks
        if config.kv_cache_memory is not None:
            check_memory("kv_cache_memory", config.kv_cache_memory, config.kv_cache_memory, self.device)
            return num_blocks_in(config.kv_cache_memory, bytes_per_block, "kv_cache_memory")
        if not self.device.startswith("cuda"):
            return num_blocks_in(CPU_KV_CACHE_BYTES, bytes_per_block, "kv_cache_memory")
        total = torch.cuda.get_device_properties(self.device).total_memory
        available = int(config.gpu_memory_utilization * total) - peak_memory(self.device, self.runner.profile)
        if available <= 0:
            raise FieldError("gpu_memory_utilization", f"{config.gpu_memory_utilization} leaves no room for a KV cache")
        return num_blocks_in(available, bytes_per_block, "gpu_memory_utilization")

    def allocate_cache(self, num_blocks: int) -> None:
        self.stream.run(lambda: self.runner.set_cache(KVCache(self.model, num_blocks, self.config.block_size)))

    def launch(self, step: StepInput) -> StepHandle:
        """Launch a step; it runs after those launched before. Returns before it is done."""
        batch = self.runner.prepare(step)
        return self.stream.launch(
            lambda: self.runner.run(batch), lambda sampled: to_step_output(sampled, batch)
        )  # fmt: skip
