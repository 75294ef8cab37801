"""transformers, in one of three ways: one_by_one, padded or continuous. Runs in the course's environment."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

from tools.peers.workers.loop import Generate, Loaded, serve

PAGES: dict[str, Any] = {"num_blocks": 64, "max_batch_tokens": 2_048}  # of 256 tokens; the quickest in part 4's bench
NO_TOKEN = -1  # without one, generate() takes the model's, and an answer ends early


def load(way: str, model: Path, dtype: str, folder: Path) -> Loaded:
    from common.checkpoint import DTYPES, load_model, resolve_checkpoint

    loaded = load_model(resolve_checkpoint(str(model)), DTYPES[dtype], "cpu")
    ways: dict[str, Generate] = {
        "one_by_one": partial(one_by_one, loaded),
        "padded": partial(padded, loaded),
        "continuous": partial(continuous, loaded),
    }
    return Loaded(ways[way], PAGES if way == "continuous" else {})


def one_by_one(model: Any, prompts: list[list[int]], max_tokens: list[int]) -> list[list[int]]:
    answers = []
    for prompt, num_tokens in zip(prompts, max_tokens, strict=True):
        answers += padded(model, [prompt], [num_tokens])
    return answers


def padded(model: Any, prompts: list[list[int]], max_tokens: list[int]) -> list[list[int]]:
    """One batch, padded on the left, that runs until the longest answer ends; the others are then cut."""
    import torch
    from transformers import GenerationConfig

    width, longest = max(map(len, prompts)), max(max_tokens)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    generation = GenerationConfig(do_sample=False, max_new_tokens=longest, pad_token_id=0, eos_token_id=NO_TOKEN)
    with torch.inference_mode():
        output = model.generate(ids, attention_mask=mask, generation_config=generation)
    return [row[:num_tokens] for row, num_tokens in zip(output[:, width:].tolist(), max_tokens, strict=True)]


def continuous(model: Any, prompts: list[list[int]], max_tokens: list[int]) -> list[list[int]]:
    from transformers import GenerationConfig
    from transformers.generation import ContinuousBatchingConfig

    generation = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=NO_TOKEN)
    answers: dict[str, list[int]] = {}
    with model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=ContinuousBatchingConfig(**PAGES)
    ) as manager:
        names = [
            manager.add_request(prompt, max_new_tokens=num_tokens)
            for prompt, num_tokens in zip(prompts, max_tokens, strict=True)
        ]
        while len(answers) < len(names):
            output = manager.get_result(timeout=60)
            if output is None or output.error is not None:
                raise RuntimeError(f"continuous batching ended with {output}")
            if output.is_finished():
                answers[output.request_id] = output.generated_tokens
    return [answers[name] for name in names]


if __name__ == "__main__":
    sys.exit(serve(partial(load, sys.argv.pop()), "transformers", "torch"))
