"""Requests in, a launched step out: the model, its KV cache, and the tensors of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from common.checkpoint import DTYPES, Checkpoint, default_dtype
from common.errors import FieldError
from common.threads import set_num_threads

from ..config import EngineConfig
from ..core.block_manager import NULL_BLOCK, BlockManager
from ..core.scheduler import SchedulerOutput
from .attention import AttentionMetadata, PagedAttention, choose_backend
from .device import upload
from .kv_cache import CPU_KV_CACHE_BYTES, KVCache, kv_bytes_per_block, num_blocks_in
from .model import head_dim
from .sampler import Sampler, SamplerOutput, SamplingState
from .stream import StepHandle, make_stream
from .token_buffer import TokenBuffer
from .weights import load_decoder


@dataclass(frozen=True, slots=True)
class Batch:
    """A step as the model's side sees it, with nothing in it that the scheduler goes on to change.

    new_rows: rows of the token buffer that begin with these tokens. input_places: [num_tokens], where in the buffer
    the input is; positions: [num_tokens]. last_rows: [num_sampled], which of the inputs are followed by a sampled
    token; output_places: [num_sampled], where that goes; sampling: of the same requests.
    """

    new_rows: list[tuple[int, list[int]]]
    input_places: Tensor
    positions: Tensor
    metadata: AttentionMetadata
    last_rows: Tensor
    output_places: Tensor
    sampling: list[SamplingState]


class ModelRunner:
    """Runs steps on a stream. num_tokens_computed counts the positions that went through the model."""

    def __init__(
        self, config: EngineConfig, checkpoint: Checkpoint, max_model_len: int, max_num_batched_tokens: int
    ) -> None:
        assert config.device is not None, "EngineConfig chooses the device"
        self.device, self.block_size = config.device, config.block_size
        self.dtype = default_dtype(config.device) if config.dtype == "auto" else DTYPES[config.dtype]
        self.model_config: Any = checkpoint.config
        self.stream = make_stream(config.device)
        self.stream.run(lambda: set_num_threads(config.num_threads))
        self.model = self.stream.run(lambda: load_decoder(checkpoint, self.dtype, self.device))
        self.num_tokens_computed = 0
        self._scale = head_dim(self.model_config) ** -0.5
        self._backend = choose_backend(config.attention_backend, config.device)
        num_blocks = self._num_blocks(config, max_num_batched_tokens)
        self.kv_cache = KVCache(self.model_config, num_blocks, self.block_size, self.dtype, self.device)
        self.attention = PagedAttention(self.kv_cache, self._scale, self._backend)
        self.tokens = self.stream.run(lambda: TokenBuffer(config.max_num_seqs, max_model_len, self.device))
        self.sampler = Sampler(checkpoint.eos_token_ids)

    def launch(self, scheduled: SchedulerOutput, blocks: BlockManager) -> StepHandle:
        """Begin a step: one forward pass over the tokens that were scheduled, and a token sampled for each request that
        is complete with them.

        Returns before it is done. It runs after the steps that were launched before.
        """
        self.num_tokens_computed += scheduled.total_num_scheduled_tokens
        batch = self._prepare(scheduled, blocks)
        return self.stream.launch(lambda: self._run(batch))

    def _prepare(self, scheduled: SchedulerOutput, blocks: BlockManager) -> Batch:
        """The step's tensors. What the requests are at this moment is copied out of them."""
        # exercise: prepare
        new_rows, input_places, positions = [], list[int](), list[int]()
        last_rows, output_places, sampling = list[int](), list[int](), []
        self.tokens.release(scheduled.left)
        rows = zip(scheduled.requests, scheduled.num_computed_tokens, scheduled.num_sampled_tokens, strict=True)
        for request, start, num_sampled in rows:
            if start == 0:
                new_rows.append((self.tokens.acquire(request.request_id), request.token_ids))
            row, end = self.tokens.rows[request.request_id], request.num_computed_tokens
            positions += range(start, end)
            input_places += range(self.tokens.place(row, start), self.tokens.place(row, end))
            if num_sampled:
                last_rows.append(len(positions) - 1)
                output_places.append(self.tokens.place(row, end))
                num_prompt_tokens = len(request.prompt_token_ids)
                sampling.append(SamplingState(request.params, request.generator, row, num_prompt_tokens, end))
        # exercise: end
        return Batch(
            new_rows=new_rows,
            input_places=self._upload(input_places),
            positions=self._upload(positions),
            metadata=self._metadata(scheduled, blocks),
            last_rows=self._upload(last_rows),
            output_places=self._upload(output_places),
            sampling=sampling,
        )

    @torch.inference_mode()
    def _run(self, batch: Batch) -> SamplerOutput:
        """On the model's side. Its input may be what the step before wrote to the token buffer a moment ago."""
        for row, token_ids in batch.new_rows:
            self.tokens.fill(row, token_ids)
        input_ids = self.tokens.read(batch.input_places)
        hidden = self.model(input_ids, batch.positions, partial(self.attention.attend, batch.metadata))
        logits = self.model.compute_logits(hidden[batch.last_rows])
        sampled = self.sampler.sample(logits, batch.sampling, self.tokens.data)
        self.tokens.write(batch.output_places, sampled.token_ids)
        return sampled

    def _upload(self, values: Sequence[object], dtype: torch.dtype = torch.int64) -> Tensor:
        return upload(values, self.device, dtype)

    def _metadata(self, scheduled: SchedulerOutput, blocks: BlockManager) -> AttentionMetadata:
        slots: list[int] = []
        for request, start in zip(scheduled.requests, scheduled.num_computed_tokens, strict=True):
            positions = range(start, request.num_computed_tokens)
            slots += [blocks.slot(request.request_id, position) for position in positions]
        tables = [blocks.block_tables[request.request_id] for request in scheduled.requests]
        width = max(map(len, tables))
        padded = [table + [NULL_BLOCK] * (width - len(table)) for table in tables]
        return AttentionMetadata(
            num_decodes=len(list(takewhile(lambda n: n == 1, scheduled.num_scheduled_tokens))),
            query_lens=scheduled.num_scheduled_tokens,
            context_lens=[request.num_computed_tokens for request in scheduled.requests],
            slot_mapping=self._upload(slots),
            block_tables=self._upload(padded, torch.int32),
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
