"""Part 15, as its server sets it up. Runs in the course's environment."""

from __future__ import annotations

import sys
from pathlib import Path

from common.threads import SPIN_LIMITS, limit_spinning
from tools.peers.workers.loop import Loaded, serve


def load(model: Path, dtype: str, folder: Path) -> Loaded:
    limit_spinning()  # before torch is imported
    from common.sampling_params import SamplingParams
    from part15_full_architecture.config import EngineConfig
    from part15_full_architecture.llm import LLM

    settings = {"max_num_seqs": 32, "max_model_len": 1_024}
    llm = LLM(EngineConfig(model=str(model), device="cpu", dtype=dtype, **settings))  # type: ignore[arg-type]

    def generate(prompts: list[list[int]], max_tokens: list[int]) -> list[list[int]]:
        params = [SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True) for num_tokens in max_tokens]
        answers = [result.outputs[0].token_ids for result in llm.generate(prompts, params)]
        assert llm.engine.reset_prefix_cache(), "the engine is idle"
        return [list(answer) for answer in answers]

    return Loaded(generate, {**settings, **SPIN_LIMITS})


if __name__ == "__main__":
    sys.exit(serve(load, "torch", "numba"))
