"""Where the time of part 15 goes in the workload of tools.peers: python -m part15_full_architecture.lab.step_profile"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from common.cli import check_minimums, exit_on_error, option, parse_config
from common.results import median, write_result
from common.sampling_params import SamplingParams
from common.threads import set_num_threads
from common.workloads import WorkloadRequest, nano_vllm_cpu

from ..config import EngineConfig
from ..llm import LLM

PROG = "part15_full_architecture.lab.step_profile"
MODELS = ("tiny", "random:llama-110m")
DTYPES: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
NUM_REQUESTS = {32: "32 requests", 1: "one request"}
STAGES = ("megakernel", "layers in torch", "LM head", "sampling")


@dataclass(frozen=True, slots=True)
class ProfileConfig:
    models: str = option(",".join(MODELS), "models, comma-separated")
    repeats: int = option(3, "measured runs of each; the one with the median time is reported", 1)
    results_dir: str = option("results", "folder for the JSON")

    def __post_init__(self) -> None:
        check_minimums(self)


@dataclass(frozen=True, slots=True)
class Profile:
    """Of one run. seconds: of each stage; all else is outside the model: scheduling, preparing steps, and their
    outputs."""

    total_s: float
    num_tokens: int
    seconds: dict[str, float]

    def measurements(self) -> dict[str, float]:
        shares = {f"{stage}, share": round(each / self.total_s, 3) for stage, each in self.seconds.items()}
        outside = 1 - sum(self.seconds.values()) / self.total_s
        return {"tokens_per_s": round(self.num_tokens / self.total_s, 1), **shares, "outside, share": round(outside, 3)}


@contextmanager
def timed(seconds: dict[str, float], owner: Any, name: str, stage: str) -> Iterator[None]:
    """Inside, the time of a method is added to a stage, unless it returns None because it had nothing to do."""
    method = getattr(owner, name)

    def measured(*args: Any, **named: Any) -> Any:
        start_s = time.perf_counter()
        result = method(*args, **named)
        if result is not None:
            seconds[stage] += time.perf_counter() - start_s
        return result

    with mock.patch.object(owner, name, measured):
        yield


def profile(llm: LLM, requests: list[WorkloadRequest]) -> Profile:
    """All requests at once, with empty caches."""
    assert llm.engine.reset_prefix_cache(), "the engine is idle"
    runner, seconds = llm.engine.executor.worker.runner, dict.fromkeys(STAGES, 0.0)  # type: ignore[attr-defined]
    stages = zip(STAGES, ((runner.small_steps, "run"), (runner.model, "forward"), (runner.model, "compute_logits"),
                          (runner.sampler, "sample")), strict=True)  # fmt: skip
    prompts = [request.prompt_token_ids or [] for request in requests]
    params = [SamplingParams(temperature=0, max_tokens=request.max_tokens, ignore_eos=True) for request in requests]
    with ExitStack() as stack:
        for stage, (owner, name) in stages:
            if owner is not None:
                stack.enter_context(timed(seconds, owner, name, stage))
        start_s = time.perf_counter()
        llm.generate(prompts, params)
        total_s = time.perf_counter() - start_s
    return Profile(total_s, sum(request.max_tokens for request in requests), seconds)


def measure(models: list[str], repeats: int) -> dict[str, dict[str, float]]:
    """For each model, dtype and number of requests: output tokens per second, and shares of the time."""
    found = {}
    for model in models:
        for dtype in DTYPES:
            llm = LLM(EngineConfig(model=model, device="cpu", dtype=dtype, max_num_seqs=32, max_model_len=1_024))
            for num_requests in NUM_REQUESTS:
                requests = nano_vllm_cpu(num_requests)
                runs = [profile(llm, requests) for _ in range(repeats + 1)][1:]  # the first run warms up
                middle = median([run.total_s for run in runs])
                chosen = min(runs, key=lambda run: abs(run.total_s - middle))
                found[f"{model}, {dtype}, {NUM_REQUESTS[num_requests]}"] = chosen.measurements()
    return found


def report(console: Console, found: dict[str, dict[str, float]]) -> None:
    table = Table("", *next(iter(found.values())), box=SIMPLE)
    for name, values in found.items():
        table.add_row(name, *(f"{value:.0%}" if "share" in key else f"{value:,.0f}" for key, value in values.items()))
    console.print(table)


def run(config: ProfileConfig) -> None:
    set_num_threads(None)
    found = measure([model.strip() for model in config.models.split(",")], config.repeats)
    report(Console(width=140), found)
    settings = {key: value for key, value in asdict(config).items() if key != "results_dir"}
    write_result(
        Path(config.results_dir) / "part15_step_profile.json", benchmark="part15_step_profile", config=settings, seed=0,
        repeats=config.repeats, measurements=found,
    )  # fmt: skip


def main() -> None:
    config = parse_config(ProfileConfig, __doc__ or "", PROG)
    exit_on_error(PROG, lambda: run(config))


if __name__ == "__main__":
    main()
