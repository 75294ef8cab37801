"""A step's plain data → one flattened batch of tensors → logits → token ids."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from common.sampling_params import MAX_LOGPROBS, SamplingParams

from ..config import EngineConfig
from ..messages import StepInput, StepOutput
from .attention import AttentionMetadata, PagedAttention, choose_backend
from .device import to_device
from .kv_cache import KVCache, slot_mapping
from .model import DecoderModel
from .prompt_logprobs import PromptSpan, prompt_spans, to_prompt_logprobs
from .request_states import RequestStates
from .sampler import LogprobsTensors, Sampler, SamplerOutput, SamplingState, to_logprobs, top_logprobs
from .token_buffer import TokenBuffer


@dataclass(frozen=True, slots=True)
class Batch:
    """A step as tensors: the tokens of all its requests, laid end to end.

    input_indices: [num_tokens], where in the token buffer the input tokens are. positions: [num_tokens].
    logits_indices: [num_seqs], the tokens after which one is sampled. output_indices: [num_seqs], where in the token
    buffer the sampled tokens go. sampling: how each is sampled. prompt_spans: the tokens whose logits are needed for
    prompt logprobs.
    """

    input_indices: Tensor
    positions: Tensor
    metadata: AttentionMetadata
    logits_indices: Tensor
    output_indices: Tensor
    sampling: list[SamplingState]
    prompt_spans: list[PromptSpan]


class ModelRunner:
    """Runs steps. num_tokens_computed counts the positions that went through the model."""

    def __init__(self, model: DecoderModel, config: EngineConfig, eos_token_ids: frozenset[int]) -> None:
        assert config.max_model_len is not None, "resolve_config fills it in"
        self.model, self.device, self.config = model, model.device, config
        self.sampler = Sampler(eos_token_ids)
        self.tokens = TokenBuffer(config.max_num_seqs, config.max_model_len, self.device)
        self.states = RequestStates(config.max_num_seqs, config.max_model_len, config.block_size)
        self.attention: PagedAttention | None = None  # set_cache() comes first
        self.num_tokens_computed = 0

    def set_cache(self, kv_cache: KVCache) -> None:
        backend = choose_backend(self.config.attention_backend, self.device, self.model.dtype)
        self.attention = PagedAttention(kv_cache, self.model.head_dim**-0.5, backend)

    @torch.inference_mode()
    def execute(self, step: StepInput) -> StepOutput:
        """One forward pass, and a token sampled for each request."""
        batch = self._prepare(step)
        return to_step_output(self._run(batch), batch)

    def _prepare(self, step: StepInput) -> Batch:
        """Update the rows of the step's requests and lay their tokens end to end."""
        for new in step.new_requests:
            self.states.add(new)
            self.tokens.fill(new.row, new.token_ids)
        rows, positions, sampling = list[int](), list[int](), list[SamplingState]()
        for request in step.requests:
            self.states.append_blocks(request.row, request.new_block_ids)
            end = request.num_computed_tokens + request.num_scheduled_tokens
            rows += [request.row] * request.num_scheduled_tokens
            positions += range(request.num_computed_tokens, end)
            params, num_prompt_tokens = self.states.params[request.row], self.states.num_prompt_tokens[request.row]
            sampling.append(SamplingState(params, request.row, num_prompt_tokens, end))
        flat_index = self.tokens.flat_index
        metadata = self._metadata(step, torch.tensor(rows), torch.tensor(positions))
        return Batch(
            input_indices=to_device([flat_index(*place) for place in zip(rows, positions, strict=True)], self.device),
            positions=to_device(positions, self.device),
            metadata=metadata,
            logits_indices=to_device([end - 1 for end in metadata.query_start_loc[1:]], self.device),
            output_indices=to_device([flat_index(state.row, state.num_tokens) for state in sampling], self.device),
            sampling=sampling,
            prompt_spans=prompt_spans(step.requests, self.states, self.config.max_num_seqs),
        )

    def _metadata(self, step: StepInput, rows: Tensor, positions: Tensor) -> AttentionMetadata:
        query_lens = [request.num_scheduled_tokens for request in step.requests]
        decodes = [request for request in step.requests if request.num_computed_tokens]  # they come first
        return AttentionMetadata(
            num_decodes=len(decodes),
            slot_mapping=slot_mapping(self.states.block_tables, rows, positions, self.states.block_size).to(
                self.device
            ),
            query_start_loc=list(accumulate(query_lens, initial=0)),
            block_tables=to_device(self.states.tables([request.row for request in decodes]), self.device),
            context_lens=to_device([r.num_computed_tokens + 1 for r in decodes], self.device, torch.int32),
        )

    def _run(self, batch: Batch) -> SamplerOutput:
        assert self.attention is not None, "set_cache() comes before the first step"
        self.num_tokens_computed += len(batch.positions)
        input_ids = self.tokens.read(batch.input_indices)
        hidden = self.model(input_ids, batch.positions, partial(self.attention.attend, batch.metadata))
        prompt_logprobs = self._prompt_logprobs(batch, hidden)
        logits = self.model.compute_logits(hidden[batch.logits_indices])
        sampled = self.sampler.sample(logits, batch.sampling, self.tokens.data)
        self.tokens.write(batch.output_indices, sampled.token_ids)
        return replace(sampled, prompt_logprobs=prompt_logprobs)

    def _prompt_logprobs(self, batch: Batch, hidden: Tensor) -> list[LogprobsTensors]:
        """The logprobs of each span. It has at most max_num_seqs tokens: no more memory than profile() counts."""
        found = []
        for span in batch.prompt_spans:
            tokens = slice(span.start, span.start + span.num_tokens)
            logprobs = self.model.compute_logits(hidden[tokens]).log_softmax(dim=-1)
            next_token_ids = self.tokens.read(batch.input_indices[tokens] + 1)
            found.append(top_logprobs(logprobs, next_token_ids, span.num_top))
        return found

    @torch.inference_mode()
    def profile(self) -> None:
        """Allocate as much memory as the largest step: a forward pass over the whole token budget, and the sampler for
        all rows with all features on."""
        assert self.config.max_num_batched_tokens is not None, "resolve_config fills it in"
        tokens = torch.zeros(self.config.max_num_batched_tokens, dtype=torch.int64, device=self.device)
        hidden = self.model(tokens, tokens, lambda layer, query, key, value: torch.empty_like(query))
        params = SamplingParams(top_p=0.5, seed=0, presence_penalty=1.0, logprobs=MAX_LOGPROBS)
        sampling = [SamplingState(params, row, 0, 1) for row in range(self.config.max_num_seqs)]
        logits = self.model.compute_logits(hidden[:1]).repeat(len(sampling), 1)
        self.sampler.sample(logits, sampling, self.tokens.data)


def to_step_output(sampled: SamplerOutput, batch: Batch) -> StepOutput:
    """The worker's answer, as plain data."""
    rows = [None] * len(batch.sampling) if sampled.logprobs is None else sampled.logprobs.tolist()
    logprobs = [
        None if row is None or state.params.logprobs is None else to_logprobs(*row, state.params.logprobs)
        for row, state in zip(rows, batch.sampling, strict=True)
    ]
    prompt_logprobs = [
        to_prompt_logprobs(*pair) for pair in zip(batch.prompt_spans, sampled.prompt_logprobs, strict=True)
    ]
    return StepOutput(sampled.token_ids.tolist(), logprobs, prompt_logprobs)
