"""From a checkpoint's tensors to the decoder's parameters, under Hugging Face's names."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from common.checkpoint import Checkpoint, check_safetensors, load_model
from common.errors import FieldError

from .model import DecoderModel, MergedLinear


def load_decoder(checkpoint: Checkpoint, dtype: torch.dtype, device: str) -> DecoderModel:
    """The decoder with its weights, in eval mode.

    Raises FieldError for an architecture that DecoderModel does not compute, and whatever load_weights raises.
    """
    with torch.device("meta"):  # shapes without memory, so that nothing is initialised only to be overwritten
        model = DecoderModel(checkpoint.config)
    model = model.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    model.rotary_embedding.reset_parameters()
    if checkpoint.directory is None:
        random_weights(model, checkpoint)
    else:
        load_weights(model, checkpoint.directory)
    return model


def load_weights(model: DecoderModel, directory: Path) -> None:
    """Fill every parameter from model.safetensors, or from the shards that model.safetensors.index.json names.

    Raises FieldError for a missing or corrupt file, and whatever fill_parameters raises.
    """
    check_safetensors(directory)
    fill_parameters(model, read_tensors(weight_files(directory)), str(directory))


def random_weights(model: DecoderModel, checkpoint: Checkpoint) -> None:
    """Fill every parameter of a random:<preset> model with the values that transformers' model gets from the seed."""
    fill_parameters(model, random_tensors(checkpoint, model.norm.weight), checkpoint.name)


@torch.no_grad()
def fill_parameters(model: DecoderModel, tensors: Iterable[tuple[str, Tensor]], source: str) -> None:
    """Copy each tensor to its place, converting to the model's dtype and device.

    Raises FieldError naming a tensor that is missing, unknown, given twice or of another shape than its place.
    """
    places = parameter_places(model)
    missing = dict(places)
    for name, tensor in tensors:
        if is_ignored(name, model):
            continue
        if name not in places:
            raise FieldError("model", f"{source}: unknown tensor {name} of shape {list(tensor.shape)}")
        if name not in missing:
            raise FieldError("model", f"{source}: tensor {name} comes twice")
        place = missing.pop(name)
        if tensor.shape != place.shape:
            raise FieldError(
                "model", f"{source}: tensor {name} has shape {list(tensor.shape)}, expected {list(place.shape)}"
            )
        place.copy_(tensor)
    for name, place in missing.items():
        raise FieldError(
            "model", f"{source} lacks {len(missing)} tensors, first {name}, expected of shape {list(place.shape)}"
        )


def parameter_places(model: DecoderModel) -> dict[str, Tensor]:
    """Where each tensor of a checkpoint goes: Hugging Face's name → the parameter, or the rows of a merged one."""
    places: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        owner = path.rpartition(".")[0]
        for kind, parameter in module.named_parameters(recurse=False):  # kind: weight or bias
            if isinstance(module, MergedLinear):
                parts = parameter.split(list(module.outputs.values()))
                for name, rows in zip(module.outputs, parts, strict=True):
                    places[f"model.{owner}.{name}.{kind}"] = rows
            else:
                places[f"{path}.{kind}" if path == "lm_head" else f"model.{path}.{kind}"] = parameter
    return places


def is_ignored(name: str, model: DecoderModel) -> bool:
    """True for what old checkpoints carry along: RoPE's frequencies, and the output's copy of tied embeddings."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and model.lm_head is None)


def weight_files(directory: Path) -> list[Path]:
    """One file or the shards of the index. Raises FieldError if one is missing or the index cannot be read."""
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
            raise FieldError("model", f"{index} names {file.name}, which is not there")
    return files


def read_tensors(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """Name and values of every tensor, one at a time: files are mapped into memory, so no second model piles up."""
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                yield name, tensors.get_tensor(name)


def random_tensors(checkpoint: Checkpoint, like: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The parameters of part 1's random model with like's dtype and device, each dropped once it was taken."""
    source = load_model(checkpoint, like.dtype, str(like.device))
    for name, parameter in source.named_parameters():
        yield name, parameter.data
        parameter.data = parameter.data.new_empty(0)
