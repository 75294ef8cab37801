"""Decode of a single request on a large model: how much of the memory's bandwidth it reaches.

Each decoded token reads all weights (but only one row of the input embedding) and the KV cache of its context. The
share is the rate of these bytes divided by that of a large copy on the same device; launches and gaps cost the rest.
"""

from __future__ import annotations

import random
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from common.checkpoint import default_dtype, resolve_checkpoint
from common.results import median
from common.sampling_params import SamplingParams
from common.workloads import DEFAULT_FIRST_ID, DEFAULT_VOCAB_SIZE, random_token_ids
from tools.gpu.parts import load_llm, part_names
from tools.gpu.recorder import Recorder
from tools.gpu.timing import copy_bandwidth_gb_s

PROMPT_TOKENS = 128
REPEATS = 3


def run(recorder: Recorder) -> None:
    part, device = part_names()[-1], recorder.device
    model, dtype = ("tiny" if recorder.on_cpu else "random:qwen3-8b"), default_dtype(device)
    short, long, repeats = (4, 12, 1) if recorder.on_cpu else (32, 160, REPEATS)
    with recorder.case("copy") as values:
        values["gb_s"] = copy_gb_s = copy_bandwidth_gb_s(device)
    with recorder.case("load") as values:
        started = time.perf_counter()
        flags = {"num_kv_blocks": 64} if recorder.on_cpu else {}
        llm = load_llm(part, model=model, device=device, max_model_len=1_024, **flags)
        generate(llm, short, seed=0)  # warm-up
        values |= {"part": part, "model": model, "dtype": str(dtype), "seconds": time.perf_counter() - started}
    if recorder.num_failed:
        return
    with recorder.case("decode") as values:
        config = resolve_checkpoint(model).config
        weight_bytes = weight_bytes_per_token(config, dtype)
        kv_bytes = kv_bytes_per_token(config, dtype, PROMPT_TOKENS + (short + long) // 2)
        # The difference between two lengths excludes the prefill.
        pairs = [(generate(llm, short, seed=i), generate(llm, long, seed=i)) for i in range(1, repeats + 1)]
        seconds = median([(long_s - short_s) / (long - short) for short_s, long_s in pairs])
        gb_s = (weight_bytes + kv_bytes) / seconds / 1e9
        values |= {"tokens_per_s": 1 / seconds, "ms_per_token": seconds * 1e3, "weight_bytes_per_token": weight_bytes}
        values |= {"kv_bytes_per_token": kv_bytes, "gb_s": gb_s, "share_of_copy_bandwidth": gb_s / copy_gb_s}


def generate(llm: Any, max_tokens: int, seed: int) -> float:
    """Seconds for one greedy answer. seed: for the prompt, so that no run gets a prefix hit from another."""
    rng = random.Random(f"{seed} {max_tokens}")
    prompt = random_token_ids(rng, PROMPT_TOKENS, DEFAULT_FIRST_ID, DEFAULT_VOCAB_SIZE)
    started = time.perf_counter()
    [result] = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True))
    elapsed = time.perf_counter() - started
    assert len(result.outputs[0].token_ids) == max_tokens, f"{len(result.outputs[0].token_ids)} of {max_tokens} tokens"
    return elapsed


def weight_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Bytes of all parameters that one decoded token reads; a tied embedding is read whole, as the output layer."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    skipped = 0 if config.tie_word_embeddings else model.get_input_embeddings().weight.numel() - config.hidden_size
    return (sum(parameter.numel() for parameter in model.parameters()) - skipped) * dtype.itemsize


def kv_bytes_per_token(config: Any, dtype: torch.dtype, context_len: int) -> int:
    per_position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return per_position * context_len * dtype.itemsize
