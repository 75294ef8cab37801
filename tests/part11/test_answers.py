"""Answers of all grids of ranks and engine cores are those of one rank, while experts move and requests come and go."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.checkpoint import MODELS_DIR
from common.sampling_params import SamplingParams
from part11_expert_parallelism.api.async_engine import AsyncLLM
from part11_expert_parallelism.api.data_parallel_client import DataParallelClient
from part11_expert_parallelism.config import EngineConfig
from part11_expert_parallelism.core.executor import MultiprocExecutor
from part11_expert_parallelism.llm import LLM
from part11_expert_parallelism.messages import EngineCoreOutputs, FromCore, StartWave

LOOK = 'Look at worker/moe.py::MixtureOfExperts.exchange; README "There and back".'
LOOK_WAVE = 'Look at core/lockstep.py::Lockstep and core/engine_core.py::EngineCore.start_wave; README "Cores in step".'
LOOK_MOVES = 'Look at worker/expert_moves.py::move_experts; README "Balancing".'
BASE: dict[str, Any] = dict(model="tiny-moe", device="cpu", num_threads=1, num_kv_blocks=64)
SMALL: dict[str, Any] = dict(max_num_batched_tokens=16, max_num_seqs=8, num_kv_blocks=22, block_size=8)
GRIDS: list[dict[str, Any]] = [
    dict(tensor_parallel_size=2),
    dict(tensor_parallel_size=2, enable_expert_parallel=True),
    dict(tensor_parallel_size=2, enable_expert_parallel=True, enable_dbo=True),
    dict(tensor_parallel_size=4, enable_expert_parallel=True, **SMALL),
    dict(
        tensor_parallel_size=2, pipeline_parallel_size=2, enable_expert_parallel=True, enable_dbo=True,
        speculative_method="ngram", **SMALL,
    ),
    dict(
        tensor_parallel_size=2, enable_expert_parallel=True, enable_eplb=True, num_redundant_experts=4,
        eplb_step_interval=7, **SMALL,
    ),
]  # fmt: skip
PROMPTS = [[50 + number] * (3 + 5 * number) for number in range(6)]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=16 + number, ignore_eos=True)
    if number % 2
    else SamplingParams(temperature=0.8, top_p=0.9, seed=number, max_tokens=20, ignore_eos=True)
    for number in range(6)
]


def ask(llm: LLM) -> list[list[int]]:
    """Twice, so that the second round finds the first one's blocks."""
    return [output.outputs[0].token_ids for _ in range(2) for output in llm.generate(PROMPTS, PARAMS)]


@pytest.fixture(scope="module")
def alone() -> Iterator[LLM]:
    llm = LLM(EngineConfig(**BASE))
    yield llm
    llm.engine.shutdown()


def test_one_rank_answers_as_transformers_does(alone: LLM) -> None:
    """The other grids are compared with it."""
    reference = AutoModelForCausalLM.from_pretrained(MODELS_DIR / "tiny-moe", dtype=torch.float32).eval()
    outputs = alone.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        expected = list(prompt)
        with torch.inference_mode():
            for _ in range(24):
                expected.append(int(reference(torch.tensor([expected])).logits[0, -1].argmax()))
        got = output.outputs[0].token_ids
        assert got == expected[len(prompt) :], f"expected {expected[len(prompt) :]}, got {got}. {LOOK}"


@pytest.mark.parametrize("flags", GRIDS, ids=str)
def test_answers_of_one_core(flags: dict[str, Any], alone: LLM) -> None:
    expected = ask(alone)
    llm = LLM(EngineConfig(**{**BASE, **flags}))
    try:
        got = ask(llm)
    finally:
        llm.engine.shutdown()
    assert got == expected, f"{flags}: expected the answers of one rank, {expected}, got {got}. {LOOK}"
    if flags.get("enable_eplb"):
        executor = llm.engine.executor
        assert isinstance(executor, MultiprocExecutor) and executor.placements, f"no expert was placed. {LOOK_MOVES}"
        in_order = [slot % 8 for slot in range(12)]
        assert all(slots != in_order for slots in executor.placements), f"{executor.placements}. {LOOK_MOVES}"


def test_two_cores_under_load(alone: LLM) -> None:
    """Requests come at random times, some are aborted, experts move every few steps, and sometimes nobody has work."""
    rng = random.Random(0)
    lengths = [rng.randint(1, 30) for _ in range(30)]
    prompts = [[rng.randrange(100, 4_000) for _ in range(rng.randint(1, 40))] for _ in lengths]
    params = [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for length in lengths]
    expected = [output.outputs[0].token_ids for output in alone.generate(prompts, params)]
    config = EngineConfig(
        **BASE, data_parallel_size=2, enable_expert_parallel=True, enable_eplb=True, eplb_step_interval=10,
        num_redundant_experts=2, enable_dbo=True,
    )  # fmt: skip
    engine, waves, balances = AsyncLLM(config), list[int](), list[float]()
    assert isinstance(engine.core, DataParallelClient)
    merge = engine.core._merge

    def note(core: int, message: FromCore) -> FromCore | None:
        waves.extend([message.wave] if isinstance(message, StartWave) else [])
        if isinstance(message, EngineCoreOutputs):
            balances.append(message.stats["expert_balance_perc"])
        return merge(core, message)

    engine.core._merge = note  # type: ignore[method-assign]

    async def read(number: int, stops_after: int | None) -> list[int]:
        tokens = list[int]()
        async for output in engine.generate(prompts[number], params[number]):
            tokens += output.token_ids
            if stops_after is not None and len(tokens) >= stops_after:
                break  # which aborts the request
        return tokens

    async def start_a_wave() -> None:
        """Wait until all cores have stopped: then a request starts a wave."""
        num_before, pause_s = len(waves), 0.1
        while len(waves) == num_before:
            await asyncio.sleep(pause_s)  # while they take steps, a request only lets them go on
            pause_s *= 2
            assert await read(0, None) == expected[0], f"while the cores come to rest. {LOOK_WAVE}"

    async def run() -> tuple[dict[int, list[int]], dict[int, int | None]]:
        engine.start()
        tasks, cuts = dict[int, asyncio.Task[list[int]]](), dict[int, int | None]()
        for number, length in enumerate(lengths):
            cuts[number] = rng.randint(1, length) if rng.random() < 0.3 else None
            tasks[number] = asyncio.create_task(read(number, cuts[number]))
            if number % 10 == 9:
                await asyncio.gather(*tasks.values())
                await start_a_wave()
            elif rng.random() < 0.5:
                await asyncio.sleep(rng.random() / 20)
        answers = {number: await task for number, task in tasks.items()}
        assert await engine.reset_prefix_cache(), f"both are idle. {LOOK_WAVE}"
        return answers, cuts

    try:
        answers, cuts = asyncio.run(asyncio.wait_for(run(), 120))
    finally:
        engine.shutdown()
    assert sorted(set(waves)) == list(range(waves[-1] + 1)) and waves[-1] >= 3, f"waves {waves}. {LOOK_WAVE}"
    for number, tokens in answers.items():
        assert tokens == expected[number][: len(tokens)], f"request {number}: {tokens}, not {expected[number]}. {LOOK}"
        assert cuts[number] is not None or len(tokens) == lengths[number], f"request {number} is too short: {tokens}"
    assert 0 < min(balances) < 1, f"experts were never placed: balancedness {min(balances)}. {LOOK_MOVES}"
