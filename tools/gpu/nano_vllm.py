"""nano-vllm's published benchmark on the newest part, or as much of it as the time allows.

Its bench.py: 256 requests, prompts of 100 to 1,024 random token ids, answers of 100 to 1,024 tokens, temperature 0.6,
no end of sequence, max_model_len 4,096, Qwen3-0.6B. Weights are random here, which does not change the work.
"""

from __future__ import annotations

import time
from typing import Any

from common.sampling_params import SamplingParams
from common.workloads import WorkloadRequest, nano_vllm
from tools.gpu.parts import load_llm, part_names
from tools.gpu.recorder import Recorder

NUM_REQUESTS = 256
SMALLER_RUNS = (16, 64)  # run first, to estimate how long it will take
SAFETY = 0.85  # the expected time of a run may be this share of the time left


def run(recorder: Recorder) -> None:
    part = part_names()[-1]
    model = "tiny" if recorder.on_cpu else "random:qwen3-0.6b"
    flags: dict[str, Any] = {"max_model_len": 512, "num_kv_blocks": 64} if recorder.on_cpu else {
        "max_model_len": 4096, "max_num_seqs": NUM_REQUESTS, "max_num_batched_tokens": 16_384,
    }  # fmt: skip
    runs = (1, 2, 4) if recorder.on_cpu else (*SMALLER_RUNS, NUM_REQUESTS)
    with recorder.case("load") as values:
        started = time.perf_counter()
        llm = load_llm(part, model=model, device=recorder.device, **flags)
        llm.generate([[100] * 200], SamplingParams(temperature=0.6, max_tokens=8, ignore_eos=True))  # warm-up
        values |= {"part": part, "model": model, "seconds": time.perf_counter() - started, **flags}
    if recorder.num_failed:
        return
    seconds: dict[int, float] = {}
    for num_requests in runs:
        fitting = largest_fitting(seconds, num_requests, SAFETY * recorder.seconds_left())
        if fitting is None:
            break
        with recorder.case(f"{fitting} requests") as values:
            values["seed"] = seed = 0 if num_requests == runs[-1] else fitting
            requests = workload(fitting, recorder.on_cpu, seed)
            seconds[fitting] = values["seconds"] = generate(llm, requests)
            values |= figures(requests, seconds[fitting])
            values["is_whole_benchmark"] = fitting == NUM_REQUESTS


def workload(num_requests: int, on_cpu: bool, seed: int) -> list[WorkloadRequest]:
    """Runs differ in their seeds: otherwise one run's prompts would be prefix hits in the next."""
    if on_cpu:
        return nano_vllm(num_requests, seed, min_tokens=4, max_input_tokens=16, max_output_tokens=8)
    return nano_vllm(num_requests, seed, first_id=0, vocab_size=10_001)  # its own ids


def generate(llm: Any, requests: list[WorkloadRequest]) -> float:
    """Seconds for all requests at once."""
    params = [SamplingParams(temperature=r.temperature, max_tokens=r.max_tokens, ignore_eos=True) for r in requests]
    started = time.perf_counter()
    results = llm.generate([list(r.prompt_token_ids or []) for r in requests], params)
    elapsed = time.perf_counter() - started
    for request, result in zip(requests, results, strict=True):
        num_tokens = len(result.outputs[0].token_ids)
        assert num_tokens == request.max_tokens, f"{num_tokens} tokens, expected {request.max_tokens}"
    return elapsed


def figures(requests: list[WorkloadRequest], elapsed_s: float) -> dict[str, Any]:
    num_output_tokens = sum(request.max_tokens for request in requests)
    return {
        "prompt_tokens": sum(len(request.prompt_token_ids or []) for request in requests),
        "output_tokens": num_output_tokens,
        "output_tokens_per_s": num_output_tokens / elapsed_s,
    }


def largest_fitting(seconds: dict[int, float], wanted: int, limit_s: float) -> int | None:
    """The most requests, up to `wanted`, that are expected to fit; None if not more than in an earlier run.

    seconds: of the runs so far, by number of requests. From two runs on, it extrapolates linearly from the last two,
    because most of the time goes to steps that all requests share. From one run, time scales with the requests.
    """
    if not seconds:
        return wanted
    most = max(seconds)
    fitting = (n for n in range(wanted, most, -max(1, wanted // 16)) if expected_seconds(seconds, n) <= limit_s)
    return next(fitting, None)


def expected_seconds(seconds: dict[int, float], num_requests: int) -> float:
    *_, last = points = sorted(seconds.items())
    if len(points) == 1:
        return last[1] * num_requests / last[0]
    before = points[-2]
    per_request = max(0.0, (last[1] - before[1]) / (last[0] - before[0]))
    return last[1] + per_request * (num_requests - last[0])
