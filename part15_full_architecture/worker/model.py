"""The decoder of Llama, Qwen2, Qwen3 and their mixtures of experts in plain torch, over the tokens of many sequences
laid end to end.

A token attends to the tokens before it, whose keys and values are in the KV cache. The model knows nothing about the
cache and the sequences: it passes each layer's queries, keys and values to `attend` and continues with the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from common.errors import FieldError

from .kernels.ops import Kernels
from .kernels.reference import rotate
from .linear import RMSNorm
from .mlp import MLP
from .moe import MOE_FAMILIES, MixtureOfExperts, is_sparse
from .parallel import (
    ColumnParallelLinear,
    Groups,
    ParallelGroup,
    PipelineStage,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from .weight import Weight
from .weight_offload import LayerFetcher

FAMILIES = ("llama", "qwen2", "qwen3", *MOE_FAMILIES)


@dataclass(frozen=True, slots=True)
class Rotation:
    """The positions of a step's tokens, by which queries and keys are rotated (RoPE: Su et al., 2021).

    positions: [num_tokens], int64. table: [max_position_embeddings, head_dim], cosines then sines.
    """

    positions: Tensor
    table: Tensor

    def __call__(self, heads: Tensor) -> Tensor:
        """heads: [num_tokens, num_heads, head_dim]; returns the same shape.

        Dimension i pairs with i + head_dim / 2, as Hugging Face's weights expect; the paper pairs neighbors.
        """
        cos, sin = self.table.index_select(0, self.positions).unsqueeze(1).chunk(2, dim=-1)
        return rotate(heads, cos, sin)


class Attend(Protocol):
    """Attention, provided by the caller: it rotates queries and keys, stores keys and values in the cache, and each
    query sees its own past."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rotation: Rotation) -> Tensor:
        """query: [num_tokens, num_heads, head_dim]; key, value: [num_tokens, num_kv_heads, head_dim], not contiguous.

        Returns [num_tokens, num_heads, head_dim]. The scale is head_dim ** -0.5; query head h reads key/value head
        h // (num_heads // num_kv_heads).
        """
        ...


class RotaryEmbedding(nn.Module):
    """Cosines and sines of every position, looked up by position.

    They are computed in float32 on the CPU, whatever the model's dtype and device, so the table is the same everywhere.
    """

    table: Tensor  # [max_position_embeddings, cosines then sines]

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        table = torch.empty(config.max_position_embeddings, head_dim(config))
        self.register_buffer("table", table, persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill the table. Call this again when to_empty() has given the module new memory."""
        positions = torch.arange(len(self.table), dtype=torch.float32, device="cpu")
        angles = torch.outer(positions, inverse_frequencies(self.config))
        self.table.copy_(torch.cat((angles.cos(), angles.sin()), dim=-1))

    def forward(self, positions: Tensor) -> Rotation:
        """positions: [num_tokens], int64."""
        return Rotation(positions, self.table)


def inverse_frequencies(config: Any) -> Tensor:
    """The angle, in radians, by which each pair of dimensions turns from one position to the next.

    Returns [head_dim / 2], float32, on the CPU. rope_type "llama3" slows the pairs whose wavelength is longer than the
    context they were trained on (Llama 3.1). Raises FieldError for any other type.
    """
    settings = getattr(config, "rope_parameters", None)
    if settings is None:  # the format of transformers 4
        settings = {"rope_theta": config.rope_theta, **(getattr(config, "rope_scaling", None) or {})}
    rope_type = settings.get("rope_type") or settings.get("type") or "default"
    if rope_type not in ("default", "llama3"):
        raise FieldError("model", f"rope_type {rope_type!r} is not supported: expected 'default' or 'llama3'")
    if settings.get("partial_rotary_factor", 1.0) != 1.0:
        raise FieldError("model", f"partial_rotary_factor {settings['partial_rotary_factor']}: expected 1.0")
    size = head_dim(config)
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size
    frequencies = 1.0 / settings["rope_theta"] ** exponents
    if rope_type == "default":
        return frequencies
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    num_turns = settings["original_max_position_embeddings"] / (2 * math.pi / frequencies)  # over the trained context
    keep = ((num_turns - low) / (high - low)).clamp(0, 1)  # 1: turns often, is kept; 0: is slowed down by factor
    return (1 - keep) * frequencies / settings["factor"] + keep * frequencies


class Attention(nn.Module):
    """Grouped-query attention around `attend`: project, normalize and rotate before it, project after it.

    Qwen2 adds a bias to queries, keys and values; Qwen3 normalizes each head of queries and keys.
    """

    def __init__(self, config: Any, layer: int, group: ParallelGroup) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, head_dim(config)
        heads = group.split("num_attention_heads", config.num_attention_heads)
        kv_heads = group.split_kv_heads(config.num_key_value_heads)
        self.num_heads, self.num_kv_heads = len(heads), len(kv_heads)
        qkv_bias = output_bias = getattr(config, "attention_bias", False)
        if config.model_type in ("qwen2", "qwen2_moe"):
            qkv_bias, output_bias = getattr(config, "qkv_bias", True), False
        queries, keys = heads * self.head_dim, kv_heads * self.head_dim
        qkv = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        self.qkv_proj = ColumnParallelLinear(config.hidden_size, qkv, qkv_bias)
        self.o_proj = RowParallelLinear(queries, {"o_proj": config.hidden_size}, output_bias, group)
        has_norm = config.model_type in ("qwen3", "qwen3_moe")
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if has_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if has_norm else nn.Identity()

    def forward(self, hidden: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        """hidden: [num_tokens, hidden_size]; returns the same shape."""
        heads = self.qkv_proj(hidden).unflatten(-1, (-1, self.head_dim))
        query, key, value = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        return self.o_proj(attend(self.layer, self.q_norm(query), self.k_norm(key), value, rotation).flatten(1))


def make_mlp(config: Any, number: int, groups: Groups) -> nn.Module:
    """The feed-forward network of a layer, dense or a mixture of experts. number: the layer's, in the whole model."""
    if is_sparse(config, number):
        return MixtureOfExperts(config, groups)
    return MLP(config.hidden_size, config.intermediate_size, getattr(config, "mlp_bias", False), groups.tensor)


class DecoderLayer(nn.Module):
    """Attention, then the feed-forward network: each reads a normalized copy of the residual stream and adds to it.

    The sum is left to the norm that follows, which then reads the residual stream only once.
    """

    def __init__(self, config: Any, number: int, index: int, groups: Groups) -> None:
        """number: the layer's, in the whole model; index: among the layers of this stage."""
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, index, groups.tensor)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = make_mlp(config, number, groups)

    def forward(self, hidden: Tensor | None, residual: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        """residual: [num_tokens, hidden_size], the residual stream, which is changed in place. hidden: the same shape,
        what the layer before returned, which is not yet part of it; None in the first layer. Returns the same shape.
        """
        normed = self.input_layernorm(residual) if hidden is None else self.input_layernorm.add(hidden, residual)
        hidden = self.self_attn(normed, rotation, attend)
        return self.mlp(self.post_attention_layernorm.add(hidden, residual))


class DecoderModel(nn.Module):
    """A decoder of one of FAMILIES, from a Hugging Face config; weights.py loads its weights.

    groups: which of the layers this rank has, and the ranks with which it shares them: it has a part of each.
    num_layers, num_heads, num_kv_heads: the layers and heads that this rank computes. num_bytes_read: of the
    checkpoint. fetcher: of the layers whose weights don't stay on the device, if there are any. stored_kv_scales: of
    the checkpoint, see read_kv_scales(). Raises FieldError for an unsupported architecture or feature, and for a number
    of ranks that does not divide the model.
    """

    def __init__(self, config: Any, groups: Groups) -> None:
        super().__init__()
        check_architecture(config)
        group, stage = groups.tensor, groups.stage
        self.config, self.stage, self.num_bytes_read = config, stage, 0
        self.fetcher: LayerFetcher | None = None
        self.stored_kv_scales: Tensor | None = None
        numbers, self.head_dim = stage.layers(config.num_hidden_layers), head_dim(config)
        self.num_layers = len(numbers)
        layers = {str(number): DecoderLayer(config, number, index, groups) for index, number in enumerate(numbers)}
        self.rotary_embedding, self.layers = RotaryEmbedding(config), nn.ModuleDict(layers)
        attention = layers[str(numbers[0])].self_attn
        self.num_heads, self.num_kv_heads = attention.num_heads, attention.num_kv_heads
        self.kv_heads = group.split_kv_heads(config.num_key_value_heads)
        is_tied = config.tie_word_embeddings
        self.embed_tokens: VocabParallelEmbedding | None = None
        self.lm_head: VocabParallelEmbedding | None = None
        self.norm: RMSNorm | None = None
        if stage.is_first or (stage.is_last and is_tied):
            self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, group)
        if stage.is_last:
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.lm_head = None if is_tied else VocabParallelEmbedding(config.vocab_size, config.hidden_size, group)

    def use(self, kernels: Kernels) -> None:
        """Compute the operations of all layers with these kernels from now on."""
        for module in self.modules():
            if hasattr(module, "kernels"):
                module.kernels = kernels  # type: ignore[assignment]

    @property
    def mixtures(self) -> list[MixtureOfExperts]:
        """Of this stage's layers, in order."""
        return [layer.mlp for layer in self.layers.values() if isinstance(layer.mlp, MixtureOfExperts)]

    @property
    def dtype(self) -> torch.dtype:
        return self.rotary_embedding.table.dtype

    @property
    def device(self) -> str:
        return str(self.rotary_embedding.table.device)

    @property
    def output_embedding(self) -> VocabParallelEmbedding | None:
        """The LM head, which may be the embedding of the tokens; only the last stage has one."""
        if not self.stage.is_last:
            return None
        return self.embed_tokens if self.lm_head is None else self.lm_head

    @property
    def packed_bytes(self) -> int:
        """Of matrices that are packed, besides the parameters."""
        packed = [each for module in self.modules() if (each := getattr(module, "packed", None)) is not None]
        return sum(each.nbytes for each in packed)

    def forward(self, input_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Run tokens of any number of sequences, laid end to end, through this stage's layers.

        input_ids, positions: [num_tokens], int64; a token's position counts within its own sequence. attend is called
        once a layer, in order. Returns the last layer's output, [num_tokens, hidden_size]: the last stage normalizes
        it, and the others send it to the next.
        """
        if self.stage.is_first:
            assert self.embed_tokens is not None, "the first stage has the embedding"
            residual = self.embed_tokens(input_ids)
        else:
            residual = self.stage.receive(len(positions), self.config.hidden_size, self.dtype, self.device)
        hidden, rotation = None, self.rotary_embedding(positions)
        for layer in self.layers.values():
            hidden = layer(hidden, residual, rotation, attend)
        assert hidden is not None, "a stage has at least one layer"
        if self.stage.is_last:
            assert self.norm is not None, "the last stage has the last norm"
            return self.norm.add(hidden, residual)
        residual += hidden
        self.stage.send(residual)
        return residual

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden: [n, hidden_size], only the rows to sample from, in the last stage. Returns [n, vocab_size], float32,
        on all ranks of the group."""
        assert self.output_embedding is not None, "the last stage has the LM head"
        return self.output_embedding.logits(hidden)


def num_parameters(model: nn.Module) -> int:
    """How many numbers the weights are, whatever they are stored as."""
    numel = 0
    for module in model.modules():
        own = module.parameters(recurse=False)
        numel += math.prod(module.shape) if isinstance(module, Weight) else sum(each.numel() for each in own)
    return numel


def check_divisible(config: Any, groups: Groups, prepare: Callable[[DecoderModel], object]) -> None:
    """Raises FieldError if so many ranks cannot share a model, before any of them is started. prepare: what is done
    with a model before its weights are loaded."""
    if groups.has_expert_parallelism and not any(is_sparse(config, layer) for layer in range(config.num_hidden_layers)):
        raise FieldError("enable_expert_parallel", "the model has no experts")
    with torch.device("meta"):
        for stage in range(groups.stage.num_stages):
            prepare(DecoderModel(config, replace(groups, stage=PipelineStage(stage, groups.stage.num_stages))))


def head_dim(config: Any) -> int:
    """The size of one attention head: given, or hidden_size / num_attention_heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def check_architecture(config: Any) -> None:
    """Raises FieldError naming the architecture or feature that DecoderModel does not support."""
    if config.model_type not in FAMILIES:
        expected = ", ".join(FAMILIES)
        raise FieldError("model", f"architecture {config.model_type!r} is not supported: expected one of {expected}")
    if config.hidden_act != "silu":
        raise FieldError("model", f"hidden_act {config.hidden_act!r} is not supported: expected 'silu'")
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise FieldError("model", "sliding-window attention is not supported: expected use_sliding_window false")
    if config.model_type == "mixtral" and config.sliding_window is not None:
        raise FieldError("model", "sliding-window attention is not supported: expected sliding_window null")
