"""lab/number_formats.py: every format against facts and searches that don't use its code, and the command."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from part14_quantization.lab import number_formats
from part14_quantization.lab.number_formats import (
    BF16,
    E4M3,
    E5M2,
    FORMATS,
    FP8_SCALED,
    FP16,
    FP32,
    INT4,
    INT8,
    MEASURED,
    MXFP4,
    NF4,
    TF32,
    FloatFormat,
    Format,
    Matrix,
    main,
    mean_loss,
    read_matrices,
)
from tools.transcripts import BLOCK, compare, split_block

PAGE = Path(__file__).resolve().parents[2] / "part14_quantization" / "FORMATS.md"
LOOK = "See number_formats.py::{}."
LOOK_MX = LOOK.format("MXFP4Format")
FLOATS = (FP32, TF32, FP16, BF16, E4M3, E5M2)
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]  # in the order of their codes


def names(number_format: Format) -> str:
    return number_format.name


def look(number_format: Format) -> str:
    return LOOK.format(type(number_format).__name__)


@pytest.fixture(scope="module")
def matrices() -> list[Matrix]:
    return read_matrices("tiny")


@pytest.fixture(scope="module")
def rows() -> Tensor:
    """Normal numbers, most of them made much larger or smaller. One row has only zeros, another one number besides."""
    generator = torch.Generator().manual_seed(14)
    numbers = torch.randn(64, 256, generator=generator)
    numbers[16:] *= 2.0 ** torch.randint(-12, 8, (48, 256), generator=generator)
    numbers[0], numbers[1, 1:] = 0, 0
    return numbers


def nearest_by_spacing(numbers: Tensor, number_format: FloatFormat) -> Tensor:
    """In float64: multiples of the spacing, which is 2^-fraction_bits of the power of two below, or of the smallest
    normal number."""
    exact = numbers.double()
    lowest = 2 - 2 ** (number_format.exponent_bits - 1)
    exponent = (torch.frexp(exact).exponent - 1).clamp(min=lowest)
    spacing = torch.ldexp(torch.ones_like(exact), exponent - number_format.fraction_bits)
    return ((exact / spacing).round() * spacing).clamp(-number_format.largest, number_format.largest)


# Facts


@pytest.mark.parametrize(
    ("number_format", "largest", "normal", "smallest", "spacing"),
    [
        (FP32, 3.4028234663852886e38, 2**-126, 2**-149, 2**-23),
        (TF32, 3.4011621342146535e38, 2**-126, 2**-136, 2**-10),
        (FP16, 65504, 2**-14, 2**-24, 2**-10),
        (BF16, 3.3895313892515355e38, 2**-126, 2**-133, 2**-7),
        (E4M3, 448, 2**-6, 2**-9, 2**-3),
        (E5M2, 57344, 2**-14, 2**-16, 2**-2),
    ],
    ids=lambda value: value.name if isinstance(value, Format) else "",
)
def test_limits(number_format: FloatFormat, largest: float, normal: float, smallest: float, spacing: float) -> None:
    assert number_format.limits == (largest, normal, smallest, spacing), (
        f"{number_format.name}: expected {(largest, normal, smallest, spacing)}, got {number_format.limits}. "
        f"{look(number_format)}limits"
    )
    kept = torch.tensor([largest, normal, smallest, 1 + spacing])
    assert torch.equal(number_format.round(kept), kept), (
        f"{number_format.name} has these numbers, but rounds {kept.tolist()} to {number_format.round(kept).tolist()}. "
        f"{look(number_format)}"
    )
    lost = torch.tensor([2 * smallest / 5, 1 + 2 * spacing / 5])
    assert number_format is FP32 or number_format.round(lost).tolist() == [0, 1], (
        f"{number_format.name}: nearest to {lost.tolist()} are 0 and 1, got {number_format.round(lost).tolist()}. "
        f"{look(number_format)}"
    )


def test_limits_of_torch() -> None:
    for each in (FP32, FP16, BF16, E4M3, E5M2):
        info = torch.finfo(each.dtype)
        expected = (info.max, info.smallest_normal, info.smallest_normal * info.eps, info.eps)
        assert each.limits == expected, f"{each.name}: torch says {expected}, got {each.limits}. {look(each)}"


@pytest.mark.parametrize(
    ("number_format", "num_columns", "expected"),
    [
        (FP32, 256, 32), (TF32, 256, 32), (FP16, 256, 16), (BF16, 256, 16), (E4M3, 256, 8), (E5M2, 256, 8),
        (INT8, 256, 8.125), (INT8, 4096, 8.0078125), (FP8_SCALED, 4096, 8.0078125), (INT4, 256, 4.125),
        (INT4, 4096, 4.125), (NF4, 256, 4.5), (NF4, 4096, 4.5), (MXFP4, 256, 4.25), (MXFP4, 4096, 4.25),
    ],
    ids=lambda value: value.name if isinstance(value, Format) else str(value),
)  # fmt: skip
def test_bits_per_number(number_format: Format, num_columns: int, expected: float) -> None:
    got = number_format.bits_per_number(num_columns)
    assert got == expected, (
        f"{number_format.name}, rows of {num_columns}: expected {expected} bits, got {got}. "
        f"{look(number_format)}bits_per_number: a group's scale is shared by its numbers"
    )


# Rounding


@pytest.mark.parametrize("number_format", FLOATS, ids=names)
def test_floats_round_to_the_nearest_number(number_format: FloatFormat, rows: Tensor) -> None:
    """Also numbers halfway between two, subnormal ones, and ones that are too large."""
    powers = 2.0 ** torch.arange(-149, 128).double().unsqueeze(1)
    spacing = number_format.limits.spacing_above_1 or 0
    halves = powers * (1 + torch.arange(17) * spacing / 2)  # of these, every other one is halfway
    thirds = powers * (1 + torch.arange(30) / 30)
    for exact in (rows, halves, -halves, thirds):
        each = exact.float().flatten()
        each = each[each.isfinite()]
        got, expected = number_format.round(each).double(), nearest_by_spacing(each, number_format)
        wrong = (got != expected).nonzero().flatten()[:1]
        assert not len(wrong), (
            f"{number_format.name}: {each[wrong].item()!r} became {got[wrong].item()!r}, nearest is "
            f"{expected[wrong].item()!r} (ties to even). {look(number_format)}round"
        )


@pytest.mark.parametrize(
    ("number_format", "numbers", "expected"),
    [
        (TF32, [1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-11 + 2**-23, -1 - 2**-11], [1, 1 + 2**-9, 1 + 2**-10, -1]),
        (FP16, [1 + 2**-11, 1 + 3 * 2**-11, 2**-25, 3 * 2**-25], [1, 1 + 2**-9, 0, 2**-23]),
        (BF16, [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20], [1, 1 + 2**-6, 1 + 2**-7]),
        (E4M3, [1.0625, 1.1875, 2**-10, 3 * 2**-10, 432], [1, 1.25, 0, 2**-8, 448]),
        (E5M2, [1.125, 1.375, 2**-17, 3 * 2**-17], [1, 1.5, 0, 2**-15]),
        (INT8, [127, 0.5, 1.5, 2.5, -0.5, -1.5], [127, 0, 2, 2, 0, -2]),
        (MXFP4, [4, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -2.5, -5], [4, 0, 1, 1, 2, 2, 4, 4, -2, -4]),
    ],
    ids=lambda value: value.name if isinstance(value, Format) else "",
)
def test_ties_go_to_even(number_format: Format, numbers: list[float], expected: list[float]) -> None:
    row = torch.zeros(128)
    row[: len(numbers)] = torch.tensor(numbers)
    got = number_format.round(row)[: len(numbers)].tolist()
    assert got == expected, (
        f"{number_format.name}: {numbers} became {got}, expected {expected}: of two numbers that are equally near, the "
        f"one whose last bit is 0. {look(number_format)}round"
    )


@pytest.mark.parametrize("number_format", MEASURED, ids=names)
def test_rounding_twice_changes_nothing(number_format: Format, rows: Tensor) -> None:
    once = number_format.round(rows)
    assert once.isfinite().all() and once.shape == rows.shape, f"{number_format.name}: {look(number_format)}round"
    assert not once[0].any(), f"{number_format.name}: a row of zeros became {once[0].unique()}. {look(number_format)}"
    twice = number_format.round(once)
    assert torch.allclose(twice, once, rtol=1e-6, atol=0), (
        f"{number_format.name}: {int((twice != once).sum())} of {rows.numel()} numbers change when they are rounded "
        f"again. {look(number_format)}round"
    )


@pytest.mark.parametrize("number_format", MEASURED, ids=names)
def test_rounding_keeps_the_order(number_format: Format, rows: Tensor) -> None:
    """Of numbers that share a scale: here 32 neighbors."""
    ordered = rows.unflatten(1, (-1, 32)).sort(dim=-1).values.flatten(1)
    steps = number_format.round(ordered).unflatten(1, (-1, 32)).diff(dim=-1)
    assert (steps >= 0).all(), (
        f"{number_format.name}: of two numbers, the larger one became the smaller one. {look(number_format)}round"
    )


@pytest.mark.parametrize("number_format", [*FLOATS, FP8_SCALED, MXFP4], ids=names)
def test_the_sign_changes_nothing_else(number_format: Format, rows: Tensor) -> None:
    """The other formats have more codes on one side of 0."""
    assert torch.equal(number_format.round(-rows), -number_format.round(rows)), (
        f"{number_format.name}: -x must become the negative of what x becomes. {look(number_format)}round"
    )


def test_mxfp4_by_trying_all_codes(rows: Tensor) -> None:
    """The scale is the largest power of two with which 4 is at most the group's largest number. Then each number takes
    the nearest of all codes; of two, the one with the even code."""
    groups = rows[1:].reshape(-1, 32)
    largest = groups.abs().amax(dim=1, keepdim=True)
    groups, largest = groups[largest.flatten() > 0], largest[largest > 0].unsqueeze(1)
    powers = 2.0 ** torch.arange(-60, 60)
    scale = torch.where(4 * powers <= largest, powers, 0).amax(dim=1, keepdim=True)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # argmin takes the first of several
    numbers = torch.tensor(E2M1)[order] * scale.unsqueeze(2)  # [group, 1, code]
    code = (groups.abs().unsqueeze(2) - numbers).abs().argmin(dim=2)
    expected = torch.take_along_dim(numbers.squeeze(1), code, dim=1) * groups.sign()
    got = MXFP4.round(groups)
    wrong = (got != expected).nonzero()[:1].flatten().tolist()
    assert not wrong, (
        f"group {wrong[0]}, whose largest number is {largest[wrong[0]].item()}: {groups[tuple(wrong)].item()} became "
        f"{got[tuple(wrong)].item()}, expected {expected[tuple(wrong)].item()}. {LOOK_MX}round"
    )


def test_mxfp4_scales_at_the_ends() -> None:
    """Exponents are stored in 8 bits: -127 to 127. Powers of two are kept, and the largest number stays between 4 and 6
    times the scale."""
    powers = (2.0 ** torch.arange(-126, 128).double()).float()
    groups = torch.zeros(len(powers), 32)
    groups[:, 3] = powers
    assert torch.equal(MXFP4.round(groups), groups), f"a power of two, alone in its group, must stay. {LOOK_MX}scaled"
    scale = MXFP4.scaled(groups)[1]
    assert scale.min() >= 2.0**-127 and scale.max() <= 2.0**127, f"{LOOK_MX}scaled: 8 bits hold -127 to 127"
    assert not MXFP4.round(torch.full((1, 32), 2.0**-149)).isnan().any(), f"{LOOK_MX}scaled"


def test_what_is_clipped() -> None:
    row = torch.zeros(128)
    row[:4] = torch.tensor([448.0, 449.0, -1e6, 57345.0])
    for each, expected in ((E4M3, [False, True, True, True]), (E5M2, [False, False, True, True]), (BF16, [False] * 4)):
        got = each.is_clipped(row)[:4].tolist()
        assert got == expected, f"{each.name}: expected {expected}, got {got}. {look(each)}is_clipped"
    row[:4] = torch.tensor([7.5, 6.0, -6.5, 4.0])
    got = MXFP4.is_clipped(row)[:4].tolist()
    assert got == [True, False, True, False], f"only 7.5 and -6.5 are beyond 6, got {got}. {LOOK_MX}is_clipped"
    for scaled in (INT8, INT4, NF4, FP8_SCALED):
        assert not scaled.is_clipped(row).any(), (
            f"{scaled.name}: the scale covers all numbers. {look(scaled)}is_clipped"
        )


# What is stored


def decode(code: str) -> float:
    """sign exponent fraction, as strings of bits. Without infinity and NaN."""
    sign, exponent, fraction = code.split()
    bias = 2 ** (len(exponent) - 1) - 1
    leading = 1 if int(exponent, 2) else 0
    power = (int(exponent, 2) or 1) - bias
    return (-1) ** int(sign) * (leading + int(fraction, 2) / 2 ** len(fraction)) * 2.0**power


@pytest.mark.parametrize("number_format", FLOATS, ids=names)
def test_the_bits_of_floats(number_format: FloatFormat, rows: Tensor) -> None:
    row = torch.cat([rows[20], torch.tensor(number_format.limits), -torch.tensor(number_format.limits)])
    for code, number in zip(number_format.codes(row), number_format.round(row).tolist(), strict=True):
        lengths = [len(part) for part in code.split()]
        assert lengths == [1, number_format.exponent_bits, number_format.fraction_bits], (
            f"{number_format.name}: {code!r} isn't sign, exponent and fraction. {look(number_format)}codes"
        )
        assert decode(code) == number, (
            f"{number_format.name}: {code!r} is {decode(code)!r}, expected {number!r}. {look(number_format)}codes"
        )


def test_the_codes_of_formats_with_scales(rows: Tensor) -> None:
    row = rows[20, :128]
    row = row / row.abs().max()
    mx, scale = [decode(code) for code in MXFP4.codes(row)], MXFP4.scaled(row)[1].expand(-1, 32).flatten()
    assert torch.equal(torch.tensor(mx) * scale, MXFP4.round(row)), f"code times scale is the number. {LOOK_MX}codes"
    for each in (INT8, INT4):
        codes = torch.tensor([int(code) for code in each.codes(row)])
        ratio = (each.round(row) / codes)[codes != 0]
        assert ratio.max() - ratio.min() < 1e-5, f"{each.name}: code times scale is the number. {look(each)}codes"
    level = dict(zip(NF4.codes(row), NF4.round(row).tolist(), strict=True))  # groups of 64 have other scales
    assert set(level) <= {f"level {number}" for number in range(16)}, f"got {set(level)}. {look(NF4)}codes"


def test_a_tenth() -> None:
    """As FORMATS.md computes it."""
    row = torch.zeros(128)
    row[:2] = torch.tensor([0.1, 1.0])
    expected = {"FP8 e4m3": 0.1015625, "FP8 e5m2": 0.09375, "INT8": 13 / 127, "MXFP4": 0.125, "BF16": 205 / 2048}
    for each in FORMATS:
        got = float(each.round(row)[0])
        assert each.name not in expected or got == pytest.approx(expected[each.name], rel=1e-7), (
            f"0.1 in {each.name}: expected {expected[each.name]}, got {got}. {look(each)}round"
        )


# A model's numbers


def test_the_loss_of_known_numbers() -> None:
    """1 stays, 2^-10 becomes 0, 500 becomes 448, and 0 was 0 before."""
    got = mean_loss(E4M3, [torch.tensor([1.0, 2**-10, 500.0, 0.0]), torch.ones(4)])
    expected = (52 / (1 + 500**2) ** 0.5 / 2, 0.25 / 2, 0.25 / 2)
    assert got == pytest.approx(expected), (
        f"expected error, zeros and clipped {expected}, the means over two tensors, got {tuple(got)}. "
        f"{LOOK.format('mean_loss')}"
    )


def test_errors_of_weights(matrices: list[Matrix]) -> None:
    assert len(matrices) == 24, (
        f"tiny has 6 layers with 4 matrices, got {len(matrices)}. {LOOK.format('read_matrices')}"
    )
    errors = {each.name: mean_loss(each, [matrix.weights for matrix in matrices]).error for each in MEASURED}
    exact = [errors[each.name] for each in (FP32, TF32, BF16)]
    assert exact == [0, 0, 0], f"the weights are stored in BF16, which is part of FP32 and TF32: got {exact}"
    check_order(errors, [FP16, INT8, FP8_SCALED, E5M2, NF4, INT4])


def test_errors_of_activations(matrices: list[Matrix]) -> None:
    errors = {each.name: mean_loss(each, [matrix.inputs for matrix in matrices]).error for each in MEASURED}
    check_order(errors, [FP32, TF32, BF16, INT8, FP8_SCALED, E5M2, NF4, MXFP4, INT4])


def check_order(errors: dict[str, float], formats: list[Format]) -> None:
    ordered = [errors[each.name] for each in formats]
    assert ordered == sorted(ordered), (
        f"expected errors in the order {[each.name for each in formats]}, got {ordered}. "
        f"{LOOK.format('mean_loss')}, and round() of the formats in the wrong place."
    )


def test_outliers_are_worse_for_integers(matrices: list[Matrix]) -> None:
    ranked = sorted(matrices, key=lambda matrix: matrix.outlier_ratio)
    assert "down_proj" in ranked[-1].name and ranked[-1].outlier_ratio > 5 > 2 > ranked[0].outlier_ratio, (
        f"expected large features in the inputs of down_proj, got {[(m.name, m.outlier_ratio) for m in ranked[-3:]]}. "
        f"{LOOK.format('Matrix.add')}"
    )
    for matrix, is_better in ((ranked[0], True), (ranked[-1], False)):
        int8, fp8 = (mean_loss(each, [matrix.inputs]).error for each in (INT8, FP8_SCALED))
        assert (int8 < fp8) == is_better, (
            f"{matrix.name}, outlier ratio {matrix.outlier_ratio:.1f}: INT8 {int8:.4f}, FP8 {fp8:.4f}. FP8's error is "
            f"smaller only if there are outliers. {LOOK.format('mean_loss')}"
        )


# The command


def test_the_command(
    matrices: list[Matrix], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the model that is loaded already."""
    monkeypatch.setattr(number_formats, "read_matrices", {"tiny": matrices}.__getitem__)
    main(["--plot", str(tmp_path / "formats.png")])
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert max(map(len, printed)) <= 80, f"too wide: {max(printed, key=len)!r}. {LOOK.format('show_table')}"
    for each in FORMATS:
        assert sum(line.startswith(each.name) for line in printed) >= 3, f"tables lack {each.name}: {printed}"
    with Image.open(tmp_path / "formats.png") as image:
        assert image.width > image.height > 500, f"the plot has {image.size} pixels. {LOOK.format('plot')}"
    (command,) = split_block(next(iter(BLOCK.findall(PAGE.read_text("utf-8")))))
    problems = compare([line for line in command.output if line.strip()], [line for line in printed if line])[1]
    assert not problems, f"FORMATS.md doesn't show what {command.text} prints: {problems}"


def test_a_plot_must_be_a_png(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["--plot", "formats.svg"])
    printed = capsys.readouterr().err
    assert error.value.code == 2 and re.search(r"--plot: .*\.png.*formats\.svg", printed), (
        f"expected status 2 and one line, got {error.value.code} and {printed!r}. {LOOK.format('FormatsConfig')}"
    )
