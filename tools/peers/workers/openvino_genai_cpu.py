"""OpenVINO GenAI's ContinuousBatchingPipeline."""

from __future__ import annotations

import sys
from pathlib import Path

from tools.peers.workers.loop import Loaded, num_cores, serve

PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}


def load(model: Path, dtype: str, files: Path) -> Loaded:
    import numpy as np
    import openvino
    from openvino_genai import ContinuousBatchingPipeline, GenerationConfig, SchedulerConfig

    if not (files / "openvino_model.xml").exists():
        from optimum.exporters.openvino import main_export

        main_export(str(model), files, task="text-generation-with-past")  # in float32; the hint below rounds it
    properties = {
        "INFERENCE_PRECISION_HINT": PRECISIONS[dtype],
        "KV_CACHE_PRECISION": PRECISIONS[dtype],  # its default is u8
        "INFERENCE_NUM_THREADS": num_cores(),
    }
    settings = {"cache_size": 1, "max_num_seqs": 32, "enable_prefix_caching": False}  # cache_size: GiB
    scheduler = SchedulerConfig()
    for name, value in settings.items():
        setattr(scheduler, name, value)
    pipeline = ContinuousBatchingPipeline(files, scheduler, "CPU", properties)

    def generate(prompts: list[list[int]], max_tokens: list[int]) -> list[list[int]]:
        inputs = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        params = [
            GenerationConfig(max_new_tokens=num_tokens, ignore_eos=True, do_sample=False) for num_tokens in max_tokens
        ]
        return [list(result.m_generation_ids[0]) for result in pipeline.generate(inputs, params)]

    return Loaded(generate, {**properties, **settings})


if __name__ == "__main__":
    sys.exit(serve(load, "openvino-genai", "openvino", "optimum-intel"))
