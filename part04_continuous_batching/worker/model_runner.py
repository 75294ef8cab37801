"""Requests in, logits out: the model, its KV cache, and the tensors of a step."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from common.checkpoint import DTYPES, Checkpoint, default_dtype
from common.errors import FieldError
from common.threads import set_num_threads

from ..config import EngineConfig
from ..core.block_manager import NULL_BLOCK, BlockManager
from ..core.request import Request
from .attention import AttentionMetadata, PagedAttention, choose_backend
from .kv_cache import CPU_KV_CACHE_BYTES, KVCache, kv_bytes_per_block, num_blocks_in
from .model import head_dim
from .weights import load_decoder


class ModelRunner:
    """Runs one step of a batch. num_tokens_computed counts the positions that went through the model."""

    def __init__(self, config: EngineConfig, checkpoint: Checkpoint, max_num_batched_tokens: int) -> None:
        assert config.device is not None, "EngineConfig chooses the device"
        self.device, self.block_size = config.device, config.block_size
        self.dtype = default_dtype(config.device) if config.dtype == "auto" else DTYPES[config.dtype]
        self.model_config: Any = checkpoint.config
        self.model = load_decoder(checkpoint, self.dtype, config.device)
        self.num_tokens_computed, self.num_threads = 0, config.num_threads
        self._scale = head_dim(self.model_config) ** -0.5
        self._backend = choose_backend(config.attention_backend, config.device)
        num_blocks = self._num_blocks(config, max_num_batched_tokens)
        self.kv_cache = KVCache(self.model_config, num_blocks, self.block_size, self.dtype, self.device)
        self.attention = PagedAttention(self.kv_cache, self._scale, self._backend)

    @torch.inference_mode()
    def execute(self, requests: list[Request], blocks: BlockManager) -> Tensor:
        """One forward pass over all tokens that the requests lack; those with a context in the cache come first.

        Returns logits [num_requests, vocab_size], float32, of each request's last token.
        """
        set_num_threads(self.num_threads)  # here, since the server loads in another thread
        firsts = [request.num_computed_tokens for request in requests]
        token_ids = [token for r, first in zip(requests, firsts, strict=True) for token in r.tokens_from(first)]
        positions = [p for r, first in zip(requests, firsts, strict=True) for p in range(first, r.num_tokens)]
        metadata = self._metadata(requests, blocks)
        hidden = self.model(
            torch.tensor(token_ids, device=self.device),
            torch.tensor(positions, device=self.device),
            partial(self.attention.attend, metadata),
        )
        self.num_tokens_computed += len(token_ids)
        last_rows = torch.tensor(metadata.query_start_loc[1:], device=self.device) - 1
        return self.model.compute_logits(hidden[last_rows])

    def _metadata(self, requests: list[Request], blocks: BlockManager) -> AttentionMetadata:
        slots: list[int] = []
        query_start_loc = [0]
        for request in requests:
            positions = range(request.num_computed_tokens, request.num_tokens)
            slots += [blocks.slot(request.request_id, position) for position in positions]
            query_start_loc.append(len(slots))
        decodes = [request for request in requests if request.num_computed_tokens > 0]
        tables = [blocks.block_tables[request.request_id] for request in decodes]
        width = max(map(len, tables), default=0)
        padded = [table + [NULL_BLOCK] * (width - len(table)) for table in tables]
        return AttentionMetadata(
            num_decodes=len(decodes),
            slot_mapping=torch.tensor(slots, device=self.device),
            query_start_loc=query_start_loc,
            block_tables=torch.tensor(padded, dtype=torch.int32, device=self.device),
            context_lens=torch.tensor([r.num_tokens for r in decodes], dtype=torch.int32, device=self.device),
            block_size=self.block_size,
        )

    def _num_blocks(self, config: EngineConfig, max_num_batched_tokens: int) -> int:
        """The pool's size: as many blocks as were asked for, or as the budget holds."""
        if config.num_kv_blocks is not None:
            return config.num_kv_blocks
        bytes_per_block = kv_bytes_per_block(self.model_config, self.block_size, self.dtype)
        if config.kv_cache_memory is not None:
            return num_blocks_in(config.kv_cache_memory, bytes_per_block, "kv_cache_memory")
        if not self.device.startswith("cuda"):
            return num_blocks_in(CPU_KV_CACHE_BYTES, bytes_per_block, "kv_cache_memory")
        free = int(config.gpu_memory_utilization * torch.cuda.get_device_properties(self.device).total_memory)
        free -= self._peak_memory(max_num_batched_tokens)
        if free <= 0:
            raise FieldError("gpu_memory_utilization", f"{config.gpu_memory_utilization} leaves no room for a KV cache")
        return num_blocks_in(free, bytes_per_block, "gpu_memory_utilization")

    @torch.inference_mode()
    def _peak_memory(self, num_tokens: int) -> int:
        """Bytes that weights and the largest prefill take, measured by running one on dummy tokens, as vLLM does."""
        torch.cuda.reset_peak_memory_stats(self.device)
        tokens = torch.zeros(num_tokens, dtype=torch.int64, device=self.device)
        hidden = self.model(tokens, tokens, lambda layer, query, key, value: torch.empty_like(query))
        self.model.compute_logits(hidden[:1])
        free, total = torch.cuda.mem_get_info(self.device)
        outside = total - free - torch.cuda.memory_reserved(self.device)  # what others, and CUDA itself, hold
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.empty_cache()
        return peak + outside
