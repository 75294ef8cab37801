"""Move factors between the layers of a model without changing what it computes: AWQ (Lin et al., 2024) and SmoothQuant
(Xiao et al., 2023).

If input feature j of a matrix is divided by s[j] where it is made, and column j of the matrix is multiplied by s[j],
the output stays the same. But the rounding errors don't.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..mlp import MLP
from ..model import DecoderLayer
from ..moe import MixtureOfExperts
from .calibration import InputStats
from .gptq import output_error
from .scheme import Quantized, Scheme, as_stored, dequantize, encode, find_scales

NUM_EXPONENTS = 20
SHRINK_FACTORS = tuple(1 - step / 20 for step in range(11))  # 1.0, 0.95, … 0.5


@dataclass(slots=True)
class Pair:
    """A place where factors can be moved. makers: tensors whose rows, or numbers, become the input features. users:
    matrices that read them, [rows, columns] each. inputs: what is known about the features. others: further tensors
    with a column for each feature, which are not quantized. parts: what is known about the features of some of the
    users alone."""

    makers: list[Tensor]
    users: list[Tensor]
    inputs: InputStats
    others: list[Tensor] = field(default_factory=list)
    parts: list[InputStats] = field(default_factory=list)

    def move(self, factors: Tensor) -> None:
        """Divide the features by factors, [columns]."""
        for maker in self.makers:
            maker /= factors.view(-1, *[1] * (maker.ndim - 1)).to(maker.dtype)
        for user in (*self.users, *self.others):
            user *= factors.to(user.dtype)
        for stats in (self.inputs, *self.parts):
            stats.second_moment /= torch.outer(factors, factors)
            stats.mean_abs /= factors
            stats.max_abs /= factors


def find_pairs(layer: DecoderLayer, stats: dict[str, list[InputStats]]) -> list[Pair]:
    """In the order of computation. stats: see TextRunner.measure()."""
    attention = layer.self_attn
    pairs = [
        Pair([layer.input_layernorm.weight], [attention.qkv_proj.weight.data], stats["self_attn.qkv_proj.weight"][0])
    ]
    if attention.num_heads == attention.num_kv_heads:  # else several heads read a feature of a value
        values = slice(2 * attention.num_heads * attention.head_dim, None)
        makers = [attention.qkv_proj.weight.data[values]]
        if attention.qkv_proj.bias is not None:
            makers.append(attention.qkv_proj.bias[values])
        pairs.append(Pair(makers, [attention.o_proj.weight.data], stats["self_attn.o_proj.weight"][0]))
    mlp, norm = layer.mlp, layer.post_attention_layernorm.weight
    if isinstance(mlp, MLP):
        pairs.append(Pair([norm], [mlp.gate_up_proj.weight.data], stats["mlp.gate_up_proj.weight"][0]))
        pairs.append(mlp_pair(mlp, stats["mlp.down_proj.weight"][0]))
    elif isinstance(mlp, MixtureOfExperts):
        pairs += mixture_pairs(mlp, norm, stats)
    return pairs


def mlp_pair(mlp: MLP, inputs: InputStats) -> Pair:
    """The second half of gate_up_proj's rows makes what down_proj reads, as factors of what the gate lets through."""
    size = mlp.down_proj.weight.shape[-1]
    makers = [mlp.gate_up_proj.weight.data[size:]]
    if mlp.gate_up_proj.bias is not None:
        makers.append(mlp.gate_up_proj.bias[size:])
    return Pair(makers, [mlp.down_proj.weight.data], inputs)


def mixture_pairs(mixture: MixtureOfExperts, norm: Tensor, stats: dict[str, list[InputStats]]) -> list[Pair]:
    """All experts, the gate and the shared expert read the same features."""
    experts, size, every = mixture.experts, mixture.experts.down.shape[-1], stats["mlp.experts.gate_up"]
    inputs = InputStats.empty(experts.gate_up.shape[-1], norm.device)
    inputs.num_inputs = sum(each.num_inputs for each in every)
    for each in every:
        share = each.num_inputs / max(1, inputs.num_inputs)
        inputs.second_moment += each.second_moment * share
        inputs.mean_abs += each.mean_abs * share
        inputs.max_abs = torch.maximum(inputs.max_abs, each.max_abs)
    shared, users, others = mixture.shared_expert, list(experts.gate_up.data), list[Tensor]([mixture.gate.weight])
    if shared is not None:
        users.append(shared.gate_up_proj.weight.data)
        others.append(shared.gate)
        every = [*every, *stats["mlp.shared_expert.gate_up_proj.weight"]]
    pairs = [Pair([norm], users, inputs, others, every)]
    for expert, down in enumerate(stats["mlp.experts.down"]):
        pairs.append(Pair([experts.gate_up.data[expert, size:]], [experts.down.data[expert]], down))
    if shared is not None:
        pairs.append(mlp_pair(shared, stats["mlp.shared_expert.down_proj.weight"][0]))
    return pairs


def smooth(layer: DecoderLayer, stats: dict[str, list[InputStats]], find: Callable[[Pair], Tensor]) -> None:
    """Move factors at every place of a layer. find: which, [columns]."""
    for pair in find_pairs(layer, stats):
        if pair.inputs.num_inputs:
            pair.move(find(pair))


def awq_factors(pair: Pair, scheme: Scheme) -> Tensor:
    """AWQ: columns with large inputs should have small errors, so they are multiplied by mean_abs^exponent. Of
    several exponents, from 0 (nothing changes) to 0.95, the one with which the outputs change least."""
    best, best_error = torch.ones_like(pair.inputs.mean_abs), torch.inf
    for step in range(NUM_EXPONENTS):
        factors = pair.inputs.mean_abs.clamp(min=1e-6) ** (step / NUM_EXPONENTS)
        factors = factors / (factors.max() * factors.min()).sqrt()
        error = 0.0
        for user in pair.users:
            scaled = user.float() * factors
            rounded = dequantize(encode(scaled, *find_scales(scheme.split(scaled), scheme), scheme), scheme) / factors
            error += float(output_error(user.float(), rounded, pair.inputs.second_moment))
        if error < best_error:
            best, best_error = factors, error
    return best


def smoothquant_factors(pair: Pair, strength: float = 0.5) -> Tensor:
    """SmoothQuant: large activations become smaller, and their columns larger. With strength 0.5, the largest input and
    the largest weight of a column become equal.

    Returns [columns].
    """
    largest = torch.stack([user.abs().amax(dim=0) for user in pair.users]).amax(dim=0).float().clamp(min=1e-5)
    return pair.inputs.max_abs.clamp(min=1e-5) ** strength / largest ** (1 - strength)


def quantize_clipped(
    matrix: Tensor, second_moment: Tensor, scheme: Scheme, scale_dtype: torch.dtype = torch.float32
) -> Quantized:
    """Round to nearest, with scales that may be too small for the largest numbers of a group: if that makes the outputs
    change less. matrix: [rows, columns]; second_moment: [columns, columns]."""
    groups = scheme.split(matrix.float())  # [rows, num_groups, columns of a group]
    blocks = torch.stack([block for block in diagonal_blocks(second_moment, groups.shape[-1])])
    scale, zero = find_scales(groups, scheme, scale_dtype)
    best_scale, best_error = scale, torch.full_like(scale, torch.inf)
    for factor in SHRINK_FACTORS:
        tried = as_stored(scale * factor, scale_dtype)
        difference = groups - scheme.split(dequantize(encode(matrix, tried, zero, scheme), scheme))
        error = torch.einsum("rgi,gij,rgj->rg", difference, blocks, difference)
        best_scale = torch.where(error < best_error, tried, best_scale)
        best_error = torch.minimum(error, best_error)
    return encode(matrix, best_scale, zero, scheme)


def diagonal_blocks(matrix: Tensor, size: int) -> list[Tensor]:
    return [matrix[start : start + size, start : start + size] for start in range(0, len(matrix), size)]
