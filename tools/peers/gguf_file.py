"""Write a Llama checkpoint as a GGUF file, for llama.cpp. Needs the package gguf, which only the peers have.

The file has no tokenizer ("no_vocab"): only token ids are exchanged.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

TYPES = {"float32": gguf.GGMLQuantizationType.F32, "bfloat16": gguf.GGMLQuantizationType.BF16}
FILE_TYPES = {"float32": gguf.LlamaFileType.ALL_F32, "bfloat16": gguf.LlamaFileType.MOSTLY_BF16}
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def write_gguf(model: Path, path: Path, dtype: str) -> None:
    """Convert a directory with float32 weights. dtype: float32 or bfloat16, of matrices; norms stay float32, as
    llama.cpp's own converter writes them. Raises KeyError for a tensor that a Llama doesn't have."""
    config = json.loads((model / "config.json").read_text("utf-8"))
    writer = gguf.GGUFWriter(path, "llama")
    add_config(writer, config, FILE_TYPES[dtype])
    for name, tensor in load_file(model / "model.safetensors").items():
        if ".q_proj." in name:
            tensor = interleave_halves(tensor, config["num_attention_heads"])
        elif ".k_proj." in name:
            tensor = interleave_halves(tensor, config["num_key_value_heads"])
        kind = TYPES[dtype if tensor.ndim == 2 else "float32"]
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_config(writer: gguf.GGUFWriter, config: dict[str, Any], file_type: gguf.LlamaFileType) -> None:
    writer.add_file_type(file_type)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def gguf_name(name: str) -> str:
    """Such as blk.0.attn_q.weight for model.layers.0.self_attn.q_proj.weight."""
    stem, _, suffix = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, inner = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[inner]}.{suffix}"
    return f"{NAMES[stem]}.{suffix}"


def interleave_halves(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorder the rows of each head: llama.cpp rotates neighbors (0 and 1, 2 and 3, …), transformers the two halves (0
    and d/2, 1 and d/2 + 1, …)."""
    num_rows, width = weight.shape
    halves = weight.reshape(num_heads, 2, num_rows // num_heads // 2, width)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(num_rows, width)
