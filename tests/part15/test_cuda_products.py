"""worker/kernels/cuda/quantized_linear and grouped_linear: products with few rows. The same tests run on a GPU, and
without one on the CPU, in the emulation."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from common.checkpoint import Checkpoint
from part15_full_architecture.worker.kernels import reference
from part15_full_architecture.worker.kernels.cuda import grouped_linear as grouped
from part15_full_architecture.worker.kernels.cuda import quantized_linear as quantized
from part15_full_architecture.worker.kernels.cuda.library import KernelError, Library
from part15_full_architecture.worker.quantization.packing import pack_nibbles
from part15_full_architecture.worker.quantization.products import reference_product
from part15_full_architecture.worker.quantization.scheme import Quantized, Scheme, dequantize
from part15_full_architecture.worker.quantization.weight import QuantizedWeight
from part15_full_architecture.worker.weights import load_decoder

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "tests" / "part14" / "checkpoints" / "ct-w4a16"
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
STEP = {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}  # two in the last place; for float32, the sum
TOLERANCE = 1e-5  # of a product's sum of absolute values: what the order of additions may change
GUARD = 2048  # bytes before and after a tensor
GEMV = "See worker/kernels/cuda/quantized_gemv.cu::gemv_kernel"
GEMM = "See worker/kernels/cuda/quantized_gemm.cu::gemm_kernel"
LAUNCH = "See worker/kernels/cuda/quantized_linear.py::{}"
GROUPED = "See worker/kernels/cuda/grouped_linear.cu::{}"

KINDS = {
    "int8": Scheme(),
    "int8 with zero points": Scheme(is_symmetric=False),
    "int4": Scheme(bits=4),
    "int4 with zero points": Scheme(bits=4, is_symmetric=False),
    "fp8": Scheme("fp8"),
}
GROUPS: dict[str, tuple[int | None, int]] = {  # their size, and the number of columns
    "a group of 2": (2, 2),
    "groups of 6": (6, 30),
    "groups of 16": (16, 48),
    "groups of 32": (32, 96),
    "groups of 48": (48, 336),
    "groups of 64": (64, 1_152),  # more than the lanes of a warp load at once
    "groups of 128": (128, 640),  # two and a half tiles
    "a scale for each row": (None, 150),
    "a scale for each row, aligned": (None, 288),
}
KERNELS = [("gemv", "float32"), *((kernel, dtype) for kernel in ("gemv", "gemm") for dtype in ("float16", "bfloat16"))]
INT4 = replace(KINDS["int4 with zero points"], group_size=32)


@dataclass(slots=True)
class Weight:
    """A matrix of codes: the arguments of quantized_linear, and the numbers that the codes stand for, float32."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    group_size: int
    codes_per_byte: int
    kind: str
    matrix: Tensor

    def arguments(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))[:-1]


def make_weight(scheme: Scheme, out_features: int, num_columns: int, codes: Tensor | None = None) -> Weight:
    """A matrix of all sorts of codes, scales and zero points."""
    shape, groups = (out_features, num_columns), (out_features, scheme.num_groups(num_columns))
    if codes is None and scheme.kind == "fp8":  # 127 and -1 are NaN
        codes = (torch.randint(0, 127, shape) - 128 * torch.randint(0, 2, shape)).to(torch.int8)
    elif codes is None:
        codes = torch.randint(scheme.min_code, scheme.max_code + 1, shape).to(torch.int8)
    scale = torch.ldexp(torch.rand(groups) + 1, torch.randint(-9, -4, groups))
    zero = None
    if not scheme.is_symmetric:
        zero = torch.randint(scheme.min_code, scheme.max_code + 1, groups).to(torch.int8)
    group_size = scheme.group_size or num_columns
    packed = pack_nibbles(codes, group_size) if scheme.codes_per_byte == 2 else codes
    matrix = dequantize(Quantized(codes, scale, zero), scheme)
    return Weight(packed, scale, zero, group_size, scheme.codes_per_byte, scheme.kind, matrix)


class Guarded:
    """Tensors with bytes before and after them that nobody may use: as numbers and scales they are NaN, as FP8 codes
    too. check() tells whether they are as they were."""

    def __init__(self, device: str, misalignments: dict[str, int] | None = None) -> None:
        self.device, self.misalignments = device, misalignments or {}  # in elements, to an address divisible by 16
        self.buffers = list[tuple[str, Tensor, int, int]]()

    def empty(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        start = GUARD + self.misalignments.get(name, 0) * dtype.itemsize
        end = start + torch.Size(shape).numel() * dtype.itemsize
        buffer = torch.full((-(-end // 16) * 16 + GUARD,), 0xFF if dtype.is_floating_point else 0x7F, dtype=torch.uint8)
        buffer = buffer.to(self.device)
        self.buffers.append((name, buffer, start, end))
        return buffer[start:end].view(dtype).view(shape)

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        return self.empty(name, tuple(tensor.shape), tensor.dtype).copy_(tensor)

    @contextmanager
    def outputs(self) -> Iterator[None]:
        """What Tensor.new_empty returns is guarded."""
        with mock.patch.object(
            Tensor, "new_empty", lambda like, *shape: self.empty("output", shape, like.dtype), create=True
        ):
            yield

    def check(self, look: str) -> None:
        for name, buffer, start, end in self.buffers:
            sentinel = int(buffer[0])
            changed = (buffer != sentinel).nonzero().flatten()
            outside = changed[(changed < start) | (changed >= end)]
            assert not len(outside), (
                f"{name}, of {end - start} bytes: {len(outside)} bytes outside of it were overwritten, the first at "
                f"{int(outside[0]) - start}. {look}"
            )


def check_product(got: Tensor, rows: Tensor, matrix: Tensor, what: str, look: str) -> None:
    """Compare with the product in float64. rows: [n, columns]; matrix: [m, columns]."""
    got, rows, matrix = got.cpu(), rows.cpu(), matrix.cpu()
    expected = rows.double() @ matrix.double().T
    assert got.dtype == rows.dtype, f"{what}: expected {rows.dtype}, got {got.dtype}. {look}"
    assert got.shape == expected.shape, f"{what}: expected {list(expected.shape)}, got {list(got.shape)}. {look}"
    number = torch.finfo(rows.dtype)
    rounding = number.eps / 2 * expected.abs().clamp(min=number.tiny)  # half a step between neighboring numbers
    limit = TOLERANCE * (rows.double().abs() @ matrix.double().abs().T) + rounding
    ratio = ((got.double() - expected).abs() / limit).nan_to_num(torch.inf)
    if not ratio.numel() or ratio.max() <= 1:
        return
    row, output = divmod(int(ratio.argmax()), len(matrix))
    raise AssertionError(
        f"{what}: {int((ratio > 1).sum())} of {ratio.numel()} outputs are wrong. Row {row}, output {output}: expected "
        f"{float(expected[row, output]):.6g}, got {float(got[row, output]):.6g}; rounding explains a difference of "
        f"{float(limit[row, output]):.2g}. {look}"
    )


def check_quantized(
    kernel: str, dtype: str, scheme: Scheme, num_rows: int, out_features: int, num_columns: int, device: str,
    misalignments: dict[str, int] | None = None,
) -> None:  # fmt: skip
    """One product, with guards around all tensors."""
    torch.manual_seed(num_rows * 1_000 + out_features)
    weight, guarded = make_weight(scheme, out_features, num_columns), Guarded(device, misalignments)
    rows = torch.randn(num_rows, num_columns).to(DTYPES[dtype])
    copies = replace(
        weight,
        **{
            name: tensor if (tensor := getattr(weight, name)) is None else guarded.copy(name, tensor)
            for name in ("codes", "scale", "zero")
        },
    )
    own_rows = guarded.copy("rows", rows)
    with guarded.outputs():
        got = getattr(quantized, kernel)(own_rows, *copies.arguments())
    matrix = weight.matrix.to(rows.dtype) if kernel == "gemm" else weight.matrix
    look = GEMM if kernel == "gemm" else GEMV
    what = f"{num_rows} rows of {dtype}, {out_features} outputs, {num_columns} columns"
    check_product(got, rows, matrix, what, look)
    guarded.check(look)


# ---- quantized_linear


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", GROUPS)
def test_products_with_codes_of_all_kinds(groups: str, kind: str, device: str) -> None:
    group_size, num_columns = GROUPS[groups]
    for place, (kernel, dtype) in enumerate(KERNELS):
        scheme = replace(KINDS[kind], group_size=group_size)
        check_quantized(kernel, dtype, scheme, 3 + place, 35 + place, num_columns, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", ["gemv", "gemm"])
@pytest.mark.parametrize("group_size", [5, 7])
def test_groups_of_an_odd_size(group_size: int, kernel: str, device: str) -> None:
    check_quantized(kernel, "float16", Scheme(group_size=group_size), 4, 5, group_size * 9, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("out_features", [1, 2, 7, 8, 9, 17])
def test_gemv_with_any_number_of_rows_and_outputs(out_features: int, device: str) -> None:
    for num_rows in (1, 2, 3, 4, 5, 7, 8, 9, 16, 21):
        check_quantized("gemv", "float16", INT4, num_rows, out_features, 96, device)
        check_quantized("gemv", "float32", replace(INT4, group_size=6), num_rows, out_features, 30, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_rows", [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130])
def test_gemm_with_any_number_of_rows_and_outputs(num_rows: int, device: str) -> None:
    for out_features in (1, 31, 33, 65):
        check_quantized("gemm", "bfloat16", INT4, num_rows, out_features, 96, device)
    check_quantized("gemm", "float16", replace(INT4, group_size=6), num_rows, 40, 30, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_gemm_with_many_columns(kind: str, device: str) -> None:
    """The pipeline goes through all its stages several times, and ends within a tile."""
    scheme = replace(KINDS[kind], group_size=96)
    for num_rows in (16, 32, 64):
        check_quantized("gemm", "float16", scheme, num_rows, 64, 96 * 19, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("kernel", "dtype"), KERNELS)
def test_tensors_that_are_not_aligned(kernel: str, dtype: str, device: str) -> None:
    """Sizes allow to load 16 bytes at once, but addresses don't."""
    for name, misalignment in product(("rows", "codes", "scale", "zero", "output"), (1, 4)):
        check_quantized(kernel, dtype, INT4, 5, 20, 160, device, {name: misalignment})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("kernel", "dtype"), KERNELS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_code_becomes_its_number(kind: str, kernel: str, dtype: str, device: str) -> None:
    """A row with a single 1 gives a column of the matrix, exactly."""
    codes = torch.arange(256).to(torch.int8).view(8, 32)
    if "int4" in kind:
        codes = torch.stack((codes & 15, codes >> 4 & 15), dim=-1).flatten(-2) - 8  # all pairs
    elif kind == "fp8":
        codes[codes & 127 == 127] = 0  # NaN
    torch.manual_seed(0)
    weight = make_weight(replace(KINDS[kind], group_size=codes.shape[1] // 2), 8, codes.shape[1], codes)
    rows, numbers = torch.eye(codes.shape[1]).to(DTYPES[dtype]), weight.matrix.to(DTYPES[dtype])
    arguments = (each.to(device) if isinstance(each, Tensor) else each for each in weight.arguments())
    got = getattr(quantized, kernel)(rows.to(device), *arguments).T.cpu()
    wrong = (got != numbers).nonzero().tolist()
    if wrong:
        row, column = wrong[0]
        raise AssertionError(
            f"{len(wrong)} of {codes.numel()} codes are decoded to another number. Code {int(codes[row, column])}: "
            f"expected {float(numbers[row, column]):g}, got {float(got[row, column]):g}. "
            f"{GEMM if kernel == 'gemm' else GEMV}"
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_rows", [1, 8, 9, 40])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["int8 with zero points", "int4 with zero points"])
def test_it_equals_the_reference(kind: str, dtype: str, num_rows: int, device: str) -> None:
    """To two units in the last place of the largest result. Both round differently: see check_quantized."""
    torch.manual_seed(num_rows)
    weight = make_weight(replace(KINDS[kind], group_size=32), 70, 256)
    rows = torch.randn(num_rows, 256).to(DTYPES[dtype])
    expected = reference.quantized_linear(rows, *weight.arguments()[:-1])
    arguments = (each.to(device) if isinstance(each, Tensor) else each for each in weight.arguments())
    got = quantized.quantized_linear(rows.to(device), *arguments).cpu()
    difference, limit = float((got - expected).abs().max()), float(expected.abs().max()) * STEP[rows.dtype]
    assert difference <= limit, (
        f"{num_rows} rows of {dtype}: the largest difference to the reference is {difference:.2g}, more than "
        f"{limit:.2g}. " + LAUNCH.format("quantized_linear")
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 20])
def test_a_layer_of_a_real_checkpoint(num_rows: int, dtype: str, device: str) -> None:
    """Codes that llmcompressor wrote, read by part 15."""
    directory = Checkpoint("", AutoConfig.from_pretrained(CHECKPOINT), CHECKPOINT, CHECKPOINT, frozenset())
    weight = load_decoder(directory, torch.float32, "cpu", None).layers["0"].mlp.down_proj.weight
    assert isinstance(weight, QuantizedWeight)
    torch.manual_seed(0)
    rows = torch.randn(num_rows, weight.shape[-1]).to(DTYPES[dtype])
    expected = reference_product(rows, weight)
    scheme = weight.scheme
    got = quantized.quantized_linear(
        rows.to(device), weight.codes.to(device), weight.scale.to(device), weight.zero, weight.group_size,
        scheme.codes_per_byte, scheme.kind,
    ).cpu()  # fmt: skip
    difference, limit = float((got - expected).abs().max()), float(expected.abs().max()) * STEP[rows.dtype]
    assert difference <= limit, (
        f"down_proj, {num_rows} rows of {dtype}: the largest difference to products.py::reference_product is "
        f"{difference:.2g}, more than {limit:.2g}. " + LAUNCH.format("quantized_linear")
    )


def test_which_kernel_computes_a_product() -> None:
    """The tensor cores from 9 rows on, and never with float32."""
    weight, found = make_weight(INT4, 3, 32), dict[tuple[str, int], str]()
    for dtype in DTYPES:
        for num_rows in (1, 8, 9, 100):
            with mock.patch.object(Library, "call") as call:
                quantized.quantized_linear(torch.zeros(num_rows, 32, dtype=DTYPES[dtype]), *weight.arguments())
            found[dtype, num_rows] = call.call_args.args[0]
    expected = {
        (dtype, num_rows): "quantized_gemm" if num_rows > 8 and dtype != "float32" else "quantized_gemv"
        for dtype, num_rows in found
    }
    wrong = {case: symbol for case, symbol in found.items() if symbol != expected[case]}
    assert not wrong, f"by dtype and number of rows: the wrong kernel for {wrong}. " + LAUNCH.format("quantized_linear")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("kernel", "dtype"), KERNELS)
@pytest.mark.parametrize("kind", ["int4", "fp8"])
def test_infinity_stays_in_its_row(kind: str, kernel: str, dtype: str, device: str) -> None:
    torch.manual_seed(0)
    weight = make_weight(replace(KINDS[kind], group_size=32), 40, 96)
    rows = torch.randn(18, 96).to(DTYPES[dtype])
    rows[[2, 17], 5] = torch.inf
    arguments = (each.to(device) if isinstance(each, Tensor) else each for each in weight.arguments())
    got = getattr(quantized, kernel)(rows.to(device), *arguments)
    is_wrong = (~got.isfinite()).any(dim=1)
    expected = [2, 17]
    assert is_wrong.nonzero().flatten().tolist() == expected, (
        f"rows {expected} contain infinity; these results aren't finite: {is_wrong.nonzero().flatten().tolist()}. "
        f"{GEMM if kernel == 'gemm' else GEMV}"
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", ["gemv", "gemm"])
def test_a_code_of_nan_stays_in_its_output(kernel: str, device: str) -> None:
    torch.manual_seed(0)
    codes = torch.randint(0, 127, (40, 80)).to(torch.int8)
    codes[[3, 39], 79] = 127
    weight = make_weight(replace(KINDS["fp8"], group_size=16), 40, 80, codes)
    rows = torch.randn(18, 80).to(torch.float16)
    arguments = (each.to(device) if isinstance(each, Tensor) else each for each in weight.arguments())
    got = getattr(quantized, kernel)(rows.to(device), *arguments).cpu()
    is_nan = got.isnan()
    assert is_nan[:, [3, 39]].all() and is_nan.sum() == 36, (
        f"outputs 3 and 39 have a weight of NaN, in the last column; NaN are outputs "
        f"{is_nan.any(dim=0).nonzero().flatten().tolist()}. {GEMM if kernel == 'gemm' else GEMV}"
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", ["gemv", "gemm"])
def test_nothing_to_compute(kernel: str, device: str) -> None:
    for num_rows, out_features in ((0, 5), (3, 0), (0, 0)):
        check_quantized(kernel, "float16", INT4, num_rows, out_features, 64, device)


def test_float32_has_no_tensor_cores() -> None:
    weight = make_weight(INT4, 3, 32)
    with pytest.raises(KernelError, match="has no kernel for these dtypes"):
        quantized.gemm(torch.randn(3, 32), *weight.arguments())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(group_size=16), "64 columns are not 2 groups of 16"),
        (dict(group_size=33), "group_size is 33"),
        (dict(codes_per_byte=1), "64 columns, codes 32 · 1"),
        (dict(codes=torch.zeros(8, 32, dtype=torch.uint8)), "codes are torch.uint8"),
        (dict(codes=torch.zeros(32, 8, dtype=torch.int8).T), "codes is not contiguous"),
        (dict(zero=torch.zeros(8, 1, dtype=torch.int8)), "zero: torch.int8"),
        (dict(scale=torch.zeros(8, 2, dtype=torch.float16)), "scale: torch.float16"),
        (dict(kind="fp8"), "fp8 codes, 2 in a byte"),
        (dict(kind="nf4"), "nf4 codes, 2 in a byte"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    weight = replace(make_weight(replace(INT4, group_size=32), 8, 64), **change)
    try:
        quantized.quantized_linear(torch.randn(2, 64), *weight.arguments())
    except AssertionError as error:
        assert message in str(error), f"expected {message!r}, got {error!s}. " + LAUNCH.format("_launch")
        return
    raise AssertionError(f"{change} was accepted; expected: {message}. " + LAUNCH.format("_launch"))


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU: 2 billion codes would take minutes in the emulation")
@pytest.mark.parametrize(("kernel", "num_rows"), [("gemv", 2), ("gemm", 20)])
def test_more_codes_than_32_bits_can_count(kernel: str, num_rows: int) -> None:
    torch.manual_seed(0)
    num_columns, out_features = 2**15, 2**16 + 100
    rows = torch.randn(num_rows, num_columns, device="cuda", dtype=torch.float16)
    codes = torch.zeros(out_features, num_columns, device="cuda", dtype=torch.int8)
    codes[-50:] = torch.randint(-128, 128, (50, num_columns))
    scale = torch.full((out_features, 1), 2.0**-8, device="cuda")
    got = getattr(quantized, kernel)(rows, codes, scale, None, num_columns, 1)
    matrix = torch.cat((torch.zeros(50, num_columns), codes[-50:].cpu().float() / 256))
    check_product(got[:, -100:], rows, matrix, "the last 100 outputs", GEMM if kernel == "gemm" else GEMV)


# ---- grouped_linear

COUNTS = {
    "one group": [5],
    "one row": [0, 1, 0],
    "empty groups at both ends": [0, 3, 0, 0, 20, 0],
    "a group with all rows": [0, 0, 70, 0],
    "groups of a single row": [1] * 9,
    "as many tiles as there can be": [17, 17, 1],
    "exactly full tiles": [16, 0, 32],
    "more than a tile of 16 rows": [20, 31, 3, 8],
    "tiles of 32 rows": [33, 0, 40, 15],
    "tiles of 64 rows": [65, 130, 1],
    "exactly full tiles of 64 rows": [64, 128],
    "more groups than threads": [0] * 150 + [3] + [0] * 150 + [2, 1],
}


def check_grouped(
    dtype: str, counts: list[int], out_features: int, in_features: int, device: str,
    misalignments: dict[str, int] | None = None,
) -> None:  # fmt: skip
    """One product, with guards around all tensors."""
    torch.manual_seed(sum(counts) + out_features)
    num_rows = sum(counts)
    rows = torch.randn(num_rows, in_features).to(DTYPES[dtype])
    weight = torch.randn(len(counts), out_features, in_features).to(DTYPES[dtype])
    guarded = Guarded(device, misalignments)
    own_counts = torch.tensor(counts, dtype=torch.int64, device=device)
    arguments = guarded.copy("rows", rows), guarded.copy("weight", weight), own_counts
    with guarded.outputs():
        got = grouped.grouped_linear(*arguments)
    assert got.shape == (num_rows, out_features), f"expected {(num_rows, out_features)}, got {tuple(got.shape)}"
    look, start = GROUPED.format("fp32_kernel" if dtype == "float32" else "tensor_core_kernel"), 0
    for group, count in enumerate(counts):
        end = start + count
        what = f"group {group} of {len(counts)}, rows {start} to {end} of {dtype}, {in_features} columns"
        check_product(got[start:end], rows[start:end], weight[group], what, look)
        start = end
    guarded.check(look)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", COUNTS)
def test_grouped_products(counts: str, dtype: str, device: str) -> None:
    check_grouped(dtype, COUNTS[counts], 24, 72, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_features", [1, 15, 63, 64, 65, 130])
def test_grouped_products_with_any_number_of_outputs(out_features: int, dtype: str, device: str) -> None:
    check_grouped(dtype, [3, 0, 5], out_features, 40, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_features", [1, 7, 8, 12, 33, 63, 64, 65, 100, 128, 264, 450])
def test_grouped_products_with_any_number_of_columns(in_features: int, dtype: str, device: str) -> None:
    check_grouped(dtype, [9, 18], 20, in_features, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_that_are_not_aligned(dtype: str, device: str) -> None:
    for name, misalignment in product(("rows", "weight", "output"), (1, 2, 4)):
        check_grouped(dtype, [5, 2], 20, 64, device, {name: misalignment})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_products_equal_the_reference(dtype: str, device: str) -> None:
    torch.manual_seed(0)
    counts = torch.tensor([4, 0, 37, 1])
    rows, weight = torch.randn(42, 96).to(DTYPES[dtype]), torch.randn(4, 50, 96).to(DTYPES[dtype])
    expected = reference.grouped_linear(rows, weight, counts)
    got = grouped.grouped_linear(rows.to(device), weight.to(device), counts.to(device)).cpu()
    difference, limit = float((got - expected).abs().max()), float(expected.abs().max()) * STEP[rows.dtype]
    assert difference <= limit, (
        f"{dtype}: the largest difference to the reference is {difference:.2g}, more than {limit:.2g}. "
        + GROUPED.format("launch")
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_infinity_stays_in_its_group(dtype: str, device: str) -> None:
    rows, weight = torch.ones(8, 40, dtype=DTYPES[dtype]), torch.ones(3, 20, 40, dtype=DTYPES[dtype])
    rows[2, 39], weight[2, 7, 0] = torch.inf, torch.nan
    got = grouped.grouped_linear(rows.to(device), weight.to(device), torch.tensor([2, 3, 3], device=device)).cpu()
    is_wrong = ~got.isfinite()
    expected = torch.zeros(8, 20, dtype=torch.bool)
    expected[2], expected[5:, 7] = True, True
    wrong = (is_wrong != expected).nonzero().tolist()
    assert not wrong, (
        "infinity in row 2, in the first row of group 1, and NaN in output 7 of group 2: they must not change other "
        f"results; wrong are (row, output) {wrong[:5]}. {GROUPED.format('fetch_tile')}"
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_weights_more_than_32_bits_can_count(dtype: str, device: str) -> None:
    """Only the last group has rows. Memory that is not touched costs nothing on a CPU."""
    num_groups, out_features, in_features = 2**16 + 1, 64, 2**9 + 8  # 2.2 billion numbers
    torch.manual_seed(0)
    weight = torch.empty(num_groups, out_features, in_features, dtype=DTYPES[dtype], device=device)
    weight[-1] = torch.randn(out_features, in_features)
    rows, counts = torch.randn(3, in_features).to(DTYPES[dtype]), torch.zeros(num_groups, dtype=torch.int64)
    counts[-1] = 3
    got = grouped.grouped_linear(rows.to(device), weight, counts.to(device))
    check_product(got, rows, weight[-1], "the last group", GROUPED.format("tensor_core_kernel"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_groups_or_rows(dtype: str, device: str) -> None:
    check_grouped(dtype, [], 5, 8, device)
    check_grouped(dtype, [0, 0], 5, 8, device)
    check_grouped(dtype, [2, 1], 0, 8, device)
    check_grouped(dtype, [2, 1], 5, 0, device)


def test_the_height_of_tiles() -> None:
    found = {
        (num_rows, num_groups): grouped.choose_tile_rows(num_rows, num_groups)
        for num_rows, num_groups in ((1, 128), (16, 1), (17, 1), (128, 8), (129, 8), (256, 8), (257, 8), (9_999, 8))
    }
    assert list(found.values()) == [16, 16, 32, 16, 32, 32, 64, 64], (
        f"by (rows, groups): expected the smallest of 16, 32 and 64 that the mean number of rows fits into, or 64; got "
        f"{found}. See worker/kernels/cuda/grouped_linear.py::choose_tile_rows"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(weight=torch.zeros(2, 3, 9)), "rows have 8 features, weight 9"),
        (dict(weight=torch.zeros(2, 3, 8, dtype=torch.float16)), "weight torch.float16"),
        (dict(weight=torch.zeros(2, 8, 3).transpose(1, 2)), "weight is not contiguous"),
        (dict(counts=torch.tensor([2, 2], dtype=torch.int32)), "counts: torch.int32 [2]"),
        (dict(counts=torch.tensor([2, 1, 1])), "counts: torch.int64 [3]"),
    ],
)
def test_groups_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    arguments = {"rows": torch.zeros(4, 8), "weight": torch.zeros(2, 3, 8), "counts": torch.tensor([2, 2]), **change}
    look = "See worker/kernels/cuda/grouped_linear.py::grouped_linear"
    try:
        grouped.grouped_linear(**arguments)
    except AssertionError as error:
        assert message in str(error), f"expected {message!r}, got {error!s}. {look}"
        return
    raise AssertionError(f"{list(change)} was accepted; expected: {message}. {look}")


@pytest.mark.parametrize("order", ["reverse", "random:1", "random:2"])
def test_the_order_of_threads_does_not_matter(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the emulation, a barrier that is missing shows when threads run in another order."""
    monkeypatch.setenv("CUDA_ON_CPU_ORDER", order)
    for num_rows, (kernel, dtype) in product((9, 40), KERNELS):
        check_quantized(kernel, dtype, INT4, num_rows, 70, 96 * 19, "cpu")
    for dtype, in_features in product(DTYPES, (63, 450)):
        check_grouped(dtype, [9, 18, 1], 40, in_features, "cpu")


# ---- memory that may not be touched: in a process of its own, since a fault ends it


def between_pages(tensor: Tensor, is_at_the_end: bool) -> Tensor:
    """A copy right before a page that can't be read or written, or right after one."""
    used_bytes = tensor.numel() * tensor.element_size()
    num_bytes = -(-used_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, num_bytes + 2 * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (0, mmap.PAGESIZE + num_bytes):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + page), mmap.PAGESIZE, 0) == 0
    offset = mmap.PAGESIZE + (num_bytes - used_bytes if is_at_the_end else 0)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return copy.view(tensor.shape).copy_(tensor)


def run_between_pages(call: Callable[..., Tensor], *arguments: Any) -> None:
    for is_at_the_end in (True, False):
        guard = partial(between_pages, is_at_the_end=is_at_the_end)

        def new_empty(like: Tensor, *shape: int, guard: Callable[[Tensor], Tensor] = guard) -> Tensor:
            return guard(torch.zeros(shape, dtype=like.dtype))

        with mock.patch.object(Tensor, "new_empty", new_empty, create=True):
            call(*(guard(each) if isinstance(each, Tensor) else each for each in arguments))


def products_between_pages() -> Iterator[str]:
    """Says what is computed next, before it is computed."""
    sizes = ((1, torch.float32), (3, torch.bfloat16), (9, torch.float16), (33, torch.float16))
    for kind, (group_size, num_columns) in product(KINDS, ((6, 30), (16, 48), (32, 96), (128, 640))):
        for out_features, (num_rows, dtype) in product((1, 40), sizes):
            weight = make_weight(replace(KINDS[kind], group_size=group_size), out_features, num_columns)
            yield f"{kind}, groups of {group_size}, {out_features} outputs, {num_rows} rows of {dtype}"
            rows = torch.randn(num_rows, num_columns).to(dtype)
            run_between_pages(quantized.quantized_linear, rows, *weight.arguments())
    for dtype, in_features, counts in product(DTYPES.values(), (7, 72, 128), ([3, 0, 20], [70, 1])):
        rows, weights = torch.randn(sum(counts), in_features), torch.randn(len(counts), 40, in_features)
        yield f"grouped_linear, {counts} rows of {dtype}, {in_features} columns"
        run_between_pages(grouped.grouped_linear, rows.to(dtype), weights.to(dtype), torch.tensor(counts))


def test_memory_around_the_tensors_is_not_touched() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    last = done.stdout.strip().splitlines()[-1:]
    assert done.returncode == 0, (
        f"a kernel read or wrote outside of its tensors (exit status {done.returncode}; -11 is a fault): {last}. "
        f"{GEMV}, {GEMM} and {GROUPED.format('fetch_tile')}\n{done.stderr}"
    )


if __name__ == "__main__":
    for case in products_between_pages():
        print(case, flush=True)
