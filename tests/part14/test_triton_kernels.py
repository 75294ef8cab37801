"""worker/quantization/triton_kernels.py, and triton_attention.py with a KV cache of codes: correct in Triton's
interpreter, and they compile for GPUs. Neither needs a GPU.

Whether a kernel is interpreted is decided when it is decorated, so each mode runs this file in a process of its own.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from part14_quantization.worker import triton_attention
from part14_quantization.worker.attention import reference_attention
from part14_quantization.worker.quantization import triton_kernels
from part14_quantization.worker.quantization.scheme import Quantized, Scheme
from part14_quantization.worker.quantization.weight import QuantizedWeight

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = "See worker/quantization/triton_kernels.py::product"
KERNEL = "See worker/quantization/triton_kernels.py::_product_kernel"
ATTENTION = "See worker/triton_attention.py::to_numbers and _paged_attention_kernel"
ROUNDING = {"float32": 2**-24, "float16": 2**-11, "bfloat16": 2**-8}  # half a step between numbers near 1
TOLERANCE = 1e-4  # of a product's sum of absolute values: what the order of additions may change

KINDS = {
    "int8": dict(bits=8),
    "int8 with zero points": dict(bits=8, is_symmetric=False),
    "int4": dict(bits=4),
    "int4 with zero points": dict(bits=4, is_symmetric=False),
    "fp8": dict(kind="fp8", bits=8),
}
GROUPS: dict[str, dict[str, Any]] = {  # with a row of several groups, or of several tiles that end inside of one
    "groups of 16": dict(group_size=16, num_columns=48),
    "groups of 32": dict(group_size=32, num_columns=96),
    "groups of 64": dict(group_size=64, num_columns=192),
    "groups of 128": dict(group_size=128, num_columns=256),
    "groups of 48": dict(group_size=48, num_columns=96),
    "a scale for each row": dict(group_size=None, num_columns=150),
}
INT4 = dict(bits=4, is_symmetric=False, group_size=32, num_columns=64)
CASES: dict[str, dict[str, Any]] = {
    **{f"{kind}, {groups}": {**KINDS[kind], **GROUPS[groups]} for kind in KINDS for groups in GROUPS},
    "2 bits": {**INT4, "bits": 2},
    "3 bits": {**INT4, "bits": 3},
    "1 row": dict(**INT4, num_rows=1),
    "1 row, 1 output": dict(**INT4, num_rows=1, out_features=1),
    "16 rows, 32 outputs": dict(**INT4, num_rows=16, out_features=32),
    "17 rows, 33 outputs": dict(**INT4, num_rows=17, out_features=33),
    "64 rows, 128 outputs": dict(**INT4, num_rows=64, out_features=128),
    "65 rows, 65 outputs": dict(**INT4, num_rows=65, out_features=65),
    "130 rows": dict(**INT4, num_rows=130),
    "a row as short as can be": dict(bits=4, group_size=2, num_columns=2),
    "an expert's matrix": dict(**INT4, num_experts=3),
    "an expert's matrix, fp8": dict(**KINDS["fp8"], **GROUPS["groups of 32"], num_experts=3),
    "rows that are a view": dict(**INT4, is_view=True),
}
DTYPES = ("float32", "float16")
COMPILED: dict[str, dict[str, Any]] = {
    "int4, groups of 128, 1 row": dict(bits=4, group_size=128, num_columns=4_096, dtype="bfloat16", num_rows=1),
    "int4 with zero points, 512 rows": dict(
        bits=4, is_symmetric=False, group_size=128, num_columns=4_096, dtype="bfloat16", num_rows=512
    ),
    "int4 with zero points, 512 rows, float32": dict(
        bits=4, is_symmetric=False, group_size=32, num_columns=4_096, dtype="float32", num_rows=512
    ),
    "int4, groups of 16": dict(bits=4, group_size=16, num_columns=4_096, dtype="float16", num_rows=17),
    "int8, a scale for each row, 1 row": dict(bits=8, num_columns=1_100, dtype="float16", num_rows=1),
    "int8, 512 rows": dict(bits=8, group_size=16, num_columns=4_096, dtype="float16", num_rows=512),
    "fp8, 512 rows": dict(kind="fp8", bits=8, num_columns=4_096, dtype="bfloat16", num_rows=512),
}
KV_DTYPES = {"int8": torch.int8, "fp8": torch.uint8}
# of each sequence its new tokens, and its context with these included
SEQS = [(1, 33), (5, 5), (1, 1), (7, 20)]
ARCHITECTURES = (80, 90)
MAX_SHARED_BYTES = 99 * 1024  # the smallest limit of the GPUs of these families (sm_86, sm_89)
TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int8: "*i8",
    torch.uint8: "*u8", int: "i32", float: "fp32", type(None): "constexpr",
}  # fmt: skip


def make_weight(
    scheme: Scheme, out_features: int, num_columns: int, num_experts: int | None = None, codes: Tensor | None = None,
    device: str = "cpu",
) -> QuantizedWeight:  # fmt: skip
    """A matrix of all sorts of codes, scales and zero points, or one of several experts'."""
    shape = (out_features, num_columns) if num_experts is None else (num_experts, out_features, num_columns)
    groups_shape = (*shape[:-1], scheme.num_groups(num_columns))
    if codes is None:
        if scheme.kind == "fp8":  # 127 and -1 are NaN
            codes = torch.randint(0, 127, shape).to(torch.int8) + torch.randint(0, 2, shape).to(torch.int8) * -128
        else:
            codes = torch.randint(scheme.min_code, scheme.max_code + 1, shape).to(torch.int8)
    scale = torch.ldexp(torch.rand(groups_shape) + 1, torch.randint(-9, -4, groups_shape))
    zero = torch.randint(scheme.min_code, scheme.max_code + 1, groups_shape).to(torch.int8)
    weight = QuantizedWeight(shape, mock.Mock(scheme=scheme, has_order=False))
    weight.store(Quantized(codes, scale, None if scheme.is_symmetric else zero), (slice(None),), "")
    weight = weight.to(device)
    return weight if num_experts is None else weight.expert(num_experts - 2)


def compare(
    num_columns: int, dtype: str, num_rows: int = 5, out_features: int = 37, num_experts: int | None = None,
    is_view: bool = False, device: str = "cpu", **scheme: Any,
) -> dict[str, Any]:  # fmt: skip
    """The largest difference to the product in float64, in units of what rounding may change, and where it is."""
    torch.manual_seed(0)
    weight = make_weight(Scheme(**scheme), out_features, num_columns, num_experts, device=device)
    rows = torch.randn(num_rows, num_columns + 1).to(getattr(torch, dtype))
    rows = rows[:, 1:] if is_view else rows[:, 1:].contiguous()
    matrix = weight.dequantized().to(rows.dtype).cpu().double()
    expected = rows.double() @ matrix.T
    got = triton_kernels.product(rows.to(device), weight).cpu()
    if got.shape != expected.shape or got.dtype != rows.dtype:
        return {"error": f"expected {rows.dtype} {list(expected.shape)}, got {got.dtype} {list(got.shape)}"}
    limit = TOLERANCE * (rows.double().abs() @ matrix.abs().T) + ROUNDING[dtype] * expected.abs()
    ratio = ((got.double() - expected).abs() / limit).nan_to_num(torch.inf)
    row, output = divmod(int(ratio.argmax()), out_features)
    return {
        "ratio": float(ratio.max()),
        "place": f"row {row}, output {output}",
        "expected": float(expected[row, output]),
        "got": float(got[row, output]),
    }


def decode_all(kind: str, dtype: str, device: str = "cpu") -> dict[str, Any]:
    """What each code becomes: the products with rows that have a single 1. The first code that's wrong."""
    torch.manual_seed(0)
    codes = torch.arange(256).to(torch.int8).view(8, 32)
    if "int4" in kind:
        codes = torch.stack((codes & 15, codes >> 4 & 15), dim=-1).flatten(-2) - 8  # all pairs
    elif kind == "fp8":
        codes[codes & 127 == 127] = 0  # NaN
    weight = make_weight(Scheme(**KINDS[kind], group_size=16), 8, codes.shape[1], codes=codes, device=device)
    rows = torch.eye(codes.shape[1]).to(getattr(torch, dtype))
    expected = weight.dequantized().to(rows.dtype).cpu()
    got = triton_kernels.product(rows.to(device), weight).cpu().T
    wrong = (got != expected).nonzero().tolist()
    if not wrong:
        return {}
    row, column = wrong[0]
    zero = 0 if weight.zero is None else int(weight.zero[row, column // 16])
    return {
        "error": f"{len(wrong)} of {codes.numel()} codes are decoded to another number, for instance "
        f"{codes[row, column]}, with the zero point {zero} and the scale {weight.scale[row, column // 16]:g}: expected "
        f"{expected[row, column]:g}, got {got[row, column]:g}"
    }  # fmt: skip


class Guarded:
    """A kernel whose tensors end where memory ends that may be touched: an access past an end ends the process."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **sizes: Any) -> None:
            guarded = [at_the_end(each) if isinstance(each, Tensor) else each for each in arguments]
            self.kernel[grid](*guarded, **sizes)
            for original, copy in zip(arguments, guarded, strict=True):
                if isinstance(original, Tensor):
                    original.copy_(copy)

        return launch


def at_the_end(tensor: Tensor) -> Tensor:
    """A copy, with the same strides, before a page that can't be read or written."""
    length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    used_bytes = length * tensor.element_size()
    num_bytes = -(-used_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, num_bytes + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + num_bytes), mmap.PAGESIZE, 0) == 0
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=length, offset=num_bytes - used_bytes)
    return copy.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


class LastProgram:
    """A kernel of which only the last program runs."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        from triton.runtime import interpreter

        def set_grid_idx(*_: int) -> None:
            interpreter.interpreter_builder.grid_idx = (grid[0] - 1, grid[1] - 1, 0)

        def launch(*arguments: Any, **sizes: Any) -> None:
            with mock.patch.object(interpreter.interpreter_builder, "set_grid_idx", set_grid_idx):
                self.kernel[1, 1](*arguments, **sizes)

        return launch


def compare_far(which: str) -> dict[str, Any]:
    """Rows or codes that begin 2³¹ elements into a tensor. Memory that is not touched costs nothing."""
    torch.manual_seed(0)
    num_columns, num_far = 64, 2**31 // 64
    num_rows, out_features = (num_far + 3, 2) if which == "rows" else (2, num_far + 3)
    weight = make_weight(Scheme(), 1, num_columns)
    weight.codes.data = torch.empty(out_features, num_columns, dtype=torch.int8)
    weight.scale.data = torch.empty(out_features, 1)
    weight.codes[-2:], weight.scale[-2:] = torch.randint(-128, 128, (2, num_columns)), 0.01
    rows = torch.empty(num_rows, num_columns, dtype=torch.float16)
    rows[-2:] = torch.randn(2, num_columns)
    with mock.patch.object(triton_kernels, "_product_kernel", LastProgram(triton_kernels._product_kernel)):
        got = triton_kernels.product(rows, weight)[-2:, -2:]
    expected = rows[-2:].double() @ (weight.codes[-2:].double() * 0.01).T
    return {"difference": float((got.double() - expected).abs().max())}


def compare_attention(kv_dtype: str, dtype: str, device: str = "cpu") -> dict[str, Any]:
    """The largest difference to the reference in float64, as a part of the largest code."""
    torch.manual_seed(0)
    block_size, num_kv_heads, head_dim = 4, 2, 16
    counts = [-(-context_len // block_size) for _, context_len in SEQS]
    pool = make_codes(kv_dtype, (sum(counts) + 2, block_size, 2, num_kv_heads, head_dim))
    blocks = torch.randperm(len(pool)).tolist()
    tables = torch.full((len(SEQS), max(counts)), 10**6, dtype=torch.int32)  # no pool is that large
    for seq, count in enumerate(counts):
        tables[seq, :count] = torch.tensor([blocks.pop() for _ in range(count)])
    starts = torch.tensor([0] + [query_len for query_len, _ in SEQS]).cumsum(0).to(torch.int32)
    lens = torch.tensor([context_len for _, context_len in SEQS], dtype=torch.int32)
    query = torch.randn(int(starts[-1]), 2 * num_kv_heads, head_dim).to(getattr(torch, dtype))
    arguments, scale = (pool, tables, starts, lens), 1 / 256
    expected = reference_attention(query.double(), *arguments, 7, scale)
    got = triton_attention.paged_attention(
        query.to(device), *(each.to(device) for each in arguments), max_query_len=7, scale=scale
    ).cpu()
    if got.shape != query.shape or got.dtype != query.dtype:
        return {"error": f"expected {query.dtype} {list(query.shape)}, got {got.dtype} {list(got.shape)}"}
    largest = 127 if kv_dtype == "int8" else 448
    return {"difference": float((got.double() - expected).abs().max()) / largest}


def make_codes(kv_dtype: str, shape: tuple[int, ...]) -> Tensor:
    if kv_dtype == "int8":
        return torch.randint(-127, 128, shape).to(torch.int8)
    return (torch.randint(0, 127, shape) + 128 * torch.randint(0, 2, shape)).to(torch.uint8)  # without NaN


def decode_all_values(kv_dtype: str, dtype: str, device: str = "cpu") -> dict[str, Any]:
    """What each code becomes as a value: with a context of one token, the output is its value."""
    codes = torch.arange(256).to(KV_DTYPES[kv_dtype])
    if kv_dtype == "fp8":
        codes[codes & 127 == 127] = 0  # NaN
    cache = torch.zeros(1, 1, 2, 1, 256, dtype=codes.dtype)
    cache[0, 0, 1, 0] = codes
    query = torch.ones(1, 1, 256).to(getattr(torch, dtype))
    arguments = (cache, *(torch.tensor(each, dtype=torch.int32) for each in ([[0]], [0, 1], [1])))
    expected = reference_attention(query, *arguments, 1, 1.0).flatten()
    got = triton_attention.paged_attention(
        query.to(device), *(each.to(device) for each in arguments), max_query_len=1, scale=1.0
    ).cpu()
    wrong = (got.flatten() != expected).nonzero().flatten().tolist()
    if not wrong:
        return {}
    first = wrong[0]
    what = f"code {codes[first]}: expected {expected[first]:g}, got {got.flatten()[first]:g}"
    return {"error": f"{len(wrong)} of 256 values are decoded to another number, for instance {what}"}


class Launch(NamedTuple):
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    sizes: dict[str, Any]


def record_launches(module: Any, name: str, call: Callable[[], object]) -> list[Launch]:
    """What a call launches. Nothing runs."""
    launches = list[Launch]()
    kernel = mock.MagicMock()
    kernel.__getitem__ = lambda _, grid: lambda *arguments, **sizes: launches.append(Launch(grid, arguments, sizes))
    with mock.patch.object(module, name, kernel):
        call()
    return launches


def record_products(num_rows: int, num_columns: int, dtype: str, **scheme: Any) -> list[Launch]:
    """What product() launches for 4,096 outputs. The tensors are without numbers: a call that waits for the device
    raises."""
    layout = mock.Mock(scheme=Scheme(**scheme), has_order=False)
    with torch.device("meta"):
        weight = QuantizedWeight((4_096, num_columns), layout)
        rows = torch.empty(num_rows, num_columns, dtype=getattr(torch, dtype))
    return record_launches(triton_kernels, "_product_kernel", lambda: triton_kernels.product(rows, weight))


def record_attention(kv_dtype: str, dtype: str, max_query_len: int) -> list[Launch]:
    with torch.device("meta"):
        cache = torch.empty(3, 16, 2, 8, 128, dtype=KV_DTYPES[kv_dtype])
        query = torch.empty(max_query_len, 32, 128, dtype=getattr(torch, dtype))
        tables, starts, lens = (torch.empty(shape, dtype=torch.int32) for shape in ((1, 64), (2,), (1,)))
    return record_launches(
        triton_attention, "_paged_attention_kernel",
        lambda: triton_attention.paged_attention(query, cache, tables, starts, lens, max_query_len, 0.25),
    )  # fmt: skip


def compile_for(architecture: int, kernel: Any, launch: Launch) -> dict[str, Any]:
    """Compile to machine code what a launch would compile. Needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    _, arguments, sizes = launch
    types = [TYPES[each.dtype if isinstance(each, Tensor) else type(each)] for each in arguments]
    signature = dict(zip(kernel.arg_names, types + ["constexpr"] * len(sizes), strict=True))
    constants = {kernel.arg_names[i]: None for i, each in enumerate(arguments) if each is None} | sizes
    # a launch also tells the compiler which pointers and strides are multiples of 16: it loads wide and ahead then
    multiples = {
        (i,): [["tt.divisibility", 16]]
        for i, each in enumerate(arguments)
        if isinstance(each, Tensor) or (isinstance(each, int) and each % 16 == 0)
    }
    compiled = triton.compile(ASTSource(kernel, signature, constants, multiples), GPUTarget("cuda", architecture, 32))
    ptx = compiled.asm["ptx"]
    return {
        "cubin_bytes": len(compiled.asm["cubin"]),
        "shared_bytes": compiled.metadata.shared,
        "has_tf32": "tf32" in ptx,
        "flushed": sorted({word for word in ptx.split() if word.startswith(("mul.", "fma.")) and ".ftz" in word}),
    }


def compile_product(architecture: int, **case: Any) -> dict[str, Any]:
    return compile_for(architecture, triton_kernels._product_kernel, record_products(**case)[0])


def compile_attention(architecture: int, **case: Any) -> dict[str, Any]:
    return compile_for(architecture, triton_attention._paged_attention_kernel, record_attention(**case)[0])


def interpreter_jobs() -> dict[str, tuple[Callable[..., dict[str, Any]], dict[str, Any]]]:
    jobs: dict[str, tuple[Callable[..., dict[str, Any]], dict[str, Any]]] = {}
    for dtype in DTYPES:
        jobs |= {f"{name}, {dtype}": (compare, {"dtype": dtype, **case}) for name, case in CASES.items()}
        jobs |= {f"each code, {kind}, {dtype}": (decode_all, {"kind": kind, "dtype": dtype}) for kind in KINDS}
        for kv_dtype in KV_DTYPES:
            arguments = {"kv_dtype": kv_dtype, "dtype": dtype}
            jobs[f"attention, {kv_dtype}, {dtype}"] = compare_attention, arguments
            jobs[f"each value, {kv_dtype}, {dtype}"] = decode_all_values, arguments
    return jobs | {f"far {which}": (compare_far, {"which": which}) for which in ("rows", "codes")}


def compile_jobs() -> dict[str, tuple[Callable[..., dict[str, Any]], dict[str, Any]]]:
    cases: dict[str, tuple[Callable[..., dict[str, Any]], dict[str, Any]]] = {}
    cases |= {name: (compile_product, case) for name, case in COMPILED.items()}
    for kv_dtype in KV_DTYPES:
        for dtype, length in (("bfloat16", 1), ("bfloat16", 512), ("float32", 512)):
            case = {"kv_dtype": kv_dtype, "dtype": dtype, "max_query_len": length}
            cases[f"attention, {kv_dtype}, {dtype}, {length} tokens"] = compile_attention, case
    return {
        f"{name} on sm_{architecture}": (function, {"architecture": architecture, **case})
        for name, (function, case) in cases.items()
        for architecture in ARCHITECTURES
    }


def run_mode(mode: str, cache: Path) -> dict[str, Any]:
    """This file in a process of its own, in one of main's modes. Returns a result, or an error, for each case."""
    require_triton()
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    if mode == "interpret":
        environment["TRITON_INTERPRET"] = "1"
    process = subprocess.run([sys.executable, __file__, mode], env=environment, capture_output=True, text=True)
    if process.returncode < 0:
        pytest.fail(
            f"a kernel accessed memory outside of its tensors (signal {-process.returncode}), in the case "
            f"{process.stderr.strip().splitlines()[-1]!r}: is a mask missing, or an offset wrong? {KERNEL}"
        )
    assert process.returncode == 0, f"{mode} ended with {process.returncode}: {process.stderr[-2000:]}. {KERNEL}"
    return dict(json.loads(process.stdout))


def require_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (Linux only: pip install triton)")


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_mode("interpret", tmp_path_factory.mktemp("triton"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_mode("compile", tmp_path_factory.mktemp("triton"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_products(name: str, dtype: str, interpreted: dict[str, Any]) -> None:
    check_product(f"{name}, {dtype}", interpreted[f"{name}, {dtype}"])


def check_product(name: str, result: dict[str, Any]) -> None:
    assert "error" not in result, f"{name}: {result['error']}. {LAUNCH}"
    assert result["ratio"] <= 1, (
        f"{name}, {result['place']}: expected {result['expected']:g}, as with the numbers that the codes stand for, "
        f"got {result['got']:g}, which is {result['ratio']:.1f} times as far off as rounding explains. NaN means: not "
        f"written. {KERNEL}"
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_each_code_becomes_its_number(kind: str, dtype: str, interpreted: dict[str, Any]) -> None:
    name = f"each code, {kind}, {dtype}"
    assert not interpreted[name], (
        f"{name}: {interpreted[name]['error']}. {KERNEL} and to_numbers in triton_attention.py"
    )


@pytest.mark.parametrize("which", ["rows", "codes"])
def test_offsets_do_not_overflow(which: str, interpreted: dict[str, Any]) -> None:
    result = interpreted[f"far {which}"]
    assert "error" not in result, f"{which} 2³¹ elements into a tensor: {result['error']}. {KERNEL}"
    assert result["difference"] <= 0.02, (
        f"{which} 2³¹ elements into a tensor: expected the product within 0.02, got a difference of "
        f"{result['difference']:g}. Offsets need 64 bits. {KERNEL}"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows(kind: str) -> None:
    require_triton()
    weight = make_weight(Scheme(**KINDS[kind]), 5, 16)
    rows, outputs = torch.empty(0, 16, dtype=torch.float16), list[Tensor]()
    launches = record_launches(
        triton_kernels, "_product_kernel", lambda: outputs.append(triton_kernels.product(rows, weight))
    )
    found = len(launches), outputs[0].dtype, list(outputs[0].shape)
    assert found == (0, torch.float16, [0, 5]), (
        f"no rows: expected 0 launches and torch.float16 [0, 5], got {found[0]}, {found[1]} {found[2]}. {LAUNCH}"
    )


@pytest.mark.parametrize(
    ("num_rows", "tile_rows", "tile_outputs"), [(1, 16, 32), (16, 16, 32), (17, 32, 32), (64, 64, 64), (300, 64, 64)]
)
def test_few_rows_get_small_tiles(num_rows: int, tile_rows: int, tile_outputs: int) -> None:
    require_triton()
    launches = record_products(num_rows, 256, "bfloat16", bits=4, group_size=128)
    found = [(tuple(grid), sizes["TILE_ROWS"], sizes["TILE_OUTPUTS"]) for grid, _, sizes in launches]
    expected = [((-(-num_rows // tile_rows), 4_096 // tile_outputs), tile_rows, tile_outputs)]
    assert found == expected, (
        f"{num_rows} rows, 4,096 outputs: expected one launch with (grid, TILE_ROWS, TILE_OUTPUTS) {expected[0]}, got "
        f"{found}. {LAUNCH}"
    )


def test_which_schemes_are_supported() -> None:
    schemes = [Scheme(bits=bits) for bits in (2, 3, 4, 8)] + [Scheme("fp8"), Scheme("nf4", bits=4, group_size=64)]
    found = {f"{scheme.kind} with {scheme.bits} bits": triton_kernels.supports(scheme) for scheme in schemes}
    expected = {name: not name.startswith("nf4") for name in found}
    assert found == expected, f"expected {expected}, got {found}. See triton_kernels.py::supports"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_attention_with_a_cache_of_codes(kv_dtype: str, dtype: str, interpreted: dict[str, Any]) -> None:
    name = f"attention, {kv_dtype}, {dtype}"
    check_attention(name, interpreted[name], 1e-3 if dtype == "float16" else 1e-5)
    values = interpreted[f"each value, {kv_dtype}, {dtype}"]
    assert not values, f"{name}: {values['error']}. {ATTENTION}"


def check_attention(name: str, result: dict[str, Any], tolerance: float) -> None:
    assert "error" not in result, f"{name}: {result['error']}. {ATTENTION}"
    assert result["difference"] <= tolerance, (
        f"{name}: expected attention over the codes' numbers within {tolerance:g} of the largest code, got a "
        f"difference of {result['difference']:.2e}. {ATTENTION}"
    )


@pytest.mark.parametrize("name", compile_jobs())
def test_the_kernels_compile(name: str, compiled: dict[str, Any]) -> None:
    result, look = compiled[name], ATTENTION if name.startswith("attention") else LAUNCH
    assert "error" not in result, f"{name}: {result['error']}. {look}"
    assert result["cubin_bytes"] > 1_000, f"{name}: {result['cubin_bytes']} bytes of machine code. {look}"
    assert result["shared_bytes"] <= MAX_SHARED_BYTES, (
        f"{name}: {result['shared_bytes']} bytes of shared memory, expected at most {MAX_SHARED_BYTES}. {look}"
    )
    assert not result["has_tf32"], f"{name}: float32 numbers are rounded to TF32, which has 10 bits. {look}"
    assert not result["flushed"], (
        f"{name}: {result['flushed']} makes 0 of small numbers, which e4m3's smallest are before they are multiplied "
        f"with 2^120. See triton_attention.py::to_numbers"
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the tests above run the interpreter instead")
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("kind", KINDS)
def test_products_on_a_gpu(kind: str, dtype: str) -> None:
    cases = {name: case for name, case in CASES.items() if name.startswith(f"{kind}, ")}
    if kind == "int4":
        cases |= {name: case for name, case in CASES.items() if not name.startswith(tuple(KINDS))}
    cases["300 rows"] = dict(**KINDS[kind], group_size=128, num_columns=1_024, num_rows=300, out_features=1_000)
    for name, case in cases.items():
        check_product(f"{name}, {dtype}, on the GPU", compare(dtype=dtype, device="cuda", **case))
    wrong = decode_all(kind, dtype, "cuda")
    assert not wrong, f"{kind}, {dtype}, on the GPU: {wrong['error']}. {KERNEL} and to_numbers in triton_attention.py"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the tests above run the interpreter instead")
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_attention_on_a_gpu(kv_dtype: str, dtype: str) -> None:
    tolerance = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2}[dtype]
    check_attention(f"{kv_dtype}, {dtype}, on the GPU", compare_attention(kv_dtype, dtype, "cuda"), tolerance)
    values = decode_all_values(kv_dtype, dtype, "cuda")
    assert not values, f"{kv_dtype}, {dtype}, on the GPU: {values['error']}. {ATTENTION}"


def test_without_triton_the_module_imports_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # makes `import triton` fail
    modules = []
    for module in (triton_attention, triton_kernels):
        spec = importlib.util.spec_from_file_location(module.__name__, module.__file__)
        modules.append(importlib.util.module_from_spec(spec))
        monkeypatch.setitem(sys.modules, module.__name__, modules[-1])  # the second imports the first
        spec.loader.exec_module(modules[-1])
    with pytest.raises(RuntimeError, match="triton.*not installed"):
        modules[-1].product(torch.zeros(1, 16), make_weight(Scheme(), 1, 16))


def main(mode: str) -> None:
    """Print each case's result as JSON. Modes: `interpret`, in Triton's interpreter, and `compile`, without it."""
    if mode == "interpret":
        from tests.triton_interpreter import patch_language_once

        patch_language_once()
    results: dict[str, Any] = {}
    for name, (function, arguments) in (interpreter_jobs() if mode == "interpret" else compile_jobs()).items():
        print(name, file=sys.stderr, flush=True)
        is_guarded = mode == "interpret" and function is not compare_far
        # torch.empty is NaN then, so what the kernel does not write is seen; that would fill all of a tensor of 4 GB
        torch.set_deterministic_debug_mode("error" if is_guarded else "default")
        kernel = triton_kernels._product_kernel
        product_kernel = Guarded(kernel) if is_guarded else kernel
        try:
            with mock.patch.object(triton_kernels, "_product_kernel", product_kernel):
                results[name] = function(**arguments)
        except Exception as error:  # one case's failure is that case's result
            results[name] = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
