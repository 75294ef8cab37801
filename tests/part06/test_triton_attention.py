"""worker/triton_attention.py: correct in Triton's interpreter, and it compiles for GPUs. Neither needs a GPU.

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
from unittest import mock

import pytest
import torch
from torch import Tensor

from part06_chunked_prefill.worker import triton_attention

ROOT = Path(__file__).resolve().parents[2]
WHERE = 'Look at worker/triton_attention.py::_paged_attention_kernel; README "One kernel for decodes and chunks".'
LAUNCH = 'Look at worker/triton_attention.py::paged_attention; README "One kernel for decodes and chunks".'
NOWHERE = 10**6  # a stale table entry: no pool is that large

# of each sequence its new tokens, and its context with these included
DECODES = [(1, 1), (1, 4), (1, 5), (1, 31), (1, 32), (1, 33)]
CHUNKS = [(3, 3), (7, 20), (4, 36)]
MIXED = [(1, 33), (5, 5), (1, 1), (7, 20), (16, 35), (1, 8)]
CASES: dict[str, dict[str, Any]] = {
    "decodes only": dict(seqs=DECODES),
    "chunks only": dict(seqs=CHUNKS),
    "decodes and chunks": dict(),
    "chunks that end inside of blocks": dict(seqs=[(5, 14), (6, 9), (2, 11), (8, 8)]),
    "no new tokens in some sequences": dict(seqs=[(0, 0), (3, 9), (0, 9), (1, 6), (0, 0)]),
    "a bound above the longest chunk": dict(seqs=[(3, 9), (1, 6)], max_query_len=40),
    "1 query head a KV head, several query tiles": dict(group_size=1, seqs=[(1, 7), (70, 83)]),
    "2 query heads a KV head, several query tiles": dict(seqs=[(33, 33), (1, 9), (32, 40), (17, 60)]),
    "4 query heads a KV head, several query tiles": dict(group_size=4, seqs=[(1, 7), (19, 41), (8, 8)]),
    "3 query heads a KV head, several query tiles": dict(group_size=3, seqs=[(1, 7), (23, 41), (10, 10)]),
    "8 query heads a KV head": dict(group_size=8, seqs=[(1, 7), (6, 11)]),
    "71 query heads a KV head": dict(group_size=71, num_kv_heads=1, seqs=[(1, 7), (3, 5)]),
    "one KV head": dict(num_kv_heads=1, seqs=MIXED[:4]),
    "float16": dict(dtype="float16", group_size=4, seqs=[(1, 33), (5, 5), (1, 1), (21, 38)]),
    "float16 decodes": dict(dtype="float16", seqs=DECODES),
    "blocks of 1": dict(block_size=1, seqs=MIXED[:4]),
    "blocks of 8": dict(block_size=8),
    "blocks of 16": dict(block_size=16, seqs=[*MIXED, (2, 16), (2, 17)]),
    "blocks of 64": dict(block_size=64, seqs=[(1, 64), (3, 65)]),
    "head_dim 8": dict(head_dim=8, seqs=MIXED[:4]),
    "head_dim 32": dict(head_dim=32, seqs=MIXED[:4]),
    "head_dim 64": dict(head_dim=64, seqs=MIXED[:4]),
    "head_dim 80": dict(head_dim=80, seqs=MIXED[:4]),
    "another scale": dict(scale=1.5, seqs=MIXED[:4]),
    "large scores": dict(scale=20.0),
    "stale slots hold inf": dict(stale="inf"),
    "keys apart from values": dict(is_interleaved=False, head_dim=24, seqs=MIXED[:4]),
    "a query that is a view": dict(is_query_view=True, seqs=MIXED[:4]),
    "keys past a tile's last query": dict(seqs=[(64, 70)], num_written=6 + triton_attention.MAX_TILE_ROWS[4] // 2),
    "a row left over is not the next tile's": dict(group_size=3, seqs=[(11, 11)], max_query_len=10),
    "a long context": dict(seqs=[(1, 230), (9, 203)], num_kv_heads=1, block_size=16),
}
COMPILED: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B, decode": dict(group_size=4, head_dim=128, block_size=16, dtype="bfloat16", max_query_len=1),
    "Llama-3.1-8B, chunk": dict(group_size=4, head_dim=128, block_size=16, dtype="bfloat16", max_query_len=512),
    "Qwen2.5-7B, chunk": dict(group_size=7, head_dim=128, block_size=32, dtype="float16", max_query_len=512),
    "phi-2, chunk": dict(group_size=1, head_dim=80, block_size=1, dtype="float16", max_query_len=512),
    "tiny, chunk": dict(group_size=2, head_dim=32, block_size=16, dtype="float32", max_query_len=512),
}
ARCHITECTURES = (80, 90)
TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32",
    int: "i32", float: "fp32",
}  # fmt: skip


def compare(
    seqs: list[tuple[int, int]] = MIXED, group_size: int = 2, num_kv_heads: int = 2, head_dim: int = 16,
    block_size: int = 4, dtype: str = "float32", scale: float | None = None, max_query_len: int | None = None,
    num_written: int = 10**6, stale: str = "nan", is_interleaved: bool = True, is_query_view: bool = False,
    device: str = "cpu",
) -> dict[str, Any]:  # fmt: skip
    """Run the kernel on a shuffled pool where slots that belong to no sequence are stale; compare with dense attention.

    num_written: of each sequence only so many tokens are in the cache, and only the queries up to these are compared.
    Returns each sequence's largest difference and the query where it is, and two booleans.
    """
    torch.manual_seed(0)
    scale = head_dim**-0.5 if scale is None else scale
    max_query_len = max_query_len or max(query_len for query_len, _ in seqs)
    counts = [-(-context_len // block_size) for _, context_len in seqs]
    pool = torch.randperm(sum(counts) + 2).tolist()  # two blocks that belong to no sequence
    shape = (2, len(pool), block_size, 2, num_kv_heads, head_dim)  # the engine's tensor, with two layers
    memory = torch.full(shape, float(stale), dtype=getattr(torch, dtype))[1]
    if not is_interleaved:
        memory = memory.transpose(1, 2).contiguous().transpose(1, 2)
    tables = torch.full((len(seqs), max(counts) + 2), NOWHERE, dtype=torch.int32)
    starts = torch.tensor([0] + [query_len for query_len, _ in seqs]).cumsum(0).to(torch.int32)
    query = torch.randn(int(starts[-1]), num_kv_heads * group_size, head_dim).to(memory.dtype)
    expected = torch.empty(query.shape, dtype=torch.float64)
    for seq, (query_len, context_len) in enumerate(seqs):
        if query_len == 0:  # its table stays as it is: nothing may be read for such a sequence
            continue
        blocks = [pool.pop() for _ in range(counts[seq])]
        tables[seq, : counts[seq]] = torch.tensor(blocks)
        keys_and_values = torch.randn(2, context_len, num_kv_heads, head_dim).to(memory.dtype)
        for position in range(min(context_len, num_written)):
            memory[blocks[position // block_size], position % block_size] = keys_and_values[:, position]
        rows = slice(int(starts[seq]), int(starts[seq]) + query_len)
        expected[rows] = dense(query[rows].double(), *keys_and_values.double(), scale)
        expected[rows][max_query_len:] = float("nan")  # if told too few, the launch has no program for the others
    if is_query_view:
        query = torch.cat((query, query), dim=1)[:, : query.shape[1]]
    before, lens = memory.clone(), torch.tensor([context_len for _, context_len in seqs], dtype=torch.int32)
    query, memory, tables, starts, lens = (tensor.to(device) for tensor in (query, memory, tables, starts, lens))
    got = triton_attention.paged_attention(query, memory, tables, starts, lens, max_query_len, scale)
    difference = (got.cpu().double() - expected).abs().masked_fill(got.cpu().isnan() & expected.isnan(), 0)
    split = difference.amax(dim=(1, 2)).split([query_len for query_len, _ in seqs])
    pasts = [context_len - query_len for query_len, context_len in seqs]
    differences = [of_seq[: num_written - past] for of_seq, past in zip(split, pasts, strict=True)]
    return {
        "worst": [(float(d.max()), int(d.argmax())) if len(d) else (0.0, 0) for d in differences],
        "shape": got.shape == query.shape and got.dtype == query.dtype,
        "untouched": torch.equal(before.nan_to_num(0.5), memory.cpu().nan_to_num(0.5)),
    }


def compare_far() -> dict[str, Any]:
    """One block that starts 2³¹ elements into the pool; memory that is not touched costs nothing."""
    torch.manual_seed(0)
    memory = torch.empty(2**31 + 2 * 4 * 16, dtype=torch.float16).as_strided((3, 4, 2, 1, 16), (2**30, 32, 16, 16, 1))
    memory[2] = torch.randn(4, 2, 1, 16)
    query = torch.randn(2, 1, 16).half()
    tables, starts, lens = (torch.tensor(numbers, dtype=torch.int32) for numbers in ([[2]], [0, 2], [4]))
    got = triton_attention.paged_attention(query, memory, tables, starts, lens, 2, 0.25)
    return {
        "difference": float((got.double() - dense(query.double(), *memory[2].double().unbind(1), 0.25)).abs().max())
    }


def dense(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """query: [query_len, num_heads, head_dim]; key, value: [context_len, num_kv_heads, head_dim]."""
    query_len, context_len, group_size = len(query), len(key), query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group_size, dim=1), value.repeat_interleave(group_size, dim=1)
    positions = torch.arange(context_len - query_len, context_len)  # the new tokens are the context's last
    visible = torch.arange(context_len) <= positions[:, None]
    scores = (torch.einsum("qhd,khd->hqk", query, key) * scale).masked_fill(~visible, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), value)


def record_launches(
    max_query_len: int, group_size: int, head_dim: int, block_size: int, dtype: str, num_decodes: int = 0
) -> list[tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]]:
    """What paged_attention launches for one chunk and num_decodes decodes: grid, arguments, sizes. Nothing runs.

    The tensors are meta tensors, without numbers: a call that waits for the device raises.
    """
    with torch.device("meta"):
        memory = torch.empty(3, block_size, 2, 2, head_dim, dtype=getattr(torch, dtype))
        query = memory.new_empty(num_decodes + max_query_len, 2 * group_size, head_dim)
        starts = torch.empty(num_decodes + 2, dtype=torch.int32)
        tables, lens = starts.new_empty(num_decodes + 1, 64), starts[1:]
    launches = []
    kernel = mock.MagicMock()
    kernel.__getitem__ = lambda _, grid: lambda *arguments, **sizes: launches.append((grid, arguments, sizes))
    with mock.patch.object(triton_attention, "_paged_attention_kernel", kernel):
        triton_attention.paged_attention(query, memory, tables, starts, lens, max_query_len, 0.25)
    return launches


def compile_for(architecture: int, **case: Any) -> dict[str, Any]:
    """Compile to machine code what a launch with these shapes would compile. Needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = triton_attention._paged_attention_kernel
    _, arguments, sizes = record_launches(**case)[0]
    types = [TYPES[argument.dtype if isinstance(argument, Tensor) else type(argument)] for argument in arguments]
    signature = dict(zip(kernel.arg_names, types + ["constexpr"] * len(sizes), strict=True))
    # a launch also tells the compiler which pointers and strides are multiples of 16: it loads wide and ahead then
    multiples = {
        (i,): [["tt.divisibility", 16]]
        for i, argument in enumerate(arguments)
        if isinstance(argument, Tensor) or (isinstance(argument, int) and argument % 16 == 0)
    }
    compiled = triton.compile(ASTSource(kernel, signature, sizes, multiples), GPUTarget("cuda", architecture, 32))
    return {"cubin_bytes": len(compiled.asm["cubin"]), "shared_bytes": compiled.metadata.shared}


def run_mode(mode: str, cache: Path) -> dict[str, Any]:
    """This file in a process of its own, in one of main's modes. Returns a result, or an error, for each case."""
    require_triton()
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    if mode != "compile":
        environment["TRITON_INTERPRET"] = "1"
    process = subprocess.run([sys.executable, __file__, mode], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, (
        f"{mode} ended with {process.returncode} (-11: it read outside the pool): {process.stderr[-2000:]} {WHERE}"
    )
    return json.loads(process.stdout)


def require_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (Linux only: pip install triton)")


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_mode("interpret", tmp_path_factory.mktemp("triton"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_mode("compile", tmp_path_factory.mktemp("triton"))


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_equals_dense_attention(name: str, interpreted: dict[str, Any]) -> None:
    check(name, interpreted[name], CASES[name].get("seqs", MIXED), 4e-3 if "float16" in name else 5e-5)


def check(name: str, result: dict[str, Any], seqs: list[tuple[int, int]], tolerance: float) -> None:
    assert "error" not in result, f"{name}: {result['error']}. {WHERE}"
    for seq, ((query_len, context_len), (difference, i)) in enumerate(zip(seqs, result["worst"], strict=True)):
        assert difference <= tolerance, (
            f"{name}, sequence {seq} of {seqs} (new tokens, context): expected dense attention within {tolerance:g}, "
            f"got a difference of {difference:.2e} at its query {i}, which sees the keys 0 to "
            f"{context_len - query_len + i}. NaN means: read from a slot of no sequence, or not written at all. {WHERE}"
        )
    assert result["shape"], f"{name}: expected query's shape and dtype back. {LAUNCH}"
    assert result["untouched"], f"{name}: the kernel wrote to the KV cache. {WHERE}"


def test_offsets_do_not_overflow(interpreted: dict[str, Any]) -> None:
    result = interpreted["far"]
    assert "error" not in result, f"a block 2³¹ elements into the pool: {result['error']}. {WHERE}"
    assert result["difference"] <= 4e-3, (
        f"a block 2³¹ elements into the pool: expected dense attention within 4e-3, got a difference of "
        f"{result['difference']:.2e}. Offsets need 64 bits. {WHERE}"
    )


def test_decodes_and_a_chunk_are_one_launch() -> None:
    require_triton()
    launches = record_launches(
        max_query_len=40, group_size=4, head_dim=16, block_size=4, dtype="float16", num_decodes=5
    )
    assert len(launches) == 1, f"5 decodes and a chunk: expected 1 launch, got {len(launches)}. {LAUNCH}"
    grid, _, sizes = launches[0]
    tile_tokens = sizes["TILE_ROWS"] // sizes["GROUP_SIZE"]
    assert tuple(grid) == (6, 2, -(-40 // tile_tokens)), (
        f"6 sequences, 2 KV heads, up to 40 queries in tiles of {tile_tokens}: expected the grid "
        f"{(6, 2, -(-40 // tile_tokens))}, got {tuple(grid)}. {LAUNCH}"
    )


@pytest.mark.parametrize(("group_size", "rows"), [(1, 16), (4, 16), (8, 16), (17, 32)])
def test_decodes_without_chunks_get_the_smallest_tile(group_size: int, rows: int) -> None:
    require_triton()
    launches = record_launches(
        max_query_len=1, group_size=group_size, head_dim=16, block_size=4, dtype="float16", num_decodes=3
    )
    grid, _, sizes = launches[0]
    assert (tuple(grid), sizes["TILE_ROWS"]) == ((4, 2, 1), rows), (
        f"4 decodes, 2 KV heads, {group_size} query heads each: expected the grid (4, 2, 1) of {rows} rows, got "
        f"{tuple(grid)} of {sizes['TILE_ROWS']}. {LAUNCH}"
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the tests above run the interpreter instead")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("group_size", [1, 3, 4])
def test_on_a_gpu(dtype: str, group_size: int) -> None:
    seqs = [*MIXED, (1, 1000), (200, 200), (130, 777), (0, 0)]
    tolerance = {"float32": 5e-5, "float16": 4e-3, "bfloat16": 3e-2}[dtype]
    result = compare(seqs, group_size, head_dim=128, block_size=16, dtype=dtype, device="cuda")
    check(f"{dtype} on the GPU", result, seqs, tolerance)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", COMPILED)
def test_the_kernel_compiles(name: str, architecture: int, compiled: dict[str, Any]) -> None:
    result = compiled[f"{name} on sm_{architecture}"]
    assert "error" not in result, f"{name}, sm_{architecture}: {result['error']}. {WHERE}"
    assert result["cubin_bytes"] > 0, f"{name}, sm_{architecture}: expected machine code, got none"
    limit = 99 * 1024  # the smallest limit of the GPUs of these families (sm_86, sm_89)
    assert result["shared_bytes"] <= limit, (
        f"{name}, sm_{architecture}: {result['shared_bytes']} bytes of shared memory, expected at most {limit}. {WHERE}"
    )


def test_without_triton_the_module_imports_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # makes `import triton` fail
    spec = importlib.util.spec_from_file_location("triton_attention_alone", triton_attention.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.triton is None
    starts, lens = torch.arange(2, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="triton.*not installed"):
        module.paged_attention(torch.zeros(1, 2, 16), torch.zeros(1, 16, 2, 1, 16), lens[None], starts, lens, 1, 0.25)


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
        # torch.empty is NaN then, so what the kernel does not write is seen; that would fill all of a pool of 4 GB
        torch.set_deterministic_debug_mode("error" if name in CASES else "default")
        try:
            results[name] = function(**arguments)
        except Exception as error:  # one case's failure is that case's result
            results[name] = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
