"""A model with the same output as another one, but slower: a target for which a draft model is cheap."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from common.checkpoint import resolve_checkpoint
from common.errors import FieldError

ADDS_NOTHING = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


def write_deep_model(model: str, num_layers: int, directory: Path) -> None:
    """Copy a checkpoint of one safetensors file, and append layers whose outputs are zero, up to num_layers.

    A layer adds its output to its input, so these layers change nothing but cost as much as any other layer.
    """
    source = resolve_checkpoint(model).directory
    if source is None:
        raise FieldError("model", f"expected a shipped model or a directory, got {model!r}")
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copy(path, directory)
    config = json.loads((source / "config.json").read_text("utf-8"))
    tensors = load_file(source / "model.safetensors")
    first = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.0.")}
    for layer in range(config["num_hidden_layers"], num_layers):
        for name, tensor in first.items():
            copied = tensor.clone()
            tensors[name.replace(".0.", f".{layer}.", 1)] = copied.zero_() if name.endswith(ADDS_NOTHING) else copied
    config["num_hidden_layers"] = num_layers
    config.pop("layer_types", None)
    (directory / "config.json").write_text(json.dumps(config), "utf-8")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
