"""Draft tokens from a small model that has the same tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from common.sampling_params import SamplingParams

from ..config import EngineConfig
from ..messages import ScheduledRequest
from .attention import AttentionMetadata, PagedAttention
from .device import to_device
from .kernels.ops import Kernels
from .kv_cache import KVCache, slot_mapping
from .model import DecoderModel
from .quantization.kv_codes import KVFormat
from .sampler import SamplingState, draw, probabilities
from .small_steps import SmallSteps, make_small_steps
from .token_buffer import TokenBuffer


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens of one request that a pass computes: positions start to end - 1.

    seq: the request's index in the step. num_drafts: how many draft tokens follow.
    """

    seq: int
    row: int
    params: SamplingParams
    start: int
    end: int
    num_drafts: int


class DraftModelProposer:
    """Follows the target: after each step, it computes the step's tokens with the draft model, then more on its own.

    Its KV cache has the same blocks as the target's. So it needs no block tables of its own, and a prefix that is
    cached for the target is cached here too. probs: [max_num_seqs, num_speculative_tokens, vocab_size], from which the
    random draft tokens of each row were drawn; they stay in the worker.
    """

    def __init__(
        self, model: DecoderModel, kv_format: KVFormat, config: EngineConfig, kernels: Kernels,
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        self.generator, self.kv_format, self.kernels = generator, kv_format, kernels
        self.model, self.device, self.config = model, model.device, config
        shape = (config.max_num_seqs, config.num_speculative_tokens, model.config.vocab_size)
        self.probs = torch.empty(shape, device=self.device)
        self.attention: PagedAttention | None = None  # set_cache() comes first
        self.small_steps: SmallSteps | None = None
        self.num_tokens_computed = 0
        self._num_computed = [0] * config.max_num_seqs  # tokens of each row that are in the draft model's cache

    def set_cache(self, num_blocks: int, max_blocks: int) -> None:
        """max_blocks: the width of the widest block table."""
        kv_cache = KVCache(self.model, num_blocks, self.config.block_size, self.kv_format)
        self.attention = PagedAttention(kv_cache, self.model.head_dim**-0.5, self.kernels)
        self.small_steps = make_small_steps(self.model, self.attention, self.config, max_blocks)

    @property
    def kv_cache(self) -> KVCache:
        assert self.attention is not None, "set_cache() comes first"
        return self.attention.kv_cache

    def add(self, row: int, num_cached_tokens: int) -> None:
        """Assign a row to a new request, whose first num_cached_tokens tokens were found in the cache."""
        self._num_computed[row] = num_cached_tokens

    def propose(
        self, requests: Sequence[ScheduledRequest], params: Sequence[SamplingParams], num_accepted: Sequence[int],
        tokens: TokenBuffer, block_tables: Tensor,
    ) -> list[list[int]]:  # fmt: skip
        """After a step: draft tokens for each sampled request, as many as the step asked for.

        params: of each request. num_accepted: how many of its draft tokens the step accepted. tokens: with the tokens
        that the step sampled. block_tables: [num_requests, max_blocks], with room for all draft tokens but the last.
        """
        triples = zip(requests, params, num_accepted, strict=True)
        spans = [self._catch_up(seq, *triple) for seq, triple in enumerate(triples)]
        spans = [span for span in spans if span.start < span.end]
        spans.sort(key=lambda span: -span.num_drafts)  # those with the most draft tokens come first
        indices = [tokens.flat_index(span.row, position) for span in spans for position in range(span.start, span.end)]
        drafts = self._extend(tokens.read(to_device(indices, self.device, torch.int64)), spans, block_tables)
        by_seq = {span.seq: [ids[i] for ids in drafts if i < len(ids)] for i, span in enumerate(spans)}
        return [by_seq.get(seq, []) for seq, request in enumerate(requests) if request.is_sampled]

    def _catch_up(self, seq: int, request: ScheduledRequest, params: SamplingParams, num_accepted: int) -> Span:
        """The tokens that the target has computed and the draft model has not, and the newest one if drafts follow it.

        Rejected draft tokens that this model has computed do not count.
        """
        num_computed = request.num_computed_tokens + request.num_scheduled_tokens - len(request.draft_token_ids)
        num_computed += num_accepted
        start = min(self._num_computed[request.row], num_computed)
        end = num_computed + (request.num_next_drafts > 0)
        self._num_computed[request.row] = end + max(0, request.num_next_drafts - 1)
        return Span(seq, request.row, params, start, end, request.num_next_drafts)

    def _extend(self, input_ids: Tensor, spans: list[Span], block_tables: Tensor) -> list[list[int]]:
        """A pass over the spans, then one for each further draft token of those that get more.

        Returns the first draft tokens, then the second ones, and so on: fewer each time, in the order of the spans.
        """
        drafts: list[Tensor] = []
        while spans:
            hidden = self._forward(input_ids, spans, block_tables)
            spans = [span for span in spans if span.num_drafts > len(drafts)]
            if spans:
                drafts.append(self._choose(self.model.compute_logits(hidden[: len(spans)]), spans, len(drafts)))
            spans = [replace(s, start=s.end, end=s.end + 1) for s in spans if s.num_drafts > len(drafts)]
            input_ids = drafts[-1][: len(spans)] if drafts else input_ids
        return [token_ids.tolist() for token_ids in drafts]

    def _choose(self, logits: Tensor, spans: list[Span], number: int) -> Tensor:
        """Draft token `number` of each request: the likeliest, or one drawn as the target would draw it."""
        token_ids = logits.argmax(dim=-1)
        if random := [index for index, span in enumerate(spans) if samples_drafts(span.params)]:
            states = [SamplingState(spans[index].params, spans[index].row, 0, 0) for index in random]
            indices, rows = to_device(random, self.device), to_device([state.row for state in states], self.device)
            probs = probabilities(logits[indices], states)
            self.probs[rows, number] = probs / probs.sum(dim=-1, keepdim=True)
            token_ids[indices] = draw(probs, states, self.generator)
        return token_ids

    def _forward(self, input_ids: Tensor, spans: list[Span], block_tables: Tensor) -> Tensor:
        """One pass over the spans' tokens, laid end to end: input_ids [num_tokens].

        Returns the hidden state of each span's last token: [num_spans, hidden_size].
        """
        assert self.attention is not None, "set_cache() comes before the first step"
        self.num_tokens_computed += len(input_ids)
        lens = [span.end - span.start for span in spans]
        tables = block_tables[to_device([span.seq for span in spans], self.device)]
        seqs = to_device([seq for seq, length in enumerate(lens) for _ in range(length)], self.device)
        positions = to_device([p for span in spans for p in range(span.start, span.end)], self.device)
        query_start_loc = to_device(list(accumulate(lens, initial=0)), self.device, torch.int32)
        metadata = AttentionMetadata(
            slot_mapping=slot_mapping(tables, seqs, positions, self.config.block_size),
            block_tables=tables,
            query_start_loc=query_start_loc,
            context_lens=to_device([span.end for span in spans], self.device, torch.int32),
            max_query_len=max(lens),
        )
        hidden = None if self.small_steps is None else self.small_steps.run(input_ids, positions, metadata)
        if hidden is None:
            hidden = self.model(input_ids, positions, partial(self.attention.attend, metadata))
        return hidden[query_start_loc[1:].long() - 1]


def samples_drafts(params: SamplingParams) -> bool:
    """Whether draft tokens are drawn at random, as the target draws.

    A seeded answer must not depend on its draft tokens: for it, the likeliest token is proposed, and accepted if the
    seeded draw gives the same token.
    """
    return params.temperature > 0 and params.seed is None
