"""worker/grouped_linear.py: the products of groups of rows, on the CPU, in Triton's interpreter, and compiled for GPUs.

Whether a Triton kernel is interpreted is decided when it is decorated, so each mode runs this file in a process of its
own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from part11_expert_parallelism.worker import triton_grouped_linear
from part11_expert_parallelism.worker.cpu_grouped_linear import MAX_KERNEL_ROWS
from part11_expert_parallelism.worker.grouped_linear import grouped_linear

ROOT = Path(__file__).resolve().parents[2]
LOOK = 'Look at worker/grouped_linear.py and cpu_grouped_linear.py; README "One product for each expert".'
LOOK_TRITON = 'Look at worker/triton_grouped_linear.py; README "One product for each expert".'
MANY = MAX_KERNEL_ROWS + 3
CASES: dict[str, tuple[list[int], int, int]] = {  # rows of each group, outputs, inputs
    "one group": ([3], 8, 16),
    "few rows each": ([1, 2, 1, MAX_KERNEL_ROWS], 12, 20),
    "many rows each": ([MANY, 40, MANY], 24, 33),
    "few and many": ([1, MANY, 0, 2, 70, 0], 24, 32),
    "empty groups at both ends": ([0, 0, 5, 0], 8, 8),
    "no rows at all": ([0, 0, 0], 8, 8),
    "all rows in one of many groups": ([0] * 7 + [66] + [0] * 8, 16, 16),
    "sizes that fill no tile": ([1, 17, 33], 65, 31),
    "128 groups": ([number % 3 for number in range(128)], 16, 16),
}


def make_case(name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, weight, counts, and the products in float64."""
    counts, num_outputs, num_inputs = CASES[name]
    torch.manual_seed(len(name))
    rows = torch.randn(sum(counts), num_inputs).to(dtype)
    weight = torch.randn(len(counts), num_outputs, num_inputs).to(dtype)
    parts = [part.double() @ matrix.double().T for part, matrix in zip(rows.split(counts), weight, strict=True)]
    return rows, weight, torch.tensor(counts), torch.cat(parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_on_the_cpu(name: str, dtype: torch.dtype) -> None:
    rows, weight, counts, expected = make_case(name, dtype)
    got = grouped_linear(rows, weight, counts)
    assert got.dtype == dtype and got.shape == expected.shape, f"{name}: {got.dtype}, {list(got.shape)}. {LOOK}"
    difference = (got.double() - expected).abs().max().item() if len(expected) else 0.0
    assert difference <= (1e-4 if dtype == torch.float32 else 0.15), f"{name}: off by {difference:.2e}. {LOOK}"


def interpret() -> dict[str, Any]:
    """The largest difference in each case, and dtype."""
    from tests.triton_interpreter import patch_language_once

    patch_language_once()
    found = {}
    for name in CASES:
        for dtype in ("float32", "float16"):
            rows, weight, counts, expected = make_case(name, getattr(torch, dtype))
            got = triton_grouped_linear.grouped_linear(rows, weight, counts)
            difference = (got.double() - expected).abs().max().item() if len(expected) else 0.0
            found[f"{name}, {dtype}"] = [difference, list(got.shape) == list(expected.shape)]
    return found


def compile_kernel() -> dict[str, int]:
    """Bytes of machine code for each GPU, dtype and number of rows."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64"}
    kernel, found = triton_grouped_linear._grouped_linear_kernel, {}
    for architecture in (80, 90):
        for dtype in (torch.float32, torch.bfloat16):
            for num_rows in (16, 4_096):
                arguments, sizes = record_launch(num_rows, dtype)
                names = [types[each.dtype] if isinstance(each, Tensor) else "i32" for each in arguments]
                signature = dict(zip(kernel.arg_names, names + ["constexpr"] * len(sizes), strict=True))
                compiled = triton.compile(ASTSource(kernel, signature, sizes), GPUTarget("cuda", architecture, 32))
                found[f"sm_{architecture}, {dtype}, {num_rows} rows"] = len(compiled.asm["cubin"])
    return found


def record_launch(num_rows: int, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What is launched for 16 groups. The tensors have no numbers: a call that waits for the device raises."""
    launches = []
    kernel = mock.MagicMock()
    kernel.__getitem__ = lambda _, grid: lambda *arguments, **sizes: launches.append((arguments, sizes))
    with torch.device("meta"):
        rows, weight = torch.empty(num_rows, 512, dtype=dtype), torch.empty(16, 1_024, 512, dtype=dtype)
        counts = torch.empty(16, dtype=torch.int64)
    with mock.patch.object(triton_grouped_linear, "_grouped_linear_kernel", kernel):
        triton_grouped_linear.grouped_linear(rows, weight, counts)
    return launches[0]


def run_mode(mode: str, cache: Path) -> dict[str, Any]:
    """This file in a process of its own."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (Linux only: pip install triton)")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    if mode == "interpret":
        environment["TRITON_INTERPRET"] = "1"
    process = subprocess.run([sys.executable, __file__, mode], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, f"{mode} ended with {process.returncode}: {process.stderr[-2000:]} {LOOK_TRITON}"
    return dict(json.loads(process.stdout))


def test_in_tritons_interpreter(tmp_path: Path) -> None:
    for name, (difference, has_shape) in run_mode("interpret", tmp_path).items():
        limit = 1e-4 if "float32" in name else 0.1
        assert has_shape and difference <= limit, f"{name}: off by {difference:.2e}. {LOOK_TRITON}"


def test_it_compiles_for_gpus(tmp_path: Path) -> None:
    found = run_mode("compile", tmp_path)
    assert len(found) == 8 and min(found.values()) > 1_000, f"bytes of machine code: {found}. {LOOK_TRITON}"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the tests above run the interpreter instead")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    rows, weight, counts, expected = make_case(name, dtype)
    got = grouped_linear(rows.cuda(), weight.cuda(), counts.cuda()).cpu()
    assert got.dtype == dtype and got.shape == expected.shape, f"{name}: {got.dtype}, {list(got.shape)}. {LOOK_TRITON}"
    difference = (got.double() - expected).abs().max().item() if len(expected) else 0.0
    assert difference <= (1e-4 if dtype == torch.float32 else 0.15), f"{name}: off by {difference:.2e}. {LOOK_TRITON}"


if __name__ == "__main__":
    print(json.dumps(interpret() if sys.argv[1] == "interpret" else compile_kernel()))


def test_without_triton_it_says_what_is_missing() -> None:
    """As on macOS: the module imports, and only a call fails."""
    code = """
import sys
sys.modules["triton"] = None  # makes `import triton` fail
import torch
from part11_expert_parallelism.worker.triton_grouped_linear import grouped_linear
try:
    grouped_linear(torch.ones(1, 2), torch.ones(1, 2, 2), torch.tensor([1]))
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "needs the package triton" in done.stdout, f"{done.stderr[-500:]}. See worker/triton_grouped_linear.py."
