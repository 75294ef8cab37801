"""Read the tensors of a checkpoint one by one, in full or in part."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from common.checkpoint import (
    FLOAT_DTYPES,
    Checkpoint,
    check_finite,
    check_not_quantized,
    check_safetensors,
    load_model,
)
from common.errors import FieldError

ALL_DTYPES = (*FLOAT_DTYPES, "F8_E4M3", "I8", "U8", "I32", "I64")
NUM_SAMPLES, SAMPLE_BYTES = 256, 4_096  # of a weight file, for its fingerprint


def open_checkpoint(
    checkpoint: Checkpoint, dtype: torch.dtype, device: str, stack: ExitStack, may_be_quantized: bool = False
) -> CheckpointReader:
    """Open a checkpoint. stack closes its files; dtype and device apply to the tensors of a random:<preset>.

    Raises FieldError for a quantized one if it may not be.
    """
    if checkpoint.directory is None:
        return RandomReader(checkpoint, dtype, device)
    if not may_be_quantized:
        check_not_quantized(checkpoint)
    return SafetensorsReader(checkpoint.directory, stack, ALL_DTYPES if may_be_quantized else FLOAT_DTYPES)


class CheckpointReader(Protocol):
    """source: its name in error messages. unread: names of the tensors that have not been read yet. num_bytes_read: of
    the parts of tensors that were read."""

    source: str
    unread: set[str]
    num_bytes_read: int

    def read(
        self, name: str, shape: tuple[int, ...], index: tuple[slice, ...] = (), dtypes: Sequence[str] = FLOAT_DTYPES
    ) -> Tensor:
        """Read a tensor, or the part that index selects. shape: of the full tensor. dtypes: those that it may have.
        Raises FieldError."""
        ...

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """A tensor's shape; None if there is no such tensor."""
        ...


class SafetensorsReader:
    """Reads model.safetensors, or the shards that model.safetensors.index.json names. Files are mapped into memory, and
    only the bytes asked for are read. stack: closes the files. dtypes: of all tensors in them. files: only these.
    is_checking: whether it looks for NaN and infinity."""

    def __init__(
        self, directory: Path, stack: ExitStack, dtypes: Sequence[str] = FLOAT_DTYPES, files: Sequence[Path] = ()
    ) -> None:
        files = files or weight_files(directory)
        check_safetensors(directory, dtypes, files)
        self.source = str(directory)
        self._files: dict[str, Any] = {}
        for path in files:
            file = stack.enter_context(safe_open(path, framework="pt"))
            for name in file.keys():  # noqa: SIM118
                if name in self._files:
                    raise FieldError("model", f"{self.source}: tensor {name} is stored twice")
                self._files[name] = file
        self.unread, self.num_bytes_read = set(self._files), 0
        self.is_checking = True

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        return tuple(self._files[name].get_slice(name).get_shape()) if name in self._files else None

    def read(
        self, name: str, shape: tuple[int, ...], index: tuple[slice, ...] = (), dtypes: Sequence[str] = FLOAT_DTYPES
    ) -> Tensor:
        if name not in self._files:
            raise FieldError("model", f"{self.source} lacks the tensor {name} (expected shape {list(shape)})")
        stored = self._files[name].get_slice(name)
        check_shape(self.source, name, tuple(stored.get_shape()), shape)
        if stored.get_dtype() not in dtypes:
            expected = ", ".join(dtypes)
            raise FieldError(
                "model", f"{self.source}: tensor {name} is stored as {stored.get_dtype()}, expected one of {expected}"
            )
        self.unread.discard(name)
        tensor = stored[index] if index else stored[:]
        self.num_bytes_read += tensor.nbytes
        if self.is_checking:
            check_finite(self.source, name, tensor)
        return tensor


class RandomReader:
    """Reads the random weights of a random:<preset>: the same values as in part 1's model of that name."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: str) -> None:
        self.source = checkpoint.name
        parameters = load_model(checkpoint, dtype, device).named_parameters()
        self._parameters = dict(each for named in parameters for each in as_stored(*named))
        self.unread, self.num_bytes_read = set(self._parameters), 0

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        return tuple(self._parameters[name].shape) if name in self._parameters else None

    def read(
        self, name: str, shape: tuple[int, ...], index: tuple[slice, ...] = (), dtypes: Sequence[str] = FLOAT_DTYPES
    ) -> Tensor:
        """Return each tensor once and drop it, so that memory never holds two copies of the model."""
        parameter = self._parameters.pop(name)
        check_shape(self.source, name, tuple(parameter.shape), shape)
        self.unread.discard(name)
        part = parameter[index]
        self.num_bytes_read += part.nbytes
        return part


def as_stored(name: str, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint has for a parameter: transformers stacks the experts of a layer, and stores each by itself."""
    owner, _, kind = name.rpartition(".")
    if not owner.endswith(".experts"):
        yield name, parameter.data
        return
    for expert, weight in enumerate(parameter.data):
        parts = weight.chunk(2) if kind == "gate_up_proj" else (weight,)
        names = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
        for part_name, part in zip(names, parts, strict=True):
            yield f"{owner}.{expert}.{part_name}.weight", part


def fingerprint(checkpoint: Checkpoint) -> str:
    """A hash that tells checkpoints apart without reading all of them: of the config, and of each weight file's size,
    its beginning with the tensors' names and shapes, and samples from all over it.
    """
    digest = hashlib.sha256(checkpoint.config.to_json_string().encode())
    if checkpoint.directory is None:
        digest.update(checkpoint.name.encode())
        return digest.hexdigest()
    for path in weight_files(checkpoint.directory):
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "big"))
        with path.open("rb") as file:
            for sample in range(NUM_SAMPLES):
                file.seek(size * sample // NUM_SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def check_shape(source: str, name: str, stored: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if stored != expected:
        raise FieldError("model", f"{source}: tensor {name} has shape {list(stored)}, expected {list(expected)}")


def weight_files(directory: Path) -> list[Path]:
    """model.safetensors, or the shards in the index. Raises FieldError for a missing file or an invalid index."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise FieldError("model", f"{directory} has neither {single.name} nor {index.name}")
    try:
        files = [directory / name for name in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FieldError("model", f"{index} has no readable weight_map: {type(error).__name__}: {error}") from error
    for file in files:
        if not file.is_file():
            raise FieldError("model", f"{index} lists {file.name}, which is missing")
    return files
