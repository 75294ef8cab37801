"""The engine's settings, one flag each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from common.checkpoint import Checkpoint, default_device
from common.cli import check_minimums, option
from common.errors import FieldError
from common.threads import check_num_threads


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Raises FieldError naming a flag that is out of range."""

    model: str = option("tiny", "a shipped model, a directory, a Hugging Face id or random:<preset>")
    device: str | None = option(None, "cpu or cuda (None: cuda if there is one)")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", "auto: float32 on cpu, bfloat16 on cuda")
    num_threads: int | None = option(None, "CPU threads for the model (None: one per physical core)")
    max_model_len: int | None = option(None, "context length in tokens, prompt and answer (None: the model's)", 2)
    max_num_seqs: int = option(64, "requests in a step", 1)
    max_num_batched_tokens: int | None = option(None, "tokens in a step (None: the context length, at least 2,048)", 1)
    max_queued_requests: int = option(256, "requests that may wait; one more gets status 429", 0)
    block_size: int = option(16, "tokens in a KV block, a power of two", 1)
    num_kv_blocks: int | None = option(None, "KV pool in blocks, null block included (None: see kv_cache_memory)", 2)
    kv_cache_memory: int | None = option(None, "KV pool in bytes (None: 1 GiB on cpu, the remaining memory on cuda)", 1)
    gpu_memory_utilization: float = option(0.9, "share of a GPU's memory for weights, activations and KV pool")
    trace: str | None = option(None, "trace file, one line per step; python -m common.trace view shows it")
    attention_backend: Literal["auto", "torch", "numba", "triton"] = option(
        "auto", "auto: numba on cpu, triton on cuda; torch is the slow reference"
    )

    def __post_init__(self) -> None:
        check_minimums(self)
        check_num_threads(self.num_threads)
        if self.block_size & (self.block_size - 1):
            raise FieldError("block_size", f"expected a power of two, got {self.block_size}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise FieldError(
                "gpu_memory_utilization", f"expected above 0 and up to 1, got {self.gpu_memory_utilization}"
            )
        device = self.device or default_device()
        if device.split(":")[0] not in ("cpu", "cuda") or (device != "cpu" and default_device() == "cpu"):
            raise FieldError("device", f"expected cpu, or cuda where torch sees a GPU, got {device!r}")
        if self.attention_backend == "triton" and device == "cpu":
            raise FieldError("attention_backend", "triton needs a GPU: expected auto, numba or torch on cpu")
        if self.attention_backend == "numba" and device != "cpu":
            raise FieldError("attention_backend", "numba runs only on a CPU: expected auto, triton or torch on cuda")
        if self.attention_backend == "numba" and self.dtype == "float16":
            raise FieldError("attention_backend", "numba does not support float16: expected auto or torch")
        object.__setattr__(self, "device", device)


def resolve_config(config: EngineConfig, checkpoint: Checkpoint) -> EngineConfig:
    """The config with all values that depend on the model. Raises FieldError if they contradict each other."""
    max_model_len = min(config.max_model_len or checkpoint.max_model_len, checkpoint.max_model_len)
    max_num_batched_tokens = config.max_num_batched_tokens or max(2_048, max_model_len)
    if max_num_batched_tokens < max_model_len:
        expected = f"at least max_model_len={max_model_len}, since a prompt is computed in one step"
        raise FieldError("max_num_batched_tokens", f"expected {expected}, got {max_num_batched_tokens}")
    return replace(config, max_model_len=max_model_len, max_num_batched_tokens=max_num_batched_tokens)
