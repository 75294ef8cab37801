"""Load a checkpoint's tensors into the layers of a decoder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from common.checkpoint import Checkpoint
from common.checkpoint_reader import CheckpointReader, SafetensorsReader, open_checkpoint
from common.errors import FieldError

from .device import pin
from .model import DecoderModel
from .moe import MixtureOfExperts
from .parallel import Groups
from .quantization.choice import QuantizationFlags, prepare_layers
from .quantization.cpu_kernels import warm_up
from .weight_offload import (
    CheckpointSource,
    HostSource,
    LayerFetcher,
    Source,
    choose_layers,
    load_weights,
    num_bytes,
)

MAX_KV_SCALE = 2.0**20

logger = logging.getLogger(__name__)


def load_decoder(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: str,
    groups: Groups | None = None,
    num_offloaded_bytes: int = 0,
    quantization: QuantizationFlags | None = None,
) -> DecoderModel:
    """The decoder with its weights, in eval mode. groups: whose part of it (None: all of it). num_offloaded_bytes: of
    this rank's weights, how much must not stay on the device. quantization: None for what the checkpoint says.

    Raises FieldError for an architecture that DecoderModel does not support, for a missing or corrupt file, for a
    tensor that is missing, unknown, stored twice, of the wrong shape or dtype, and for quantization that isn't
    supported.
    """
    with torch.device("meta"):  # shapes without memory, so that nothing is initialized only to be overwritten
        model = DecoderModel(checkpoint.config, groups or Groups()).to(dtype)
        is_quantized = prepare_layers(model, checkpoint.config, quantization or QuantizationFlags())
    model = model.requires_grad_(False).eval()
    layers = dict(model.layers.items())
    chosen = choose_layers([num_bytes(layer) for layer in layers.values()], num_offloaded_bytes)
    offloaded = {number: layer for index, (number, layer) in enumerate(layers.items()) if index in chosen}
    with ExitStack() as stack:
        reader = open_checkpoint(checkpoint, dtype, device, stack, may_be_quantized=True)
        for part in (*model.children(), *layers.values()):
            if part is not model.layers and part not in offloaded.values():
                part.to_empty(device=device)
        model.rotary_embedding.reset_parameters()
        load_layers(model, reader, [f"layers.{number}" for number in offloaded])
        sources = read_sources(offloaded, reader, device, is_quantized)
        model.stored_kv_scales = read_kv_scales(model, reader)
        check_all_read(model, reader)
        model.num_bytes_read = reader.num_bytes_read
        if offloaded and is_quantized and device == "cpu":
            logger.warning("cpu_offload_gb: on a CPU, quantized weights stay in memory")
        if offloaded:
            model.fetcher = LayerFetcher(list(offloaded.values()), sources, device)
            load_tables(offloaded, reader)
            stack.pop_all()  # the files stay open
    if is_quantized and device == "cpu":
        warm_up()
    return model


@torch.no_grad()
def load_layers(model: DecoderModel, reader: CheckpointReader, offloaded: Sequence[str]) -> None:
    """Load every layer but the offloaded ones. Raises FieldError as load_decoder does."""
    for path, layer in model.named_modules():
        is_offloaded = any(path == each or path.startswith(f"{each}.") for each in offloaded)
        if not is_offloaded and (load := getattr(layer, "load", None)):
            load(reader, path if path == "lm_head" else f"model.{path}")


@torch.no_grad()
def read_sources(
    layers: dict[str, nn.Module], reader: CheckpointReader, device: str, is_quantized: bool
) -> list[Source]:
    """Read each layer once, which checks its tensors. layers: by their numbers in the model. Afterwards they have no
    memory.

    On a GPU, the layers are copied to pinned memory. On a CPU they stay in the checkpoint's files, if there are any and
    they have the weights in the form in which they are used.
    """
    sources = list[Source]()
    is_on_gpu = device.startswith("cuda")
    for number, layer in layers.items():
        path = f"model.layers.{number}"
        layer.to_empty(device="cpu")
        load_weights(layer, reader, path)
        if isinstance(reader, SafetensorsReader) and not is_on_gpu and not is_quantized:
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


def read_kv_scales(model: DecoderModel, reader: CheckpointReader) -> Tensor | None:
    """The scales for keys and values that the checkpoint has: [num_layers, 2, num_kv_heads of this rank], float32; None
    if it has none. Each is for a layer or for a KV head. Old checkpoints have one for both, kv_scale.

    Raises FieldError if only some are there, or one isn't above 0.
    """
    scales = list[Tensor]()
    for layer in model.layers:
        prefix = f"model.layers.{layer}.self_attn"
        for name in (f"{prefix}.k_scale", f"{prefix}.v_scale"):
            found = next((each for each in (name, f"{prefix}.kv_scale") if reader.shape_of(each) is not None), None)
            if found is None:
                continue
            scale = reader.read(found, reader.shape_of(found) or ()).float().flatten()
            if len(scale) not in (1, model.kv_heads.total):
                wanted = f"expected one number or {model.kv_heads.total}"
                raise FieldError("model", f"{reader.source}: {found} has {len(scale)}: {wanted}")
            if not ((scale > 0) & (scale <= MAX_KV_SCALE)).all():
                raise FieldError(
                    "model",
                    f"{reader.source}: {found}: expected scales above 0, up to {MAX_KV_SCALE:g}, got {scale.tolist()}",
                )
            scales.append(scale.expand(model.kv_heads.total)[model.kv_heads.slice])
    if scales and len(scales) != 2 * model.num_layers:
        raise FieldError("model", f"{reader.source} has k_scale and v_scale for some layers only")
    return torch.stack(scales).unflatten(0, (-1, 2)) if scales else None


def check_all_read(model: DecoderModel, reader: CheckpointReader) -> None:
    """Raises FieldError if the checkpoint has a tensor that no layer has read."""
    for name in sorted(reader.unread):
        if not is_ignored(name, model) and not is_zero_bias(name, reader):
            raise FieldError("model", f"{reader.source}: unknown tensor {name}")


def is_zero_bias(name: str, reader: CheckpointReader) -> bool:
    """AutoGPTQ writes biases of 0 for layers that have none."""
    shape = reader.shape_of(name)
    return name.endswith(".bias") and shape is not None and not reader.read(name, shape).any()


def is_ignored(name: str, model: DecoderModel) -> bool:
    """True for what only old checkpoints have: RoPE's frequencies, and the output's copy of tied embeddings. And for
    tensors of other stages."""
    if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and model.config.tie_word_embeddings):
        return True
    if name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        return True
    layer = name.removeprefix("model.layers.").partition(".")[0]
    return layer.isdecimal() and int(layer) < model.config.num_hidden_layers and layer not in model.layers
