"""Write codes as checkpoints that other engines read: in the layouts of compressed-tensors and of GPTQ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..linear import Linear, RMSNorm
from ..moe import Experts, SharedExpert, TopKGate, stored
from .packing import pack_words
from .scheme import Quantized, Scheme

NOT_QUANTIZED = ["lm_head", "re:.*mlp[.]gate$", "re:.*shared_expert_gate$", "re:.*block_sparse_moe[.]gate$"]


class Writer(Protocol):
    """scale_dtype: of the scales that are stored."""

    @property
    def scale_dtype(self) -> torch.dtype: ...

    def tensors(self, name: str, codes: Quantized) -> dict[str, Tensor]:
        """What a checkpoint has for a projection. name: the projection's. codes: [rows, columns]."""
        ...

    def settings(self) -> dict[str, Any]:
        """The quantization_config for config.json."""
        ...


@dataclass(frozen=True, slots=True)
class CompressedTensorsWriter:
    scheme: Scheme
    scale_dtype: torch.dtype

    @property
    def format(self) -> str:
        if self.scheme.kind == "fp8":
            return "float-quantized"
        return "int-quantized" if self.scheme.activations == "int8" else "pack-quantized"

    def tensors(self, name: str, codes: Quantized) -> dict[str, Tensor]:
        tensors = {f"{name}.weight_scale": codes.scale.to(self.scale_dtype)}
        if self.format != "pack-quantized":
            is_fp8 = self.scheme.kind == "fp8"
            tensors[f"{name}.weight"] = codes.codes.view(torch.float8_e4m3fn) if is_fp8 else codes.codes
            return tensors
        bits, offset = self.scheme.bits, -self.scheme.min_code
        tensors[f"{name}.weight_packed"] = pack_words(codes.codes.int() + offset, bits)
        tensors[f"{name}.weight_shape"] = torch.tensor(codes.codes.shape)
        if codes.zero is not None:
            tensors[f"{name}.weight_zero_point"] = pack_words((codes.zero.int() + offset).T, bits).T.contiguous()
        return tensors

    def settings(self) -> dict[str, Any]:
        scheme = self.scheme
        weights = {
            "num_bits": scheme.bits, "type": "float" if scheme.kind == "fp8" else "int",
            "strategy": "channel" if scheme.group_size is None else "group", "group_size": scheme.group_size,
            "symmetric": scheme.is_symmetric, "dynamic": False,
        }  # fmt: skip
        inputs = None
        if scheme.activations is not None:
            kind = "int" if scheme.activations == "int8" else "float"
            inputs = {"num_bits": 8, "type": kind, "strategy": "token", "symmetric": True, "dynamic": True}
        group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
        return {
            "quant_method": "compressed-tensors", "format": self.format, "quantization_status": "compressed",
            "config_groups": {"group_0": group}, "ignore": NOT_QUANTIZED, "kv_cache_scheme": None,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class GPTQWriter:
    """Version 1 of the layout, which all engines read, unless there are zero points: of a zero point of 0, which
    version 1 stores as -1, engines make different things."""

    scheme: Scheme
    scale_dtype: torch.dtype = torch.float16

    @property
    def is_version_1(self) -> bool:
        return self.scheme.is_symmetric

    def tensors(self, name: str, codes: Quantized) -> dict[str, Tensor]:
        bits, offset, num_columns = self.scheme.bits, -self.scheme.min_code, codes.codes.shape[1]
        zero = torch.zeros_like(codes.scale, dtype=torch.int8) if codes.zero is None else codes.zero
        group_size = self.scheme.group_size or num_columns
        return {
            f"{name}.qweight": pack_words(codes.codes.int() + offset, bits).T.contiguous(),
            f"{name}.qzeros": pack_words((zero.int() + offset - int(self.is_version_1)).T, bits),
            f"{name}.scales": codes.scale.T.to(self.scale_dtype).contiguous(),
            f"{name}.g_idx": torch.arange(num_columns, dtype=torch.int32) // group_size,
        }

    def settings(self) -> dict[str, Any]:
        version = "gptq" if self.is_version_1 else "gptq_v2"
        return {
            "quant_method": "gptq", "bits": self.scheme.bits, "group_size": self.scheme.group_size or -1,
            "sym": self.scheme.is_symmetric, "desc_act": False, "checkpoint_format": version, "lm_head": False,
        }  # fmt: skip


def split_codes(
    layer: nn.Module, path: str, found: dict[str, list[Quantized]], config: Any
) -> Iterator[tuple[str, Quantized]]:
    """The codes of each projection of a layer, by its name in a checkpoint. path: the layer's, in the checkpoint.
    found: of each matrix, see Method.quantize_layer()."""
    for name, module in layer.named_modules():
        if isinstance(module, Linear):
            owner = f"{path}.{name}".rpartition(".")[0]
            for output, rows in split_rows(module.outputs):
                yield f"{owner}.{output}", take_rows(found[f"{name}.weight"][0], rows)
        elif isinstance(module, Experts):
            gate, up, down = module.names
            size = module.down.shape[-1]
            for expert, codes in enumerate(found[f"{name}.gate_up"]):
                prefix = f"{stored(f'{path}.{name}', config)}.{expert}"
                yield f"{prefix}.{gate}", take_rows(codes, slice(0, size))
                yield f"{prefix}.{up}", take_rows(codes, slice(size, 2 * size))
                yield f"{prefix}.{down}", found[f"{name}.down"][expert]


def other_tensors(layer: nn.Module, path: str, config: Any) -> Iterator[tuple[str, Tensor]]:
    """What isn't quantized in a layer: norms, biases, and the gates of mixtures of experts."""
    for name, module in layer.named_modules():
        full_name = f"{path}.{name}"
        if isinstance(module, RMSNorm):
            yield f"{full_name}.weight", module.weight
        elif isinstance(module, TopKGate):
            yield f"{stored(full_name, config)}.weight", module.weight
        elif isinstance(module, SharedExpert):
            yield f"{full_name}_gate.weight", module.gate
        elif isinstance(module, Linear) and module.bias is not None:
            for output, rows in split_rows(module.outputs):
                yield f"{full_name.rpartition('.')[0]}.{output}.bias", module.bias[rows]


def split_rows(outputs: dict[str, int]) -> Iterator[tuple[str, slice]]:
    start = 0
    for name, num_rows in outputs.items():
        yield name, slice(start, start + num_rows)
        start += num_rows


def take_rows(codes: Quantized, rows: slice) -> Quantized:
    zero = None if codes.zero is None else codes.zero[rows].contiguous()
    return Quantized(codes.codes[rows].contiguous(), codes.scale[rows].contiguous(), zero)
