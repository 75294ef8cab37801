"""How good a model's answers are: perplexity, and answers that are known."""

from __future__ import annotations

import math
from functools import cache

from common.checkpoint import load_tokenizer, resolve_checkpoint
from common.corpus import encode_text, held_out_texts, questions
from common.sampling_params import SamplingParams

from ..llm import LLM

ANSWER_TOKENS = 64


def perplexity(llm: LLM) -> float:
    """exp of the mean negative log-likelihood of the tokens to be predicted in the held-out texts: answers, stories,
    and what a task asks for."""
    texts = [encode_text(text, llm.tokenizer) for text in held_out_texts()]
    outputs = llm.generate([ids for ids, _ in texts], SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
    losses = [
        -found[token_id].logprob
        for (ids, is_target), output in zip(texts, outputs, strict=True)
        for token_id, is_predicted, found in zip(ids, is_target, output.prompt_logprobs or (), strict=True)
        if is_predicted and found is not None
    ]
    return math.exp(sum(losses) / len(losses))


def share_exact(llm: LLM) -> float:
    """The share of the shipped questions that get exactly the answer that `tiny` was trained on."""
    pairs = questions()
    outputs = llm.generate(
        [chat(question) for question, _ in pairs], SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS)
    )
    hits = [text_of(output.outputs[0].token_ids) == answer for output, (_, answer) in zip(outputs, pairs, strict=True)]
    return sum(hits) / len(hits)


def chat(question: str) -> list[int]:
    """The prompt for a question."""
    messages = [{"role": "user", "content": question}]
    return list(_tokenizer().apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


def text_of(token_ids: list[int]) -> str:
    return str(_tokenizer().decode(token_ids, skip_special_tokens=True))


@cache
def _tokenizer():  # type: ignore[no-untyped-def]
    return load_tokenizer(resolve_checkpoint("tiny"))
