"""python -m part14_quantization.lab.number_formats: ten number formats, and what a model's numbers become in each.

FORMATS.md explains the tables.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from common import plotting
from common.checkpoint import check_not_quantized, load_tokenizer, resolve_checkpoint
from common.cli import exit_on_error, option, parse_config
from common.corpus import calibration_rows
from common.errors import FieldError

from ..worker.quantization.calibration import TextRunner, matrices, num_matrices, recording
from ..worker.quantization.scheme import FP8_MAX, NF4_LEVELS, Scheme, dequantize, quantize
from ..worker.weights import load_decoder

PROG = "part14_quantization.lab.number_formats"
ROW_TOKENS, MAX_ROWS = 256, 16  # of the calibration texts
KEEP_EVERY = 16  # of the inputs of a matrix
NUM_WORST = 3  # matrices in the table of outliers
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # bytes → a dtype of the same size


class Limits(NamedTuple):
    """Of the positive numbers of a format, before they are multiplied with a scale. None: there is no such number."""

    largest: float
    smallest_normal: float | None
    smallest: float
    spacing_above_1: float | None


@dataclass(frozen=True, slots=True)
class Format(ABC):
    """A way to store numbers. bits: of each, without its share of a scale. layout: sign + exponent + fraction bits."""

    name: str
    bits: int
    layout: str

    @property
    @abstractmethod
    def limits(self) -> Limits: ...

    @abstractmethod
    def round(self, numbers: Tensor) -> Tensor:
        """What the numbers are after they were stored. numbers: […, columns], float32; returns the same. If there are
        scales, a row, or a group of neighboring columns, shares one."""

    @abstractmethod
    def codes(self, row: Tensor) -> list[str]:
        """What is stored for each number, for people to read. row: [columns]"""

    def is_clipped(self, numbers: Tensor) -> Tensor:
        """Which numbers are above the largest one. None, if scales are chosen so."""
        return torch.zeros_like(numbers, dtype=torch.bool)

    def bits_per_number(self, num_columns: int) -> float:
        """With its share of a scale, in rows of num_columns numbers."""
        return self.bits


@dataclass(frozen=True, slots=True)
class FloatFormat(Format):
    """±1.fraction · 2^exponent. Below the smallest exponent come ±0.fraction · 2^smallest: subnormal numbers."""

    largest: float
    dtype: torch.dtype

    @property
    def limits(self) -> Limits:
        _, exponent_bits, fraction_bits = map(int, self.layout.split("+"))
        smallest_normal, spacing = 2.0 ** (2 - 2 ** (exponent_bits - 1)), 2.0**-fraction_bits
        return Limits(self.largest, smallest_normal, smallest_normal * spacing, spacing)

    def round(self, numbers: Tensor) -> Tensor:
        """To the nearest number. Of two that are equally near, the one whose last bit is 0 ("ties to even")."""
        return numbers.clamp(-self.largest, self.largest).to(self.dtype).float()

    def codes(self, row: Tensor) -> list[str]:
        _, exponent_bits, fraction_bits = map(int, self.layout.split("+"))
        width, start = 8 * self.dtype.itemsize, 1 + exponent_bits
        numbers = self.round(row).to(self.dtype).view(INTEGERS[self.dtype.itemsize]).tolist()
        bits = [f"{number % 2**width:0{width}b}" for number in numbers]
        return [f"{each[0]} {each[1:start]} {each[start : start + fraction_bits]}" for each in bits]

    def is_clipped(self, numbers: Tensor) -> Tensor:
        return numbers.abs() > self.largest


@dataclass(frozen=True, slots=True)
class TF32Format(FloatFormat):
    """FP32's exponent and FP16's fraction. Matrix products on GPUs can read FP32 numbers so; in memory they stay
    FP32."""

    def round(self, numbers: Tensor) -> Tensor:
        """Clear the last 13 of FP32's 23 fraction bits, after adding a bit less than half of what they can hold: that
        carries into the other 10 if the 13 hold more than half. If they hold exactly half, the carry needs one more,
        which is the last bit of the 10: it makes an odd number even."""
        bits = numbers.clamp(-self.largest, self.largest).contiguous().view(torch.int32)
        last_bit = bits >> 13 & 1
        return ((bits + 0xFFF + last_bit) & ~0x1FFF).view(torch.float32)


@dataclass(frozen=True, slots=True)
class ScaledFormat(Format):
    """Codes times a scale, as in this engine: see worker/quantization/scheme.py."""

    scheme: Scheme
    scale_dtype: torch.dtype = torch.float32

    @property
    def limits(self) -> Limits:
        if self.scheme.kind == "nf4":
            return Limits(1.0, None, min(level for level in NF4_LEVELS if level > 0), None)
        return E4M3.limits if self.scheme.kind == "fp8" else Limits(self.scheme.max_code, None, 1.0, 1.0)

    def round(self, numbers: Tensor) -> Tensor:
        return dequantize(quantize(numbers, self.scheme, self.scale_dtype), self.scheme)

    def codes(self, row: Tensor) -> list[str]:
        codes = quantize(row, self.scheme, self.scale_dtype).codes.tolist()
        return [f"level {code + 8}" if self.scheme.kind == "nf4" else str(code) for code in codes]

    def bits_per_number(self, num_columns: int) -> float:
        return self.bits + 8 * self.scale_dtype.itemsize * self.scheme.num_groups(num_columns) / num_columns


@dataclass(frozen=True, slots=True)
class MXFP4Format(Format):
    """4-bit floats, e2m1, 32 of which share a scale: a power of two, of which 8 bits store the exponent. Source: OCP
    Microscaling Formats (MX) Specification 1.0."""

    groups: Scheme = field(default_factory=lambda: Scheme(bits=4, group_size=32))  # only to split rows

    @property
    def limits(self) -> Limits:
        return Limits(6.0, 1.0, 0.5, 0.5)

    def scaled(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """The numbers divided by the scale of their group, which brings the largest one between 4 and 8; the scales."""
        groups = self.groups.split(numbers)
        largest = groups.abs().amax(dim=-1, keepdim=True)
        floor_log2 = torch.frexp(largest).exponent - 1
        scale = torch.ldexp(torch.ones_like(largest), (floor_log2 - 2).clamp(-127, 127))
        return groups / scale, scale

    def nearest(self, scaled: Tensor) -> Tensor:
        """The nearest number of E2M1 for each absolute value: 6 if it's larger. Their spacing doubles at 2 and at 4."""
        size = scaled.abs().clamp(max=6)
        spacing = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
        return (size / spacing).round() * spacing  # round(): ties to even

    def round(self, numbers: Tensor) -> Tensor:
        scaled, scale = self.scaled(numbers)
        return (self.nearest(scaled) * scaled.sign() * scale).flatten(-2)

    def codes(self, row: Tensor) -> list[str]:
        scaled = self.scaled(row)[0].flatten()
        codes = torch.searchsorted(torch.tensor(E2M1), self.nearest(scaled)).tolist()
        return [f"{int(x < 0)} {code >> 1:02b} {code & 1}" for x, code in zip(scaled.tolist(), codes, strict=True)]

    def is_clipped(self, numbers: Tensor) -> Tensor:
        return (self.scaled(numbers)[0].abs() > 6).flatten(-2)

    def bits_per_number(self, num_columns: int) -> float:
        return self.bits + 8 * self.groups.num_groups(num_columns) / num_columns


FP32 = FloatFormat("FP32", 32, "1+8+23", torch.finfo(torch.float32).max, torch.float32)
TF32 = TF32Format("TF32", 32, "1+8+10", (2 - 2**-10) * 2.0**127, torch.float32)
FP16 = FloatFormat("FP16", 16, "1+5+10", 65504.0, torch.float16)
BF16 = FloatFormat("BF16", 16, "1+8+7", torch.finfo(torch.bfloat16).max, torch.bfloat16)
E4M3 = FloatFormat("FP8 e4m3", 8, "1+4+3", FP8_MAX, torch.float8_e4m3fn)
E5M2 = FloatFormat("FP8 e5m2", 8, "1+5+2", 57344.0, torch.float8_e5m2)
INT8 = ScaledFormat("INT8", 8, "8", Scheme(bits=8))
INT4 = ScaledFormat("INT4", 4, "4", Scheme(bits=4, group_size=128), torch.float16)
NF4 = ScaledFormat("NF4", 4, "4", Scheme("nf4", bits=4, group_size=64))
MXFP4 = MXFP4Format("MXFP4", 4, "1+2+1")
FP8_SCALED = ScaledFormat("FP8 scaled", 8, "1+4+3", Scheme("fp8", bits=8))  # with a scale for each row
FORMATS: tuple[Format, ...] = (FP32, TF32, FP16, BF16, E4M3, E5M2, INT8, INT4, NF4, MXFP4)
MEASURED: tuple[Format, ...] = (FP32, TF32, FP16, BF16, E4M3, E5M2, FP8_SCALED, INT8, INT4, NF4, MXFP4)

COMPARED: tuple[Format, ...] = (INT8, FP8_SCALED, INT4, MXFP4)  # with outliers


@dataclass(slots=True)
class Matrix:
    """A matrix of a model and what goes into it. weights: […, columns]. rows: a sample of its inputs, [n, columns]
    each. max_abs: [columns], the largest absolute value of each input feature."""

    name: str
    weights: Tensor
    max_abs: Tensor = field(default_factory=lambda: torch.zeros(()))
    rows: list[Tensor] = field(default_factory=list)

    def add(self, inputs: Tensor) -> None:
        if len(inputs):
            self.rows.append(inputs[::KEEP_EVERY])
            self.max_abs = torch.maximum(self.max_abs, inputs.abs().amax(dim=0))

    @property
    def inputs(self) -> Tensor:
        return torch.cat(self.rows)

    @property
    def outlier_ratio(self) -> float:
        return float(self.max_abs.max() / self.max_abs.median())


def read_matrices(model_name: str) -> list[Matrix]:
    """The matrices of all layers, with their inputs while the model reads calibration texts. Raises FieldError."""
    checkpoint = resolve_checkpoint(model_name)
    check_not_quantized(checkpoint)
    model = load_decoder(checkpoint, torch.float32, "cpu")
    runner = TextRunner(model, calibration_rows(load_tokenizer(checkpoint), ROW_TOKENS, MAX_ROWS))
    found = list[Matrix]()
    for number, layer in model.layers.items():
        with contextlib.ExitStack() as stack:
            for path, weight in matrices(layer).items():
                found.append(Matrix(f"layers.{number}.{path.removesuffix('.weight')}", weight.data))
                recorders: list[Any] = [found[-1]] * num_matrices(weight)  # recording() calls their add()
                stack.enter_context(recording(weight, recorders))
            runner.advance(layer)
    return found


class Loss(NamedTuple):
    """error: ‖x - round(x)‖ / ‖x‖. zeros, clipped: shares of all numbers; zeros that weren't 0 before."""

    error: float
    zeros: float
    clipped: float


def loss(number_format: Format, numbers: Tensor) -> Loss:
    rounded = number_format.round(numbers)
    is_zero, is_clipped = (rounded == 0) & (numbers != 0), number_format.is_clipped(numbers)
    error = float((numbers - rounded).norm() / numbers.norm())
    return Loss(error, float(is_zero.float().mean()), float(is_clipped.float().mean()))


def mean_loss(number_format: Format, tensors: Sequence[Tensor]) -> Loss:
    """Each tensor counts the same, whatever the size of its numbers."""
    losses = [loss(number_format, numbers) for numbers in tensors]
    return Loss(*(sum(each) / len(losses) for each in zip(*losses, strict=True)))


@dataclass(frozen=True, slots=True)
class FormatsConfig:
    model: str = option("tiny", "a shipped model, a directory or a Hugging Face id")
    plot: str | None = option(None, "a .png file for the plot")

    def __post_init__(self) -> None:
        if self.plot is not None and not self.plot.endswith(".png"):
            raise FieldError("plot", f"expected a file that ends in .png, got {self.plot}")


def fp8_numbers(number_format: FloatFormat) -> Tensor:
    """All its positive numbers, as shares of the largest one."""
    numbers = torch.arange(1, 128, dtype=torch.uint8).view(number_format.dtype).float()
    return numbers[numbers <= number_format.largest] / number_format.largest  # without infinity and NaN


def show(value: float | None) -> str:
    if value is None:
        return "–"
    mantissa, exponent = math.frexp(value)
    return f"2^{exponent - 1}" if mantissa == 0.5 and value < 0.1 else f"{value:.5g}"


def percent(share: float) -> str:
    return f"{100 * share:.2g}%" if share else "0"


def format_rows(num_columns: int) -> Iterator[list[str]]:
    for each in FORMATS:
        unit = "" if isinstance(each, FloatFormat) else " s"
        limits = [show(value) + (unit if value else "") for value in each.limits]
        yield [each.name, each.layout, f"{each.bits_per_number(num_columns):g}", *limits]


def tenth_rows() -> Iterator[list[str]]:
    row = torch.zeros(128)  # a row that has whole groups in all formats
    row[:2] = torch.tensor([0.1, 1.0])
    for each in FORMATS:
        rounded = float(each.round(row)[0])
        yield [each.name, each.codes(row)[0], f"{rounded:.7g}", percent(abs(rounded / 0.1 - 1))]


def stored_rows(row: Tensor, columns: Sequence[int]) -> Iterator[list[str]]:
    for each in FORMATS[4:]:
        codes, rounded = each.codes(row), each.round(row)
        yield [each.name, *(f"{codes[column]} → {rounded[column]:.4f}" for column in columns)]


def loss_rows(weights: dict[str, Loss], activations: dict[str, Loss]) -> Iterator[list[str]]:
    for name in weights:
        yield [name, *map(percent, weights[name]), *map(percent, activations[name])]


def matrix_rows(worst: Iterable[Matrix]) -> Iterator[list[str]]:
    for each in worst:
        errors = [loss(number_format, each.inputs).error for number_format in COMPARED]
        yield [each.name, f"{each.outlier_ratio:.1f}", *map(percent, errors)]


def outlier_rows() -> Iterator[list[str]]:
    """What becomes of 255 normal numbers, in a row with another one like them, and in a row with an outlier."""
    ordinary = torch.randn(256, generator=torch.Generator().manual_seed(0))
    with_outlier = torch.cat([torch.tensor([100.0]), ordinary[1:]])
    for each in COMPARED:
        before, after = each.round(ordinary)[1:], each.round(with_outlier)[1:]
        errors = [float((x - ordinary[1:]).norm() / ordinary[1:].norm()) for x in (before, after)]
        yield [each.name, *map(percent, errors), percent(float((after == 0).float().mean()))]


def show_table(console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    console.rule(title)
    table = Table(columns[0], box=SIMPLE_HEAD, pad_edge=False)
    for column in columns[1:]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def plot(weights: dict[str, Loss], activations: dict[str, Loss], num_columns: int, path: Path) -> None:
    titles = [
        ("Numbers of a format", "number ÷ largest number", ""),
        ("Bits and rounding error", "relative error (%)", ""),
    ]
    fig, (numbers, errors) = plotting.panels(titles, height_px=460)
    values = {"FP8 e5m2": fp8_numbers(E5M2), "FP8 e4m3": fp8_numbers(E4M3), "INT8": torch.arange(1, 128) / 127}
    values |= {"INT4": torch.arange(1, 8) / 7, "NF4": torch.tensor(NF4_LEVELS[8:]), "MXFP4": torch.tensor(E2M1[1:]) / 6}
    for place, each in enumerate(values.values()):
        numbers.vlines(each, place - 0.3, place + 0.3, linewidth=0.8, color=plotting.COLORS[0])
    numbers.set(xlim=(1e-4, 1.2), yticks=range(len(values)), yticklabels=list(values))
    bits = {each.name: each.bits_per_number(num_columns) for each in MEASURED if each is not FP32}
    names = sorted(bits, key=lambda name: -bits[name])
    for losses, offset, marker, label in ((weights, -0.13, "o", "weights"), (activations, 0.13, "s", "activations")):
        percents = [100 * losses[name].error for name in names]
        errors.plot(percents, [place + offset for place in range(len(names))], marker, label=label)
    labels = [f"{name}, {bits[name]:.4g}" for name in names]
    errors.set(xlim=(0.01, 40), yticks=range(len(names)), yticklabels=labels)
    errors.legend(loc="lower left")
    for axes in (numbers, errors):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.invert_yaxis()
    plotting.save(fig, path)


def run(config: FormatsConfig) -> None:
    console, found = Console(width=80), read_matrices(config.model)
    weights = {each.name: mean_loss(each, [matrix.weights for matrix in found]) for each in MEASURED}
    activations = {each.name: mean_loss(each, [matrix.inputs for matrix in found]) for each in MEASURED}
    first, num_columns = found[0].weights.flatten(0, -2)[0], found[0].weights.shape[-1]
    columns = first.abs().argsort(descending=True)[[0, num_columns // 2, -num_columns // 8]].tolist()
    ranked = sorted(found, key=lambda matrix: matrix.outlier_ratio, reverse=True)

    limits = ("largest", "smallest normal", "smallest", "spacing above 1")
    show_table(console, "1. Formats", ("format", "bits", "per weight", *limits), format_rows(num_columns))
    console.print(f"bits: sign+exponent+fraction; per weight: rows of {num_columns}, with scales; s: the scale\n")
    heads = ("format", "stored", "number", "error")
    show_table(console, "2. 0.1 in each format (in a row whose largest number is 1)", heads, tenth_rows())
    heads = ("format", *(f"{first[column]:.5f}" for column in columns))
    show_table(console, f"3. Three weights of a row of {found[0].name}", heads, stored_rows(first, columns))
    heads = ("format", "weights", "became 0", "clipped", "activations", "became 0", "clipped")
    show_table(console, f"4. Relative rounding error, {config.model}", heads, loss_rows(weights, activations))
    heads = ("input of", "largest/median", *(each.name for each in COMPARED))
    show_table(
        console, "5. The largest input feature, and errors", heads, matrix_rows(ranked[:NUM_WORST] + ranked[-1:])
    )
    heads = ("format", "error of 255 numbers", "with 100 in the row", "became 0")
    show_table(console, "6. What an outlier does to the other numbers", heads, outlier_rows())
    if config.plot:
        plot(weights, activations, num_columns, Path(config.plot))


def main(argv: Sequence[str] | None = None) -> None:
    exit_on_error(PROG, lambda: run(parse_config(FormatsConfig, __doc__ or "", prog=PROG, argv=argv)))


if __name__ == "__main__":
    main()
