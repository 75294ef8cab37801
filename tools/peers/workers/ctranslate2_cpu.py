"""CTranslate2's Generator.

It has no continuous batching: a batch is formed before it starts. A callback ends each answer at its own length, and
its row then leaves the batch. Prompts of a batch are computed together up to the shortest one's length, so the requests
are sorted by length first, and split into batches.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tools.peers.workers.loop import Loaded, num_cores, serve

BATCH_SIZE = 16  # 8 and 32 were slower


def load(model: Path, dtype: str, files: Path) -> Loaded:
    import ctranslate2

    if dtype not in ctranslate2.get_supported_compute_types("cpu"):
        raise ValueError(f"CTranslate2 does not compute in {dtype} on this CPU")
    directory = files / dtype
    if not directory.exists():
        convert(model, directory, dtype)
    vocabulary = json.loads((directory / "vocabulary.json").read_text("utf-8"))
    threads = {"inter_threads": 1, "intra_threads": num_cores()}
    generator = ctranslate2.Generator(str(directory), device="cpu", compute_type=dtype, **threads)

    def generate(prompts: list[list[int]], max_tokens: list[int]) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in prompts]
        by_length = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
        for start in range(0, len(prompts), BATCH_SIZE):
            batch = by_length[start : start + BATCH_SIZE]

            def is_complete(step: Any, batch: list[int] = batch) -> bool:
                place = batch[step.batch_id]
                answers[place].append(step.token_id)
                return len(answers[place]) == max_tokens[place]

            generator.generate_batch(
                [[vocabulary[token_id] for token_id in prompts[place]] for place in batch],
                max_length=max(max_tokens[place] for place in batch), include_prompt_in_result=False, end_token=[],
                callback=is_complete,
            )  # fmt: skip
        return answers

    return Loaded(generate, {**threads, "batch_size": BATCH_SIZE})


def convert(model: Path, directory: Path, dtype: str) -> None:
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(model)).convert(str(directory), quantization=dtype)
    path = directory / "config.json"
    config = json.loads(path.read_text("utf-8"))
    config["bos_token"] = config["eos_token"]  # the tokenizer has none; the Generator demands one and never uses it
    path.write_text(json.dumps(config), "utf-8")


if __name__ == "__main__":
    sys.exit(serve(load, "ctranslate2"))
