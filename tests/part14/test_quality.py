"""How much quality quantization costs on `tiny`: the bars that every change must keep."""

from __future__ import annotations

import math

import pytest
import torch

from common.checkpoint import load_tokenizer, resolve_checkpoint
from common.corpus import calibration_rows, encode_text, held_out_texts
from part14_quantization.worker.model import DecoderModel
from part14_quantization.worker.quantization.calibration import TextRunner
from part14_quantization.worker.quantization.method import Method
from part14_quantization.worker.quantization.scheme import Scheme
from part14_quantization.worker.weights import load_decoder

NUM_TEXTS, NUM_ROWS = 60, 32
INT4 = Scheme(bits=4, group_size=128)


@torch.inference_mode()
def perplexity(model: DecoderModel) -> float:
    """Of the tokens that a model is to predict in the held-out texts."""
    tokenizer = load_tokenizer(resolve_checkpoint("tiny"))
    texts = [encode_text(text, tokenizer) for text in held_out_texts()[:NUM_TEXTS]]
    runner, losses = TextRunner(model, [ids for ids, _ in texts]), list[float]()
    for layer in model.layers.values():
        runner.advance(layer)
    assert model.norm is not None
    for (ids, is_target), hidden in zip(texts, runner.hidden, strict=True):
        logprobs = model.compute_logits(model.norm(hidden)).log_softmax(dim=-1)
        found = -logprobs[:-1].gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)
        losses += found[torch.tensor(is_target[1:])].tolist()
    return math.exp(sum(losses) / len(losses))


def tiny() -> DecoderModel:
    return load_decoder(resolve_checkpoint("tiny"), torch.float32, "cpu")


@pytest.fixture(scope="module")
def base() -> float:
    return perplexity(tiny())


@pytest.mark.parametrize(
    ("method", "most"),
    [
        (Method("rtn", Scheme(bits=8)), 0.01),
        (Method("rtn", INT4), 0.05),
        (Method("gptq", INT4), 0.03),
        (Method("awq", INT4), 0.03),
    ],
    ids=["int8", "int4", "int4, GPTQ", "int4, AWQ"],
)
@torch.inference_mode()
def test_perplexity_rises_by_no_more_than_this(method: Method, most: float, base: float) -> None:
    model = tiny()
    text = TextRunner(model, calibration_rows(load_tokenizer(resolve_checkpoint("tiny")), 256, NUM_ROWS))
    for layer in model.layers.values():
        method.quantize_layer(layer, text.measure(layer) if method.needs_text else {})
        if method.needs_text:
            text.advance(layer)
    got = perplexity(model) / base - 1
    assert got <= most, f"perplexity rose by {got:.2%}, expected at most {most:.0%}. Look at worker/quantization/."
