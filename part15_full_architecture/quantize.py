"""python -m part15_full_architecture.quantize: write a quantized checkpoint, layer by layer."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.checkpoint import check_not_quantized, default_device, load_tokenizer, resolve_checkpoint
from common.checkpoint_reader import ALL_DTYPES, SafetensorsReader, fingerprint
from common.cli import argument, check_minimums, exit_on_error, option, parse_config, required
from common.corpus import calibration_rows
from common.errors import FieldError

from .worker.quantization.calibration import TextRunner, matrices
from .worker.quantization.choice import QuantizationFlags, prepare_layers
from .worker.quantization.method import Method
from .worker.quantization.scheme import Scheme
from .worker.quantization.weight import QuantizedWeight
from .worker.quantization.writers import CompressedTensorsWriter, GPTQWriter, Writer, other_tensors, split_codes
from .worker.weight_offload import load_weights
from .worker.weights import load_decoder

PROG = "part15_full_architecture.quantize"
STATE, INDEX = "quantize.json", "model.safetensors.index.json"
OTHER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "merges.txt", "vocab.json", "vocab.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class QuantizeConfig:
    """Raises FieldError naming a flag that is out of range, or flags that don't go together."""

    model: str = argument("a shipped model, a directory, a Hugging Face id or random:<preset>")
    out: str = required("the directory for the checkpoint; a run that was interrupted continues there")
    method: Literal["rtn", "gptq", "awq", "smoothquant"] = option(
        "gptq", "rtn: round to nearest; smoothquant: for W8A8"
    )
    bits: int = option(4, "of a weight: 4 or 8")
    group_size: int = option(128, "weights of a row that share a scale (-1: all)")
    symmetric: bool = option(True, "scales without zero points")
    format: Literal["int", "fp8"] = option("int", "fp8: floats of 8 bits, with rtn")
    activations: Literal["none", "int8"] = option("none", "int8: W8A8, which needs 8 bits and group size -1")
    layout: Literal["compressed-tensors", "gptq"] = option("compressed-tensors", "how the codes are stored")
    num_rows: int = option(128, "calibration: at most so many rows of text", 1)
    row_tokens: int = option(256, "calibration: tokens in a row", 1)
    device: str | None = option(None, "cpu or cuda (None: cuda if there is one)")

    def __post_init__(self) -> None:
        check_minimums(self)
        if not self.out:
            raise FieldError("out", "expected a directory, got an empty string")
        if self.bits not in (4, 8):
            raise FieldError("bits", f"expected 4 or 8, got {self.bits}")
        if self.group_size != -1 and (self.group_size < 2 or self.group_size % 2):
            raise FieldError("group_size", f"expected -1 or an even number above 0, got {self.group_size}")
        is_w8a8 = self.method == "smoothquant" or self.activations == "int8"
        if is_w8a8 and (self.bits, self.group_size, self.symmetric, self.format) != (8, -1, True, "int"):
            raise FieldError("activations", "W8A8 needs --bits 8 --group-size -1, symmetric, and --format int")
        if self.format == "fp8" and (self.bits, self.group_size, self.method, self.symmetric) != (8, -1, "rtn", True):
            raise FieldError("format", "fp8 needs --bits 8 --group-size -1 --method rtn, symmetric")
        if self.device is not None and (
            self.device.split(":")[0] not in ("cpu", "cuda") or (self.device != "cpu" and default_device() == "cpu")
        ):
            raise FieldError("device", f"expected cpu, or cuda where torch sees a GPU, got {self.device!r}")
        if self.layout == "gptq" and (self.format == "fp8" or is_w8a8):
            raise FieldError("layout", "gptq has only integers, and no activations: expected compressed-tensors")

    @property
    def scheme(self) -> Scheme:
        group_size = None if self.group_size == -1 else self.group_size
        if self.method == "smoothquant" or self.activations == "int8":
            return Scheme(bits=8, activations="int8")
        return Scheme(self.format, self.bits, group_size, self.symmetric)

    def writer(self, dtype: torch.dtype) -> Writer:
        """dtype: of the checkpoint's other tensors."""
        return GPTQWriter(self.scheme) if self.layout == "gptq" else CompressedTensorsWriter(self.scheme, dtype)


class Quantizer:
    """Quantizes a model's layers, one after the other. Each is a file; with the files of the first layers, the run can
    be continued. num_bytes: of all matrices, as codes and scales; num_weights: how many numbers they are."""

    def __init__(self, config: QuantizeConfig) -> None:
        self.config, self.out, self.checkpoint = config, Path(config.out), resolve_checkpoint(config.model)
        if self.checkpoint.directory is not None:
            check_not_quantized(self.checkpoint)
        self.dtype = getattr(self.checkpoint.config, "dtype", None) or torch.float32
        self.writer = config.writer(self.dtype)
        self.method = Method(config.method, config.scheme, self.writer.scale_dtype)
        self.model = load_decoder(self.checkpoint, torch.float32, config.device or default_device())
        self.num_bytes = self.num_weights = 0
        self._check_groups()
        self._lock = prepare_directory(self.out, self.state)

    def _check_groups(self) -> None:
        """Raises FieldError if a matrix can't be divided into whole groups."""
        for name, layer in self.model.layers.items():
            for path, weight in matrices(layer).items():
                if self.config.group_size > 0 and weight.shape[-1] % self.config.group_size:
                    raise FieldError(
                        "group_size", f"expected a divisor of {weight.shape[-1]}, the input features of "
                        f"layers.{name}.{path}, got {self.config.group_size}",
                    )  # fmt: skip

    @property
    def state(self) -> dict[str, Any]:
        """What must be the same when a run is continued."""
        settings = {
            name: value for name, value in asdict(self.config).items() if name not in ("out", "device", "model")
        }
        return {"checkpoint": fingerprint(self.checkpoint), **settings}

    @property
    def num_files(self) -> int:
        """One for each layer, and one for what isn't in layers."""
        return len(self.model.layers) + 1

    def file(self, number: int) -> Path:
        return self.out / f"model-{number + 1:05}-of-{self.num_files:05}.safetensors"

    @torch.inference_mode()
    def run(self, report: Progress) -> None:
        with self._lock:
            task = report.add_task(self.config.method, total=len(self.model.layers))
            text = TextRunner(self.model, self._rows())
            for number, (name, layer) in enumerate(self.model.layers.items()):
                path = f"model.layers.{name}"
                if not self._has_file(number):
                    stats = text.measure(layer) if self.method.needs_text else {}
                    write_tensors(self._quantize(layer, path, stats), self.file(number))
                self._load(layer, path, self.file(number))
                text.advance(layer)
                report.advance(task)
            write_tensors(dict(self._outside()), self.file(self.num_files - 1))
            self._finish()

    def _rows(self) -> list[list[int]]:
        """The text to calibrate on."""
        if not self.method.needs_text:
            return []
        row_tokens = min(self.config.row_tokens, self.checkpoint.max_model_len)
        return calibration_rows(load_tokenizer(self.checkpoint), row_tokens, self.config.num_rows)

    def _has_file(self, number: int) -> bool:
        """Whether an interrupted run has written this layer."""
        try:
            return self.file(number).is_file() and bool(load_file(self.file(number)))
        except SafetensorError:
            return False

    def _quantize(self, layer: Any, path: str, stats: Any) -> dict[str, Tensor]:
        found = self.method.quantize_layer(layer, stats)
        tensors: dict[str, Tensor] = {}
        for name, codes in split_codes(layer, path, found, self.checkpoint.config):
            tensors |= self.writer.tensors(name, codes)
        for name, tensor in other_tensors(layer, path, self.checkpoint.config):
            tensors[name] = tensor.to(self.dtype)
        return tensors

    def _load(self, layer: nn.Module, path: str, file: Path) -> None:
        """Replace the layer's weights by those in a file, so that the layers after it see what an engine will
        compute."""
        with ExitStack() as stack:
            reader = SafetensorsReader(self.out, stack, ALL_DTYPES, [file])
            config = SimpleNamespace(**self.checkpoint.config.to_dict(), quantization_config=self.writer.settings())
            with torch.device(self.model.device):
                prepare_layers(layer, config, QuantizationFlags(), path)
            load_weights(layer, reader, path)
        for module in layer.modules():
            if isinstance(module, QuantizedWeight):
                self.num_bytes += sum(parameter.nbytes for parameter in module.parameters())
                self.num_weights += prod(module.shape)

    def _outside(self) -> Iterator[tuple[str, Tensor]]:
        """What isn't in layers: as it is."""
        model = self.model
        for name, module in (
            ("model.embed_tokens", model.embed_tokens),
            ("model.norm", model.norm),
            ("lm_head", model.lm_head),
        ):
            if module is not None:
                yield f"{name}.weight", module.weight.to(self.dtype)

    def _finish(self) -> None:
        """What makes the files a checkpoint: the index, the tokenizer and, last, the config."""
        names = {name: file.name for file in map(self.file, range(self.num_files)) for name in tensor_names(file)}
        size = sum(
            tensor.nbytes for number in range(self.num_files) for tensor in load_file(self.file(number)).values()
        )
        write_json({"metadata": {"total_size": size}, "weight_map": names}, self.out / INDEX)
        for file in sorted(self.checkpoint.tokenizer_directory.iterdir()):
            if file.name in OTHER_FILES:
                shutil.copyfile(file, self.out / file.name)
        config = self.checkpoint.config.to_dict()
        if self.checkpoint.directory is not None:
            config = json.loads((self.checkpoint.directory / "config.json").read_text("utf-8"))
        write_json({**config, "quantization_config": self.writer.settings()}, self.out / "config.json")
        (self.out / STATE).unlink()


def prepare_directory(out: Path, state: dict[str, Any]) -> TextIO:
    """Make the directory, or find there what an interrupted run has left. Returns the file that says what is being
    written; no other run can write there while it is open. Raises FieldError if the directory has something else."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise FieldError("out", f"{out} is not a directory") from error
    except OSError as error:
        raise FieldError("out", f"cannot make {out}: {error.strerror}") from error
    file = out / STATE
    if not file.is_file() and any(out.iterdir()):
        raise FieldError("out", f"{out} isn't empty: expected an empty or a new directory")
    lock = file.open("a+", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise FieldError("out", f"another run is writing to {out}") from error
    lock.seek(0)
    text = lock.read()
    if (text or len(list(out.iterdir())) > 1) and not is_state(text, state):
        raise FieldError(
            "out", f"{out} has an unfinished run with another model or other flags: expected another directory"
        )
    if not text:
        lock.write(json.dumps(state) + "\n")
        lock.flush()
    return lock


def is_state(text: str, state: dict[str, Any]) -> bool:
    try:
        return bool(json.loads(text) == state)
    except ValueError:
        return False


def write_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """So that the file is there in whole, or not at all."""
    unfinished = file.with_suffix(".unfinished")
    try:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, unfinished, {"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"cannot write {unfinished}: {error}") from error
    replace(unfinished, file)


def write_json(value: Any, file: Path) -> None:
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")
    replace(unfinished, file)


def replace(unfinished: Path, file: Path) -> None:
    """Give a file its name when all of it is on the disk."""
    with unfinished.open("rb") as written:
        os.fsync(written.fileno())
    unfinished.replace(file)


def tensor_names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def run(config: QuantizeConfig) -> None:
    console = Console(width=80)
    quantizer = Quantizer(config)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("layers"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        quantizer.run(progress)
    bits = 8 * quantizer.num_bytes / quantizer.num_weights
    console.print(
        f"{quantizer.num_weights:,} weights of linear layers: {bits:.2f} bits each with scales, "
        f"{16 / bits:.2f} times smaller than bfloat16. The checkpoint is in {config.out}",
        highlight=False,
    )


def main() -> None:
    exit_on_error(PROG, lambda: run(parse_config(QuantizeConfig, __doc__ or "", prog=PROG)))


if __name__ == "__main__":
    main()
