"""Greedy token ids of `tiny` in float32: every part on the GPU against part 1 on the CPU."""

from __future__ import annotations

import gc
import random
import time
from typing import Any

import torch

from common.sampling_params import SamplingParams
from common.testing import assert_same_greedy
from common.workloads import DEFAULT_FIRST_ID, DEFAULT_VOCAB_SIZE, QUESTIONS, random_token_ids
from tools.gpu.parts import has_flag, load_llm, part_names
from tools.gpu.recorder import Recorder

RANDOM_PROMPT_LENGTHS = (1, 15, 16, 17, 150, 600)
NUM_QUESTIONS = 6


def run(recorder: Recorder) -> None:
    from part01_simple_server.config import EngineConfig
    from part01_simple_server.server import LLM

    max_tokens = 4 if recorder.on_cpu else 48
    reference = LLM(EngineConfig(model="tiny", device="cpu", dtype="float32"))
    prompts = make_prompts(reference.tokenizer)[:: 4 if recorder.on_cpu else 1]
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    with recorder.case("part 1 on the CPU") as values:
        started = time.perf_counter()
        expected = [reference.generate(prompt, params).outputs[0].token_ids for prompt in prompts]
        values |= {"prompts": len(prompts), "tokens": max_tokens, "seconds": time.perf_counter() - started}
    for part in part_names()[-1:] if recorder.on_cpu else part_names():
        for name, flags in variants(part).items():
            with recorder.case(name) as values:
                got = generate(part, prompts, params, device=recorder.device, **flags)
                values["identical"] = sum(a == b for a, b in zip(got, expected, strict=True))
                values["prompts"] = len(prompts)
                for number, (prompt, a, b) in enumerate(zip(prompts, got, expected, strict=True)):
                    assert_same_greedy(reference.model, prompt, a, b, f"{name}, prompt {number}")


def make_prompts(tokenizer: Any) -> list[list[int]]:
    """Questions that the model answers, and random ids with lengths around block and prefill chunk sizes."""
    rng = random.Random(0)
    questions = [[{"role": "user", "content": text}] for text in QUESTIONS[:NUM_QUESTIONS]]
    chats = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in questions]
    texts = [tokenizer.encode(text, add_special_tokens=False) for text in chats]
    return texts + [random_token_ids(rng, n, DEFAULT_FIRST_ID, DEFAULT_VOCAB_SIZE) for n in RANDOM_PROMPT_LENGTHS]


def variants(part: str) -> dict[str, dict[str, Any]]:
    """A part with its defaults, and with each technique that must not change its answer."""
    name = f"part {int(part[4:6])}"
    found: dict[str, dict[str, Any]] = {name: {}}
    if has_flag(part, "enable_chunked_prefill"):
        found[f"{name}, small chunks"] = {"max_num_batched_tokens": 64, "max_num_seqs": 16}
    if has_flag(part, "speculative_method"):
        found |= {f"{name}, {method}": {"speculative_method": method} for method in ("ngram", "draft_model")}
    return found


def generate(part: str, prompts: list[list[int]], params: SamplingParams, **flags: Any) -> list[list[int]]:
    """Token ids of all prompts in one batch. The KV cache is small, so that every part fits in memory."""
    llm = load_llm(part, model="tiny", dtype="float32", num_kv_blocks=512, **flags)
    answers = [list(result.outputs[0].token_ids) for result in llm.generate(prompts, params)]
    del llm
    gc.collect()
    if flags["device"] != "cpu":
        torch.cuda.empty_cache()
    return answers
