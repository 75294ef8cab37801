"""python -m part14_quantization.lab.number_formats: ten number formats, and what a model's numbers become in each.

FORMATS.md explains the tables.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # bytes → dtype


class Limits(NamedTuple):
    """Of a format's positive numbers, without scales. smallest_normal: the smallest one that has all its fraction bits.
    None: there is no such number."""

    largest: float
    smallest_normal: float | None
    smallest: float
    spacing_above_1: float | None


@dataclass(frozen=True, slots=True)
class Format(ABC):
    """A way to store numbers. bits: of each, without its share of a scale."""

    name: str
    bits: int

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
        """Which numbers are above the largest one that can be stored. With most scales, none is."""
        return torch.zeros_like(numbers, dtype=torch.bool)

    def bits_per_number(self, num_columns: int) -> float:
        """With its share of a scale, in rows of num_columns numbers."""
        return self.bits


@dataclass(frozen=True, slots=True)
class FloatFormat(Format):
    """±1.fraction · 2^exponent; with the smallest exponent also ±0.fraction · 2^exponent, the subnormal numbers. dtype:
    torch's, in which they are stored here."""

    exponent_bits: int
    fraction_bits: int
    largest: float
    dtype: torch.dtype

    @property
    def limits(self) -> Limits:
        smallest_normal, spacing = 2.0 ** (2 - 2 ** (self.exponent_bits - 1)), 2.0**-self.fraction_bits
        return Limits(self.largest, smallest_normal, smallest_normal * spacing, spacing)

    def round(self, numbers: Tensor) -> Tensor:
        """To the nearest number. Of two that are equally near, the one whose last bit is 0 ("ties to even")."""
        return numbers.clamp(-self.largest, self.largest).to(self.dtype).float()

    def codes(self, row: Tensor) -> list[str]:
        width, start = 8 * self.dtype.itemsize, 1 + self.exponent_bits
        numbers = self.round(row).to(self.dtype).view(INTEGERS[self.dtype.itemsize]).tolist()
        bits = [f"{number % 2**width:0{width}b}" for number in numbers]
        return [f"{each[0]} {each[1:start]} {each[start : start + self.fraction_bits]}" for each in bits]

    def is_clipped(self, numbers: Tensor) -> Tensor:
        return numbers.abs() > self.largest


@dataclass(frozen=True, slots=True)
class TF32Format(FloatFormat):
    """FP32's exponent and FP16's fraction. GPUs can round FP32 numbers to it in matrix products; in memory, the numbers
    keep 32 bits."""

    def round(self, numbers: Tensor) -> Tensor:
        """Clear the last 13 of FP32's 23 fraction bits. Half a unit of the other 10 is 0x1000 in the 13 bits. Adding
        0xFFF before carries into the 10 bits if the 13 hold more than half a unit. At exactly half a unit, one more
        is needed: we add the last of the 10 bits, so that only odd numbers are rounded up."""
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
class MXFP4Format(FloatFormat):
    """4-bit floats (e2m1). A group of 32 shares a scale: a power of two, whose exponent is stored in 8 bits (e8m0).
    Source: OCP Microscaling Formats (MX) Specification, version 1.0."""

    def scaled(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """The numbers divided by the scale of their group, and the scales, both with groups as a dimension. The largest
        number of a group becomes at least 4, and less than 8."""
        groups = numbers.unflatten(-1, (-1, 32))
        largest = groups.abs().amax(dim=-1, keepdim=True)
        floor_log2 = torch.frexp(largest).exponent - 1
        scale = torch.ldexp(torch.ones_like(largest), (floor_log2 - 2).clamp(-127, 127))
        return groups / scale, scale

    def nearest(self, scaled: Tensor) -> Tensor:
        """The number of E2M1 nearest to each absolute value. Their spacing doubles at 2 and at 4; above 6, it's 6."""
        size = scaled.abs().clamp(max=self.largest)
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
        return (self.scaled(numbers)[0].abs() > self.largest).flatten(-2)

    def bits_per_number(self, num_columns: int) -> float:
        return self.bits + 8 / 32


FP32 = FloatFormat("FP32", 32, 8, 23, torch.finfo(torch.float32).max, torch.float32)
TF32 = TF32Format("TF32", 32, 8, 10, (2 - 2**-10) * 2.0**127, torch.float32)
FP16 = FloatFormat("FP16", 16, 5, 10, 65504.0, torch.float16)
BF16 = FloatFormat("BF16", 16, 8, 7, torch.finfo(torch.bfloat16).max, torch.bfloat16)
E4M3 = FloatFormat("FP8 e4m3", 8, 4, 3, FP8_MAX, torch.float8_e4m3fn)
E5M2 = FloatFormat("FP8 e5m2", 8, 5, 2, 57344.0, torch.float8_e5m2)
INT8 = ScaledFormat("INT8", 8, Scheme(bits=8))
INT4 = ScaledFormat("INT4", 4, Scheme(bits=4, group_size=128), torch.float16)
NF4 = ScaledFormat("NF4", 4, Scheme("nf4", bits=4, group_size=64))
MXFP4 = MXFP4Format("MXFP4", 4, 2, 1, 6.0, torch.float32)
FP8_SCALED = ScaledFormat("FP8 scaled", 8, Scheme("fp8", bits=8))  # with a scale for each row
FORMATS: tuple[Format, ...] = (FP32, TF32, FP16, BF16, E4M3, E5M2, INT8, INT4, NF4, MXFP4)
MEASURED: tuple[Format, ...] = (FP32, TF32, FP16, BF16, E4M3, E5M2, FP8_SCALED, INT8, INT4, NF4, MXFP4)
COMPARED: tuple[Format, ...] = (INT8, FP8_SCALED, INT4, MXFP4)  # with outliers


@dataclass(slots=True)
class Matrix:
    """A matrix of a model and what goes into it. weights: […, columns]. inputs: [n, columns], a sample. max_abs:
    [columns], the largest absolute value of each input feature, in all inputs."""

    name: str
    weights: Tensor
    inputs: Tensor
    max_abs: Tensor

    def add(self, inputs: Tensor) -> None:
        if len(inputs):
            self.inputs = torch.cat([self.inputs, inputs[::KEEP_EVERY]])
            self.max_abs = torch.maximum(self.max_abs, inputs.abs().amax(dim=0))

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
                name, num_columns = f"layers.{number}.{path.removesuffix('.weight')}", weight.shape[-1]
                found.append(Matrix(name, weight.data, torch.zeros(0, num_columns), torch.zeros(num_columns)))
                recorders: list[Any] = [found[-1]] * num_matrices(weight)  # recording() calls their add()
                stack.enter_context(recording(weight, recorders))
            runner.advance(layer)
    return found


class Loss(NamedTuple):
    """error: ‖x - round(x)‖ / ‖x‖. zeros, clipped: shares of all numbers; zeros that weren't 0 before."""

    error: float
    zeros: float
    clipped: float


def mean_loss(number_format: Format, tensors: Sequence[Tensor]) -> Loss:
    """Each tensor counts the same, whatever the size of its numbers."""
    losses = []
    for numbers in tensors:
        rounded = number_format.round(numbers)
        error = (numbers - rounded).norm() / numbers.norm()
        is_zero, is_clipped = (rounded == 0) & (numbers != 0), number_format.is_clipped(numbers)
        losses.append((float(error), float(is_zero.float().mean()), float(is_clipped.float().mean())))
    return Loss(*(sum(each) / len(losses) for each in zip(*losses, strict=True)))


@dataclass(frozen=True, slots=True)
class FormatsConfig:
    model: str = option("tiny", "a shipped model, a directory or a Hugging Face id")
    plot: str | None = option(None, "a .png file for the plot")

    def __post_init__(self) -> None:
        if self.plot is not None and not self.plot.endswith(".png"):
            raise FieldError("plot", f"expected a file that ends in .png, got {self.plot}")


def show(value: float | None, unit: str) -> str:
    if value is None:
        return "–"
    mantissa, exponent = math.frexp(value)
    return (f"2^{exponent - 1}" if mantissa == 0.5 and value < 0.1 else f"{value:.5g}") + unit


def percent(share: float) -> str:
    return f"{100 * share:.2g}%" if share else "0"


def show_table(console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    console.rule(title)
    table = Table(columns[0], box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns[1:]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table, "")


def show_formats(console: Console, num_columns: int) -> None:
    columns = ("format", "bits", "per weight", "largest", "normal", "smallest", "spacing at 1")
    rows = []
    for each in FORMATS:
        layout = f"1+{each.exponent_bits}+{each.fraction_bits}" if isinstance(each, FloatFormat) else str(each.bits)
        bits_per_number = each.bits_per_number(num_columns)
        limits = [show(value, " s" if bits_per_number > each.bits else "") for value in each.limits]
        rows.append([each.name, layout, f"{bits_per_number:g}", *limits])
    show_table(console, f"1. Formats, for rows of {num_columns} weights (s: times the scale)", columns, rows)


def show_codes(console: Console, matrix: Matrix) -> None:
    """What is stored for 0.1 and for three weights: of a row's, the largest one, the median and a small one."""
    numbers = torch.zeros(128)  # whole groups in every format
    numbers[:2] = torch.tensor([0.1, 1.0])
    rows = []
    for each in FORMATS:
        rounded = float(each.round(numbers)[0])
        rows.append([each.name, each.codes(numbers)[0], f"{rounded:.7g}", percent(abs(rounded / 0.1 - 1))])
    columns = ("format", "stored", "number", "error")
    show_table(console, "2. 0.1 in each format, in a row whose largest number is 1", columns, rows)

    row = matrix.weights.flatten(0, -2)[0]
    places, rows = row.abs().argsort()[[-1, len(row) // 2, len(row) // 8]].tolist(), []
    for each in FORMATS[4:]:
        codes, stored = each.codes(row), each.round(row)
        rows.append([each.name, *(f"{codes[place]} → {stored[place]:.4f}" for place in places)])
    weights = [f"{row[place]:.5f}" for place in places]
    show_table(console, f"3. Three weights of a row of {matrix.name}", ("format", *weights), rows)


def show_losses(console: Console, weights: dict[str, Loss], activations: dict[str, Loss]) -> None:
    columns = ("format", "weights", "become 0", "clipped", "activations", "become 0", "clipped")
    rows = [[name, *map(percent, weights[name]), *map(percent, activations[name])] for name in weights]
    show_table(console, "4. Relative rounding error, mean over all matrices", columns, rows)


def show_outliers(console: Console, found: Sequence[Matrix]) -> None:
    """In a model's activations, and in a row that we make: the errors of 255 normal numbers if the first number of the
    row is another one of them, and if it's an outlier."""
    names, rows = [each.name for each in COMPARED], []
    ranked = sorted(found, key=lambda matrix: -matrix.outlier_ratio)
    for matrix in (*ranked[:NUM_WORST], ranked[-1]):
        errors = [percent(mean_loss(each, [matrix.inputs]).error) for each in COMPARED]
        rows.append([matrix.name, f"{matrix.outlier_ratio:.1f}", *errors])
    show_table(console, "5. Input features: largest ÷ median, and errors", ("input of", "ratio", *names), rows)

    ordinary, rows = torch.randn(256, generator=torch.Generator().manual_seed(0)), []
    with_outlier = torch.cat([torch.tensor([100.0]), ordinary[1:]])
    for each in COMPARED:
        before, after = each.round(ordinary)[1:], each.round(with_outlier)[1:]
        errors = [percent(float((x - ordinary[1:]).norm() / ordinary[1:].norm())) for x in (before, after)]
        rows.append([each.name, *errors, percent(float((after == 0).float().mean()))])
    columns = ("format", "error", "beside 100", "become 0")
    show_table(console, "6. 255 normal numbers, and the same ones beside an outlier, 100", columns, rows)


def plot(weights: dict[str, Loss], activations: dict[str, Loss], num_columns: int, path: Path) -> None:
    left = ("Numbers of a format", "number ÷ largest number", "")
    right = ("Error by bits per number", "relative error (%)", "")
    fig, (numbers, errors) = plotting.panels([left, right], height_px=460)
    fp8 = [torch.arange(127, dtype=torch.uint8).view(each.dtype).float() / each.largest for each in (E5M2, E4M3)]
    values = [*fp8, torch.arange(128) / 127, torch.arange(8) / 7, torch.tensor(NF4_LEVELS), torch.tensor(E2M1) / 6]
    for place, each in enumerate(values):
        numbers.vlines(each[(each > 0) & (each <= 1)], place - 0.3, place + 0.3, linewidth=0.8)
    numbers.set(xscale="log", xlim=(1e-4, 1.2), yticks=range(len(values)))
    numbers.set_yticklabels([each.name for each in (E5M2, E4M3, INT8, INT4, NF4, MXFP4)])
    bits = {each.name: each.bits_per_number(num_columns) for each in MEASURED if each is not FP32}
    names = sorted(bits, key=lambda name: -bits[name])
    for losses, offset, style, label in ((weights, -0.13, "o", "weights"), (activations, 0.13, "s", "activations")):
        percents = [100 * losses[name].error for name in names]
        errors.plot(percents, [place + offset for place in range(len(names))], style, label=label)
    errors.set(xscale="log", xlim=(0.01, 40), yticks=range(len(names)))
    errors.set_yticklabels([f"{name}, {bits[name]:.4g}" for name in names])
    errors.legend(loc="lower left")
    for axes in (numbers, errors):
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.invert_yaxis()
    plotting.save(fig, path)


def run(config: FormatsConfig) -> None:
    console, found = Console(width=80), read_matrices(config.model)
    num_columns = found[0].weights.shape[-1]
    weights = {each.name: mean_loss(each, [matrix.weights for matrix in found]) for each in MEASURED}
    activations = {each.name: mean_loss(each, [matrix.inputs for matrix in found]) for each in MEASURED}
    show_formats(console, num_columns)
    show_codes(console, found[0])
    show_losses(console, weights, activations)
    show_outliers(console, found)
    if config.plot:
        plot(weights, activations, num_columns, Path(config.plot))


def main(argv: Sequence[str] | None = None) -> None:
    exit_on_error(PROG, lambda: run(parse_config(FormatsConfig, __doc__ or "", prog=PROG, argv=argv)))


if __name__ == "__main__":
    main()
