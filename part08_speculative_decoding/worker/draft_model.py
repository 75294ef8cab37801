"""Guessing with a small model that has the same tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from ..core.block_manager import NULL_BLOCK, BlockManager
from ..core.request import Request
from .attention import AttentionMetadata, PagedAttention
from .device import upload
from .kv_cache import KVCache
from .model import DecoderModel
from .sampler import SamplingState, draw, probabilities
from .stream import Stream


class DraftModelProposer:
    """A draft model with a KV cache of its own, in which a request has the same blocks as in the target's.

    So it needs no block tables: who shares, loses or takes over blocks there does so here. What it has to remember is
    how far it has computed each request, and in which blocks: what the target found in its cache may be missing here.
    """

    def __init__(self, model: DecoderModel, target: KVCache, stream: Stream) -> None:
        self.model, self.device, self._stream = model, str(target.data.device), stream
        self.kv_cache = KVCache(model.config, target.num_blocks, target.block_size, target.data.dtype, self.device)
        backend = "triton" if self.device.startswith("cuda") else "torch"
        self.attention = PagedAttention(self.kv_cache, model.head_dim**-0.5, backend)
        self.num_tokens_computed = 0
        self._num_computed: dict[str, int] = {}

    def release(self, request_ids: Iterable[str]) -> None:
        """Forget requests: they have ended, or lost their blocks. One that is not known is no error."""
        for request_id in request_ids:
            self._num_computed.pop(request_id, None)

    def propose(self, requests: list[Request], counts: list[int], blocks: BlockManager) -> None:
        """Set draft_token_ids, and draft_probs where they are drawn at random, of each request.

        counts: how many tokens for each, at least 1. Their blocks must hold all tokens and guesses but the last.
        """
        self._stream.run(lambda: self._propose(requests, counts, blocks))

    @torch.inference_mode()
    def _propose(self, requests: list[Request], counts: list[int], blocks: BlockManager) -> None:
        order = sorted(zip(requests, counts, strict=True), key=lambda pair: -pair[1])
        drafts: list[Tensor] = []
        probs: list[Tensor] = []
        for number in range(max(counts)):
            active = [request for request, count in order if count > number]  # as many as before, or fewer
            token_ids, chosen_from = self._choose(self._forward(active, drafts, blocks), active)
            drafts.append(token_ids)
            probs.append(chosen_from)
        chosen = [token_ids.tolist() for token_ids in drafts]
        for row, (request, count) in enumerate(order):
            request.draft_token_ids = [chosen[number][row] for number in range(count)]
            is_drawn = draws_guesses(request)
            request.draft_probs = torch.stack([each[row] for each in probs[:count]]) if is_drawn else None
            # Guesses that will be rejected are overwritten: only what is known now counts as computed.
            self._num_computed[request.request_id] = request.num_tokens

    def _forward(self, requests: list[Request], drafts: list[Tensor], blocks: BlockManager) -> Tensor:
        """Logits of the next guess: [num_requests, vocab_size]. The first pass catches up with all that is known."""
        input_ids, positions, slots = list[int](), list[int](), list[int]()
        query_lens, context_lens = [], []
        for request in requests:
            start, end = request.num_tokens + len(drafts) - 1, request.num_tokens + len(drafts)
            if not drafts:
                start = self._num_computed.get(request.request_id, 0)
                input_ids += request.tokens_between(start, end)
            positions += range(start, end)
            slots += [blocks.slot(request.request_id, position) for position in range(start, end)]
            query_lens.append(end - start)
            context_lens.append(end)
        tables = [blocks.block_tables[request.request_id] for request in requests]
        width = max(map(len, tables))
        padded = [table + [NULL_BLOCK] * (width - len(table)) for table in tables]
        metadata = AttentionMetadata(
            query_lens=query_lens,
            context_lens=context_lens,
            slot_mapping=upload(slots, self.device, torch.int64),
            block_tables=upload(padded, self.device, torch.int32),
            block_size=blocks.block_size,
        )
        tokens = drafts[-1][: len(requests)] if drafts else upload(input_ids, self.device, torch.int64)
        hidden = self.model(
            tokens, upload(positions, self.device, torch.int64), partial(self.attention.attend, metadata)
        )
        self.num_tokens_computed += len(positions)
        last_rows = upload(metadata.query_start_loc[1:], self.device, torch.int64) - 1
        return self.model.compute_logits(hidden[last_rows])

    def _choose(self, logits: Tensor, requests: list[Request]) -> tuple[Tensor, Tensor]:
        """A guess for each request, and what it was drawn from: the likeliest, or a draw as the target would draw."""
        token_ids, chosen_from = logits.argmax(dim=-1), torch.zeros_like(logits)
        rows = [row for row, request in enumerate(requests) if draws_guesses(request)]
        if rows:
            states = [SamplingState(requests[row].params, None, 0, 0, 0) for row in rows]
            index = upload(rows, self.device)
            probs = probabilities(logits[index], states)
            probs = probs / probs.sum(dim=-1, keepdim=True)
            token_ids[index], _ = draw(probs, states)
            chosen_from[index] = probs
        return token_ids, chosen_from


def draws_guesses(request: Request) -> bool:
    """Whether guesses are drawn at random, as the target draws. A seeded answer must not depend on them, so for it the
    likeliest token is guessed, and judged by what the request's own generator draws."""
    return request.params.temperature > 0 and request.generator is None
