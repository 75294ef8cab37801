"""A step's plain data → one flattened batch of tensors → logits → token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from common.sampling_params import MAX_LOGPROBS, SamplingParams

from ..config import EngineConfig
from ..messages import ScheduledRequest, StepInput, StepOutput
from .attention import AttentionMetadata, PagedAttention
from .device import to_device, to_device_at_once
from .draft_model import DraftModelProposer, samples_drafts
from .kernels.ops import Kernels
from .kv_cache import KVCache
from .model import Attend, DecoderModel, Rotation
from .prompt_logprobs import PromptSpan, prompt_spans, to_prompt_logprobs
from .rejection_sampler import SpecDecodeMetadata
from .request_states import RequestStates
from .sampler import LogprobsTensors, Sampler, SamplerOutput, SamplingState, to_logprobs, top_logprobs
from .small_steps import SmallSteps, make_small_steps
from .token_buffer import TokenBuffer


@dataclass(frozen=True, slots=True)
class Batch:
    """A step as tensors: the tokens of all its requests, laid end to end.

    requests, params: the step's requests. new_rows: rows of the token buffer, and the tokens to write there first.
    num_drafted_tokens: for these rows, how many tokens the draft model has.
    new_indices: where in the token buffer new_token_ids go, which the last stage has sampled.
    input_indices: [num_tokens], where in the token buffer the input tokens are. positions: [num_tokens].
    logits_indices: [num_rows], the tokens after which one is sampled. output_indices: [num_rows], where in the token
    buffer the sampled tokens go. sampling: how each is sampled. spec: the draft tokens to verify, if there are any.
    draft_indices: [num_drafts], where in the token buffer draft_token_ids go. prompt_spans: the tokens whose logits are
    needed for prompt logprobs.
    """

    requests: list[ScheduledRequest]
    params: list[SamplingParams]
    new_rows: list[tuple[int, list[int]]]
    num_drafted_tokens: list[tuple[int, int]]
    new_indices: Tensor
    new_token_ids: Tensor
    input_indices: Tensor
    positions: Tensor
    metadata: AttentionMetadata
    logits_indices: Tensor
    output_indices: Tensor
    sampling: list[SamplingState]
    spec: SpecDecodeMetadata | None
    draft_indices: Tensor
    draft_token_ids: Tensor
    prompt_spans: list[PromptSpan]


class ModelRunner:
    """Runs steps in two halves. prepare() is called when a step is launched, and touches no tensor that an earlier step
    may still use. run() is called on the stream, after the earlier steps have run.

    num_tokens_computed counts the positions that went through the model.
    """

    def __init__(
        self,
        model: DecoderModel,
        config: EngineConfig,
        kernels: Kernels,
        eos_token_ids: frozenset[int],
        drafter: DraftModelProposer | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        assert config.max_model_len is not None, "resolve_config fills it in"
        self.model, self.device, self.config, self.drafter = model, model.device, config, drafter
        self.kernels, self.sampler = kernels, Sampler(eos_token_ids, kernels, generator)
        self.tokens = TokenBuffer(config.max_num_seqs, config.max_model_len, self.device)
        self.states = RequestStates(config.max_num_seqs, config.max_model_len, config.block_size)
        self.attention: PagedAttention | None = None  # set_cache() comes first
        self.small_steps: SmallSteps | None = None
        self.num_tokens_computed = 0

    def set_cache(self, kv_cache: KVCache) -> None:
        self.attention = PagedAttention(kv_cache, self.model.head_dim**-0.5, self.kernels)
        max_blocks = self.states.block_tables.shape[1]
        if self.drafter is not None:
            self.drafter.set_cache(kv_cache.num_blocks, max_blocks)
        self.small_steps = make_small_steps(self.model, self.attention, self.config, max_blocks)

    @property
    def pools(self) -> list[Tensor]:
        """The KV pools of the model and of the draft model: see KVCache."""
        attentions = [self.attention, None if self.drafter is None else self.drafter.attention]
        return [attention.kv_cache.data for attention in attentions if attention is not None]

    def prepare(self, step: StepInput) -> Batch:
        """Update the rows of the step's requests and lay their tokens end to end."""
        for new in step.new_requests:
            self.states.add(new)
        rows, positions, logits_indices = list[int](), list[int](), list[int]()
        sampling, drafted, sampled_before = list[SamplingState](), list[tuple[int, int]](), list[tuple[int, int]]()
        for request in step.requests:
            self.states.append_blocks(request.row, request.new_block_ids)
            end = request.num_computed_tokens + request.num_scheduled_tokens
            rows += [request.row] * request.num_scheduled_tokens
            positions += range(request.num_computed_tokens, end)
            num_known = end - len(request.draft_token_ids)
            drafted += [(request.row, position) for position in range(num_known, end)]
            first_new = num_known - len(request.new_token_ids)
            sampled_before += [(request.row, position) for position in range(first_new, num_known)]
            if request.is_sampled:
                logits_indices += range(len(positions) - 1 - (end - num_known), len(positions))
                sampling += [self._sampling_state(request.row, num_tokens) for num_tokens in range(num_known, end + 1)]
        integers = {
            "new_indices": self._flat_indices(sampled_before),
            "new_token_ids": [token_id for request in step.requests for token_id in request.new_token_ids],
            "input_indices": self._flat_indices(zip(rows, positions, strict=True)),
            "positions": positions,
            "slot_mapping": self.states.slots(rows, positions),
            "logits_indices": logits_indices,
            "output_indices": self._flat_indices((state.row, state.num_tokens) for state in sampling),
            "draft_indices": self._flat_indices(drafted),
            "draft_token_ids": [token_id for request in step.requests for token_id in request.draft_token_ids],
        }
        tensors = to_device_at_once(integers, self.device)
        return Batch(
            requests=step.requests,
            params=[self.states.params[request.row] for request in step.requests],
            new_rows=[(new.row, new.token_ids) for new in step.new_requests],
            num_drafted_tokens=[(new.row, new.num_drafted_tokens) for new in step.new_requests],
            new_indices=tensors["new_indices"],
            new_token_ids=tensors["new_token_ids"],
            input_indices=tensors["input_indices"],
            positions=tensors["positions"],
            metadata=self._metadata(step, tensors["slot_mapping"]),
            logits_indices=tensors["logits_indices"],
            output_indices=tensors["output_indices"],
            sampling=sampling,
            spec=self._spec_decode_metadata(step.requests),
            draft_indices=tensors["draft_indices"],
            draft_token_ids=tensors["draft_token_ids"],
            prompt_spans=prompt_spans(step.requests, self.states, self.config.max_num_seqs),
        )

    def _sampling_state(self, row: int, num_tokens: int) -> SamplingState:
        return SamplingState(self.states.params[row], row, self.states.num_prompt_tokens[row], num_tokens)

    def _flat_indices(self, places: Iterable[tuple[int, int]]) -> list[int]:
        """The flat indices of (row, position) pairs in the token buffer."""
        return [self.tokens.flat_index(row, position) for row, position in places]

    def _spec_decode_metadata(self, requests: Sequence[ScheduledRequest]) -> SpecDecodeMetadata | None:
        sampled = [request for request in requests if request.is_sampled]
        counts = [len(request.draft_token_ids) for request in sampled]
        if not any(counts):
            return None
        random = [
            index
            for index, request in enumerate(sampled)
            if counts[index] and self.drafter is not None and samples_drafts(self.states.params[request.row])
        ]
        return SpecDecodeMetadata(
            first_rows=[0, *accumulate(count + 1 for count in counts)][:-1],
            num_draft_tokens=counts,
            draft_token_ids=to_device(
                [r.draft_token_ids + [0] * (max(counts) - len(r.draft_token_ids)) for r in sampled], self.device
            ),
            random=random,
            buffer_rows=[sampled[index].row for index in random],
        )

    def _metadata(self, step: StepInput, slot_mapping: Tensor) -> AttentionMetadata:
        query_lens = [request.num_scheduled_tokens for request in step.requests]
        context_lens = [request.num_computed_tokens + request.num_scheduled_tokens for request in step.requests]
        ends = {"query_start_loc": list(accumulate(query_lens, initial=0)), "context_lens": context_lens}
        return AttentionMetadata(
            slot_mapping=slot_mapping,
            block_tables=to_device(self.states.tables([request.row for request in step.requests]), self.device),
            **to_device_at_once(ends, self.device, np.int32),
            max_query_len=max(query_lens),
        )

    @torch.inference_mode()
    def run(self, batch: Batch, note_layer: Callable[[int], None] | None = None) -> SamplerOutput:
        """One forward pass, and in the last stage the tokens that are sampled from it, and draft tokens for the next
        step.

        The previous step may have sampled its input. note_layer: called when a layer has its keys and values.
        """
        assert self.attention is not None, "set_cache() comes before the first step"
        self.num_tokens_computed += len(batch.positions)
        for row, token_ids in batch.new_rows:
            self.tokens.fill(row, token_ids)
        self.tokens.write(batch.new_indices, batch.new_token_ids)
        self.tokens.write(batch.draft_indices, batch.draft_token_ids)
        input_ids = self.tokens.read(batch.input_indices)
        hidden = self._forward(self.attention, input_ids, batch, note_layer)
        if not self.model.stage.is_last:
            return SamplerOutput(batch.logits_indices[:0], None)
        prompt_logprobs = self._prompt_logprobs(batch, hidden)
        logits = self.model.compute_logits(hidden[batch.logits_indices])
        draft_probs = None if self.drafter is None else self.drafter.probs
        sampled = self.sampler.sample(logits, batch.sampling, self.tokens.data, batch.spec, draft_probs)
        self.tokens.write(batch.output_indices, sampled.token_ids)
        draft_token_ids = None if self.drafter is None else self._propose(batch, sampled, self.drafter)
        return replace(sampled, draft_token_ids=draft_token_ids, prompt_logprobs=prompt_logprobs)

    def _forward(
        self, attention: PagedAttention, input_ids: Tensor, batch: Batch, note_layer: Callable[[int], None] | None
    ) -> Tensor:
        """The hidden states of the step's tokens."""
        if self.small_steps is not None and note_layer is None:
            hidden = self.small_steps.run(input_ids, batch.positions, batch.metadata)
            if hidden is not None:
                return hidden
        attend: Attend = partial(attention.attend, batch.metadata)
        if note_layer is not None:
            attend = partial(attend_and_note, attend, note_layer)
        computed: Tensor = self.model(input_ids, batch.positions, attend)
        return computed

    @torch.inference_mode()
    def run_dummy(self) -> SamplerOutput:
        """A forward pass over no tokens: experts on this rank may get tokens of others."""
        none = torch.empty(0, dtype=torch.int64, device=self.device)
        self.model(none, none, lambda layer, query, key, value, rotation: query)
        return SamplerOutput(none, None)

    def _prompt_logprobs(self, batch: Batch, hidden: Tensor) -> list[LogprobsTensors]:
        """The logprobs of each span. It has at most max_num_seqs tokens: no more memory than profile() counts."""
        found = []
        for span in batch.prompt_spans:
            tokens = slice(span.start, span.start + span.num_tokens)
            logprobs = self.model.compute_logits(hidden[tokens]).log_softmax(dim=-1)
            next_token_ids = self.tokens.read(batch.input_indices[tokens] + 1)
            found.append(top_logprobs(logprobs, next_token_ids, span.num_top))
        return found

    def _propose(self, batch: Batch, sampled: SamplerOutput, drafter: DraftModelProposer) -> list[list[int]]:
        """Let the drafter propose. On a GPU, this waits for the step, to know how many draft tokens were accepted."""
        for row, num_tokens in batch.num_drafted_tokens:
            drafter.add(row, num_tokens)
        accepted = iter([0] * len(batch.sampling) if sampled.num_accepted is None else sampled.num_accepted.tolist())
        num_accepted = [next(accepted) if request.is_sampled else 0 for request in batch.requests]
        return drafter.propose(batch.requests, batch.params, num_accepted, self.tokens, batch.metadata.block_tables)

    @torch.inference_mode()
    def profile(self) -> None:
        """Allocate as much memory as the largest step: a forward pass over the whole token budget, the sampler for all
        rows with all features on, and the draft model."""
        assert self.config.max_num_batched_tokens is not None, "resolve_config fills it in"
        tokens = torch.zeros(self.config.max_num_batched_tokens, dtype=torch.int64, device=self.device)
        params = SamplingParams(top_p=0.5, seed=0, presence_penalty=1.0, logprobs=MAX_LOGPROBS)
        sampling = [SamplingState(params, row, 0, 1) for row in range(self.config.max_num_seqs)]
        for model in [self.model] if self.drafter is None else [self.model, self.drafter.model]:
            hidden = model(tokens, tokens, lambda layer, query, key, value, rotation: torch.empty_like(query))
            if not model.stage.is_last:
                return
            logits = model.compute_logits(hidden[:1]).repeat(len(sampling), 1)
            self.sampler.sample(logits, sampling, self.tokens.data)


def attend_and_note(
    attend: Attend, note_layer: Callable[[int], None], layer: int, query: Tensor, key: Tensor, value: Tensor,
    rotation: Rotation,
) -> Tensor:  # fmt: skip
    """attend(), and then note_layer()."""
    output = attend(layer, query, key, value, rotation)
    note_layer(layer)
    return output


def to_step_output(sampled: SamplerOutput, batch: Batch) -> StepOutput:
    """The worker's answer, as plain data."""
    token_ids, states = sampled.token_ids.tolist(), batch.sampling
    logprobs = None if sampled.logprobs is None else sampled.logprobs.tolist()
    first_rows = range(len(states)) if batch.spec is None else batch.spec.first_rows
    accepted = [0] * len(first_rows) if sampled.num_accepted is None else sampled.num_accepted.tolist()
    output = StepOutput([], [], sampled.draft_token_ids or [[] for _ in first_rows])
    for first, num_accepted in zip(first_rows, accepted, strict=True):
        rows, num_top = slice(first, first + num_accepted + 1), states[first].params.logprobs
        output.token_ids.append(token_ids[rows])
        if logprobs is None or num_top is None:
            output.logprobs.append(None)
        else:
            output.logprobs.append([to_logprobs(*row, num_top) for row in logprobs[rows]])
    spans = zip(batch.prompt_spans, sampled.prompt_logprobs, strict=True)
    output.prompt_logprobs = [to_prompt_logprobs(*pair) for pair in spans]
    return output
