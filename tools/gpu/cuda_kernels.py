"""Part 15's kernels: its tests on the GPU, each operation with each backend, and prefill beside torch's SDPA.

make gpu ARGS="--sections cuda_kernels --out results/part15_gpu.json"
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from tools.gpu.parts import part_names
from tools.gpu.recorder import Recorder
from tools.gpu.timing import copy_bandwidth_gb_s, seconds_per_call

ROOT = Path(__file__).resolve().parents[2]
NUM_LAST_CHARACTERS = 4_000
TESTS = (
    "test_cuda_attention",
    "test_small_cuda_kernels",
    "test_cuda_products",
    "test_triton_operations",
    "test_graphs",
)
MODEL, REPEATS = "random:qwen3-8b", 5
PREFILL = (4, 4_096, 32, 8, 128)  # sequences, tokens of each, query heads, KV heads, head_dim


def run(recorder: Recorder) -> None:
    part, number = part_names()[-1], part_names()[-1][4:6]
    if not recorder.on_cpu:
        for name in TESTS:
            with recorder.case(name) as values:
                values["summary"] = run_tests(f"tests/part{number}/{name}.py")
        with recorder.case("compute-sanitizer") as values:
            values |= sanitize(f"tests/part{number}/test_small_cuda_kernels.py")
    with recorder.case("operations") as values:
        model, dtype = ("tiny", torch.float32) if recorder.on_cpu else (MODEL, torch.bfloat16)
        values |= measure_operations(part, model, dtype, recorder.device, 1 if recorder.on_cpu else REPEATS)
    if not recorder.on_cpu:
        with recorder.case("prefill") as values:
            values |= measure_prefill(part, recorder.device)


def run_tests(file: str, *prefix: str) -> str:
    """Run the tests of a file that are for a GPU. Returns pytest's last line."""
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # installed plugins may not fit this pytest
    command = [*prefix, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not cpu", file]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    output = done.stdout.strip()
    assert done.returncode == 0, output[-NUM_LAST_CHARACTERS:]
    return output.rpartition("\n")[2]


def sanitize(file: str) -> dict[str, Any]:
    """NVIDIA's own checker, if it is installed: out-of-bounds accesses, and races in shared memory."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"skipped": "compute-sanitizer is not installed"}
    return {name: run_tests(file, tool, "--tool", name, "--error-exitcode", "9") for name in ("memcheck", "racecheck")}


def measure_operations(part: str, model: str, dtype: torch.dtype, device: str, repeats: int) -> dict[str, Any]:
    """Microseconds of each backend, and which share of a large copy's bandwidth it reaches."""
    copy_gb_s = copy_bandwidth_gb_s(device)
    found: dict[str, Any] = {"model": model, "dtype": str(dtype), "copy_gb_s": copy_gb_s}
    for name, values in (
        importlib.import_module(f"{part}.lab.kernel_times").measure(model, dtype, device, repeats).items()
    ):
        shares = {each: values["bytes"] / us / 1e3 / copy_gb_s for each, us in values["us"].items()}
        found[name] = {**values, "share_of_copy_bandwidth": shares}
    return found


def measure_prefill(part: str, device: str) -> dict[str, Any]:
    """TFLOP/s of whole prompts in bfloat16: each CUDA kernel, Triton, and torch's SDPA over contiguous keys."""
    attention = importlib.import_module(f"{part}.worker.kernels.cuda.attention")
    in_triton = importlib.import_module(f"{part}.worker.triton_attention").paged_attention
    num_seqs, length, num_heads, num_kv_heads, size = PREFILL
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    query = torch.randn(num_seqs * length, num_heads, size, **options)
    kv_cache = torch.randn(num_seqs * length // 16, 16, 2, num_kv_heads, size, **options)
    tables = torch.arange(len(kv_cache), dtype=torch.int32, device=device).view(num_seqs, -1)
    starts = torch.arange(num_seqs + 1, dtype=torch.int32, device=device) * length
    lens = torch.full((num_seqs,), length, dtype=torch.int32, device=device)
    arguments = (query, kv_cache, tables, starts, lens, length, size**-0.5)
    output = torch.empty_like(query)
    key, value = (each.unflatten(0, (num_seqs, -1)).transpose(1, 2) for each in kv_cache.flatten(0, 1).unbind(1))
    queries = query.unflatten(0, (num_seqs, -1)).transpose(1, 2)
    runs = {
        "mma": lambda: attention.prefill_mma(*arguments, output),
        "wmma": lambda: attention.prefill_wmma(*arguments, output),
        "triton": lambda: in_triton(*arguments),
        "sdpa": lambda: F.scaled_dot_product_attention(queries, key, value, is_causal=True, enable_gqa=True),
    }
    num_flops = 2 * num_seqs * length**2 * num_heads * size  # half of all pairs
    tflops = {name: num_flops / seconds_per_call(each, device) / 1e12 for name, each in runs.items()}
    return {"tflops": tflops, "share_of_sdpa": {name: each / tflops["sdpa"] for name, each in tflops.items()}}
