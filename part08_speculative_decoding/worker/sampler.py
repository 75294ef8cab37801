"""From logits to token ids, for a whole batch at once, without a word from the scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.outputs import Logprob
from common.sampling_params import SamplingParams

from .device import upload
from .rejection_sampler import count_accepted, rejection_sample


@dataclass(frozen=True, slots=True)
class SamplingState:
    """What the sampler has to know of a request in one step.

    Copied when the step is launched: the request itself goes on to change while the step waits for its turn.
    row: the request's in the token buffer. num_tokens: prompt and output as of this step, the token that the step
    before it samples included; in a row that judges a guess, the guesses before it too. One request's rows stand
    together, in order.
    """

    params: SamplingParams
    generator: torch.Generator | None
    row: int
    num_prompt_tokens: int
    num_tokens: int
    has_drafts: bool = False


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
class Drafts:
    """A step's guesses, by request: where its rows begin, how many guesses it has (row i judges guess i), and which:
    token_ids [num_requests, k], padded. probs: [num_drafts, vocab_size], for requests whose guesses were drawn.
    """

    first_rows: list[int]
    num_drafts: list[int]
    token_ids: Tensor
    probs: dict[int, Tensor]


@dataclass(frozen=True, slots=True)
class SamplerOutput:
    """token_ids: [num_rows]; of a request's rows the first num_accepted + 1 are its new tokens. num_accepted:
    [num_requests], how many guesses stood, None if there were none. logprobs: of all rows, if a request asked for some.
    generators: for each row of a seeded request with guesses, its generator's state after that row's draw.
    """

    token_ids: Tensor
    logprobs: LogprobsTensors | None
    num_accepted: Tensor | None = None
    generators: dict[int, Tensor] = field(default_factory=dict)

    def to_cpu(self) -> SamplerOutput:
        """Begin to copy; from a GPU into pinned memory, and nobody waits for it here."""

        def copy(tensor: Tensor) -> Tensor:
            return tensor.to("cpu", non_blocking=True)

        logprobs, num_accepted = self.logprobs, self.num_accepted
        if logprobs is not None:
            logprobs = LogprobsTensors(copy(logprobs.token_ids), copy(logprobs.logprobs), copy(logprobs.ranks))
        num_accepted = None if num_accepted is None else copy(num_accepted)
        return SamplerOutput(copy(self.token_ids), logprobs, num_accepted, self.generators)


class Sampler:
    """Chooses one token for each row of logits. After vLLM's Sampler: log-probabilities are the raw model's; then
    logit_bias, penalties, min_tokens, temperature, top-k, top-p.

    eos_token_ids: the model's end-of-sequence tokens, which min_tokens holds back.
    Nothing here reads a value back from the device, which would make the launch wait for the step before.
    """

    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self.eos_token_ids = eos_token_ids

    def sample(
        self, logits: Tensor, states: list[SamplingState], token_rows: Tensor, drafts: Drafts | None = None
    ) -> SamplerOutput:
        """logits: [num_rows, vocab_size], float32; they are changed. token_rows: [max_num_seqs, max_model_len].

        A guess stands if it is what its row samples: p(guess) of the time, and else the row's token, which is another,
        is the right one in its place. Only guesses that were drawn at random are judged by rejection sampling.
        """
        num_top = max((state.params.logprobs for state in states if state.params.logprobs is not None), default=None)
        raw_logprobs = None if num_top is None else logits.log_softmax(dim=-1)
        for row, state in zip(logits, states, strict=True):  # what is asked for by few requests is done row by row
            self._change_logits(row, state, token_rows[state.row])
        token_ids, probs, generators = self._choose(logits, states)
        num_accepted = None if drafts is None else judge(drafts, token_ids, probs)
        logprobs = None
        if raw_logprobs is not None and num_top is not None:
            logprobs = top_logprobs(raw_logprobs, token_ids, num_top)
        return SamplerOutput(token_ids, logprobs, num_accepted, generators)

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

    def _choose(
        self, logits: Tensor, states: list[SamplingState]
    ) -> tuple[Tensor, dict[int, Tensor], dict[int, Tensor]]:
        """Returns a token for each row; and by row, for those that are drawn, the probabilities and the generators."""
        greedy = logits.argmax(dim=-1)
        drawn_rows = [row for row, state in enumerate(states) if state.params.temperature > 0]
        if not drawn_rows:
            return greedy, {}, {}
        drawn, rows = [states[row] for row in drawn_rows], upload(drawn_rows, logits.device)
        probs = probabilities(logits[rows], drawn)
        token_ids, generators = draw(probs, drawn)
        greedy[rows] = token_ids
        return greedy, dict(zip(drawn_rows, probs, strict=True)), {drawn_rows[i]: g for i, g in generators.items()}


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


def draw(probs: Tensor, states: list[SamplingState]) -> tuple[Tensor, dict[int, Tensor]]:
    """One token a row: the largest of p / e, with e drawn from the exponential distribution, is distributed as p.

    Each seeded request draws from its own generator, so its tokens do not depend on its neighbours. One with several
    rows draws for each as it would one step after the other; the generator's state after each is returned, since
    nobody knows yet how many of them will count.
    """
    noise = torch.empty_like(probs).exponential_()
    generators: dict[int, Tensor] = {}
    for row, state in enumerate(states):
        if state.generator is not None:
            noise[row].exponential_(generator=state.generator)
            if state.has_drafts:
                generators[row] = state.generator.get_state()
    return (probs / noise).argmax(dim=-1), generators


def judge(drafts: Drafts, token_ids: Tensor, probs: dict[int, Tensor]) -> Tensor:
    """How many guesses of each request stand: [num_requests]. token_ids: [num_rows], changed where guesses were drawn.

    probs: by row, for the rows that were drawn.
    """
    device = token_ids.device
    rows = upload(drafts.first_rows, device).unsqueeze(1) + torch.arange(drafts.token_ids.shape[1], device=device)
    is_right = token_ids[rows.clamp(max=len(token_ids) - 1)] == drafts.token_ids
    num_accepted = count_accepted(is_right, upload(drafts.num_drafts, device))
    for request, draft_probs in drafts.probs.items():
        first, num_drafts = drafts.first_rows[request], len(draft_probs)
        p = torch.stack([probs[first + i] for i in range(num_drafts + 1)])
        guesses = drafts.token_ids[request, :num_drafts]
        accepted, after = rejection_sample(
            (p / p.sum(dim=-1, keepdim=True)).unsqueeze(0),
            draft_probs.unsqueeze(0),
            guesses.unsqueeze(0),
            torch.full((1,), num_drafts, device=device),
            torch.rand(1, num_drafts, device=device),
            torch.empty_like(p[:1]).exponential_(),
        )
        token_ids[first : first + num_drafts] = guesses
        token_ids[first + accepted] = after
        num_accepted[request] = accepted[0]
    return num_accepted


def apply_penalties(logits: Tensor, params: SamplingParams, tokens: Tensor, output: Tensor) -> None:
    """One row, in place. As in vLLM: repetition counts prompt and output, presence and frequency the output alone.

    logits: [vocab_size]; tokens: [n], prompt and output; output: [m], int64.
    """
    seen = torch.zeros_like(logits).index_fill_(0, tokens, 1) > 0
    scaled = torch.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
    logits.copy_(torch.where(seen, scaled, logits))
    counts = torch.zeros_like(logits).index_add_(0, output, torch.ones_like(output, dtype=logits.dtype))
    logits -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)


def top_logprobs(logprobs: Tensor, token_ids: Tensor, num_top: int) -> LogprobsTensors:
    """logprobs: [num_requests, vocab_size]; token_ids: [num_requests], the sampled ones."""
    sampled = token_ids.unsqueeze(1)
    value = logprobs.gather(1, sampled)
    ranks = (logprobs > value).sum(dim=-1) + 1
    values, ids = logprobs.topk(num_top, dim=-1)
    return LogprobsTensors(torch.cat((sampled, ids), dim=1), torch.cat((value, values), dim=1), ranks)
