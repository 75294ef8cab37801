"""Steps of few tokens on a CPU, each in one kernel: see kernels/cpu/whole_step.py."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from llvmlite.binding import get_host_cpu_features
from torch import Tensor

from .attention import AttentionMetadata, PagedAttention
from .kernels.cpu import whole_step
from .kernels.cpu.attention import MIN_SPAN, find_spans, min_rows
from .kernels.cpu.memory import DTYPES, LIKE
from .kernels.cpu.team import get_team, make_counters
from .kernels.cpu.whole_step import NUM_AT_ONCE, PHASES_PER_LAYER, Buffers, Sizes, Step
from .kernels.ops import Kernels
from .linear import Linear
from .mlp import MLP
from .model import DecoderModel
from .weight import Weight

MAX_TOKENS = 64  # of a step; for more, torch's matrix products are faster
MAX_TOKENS_BFLOAT16 = 8  # the same, on a CPU that has instructions for bfloat16: torch uses them
OPERATIONS = ("norm", "rotary", "attention", "activation")  # whose Numba kernels are part of it


class Megakernel:
    """All layers of a model, and its LM head, computed by a team of threads: the CPU's counterpart of CUDA graphs.

    It reads the tensors of the model and of the KV cache at the addresses that they have now. num_runs: steps that it
    has computed.
    """

    def __init__(self, model: DecoderModel, attention: PagedAttention, num_threads: int) -> None:
        self.model, self.attention, self.num_threads, self.num_runs = model, attention, num_threads, 0
        config, cache, self.table = model.config, attention.kv_cache, model.rotary_embedding.table
        self.sizes = Sizes(
            config.hidden_size, config.intermediate_size, model.num_heads, model.num_kv_heads, model.head_dim,
            cache.num_blocks * cache.block_size, cache.block_size, min_rows(model.head_dim, cache.data.dtype),
            config.rms_norm_eps, attention.scale,
        )  # fmt: skip
        self.like = LIKE[model.dtype], LIKE[self.table.dtype], LIKE[cache.data.dtype]
        self._converted: list[Tensor] = []
        self.layers = np.zeros(model.num_layers, whole_step.LAYER)
        for index, layer in enumerate(model.layers.values()):
            for name, address in self._fields(layer):
                self.layers[index][name] = address
            self.layers[index]["kv_cache"] = cache.layer(index).data_ptr()
        head = model.output_embedding
        assert model.norm is not None and head is not None, "the last stage has both"
        self.final_norm = self._address(model.norm.weight)
        hidden, heads = config.hidden_size, model.num_heads * model.head_dim
        widths = {
            "residual": hidden, "normed": hidden, "hidden": hidden, "query": heads, "attended": heads,
            "qkv": heads + 2 * model.num_kv_heads * model.head_dim, "gate_up": 2 * config.intermediate_size,
            "activated": config.intermediate_size,
        }  # fmt: skip
        self.max_tokens = most_tokens(model.dtype)
        self.rows = {name: torch.empty(self.max_tokens, width) for name, width in widths.items()}
        self.addresses = Buffers(**{name: rows.data_ptr() for name, rows in self.rows.items()})
        if head.packed is None:
            head.packed = TeamProduct(head.weight, num_threads)
        self._warm_up()

    def _fields(self, layer: Any) -> Iterator[tuple[str, int]]:
        attention, mlp = layer.self_attn, layer.mlp
        yield "input_norm", self._address(layer.input_layernorm.weight)
        yield "query_norm", self._address(getattr(attention.q_norm, "weight", None))
        yield "key_norm", self._address(getattr(attention.k_norm, "weight", None))
        yield "post_norm", self._address(layer.post_attention_layernorm.weight)
        linears = {
            "qkv": attention.qkv_proj, "output": attention.o_proj, "gate_up": mlp.gate_up_proj, "down": mlp.down_proj,
        }  # fmt: skip
        for name, linear in linears.items():
            yield name, linear.weight.data.data_ptr()
            yield f"{name}_bias", self._address(linear.bias)

    def _address(self, numbers: Tensor | None) -> int:
        """Of these numbers as float32; 0 for None."""
        if numbers is None:
            return 0
        self._converted.append(numbers.detach().float())
        return self._converted[-1].data_ptr()

    @torch.inference_mode()
    def _warm_up(self) -> None:
        """Compile the kernels, or load them from disk: with a token that is not stored."""
        nothing = torch.zeros(1, dtype=torch.int64)
        starts, table = torch.tensor([0, 1], dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
        hidden = self.run(nothing, nothing, AttentionMetadata(nothing - 1, table, starts, starts[1:], 1))
        assert hidden is not None, "a step of one token"
        self.model.compute_logits(hidden)
        self.num_runs = 0

    def run(self, input_ids: Tensor, positions: Tensor, metadata: AttentionMetadata) -> Tensor | None:
        """A forward pass: [num_tokens, hidden_size]. None if the step is empty, or has more than max_tokens."""
        num_tokens, (num_seqs, max_blocks) = len(input_ids), metadata.block_tables.shape
        if not 0 < num_tokens <= self.max_tokens:
            return None
        assert self.model.embed_tokens is not None, "the only stage has the embedding"
        self.rows["residual"][:num_tokens] = self.model.embed_tokens(input_ids)
        spans = find_spans(metadata.query_start_loc.numpy(), MIN_SPAN)
        num_parts = min(self.sizes.num_kv_heads, -(-self.num_threads // len(spans)))
        step = Step(
            num_tokens, num_seqs, num_parts, max_blocks, positions.data_ptr(), self.table.data_ptr(),
            metadata.slot_mapping.data_ptr(), metadata.block_tables.data_ptr(), metadata.query_start_loc.data_ptr(),
            metadata.context_lens.data_ptr(),
        )  # fmt: skip
        counters = make_counters(len(self.layers) * PHASES_PER_LAYER + 1)
        get_team(self.num_threads).run(
            whole_step.step_kernel,
            counters,
            self.layers,
            self.final_norm,
            spans,
            self.sizes,
            self.addresses,
            step,
            *self.like,
        )
        self.num_runs += 1
        return self.rows["normed"][:num_tokens].to(self.model.dtype, copy=True)


class TeamProduct:
    """A matrix as it is, not packed: products with few rows are computed by a team. matrix: [outputs, inputs]."""

    nbytes = 0  # no memory besides the matrix

    def __init__(self, matrix: Tensor, num_threads: int) -> None:
        self.matrix, self.num_threads, self.like = matrix.detach(), num_threads, LIKE[matrix.dtype]
        self.max_rows = most_tokens(matrix.dtype)

    def product(self, rows: Tensor, bias: Tensor | None = None) -> Tensor:
        """rows: [n, inputs], bias: [outputs]. Returns [n, outputs]."""
        if not 0 < len(rows) <= self.max_rows or bias is not None:
            return F.linear(rows, self.matrix, bias)
        inputs, (num_outputs, num_inputs) = rows.float().contiguous(), self.matrix.shape
        output = torch.empty(len(rows), num_outputs)
        addresses = output.data_ptr(), inputs.data_ptr(), self.matrix.data_ptr()
        sizes = len(rows), num_inputs, num_outputs
        get_team(self.num_threads).run(whole_step.product_kernel, make_counters(1), *addresses, *sizes, self.like)
        return output.to(rows.dtype)


def can_be_one_kernel(model: DecoderModel, kernels: Kernels, kv_scales: Tensor | None) -> bool:
    """Whether the megakernel computes what this model does: on a CPU, with all layers on this rank, dense and not
    quantized, by the Numba kernels that the megakernel consists of."""
    head, layers = model.output_embedding, model.layers.values()
    if model.device != "cpu" or model.dtype not in DTYPES or kv_scales is not None:
        return False
    if model.stage.num_stages > 1 or head is None or head.group.size > 1 or model.fetcher is not None:
        return False
    if any(name not in kernels.choices or kernels.choices[name].backend != "numba" for name in OPERATIONS):
        return False
    weights = [module.weight for module in model.modules() if isinstance(module, Linear)]
    are_plain = all(type(weight) is Weight and weight.data.numel() > 0 for weight in weights)
    sizes = [head.vocab_size, model.config.intermediate_size, *(weight.shape[0] for weight in weights)]
    return are_plain and all(type(layer.mlp) is MLP for layer in layers) and not any(s % NUM_AT_ONCE for s in sizes)


def most_tokens(dtype: torch.dtype) -> int:
    """Of a step whose products are faster here than in torch."""
    return MAX_TOKENS_BFLOAT16 if dtype == torch.bfloat16 and has_bfloat16_instructions() else MAX_TOKENS


@cache
def has_bfloat16_instructions() -> bool:
    features = get_host_cpu_features()
    return any(features.get(name) for name in ("avx512bf16", "amx-bf16", "bf16"))
