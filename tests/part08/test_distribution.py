"""The engine's own tokens, drawn at random with guesses: distributed as the model says, place by place."""

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
from part08_speculative_decoding.worker import sampler as sampler_module
from part08_speculative_decoding.worker.rejection_sampler import rejection_sample
from part08_speculative_decoding.worker.sampler import Drafts
from tests.part08.chi_square import MIN_P_VALUE, p_value

LOOK = 'Look at worker/sampler.py::judge and worker/rejection_sampler.py::rejection_sample; README "Drawn, not chosen".'
VOCAB_SIZE, NUM_TOKENS, NUM_ANSWERS, BATCH = 6, 4, 640, 64
PROMPT = [1, 3, 1, 4, 1]  # so that n-grams have something to find
FIELDS = dict(temperature=0.9, top_k=5)
SmallModels = Callable[..., tuple[str, Any]]


def answers_of(small_models: SmallModels, method: str) -> Tensor:
    """[NUM_ANSWERS, NUM_TOKENS], unseeded."""
    torch.manual_seed(1)
    engine = LLMEngine(
        EngineConfig(
            model=small_models("llama", 3, VOCAB_SIZE)[0], speculative_model=small_models("qwen2", 6, VOCAB_SIZE)[0],
            speculative_method=method, device="cpu", num_kv_blocks=400, block_size=4, max_num_seqs=BATCH,  # type: ignore[arg-type]
            speculative_max_num_seqs=BATCH, num_speculative_tokens=3, prompt_lookup_min=1, async_scheduling=False,
        )
    )  # fmt: skip
    params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, **FIELDS)  # type: ignore[arg-type]
    answers: dict[str, list[int]] = {}
    for number in range(NUM_ANSWERS):
        engine.add_request(str(number), PROMPT, params)
    while engine.has_unfinished_requests:
        for output in engine.step():
            answers.setdefault(output.request_id, []).extend(output.token_ids)
    stats = engine.speculation.stats
    assert stats.num_draft_tokens > NUM_ANSWERS / 3, f"hardly anything was guessed, so this proves nothing: {stats}"
    return torch.tensor(list(answers.values()))


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
    for place in range(NUM_TOKENS - 1):
        chosen = texts[:, len(PROMPT) + place]
        whole = whole * step[range(len(texts)), place, chosen].unsqueeze(1)
    joint = whole.reshape([VOCAB_SIZE] * NUM_TOKENS)
    return [
        joint.sum(dim=[d for d in range(NUM_TOKENS) if d not in (first, first + 1)]) for first in range(NUM_TOKENS - 1)
    ]


def p_values(answers: Tensor, exact: list[Tensor]) -> list[float]:
    return [
        p_value(answers[:, first] * VOCAB_SIZE + answers[:, first + 1], exact[first].flatten())
        for first in range(NUM_TOKENS - 1)
    ]


@pytest.mark.parametrize("method", ["draft_model", "ngram"])
def test_answers_are_distributed_as_the_model_says(small_models: SmallModels, exact: list[Tensor], method: str) -> None:
    for first, value in enumerate(p_values(answers_of(small_models, method), exact)):
        assert value > MIN_P_VALUE, (
            f"{method}: tokens {first} and {first + 1} of {NUM_ANSWERS} answers differ from the model's "
            f"distribution, as "
            f"much as that with probability {value:.1g}. {LOOK}"
        )


def always(draft_probs: Tensor) -> Tensor:
    """As if p were far above q."""
    return draft_probs * 1e-3


def judge_by_hope(drafts: Drafts, token_ids: Tensor, probs: dict[int, Tensor]) -> Tensor:
    """Wrong: the first guess always stands."""
    num_accepted = torch.tensor([min(1, n) for n in drafts.num_drafts])
    for first, guesses, count in zip(drafts.first_rows, drafts.token_ids.tolist(), num_accepted.tolist(), strict=True):
        token_ids[first : first + count] = torch.tensor(guesses[:count])
    return num_accepted


FAULTS: dict[str, tuple[str, str, Any]] = {
    "all guesses stand": ("draft_model", "rejection_sample", lambda p, q, *more: rejection_sample(p, always(q), *more)),
    "q is not taken off": (
        "draft_model", "rejection_sample",
        lambda p, q, ids, n, u, e: (
            (found := rejection_sample(p, q, ids, n, u, e)[0]), (p[[0], found] / e).argmax(dim=-1)
        ),
    ),
    "the first n-gram guess stands": ("ngram", "judge", judge_by_hope),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_the_test_above_notices_what_is_wrong(
    small_models: SmallModels, exact: list[Tensor], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, name, wrong = FAULTS[fault]
    monkeypatch.setattr(sampler_module, name, wrong)
    smallest = min(p_values(answers_of(small_models, method), exact))
    assert smallest < MIN_P_VALUE, f"{fault}: not noticed, the smallest p-value is {smallest:.1g}"
