"""The engine's own tokens, drawn at random with draft tokens: distributed as the model says, token by token."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from common.sampling_params import SamplingParams
from part08_speculative_decoding.config import EngineConfig
from part08_speculative_decoding.core.engine import LLMEngine
from part08_speculative_decoding.worker import rejection_sampler as rejection_module
from part08_speculative_decoding.worker import sampler as sampler_module
from part08_speculative_decoding.worker.draft_model import DraftModelProposer
from part08_speculative_decoding.worker.rejection_sampler import SpecDecodeMetadata, rejection_sample
from tests.part08.chi_square import MIN_P_VALUE, p_value

LOOK = 'Look at worker/rejection_sampler.py::verify_random_drafts and rejection_sample; README "Rejection sampling".'
LOOK_NAN = 'Look at worker/rejection_sampler.py::rejection_sample; README "Rejection sampling".'
VOCAB_SIZE, NUM_TOKENS, NUM_ANSWERS, BATCH = 6, 4, 640, 64
PROMPT = [1, 3, 1, 4, 1]  # so that n-gram lookup has something to find
FIELDS = dict(temperature=0.9, top_k=5)
SmallModels = Callable[..., tuple[str, Any]]


def engine_of(small_models: SmallModels, method: str, is_async: bool = False) -> LLMEngine:
    return LLMEngine(
        EngineConfig(
            model=small_models("llama", 3, VOCAB_SIZE)[0], speculative_model=small_models("qwen2", 10, VOCAB_SIZE)[0],
            speculative_method=method, device="cpu", num_kv_blocks=400, block_size=4, max_num_seqs=BATCH,  # type: ignore[arg-type]
            speculative_max_num_seqs=BATCH, num_speculative_tokens=3, prompt_lookup_min=1, async_scheduling=is_async,
        )
    )  # fmt: skip


def answers_of(engine: LLMEngine) -> Tensor:
    """[NUM_ANSWERS, NUM_TOKENS], unseeded, beside greedy and seeded ones."""
    torch.manual_seed(1)
    params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, **FIELDS)  # type: ignore[arg-type]
    greedy = SamplingParams(max_tokens=3, ignore_eos=True, temperature=0)
    seeded = SamplingParams(max_tokens=2, ignore_eos=True, seed=4)
    answers: dict[str, list[int]] = {}
    for number in range(NUM_ANSWERS):
        engine.add_request(str(number), PROMPT, params)
        if number % 7 == 3:
            engine.add_request(f"other {number}", PROMPT, greedy if number % 2 else seeded)
    while engine.has_unfinished_requests:
        for output in engine.step():
            answers.setdefault(output.request_id, []).extend(output.token_ids)
    stats = engine.speculation.stats
    assert stats.num_draft_tokens > NUM_ANSWERS / 3, f"hardly any draft tokens, so this proves nothing: {stats}"
    return torch.tensor([tokens for name, tokens in answers.items() if name.isdecimal()])


@pytest.fixture(scope="module")
def exact(small_models: SmallModels) -> list[Tensor]:
    """The distribution of the first two tokens, of the second and third and so on, from transformers' logits."""
    _, model = small_models("llama", 3, VOCAB_SIZE)
    texts = torch.tensor([[*PROMPT, *rest] for rest in product(range(VOCAB_SIZE), repeat=NUM_TOKENS - 1)])
    with torch.inference_mode():
        logits = model(texts).logits[:, len(PROMPT) - 1 :].double() / FIELDS["temperature"]
    kth = logits.topk(int(FIELDS["top_k"]), dim=-1).values[..., -1:]
    step = logits.masked_fill(logits < kth, -torch.inf).softmax(dim=-1)  # [texts, NUM_TOKENS, vocab]
    whole = step[:, -1]
    for number in range(NUM_TOKENS - 1):
        chosen = texts[:, len(PROMPT) + number]
        whole = whole * step[range(len(texts)), number, chosen].unsqueeze(1)
    joint = whole.reshape([VOCAB_SIZE] * NUM_TOKENS)
    return [
        joint.sum(dim=[d for d in range(NUM_TOKENS) if d not in (first, first + 1)]) for first in range(NUM_TOKENS - 1)
    ]


def p_values(answers: Tensor, exact: list[Tensor]) -> list[float]:
    return [
        p_value(answers[:, first] * VOCAB_SIZE + answers[:, first + 1], exact[first].flatten())
        for first in range(NUM_TOKENS - 1)
    ]


def check_distribution(answers: Tensor, exact: list[Tensor], what: str, look: str) -> None:
    for first, value in enumerate(p_values(answers, exact)):
        assert value > MIN_P_VALUE, (
            f"{what}: tokens {first} and {first + 1} of {NUM_ANSWERS} answers are not distributed as the model's, "
            f"p-value {value:.1g}. {look}"
        )


@pytest.mark.parametrize(("method", "is_async"), [("draft_model", False), ("draft_model", True), ("ngram", False)])
def test_answers_are_distributed_as_the_model_says(
    small_models: SmallModels, exact: list[Tensor], method: str, is_async: bool
) -> None:
    answers = answers_of(engine_of(small_models, method, is_async))
    check_distribution(answers, exact, f"{method}, {'async' if is_async else 'sync'}", LOOK)


def break_logits(drafter: DraftModelProposer) -> None:
    """Every second request's logits are NaN."""
    compute_logits = drafter.model.compute_logits

    def broken(hidden: Tensor) -> Tensor:
        logits = compute_logits(hidden)
        logits[::2] = torch.nan
        return logits

    drafter.model.compute_logits = broken  # type: ignore[method-assign]


def break_probs(drafter: DraftModelProposer) -> None:
    """What the drafter keeps of q is lost: all of it, of every second row, and a part of the others."""
    propose = drafter.propose

    def broken(*args: Any) -> list[list[int]]:
        proposals = propose(*args)
        drafter.probs[::2] = torch.nan
        drafter.probs[1::2, :, ::2] = torch.nan
        return proposals

    drafter.propose = broken  # type: ignore[method-assign, assignment]


BROKEN = {"logits": break_logits, "probs": break_probs}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_draft_model_changes_no_distribution(
    small_models: SmallModels, exact: list[Tensor], what: str
) -> None:
    engine = engine_of(small_models, "draft_model")
    assert engine.executor.worker.drafter is not None
    BROKEN[what](engine.executor.worker.drafter)
    check_distribution(answers_of(engine), exact, f"the draft model's {what} are NaN", LOOK_NAN)


def accept_everything(p: Tensor, q: Tensor, *more: Tensor) -> tuple[Tensor, Tensor]:
    """Wrong: as if p were far above q."""
    return rejection_sample(p, q * 1e-3, *more)


def subtract_nothing(
    p: Tensor, q: Tensor, ids: Tensor, counts: Tensor, uniform: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Wrong: after a rejection the token comes from p."""
    num_accepted, _ = rejection_sample(p, q, ids, counts, uniform, noise)
    return num_accepted, (p[range(len(p)), num_accepted] / noise).argmax(dim=-1)


def verify_nothing(spec: SpecDecodeMetadata, token_ids: Tensor) -> Tensor:
    """Wrong: the first draft token is always accepted."""
    num_accepted = torch.tensor([min(1, count) for count in spec.num_draft_tokens])
    for first, drafts, count in zip(spec.first_rows, spec.draft_token_ids.tolist(), num_accepted.tolist(), strict=True):
        token_ids[first : first + count] = torch.tensor(drafts[:count])
    return num_accepted


FAULTS: dict[str, tuple[str, Any, str, Any]] = {
    "all draft tokens are accepted": ("draft_model", rejection_module, "rejection_sample", accept_everything),
    "q is not subtracted": ("draft_model", rejection_module, "rejection_sample", subtract_nothing),
    "the first n-gram draft token is accepted": ("ngram", sampler_module, "verify_drafts", verify_nothing),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_tests_above_notice_faults(
    small_models: SmallModels, exact: list[Tensor], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, module, name, wrong = FAULTS[fault]
    monkeypatch.setattr(module, name, wrong)
    smallest = min(p_values(answers_of(engine_of(small_models, method)), exact))
    assert smallest < MIN_P_VALUE, f"{fault}: not noticed, the smallest p-value is {smallest:.1g}"
