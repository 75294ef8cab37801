"""Greedy and seeded answers of every grid of ranks are those of one rank, with every feature of the engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from common.sampling_params import SamplingParams
from part09_tensor_parallelism.config import EngineConfig
from part09_tensor_parallelism.llm import LLM

LOOK = 'Look at worker/rank_process.py::Rank and core/executor.py::MultiprocExecutor; README "One step on all ranks".'
QUESTIONS = ("a KV cache", "paged attention", "continuous batching", "a draft model", "prefix caching", "the GIL")
SMALL = dict(max_num_batched_tokens=16, max_num_seqs=8, num_kv_blocks=40, block_size=8)
CASES: list[tuple[int, int, dict[str, Any]]] = [  # tp, stages, flags; the contract suite has many more, in threads
    (2, 1, {}),
    (2, 1, {**SMALL, "speculative_method": "ngram", "num_kv_blocks": 22}),
    (4, 1, {**SMALL, "speculative_method": "draft_model"}),
    (1, 2, {**SMALL, "speculative_method": "draft_model", "async_scheduling": False}),
    (2, 2, {**SMALL, "num_kv_blocks": 22}),
]


def ask(llm: LLM) -> list[tuple[list[int], Any]]:
    """Answers to a mix of requests, twice, so that the second round finds the first one's blocks."""
    encode = llm.tokenizer.encode
    prompts = [encode(f"<|im_start|>user\nWhat is {each}?<|im_end|>\n<|im_start|>assistant\n") for each in QUESTIONS]
    params = [
        SamplingParams(temperature=0, max_tokens=20 + 3 * number, logprobs=2 if number == 1 else None)
        if number % 3
        else SamplingParams(temperature=0.8, top_p=0.9, seed=number, max_tokens=24, presence_penalty=0.5)
        for number in range(len(prompts))
    ]
    outputs = [output.outputs[0] for _ in range(2) for output in llm.generate(prompts, params)]
    return [(output.token_ids, output.finish_reason) for output in outputs]


@pytest.fixture(scope="module")
def expected() -> Iterator[list[tuple[list[int], Any]]]:
    llm = LLM(EngineConfig(num_threads=1))
    yield ask(llm)
    llm.engine.shutdown()


@pytest.mark.parametrize(("tp_size", "num_stages", "flags"), CASES, ids=str)
def test_answers(
    tp_size: int, num_stages: int, flags: dict[str, Any], expected: list[tuple[list[int], Any]]
) -> None:  # fmt: skip
    """With chunks, preemptions, prefix hits and draft tokens."""
    config = EngineConfig(tensor_parallel_size=tp_size, pipeline_parallel_size=num_stages, num_threads=1, **flags)
    llm = LLM(config)
    try:
        got = ask(llm)
    finally:
        llm.engine.shutdown()
    where = f"tp {tp_size}, {num_stages} stages, {flags}"
    assert got == expected, f"{where}: expected the answers of one rank, {expected}, got {got}. {LOOK}"
    free = llm.engine.blocks.num_free_blocks
    assert free == llm.engine.blocks.num_blocks - 1, f"{where}: only {free} blocks are free. {LOOK}"
    if "num_kv_blocks" in flags and flags["num_kv_blocks"] < 30:
        assert llm.engine.scheduler.num_preemptions, f"{where}: this test needs preemptions"
