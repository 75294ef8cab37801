"""How fast engines decode and prefill, measured in turns."""

from __future__ import annotations

import time
from typing import Any

from common.results import median
from common.sampling_params import SamplingParams

from ..llm import LLM

PROMPT_TOKENS = 16
LONG_PROMPTS = 8, 256


def decode_speeds(
    engines: dict[str, LLM], batch_size: int, num_tokens: int, repeats: int, **sampling: Any
) -> dict[str, float]:
    """Output tokens per second of each engine, for batch_size requests: medians of runs in turns. The time to the first
    token doesn't count. sampling: fields of SamplingParams; greedy if there are none."""
    speeds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(repeats + 1):
        for name, llm in engines.items():
            seconds = generate_s(llm, batch_size, num_tokens + 1, **sampling) - generate_s(
                llm, batch_size, 1, **sampling
            )
            speeds[name].append(batch_size * num_tokens / seconds)
    return {name: round(median(found[1:]), 1) for name, found in speeds.items()}  # the first run warms up


def prefill_speeds(engines: dict[str, LLM], repeats: int) -> dict[str, float]:
    """Prompt tokens per second of each engine, for LONG_PROMPTS of so many tokens: medians of runs in turns."""
    num_prompts, length = LONG_PROMPTS
    speeds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(repeats + 1):
        for name, llm in engines.items():
            speeds[name].append(num_prompts * length / generate_s(llm, num_prompts, 1, length))
    return {name: round(median(found[1:]), 1) for name, found in speeds.items()}  # the first run warms up


def generate_s(
    llm: LLM, batch_size: int, num_tokens: int, prompt_tokens: int = PROMPT_TOKENS, **sampling: Any
) -> float:
    prompts = [[(31 * row + 7 * place) % 3_000 + 100 for place in range(prompt_tokens)] for row in range(batch_size)]
    llm.engine.reset_prefix_cache()
    start_s = time.perf_counter()
    llm.generate(prompts, SamplingParams(**{"temperature": 0, **sampling}, max_tokens=num_tokens, ignore_eos=True))
    return time.perf_counter() - start_s
