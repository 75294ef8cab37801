"""How long each operation takes with each backend, beside what torch has for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.checkpoint import resolve_checkpoint
from common.results import median

from ..worker.kernels import reference
from ..worker.kernels.autotune import seconds
from ..worker.kernels.ops import OPERATIONS, Situation, load_all, why_not
from ..worker.model import head_dim
from ..worker.quantization.choice import QuantizationFlags
from ..worker.quantization.layouts import QuantizeOnLoad
from ..worker.quantization.scheme import quantize
from ..worker.quantization.weight import QuantizedWeight

BLOCK_SIZE, CONTEXT_LEN = 16, 512
NUM_MODEL_BATCH = (1, 32)
FORMATS = {"W8A16": "int8", "W4A16": "int4"}
NUM_EXPERTS, EXPERTS_PER_ROW = 8, 2
MIN_RUN_S = 2e-3  # a run repeats a call until it takes at least this long


@dataclass(frozen=True, slots=True)
class Case:
    """An operation at one size. torch: how torch computes it without a kernel of ours. run: with the functions of a
    backend. num_bytes: what must at least be read and written. num_flops: additions and multiplications."""

    name: str
    operation: str
    torch: Callable[[], object]
    run: Callable[[dict[str, Callable[..., Tensor]]], object]
    num_bytes: int
    num_flops: int


def situation_of(model: str, dtype: torch.dtype, device: str) -> Situation:
    config = resolve_checkpoint(model).config
    return Situation(
        device=torch.device(device), dtype=dtype, kv_dtype=dtype, num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads, head_dim=head_dim(config), hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
    )  # fmt: skip


def cases(situation: Situation, intermediate_size: int, num_rows: int) -> Iterator[Case]:
    """A decode step of num_rows requests, one layer of it."""
    yield norm_case(situation, num_rows)
    yield rotary_case(situation, num_rows)
    yield attention_case(situation, num_rows)
    yield activation_case(situation, intermediate_size, num_rows)
    yield sampling_case(situation, num_rows)
    for name in FORMATS:
        yield quantized_case(situation, 2 * intermediate_size, num_rows, name)
    yield grouped_case(situation, 2 * intermediate_size, num_rows)


def norm_case(s: Situation, num_rows: int) -> Case:
    rows, residual = (numbers(s, num_rows, s.hidden_size) for _ in range(2))
    weight = torch.ones(s.hidden_size, dtype=s.dtype, device=s.device)

    def in_torch() -> Tensor:
        residual.add_(rows)
        return F.rms_norm(residual, weight.shape, weight, 1e-5)

    size = num_rows * s.hidden_size
    return Case(
        "norm",
        "norm",
        in_torch,
        lambda f: f["add_rms_norm"](rows, residual, weight, 1e-5),
        4 * size * s.dtype.itemsize,
        5 * size,
    )


def rotary_case(s: Situation, num_rows: int) -> Case:
    sizes = [s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim, s.num_kv_heads * s.head_dim]
    parts = numbers(s, num_rows, sum(sizes)).split(sizes, dim=-1)
    query, key, value = (part.unflatten(-1, (-1, s.head_dim)) for part in parts)
    positions = torch.arange(num_rows, device=s.device) + CONTEXT_LEN
    table = numbers(s, 2 * CONTEXT_LEN, s.head_dim)
    kv_cache = numbers(s, num_rows, BLOCK_SIZE, 2, s.num_kv_heads, s.head_dim)
    slots = torch.arange(num_rows, device=s.device) * BLOCK_SIZE

    def in_torch() -> Tensor:
        cos, sin = table.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)
        first, second = query.chunk(2, dim=-1)
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        first, second = key.chunk(2, dim=-1)
        rotated_key = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        kv_cache.flatten(0, 1)[slots] = torch.stack((rotated_key, value), dim=1)
        return rotated

    size = num_rows * (2 * sum(sizes) + s.head_dim)
    return Case(
        "rotary", "rotary", in_torch,
        lambda f: f["rotate_and_store"](query, key, value, positions, table, kv_cache, slots, None),
        size * s.dtype.itemsize, 3 * num_rows * sum(sizes[:2]),
    )  # fmt: skip


def attention_case(s: Situation, num_rows: int) -> Case:
    width = CONTEXT_LEN // BLOCK_SIZE
    query = numbers(s, num_rows, s.num_heads, s.head_dim)
    kv_cache = numbers(s, num_rows * width, BLOCK_SIZE, 2, s.num_kv_heads, s.head_dim)
    tables = torch.randperm(num_rows * width, device=s.device).to(torch.int32).view(num_rows, width)
    starts = torch.arange(num_rows + 1, dtype=torch.int32, device=s.device)
    lens = torch.full((num_rows,), CONTEXT_LEN, dtype=torch.int32, device=s.device)
    scale = s.head_dim**-0.5

    def in_torch() -> Tensor:
        context = kv_cache.index_select(0, tables.flatten()).view(num_rows, CONTEXT_LEN, 2, s.num_kv_heads, s.head_dim)
        key, value = (each.transpose(1, 2) for each in context.unbind(2))
        return F.scaled_dot_product_attention(query.unsqueeze(2), key, value, scale=scale, enable_gqa=True)

    size = num_rows * CONTEXT_LEN * 2 * s.num_kv_heads * s.head_dim
    return Case(
        "attention", "attention", in_torch,
        lambda f: f["paged_attention"](query, kv_cache, tables, starts, lens, 1, scale),
        size * s.kv_dtype.itemsize, 4 * num_rows * CONTEXT_LEN * s.num_heads * s.head_dim,
    )  # fmt: skip


def activation_case(s: Situation, intermediate_size: int, num_rows: int) -> Case:
    gate_up = numbers(s, num_rows, 2 * intermediate_size)

    def in_torch() -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    size = num_rows * intermediate_size
    num_bytes = 3 * size * s.dtype.itemsize
    return Case("activation", "activation", in_torch, lambda f: f["silu_and_mul"](gate_up), num_bytes, 5 * size)


def sampling_case(s: Situation, num_rows: int) -> Case:
    """top-k 50 and top-p 0.9, with a seed."""
    logits = torch.randn(num_rows, s.vocab_size, device=s.device)
    ones, seeds = torch.ones(num_rows, device=s.device), torch.arange(num_rows, device=s.device)
    top_k = torch.full((num_rows,), min(50, s.vocab_size), dtype=torch.int32, device=s.device)
    arguments = (logits, ones, top_k, ones * 0.9, ones * 0, seeds, seeds)
    in_torch = partial(load_all("sampling", "torch")["sample"], *arguments)
    num_bytes, num_flops = logits.nbytes, 2 * logits.numel()
    return Case("sampling", "sampling", in_torch, lambda f: f["sample"](*arguments), num_bytes, num_flops)


def quantized_case(s: Situation, num_outputs: int, num_rows: int, name: str) -> Case:
    """Against torch's product with the matrix as it was before it was quantized."""
    rows, matrix = numbers(s, num_rows, s.hidden_size), numbers(s, num_outputs, s.hidden_size)
    scheme = QuantizationFlags(FORMATS[name]).scheme()
    weight = QuantizedWeight((num_outputs, s.hidden_size), QuantizeOnLoad(scheme)).to(s.device)
    weight.store(quantize(matrix, scheme), (slice(None),), name)
    num_bytes = weight.codes.nbytes + weight.scale.nbytes + (rows.numel() + num_rows * num_outputs) * s.dtype.itemsize
    return Case(
        name, "quantized_linear", partial(F.linear, rows, matrix), lambda f: f["quantized_linear"](rows, weight),
        num_bytes, 2 * num_rows * matrix.numel(),
    )  # fmt: skip


def grouped_case(s: Situation, num_outputs: int, num_rows: int) -> Case:
    """8 experts, of which each row takes 2. Against a product for each expert."""
    weight = numbers(s, NUM_EXPERTS, num_outputs, s.hidden_size)
    rows = numbers(s, num_rows * EXPERTS_PER_ROW, s.hidden_size)
    experts = torch.rand(num_rows, NUM_EXPERTS).topk(EXPERTS_PER_ROW).indices.flatten()
    counts = torch.bincount(experts, minlength=NUM_EXPERTS)
    num_numbers = int((counts > 0).sum()) * weight[0].numel() + len(rows) * (s.hidden_size + num_outputs)
    own = counts.to(s.device)
    return Case(
        "grouped product", "grouped_linear", partial(reference.grouped_linear, rows, weight, own),
        lambda f: f["grouped_linear"](rows, weight, own), num_numbers * s.dtype.itemsize,
        2 * len(rows) * weight[0].numel(),
    )  # fmt: skip


def numbers(s: Situation, *shape: int) -> Tensor:
    return torch.randn(shape, device=s.device).to(s.dtype)


def measure(model: str, dtype: torch.dtype, device: str, repeats: int) -> dict[str, dict[str, Any]]:
    """ "operation, n rows" → microseconds of torch and of each backend, medians of runs in turns; and the share that a
    backend's time is of torch's."""
    situation, config = situation_of(model, dtype, device), resolve_checkpoint(model).config
    found: dict[str, dict[str, Any]] = {}
    for num_rows in NUM_MODEL_BATCH:
        for case in cases(situation, config.intermediate_size, num_rows):
            backends = [name for name in ("numba", "triton", "cuda") if is_real(case.operation, name, situation)]
            runs: dict[str, Callable[[], object]] = {"torch": case.torch}
            for name in backends:
                runs[name] = partial(case.run, load_all(case.operation, name))
            times = in_turns(runs, situation.device, repeats)
            rounded = {name: round(each * 1e6, 2) for name, each in times.items()}
            speedup = {name: round(times["torch"] / times[name], 2) for name in backends}
            found[f"{case.name}, {num_rows} rows"] = {
                "us": rounded, "speedup": speedup, "bytes": case.num_bytes, "flops": case.num_flops,
            }  # fmt: skip
    return found


def is_real(operation: str, backend: str, situation: Situation) -> bool:
    """Whether a backend can compute an operation, and not only by emulation."""
    is_emulated = backend == "cuda" and situation.device.type == "cpu"
    return backend in OPERATIONS[operation][1] and not is_emulated and not why_not(operation, backend, situation)


def in_turns(runs: dict[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, float]:
    """Seconds of a call: medians."""
    num_calls = {}
    for name, run in runs.items():
        run()  # compiles
        num_calls[name] = max(1, int(MIN_RUN_S / max(seconds(run, device), 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds(partial(repeat, run, num_calls[name]), device) / num_calls[name])
    return {name: median(own) for name, own in times.items()}


def repeat(run: Callable[[], object], num_calls: int) -> None:
    for _ in range(num_calls):
        run()
