"""worker/quantization/scheme.py: numbers to codes and back, in every scheme."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from part14_quantization.worker.quantization.scheme import (
    FP8_MAX,
    NF4_LEVELS,
    Quantized,
    Scheme,
    dequantize,
    encode,
    find_scales,
    quantize,
    quantize_tokens,
    round_tokens_to_fp8,
    symmetric_scale,
    to_fp8,
)
from part14_quantization.worker.quantization.writers import CompressedTensorsWriter
from tests.part14.small_checkpoints import refused, weight_of

SCHEMES = {
    "int8": Scheme(),
    "int8, groups": Scheme(group_size=8),
    "int8 with zero points": Scheme(group_size=8, is_symmetric=False),
    "int4": Scheme(bits=4, group_size=8),
    "int4, whole rows": Scheme(bits=4),
    "int4 with zero points": Scheme(bits=4, group_size=8, is_symmetric=False),
    "int3": Scheme(bits=3, group_size=8),
    "int2 with zero points": Scheme(bits=2, group_size=8, is_symmetric=False),
    "fp8": Scheme("fp8"),
    "fp8, groups": Scheme("fp8", group_size=8),
    "nf4": Scheme("nf4", bits=4, group_size=8),
}
SYMMETRIC = [name for name, scheme in SCHEMES.items() if scheme.is_symmetric]
IN_GROUPS = [name for name, scheme in SCHEMES.items() if scheme.group_size]
TIES = [0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, -3.5]
TIES_TO_EVEN = [0, 2, 2, 4, 0, -2, -2, -4]
numbers = st.floats(0.0009765625, 1024, width=32).flatmap(lambda size: st.sampled_from([size, -size, 0.0]))
rows_of_16 = st.lists(st.lists(numbers, min_size=16, max_size=16), min_size=1, max_size=3).map(torch.tensor)


def look(function: str) -> str:
    return f"See worker/quantization/scheme.py::{function}."


FP8_TOKENS = look("round_tokens_to_fp8")
IN_MEMORY = "See worker/quantization/writers.py::CompressedTensorsWriter and weight.py::QuantizedWeight."


def random_matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, expected: Tensor) -> bool:
    return torch.allclose(got, expected, rtol=1e-5, atol=1e-7)


def test_a_row_of_int8() -> None:
    row = torch.tensor([[1.27, -0.64, 0.012, -1.0]])
    got = quantize(row, Scheme())
    assert close(got.scale, torch.tensor([[0.01]])), f"1.27 / 127 = 0.01, got {got.scale}. {look('symmetric_scale')}"
    assert got.codes.tolist() == [[127, -64, 1, -100]], f"codes: got {got.codes.tolist()}. {look('encode')}"
    assert got.codes.dtype == torch.int8 and got.scale.dtype == torch.float32 and got.zero is None, (
        f"expected int8 codes, float32 scales and no zero points, got {got}. {look('Quantized')}"
    )
    error = (dequantize(got, Scheme()) - row).abs().max()
    assert error <= 0.005 + 1e-7, f"an error of {error}: expected at most half the scale, 0.005. {look('dequantize')}"


@pytest.mark.parametrize(
    ("row", "bits", "expected"),
    [
        ([7.0, -8.0], 4, 1.0),  # both ends of the codes are used
        ([3.5, -8.0], 4, 1.0),  # the smallest decides
        ([7.0, -4.0], 4, 1.0),  # the largest decides
        ([-1.0, -16.0], 4, 2.0),  # only negative numbers
        ([14.0, 1.0], 4, 2.0),  # only positive ones
        ([7.9, -8.0], 4, 7.9 / 7),
        ([127.0, -128.0], 8, 1.0),
        ([1.0, -64.0], 8, 0.5),
        ([1.0, -2.0], 2, 1.0),
        ([0.0, -0.0], 4, 1.0),
    ],
)
def test_symmetric_scales(row: list[float], bits: int, expected: float) -> None:
    """max(|largest| / largest code, |smallest| / smallest code)"""
    scheme = Scheme(bits=bits)
    got = symmetric_scale(torch.tensor([[row]]), scheme.min_code, scheme.max_code)
    assert got.shape == (1, 1) and close(got, torch.tensor([[expected]])), (
        f"{row} in {bits} bits: expected a scale of {expected}, got {got}. {look('symmetric_scale')}"
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_of_a_scheme(bits: int) -> None:
    scheme = Scheme(bits=bits)
    got = scheme.min_code, scheme.max_code, scheme.codes_per_byte
    expected = {2: (-2, 1, 2), 3: (-4, 3, 2), 4: (-8, 7, 2), 8: (-128, 127, 1)}[bits]
    assert got == expected, f"{bits} bits: expected codes and codes per byte {expected}, got {got}. {look('Scheme')}"


@pytest.mark.parametrize("name", SCHEMES)
def test_zeros(name: str) -> None:
    """A row of zeros has scale 1: not 0, by which nothing can be divided."""
    got = quantize(torch.zeros(3, 16), SCHEMES[name])
    assert (got.scale == 1).all(), (
        f"{name}: a row of zeros: expected scales of 1, got {got.scale}. {look('find_scales')}"
    )
    assert (dequantize(got, SCHEMES[name]) == 0).all(), f"{name}: zeros don't stay zeros. {look('dequantize')}"


def test_ties_become_even() -> None:
    got = quantize(torch.tensor([[127.0, *TIES]]), Scheme()).codes[0, 1:].tolist()
    assert got == TIES_TO_EVEN, f"{TIES} with scale 1: expected {TIES_TO_EVEN}, got {got}. {look('encode')}"
    zero = torch.tensor([[3]], dtype=torch.int8)
    shifted = encode(torch.tensor([TIES]), torch.ones(1, 1), zero, Scheme(is_symmetric=False)).codes[0] - 3
    assert shifted.tolist() == TIES_TO_EVEN, (
        f"{TIES} with scale 1 and zero point 3: expected {TIES_TO_EVEN} before the zero point is added, got "
        f"{shifted.tolist()}. {look('encode')}"
    )
    tokens, _ = quantize_tokens(torch.tensor([[127.0, *TIES]]))
    assert tokens[0, 1:].tolist() == TIES_TO_EVEN, f"activations: got {tokens[0, 1:]}. {look('quantize_tokens')}"


@pytest.mark.parametrize(
    ("scheme", "zero", "expected"),
    [
        (Scheme(), None, [127, -128]),
        (Scheme(bits=4), None, [7, -8]),
        (Scheme(bits=3), None, [3, -4]),
        (Scheme(is_symmetric=False), 100, [127, -128]),
        (Scheme(bits=4, is_symmetric=False), -8, [7, -8]),
        (Scheme("nf4", bits=4), None, [7, -8]),
        (Scheme("fp8"), None, [0x7E, 0xFE - 256]),
    ],
)
def test_numbers_that_are_too_large_saturate(scheme: Scheme, zero: int | None, expected: list[int]) -> None:
    zeros = None if zero is None else torch.tensor([[zero]], dtype=torch.int8)
    for size in (1_000.0, 1e6, torch.inf):
        got = encode(torch.tensor([[size, -size]]), torch.ones(1, 1), zeros, scheme).codes[0].tolist()
        assert got == expected, f"{scheme}: ±{size} with scale 1: expected {expected}, got {got}. {look('encode')}"


def test_zero_points_by_hand() -> None:
    """-3 to 12 is 15 steps of 1, from code -8 to 7: so 0 is code -5."""
    row = torch.tensor([[-3.0, 0.0, 5.0, 12.0]])
    scheme = Scheme(bits=4, is_symmetric=False)
    got = quantize(row, scheme)
    assert got.zero is not None and got.zero.dtype == torch.int8, f"zero points: got {got.zero}. {look('find_scales')}"
    found = got.scale.item(), got.zero.item(), got.codes.tolist()
    assert found == (1.0, -5, [[-8, -5, 0, 7]]), (
        f"{row.tolist()}: expected scale 1, zero point -5 and codes -8, -5, 0, 7, got {found}. {look('find_scales')}"
    )
    assert torch.equal(dequantize(got, scheme), row), f"got {dequantize(got, scheme)}. {look('dequantize')}"


@pytest.mark.parametrize(("row", "zero", "scale"), [([3.0, 15.0], -8, 1.0), ([-30.0, -1.0], 7, 2.0)])
def test_the_range_includes_0(row: list[float], zero: int, scale: float) -> None:
    """Of numbers with the same sign, too."""
    scales, zeros = find_scales(torch.tensor([[row]]), Scheme(bits=4, is_symmetric=False))
    assert zeros is not None and (scales.item(), zeros.item()) == (scale, zero), (
        f"{row}: expected scale {scale} and zero point {zero}, got {scales} and {zeros}. {look('find_scales')}"
    )


@settings(deadline=None, max_examples=60)
@given(rows_of_16)
def test_0_stays_0(matrix: Tensor) -> None:
    matrix[:, ::3] = 0
    for name, scheme in SCHEMES.items():
        got = dequantize(quantize(matrix, scheme), scheme)[:, ::3]
        assert (got == 0).all(), f"{name}: 0 became {got[got != 0][:3]}. {look('find_scales')}"


@pytest.mark.parametrize("name", IN_GROUPS)
def test_groups_are_independent(name: str) -> None:
    """Columns 8 to 15 become 100 times larger: the codes of all other columns stay, and their scales."""
    scheme, matrix = SCHEMES[name], random_matrix(3, 32)
    before = quantize(matrix, scheme)
    matrix[1, 8:16] *= 100
    after = quantize(matrix, scheme)
    codes, scales = (before.codes != after.codes).nonzero().tolist(), (before.scale != after.scale).nonzero().tolist()
    assert all(row == 1 and 8 <= column < 16 for row, column in codes), (
        f"{name}: row 1's group 1 was changed, and codes changed at {codes[:5]}. {look('encode')}"
    )
    assert scales == [[1, 1]], f"{name}: expected row 1's scale 1 to change, got {scales}. {look('Scheme.split')}"


@pytest.mark.parametrize("name", IN_GROUPS)
def test_a_group_is_like_a_matrix_of_its_own(name: str) -> None:
    scheme, matrix = SCHEMES[name], random_matrix(3, 32, seed=1)
    whole, part = quantize(matrix, scheme), quantize(matrix[:, 16:24].contiguous(), scheme)
    assert torch.equal(whole.codes[:, 16:24], part.codes) and torch.equal(whole.scale[:, 2:3], part.scale), (
        f"{name}: columns 16 to 23 of 32 aren't group 2. {look('Scheme.split')}"
    )


@pytest.mark.parametrize("name", SCHEMES)
def test_experts_are_like_matrices_of_their_own(name: str) -> None:
    scheme, experts = SCHEMES[name], random_matrix(2, 3, 16)
    got = quantize(experts, scheme)
    for expert, matrix in enumerate(experts):
        alone = quantize(matrix, scheme)
        assert torch.equal(got.codes[expert], alone.codes) and torch.equal(got.scale[expert], alone.scale), (
            f"{name}: expert {expert} has other codes than its matrix alone. {look('encode')}"
        )
    shape = list(dequantize(got, scheme).shape)
    assert shape == [2, 3, 16], f"{name}: two experts' numbers have shape {shape}. {look('dequantize')}"


def half_a_step(matrix: Tensor, codes: Quantized, scheme: Scheme) -> Tensor:
    """How much each number may change."""
    scale = codes.scale.repeat_interleave(matrix.shape[-1] // codes.scale.shape[-1], dim=-1)
    if scheme.kind == "int":
        return scale / 2
    if scheme.kind == "nf4":
        return scale * 0.304 / 2  # between levels -1 and -0.696
    return (matrix.abs() / 16).clamp(min=scale * 2**-10)  # half of the last of 3 bits; of the smallest step, 2^-9


@settings(deadline=None, max_examples=100)
@given(rows_of_16)
def test_no_number_changes_by_more_than_half_a_step(matrix: Tensor) -> None:
    for name, scheme in SCHEMES.items():
        codes = quantize(matrix, scheme)
        error, most = (dequantize(codes, scheme) - matrix).abs(), half_a_step(matrix, codes, scheme)
        worst = (error - most * 1.0001).argmax()
        assert (error <= most * 1.0001).all(), (
            f"{name}: {matrix.flatten()[worst]} changed by {error.flatten()[worst]}, expected at most "
            f"{most.flatten()[worst]}. {look('encode')}"
        )


@settings(deadline=None, max_examples=60)
@given(rows_of_16)
def test_what_was_rounded_once_stays(matrix: Tensor) -> None:
    for name, scheme in SCHEMES.items():
        codes = quantize(matrix, scheme)
        again = encode(dequantize(codes, scheme), codes.scale, codes.zero, scheme)
        same = dequantize(again, scheme) == dequantize(codes, scheme)  # fp8 has two zeros
        assert same.all(), f"{name}: with the same scales, codes change when they are rounded again. {look('encode')}"
        if scheme.is_symmetric:
            twice = dequantize(quantize(dequantize(codes, scheme), scheme), scheme)
            assert close(twice, dequantize(codes, scheme)), (
                f"{name}: quantized twice, numbers change again: the largest number of a group doesn't have the "
                f"largest code. {look('find_scales')}"
            )


@pytest.mark.parametrize("name", SCHEMES)
def test_every_code_stays(name: str) -> None:
    """Each code, as a number, becomes this code again: with the scale that it was decoded with."""
    scheme = Scheme(SCHEMES[name].kind, SCHEMES[name].bits, is_symmetric=SCHEMES[name].is_symmetric)
    codes = torch.arange(scheme.min_code, scheme.max_code + 1).to(torch.int8).unsqueeze(0)
    if scheme.kind == "fp8":
        codes = codes[(codes != 0x7F) & (codes != -1)].unsqueeze(0)  # NaN
    zero = None if scheme.is_symmetric else torch.tensor([[1]], dtype=torch.int8)
    scale = torch.tensor([[0.3]])
    values = dequantize(Quantized(codes, scale, zero), scheme)
    again = dequantize(encode(values, scale, zero, scheme), scheme)
    assert torch.equal(again, values), (
        f"{name}: codes {codes[values != again].tolist()} stand for {values[values != again].tolist()}, which became "
        f"{again[values != again].tolist()}. {look('encode')}"
    )


@pytest.mark.parametrize("name", SCHEMES)
def test_scales_of_another_dtype(name: str) -> None:
    """Codes belong to the scales that are stored: rounded to float16 before they are used."""
    scheme, matrix = SCHEMES[name], random_matrix(16, 64)
    got, exact = quantize(matrix, scheme, torch.float16), quantize(matrix, scheme)
    assert torch.equal(got.scale, exact.scale.half().float()) and got.scale.dtype == torch.float32, (
        f"{name}: expected float32 scales rounded to float16, got {got.scale}. {look('quantize')}"
    )
    again = encode(matrix, got.scale, got.zero, scheme)
    assert torch.equal(got.codes, again.codes), f"{name}: the codes belong to other scales. {look('quantize')}"
    if scheme.bits == 8:
        assert not torch.equal(got.codes, exact.codes), f"{name}: the scales were not used. {look('quantize')}"


@pytest.mark.parametrize("size", [1e-5, 1e-7])
@pytest.mark.parametrize("name", SCHEMES)
def test_scales_that_are_too_small_for_float16(name: str, size: float) -> None:
    """They become 0, and 0 / 0 isn't a number."""
    matrix = torch.tensor([[size, 0.0] * 8])
    got = dequantize(quantize(matrix, SCHEMES[name], torch.float16), SCHEMES[name])
    assert got.isfinite().all() and (got - matrix).abs().max() <= size, (
        f"{name}: {size} and 0, with scales in float16, became {got[0, 0]} and {got[0, 1]}. {look('quantize')}"
    )


def test_bfloat16_is_rounded_in_float32() -> None:
    matrix = random_matrix(4, 16).bfloat16()
    for name, scheme in SCHEMES.items():
        got, expected = quantize(matrix, scheme), quantize(matrix.float(), scheme)
        assert torch.equal(got.codes, expected.codes) and torch.equal(got.scale, expected.scale), (
            f"{name}: a bfloat16 matrix has other codes than the same numbers in float32. {look('quantize')}"
        )


def test_powers_of_two_are_exact_in_fp8() -> None:
    powers = 2.0 ** torch.arange(-9, 9)
    row = torch.cat((powers, -powers, torch.tensor([448.0, 0.0]))).unsqueeze(0)
    got = dequantize(quantize(row, Scheme("fp8")), Scheme("fp8"))
    assert torch.equal(got, row), f"expected {row[got != row]}, got {got[got != row]}. {look('to_fp8')}"


def test_fp8_saturates() -> None:
    huge = torch.tensor([448.0, 449.0, 460.0, 465.0, 1e6, torch.inf])
    for sign in (1, -1):
        got = to_fp8(sign * huge).float()
        assert (got == sign * 448).all(), f"{sign * huge}: expected {sign * 448}, got {got}. {look('to_fp8')}"
    small = random_matrix(1_000) * 100
    got, wanted = to_fp8(small).float(), small.to(torch.float8_e4m3fn).float()
    assert torch.equal(got, wanted), f"{small[got != wanted][:3]} became {got[got != wanted][:3]}. {look('to_fp8')}"


class CastsToFP8(TorchDispatchMode):
    """The largest number that is cast to e4m3 inside."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0.0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if (options or {}).get("dtype") == torch.float8_e4m3fn:
            self.largest = max(self.largest, float(arguments[0].abs().max()))
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("name", ["to_fp8", "encode", "round_tokens_to_fp8"])
def test_nothing_too_large_is_cast(name: str) -> None:
    """On a CPU the cast saturates, on some other devices it makes NaN of larger numbers than 448."""
    huge = torch.tensor([[1e6, -1e6, 449.0]])
    with CastsToFP8() as casts:
        if name == "to_fp8":
            to_fp8(huge)
        elif name == "encode":
            encode(huge, torch.ones(1, 1), None, Scheme("fp8"))
        else:
            round_tokens_to_fp8(huge)
    assert 447 < casts.largest <= 448, f"{name} casts {casts.largest} to FP8: expected 448. {look('to_fp8')}"


@settings(deadline=None, max_examples=60)
@given(rows_of_16)
def test_the_largest_number_becomes_the_largest_of_fp8(matrix: Tensor) -> None:
    codes = quantize(matrix, Scheme("fp8"))
    got = codes.codes.view(torch.float8_e4m3fn).float()
    assert not got.isnan().any(), f"{matrix} became NaN. {look('to_fp8')}"
    largest = torch.where(matrix.abs().amax(dim=1) == 0, 0.0, FP8_MAX)
    assert torch.equal(got.abs().amax(dim=1), largest), (
        f"expected the largest number of each row to become ±448, got {got.abs().amax(dim=1)}. {look('find_scales')}"
    )


def test_nf4_levels_are_themselves() -> None:
    row = torch.tensor([NF4_LEVELS])
    got = quantize(row * 3, Scheme("nf4", bits=4))
    assert got.codes.tolist() == [list(range(-8, 8))], f"levels 0 to 15, minus 8: got {got.codes}. {look('encode')}"
    numbers = dequantize(got, Scheme("nf4", bits=4))
    assert torch.allclose(numbers, row * 3), f"3 · levels became {numbers.tolist()}. {look('dequantize')}"
    assert len(NF4_LEVELS) == 16 and list(NF4_LEVELS) == sorted(NF4_LEVELS) and NF4_LEVELS[7] == 0, (
        f"expected 16 levels in order, the eighth of them 0. {look('NF4_LEVELS')}"
    )


def test_nf4_takes_the_nearest_level() -> None:
    row = torch.cat((torch.linspace(-1, 1, 4_095), torch.ones(1))).unsqueeze(0)
    got = quantize(row, Scheme("nf4", bits=4)).codes.long() + 8
    distances = (row.unsqueeze(-1) - torch.tensor(NF4_LEVELS)).abs()
    best = distances.amin(dim=-1)
    found = distances.gather(-1, got.unsqueeze(-1)).squeeze(-1)
    worst = (found - best).argmax()
    assert torch.allclose(found, best, atol=1e-6), (
        f"{row[0, worst]} became level {got[0, worst]}, expected {distances[0, worst].argmin()}. {look('encode')}"
    )


def test_codes_in_another_order() -> None:
    """order: the input feature that each column has."""
    order = torch.tensor([2, 0, 3, 1])
    codes = Quantized(torch.tensor([[20, 0, 30, 10]], dtype=torch.int8), torch.tensor([[1.0, 0.5]]), None, order)
    got = dequantize(codes, Scheme(group_size=2)).tolist()
    assert got == [[0.0, 5.0, 20.0, 15.0]], (
        f"columns 20, 0, 30 · 0.5, 10 · 0.5 are features 2, 0, 3, 1: expected [0, 5, 20, 15], got {got}. "
        f"{look('dequantize')}"
    )


@pytest.mark.parametrize(("group_size", "num_columns", "expected"), [(None, 7, 1), (8, 8, 1), (8, 64, 8), (1, 3, 3)])
def test_num_groups(group_size: int | None, num_columns: int, expected: int) -> None:
    got = Scheme(group_size=group_size).num_groups(num_columns)
    assert got == expected, f"{num_columns} in groups of {group_size}: expected {expected}. {look('Scheme.num_groups')}"


@pytest.mark.parametrize(("group_size", "num_columns"), [(128, 96), (128, 320), (7, 48)])
def test_groups_must_be_whole(group_size: int, num_columns: int) -> None:
    wanted = f"{num_columns} input features aren't whole groups of {group_size}"
    with refused("quantization", wanted, look("Scheme.num_groups")):
        quantize(torch.zeros(1, num_columns), Scheme(bits=4, group_size=group_size))


def test_bits_per_weight() -> None:
    """4 bits and a share of a scale: of 16 bits in a checkpoint, of 32 in memory."""
    scheme = Scheme(bits=4, group_size=128)
    codes = quantize(random_matrix(64, 512), scheme, torch.float16)
    stored = CompressedTensorsWriter(scheme, torch.float16).tensors("a", codes)
    num_bytes = stored["a.weight_packed"].nbytes + stored["a.weight_scale"].nbytes
    in_memory = sum(parameter.nbytes for parameter in weight_of(codes, scheme).parameters())
    bits = [8 * size / codes.codes.numel() for size in (num_bytes, in_memory)]
    assert bits == [4.125, 4.25], (
        f"bits per weight, stored and in memory: expected 4.125 and 4.25, got {bits}. {IN_MEMORY}"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_in_int8(dtype: torch.dtype) -> None:
    rows = torch.tensor([[127.0, -63.0, 0.25, 1.0], [-2.54, 1.27, 0, 0], [0.0, 0, 0, 0]]).to(dtype)
    codes, scale = quantize_tokens(rows)
    expected = [[127, -63, 0, 1], [-127, 64, 0, 0], [0, 0, 0, 0]]  # 1.27 is 63.5 codes; bfloat16 has 1.2734
    assert codes.dtype == torch.int8 and codes.tolist() == expected, (
        f"tokens {rows.tolist()}: expected {expected}, got {codes.tolist()}. {look('quantize_tokens')}"
    )
    wanted = torch.tensor([[1.0], [-rows[1, 0].item() / 127], [1.0]])
    assert scale.dtype == torch.float32 and close(scale, wanted), (
        f"one scale for each token, the largest number / 127, or 1 for zeros: expected {wanted.tolist()}, got "
        f"{scale.tolist()}. {look('quantize_tokens')}"
    )


@settings(deadline=None, max_examples=60)
@given(rows_of_16)
def test_tokens_are_independent_and_symmetric(rows: Tensor) -> None:
    codes, scale = quantize_tokens(rows)
    shapes = codes.shape, scale.shape
    assert shapes == (rows.shape, (len(rows), 1)), f"got codes and scales of {shapes}. {look('quantize_tokens')}"
    assert codes.min() >= -127, f"-128 is no code of activations: got {codes.min()}. {look('quantize_tokens')}"
    assert ((codes * scale - rows).abs() <= scale * 0.50001).all(), (
        f"off by over half a step. {look('quantize_tokens')}"
    )
    again, _ = quantize_tokens(-rows)
    assert torch.equal(again, -codes), f"the codes of -x aren't minus those of x. {look('quantize_tokens')}"
    alone, own_scale = quantize_tokens(rows[-1:])
    assert torch.equal(alone, codes[-1:]) and torch.equal(own_scale, scale[-1:]), (
        f"a token's codes depend on the tokens beside it. {look('quantize_tokens')}"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_in_fp8(dtype: torch.dtype) -> None:
    rows = torch.cat((random_matrix(5, 64) * 10.0 ** torch.arange(-3, 2).unsqueeze(1), torch.zeros(1, 64))).to(dtype)
    got = round_tokens_to_fp8(rows)
    assert got.dtype == dtype and got.shape == rows.shape, f"got {got.dtype}, {got.shape}. {FP8_TOKENS}"
    scale = rows.float().abs().amax(dim=1, keepdim=True) / 448
    step = 1 / 16 + (2**-8 if dtype == torch.bfloat16 else 0)
    most = (rows.float().abs() * step).clamp(min=2**-10) * 1.001 + scale * 2**-10
    assert ((got.float() - rows.float()).abs() <= most).all(), f"a number changed by over 1 / 16 of it. {FP8_TOKENS}"
    largest = rows.float().abs().argmax(dim=1, keepdim=True)
    assert torch.allclose(got.float().gather(1, largest), rows.float().gather(1, largest), rtol=1e-2), (
        f"a token's largest number is the largest of FP8, and so exact. {FP8_TOKENS}"
    )
    assert got[5].eq(0).all(), f"zeros became {got[5]}. {FP8_TOKENS}"
    assert torch.equal(round_tokens_to_fp8(rows[3:4]), got[3:4]), f"a token depends on those beside it. {FP8_TOKENS}"
    assert not torch.equal(got, rows), f"nothing was rounded. {FP8_TOKENS}"


def test_no_tokens() -> None:
    empty: Any = torch.zeros(0, 16)
    codes, scale = quantize_tokens(empty)
    shapes = codes.shape, scale.shape
    assert shapes == ((0, 16), (0, 1)), f"no tokens: got codes and scales of {shapes}. {look('quantize_tokens')}"
    shape = round_tokens_to_fp8(empty).shape
    assert shape == (0, 16), f"no tokens: got {list(shape)}. {FP8_TOKENS}"
