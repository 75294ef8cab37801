"""From logits to token ids, for a whole batch at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.outputs import Logprob
from common.sampling_params import SamplingParams

from .device import to_device
from .kernels.ops import Kernels
from .noise import exponential_noise
from .rejection_sampler import SpecDecodeMetadata, verify_drafts, verify_random_drafts


@dataclass(frozen=True, slots=True)
class SamplingState:
    """How one row of logits is sampled. row: the request's row in the token buffer, where its first num_tokens tokens
    are known; after a draft token, that token and the drafts before it count as known. The sampled token's position is
    num_tokens."""

    params: SamplingParams
    row: int
    num_prompt_tokens: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class LogprobsTensors:
    """For each row, the sampled token and the k likeliest tokens (vLLM's name).

    token_ids, logprobs: [num_rows, 1 + k]; ranks: [num_rows], the sampled token's.
    """

    token_ids: Tensor
    logprobs: Tensor
    ranks: Tensor

    def tolist(self) -> list[tuple[list[int], list[float], int]]:
        """The same in plain numbers, a tuple for each row."""
        return list(zip(self.token_ids.tolist(), self.logprobs.tolist(), self.ranks.tolist(), strict=True))


@dataclass(frozen=True, slots=True)
class SamplerOutput:
    """token_ids: [num_rows]; in each request's rows, the first num_accepted + 1 are valid. num_accepted:
    [num_requests], accepted draft tokens of each request, or None if the step had none. logprobs: of all rows, if any
    request asked for them. draft_token_ids: per request, for the next step. prompt_logprobs: per PromptSpan."""

    token_ids: Tensor
    logprobs: LogprobsTensors | None
    num_accepted: Tensor | None = None
    draft_token_ids: list[list[int]] | None = None
    prompt_logprobs: list[LogprobsTensors] = field(default_factory=list)


class Sampler:
    """Chooses one token for each row of logits, in the order of vLLM's Sampler: log probabilities come from the raw
    logits; then come logit_bias, penalties, min_tokens, temperature, min-p, top-k and top-p.

    The number of tensor operations does not depend on the number of rows. Nothing is read back from the device: that
    would wait for the previous step. eos_token_ids: the tokens that min_tokens suppresses. generator: of the draws
    without a seed, which must be the same on all ranks.
    """

    def __init__(
        self, eos_token_ids: frozenset[int], kernels: Kernels | None = None, generator: torch.Generator | None = None
    ) -> None:
        self.eos_token_ids, self.kernels, self.generator = eos_token_ids, kernels or Kernels(), generator

    def sample(
        self, logits: Tensor, states: Sequence[SamplingState], token_rows: Tensor,
        spec: SpecDecodeMetadata | None = None, draft_probs: Tensor | None = None,
    ) -> SamplerOutput:  # fmt: skip
        """logits: [num_rows, vocab_size], float32, changed in place. token_rows: [max_num_seqs, max_model_len].

        spec: the draft tokens to verify. draft_probs: [max_num_seqs, k, vocab_size], of those drawn at random.
        """
        num_top = max((state.params.logprobs for state in states if state.params.logprobs is not None), default=None)
        raw_logprobs = None if num_top is None else logits.log_softmax(dim=-1)
        apply_logit_bias(logits, states)
        apply_penalties(logits, states, token_rows)
        hold_back_stop_tokens(logits, states, self.eos_token_ids)
        if spec is None or not spec.random:
            token_ids = self._sample(logits, states)
            num_accepted = None if spec is None else verify_drafts(spec, token_ids)
        else:
            assert draft_probs is not None, "draft tokens drawn at random come with their probabilities"
            token_ids, drawn, probs = choose(logits, states, self.generator)
            num_accepted = verify_drafts(spec, token_ids)
            verify_random_drafts(spec, drawn, probs, draft_probs, token_ids, num_accepted, self.generator)
        if raw_logprobs is None or num_top is None:
            return SamplerOutput(token_ids, None, num_accepted)
        return SamplerOutput(token_ids, top_logprobs(raw_logprobs, token_ids, num_top), num_accepted)

    def _sample(self, logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
        """A token for each row, by a kernel. A row without a seed gets one for this draw."""
        params, device, vocab_size = [state.params for state in states], logits.device, logits.shape[-1]
        if all(each.temperature == 0 for each in params):
            return logits.argmax(dim=-1)
        seeds = torch.randint(2**62, (len(states),), generator=self.generator, device=device)
        if seeded := [index for index, each in enumerate(params) if each.seed is not None]:
            own = to_device([params[index].seed for index in seeded], device, torch.int64)
            seeds[to_device(seeded, device)] = own
        return self.kernels.sample(
            logits,
            to_device([each.temperature for each in params], device, torch.float32),
            to_device([min(each.top_k or vocab_size, vocab_size) for each in params], device, torch.int32),
            to_device([each.top_p for each in params], device, torch.float32),
            to_device([each.min_p for each in params], device, torch.float32),
            seeds,
            to_device([state.num_tokens for state in states], device, torch.int64),
        )


def choose(
    logits: Tensor, states: Sequence[SamplingState], generator: torch.Generator | None = None
) -> tuple[Tensor, list[int], Tensor]:
    """A token for each row: the likeliest where the temperature is 0, else a random draw.

    Returns the tokens: [num_rows], the rows that were drawn, and the distributions: [len(drawn), vocab_size].
    """
    token_ids, probs = logits.argmax(dim=-1), logits[:0]
    if drawn := [index for index, state in enumerate(states) if state.params.temperature > 0]:
        indices, drawn_states = to_device(drawn, logits.device), [states[index] for index in drawn]
        probs = probabilities(logits[indices], drawn_states)
        token_ids[indices] = draw(probs, drawn_states, generator)
    return token_ids, drawn, probs


def probabilities(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """After temperature, min-p, top-k and top-p, not renormalized. logits and the result: [num_rows, vocab_size]."""
    vocab_size, device = logits.shape[-1], logits.device
    logits = logits / column([state.params.temperature for state in states], device)
    if any(state.params.min_p for state in states):  # drop tokens less likely than min_p times the likeliest
        ratio = column([state.params.min_p for state in states], device).log()
        logits = logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + ratio, -torch.inf)
    top_k = [min(state.params.top_k or vocab_size, vocab_size) for state in states]
    top_p = [state.params.top_p for state in states]
    if min(top_k) >= vocab_size and min(top_p) >= 1:
        return logits.softmax(dim=-1)
    ordered, order = logits.sort(dim=-1, descending=True)
    kth = ordered.gather(1, column(top_k, device) - 1)
    probs = ordered.masked_fill(ordered < kth, -torch.inf).softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs  # mass of the likelier tokens; 0 for the first, so it is always kept
    limit = column(top_p, device)
    probs = probs.masked_fill((before >= limit) & (limit < 1), 0)
    return torch.zeros_like(probs).scatter_(1, order, probs)


def draw(probs: Tensor, states: Sequence[SamplingState], generator: torch.Generator | None = None) -> Tensor:
    """One token per row: the argmax of p / e, with e from the exponential distribution, is a random draw from p.

    A seeded row's noise depends only on its seed and position, so its token does not depend on the batch.
    """
    noise = torch.empty_like(probs).exponential_(generator=generator)
    if seeded := [index for index, state in enumerate(states) if state.params.seed is not None]:
        seeds = to_device([states[index].params.seed for index in seeded], probs.device)
        positions = to_device([states[index].num_tokens for index in seeded], probs.device)
        noise[to_device(seeded, probs.device)] = exponential_noise(seeds, positions, probs.shape[-1])
    return (probs / noise).argmax(dim=-1)


def apply_logit_bias(logits: Tensor, states: Sequence[SamplingState]) -> None:
    entries = [(index, *pair) for index, state in enumerate(states) for pair in state.params.logit_bias]
    if entries:
        rows, token_ids, biases = (to_device(values, logits.device) for values in zip(*entries, strict=True))
        logits.index_put_((rows, token_ids), biases.to(logits.dtype), accumulate=True)


def apply_penalties(logits: Tensor, states: Sequence[SamplingState], token_rows: Tensor) -> None:
    """As in vLLM: the repetition penalty counts prompt and output tokens, the other two only output tokens."""
    penalized = [index for index, state in enumerate(states) if has_penalty(state.params)]
    if not penalized:
        return
    chosen, device = [states[index] for index in penalized], logits.device
    indices, num_tokens = to_device(penalized, device), column([state.num_tokens for state in chosen], device)
    tokens = token_rows[to_device([state.row for state in chosen], device), : max(s.num_tokens for s in chosen)]
    positions = torch.arange(tokens.shape[1], device=device)
    is_known = positions < num_tokens
    is_output = is_known & (positions >= column([state.num_prompt_tokens for state in chosen], device))
    values = logits[indices]
    seen = torch.zeros_like(values).scatter_add_(1, tokens, is_known.to(values.dtype)) > 0
    counts = torch.zeros_like(values).scatter_add_(1, tokens, is_output.to(values.dtype))
    repetition = column([state.params.repetition_penalty for state in chosen], device)
    values = torch.where(seen, torch.where(values > 0, values / repetition, values * repetition), values)
    values -= column([state.params.frequency_penalty for state in chosen], device) * counts
    values -= column([state.params.presence_penalty for state in chosen], device) * (counts > 0)
    logits[indices] = values


def has_penalty(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


def hold_back_stop_tokens(logits: Tensor, states: Sequence[SamplingState], eos_token_ids: frozenset[int]) -> None:
    """Rows with fewer than min_tokens output tokens cannot sample a token that would end the answer."""
    entries = [
        (index, token_id)
        for index, state in enumerate(states)
        if state.num_tokens - state.num_prompt_tokens < state.params.min_tokens
        for token_id in {*state.params.stop_token_ids, *(() if state.params.ignore_eos else eos_token_ids)}
    ]
    if entries:
        rows, token_ids = (to_device(values, logits.device) for values in zip(*entries, strict=True))
        logits[rows, token_ids] = -torch.inf


def top_logprobs(logprobs: Tensor, token_ids: Tensor, num_top: int) -> LogprobsTensors:
    """logprobs: [num_rows, vocab_size]; token_ids: [num_rows], the sampled ones."""
    sampled = token_ids.unsqueeze(1)
    value = logprobs.gather(1, sampled)
    ranks = (logprobs > value).sum(dim=-1) + 1
    values, ids = logprobs.topk(num_top, dim=-1)
    return LogprobsTensors(torch.cat((sampled, ids), dim=1), torch.cat((value, values), dim=1), ranks)


def to_logprobs(token_ids: list[int], logprobs: list[float], rank: int, num_top: int) -> dict[int, Logprob]:
    """One row of LogprobsTensors in the request's format: the sampled token first, then the num_top likeliest."""
    found = {token_ids[0]: Logprob(logprobs[0], rank)}
    for index in range(1, num_top + 1):
        found.setdefault(token_ids[index], Logprob(logprobs[index], index))
    return found


def column(values: Sequence[float], device: torch.device) -> Tensor:
    """[len(values), 1]"""
    return to_device(values, device).unsqueeze(1)
