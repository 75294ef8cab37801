"""lab/step_profile.py: every stage's time is noted once, and nothing stays patched."""

from __future__ import annotations

from common.workloads import nano_vllm_cpu
from part15_full_architecture.config import EngineConfig
from part15_full_architecture.lab.step_profile import STAGES, profile
from part15_full_architecture.llm import LLM

LOOK = "Look at lab/step_profile.py::profile"


def test_the_shares_of_a_run() -> None:
    llm = LLM(EngineConfig(model="tiny", device="cpu", num_threads=1, num_kv_blocks=64, max_num_seqs=4))
    runner = llm.engine.executor.worker.runner  # type: ignore[attr-defined]
    found = profile(llm, nano_vllm_cpu(2))
    assert found.num_tokens == sum(request.max_tokens for request in nano_vllm_cpu(2)), LOOK
    assert all(found.seconds[stage] > 0 for stage in STAGES), f"each stage has had work: {found}. {LOOK}"
    assert sum(found.seconds.values()) < found.total_s, f"no time is counted twice: {found}. {LOOK}"
    shares = [value for key, value in found.measurements().items() if "share" in key]
    assert len(shares) == len(STAGES) + 1 and abs(sum(shares) - 1) < 0.01, f"got {shares}. {LOOK}"
    for owner in (runner.small_steps, runner.model, runner.sampler):
        assert not {"run", "forward", "compute_logits", "sample"} & vars(owner).keys(), f"{owner} is patched. {LOOK}"
