"""worker/triton_attention.py: right in Triton's interpreter, and it compiles for GPUs. No GPU is needed for either.

Whether a kernel is interpreted is decided when it is decorated, so each mode runs this file in a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from part03_paged_attention.worker import triton_attention

ROOT = Path(__file__).resolve().parents[2]
WHERE = 'Look at worker/triton_attention.py::_paged_decode_kernel; README "Attention through a table".'
CONTEXT_LENS = [1, 15, 16, 17, 33]
NOWHERE = 10**6  # a table entry past the end of a context: no pool is that large
CASES: dict[str, dict[str, Any]] = {
    "1 query head a KV head": dict(group_size=1),
    "2 query heads a KV head": dict(group_size=2),
    "3 query heads a KV head": dict(group_size=3),
    "17 query heads a KV head": dict(group_size=17, num_kv_heads=1, context_lens=[5, 33]),
    "float16": dict(dtype="float16"),
    "blocks of 1": dict(block_size=1, context_lens=[1, 3, 33]),
    "blocks of 4": dict(block_size=4),
    "blocks of 64": dict(block_size=64, context_lens=[1, 63, 64, 65]),
    "head_dim 8": dict(head_dim=8),
    "head_dim 32": dict(head_dim=32),
    "one KV head": dict(num_kv_heads=1),
    "a scale of its own": dict(scale=1.5),
    "large scores": dict(scale=60.0),
    "keys apart from values": dict(is_separate=True),
    "a query that is a view": dict(is_query_view=True),
    "a long context": dict(context_lens=[97], group_size=1),
}
COMPILED: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": dict(group_size=4, head_dim=128, block_size=16, dtype="bf16"),
    "Qwen2.5-7B": dict(group_size=7, head_dim=128, block_size=32, dtype="bf16"),
    "Qwen3-0.6B": dict(group_size=2, head_dim=128, block_size=16, dtype="fp16"),
    "tiny": dict(group_size=2, head_dim=32, block_size=16, dtype="fp32"),
    "small test models": dict(group_size=3, head_dim=8, block_size=4, dtype="fp32"),
}
ARCHITECTURES = (80, 90)
TYPES = {"scale": "fp32", "block_tables_ptr": "*i32", "context_lens_ptr": "*i32"}


def compare(
    group_size: int = 2, num_kv_heads: int = 2, head_dim: int = 16, block_size: int = 16, dtype: str = "float32",
    context_lens: list[int] = CONTEXT_LENS, scale: float | None = None, is_separate: bool = False,
    is_query_view: bool = False, device: str = "cpu",
) -> dict[str, Any]:  # fmt: skip
    """Run the kernel on a shuffled pool, with NaN in every slot that no sequence owns; compare with dense attention."""
    torch.manual_seed(0)
    scale = head_dim**-0.5 if scale is None else scale
    counts = [-(-length // block_size) for length in context_lens]
    pool = torch.randperm(sum(counts) + 2).tolist()  # two blocks that no sequence owns
    memory = torch.full((len(pool), block_size, 2, num_kv_heads, head_dim), float("nan"), dtype=getattr(torch, dtype))
    if is_separate:  # in memory: all keys of a block, then all its values
        memory = memory.transpose(1, 2).contiguous().transpose(1, 2)
    tables = torch.full((len(counts), max(counts) + 2), NOWHERE, dtype=torch.int32)
    query = torch.randn(len(counts), num_kv_heads * group_size, head_dim).to(memory.dtype)
    expected, largest_score = torch.empty(query.shape), 0.0
    for seq, (length, count) in enumerate(zip(context_lens, counts, strict=True)):
        blocks = [pool.pop() for _ in range(count)]
        tables[seq, :count] = torch.tensor(blocks)
        keys_and_values = torch.randn(length, 2, num_kv_heads, head_dim).to(memory.dtype)
        for position in range(length):
            memory[blocks[position // block_size], position % block_size] = keys_and_values[position]
        expected[seq] = dense(query[seq].float(), *keys_and_values.float().unbind(1), scale)
        largest_score = max(
            largest_score, scale * float(query[seq].norm(dim=-1).max() * keys_and_values.norm(dim=-1).max())
        )
    if is_query_view:
        query = torch.cat((query, query), dim=1)[:, : query.shape[1]]
    before, lens = memory.clone(), torch.tensor(context_lens, dtype=torch.int32)
    query, memory, tables, lens = (tensor.to(device) for tensor in (query, memory, tables, lens))
    got, memory = (t.cpu() for t in (triton_attention.paged_decode(query, memory, tables, lens, scale), memory))
    return {
        "difference": [float(difference) for difference in (got.float() - expected).abs().amax(dim=(1, 2))],
        "largest_score": largest_score,
        "shape": list(got.shape) == list(query.shape) and got.dtype == query.dtype,
        "untouched": torch.equal(before.nan_to_num(0.5), memory.nan_to_num(0.5)),
    }


def compare_far() -> dict[str, Any]:
    """One block that starts 2³¹ elements into the pool; memory that is never touched costs nothing."""
    torch.manual_seed(0)
    memory = torch.empty(2**31 + 2 * 4 * 16, dtype=torch.float16).as_strided((3, 4, 2, 1, 16), (2**30, 32, 16, 16, 1))
    memory[2] = torch.randn(4, 2, 1, 16)
    query, tables, lens = torch.randn(1, 1, 16).half(), *(torch.tensor(x, dtype=torch.int32) for x in ([[2]], [4]))
    got = triton_attention.paged_decode(query, memory, tables, lens, 0.25)
    return {
        "difference": float((got[0].float() - dense(query[0].float(), *memory[2].float().unbind(1), 0.25)).abs().max())
    }


def dense(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """query: [num_heads, head_dim]; key, value: [context_len, num_kv_heads, head_dim]."""
    group_size = query.shape[0] // key.shape[1]
    key, value = key.repeat_interleave(group_size, dim=1), value.repeat_interleave(group_size, dim=1)
    weights = (torch.einsum("hd,khd->hk", query, key) * scale).softmax(dim=-1)
    return torch.einsum("hk,khd->hd", weights, value)


def compile_for(architecture: int, group_size: int, head_dim: int, block_size: int, dtype: str) -> dict[str, Any]:
    """Compile down to machine code, as a launch with these shapes would; no GPU is needed."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = triton_attention._paged_decode_kernel
    sizes = dict(
        GROUP_SIZE=group_size, HEAD_DIM=head_dim, BLOCK_SIZE=block_size, TILE_SIZE=triton_attention.TILE_SIZE,
        PADDED_GROUP_SIZE=triton_attention.dot_size(group_size), PADDED_HEAD_DIM=triton_attention.dot_size(head_dim),
    )  # fmt: skip
    signature = {
        name: "constexpr" if name in sizes else TYPES.get(name, "i64" if name.endswith("stride") else f"*{dtype}")
        for name in kernel.arg_names
    }
    compiled = triton.compile(ASTSource(kernel, signature, sizes), target=GPUTarget("cuda", architecture, 32))
    return {"cubin_bytes": len(compiled.asm["cubin"]), "shared_bytes": compiled.metadata.shared}


def run_mode(mode: str, cache: Path) -> dict[str, Any]:
    """This file in a process of its own, in one of main's modes. Returns a result, or an error, for each case."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (Linux only: pip install triton)")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    if mode != "compile":
        environment["TRITON_INTERPRET"] = "1"
    process = subprocess.run([sys.executable, __file__, mode], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, (
        f"{mode} ended with {process.returncode} (-11: it read outside the pool): {process.stderr[-2000:]} {WHERE}"
    )
    return json.loads(process.stdout)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_mode("interpret", tmp_path_factory.mktemp("triton"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_mode("compile", tmp_path_factory.mktemp("triton"))


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_equals_dense_attention(name: str, interpreted: dict[str, Any]) -> None:
    result = interpreted[name]
    assert "error" not in result, f"{name}: {result['error']}. {WHERE}"
    tolerance = 2e-3 if name == "float16" else 1e-5
    tolerance += 2**-24 * result["largest_score"]  # a float32 score is off by so much, and its weight by that share
    for length, difference in zip(CASES[name].get("context_lens", CONTEXT_LENS), result["difference"], strict=True):
        assert difference <= tolerance, (
            f"{name}, context of {length} tokens: expected dense attention within {tolerance:g}, got a difference of "
            f"{difference:.2e}. NaN means: read from a slot that the sequence does not own. {WHERE}"
        )
    assert result["shape"], f"{name}: expected query's shape and dtype back. {WHERE}"
    assert result["untouched"], f"{name}: the kernel wrote to the KV cache. {WHERE}"


def test_offsets_do_not_overflow(interpreted: dict[str, Any]) -> None:
    result = interpreted["far"]
    assert "error" not in result, f"a block 2³¹ elements into the pool: {result['error']}. {WHERE}"
    assert result["difference"] <= 2e-3, (
        f"a block 2³¹ elements into the pool: expected dense attention within 2e-3, got a difference of "
        f"{result['difference']:.2e}. Offsets need 64 bits. {WHERE}"
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the interpreter is used instead, above")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("group_size", [1, 3, 4])
def test_on_a_gpu(dtype: str, group_size: int) -> None:
    result = compare(group_size, head_dim=128, dtype=dtype, context_lens=[*CONTEXT_LENS, 1000], device="cuda")
    tolerance = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}[dtype]
    assert max(result["difference"]) <= tolerance, f"{dtype}: expected within {tolerance:g}, got {result}. {WHERE}"
    assert result["shape"] and result["untouched"], f"{dtype}: {result}. {WHERE}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", COMPILED)
def test_the_kernel_compiles(name: str, architecture: int, compiled: dict[str, Any]) -> None:
    result = compiled[f"{name} on sm_{architecture}"]
    assert "error" not in result, f"{name}, sm_{architecture}: {result['error']}. {WHERE}"
    assert result["cubin_bytes"] > 0, f"{name}, sm_{architecture}: no machine code came out"
    limit = 99 * 1024  # the smallest limit of a GPU of these families (sm_86, sm_89)
    assert result["shared_bytes"] <= limit, (
        f"{name}, sm_{architecture}: {result['shared_bytes']} bytes of shared memory, expected at most {limit}. {WHERE}"
    )


def test_without_triton_the_module_imports_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # makes `import triton` fail
    spec = importlib.util.spec_from_file_location("triton_attention_alone", triton_attention.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.triton is None
    tables, lens = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="triton.*not installed"):
        module.paged_decode(torch.zeros(1, 2, 16), torch.zeros(1, 16, 2, 1, 16), tables, lens, 0.25)


def in_a_process(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """In a fork of this one, as it may read outside the pool."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return pool.submit(function).result()


def main(mode: str) -> None:
    """Print each case's result as JSON. Modes: `interpret`, in Triton's interpreter, and `compile`, without it."""
    results: dict[str, Any] = {}
    if mode == "interpret":
        from tests.triton_interpreter import patch_language_once

        patch_language_once()
        jobs = {"far": (in_a_process, {"function": compare_far})}
        jobs |= {name: (compare, case) for name, case in CASES.items()}
    else:
        jobs = {
            f"{name} on sm_{architecture}": (compile_for, {"architecture": architecture, **case})
            for name, case in COMPILED.items()
            for architecture in ARCHITECTURES
        }
    for name, (function, arguments) in jobs.items():
        try:
            results[name] = function(**arguments)
        except Exception as error:  # one case's failure is that case's result
            results[name] = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
