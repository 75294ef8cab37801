"""Which layers of a model are quantized, and how: by a flag, or as the checkpoint's config says."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from common.errors import FieldError

from ..linear import Linear
from ..moe import Experts, stored
from ..weight import Weight
from .layouts import AWQLayout, GPTQLayout, PackedLayout, PlainLayout, QuantizeOnLoad
from .scheme import Scheme
from .weight import Layout, QuantizedWeight

NF4_GROUP_SIZE = 64  # as in QLoRA
METHODS = ("compressed-tensors", "gptq", "awq")
LayoutFor = Callable[[str], "Layout | None"]  # the name of a projection in the checkpoint → None if it isn't quantized


@dataclass(frozen=True, slots=True)
class QuantizationFlags:
    """name: as in EngineConfig, or "auto": as the checkpoint is. group_size: for int4."""

    name: str = "auto"
    group_size: int = 128

    def scheme(self) -> Scheme:
        match self.name:
            case "int8":
                return Scheme(bits=8)
            case "int4":
                return Scheme(bits=4, group_size=self.group_size)
            case "nf4":
                return Scheme("nf4", bits=4, group_size=NF4_GROUP_SIZE)
            case "fp8":
                return Scheme("fp8", bits=8)
            case "w8a8":
                return Scheme(bits=8, activations="int8")
        raise ValueError(self.name)

    def __str__(self) -> str:
        return f"{self.name}, groups of {self.group_size}" if self.name == "int4" else self.name


def choose_layouts(config: Any, flags: QuantizationFlags) -> LayoutFor | None:
    """None: nothing is quantized. config: the checkpoint's. Raises FieldError for a method or a setting that we can't
    read, and for a flag beside a checkpoint that is quantized already."""
    settings = quantization_settings(config)
    if settings is None:
        if flags.name == "auto":
            return None
        layout = QuantizeOnLoad(flags.scheme())
        return lambda name: layout
    method = settings.get("quant_method")
    if flags.name != "auto":
        raise FieldError(
            "quantization", f"the checkpoint is quantized already ({method}): expected auto, got {flags.name}"
        )
    if method == "compressed-tensors":
        return compressed_tensors(settings)
    if method == "gptq":
        return gptq(settings)
    if method == "awq":
        return awq(settings)
    raise unsupported("quant_method", method, METHODS)


def quantization_settings(config: Any) -> dict[str, Any] | None:
    """The config's quantization_config, None if there is none. Raises FieldError if it isn't an object."""
    settings = getattr(config, "quantization_config", None)
    return None if settings is None else as_object("quantization_config", settings)


def as_object(key: str, found: object) -> dict[str, Any]:
    """Raises FieldError for what isn't a JSON object."""
    if not isinstance(found, dict):
        raise FieldError("model", f"config.json: {key}: expected an object, got {found!r}")
    return found


def compressed_tensors(settings: Mapping[str, Any]) -> LayoutFor:
    """Of several groups that fit, one that names the projection counts most, and one for all layers of a class
    least."""
    if settings.get("quantization_status", "compressed") != "compressed":
        raise unsupported("quantization_status", settings["quantization_status"], ("compressed",))
    for key in ("transform_config", "sparsity_config"):
        if settings.get(key):
            raise unsupported(key, settings[key], (None,))
    groups = as_object("config_groups", settings.get("config_groups"))
    ignored = patterns("ignore", settings.get("ignore") or [])
    layouts = [
        (target, compressed_layout(group, group.get("format") or settings.get("format")))
        for group in (as_object(key, group) for key, group in groups.items())
        for target in patterns("targets", group.get("targets") or [])
    ]
    layouts.sort(key=lambda pair: (pair[0] == "Linear", pair[0].startswith("re:")))

    def layout_for(name: str) -> Layout | None:
        if any(matches(name, pattern) for pattern in ignored):
            return None
        return next((layout for target, layout in layouts if matches(name, target)), None)

    return layout_for


def patterns(key: str, found: object) -> list[str]:
    """Raises FieldError if they aren't names, or regular expressions after "re:"."""
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise unsupported(key, found, ("a list of strings",))
    for each in found:
        try:
            re.compile(each.removeprefix("re:"))
        except re.error as error:
            raise FieldError(
                "model", f"quantization_config: {key}: {each!r} is no regular expression: {error}"
            ) from error
    return found


def group_size_of(key: str, value: object) -> int | None:
    """None: the whole row. Raises FieldError for what isn't a number of columns."""
    if value in (-1, None):
        return None
    if type(value) is not int or value < 2 or value % 2:
        raise unsupported(key, value, (-1, "an even number above 0"))
    return value


def compressed_layout(group: Mapping[str, Any], format: object) -> Layout:
    weights, inputs = as_object("weights", group.get("weights")), group.get("input_activations")
    kind, bits, strategy = weights.get("type", "int"), weights.get("num_bits"), weights.get("strategy")
    if type(bits) is not int:
        raise unsupported("weights.num_bits", bits, (4, 8))
    if strategy not in ("channel", "group", "tensor"):
        raise unsupported("weights.strategy", strategy, ("channel", "group", "tensor"))
    if group.get("output_activations"):
        raise unsupported("output_activations", group["output_activations"], (None,))
    activations = None if inputs is None else activation_dtype(as_object("input_activations", inputs))
    if weights.get("dynamic"):
        raise unsupported("weights.dynamic", weights["dynamic"], (False,))
    group_size = group_size_of("weights.group_size", weights.get("group_size")) if strategy == "group" else None
    if strategy == "group" and group_size is None:
        raise unsupported("weights.group_size", weights.get("group_size"), ("a number of columns",))
    has_order = weights.get("actorder") in ("group", True)
    symmetric = bool(weights.get("symmetric", True))
    if format == "pack-quantized" and (kind, activations) == ("int", None) and bits in (4, 8):
        return PackedLayout(Scheme("int", bits, group_size, symmetric), has_order)
    if format == "int-quantized" and (kind, bits, symmetric) == ("int", 8, True) and activations != "fp8":
        return PlainLayout(Scheme("int", 8, group_size, activations=activations))
    if format in ("float-quantized", "naive-quantized") and (kind, bits) == ("float", 8) and activations != "int8":
        return PlainLayout(Scheme("fp8", 8, group_size, activations=activations))
    what = f"format {format!r} with {bits}-bit {kind} weights (symmetric: {symmetric}) and {activations} activations"
    wanted = "pack-quantized with int 4 or 8, int-quantized with int 8 or float-quantized with float 8"
    raise FieldError("model", f"quantization_config: {what} is not supported: expected {wanted}")


def activation_dtype(inputs: Mapping[str, Any]) -> Any:
    """int8 or fp8, with a scale for each token, computed when the token comes."""
    if not inputs.get("dynamic") or inputs.get("strategy") != "token" or not inputs.get("symmetric", True):
        raise FieldError(
            "model", "quantization_config: input_activations are supported if they are dynamic and symmetric, with "
            f"strategy token; got {dict(inputs)}",
        )  # fmt: skip
    kinds = {("int", 8): "int8", ("float", 8): "fp8"}
    found = inputs.get("type", "int"), inputs.get("num_bits")
    if found not in tuple(kinds):
        raise unsupported("input_activations", found, tuple(kinds))
    return kinds[found]


def gptq(settings: Mapping[str, Any]) -> LayoutFor:
    bits, version = settings.get("bits"), settings.get("checkpoint_format") or "gptq"
    if type(bits) is not int or bits not in (4, 8):
        raise unsupported("bits", bits, (4, 8))
    if version not in ("gptq", "gptq_v2"):
        raise unsupported("checkpoint_format", version, ("gptq", "gptq_v2"))
    for key in ("dynamic", "lm_head"):
        if settings.get(key):
            raise unsupported(key, settings[key], (None,))
    group_size = group_size_of("group_size", settings.get("group_size"))
    scheme = Scheme("int", bits, group_size, bool(settings.get("sym", True)))
    layout = GPTQLayout(scheme, bool(settings.get("desc_act")), version == "gptq")
    return partial(in_layers, layout, ())


def awq(settings: Mapping[str, Any]) -> LayoutFor:
    bits, version = settings.get("bits", settings.get("w_bit")), str(settings.get("version", "gemm")).lower()
    if type(bits) is not int or bits != 4:
        raise unsupported("bits", bits, (4,))
    if version != "gemm":
        raise unsupported("version", version, ("gemm",))
    if not settings.get("zero_point", True):
        raise unsupported("zero_point", False, (True,))
    group_size = group_size_of("group_size", settings.get("group_size", settings.get("q_group_size")))
    excluded = patterns("modules_to_not_convert", settings.get("modules_to_not_convert") or [])
    return partial(in_layers, AWQLayout(Scheme("int", 4, group_size, is_symmetric=False)), excluded)


def in_layers(layout: Layout, excluded: Sequence[str], name: str) -> Layout | None:
    return None if any(part in name for part in excluded) else layout


def matches(name: str, pattern: str) -> bool:
    """As compressed-tensors does: a class, a name, or a regular expression after "re:"."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return pattern in ("Linear", name)


def unsupported(name: str, found: object, expected: Sequence[object]) -> FieldError:
    wanted = ", ".join(map(str, expected))
    return FieldError("model", f"quantization_config: {name} {found!r} is not supported: expected one of {wanted}")


def prepare_layers(module: nn.Module, config: Any, flags: QuantizationFlags, path: str = "model") -> bool:
    """Give the layers that are quantized matrices of codes. They are loaded as others are. Returns whether there are
    any.

    module: the model, or a part of it. config: the checkpoint's. path: where the checkpoint has the module. Raises
    FieldError as choose_layouts does, and if two projections that are one matrix here are stored differently.
    """
    layout_for = choose_layouts(config, flags)
    if layout_for is None:
        return False
    for name, layer in list(module.named_modules()):
        for attribute, names in projections(layer, f"{path}.{name}", config).items():
            layouts = [layout_for(name) for name in names]
            if any(layout != layouts[0] for layout in layouts):
                raise FieldError(
                    "model", f"quantization_config: {' and '.join(names)} must be quantized in the same way"
                )
            if layouts[0] is not None:
                matrix: Weight = getattr(layer, attribute)
                check_groups(names[0], matrix.shape[-1], layouts[0].scheme, flags)
                setattr(layer, attribute, QuantizedWeight(matrix.shape, layouts[0]))
    return True


def check_groups(name: str, num_columns: int, scheme: Scheme, flags: QuantizationFlags) -> None:
    """Raises FieldError if a rank's columns aren't whole groups."""
    if scheme.group_size is not None and num_columns % scheme.group_size:
        field = "model" if flags.name == "auto" else "quantization"
        other = "another quantization_group_size or fewer ranks" if flags.name == "int4" else "fewer ranks"
        found = f"{num_columns} input features on each rank aren't whole groups of {scheme.group_size}"
        raise FieldError(field, f"{name}: {found}: expected {other}")


def projections(layer: nn.Module, path: str, config: Any) -> dict[str, list[str]]:
    """The matrices of a layer: attribute → the names of its projections in the checkpoint."""
    if isinstance(layer, Linear):
        owner = path.rpartition(".")[0]
        return {"weight": [f"{owner}.{output}" for output in layer.outputs]}
    if isinstance(layer, Experts):
        gate, up, down = (f"{stored(path, config)}.0.{name}" for name in layer.names)
        return {"gate_up": [gate, up], "down": [down]}
    return {}
