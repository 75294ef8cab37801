"""worker/quantization/products.py, cpu_kernels.py and weight.py: products with matrices of codes, on a CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from part14_quantization.worker.quantization import cpu_kernels, products
from part14_quantization.worker.quantization.cpu_kernels import decode_rows, small_products
from part14_quantization.worker.quantization.scheme import Quantized, Scheme, dequantize, quantize
from part14_quantization.worker.quantization.weight import QuantizedWeight
from part14_quantization.worker.weight import Part
from tests.part14.small_checkpoints import Given, refused, weight_of

SCHEMES = {
    "int8": Scheme(),
    "int8, groups of 16": Scheme(group_size=16),
    "int8 with zero points": Scheme(is_symmetric=False),
    "int8 with zero points, groups of 32": Scheme(group_size=32, is_symmetric=False),
    "int4": Scheme(bits=4),
    "int4, groups of 16": Scheme(bits=4, group_size=16),
    "int4 with zero points": Scheme(bits=4, is_symmetric=False),
    "int4 with zero points, groups of 32": Scheme(bits=4, group_size=32, is_symmetric=False),
    "int3 with zero points, groups of 48": Scheme(bits=3, group_size=48, is_symmetric=False),
    "fp8": Scheme("fp8"),
    "fp8, groups of 16": Scheme("fp8", group_size=16),
    "nf4, groups of 32": Scheme("nf4", bits=4, group_size=32),
    "int8 with int8 activations": Scheme(activations="int8"),
    "int8 with int8 activations, groups of 16": Scheme(group_size=16, activations="int8"),
    "fp8 with fp8 activations": Scheme("fp8", activations="fp8"),
}
NUM_ROWS = [0, 1, 3, 8, 9, 16, 17, 40]
DTYPES = [torch.float32, torch.bfloat16]
ROUNDING = {torch.float32: 2**-20, torch.bfloat16: 2**-7}  # of the sum of absolute values
COLUMNS = 96
OUTPUTS = 300  # a whole tile and a part of one
LOOK = "See worker/quantization/products.py::{}."
KERNEL = "See worker/quantization/cpu_kernels.py::{}."
WEIGHT = "See worker/quantization/weight.py::QuantizedWeight{}."


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_weight(scheme: Scheme, *shape: int, has_order: bool = False) -> QuantizedWeight:
    """A matrix, or one for each expert, with columns and rows of different sizes, and a few large and zero ones."""
    matrix = numbers(*shape, seed=1) * torch.linspace(0.1, 3, shape[-1]) * torch.linspace(0.5, 2, shape[-2])[:, None]
    matrix[..., 0, :] = 0
    matrix[..., 1, :] = matrix[..., 1, :].abs()  # so that a zero point is at an end
    codes = quantize(matrix, scheme)
    if has_order:
        codes.order = torch.randperm(shape[-1], generator=torch.Generator().manual_seed(2))
    return weight_of(codes, scheme)


def as_codes_see_it(rows: Tensor, scheme: Scheme) -> Tensor:
    """The rows, rounded if activations become codes too. In float64."""
    largest = rows.double().abs().amax(dim=-1, keepdim=True).clamp(min=1e-9) if len(rows) else rows.double()
    if scheme.activations == "int8":
        scale = (largest / 127).float()
        rows = (rows.float() / scale).round() * scale
    elif scheme.activations == "fp8":
        scale = (largest / 448).float()
        rows = (rows.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    return rows.double()


def check(got: Tensor, rows: Tensor, weight: QuantizedWeight, what: str, look: str) -> None:
    """got: a matrix's product with rows."""
    wanted_shape = (len(rows), weight.shape[-2])
    assert got.shape == wanted_shape and got.dtype == rows.dtype, f"{what}: got {got.dtype}, {list(got.shape)}. {look}"
    seen, matrix = as_codes_see_it(rows, weight.scheme), weight.dequantized().double()
    expected, most = F.linear(seen, matrix), F.linear(seen.abs(), matrix.abs()) * ROUNDING[rows.dtype] + 1e-6
    error = (got.double() - expected).abs()
    wrong = (error > most) | error.isnan()
    assert not wrong.any(), (
        f"{what}: {int(wrong.sum())} of {wrong.numel()} outputs differ from rows · dequantized matrixᵀ; row, column "
        f"{wrong.nonzero()[0].tolist()} is {got[wrong][0]:.5f}, expected {expected[wrong][0]:.5f}. {look}"
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SCHEMES)
def test_products(name: str, dtype: torch.dtype) -> None:
    weight = make_weight(SCHEMES[name], OUTPUTS, COLUMNS)
    for num_rows in NUM_ROWS:
        rows = numbers(num_rows, COLUMNS).to(dtype)
        check(weight(rows), rows, weight, f"{name}, {num_rows} rows of {dtype}", LOOK.format("product"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name, scheme in SCHEMES.items() if scheme.group_size])
def test_products_with_columns_in_another_order(name: str, dtype: torch.dtype) -> None:
    weight = make_weight(SCHEMES[name], OUTPUTS, COLUMNS, has_order=True)
    assert weight.order[:3].tolist() != [0, 1, 2], f"the order was lost. {WEIGHT.format('._set_order')}"
    for num_rows in NUM_ROWS:
        rows = numbers(num_rows, COLUMNS).to(dtype)
        what = f"{name}, columns in another order, {num_rows} rows of {dtype}"
        check(weight(rows), rows, weight, what, LOOK.format("cpu_product"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_order", [False, True])
@pytest.mark.parametrize("name", SCHEMES)
def test_products_of_experts(name: str, has_order: bool, dtype: torch.dtype) -> None:
    """Some have no rows, some few, some many."""
    scheme = SCHEMES[name]
    if has_order and (scheme.group_size is None or scheme.activations):
        return  # only groups have an order
    counts = torch.tensor([3, 0, 9, 8, 0, 40, 1, 0])
    weight = make_weight(scheme, len(counts), 24, COLUMNS, has_order=has_order)
    rows = numbers(int(counts.sum()), COLUMNS).to(dtype)
    got = weight.grouped(rows, counts)
    assert got.shape == (len(rows), 24), f"{name}: got {list(got.shape)}. {LOOK.format('grouped_product')}"
    for expert, own in enumerate(zip(got.split(counts.tolist()), rows.split(counts.tolist()), strict=True)):
        what = f"{name}, expert {expert} with {counts[expert]} of {len(rows)} rows of {dtype}"
        check(*own, weight.expert(expert), what, LOOK.format("grouped_product"))


@pytest.mark.parametrize("name", SCHEMES)
def test_no_rows_for_any_expert(name: str) -> None:
    weight = make_weight(SCHEMES[name], 3, 24, COLUMNS)
    got = weight.grouped(torch.empty(0, COLUMNS), torch.tensor([0, 0, 0]))
    assert got.shape == (0, 24), f"{name}: got {list(got.shape)}. {LOOK.format('grouped_product')}"


def test_rows_of_any_shape_and_a_bias() -> None:
    weight, rows, bias = make_weight(Scheme(bits=4, group_size=16), 24, COLUMNS), numbers(2, 5, COLUMNS), numbers(24)
    got = weight(rows, bias)
    assert got.shape == (2, 5, 24), f"[2, 5, {COLUMNS}] rows: got {list(got.shape)}. {WEIGHT.format('.forward')}"
    check(got.flatten(0, 1) - bias, rows.flatten(0, 1), weight, "a bias", WEIGHT.format(".forward"))


@pytest.mark.parametrize("name", SCHEMES)
def test_rows_that_are_a_view(name: str) -> None:
    """Such as every other row and column of a larger tensor."""
    weight = make_weight(SCHEMES[name], 24, COLUMNS)
    for num_rows in (3, 20):
        for dtype in DTYPES:
            rows = numbers(2 * num_rows, 2 * COLUMNS).to(dtype)[::2, ::2]
            check(weight(rows), rows, weight, f"{name}, a view of {dtype}", LOOK.format("product"))


@pytest.mark.parametrize("num_columns", [8, 24, 40, 56, 72, 100])
def test_numbers_of_columns_that_torch_cannot(num_columns: int) -> None:
    """torch's product for int8 and bfloat16 reads 16 columns at a time, also past the end."""
    weight, rows = make_weight(Scheme(), 24, num_columns), numbers(3, num_columns).to(torch.bfloat16)
    check(weight(rows), rows, weight, f"int8, {num_columns} columns", LOOK.format("has_int8pack"))


def count_call(counter: Counter[str], name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    counter[name] += 1
    return function(*arguments)


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """How often each of the kernels runs."""
    counter = Counter[str]()
    places = [
        (torch, "_weight_int8pack_mm"), (torch, "_int_mm"), (cpu_kernels, "_products_kernel"),
        (products, "decode_rows"), (products, "quantize_tokens"), (products, "round_tokens_to_fp8"),
    ]  # fmt: skip
    with ExitStack() as stack:
        for owner, name in places:
            call = partial(count_call, counter, name, getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, call))
        yield counter


FEW, TILES = {"_products_kernel": 1}, {"decode_rows": 2}  # 300 outputs are two tiles
INT8PACK, INT_MM = {"_weight_int8pack_mm": 1}, {"_int_mm": 1, "quantize_tokens": 1}


@pytest.mark.parametrize(
    ("name", "dtype", "num_rows", "expected"),
    [
        ("int8", torch.bfloat16, 1, INT8PACK),
        ("int8", torch.bfloat16, 16, INT8PACK),
        ("int8", torch.bfloat16, 17, TILES),
        ("int8", torch.float32, 8, FEW),
        ("int8", torch.float32, 9, TILES),
        ("int8, groups of 16", torch.bfloat16, 8, FEW),
        ("int8 with zero points", torch.bfloat16, 8, FEW),
        ("int4", torch.bfloat16, 8, FEW),
        ("int4", torch.bfloat16, 9, TILES),
        ("fp8", torch.bfloat16, 8, FEW),
        ("fp8", torch.bfloat16, 9, TILES),
        ("nf4, groups of 32", torch.float32, 1, FEW),
        ("nf4, groups of 32", torch.float32, 40, TILES),
        ("int8 with int8 activations", torch.bfloat16, 1, INT_MM),
        ("int8 with int8 activations", torch.float32, 40, INT_MM),
        ("int8 with int8 activations, groups of 16", torch.float32, 8, {**FEW, "quantize_tokens": 1}),
        ("fp8 with fp8 activations", torch.float32, 8, {**FEW, "round_tokens_to_fp8": 1}),
        ("fp8 with fp8 activations", torch.bfloat16, 9, {**TILES, "round_tokens_to_fp8": 1}),
        ("int4", torch.float32, 0, {}),
    ],
)
def test_which_kernel(name: str, dtype: torch.dtype, num_rows: int, expected: dict[str, int]) -> None:
    weight = make_weight(SCHEMES[name], OUTPUTS, COLUMNS)
    with counted() as counter:
        weight(numbers(num_rows, COLUMNS).to(dtype))
    assert dict(counter) == expected, (
        f"{name}, {num_rows} rows of {dtype}: expected {expected}, got {dict(counter)}. {LOOK.format('product')}"
    )


def test_which_kernel_for_experts() -> None:
    """One call of the kernel for all experts with few rows, and tiles for each of the others."""
    weight = make_weight(Scheme(bits=4, group_size=16), 4, 24, COLUMNS)
    for counts, expected in (
        ([8, 1, 3, 0], FEW),
        ([9, 1, 12, 0], {"_products_kernel": 1, "decode_rows": 2}),
        ([0, 0, 9, 0], {"decode_rows": 1}),
        ([0, 0, 0, 0], {}),
    ):
        with counted() as counter:
            weight.grouped(numbers(sum(counts), COLUMNS), torch.tensor(counts))
        assert dict(counter) == expected, (
            f"experts with {counts} rows: expected {expected}, got {dict(counter)}. {LOOK.format('cpu_product')}"
        )


def test_experts_with_int8_activations() -> None:
    weight = make_weight(Scheme(activations="int8"), 4, 24, COLUMNS)
    with counted() as counter:
        weight.grouped(numbers(12, COLUMNS), torch.tensor([9, 0, 3, 0]))
    assert counter["_int_mm"] == 2, f"two experts have rows: got {dict(counter)}. {LOOK.format('grouped_product')}"


@pytest.mark.parametrize("num_rows", [1, 3, 40])
def test_w8a8_adds_integers_exactly(num_rows: int) -> None:
    """The sum of 2,048 products of codes is too large for float32's 24 bits, and is exact all the same."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(100, 128, (24, 2_048), dtype=torch.int8, generator=generator)
    rows = torch.randint(100, 128, (num_rows, 2_048), generator=generator).float()
    rows[:, 0] = 127  # so that the scale is 1, and the rows' codes are the rows
    sums = products.int_mm(rows.to(torch.int8), codes)
    exact = rows.long() @ codes.long().T
    assert sums.dtype == torch.int32 and torch.equal(sums.long(), exact), (
        f"expected sums of {exact[0, :2].tolist()}, got {sums[0, :2].tolist()}. {LOOK.format('int_mm')}"
    )
    scale = torch.linspace(0.01, 0.02, 24).unsqueeze(1)
    got = products.int8_product(rows, codes, scale)
    assert torch.equal(got, exact.float() * scale.T), f"the sums, times the scales. {LOOK.format('int8_product')}"


def test_w8a8_has_a_scale_for_each_token_and_each_output() -> None:
    rows, codes = torch.tensor([[127.0, 0], [0, 254]]), torch.tensor([[1, 2], [3, 4]], dtype=torch.int8)
    got = products.int8_product(rows, codes, torch.tensor([[1.0], [10.0]])).tolist()
    assert got == [[127, 3810], [508, 10160]], (
        f"scales 1 and 2 for tokens, 1 and 10 for outputs: expected [[127, 3810], [508, 10160]], got {got}. "
        f"{LOOK.format('int8_product')}"
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SCHEMES)
def test_nan_stays_nan(name: str, dtype: torch.dtype) -> None:
    """In its row, and only there."""
    weight, experts = make_weight(SCHEMES[name], OUTPUTS, COLUMNS), make_weight(SCHEMES[name], 2, 24, COLUMNS)
    for num_rows in (3, 16, 40):
        rows = numbers(num_rows, COLUMNS).to(dtype)
        rows[1, 17] = torch.nan
        outputs = {
            "product": weight(rows),
            "grouped_product": experts.grouped(rows, torch.tensor([2, num_rows - 2])),
        }
        for function, got in outputs.items():
            # row 0 of the matrix is zeros
            where = got.isnan()
            assert where[1, 1:].all(), (
                f"{name}, {num_rows} rows of {dtype}: NaN in row 1 was lost in {int((~where[1]).sum())} of "
                f"{where.shape[1]} outputs. {LOOK.format(function)}"
            )
            assert not where[[0, 2]].any(), f"{name}: NaN came into other rows. {LOOK.format(function)}"


def every_code(scheme: Scheme) -> Quantized:
    """[number of zero points, all codes]"""
    codes = torch.arange(scheme.min_code, scheme.max_code + 1).to(torch.int8)
    if scheme.kind == "fp8":
        codes[[127, 255]] = 0  # codes -1 and 127 are NaN
        codes[(codes == 127) | (codes == -1)] = 0
    zero = None if scheme.is_symmetric else codes.unsqueeze(1)
    num_rows = 1 if zero is None else len(zero)
    return Quantized(codes.repeat(num_rows, 1), torch.linspace(0.1, 3, num_rows).unsqueeze(1), zero)


@pytest.mark.parametrize("name", ["int8", "int8 with zero points", "int4", "int4 with zero points", "fp8", "nf4"])
def test_every_code_is_decoded(name: str) -> None:
    scheme = Scheme("nf4", bits=4) if name == "nf4" else SCHEMES[name]
    codes = every_code(scheme)
    weight = weight_of(codes, scheme)
    got, expected = decode_rows(weight, 0, 0, len(codes.codes)), dequantize(codes, scheme)
    wrong = got != expected
    assert not wrong.any(), (
        f"{name}: codes {codes.codes[wrong][:4].tolist()} became {got[wrong][:4].tolist()}, expected "
        f"{expected[wrong][:4].tolist()}. {KERNEL.format('decode')}"
    )


@pytest.mark.parametrize("scale", [2.0**-40, 0.07, 255.0])
def test_fp8_of_all_sizes(scale: float) -> None:
    """Numbers without a full fraction as well: they are very small ones in float32 for a moment."""
    codes = every_code(Scheme("fp8"))
    codes.scale.fill_(scale)
    got, expected = decode_rows(weight_of(codes, Scheme("fp8")), 0, 0, 1), dequantize(codes, Scheme("fp8"))
    assert torch.equal(got, expected), (
        f"with scale {scale}, {expected[got != expected][:4].tolist()} became {got[got != expected][:4].tolist()}. "
        f"{KERNEL.format('decode_fp8')}"
    )


@pytest.mark.parametrize("name", SCHEMES)
def test_some_rows_are_decoded(name: str) -> None:
    weight = make_weight(SCHEMES[name], 3, 10, COLUMNS)
    for start, stop in ((0, 4), (4, 10), (8, 20)):
        got, expected = decode_rows(weight, 1, start, stop), weight.dequantized()[1, start:stop]
        assert got.shape == expected.shape and torch.equal(got, expected), (
            f"{name}: rows {start} to {stop} of expert 1's 10. {KERNEL.format('decode_rows')}"
        )


def test_the_kernel_leaves_large_groups_alone() -> None:
    weight, rows = make_weight(Scheme(bits=4, group_size=16), 3, 5, COLUMNS), numbers(10, COLUMNS)
    output = torch.full((10, 5), 7.0)
    small_products(rows, weight, [0, 3, 3, 10], output, max_rows=3)
    assert (output[3:] == 7).all(), f"the last expert has 7 rows, more than 3. {KERNEL.format('_products_kernel')}"
    check(output[:3], rows[:3], weight.expert(0), "3 rows, and a limit of 3", KERNEL.format("_products_kernel"))


def test_one_compilation_is_for_everything() -> None:
    """With zero points and without, for one matrix and for experts: else the first request would wait for seconds."""
    cpu_kernels.warm_up()
    for scheme in SCHEMES.values():
        weight, experts = make_weight(scheme, 24, COLUMNS), make_weight(scheme, 2, 24, COLUMNS)
        for dtype in DTYPES:
            rows = numbers(20, COLUMNS).to(dtype)
            weight(rows[:1])
            weight(rows)
            experts.grouped(rows, torch.tensor([3, 17]))
    for name in ("_products_kernel", "_decode_kernel"):
        signatures = getattr(cpu_kernels, name).signatures
        assert len(signatures) == 1, f"{name} was compiled for {signatures}. {KERNEL.format('warm_up')}"


@pytest.mark.parametrize("name", SCHEMES)
def test_one_experts_matrix_is_shared(name: str) -> None:
    weight = make_weight(SCHEMES[name], 3, 24, COLUMNS)
    own = weight.expert(2)
    assert own.shape == (24, COLUMNS), f"{name}: an expert has shape {own.shape}. {WEIGHT.format('.expert')}"
    assert own.scheme == weight.scheme, f"{name}: an expert has {own.scheme}. {WEIGHT.format('.expert')}"
    assert torch.equal(own.dequantized(), weight.dequantized()[2]), (
        f"{name}: not expert 2's. {WEIGHT.format('.expert')}"
    )
    for parameter, whole in zip(own.parameters(), weight.parameters(), strict=True):
        assert parameter.data_ptr() == whole[2].data_ptr() and parameter.device == whole.device, (
            f"{name}: the numbers of an expert were copied. {WEIGHT.format('.expert')}"
        )


def test_one_expert_has_the_order_of_all() -> None:
    weight = make_weight(Scheme(bits=4, group_size=16), 3, 24, COLUMNS, has_order=True)
    own = weight.expert(1)
    assert torch.equal(own.order, weight.order), f"expert 1 has order {own.order[:4]}. {WEIGHT.format('.expert')}"
    assert torch.equal(own.dequantized(), weight.dequantized()[1]), f"not expert 1's. {WEIGHT.format('.expert')}"


@pytest.mark.parametrize("name", SCHEMES)
def test_codes_are_what_was_read(name: str) -> None:
    """Codes that are packed come out again, at their place among those of other projections."""
    scheme = SCHEMES[name]
    first, second = quantize(numbers(3, COLUMNS), scheme), quantize(numbers(5, COLUMNS, seed=1), scheme)
    weight = QuantizedWeight((8, COLUMNS), Given(scheme, first))
    weight.read(None, "q_proj", Part(3, COLUMNS), (slice(0, 3),))  # type: ignore[arg-type]
    weight.layout = Given(scheme, second)
    weight.read(None, "k_proj", Part(5, COLUMNS), (slice(3, 8),))  # type: ignore[arg-type]
    got = weight.quantized()
    for field in ("codes", "scale", "zero"):
        if getattr(first, field) is not None:
            wanted = torch.cat((getattr(first, field), getattr(second, field)))
            assert torch.equal(getattr(got, field), wanted), f"{name}: {field} changed. {WEIGHT.format('.read')}"
    num_bytes = {parameter: tensor.nbytes for parameter, tensor in weight.named_parameters()}
    assert num_bytes["codes"] == 8 * COLUMNS // (2 if scheme.bits <= 4 else 1), f"got {num_bytes}. {WEIGHT.format('')}"
    assert ("zero" in num_bytes) != scheme.is_symmetric, f"zero points: got {num_bytes}. {WEIGHT.format('')}"


def test_codes_stay_codes() -> None:
    """model.to(torch.bfloat16) must not change codes, nor what is stored beside them."""
    weight = make_weight(Scheme(bits=4, group_size=16, is_symmetric=False), 8, COLUMNS, has_order=True)
    weight.to(torch.bfloat16)
    dtypes = [tensor.dtype for tensor in (weight.codes, weight.zero, weight.order)]
    assert dtypes == [torch.int8, torch.int8, torch.int64], f"got {dtypes}. See weight.py::integers."
    trained = [name for name, parameter in weight.named_parameters() if parameter.requires_grad]
    assert not trained, f"{trained} have gradients: codes can't be trained. {WEIGHT.format('')}"


def test_projections_beside_each_other_have_one_order() -> None:
    scheme, order = Scheme(bits=4, group_size=16), torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(2))
    codes = quantize(numbers(4, COLUMNS), scheme)
    weight = QuantizedWeight((8, COLUMNS), Given(scheme, replace(codes, order=order), has_order=True))
    part, reader = Part(4, COLUMNS), mock.Mock()
    weight.read(reader, "q_proj", part, (slice(0, 4),))
    weight.read(reader, "k_proj", part, (slice(4, 8),))
    assert torch.equal(weight.order, order), f"got order {weight.order[:4]}. {WEIGHT.format('._set_order')}"
    for other in (order.roll(1), None):
        weight.layout = Given(scheme, replace(codes, order=other), has_order=True)
        with refused("model", r"v_proj has its columns in another order \(g_idx\)", WEIGHT.format("._set_order")):
            weight.read(reader, "v_proj", part, (slice(4, 8),))


def test_no_order_is_the_order_of_the_features() -> None:
    scheme = Scheme(bits=4, group_size=16)
    weight = QuantizedWeight((4, COLUMNS), Given(scheme, quantize(numbers(4, COLUMNS), scheme), has_order=True))
    weight.read(mock.Mock(), "q_proj", Part(4, COLUMNS), (slice(0, 4),))
    got = weight.order.tolist()
    assert got == list(range(COLUMNS)), f"without g_idx: got order {got[:4]}. {WEIGHT.format('._set_order')}"


def test_two_threads_at_once() -> None:
    """The kernels run without the GIL, and have no memory in common. (torch's sums depend on its number of threads.)"""
    weights = [make_weight(SCHEMES[name], 64, COLUMNS) for name in ("int4, groups of 16", "fp8", "nf4, groups of 32")]
    experts = make_weight(Scheme(bits=4, group_size=16), 3, 24, COLUMNS)
    inputs = [numbers(num_rows, COLUMNS, seed=num_rows) for num_rows in (1, 8, 9, 30)]

    def work(_: int) -> list[Tensor]:
        outputs = [weight(rows) for weight in weights for rows in inputs]
        return [*outputs, *(experts.grouped(rows, torch.tensor([0, 1, len(rows) - 1])) for rows in inputs)]

    expected = work(0)
    with ThreadPoolExecutor(2) as pool:
        for outputs in pool.map(work, range(20)):
            pairs = zip(outputs, expected, strict=True)
            same = all(torch.allclose(got, wanted, rtol=1e-4, atol=1e-4) for got, wanted in pairs)
            assert same, f"two threads at once compute something else than one. {KERNEL.format('_products_kernel')}"


def test_what_a_product_without_kernels_is() -> None:
    weight, rows = make_weight(Scheme(bits=4, group_size=16), 24, COLUMNS, has_order=True), numbers(3, COLUMNS)
    for dtype in DTYPES:
        got = products.reference_product(rows.to(dtype), weight)
        check(got, rows.to(dtype), weight, "the reference", LOOK.format("reference_product"))
