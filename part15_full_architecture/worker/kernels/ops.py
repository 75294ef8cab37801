"""Which kernel computes which operation: chosen once, when the engine starts, by device, dtype and shape."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from common.errors import FieldError

from ...kernel_names import BACKENDS, TUNED, parse_kernels
from ..quantization.products import reference_product
from . import reference
from .autotune import CASES, Tuner, shape
from .build import NoCompilerError, find_cxx, find_nvcc, version

# Each operation with its functions, and where backends have them, from this package on: a module, or module:function.
OPERATIONS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "attention": (
        ("paged_attention",),
        {"torch": ".reference", "numba": ".cpu.attention", "triton": ".triton.attention", "cuda": ".cuda.attention"},
    ),
    "norm": (
        ("add_rms_norm", "rms_norm"),
        {"torch": ".reference", "numba": ".cpu.norm", "triton": ".triton.norm", "cuda": ".cuda.norm"},
    ),
    "rotary": (
        ("rotate_and_store",),
        {"torch": ".reference", "numba": ".cpu.rotary", "triton": ".triton.rotary", "cuda": ".cuda.rotary"},
    ),
    "activation": (
        ("silu_and_mul",),
        {"torch": ".reference", "numba": ".cpu.activation", "triton": ".triton.activation", "cuda": ".cuda.activation"},
    ),
    "sampling": (
        ("sample",),
        {"torch": ".reference", "numba": ".cpu.sampling", "triton": ".triton.sampling", "cuda": ".cuda.sampling"},
    ),
    "quantized_linear": (
        ("quantized_linear",),
        {
            "torch": "..quantization.products:reference_product", "numba": "..quantization.products:numba_product",
            "triton": "..quantization.products:triton_product", "cuda": "..quantization.products:cuda_product",
        },
    ),
    "grouped_linear": (
        ("grouped_linear",),
        {
            "torch": ".reference", "numba": "..grouped_linear", "triton": "..triton_grouped_linear",
            "cuda": ".cuda.grouped_linear",
        },
    ),
}  # fmt: skip
# What "auto" takes first. On a GPU with several candidates, they are measured instead.
PREFERENCE = {"cpu": ("numba", "torch"), "cuda": ("triton", "cuda", "torch")}
CUDA_HEAD_DIMS = (32, 64, 96, 128, 256)
TURING, MAX_TURING_HEAD_DIM = (7, 5), 128  # prefill_tiled needs 69 KiB of shared memory for head_dim 256


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend of an operation, and why it was chosen."""

    backend: str
    reason: str


@dataclass(frozen=True)
class Kernels:
    """The functions of all operations; each is described in reference.py. By default, every field is the torch
    reference.

    quantized_linear(rows, weight) has a QuantizedWeight instead of its tensors.
    """

    paged_attention: Callable[..., Tensor] = staticmethod(reference.paged_attention)
    add_rms_norm: Callable[..., Tensor] = staticmethod(reference.add_rms_norm)
    rms_norm: Callable[..., Tensor] = staticmethod(reference.rms_norm)
    rotate_and_store: Callable[..., Tensor] = staticmethod(reference.rotate_and_store)
    silu_and_mul: Callable[..., Tensor] = staticmethod(reference.silu_and_mul)
    sample: Callable[..., Tensor] = staticmethod(reference.sample)
    quantized_linear: Callable[..., Tensor] = staticmethod(reference_product)
    grouped_linear: Callable[..., Tensor] = staticmethod(reference.grouped_linear)
    choices: dict[str, Choice] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Situation:
    """What the choice depends on. kv_dtype: of the KV cache. num_ranks: how many ranks share each layer."""

    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    num_ranks: int = 1

    @property
    def capability(self) -> tuple[int, int] | None:
        """The GPU's compute capability, None on a CPU."""
        return torch.cuda.get_device_capability(self.device) if self.device.type == "cuda" else None


def choose_kernels(text: str, situation: Situation, tuner: Tuner | None = None) -> Kernels:
    """The kernels for a model. text: the value of --kernels. tuner: measures the candidates; None: create one in the
    user's cache directory.

    Raises FieldError if a backend that was asked for cannot be used, and says why.
    """
    tuner = tuner or Tuner()
    choices = {name: choose(name, wanted, situation, tuner) for name, wanted in parse_kernels(text).items()}
    functions: dict[str, Any] = {
        function: load(operation, choice.backend, function)
        for operation, choice in choices.items()
        for function in OPERATIONS[operation][0]
    }
    for operation, choice in choices.items():
        warm_up(operation, choice.backend, situation)
    return Kernels(**functions, choices=choices)


def choose(operation: str, wanted: str, situation: Situation, tuner: Tuner) -> Choice:
    """The backend for one operation."""
    if wanted in BACKENDS:
        if reason := why_not(operation, wanted, situation):
            raise FieldError("kernels", f"{operation}={wanted}: {reason}")
        return Choice(wanted, "asked for")
    refused = {name: why_not(operation, name, situation) for name in PREFERENCE[situation.device.type]}
    usable = [name for name, reason in refused.items() if not reason]
    notes = [f"{name}: {reason}" for name, reason in refused.items() if reason]
    is_measured = wanted == TUNED or situation.device.type == "cuda"
    if is_measured and len(usable) > 1 and situation.num_ranks == 1 and operation in CASES:
        candidates = {name: load_all(operation, name) for name in usable}
        name = f"{operation} {shape(situation)}"
        if times := tuner.measure(name, candidates, lambda: CASES[operation](situation), situation.device):
            measured = ", ".join(f"{name} {seconds * 1e6:.0f} µs" for name, seconds in times.items())
            return Choice(min(times, key=lambda name: times[name]), "; ".join([f"measured: {measured}", *notes]))
    if is_measured and situation.num_ranks > 1:
        notes.append("not measured: all ranks must choose alike")
    return Choice(usable[0], "; ".join(["first choice", *notes]))


def why_not(operation: str, backend: str, situation: Situation) -> str:
    """Why a backend cannot compute an operation; empty if it can."""
    is_on_cpu, capability = situation.device.type == "cpu", situation.capability
    match backend:
        case "numba":
            if not is_on_cpu:
                return "numba runs only on a CPU"
            if situation.dtype == torch.float16 and operation == "attention":
                return "numba does not support float16"
        case "triton":
            if is_on_cpu:
                return "triton needs a GPU"
            if importlib.util.find_spec("triton") is None:
                return "triton is not installed"
        case "cuda":
            if operation == "attention" and situation.head_dim not in CUDA_HEAD_DIMS:
                return f"no kernel for head_dim {situation.head_dim}: expected one of {CUDA_HEAD_DIMS}"
            if operation == "attention" and capability == TURING and situation.head_dim > MAX_TURING_HEAD_DIM:
                limit = f"expected at most {MAX_TURING_HEAD_DIM}"
                return f"head_dim {situation.head_dim} on compute capability 7.5, with 64 KiB of shared memory: {limit}"
            if capability is not None and capability < (7, 0):
                return f"compute capability {capability[0]}.{capability[1]}: expected 7.0 or higher"
            if capability is not None and operation.endswith("_linear") and capability < (8, 0):
                return f"products on compute capability {capability[0]}.{capability[1]}: expected 8.0 or higher"
            if capability is not None and situation.dtype == torch.bfloat16 and capability < (8, 0):
                return f"bfloat16 on compute capability {capability[0]}.{capability[1]}: expected 8.0 or higher"
            try:
                version(find_cxx() if is_on_cpu else find_nvcc())
            except NoCompilerError as error:
                return str(error)
    return ""


@cache  # once in a process
def warm_up(operation: str, backend: str, situation: Situation) -> None:
    """Run an operation once, so that what is compiled at the first call is ready before the first request."""
    if operation in CASES and backend != "torch":
        CASES[operation](situation)(load_all(operation, backend))


def load_all(operation: str, backend: str) -> dict[str, Callable[..., Tensor]]:
    """The functions of an operation."""
    return {function: load(operation, backend, function) for function in OPERATIONS[operation][0]}


def load(operation: str, backend: str, function: str) -> Callable[..., Tensor]:
    """A kernel's function. Only the backend that is used is imported."""
    module, _, name = OPERATIONS[operation][1][backend].partition(":")
    loaded: Callable[..., Tensor] = getattr(importlib.import_module(module, __package__), name or function)
    return loaded
