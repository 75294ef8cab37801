"""Load a checkpoint's tensors into the layers of a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import nn

from common.checkpoint import Checkpoint
from common.checkpoint_reader import CheckpointReader, SafetensorsReader, open_checkpoint
from common.errors import FieldError

from .device import pin
from .model import DecoderModel
from .moe import MixtureOfExperts
from .parallel import Groups
from .weight_offload import (
    CheckpointSource,
    HostSource,
    LayerFetcher,
    Source,
    choose_layers,
    load_weights,
    num_bytes,
)


def load_decoder(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: str,
    groups: Groups | None = None,
    num_offloaded_bytes: int = 0,
) -> DecoderModel:
    """The decoder with its weights, in eval mode. groups: whose part of it (None: all of it). num_offloaded_bytes: of
    this rank's weights, how much must not stay on the device.

    Raises FieldError for an architecture that DecoderModel does not support, for a missing or corrupt file, and for a
    tensor that is missing, unknown, stored twice, of the wrong shape, or not of floating-point numbers.
    """
    with torch.device("meta"):  # shapes without memory, so that nothing is initialized only to be overwritten
        model = DecoderModel(checkpoint.config, groups or Groups())
    model = model.to(dtype).requires_grad_(False).eval()
    layers = dict(model.layers.items())
    chosen = choose_layers([num_bytes(layer) for layer in layers.values()], num_offloaded_bytes)
    offloaded = {number: layer for index, (number, layer) in enumerate(layers.items()) if index in chosen}
    with ExitStack() as stack:
        reader = open_checkpoint(checkpoint, dtype, device, stack)
        for part in (*model.children(), *layers.values()):
            if part is not model.layers and part not in offloaded.values():
                part.to_empty(device=device)
        model.rotary_embedding.reset_parameters()
        load_layers(model, reader, [f"layers.{number}" for number in offloaded])
        sources = read_sources(offloaded, reader, device)
        check_all_read(model, reader)
        model.num_bytes_read = reader.num_bytes_read
        if offloaded:
            model.fetcher = LayerFetcher(list(offloaded.values()), sources, device)
            load_tables(offloaded, reader)
            stack.pop_all()  # the files stay open
    return model


@torch.no_grad()
def load_layers(model: DecoderModel, reader: CheckpointReader, offloaded: Sequence[str]) -> None:
    """Load every layer but the offloaded ones. Raises FieldError as load_decoder does."""
    for path, layer in model.named_modules():
        is_offloaded = any(path == each or path.startswith(f"{each}.") for each in offloaded)
        if not is_offloaded and (load := getattr(layer, "load", None)):
            load(reader, path if path == "lm_head" else f"model.{path}")


@torch.no_grad()
def read_sources(layers: dict[str, nn.Module], reader: CheckpointReader, device: str) -> list[Source]:
    """Read each layer once, which checks its tensors. layers: by their numbers in the model. Afterwards they have no
    memory.

    On a GPU, the layers are copied to pinned memory. On a CPU they stay in the checkpoint's files, if there are any.
    """
    sources = list[Source]()
    is_on_gpu = device.startswith("cuda")
    for number, layer in layers.items():
        path = f"model.layers.{number}"
        layer.to_empty(device="cpu")
        load_weights(layer, reader, path)
        if isinstance(reader, SafetensorsReader) and not is_on_gpu:
            sources.append(CheckpointSource(reader, path))
        else:
            weights = {name: parameter.data for name, parameter in layer.named_parameters()}
            sources.append(HostSource({name: pin(each) if is_on_gpu else each for name, each in weights.items()}))
        layer.to("meta")
    if isinstance(reader, SafetensorsReader):
        reader.is_checking = False  # it has been done
    return sources


def load_tables(layers: dict[str, nn.Module], reader: CheckpointReader) -> None:
    """Mixtures of experts have tables, which stay on the device."""
    for number, layer in layers.items():
        for name, module in layer.named_modules():
            if isinstance(module, MixtureOfExperts):
                module.load(reader, f"model.layers.{number}.{name}")


def check_all_read(model: DecoderModel, reader: CheckpointReader) -> None:
    """Raises FieldError if the checkpoint has a tensor that no layer has read."""
    for name in sorted(reader.unread):
        if not is_ignored(name, model):
            raise FieldError("model", f"{reader.source}: unknown tensor {name}")


def is_ignored(name: str, model: DecoderModel) -> bool:
    """True for what only old checkpoints have: RoPE's frequencies, and the output's copy of tied embeddings. And for
    tensors of other stages."""
    if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and model.config.tie_word_embeddings):
        return True
    if name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        return True
    layer = name.removeprefix("model.layers.").partition(".")[0]
    return layer.isdecimal() and int(layer) < model.config.num_hidden_layers and layer not in model.layers
