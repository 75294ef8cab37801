"""From logits to token ids, for a whole batch at once, without a word from the scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.outputs import Logprob
from common.sampling_params import SamplingParams

from .device import upload


@dataclass(frozen=True, slots=True)
class SamplingState:
    """What the sampler has to know of a request in one step.

    Copied when the step is launched: the request itself goes on to change while the step waits for its turn.
    row: the request's in the token buffer. num_tokens: prompt and output as of this step, the token that the step
    before it samples included.
    """

    params: SamplingParams
    generator: torch.Generator | None
    row: int
    num_prompt_tokens: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class LogprobsTensors:
    """For each row the sampled token and the k likeliest: token_ids, logprobs [num_requests, 1 + k]; and the sampled
    one's rank: [num_requests]. vLLM's name."""

    token_ids: Tensor
    logprobs: Tensor
    ranks: Tensor

    def of(self, row: int, num_top: int) -> dict[int, Logprob]:
        """One request's, with as many of the likeliest as it asked for. The sampled token's comes first."""
        ids, values = self.token_ids[row].tolist(), self.logprobs[row].tolist()
        found = {ids[0]: Logprob(values[0], int(self.ranks[row]))}
        for position in range(1, num_top + 1):
            found.setdefault(ids[position], Logprob(values[position], position))
        return found


@dataclass(frozen=True, slots=True)
class SamplerOutput:
    """token_ids: [num_requests], one for each; logprobs: of all requests, if one of them asked for some."""

    token_ids: Tensor
    logprobs: LogprobsTensors | None

    def to_cpu(self) -> SamplerOutput:
        """Begin to copy; from a GPU into pinned memory, and nobody waits for it here."""
        if self.logprobs is None:
            return SamplerOutput(self.token_ids.to("cpu", non_blocking=True), None)
        tensors = (self.token_ids, self.logprobs.token_ids, self.logprobs.logprobs, self.logprobs.ranks)
        token_ids, ids, values, ranks = (tensor.to("cpu", non_blocking=True) for tensor in tensors)
        return SamplerOutput(token_ids, LogprobsTensors(ids, values, ranks))


class Sampler:
    """Chooses one token for each row of logits. After vLLM's Sampler: log-probabilities are the raw model's; then
    logit_bias, penalties, min_tokens, temperature, top-k, top-p.

    eos_token_ids: the model's end-of-sequence tokens, which min_tokens holds back.
    Nothing here reads a value back from the device, which would make the launch wait for the step before.
    """

    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self.eos_token_ids = eos_token_ids

    def sample(self, logits: Tensor, states: list[SamplingState], token_rows: Tensor) -> SamplerOutput:
        """logits: [num_requests, vocab_size], float32; they are changed. token_rows: [max_num_seqs, max_model_len]."""
        num_top = max((state.params.logprobs for state in states if state.params.logprobs is not None), default=None)
        raw_logprobs = None if num_top is None else logits.log_softmax(dim=-1)
        for row, state in zip(logits, states, strict=True):  # what is asked for by few requests is done row by row
            self._change_logits(row, state, token_rows[state.row])
        token_ids = self._choose(logits, states)
        if raw_logprobs is None or num_top is None:
            return SamplerOutput(token_ids, None)
        return SamplerOutput(token_ids, top_logprobs(raw_logprobs, token_ids, num_top))

    def _change_logits(self, row: Tensor, state: SamplingState, tokens: Tensor) -> None:
        params = state.params
        for token_id, bias in params.logit_bias:
            row[token_id] += bias
        if params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty:
            output = slice(state.num_prompt_tokens, state.num_tokens)
            apply_penalties(row, params, tokens[: state.num_tokens], tokens[output])
        if state.num_tokens - state.num_prompt_tokens < params.min_tokens:
            held_back = set(params.stop_token_ids) | (set() if params.ignore_eos else self.eos_token_ids)
            for token_id in held_back:
                row[token_id] = -torch.inf

    def _choose(self, logits: Tensor, states: list[SamplingState]) -> Tensor:
        greedy = logits.argmax(dim=-1)
        drawn_rows = [row for row, state in enumerate(states) if state.params.temperature > 0]
        if not drawn_rows:
            return greedy
        drawn, rows = [states[row] for row in drawn_rows], upload(drawn_rows, logits.device)
        greedy[rows] = draw(probabilities(logits[rows], drawn), drawn)
        return greedy


def probabilities(logits: Tensor, states: list[SamplingState]) -> Tensor:
    """After temperature, top-k and top-p, not normalised again. logits: [num_requests, vocab_size]."""

    def column(values: Sequence[float]) -> Tensor:
        return upload(values, logits.device).unsqueeze(1)

    vocab_size = logits.shape[-1]
    logits = logits / column([state.params.temperature for state in states])
    top_k = [min(state.params.top_k or vocab_size, vocab_size) for state in states]
    top_p = [state.params.top_p for state in states]
    if min(top_k) >= vocab_size and min(top_p) >= 1:
        return logits.softmax(dim=-1)
    ordered, order = logits.sort(dim=-1, descending=True)
    kth = ordered.gather(1, column(top_k).long() - 1)
    probs = ordered.masked_fill(ordered < kth, -torch.inf).softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs  # mass of the likelier tokens; 0 for the first, so it always stays
    probs = probs.masked_fill((before >= column(top_p)) & (column(top_p) < 1), 0)
    return torch.zeros_like(probs).scatter_(1, order, probs)


def draw(probs: Tensor, states: list[SamplingState]) -> Tensor:
    """One token a row: the largest of p / e, with e drawn from the exponential distribution, is distributed as p.

    Each seeded request draws from its own generator, so its tokens do not depend on its neighbours.
    """
    noise = torch.empty_like(probs).exponential_()
    for row, state in enumerate(states):
        if state.generator is not None:
            noise[row].exponential_(generator=state.generator)
    return (probs / noise).argmax(dim=-1)


def apply_penalties(logits: Tensor, params: SamplingParams, tokens: Tensor, output: Tensor) -> None:
    """One row, in place. As in vLLM: repetition counts prompt and output, presence and frequency the output alone.

    logits: [vocab_size]; tokens: [n], prompt and output; output: [m], int64.
    """
    # exercise: apply_penalties
    seen = torch.zeros_like(logits).index_fill_(0, tokens, 1) > 0
    scaled = torch.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
    logits.copy_(torch.where(seen, scaled, logits))
    counts = torch.zeros_like(logits).index_add_(0, output, torch.ones_like(output, dtype=logits.dtype))
    logits -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
    # exercise: end


def top_logprobs(logprobs: Tensor, token_ids: Tensor, num_top: int) -> LogprobsTensors:
    """logprobs: [num_requests, vocab_size]; token_ids: [num_requests], the sampled ones."""
    sampled = token_ids.unsqueeze(1)
    value = logprobs.gather(1, sampled)
    ranks = (logprobs > value).sum(dim=-1) + 1
    values, ids = logprobs.topk(num_top, dim=-1)
    return LogprobsTensors(torch.cat((sampled, ids), dim=1), torch.cat((value, values), dim=1), ranks)
