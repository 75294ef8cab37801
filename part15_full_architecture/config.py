"""The engine's settings, one flag each."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from typing import Literal

from common.checkpoint import Checkpoint, check_draft_model, default_device
from common.cli import check_minimums, option
from common.errors import FieldError
from common.threads import check_num_threads

from .kernel_names import AUTO, parse_kernels
from .kv_params import MIN_SECRET_CHARS, SECRET_VARIABLE

MAX_GIB, MAX_SECONDS = 1_048_576, 86_400
MAX_GRAPH_SIZE = 8_192  # tokens
LIMITS = {
    "tensor_parallel_size": 1_024, "pipeline_parallel_size": 1_024, "data_parallel_size": 1_024,
    "num_redundant_experts": 1_024, "distributed_timeout": 86_400,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Raises FieldError naming a flag that is out of range."""

    model: str = option("tiny", "a shipped model, a directory, a Hugging Face id or random:<preset>")
    device: str | None = option(None, "cpu or cuda (None: cuda if there is one)")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", "auto: float32 on cpu, bfloat16 on cuda")
    num_threads: int | None = option(
        None, "CPU threads for the model (None: one per physical core; a server with more than two leaves one free)"
    )
    max_model_len: int | None = option(None, "context length in tokens, prompt and answer (None: the model's)", 2)
    max_num_seqs: int = option(64, "requests in a step", 1)
    max_num_batched_tokens: int | None = option(None, "tokens in a step (None: 512 on cpu, 2,048 on cuda)", 1)
    enable_chunked_prefill: bool = option(True, "split prompts that do not fit in one step")
    enable_prefix_caching: bool = option(True, "reuse the KV blocks of prompts that begin with the same tokens")
    prefix_caching_hash_seed: int = option(0, "seed of the block hashes; equal seeds give equal hashes")
    long_prefill_token_threshold: int = option(0, "largest chunk of one prompt in a step (0: no limit)", 0)
    max_queued_requests: int = option(256, "requests that may wait; one more gets status 429", 0)
    async_scheduling: bool = option(True, "schedule the next step while the current one runs")
    speculative_method: Literal["none", "ngram", "draft_model"] = option("none", "how draft tokens are proposed")
    speculative_model: str = option("tiny-draft", "the draft model; it must have the same tokenizer as the model")
    num_speculative_tokens: int = option(4, "maximum number of draft tokens per request and step", 1)
    speculative_max_num_seqs: int = option(8, "no draft tokens while more requests than this are running", 0)
    prompt_lookup_min: int = option(2, "ngram: the shortest run of tokens that is looked up", 1)
    prompt_lookup_max: int = option(4, "ngram: the longest run of tokens that is looked up", 1)
    data_parallel_size: int = option(1, "engine cores, each with a whole model (or its share of the experts)", 1)
    served_model_name: str | None = option(None, "the model's name in the API (None: as in --model)")
    tensor_parallel_size: int = option(1, "ranks that share every layer, each in a process of its own", 1)
    pipeline_parallel_size: int = option(1, "stages that the layers are split into, one after the other", 1)
    enable_expert_parallel: bool = option(
        False, "each rank has some experts whole, instead of a part of each; with data_parallel_size, over all cores"
    )
    enable_dbo: bool = option(
        False, "exchange the tokens of a step in two halves: while one is computed, the other travels"
    )
    enable_eplb: bool = option(False, "measure the experts' loads, and move experts so that all ranks have equal ones")
    num_redundant_experts: int = option(0, "eplb: further copies of experts in each layer", 0)
    eplb_step_interval: int = option(3_000, "eplb: steps between two placements", 1)
    distributed_secret: str | None = option(
        None, "with torchrun on several machines: what all ranks must know, at least 8 characters"
    )
    distributed_timeout: int = option(60, "seconds that a rank may take for a step or to find the others", 1)
    block_size: int = option(16, "tokens in a KV block, a power of two", 1)
    num_kv_blocks: int | None = option(None, "KV pool in blocks, null block included (None: see kv_cache_memory)", 2)
    kv_cache_memory: int | None = option(None, "KV pool in bytes (None: 1 GiB on cpu, the remaining memory on cuda)", 1)
    gpu_memory_utilization: float = option(0.9, "share of a GPU's memory for weights, activations and KV pool")
    kv_offload_gib: float = option(0.0, "host memory for copies of KV blocks, in GiB, for all ranks together (0: none)")
    kv_offload_dir: str | None = option(None, "a directory for KV blocks, which survive a restart")
    kv_offload_disk_gib: float = option(10.0, "the limit for kv_offload_dir, in GiB")
    kv_offload_url: str | None = option(None, "a Redis server for KV blocks, redis://host:port")
    kv_connector: Literal["none", "tcp", "shm"] = option(
        "none", "how KV goes to and from other engines (shm: in shared memory, if they are on this machine)"
    )
    kv_transfer_host: str = option("127.0.0.1", "the address at which other engines fetch KV")
    kv_transfer_secret: str | None = option(
        None, f"what all engines and their proxy must know, at least {MIN_SECRET_CHARS} characters"
    )
    kv_transfer_timeout: float = option(10.0, "seconds that another engine may be silent")
    kv_lease: float = option(30.0, "seconds that a computed prompt is kept for another engine that has gone silent")
    kv_load_failure_policy: Literal["recompute", "fail"] = option(
        "recompute", "what becomes of a request whose KV does not arrive"
    )
    quantization: Literal["auto", "int8", "int4", "nf4", "fp8", "w8a8"] = option(
        "auto", "what the weights of linear layers are rounded to when they are loaded (auto: as the checkpoint is)"
    )
    quantization_group_size: int = option(128, "int4: weights that share a scale", 2)
    kv_cache_dtype: Literal["auto", "int8", "fp8"] = option("auto", "of keys and values (auto: as dtype)")
    calculate_kv_scales: bool = option(True, "measure the scales of keys and values at the start, if there are none")
    speculative_quantization: Literal["auto", "int8", "int4", "nf4", "fp8", "w8a8"] = option(
        "auto", "the same as quantization, for the draft model"
    )
    cpu_offload_gb: float = option(0.0, "weights of each rank that don't stay on the device, in GiB (0: none)")
    pack_weights: bool = option(True, "on cpu, rearrange matrices (or copies) where products get faster")
    megakernel: bool = option(True, "on cpu, compute steps of few tokens in one kernel, if the model is dense")
    enforce_eager: bool = option(False, "on cuda, launch each kernel of a step by itself instead of a CUDA graph")
    cudagraph_capture_sizes: str = option(
        "",
        "sizes of steps, in tokens, for which there are CUDA graphs, such as 1,2,4,8; those above "
        "max_num_batched_tokens are left out (default on cuda: up to 256; on cpu, where steps are then only padded, "
        "none)",
    )
    trace: str | None = option(None, "trace file, one line per step; python -m common.trace view shows it")
    kernels: str = option(
        AUTO,
        "a backend for all operations (torch, numba, triton, cuda), operation=backend,…, or tuned: the fastest, "
        "measured (auto: numba on cpu, tuned on cuda; cuda on cpu is an emulation)",
    )

    @property
    def num_ranks(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size

    def graph_sizes(self, default: tuple[int, ...]) -> tuple[int, ...]:
        """The sizes of steps for which there are graphs. default: on cuda. Raises FieldError."""
        sizes = self._given_sizes()
        if self.enforce_eager:
            return ()
        is_on_gpu = self.device is not None and self.device.startswith("cuda")
        return sizes or (default if is_on_gpu else ())

    def _given_sizes(self) -> tuple[int, ...]:
        text = self.cudagraph_capture_sizes
        if not isinstance(text, str):
            raise FieldError("cudagraph_capture_sizes", f"expected text such as '1,2,4', got {text!r}"[:200])
        parts = [part.strip() for part in text.split(",")] if text else []
        for part in parts:
            if not re.fullmatch(f"[0-9]{{1,{len(str(MAX_GRAPH_SIZE))}}}", part) or not 1 <= int(part) <= MAX_GRAPH_SIZE:
                wanted = f"expected numbers from 1 to {MAX_GRAPH_SIZE}"
                raise FieldError("cudagraph_capture_sizes", f"{wanted}, got {part[:100]!r}")
        return tuple(sorted({int(part) for part in parts}))

    @property
    def has_kv_tiers(self) -> bool:
        """Whether there is something below host memory."""
        return self.kv_offload_dir is not None or self.kv_offload_url is not None

    def __post_init__(self) -> None:
        check_minimums(self)
        check_num_threads(self.num_threads)
        for size, most in LIMITS.items():
            if getattr(self, size) > most:
                raise FieldError(size, f"expected at most {most}, got {getattr(self, size)}")
        if self.distributed_secret is not None and len(self.distributed_secret.strip()) < MIN_SECRET_CHARS:
            raise FieldError("distributed_secret", f"expected at least {MIN_SECRET_CHARS} characters")
        if self.prompt_lookup_max < self.prompt_lookup_min:
            limit = f"prompt_lookup_min={self.prompt_lookup_min}"
            raise FieldError("prompt_lookup_max", f"expected at least {limit}, got {self.prompt_lookup_max}")
        if self.block_size & (self.block_size - 1):
            raise FieldError("block_size", f"expected a power of two, got {self.block_size}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise FieldError(
                "gpu_memory_utilization", f"expected above 0 and up to 1, got {self.gpu_memory_utilization}"
            )
        device = self.device or default_device()
        if device.split(":")[0] not in ("cpu", "cuda") or (device != "cpu" and default_device() == "cpu"):
            raise FieldError("device", f"expected cpu, or cuda where torch sees a GPU, got {device!r}")
        parse_kernels(self.kernels)
        self.graph_sizes(())
        if self.data_parallel_size > 1 and device != "cpu" and self.num_ranks > 1 and not self.enable_expert_parallel:
            raise FieldError("data_parallel_size", "on GPUs, expected one rank for each engine core; use the router")
        self._check_experts()
        self._check_offloading()
        self._check_transfers()
        if self.quantization_group_size % 2:
            raise FieldError("quantization_group_size", f"expected an even number, got {self.quantization_group_size}")
        object.__setattr__(self, "device", device)

    def _check_experts(self) -> None:
        if not self.enable_expert_parallel:
            for name in ("enable_dbo", "enable_eplb"):
                if getattr(self, name):
                    raise FieldError(name, "expected enable_expert_parallel as well")
        elif self.tensor_parallel_size * self.data_parallel_size == 1:
            raise FieldError(
                "enable_expert_parallel",
                "expected several ranks for each layer: tensor_parallel_size or data_parallel_size",
            )
        elif self.data_parallel_size > 1 and self.pipeline_parallel_size > 1:
            raise FieldError("enable_expert_parallel", "with several engine cores, expected one pipeline stage")
        if self.enable_eplb and self.pipeline_parallel_size > 1:
            raise FieldError("enable_eplb", "expected one pipeline stage")
        if self.num_redundant_experts and not self.enable_eplb:
            raise FieldError("num_redundant_experts", "expected enable_eplb as well")

    def _check_offloading(self) -> None:
        for name in ("kv_offload_gib", "kv_offload_disk_gib", "cpu_offload_gb"):
            if not 0 <= getattr(self, name) <= MAX_GIB:
                raise FieldError(name, f"expected 0 to {MAX_GIB:,} GiB, got {getattr(self, name)}")
        for name in ("kv_offload_dir", "kv_offload_url"):
            if getattr(self, name) == "":
                raise FieldError(name, "expected a place, got an empty string")
            if getattr(self, name) is not None and not self.kv_offload_gib:
                raise FieldError(name, "expected kv_offload_gib as well: blocks go through host memory")
        if self.kv_offload_dir is not None and not self.kv_offload_disk_gib:
            raise FieldError("kv_offload_disk_gib", "expected more than 0 with kv_offload_dir, got 0")
        if self.kv_offload_gib and not self.enable_prefix_caching:
            raise FieldError("kv_offload_gib", "expected enable_prefix_caching: blocks are found by their hashes")
        if self.cpu_offload_gb and self.enable_eplb:
            raise FieldError("cpu_offload_gb", "expected enable_eplb to be off: experts that move must stay")

    def _check_transfers(self) -> None:
        for name in ("kv_transfer_timeout", "kv_lease"):
            if not 0 < getattr(self, name) <= MAX_SECONDS:
                raise FieldError(name, f"expected seconds, above 0 and up to {MAX_SECONDS}, got {getattr(self, name)}")
        if self.kv_connector == "none":
            return
        if self.kv_transfer_host in ("", "*", "0.0.0.0", "::"):
            wanted = "expected an address at which other engines reach this one"
            raise FieldError("kv_transfer_host", f"{wanted}, got {self.kv_transfer_host!r}")
        if self.kv_transfer_secret is None:
            object.__setattr__(self, "kv_transfer_secret", os.environ.get(SECRET_VARIABLE))
        if self.kv_transfer_secret is None:
            wanted = (
                f"with kv_connector, expected one, the same for all engines, or {SECRET_VARIABLE} in the environment"
            )
            raise FieldError("kv_transfer_secret", wanted)
        if len(self.kv_transfer_secret.strip()) < MIN_SECRET_CHARS:
            raise FieldError("kv_transfer_secret", f"expected at least {MIN_SECRET_CHARS} characters")
        if self.data_parallel_size > 1:
            raise FieldError("data_parallel_size", "with kv_connector, expected 1: use several engines")
        if self.kv_connector == "shm" and not hasattr(os, "memfd_create"):
            raise FieldError("kv_connector", "shm needs Linux: expected tcp")


def resolve_config(config: EngineConfig, checkpoint: Checkpoint) -> EngineConfig:
    """The config with all values that depend on the model. Raises FieldError if they contradict each other."""
    max_model_len = min(config.max_model_len or checkpoint.max_model_len, checkpoint.max_model_len)
    max_num_batched_tokens = token_budget(config, max_model_len)
    if config.speculative_method == "draft_model":
        check_draft_model(config.speculative_model, checkpoint, max_model_len)
    return replace(config, max_model_len=max_model_len, max_num_batched_tokens=max_num_batched_tokens)


def token_budget(config: EngineConfig, max_model_len: int) -> int:
    """The token budget of a step. Raises FieldError if it is too small for what must fit in one step."""
    needed, smallest = "one token for each of max_num_seqs requests", config.max_num_seqs
    if not config.enable_chunked_prefill and max_model_len > smallest:
        needed, smallest = "a whole prompt of max_model_len tokens", max_model_len
    budget = config.max_num_batched_tokens or max(512 if config.device == "cpu" else 2_048, smallest)
    if budget < smallest:
        raise FieldError("max_num_batched_tokens", f"expected at least {smallest} ({needed}), got {budget}")
    return budget
