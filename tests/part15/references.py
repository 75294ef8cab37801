"""What is right: the answers of part 1, of transformers, and of the plainest engine with the same quantization."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol
from unittest import mock

import torch

from common.checkpoint import load_model, resolve_checkpoint
from common.sampling_params import SamplingParams
from common.testing import TOP_2_TOLERANCE, reference_greedy
from part01_simple_server.config import EngineConfig as FirstConfig
from part01_simple_server.server import LLM as FirstLLM
from part15_full_architecture.config import EngineConfig
from part15_full_architecture.core import engine
from part15_full_architecture.llm import LLM
from tests.local_ranks import LocalExecutor
from tests.part15.features import FEATURES, PLENTY, Row, flags_of

PART = "part15_full_architecture"
# How far apart the reference's best token and another one may be if both are right, in logits. Sums in another order
# change float32 logits by up to 3e-5 here. Codes make more of that. A key or a value that lies almost between two codes
# gets the other one, once in a few tokens: a step of 1/127 of the largest (int8), or 1/16 of itself (fp8), in one
# number of 1,500. With W8A8, another code in the first layer changes all inputs of the next layers, and with them
# hundreds of codes. Measured over 1,600 logprobs for each of both models, other backends, chunks and ranks: one
# changed by up to 0.06 with a quantized KV cache, by up to 0.43 with W8A8. The margins are twice that, because two
# logits are compared, and twice again. What is wrong, such as a key at the wrong position, changes logits by several
# units.
KV_MARGIN, W8A8_MARGIN = 0.25, 1.75
TF32_MARGIN = 0.05  # on a GPU, matrix products may have 10 bits of a float32 number's 23
MIN_SHARE = 0.8  # of all tokens that are the reference's best


class Reference(Protocol):
    margin: float

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> list[int]: ...

    def gaps(self, prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
        """For each token of an answer, how much better than it the best one was."""
        ...


class PlainReference:
    """Of a model as it is, in float32: part 1 for `tiny`, transformers for mixtures of experts."""

    def __init__(self, model: str) -> None:
        self.margin = TOP_2_TOLERANCE
        self.first = FirstLLM(FirstConfig(model=model, device="cpu", dtype="float32")) if model == "tiny" else None
        self.model = load_model(resolve_checkpoint(model), torch.float32, "cpu")
        self._known = dict[tuple[int, ...], list[int]]()

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        key = (num_tokens, *prompt)
        if key not in self._known:
            self._known[key] = self._greedy(list(prompt), num_tokens)
        return self._known[key]

    def _greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        if self.first is None:
            return reference_greedy(self.model, prompt, num_tokens)
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        return self.first.generate(prompt, params).outputs[0].token_ids

    @torch.inference_mode()
    def gaps(self, prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
        logits = self.model(torch.tensor([[*prompt, *answer[:-1]]])).logits[0, len(prompt) - 1 :]
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        return (logits.amax(dim=1) - chosen).tolist()


class QuantizedReference:
    """Part 15's own engine with no other feature than quantization: one step at a time, whole prompts, torch's kernels.

    more: further flags. With W8A8, ranks that share a row of inputs each have a scale for their part of it, so their
    codes are others than one rank's; here they are threads.
    """

    def __init__(self, model: str, weights: str, kv_cache: str, more: tuple[tuple[str, Any], ...] = ()) -> None:
        self.margin = max(
            TOP_2_TOLERANCE, KV_MARGIN if kv_cache != "as it is" else 0.0, W8A8_MARGIN if weights == "w8a8" else 0.0
        )
        flags = flags_of({"weights": weights, "KV cache": kv_cache})
        flags |= {"model": model, "enable_prefix_caching": False, "async_scheduling": False, "kernels": "torch"}
        flags |= {"num_kv_blocks": PLENTY, "pack_weights": False, "megakernel": False, **dict(more)}
        config = EngineConfig(**flags)
        make = partial(LocalExecutor, PART) if config.num_ranks > 1 else engine.make_executor
        with mock.patch.object(engine, "make_executor", make):
            self.llm = LLM(config)
        self.weight_bytes = self.llm.engine.executor.weight_bytes
        self._known = dict[tuple[int, ...], list[int]]()

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        key = (num_tokens, *prompt)
        if key not in self._known:
            params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
            self._known[key] = self.llm.generate([list(prompt)], params)[0].outputs[0].token_ids
        return self._known[key]

    def gaps(self, prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
        params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, prompt_logprobs=1)
        [output] = self.llm.generate([[*prompt, *answer]], params)
        found = (output.outputs[0].prompt_logprobs or [])[len(prompt) :]
        assert len(found) == len(answer), f"expected logprobs of {len(answer)} tokens, got {len(found)}"
        logprobs = [{token: each.logprob for token, each in (entry or {}).items()} for entry in found]
        return [max(each.values()) - each[token] for each, token in zip(logprobs, answer, strict=True)]


@functools.cache
def plain(model: str) -> PlainReference:
    return PlainReference(model)


@functools.cache
def quantized(model: str, weights: str, kv_cache: str, more: tuple[tuple[str, Any], ...] = ()) -> QuantizedReference:
    return QuantizedReference(model, weights, kv_cache, more)


def reference_of(row: Row) -> Reference:
    own = FEATURES["model"][row["model"]]
    model, weights, kv_cache = own["model"], row["weights"], row["KV cache"]
    if (weights, kv_cache) == ("as they are", "as it is"):
        return plain(model)
    if weights != "w8a8" or row["tensor parallelism"] == "1":
        return quantized(model, weights, kv_cache)
    names = ("tensor_parallel_size", "enable_expert_parallel")
    flags = {**own, **FEATURES["tensor parallelism"][row["tensor parallelism"]]}
    return quantized(model, weights, kv_cache, tuple((name, flags[name]) for name in names if name in flags))


@dataclass
class Comparison:
    """num_tokens: that were compared. num_best: of these, the reference's best ones."""

    num_tokens: int = 0
    num_best: int = 0

    def add(self, reference: Reference, margin: float, prompt: list[int], answer: list[int], where: str) -> None:
        """Raises AssertionError if a token of an answer is not the best one, given those before it, nor as good."""
        gaps = [0.0] * len(answer)
        if answer != reference.greedy(prompt, len(answer)):
            gaps = reference.gaps(prompt, answer)
        self.num_tokens += len(answer)
        self.num_best += sum(gap <= 0 for gap in gaps)
        wrong = [place for place, gap in enumerate(gaps) if gap > margin]
        assert not wrong, (
            f"{where}: output token {wrong[0]} (position {len(prompt) + wrong[0]}) is {answer[wrong[0]]}: expected one "
            f"whose logit is within {margin:g} of the reference's best, got one {gaps[wrong[0]]:.3g} below. The answer "
            f"is {answer}, the reference's {reference.greedy(prompt, len(answer))}."
        )
