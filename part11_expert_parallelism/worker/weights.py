"""Load a checkpoint's tensors into the layers of a decoder."""

from __future__ import annotations

from contextlib import ExitStack

import torch

from common.checkpoint import Checkpoint
from common.checkpoint_reader import CheckpointReader, open_checkpoint
from common.errors import FieldError

from .model import DecoderModel
from .parallel import Groups


def load_decoder(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: str,
    groups: Groups | None = None,
) -> DecoderModel:
    """The decoder with its weights, in eval mode. groups: whose part of it (None: all of it).

    Raises FieldError for an architecture that DecoderModel does not support, for a missing or corrupt file, and for a
    tensor that is missing, unknown, stored twice, of the wrong shape, or not of floating-point numbers.
    """
    with torch.device("meta"):  # shapes without memory, so that nothing is initialized only to be overwritten
        model = DecoderModel(checkpoint.config, groups or Groups())
    model = model.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    model.rotary_embedding.reset_parameters()
    with ExitStack() as stack:
        reader = open_checkpoint(checkpoint, dtype, device, stack)
        load_layers(model, reader)
        model.num_bytes_read = reader.num_bytes_read
    return model


@torch.no_grad()
def load_layers(model: DecoderModel, reader: CheckpointReader) -> None:
    """Load every layer, then check that no tensor is left over. Raises FieldError as load_decoder does."""
    for path, layer in model.named_modules():
        if load := getattr(layer, "load", None):
            load(reader, path if path == "lm_head" else f"model.{path}")
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
