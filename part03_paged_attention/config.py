"""The flags of part 3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from common.checkpoint import default_device
from common.cli import option
from common.errors import FieldError
from common.threads import check_num_threads


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Raises FieldError naming a flag that is out of range."""

    model: str = option("tiny", "a shipped model, a directory, a Hugging Face id or random:<preset>")
    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on; 0 takes a free one")
    api_key: str | None = option(None, "what clients must send as a bearer token (None: nothing)")
    device: str | None = option(None, "cpu or cuda (None: cuda if there is one)")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", "auto: float32 on cpu, bfloat16 on cuda")
    num_threads: int | None = option(None, "CPU threads for the model (None: one per physical core)")
    max_model_len: int | None = option(None, "context in tokens, prompt and answer together (None: the model's)")
    max_num_seqs: int = option(16, "requests in a batch")
    max_num_batched_tokens: int = option(8192, "prompt tokens in a batch")
    max_queued_requests: int = option(256, "requests that may wait for their turn; one more gets status 429")
    block_size: int = option(16, "tokens in a KV block, a power of two")
    num_kv_blocks: int | None = option(None, "size of the KV pool in blocks (None: what its memory holds)")
    kv_cache_memory: int | None = option(
        None, "size of the KV pool in bytes (None: 1 GiB on cpu, what is left on cuda)"
    )
    gpu_memory_utilization: float = option(0.9, "share of a GPU's memory for weights, activations and KV pool")
    attention_backend: Literal["auto", "torch", "triton"] = option("auto", "auto: torch on cpu, triton on cuda")

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise FieldError("port", f"expected 0 to 65535, got {self.port}")
        check_num_threads(self.num_threads)
        if self.max_model_len is not None and self.max_model_len < 2:
            raise FieldError("max_model_len", f"expected at least 2 tokens, got {self.max_model_len}")
        for name in ("max_num_seqs", "max_num_batched_tokens", "kv_cache_memory"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise FieldError(name, f"expected at least 1, got {value}")
        if self.max_queued_requests < 0:
            raise FieldError("max_queued_requests", f"expected 0 or more, got {self.max_queued_requests}")
        if self.block_size < 1 or self.block_size & (self.block_size - 1):
            raise FieldError("block_size", f"expected a power of two, got {self.block_size}")
        if self.num_kv_blocks is not None and self.num_kv_blocks < 2:
            raise FieldError("num_kv_blocks", f"expected at least 2 (one is the null block), got {self.num_kv_blocks}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise FieldError(
                "gpu_memory_utilization", f"expected above 0 and up to 1, got {self.gpu_memory_utilization}"
            )
        device = self.device or default_device()
        if device.split(":")[0] not in ("cpu", "cuda") or (device != "cpu" and default_device() == "cpu"):
            raise FieldError("device", f"expected cpu, or cuda where torch sees a GPU, got {device!r}")
        if self.attention_backend == "triton" and device == "cpu":
            raise FieldError("attention_backend", "triton needs a GPU, expected auto or torch on cpu")
        object.__setattr__(self, "device", device)
