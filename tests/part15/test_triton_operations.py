"""worker/kernels/triton/: every operation equals its reference in Triton's interpreter, and every kernel compiles for
GPUs, within their shared memory and registers. Neither needs a GPU.

Whether a kernel is interpreted is decided when it is decorated, so each mode runs this file in a process of its own.
"""

from __future__ import annotations

import ctypes
import importlib.util
import inspect
import json
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from part15_full_architecture.worker import triton_attention
from part15_full_architecture.worker.kernels import reference
from part15_full_architecture.worker.kernels.triton import (
    activation,
    attention,
    masked_attention,
    norm,
    rotary,
    sampling,
    softmax,
    split_kv,
)
from part15_full_architecture.worker.quantization.scheme import to_fp8

ROOT = Path(__file__).resolve().parents[2]
MODULES = (softmax, norm, activation, rotary, split_kv, sampling, masked_attention, attention)
FUNCTIONS = {
    "softmax": softmax, "add_rms_norm": norm, "rms_norm": norm, "silu_and_mul": activation, "rotate_and_store": rotary,
    "split_kv": split_kv, "merge_states": split_kv, "sample": sampling, "masked_attention": masked_attention,
    "paged_attention": attention,
}  # fmt: skip
# Of a result: of its own size, what one rounding may change, and of the largest number, what the order of additions may
STEPS = {torch.float32: 2**-22, torch.float16: 2**-10, torch.bfloat16: 2**-7}
ADDITIONS = 1e-5
ARCHITECTURES = (80, 90)
MAX_SHARED_BYTES = 99 * 1024  # the smallest limit of the GPUs of these families (sm_86, sm_89)
POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int32: "*i32",
    torch.int8: "*i8", torch.uint8: "*u8", torch.bool: "*i1",
}  # fmt: skip
TYPES = POINTERS | {int: "i32", float: "fp32", type(None): "constexpr"}
CACHE_DTYPES = {"int8": torch.int8, "fp8": torch.uint8}
NO_ROOM = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # Linux's MAP_NORESERVE

Case = dict[str, Any]
Result = dict[str, str]  # empty, or what is wrong

SOFTMAX: dict[str, Case] = {
    **{f"rows of {size}": dict(size=size) for size in (1, 2, 37, 64, 1_000)},
    "the longest fused row": dict(size=32_768, num_rows=1),
    "the shortest online row": dict(size=32_769, num_rows=1),
    **{f"online, rows of {size}": dict(size=size, patches=dict(MAX_FUSED_SIZE=0, ONLINE_TILE_SIZE=8)) for size in
       (1, 7, 8, 9, 37)},
    "large numbers": dict(size=37, factor=1e4),
    "online, large numbers": dict(size=37, factor=1e4, patches=dict(MAX_FUSED_SIZE=0, ONLINE_TILE_SIZE=8)),
    "odd numbers": dict(size=37, is_odd=True),
    "online, odd numbers": dict(size=37, is_odd=True, patches=dict(MAX_FUSED_SIZE=0, ONLINE_TILE_SIZE=8)),
    "no rows": dict(size=37, num_rows=0),
}  # fmt: skip
NORM: dict[str, Case] = {
    **{f"rows of {size}": dict(size=size) for size in (1, 5, 32, 128, 1_000, 2_049)},
    "a row for each program": dict(size=1_000, num_rows=2),
    "small numbers": dict(size=37, factor=1e-3),
    "a residual of another dtype": dict(size=37, residual_dtype="float16"),
    "no rows": dict(size=37, num_rows=0),
    "without a residual": dict(size=37, has_residual=False),
    "heads": dict(size=32, num_heads=3, has_residual=False),
    "heads that are a view": dict(size=32, num_heads=3, has_residual=False, is_view=True),
    "rows that are a view": dict(size=37, has_residual=False, is_view=True),
}
ACTIVATION: dict[str, Case] = {
    **{f"rows of {size}": dict(size=size) for size in (1, 5, 32, 1_024, 1_500)},
    "large numbers": dict(size=37, factor=100),
    "no rows": dict(size=5, num_rows=0),
}
ROTARY: dict[str, Case] = {
    **{f"{size} heads for each KV head": dict(group_size=size) for size in (1, 2, 3, 8)},
    **{f"heads of {size}": dict(head_dim=size) for size in (2, 6, 32)},
    "rows that are views": dict(is_view=True),
    "keys apart from values": dict(is_separate=True),
    "a table in float16": dict(table_dtype="float16"),
    "one KV head": dict(num_kv_heads=1, is_view=True),
    "no tokens": dict(num_tokens=0),
    **{f"{kind}, {group} heads for each KV head": dict(kv_dtype=kind, group_size=group, is_view=group == 3) for kind in
       CACHE_DTYPES for group in (1, 3)},
}  # fmt: skip
SPLIT: dict[str, Case] = {
    "1 query head for each KV head": dict(group_size=1),
    "2 query heads for each KV head": dict(group_size=2),
    "3 query heads for each KV head": dict(group_size=3),
    "17 query heads for each KV head": dict(group_size=17, num_kv_heads=1, seqs=[(1, 5), (1, 70)]),
    "blocks of 1": dict(block_size=1, seqs=[(1, 1), (1, 3), (1, 70)]),
    "blocks of 64": dict(block_size=64, seqs=[(1, 64), (1, 65)]),
    "heads of 8": dict(head_dim=8),
    "heads of 24": dict(head_dim=24),
    "large scores": dict(scale=100.0),
    "one part": dict(min_part_size=1_000),
    "more parts than tiles": dict(min_part_size=8, seqs=[(1, 40), (1, 17)]),
    "keys apart from values": dict(is_separate=True),
    "int8": dict(kv_dtype="int8", scale=1 / 256),
    "fp8": dict(kv_dtype="fp8", scale=1 / 1_024),
}
MERGE: dict[str, Case] = {
    "two parts": dict(outputs=[[1.0], [3.0]], log_sums=[0.0, 1.0986123], expected=[2.5], total=1.3862944),
    "an empty part": dict(outputs=[[1.0], [torch.nan]], log_sums=[0.5, -torch.inf], expected=[1.0], total=0.5),
    "all parts empty": dict(
        outputs=[[torch.nan], [torch.nan]], log_sums=[-torch.inf, -torch.inf], expected=[0.0], total=-torch.inf
    ),
    "large log-sum-exps": dict(outputs=[[1.0], [3.0]], log_sums=[500.0, 500.0], expected=[2.0], total=500.6931472),
    "small log-sum-exps": dict(outputs=[[1.0], [3.0]], log_sums=[-500.0, -500.0], expected=[2.0], total=-499.3068528),
}
SAMPLE: dict[str, Case] = {
    "neither top-k nor top-p, many rows": dict(num_rows=20),
    "greedy": dict(temperature=0.0, top_k=5, top_p=0.5),
    "greedy, equal logits": dict(temperature=0.0, step=1.0),
    "neither top-k nor top-p": dict(),
    "temperature 0.01": dict(temperature=0.01),
    "temperature 100": dict(temperature=100.0),
    "top_k 1": dict(top_k=1),
    "top_k 5": dict(top_k=5),
    "top_k 2 of 3": dict(logits=[0.0, -0.001, -0.002], top_k=2, num_rows=8),
    "top_k, equal logits": dict(top_k=5, step=1.0),
    "top_k, temperature 3, equal logits": dict(top_k=7, step=0.5, temperature=3.0),
    "top_p 0.9": dict(top_p=0.9),
    "top_p 0.9, equal logits": dict(top_p=0.9, step=1.0),
    "top_p 0.2, equal logits": dict(top_p=0.2, step=2.0),
    "top_p tiny": dict(top_p=1e-30),
    "top_p 0.995": dict(logits=[5.5, 0.0], top_p=0.995, seed=817, num_rows=1),  # with 1, this seed draws the second
    "min_p 0.1": dict(min_p=0.1),
    "min_p 1": dict(min_p=1.0, step=1.0),
    "top_k and top_p": dict(top_k=10, top_p=0.8),
    "top_k and top_p, likely alike": dict(top_k=4, top_p=0.6, temperature=100.0, num_rows=10),
    "top_k and min_p": dict(top_k=30, min_p=0.5, temperature=5.0, num_rows=5),
    "top_p and min_p": dict(top_p=0.8, min_p=0.2),
    "all three": dict(top_k=20, top_p=0.95, min_p=0.05, temperature=2.0),
    "few logits that are not -inf": dict(num_finite=3, top_k=10, top_p=0.9),
    "no logits that are not -inf": dict(num_finite=0, top_k=10, top_p=0.9),
    "only negative logits": dict(shift=-50.0, top_k=5),
    "logits around 1000": dict(shift=1_000.0, top_k=5, top_p=0.9),
    "0.0 and -0.0 are equal": dict(logits=[-1.0, 0.0, -0.0, -2.0], top_k=1),
    "-0.0 and 0.0 are equal": dict(logits=[-1.0, -0.0, 0.0, -2.0], top_p=0.1),
    "neighbors that a division makes equal": dict(logits=[1 - 2**-24, 1.0, 0.5, -1.0], top_k=1, temperature=1.9),
    "neighbors": dict(logits=[1 - 2**-24, 1.0, 1 + 2**-23, 0.5], top_k=2),
    "a vocabulary of 1": dict(logits=[3.0], top_k=1, top_p=0.5),
    # seeds whose first token's noise, or another's that wins, needs the limits and the accuracy of noise.py
    "the smallest noise": dict(logits=[0.0, 30.0], seed=1_697_193_032, num_rows=1),
    "the largest noise": dict(logits=[0.0, -30.0], seed=29_241_918, num_rows=1),
    "a small noise": dict(logits=[0.0] * 100_000, seed=542, num_rows=1),
    "large seeds and positions": dict(seed=-(2**63), position=2**62, top_k=20),
    **{f"tiles of 16, {name}": dict(case, patches=dict(TILE_SIZE=16)) for name, case in {
        "greedy": dict(temperature=0.0), "greedy, equal logits": dict(temperature=0.0, step=1e3),
        "all tokens": dict(temperature=5.0), "top_k and top_p": dict(top_k=20, top_p=0.9, temperature=5.0),
    }.items()},
}  # fmt: skip
MASKED: dict[str, Case] = {
    "a random mask": dict(),
    "causal": dict(num_queries=20, num_keys=20, mask="causal"),
    "all keys visible": dict(mask="all"),
    "no keys visible": dict(mask="none"),
    "one query": dict(num_queries=1, num_keys=37),
    "several tiles": dict(num_queries=70, num_keys=70),
    "heads of 24": dict(head_dim=24),
    "large scores": dict(scale=100.0),
}
# The cases of a slow operation that run in float16, too
IN_FLOAT16 = {"split_kv": ("3 query heads for each KV head", "more parts than tiles", "large scores", *CACHE_DTYPES)}
DTYPES = ("float32", "float16")  # bfloat16 is silently wrong in the interpreter's tl.dot


def compare(
    got: Tensor, expected: Tensor, dtype: torch.dtype, what: str = "result", additions: float = ADDITIONS
) -> Result:
    """What is wrong, if anything. expected: in float64. additions: a part of the largest number."""
    got = got.cpu()
    if got.shape != expected.shape or got.dtype != dtype:
        return {
            "error": f"{what}: expected {dtype} {list(expected.shape)}, got {got.dtype} {list(got.shape)}"
        }  # fmt: skip
    exact, found = expected.double(), got.double()
    largest = exact.nan_to_num(0.0, 0.0, 0.0).abs().amax() if exact.numel() else torch.tensor(0.0)
    # below the smallest normal number, steps are as large as at it
    limit = STEPS[dtype] * exact.abs().clamp_min(torch.finfo(dtype).smallest_normal) + additions * largest
    is_right = (found - exact).abs() <= limit
    is_right |= (found == exact) | (found.isnan() & exact.isnan())
    if is_right.all():
        return {}
    place = (~is_right).nonzero()[0].tolist()
    return {
        "error": f"{what}: {int((~is_right).sum())} of {exact.numel()} numbers are wrong, for instance at {place}: "
        f"expected {float(exact[tuple(place)]):.9g}, got {float(found[tuple(place)]):.9g} (NaN: not written, or read "
        f"from where nothing was written)"
    }


def first_error(*results: Result) -> Result:
    return next((result for result in results if result), {})


def random(*shape: int, dtype: str, factor: float = 1.0) -> Tensor:
    return (torch.randn(shape) * factor).to(getattr(torch, dtype))


@contextmanager
def patched(module: ModuleType, patches: dict[str, Any] | None) -> Iterator[None]:
    with mock.patch.multiple(module, **patches) if patches else ExitStack():
        yield


def compare_softmax(
    size: int, dtype: str, num_rows: int = 5, factor: float = 1.0, is_odd: bool = False,
    patches: dict[str, Any] | None = None, device: str = "cpu",
) -> Result:  # fmt: skip
    rows = random(num_rows, size, dtype=dtype, factor=factor)
    if is_odd:
        rows[0], rows[1, :30], rows[2, 3:] = -torch.inf, -torch.inf, -torch.inf
        rows[3, 5], rows[4, -1] = torch.nan, torch.inf
    expected = rows.double().softmax(dim=-1)
    expected[(rows == -torch.inf).all(dim=-1)] = 0.0
    with patched(softmax, patches):
        got = softmax.softmax(rows.to(device))
    return compare(got, expected, rows.dtype)


def compare_norm(
    size: int, dtype: str, num_rows: int = 35, factor: float = 1.0, residual_dtype: str | None = None,
    has_residual: bool = True, num_heads: int | None = None, is_view: bool = False, device: str = "cpu",
) -> Result:  # fmt: skip
    shape = (num_rows, size) if num_heads is None else (num_rows, num_heads, size)
    rows, eps = random(*shape, dtype=dtype, factor=factor).to(device), 1e-6
    if is_view:
        rows = torch.cat((rows, rows), dim=1)[:, : shape[1]]
    weight = random(size, dtype=dtype)
    total, residual = rows.cpu().double(), random(*shape, dtype=residual_dtype or dtype, factor=factor)
    if has_residual:
        total += residual.double()
    normalized = total * (total.square().mean(dim=-1, keepdim=True) + eps).rsqrt() * weight.double()
    if not has_residual:
        return compare(norm.rms_norm(rows, weight.to(device), eps), normalized, rows.dtype)
    residual = residual.to(device)
    got = norm.add_rms_norm(rows, residual, weight.to(device), eps)
    return first_error(
        compare(got, normalized, rows.dtype), compare(residual, total, residual.dtype, "the residual stream")
    )


def compare_activation(size: int, dtype: str, num_rows: int = 3, factor: float = 3.0, device: str = "cpu") -> Result:
    gate_up = random(num_rows, 2 * size, dtype=dtype, factor=factor)
    gate, up = gate_up.double().chunk(2, dim=-1)
    return compare(activation.silu_and_mul(gate_up.to(device)), F.silu(gate) * up, gate_up.dtype)


def compare_rotary(
    dtype: str, group_size: int = 2, num_kv_heads: int = 2, head_dim: int = 16, num_tokens: int = 5,
    is_view: bool = False, is_separate: bool = False, table_dtype: str = "float32", kv_dtype: str | None = None,
    device: str = "cpu",
) -> Result:  # fmt: skip
    """The cache is full of a sentinel before, so that a write to a wrong slot is seen."""
    counts = (group_size * num_kv_heads, num_kv_heads, num_kv_heads)
    qkv = random(num_tokens, sum(counts) * head_dim, dtype=dtype)
    query, key, value = (
        part.unflatten(1, (-1, head_dim)) for part in qkv.split([count * head_dim for count in counts], dim=1)
    )
    if not is_view:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    positions, slots = torch.tensor([0, 49, 7, 8, 20])[:num_tokens], torch.tensor([11, 0, -1, 5, 3])[:num_tokens]
    table = random(50, head_dim, dtype=table_dtype)
    cache_dtype = CACHE_DTYPES[kv_dtype] if kv_dtype else query.dtype
    kv_cache = torch.full((3, 4, 2, num_kv_heads, head_dim), 77).to(cache_dtype)
    if is_separate:  # in memory: all keys of a block, then all its values
        kv_cache = kv_cache.transpose(1, 2).contiguous().transpose(1, 2)
    # small scales, so that some numbers are out of range; the values' are others than the keys'
    scales = (torch.arange(1.0, 2 * num_kv_heads + 1) / 90).view(2, -1) if kv_dtype else None
    if kv_dtype == "fp8" and scales is not None:
        scales /= 5
    arguments = query, key, value, positions, table
    expected_cache = kv_cache.clone(memory_format=torch.contiguous_format)  # the reference writes to no other
    expected = reference.rotate_and_store(*arguments, expected_cache, slots, scales)
    # on the device, heads that are views stay views
    moved = [each if device == "cpu" else each.to(device) for each in arguments]
    found_cache = kv_cache.to(device)
    got = rotary.rotate_and_store(
        *moved, found_cache, slots.to(device), None if scales is None else scales.to(device)
    )  # fmt: skip
    wrong = compare(got, expected, query.dtype, "the queries")
    if kv_dtype:
        wrong_codes = (found_cache.cpu() != expected_cache).nonzero().tolist()
        if wrong_codes and not wrong:
            place = tuple(wrong_codes[0])
            wrong = {
                "error": f"{len(wrong_codes)} of {kv_cache.numel()} codes in the cache are wrong, for instance at "
                f"[block, offset, key or value, head, dimension] {list(place)}: expected {expected_cache[place]}, got "
                f"{found_cache[place]}"
            }
        return wrong
    return first_error(wrong, compare(found_cache, expected_cache, cache_dtype, "the cache"))


def encode_all(kv_dtype: str, dtype: str, device: str = "cpu") -> Result:
    """Values of all sorts with a scale of 1 or 0.3: all float16 numbers, or float32 numbers around all ties."""
    if dtype == "float16":
        values = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    elif kv_dtype == "fp8":
        codes = torch.arange(0, 127).to(torch.uint8).view(torch.float8_e4m3fn).float()
        ties = (codes[1:] + codes[:-1]) / 2
        near = [nearby(numbers) for numbers in (codes, ties)]
        extremes = torch.tensor([464.0, 465.0, 1e10, 1e-45, 1e-40, 3e38, torch.inf, torch.nan])
        values = torch.cat([*near, extremes])
        values = torch.cat((values, -values))
    else:
        ties = torch.arange(-130, 130) + 0.5
        values = torch.cat((nearby(ties), torch.tensor([1e10, -1e10, torch.inf, -torch.inf, 0.0, -0.0])))
    if kv_dtype == "int8":  # NaN as an integer is not defined
        values = values.nan_to_num(0.0, torch.inf, -torch.inf)
    head_dim = 2 * -(-len(values) // 2)
    values = F.pad(values, (0, head_dim - len(values))).view(1, 1, -1)
    if dtype == "float16":  # several tokens, so that a program does not have too many numbers
        values = values.view(16, 1, -1)
        head_dim = values.shape[-1]
    num_tokens = len(values)
    zeros, slots = torch.zeros_like(values), torch.arange(num_tokens)
    for scale in (1.0, 0.3):
        scales, kv_cache = torch.tensor([[1.0], [scale]]), torch.zeros(num_tokens, 1, 2, 1, head_dim)
        kv_cache = kv_cache.to(CACHE_DTYPES[kv_dtype]).to(device)
        moved = [each.to(device) for each in (zeros, zeros, values, slots * 0, torch.ones(1, head_dim))]
        rotary.rotate_and_store(*moved, kv_cache, slots.to(device), scales.to(device))
        scaled = values.float() / scale
        expected = to_fp8(scaled).view(torch.uint8) if kv_dtype == "fp8" else scaled.round().clamp(-127, 127)
        got, wanted = kv_cache[:, 0, 1].cpu(), expected.to(CACHE_DTYPES[kv_dtype])
        wrong = (got != wanted).nonzero().tolist()
        if wrong:
            place = tuple(wrong[0])
            return {
                "error": f"{len(wrong)} of {values.numel()} values become another code than in torch, for instance "
                f"{float(values[place]):.9g} with the scale {scale}: expected {wanted[place]}, got {got[place]}"
            }
    return {}


def nearby(numbers: Tensor) -> Tensor:
    """Each number, and the float32 numbers right below and above it."""
    infinity = torch.tensor(torch.inf)
    return torch.cat((numbers, numbers.nextafter(infinity), numbers.nextafter(-infinity)))


def compare_split(
    dtype: str, group_size: int = 2, num_kv_heads: int = 2, head_dim: int = 16, block_size: int = 4,
    seqs: list[tuple[int, int]] | None = None, scale: float = 0.25, min_part_size: int = 32,
    is_separate: bool = False, kv_dtype: str | None = None, device: str = "cpu",
) -> Result:  # fmt: skip
    """seqs: of each its number of queries, 0 or 1, and its context. NaN, or a large code, is in every slot that no
    sequence owns; entries of block tables past a context's end are outside of the pool."""
    seqs = seqs or [(1, 33), (1, 1), (0, 9), (1, 97), (0, 0)]
    counts = [-(-context_len // block_size) for _, context_len in seqs]
    blocks = torch.randperm(sum(counts) + 2).tolist()  # two blocks that no sequence owns
    shape = (len(blocks), block_size, 2, num_kv_heads, head_dim)
    kv_cache = torch.full(shape, torch.nan).to(getattr(torch, dtype))
    if kv_dtype:
        kv_cache = torch.full(shape, 126).to(CACHE_DTYPES[kv_dtype])
    if is_separate:
        kv_cache = kv_cache.transpose(1, 2).contiguous().transpose(1, 2)
    tables = torch.full((len(seqs), max(counts) + 2), 10**6, dtype=torch.int32)
    query = random(sum(query_len for query_len, _ in seqs), num_kv_heads * group_size, head_dim, dtype=dtype)
    expected, token = torch.empty(query.shape, dtype=torch.float64), 0
    for seq, ((query_len, context_len), count) in enumerate(zip(seqs, counts, strict=True)):
        owned = [blocks.pop() for _ in range(count)]
        tables[seq, :count] = torch.tensor(owned, dtype=torch.int32)
        stored = random(context_len, 2, num_kv_heads, head_dim, dtype=dtype)
        if kv_dtype:
            stored = (stored * (40 if kv_dtype == "int8" else 100)).float()
            stored = to_fp8(stored).view(torch.uint8) if kv_dtype == "fp8" else stored.clamp(-127, 127).to(torch.int8)
        for position in range(context_len):
            kv_cache[owned[position // block_size], position % block_size] = stored[position]
        if kv_dtype == "fp8":
            stored = stored.view(torch.float8_e4m3fn)
        if query_len:
            expected[token] = dense(query[token].double(), *stored.double().unbind(1), scale)
            token += 1
    starts = torch.tensor([0] + [query_len for query_len, _ in seqs]).cumsum(0).to(torch.int32)
    lens = torch.tensor([context_len for _, context_len in seqs], dtype=torch.int32)
    with mock.patch.object(split_kv, "MIN_PART_SIZE", min_part_size):
        got = split_kv.split_kv(*(each.to(device) for each in (query, kv_cache, tables, starts, lens)), 1, scale)
    # a float32 score of some hundreds is off by 2⁻²⁴ of it, and its weight by that share; float16 weights by 2⁻¹¹
    additions = {"float32": 3e-5 if scale > 1 else ADDITIONS, "float16": 2**-10, "bfloat16": 2**-7}[dtype]
    return compare(got, expected, query.dtype, additions=additions)


def dense(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """query: [num_heads, head_dim]; key, value: [context_len, num_kv_heads, head_dim]."""
    group_size = query.shape[0] // key.shape[1]
    key, value = key.repeat_interleave(group_size, dim=1), value.repeat_interleave(group_size, dim=1)
    weights = (torch.einsum("hd,khd->hk", query, key) * scale).softmax(dim=-1)
    return torch.einsum("hk,khd->hd", weights, value)


def split_padding(dtype: str, device: str = "cpu") -> Result:
    """A query whose context has no tokens, as padding of a batch may have."""
    query, kv_cache = random(2, 2, 16, dtype=dtype), random(1, 4, 2, 1, 16, dtype=dtype)
    tables, starts = torch.tensor([[0] * 40, [10**6] * 40], dtype=torch.int32), torch.tensor([0, 1, 2]).int()
    arguments = (query, kv_cache, tables, starts, torch.tensor([1, 0]).int())
    got = split_kv.split_kv(*(each.to(device) for each in arguments), 1, 0.25)
    expected = torch.stack((kv_cache[0, 0, 1].double().expand(2, 16), torch.zeros(2, 16)))
    return compare(got, expected, query.dtype)


def compare_attention(query_lens: list[int], context_lens: list[int], device: str = "cpu") -> Result:
    """What an engine calls for a step, decodes or not. Block tables have room for 300 tokens: in two parts."""
    tables = torch.randperm(len(query_lens) * 75).to(torch.int32).view(len(query_lens), 75)
    query, kv_cache = (
        random(sum(query_lens), 4, 16, dtype="float32"),
        random(tables.numel(), 4, 2, 2, 16, dtype="float32"),
    )
    starts, lens = torch.tensor([0, *query_lens]).cumsum(0).int(), torch.tensor(context_lens).int()
    arguments = (query, kv_cache, tables, starts, lens)
    got = attention.paged_attention(*(each.to(device) for each in arguments), max(query_lens), 0.25)
    expected = reference.paged_attention(*arguments, max(query_lens), 0.25)
    return compare(got, expected, query.dtype)


def compare_merge(
    outputs: list[list[float]], log_sums: list[float], expected: list[float], total: float, device: str = "cpu"
) -> Result:
    got = split_kv.merge_states(torch.tensor(outputs, device=device), torch.tensor(log_sums, device=device))
    return first_error(
        compare(got[0], torch.tensor(expected), torch.float32, "the attention"),
        compare(got[1], torch.tensor(total), torch.float32, "the log-sum-exp"),
    )


def merge_at_random(num_parts: int, device: str = "cpu") -> Result:
    """Several rows; some parts are empty, and their outputs NaN."""
    outputs, log_sums = torch.randn(num_parts, 3, 2, 24), torch.randn(num_parts, 3, 2) * 3
    is_empty = torch.rand(log_sums.shape) < 0.3
    outputs[is_empty], log_sums[is_empty] = torch.nan, -torch.inf
    expected = reference.merge_states(outputs.double(), log_sums.double())
    got = split_kv.merge_states(outputs.to(device), log_sums.to(device))
    return first_error(
        compare(got[0], expected[0], torch.float32, "the attention"),
        compare(got[1], expected[1], torch.float32, "the log-sum-exp"),
    )


def compare_sample(
    temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0, min_p: float = 0.0, seed: int = 0,
    position: int = 0, step: float | None = None, shift: float = 0.0, num_finite: int | None = None,
    logits: list[float] | None = None, num_rows: int = 2, patches: dict[str, Any] | None = None, device: str = "cpu",
) -> Result:  # fmt: skip
    """Rows with the same parameters and other seeds. step: logits are multiples of it, so that many are equal."""
    rows = (torch.randn(num_rows, 50) * 3 + shift) if logits is None else torch.tensor(logits).repeat(num_rows, 1)
    if step:
        rows = (rows / step).round() * step
    if num_finite is not None:
        rows = rows.masked_fill(torch.rand_like(rows).argsort(dim=-1) >= num_finite, -torch.inf)
    vocab_size = rows.shape[1]
    arguments = (
        rows,
        torch.full((num_rows,), temperature),
        torch.full((num_rows,), vocab_size if top_k is None else top_k, dtype=torch.int32),
        torch.full((num_rows,), top_p),
        torch.full((num_rows,), min_p),
        torch.arange(seed, seed + num_rows),
        torch.arange(position, position + num_rows) * 5 % 2**62,
    )
    expected = reference.sample(*arguments)
    with patched(sampling, patches):
        got = sampling.sample(*(each.to(device) for each in arguments)).cpu()
    if got.dtype == torch.int64 and torch.equal(got, expected):
        return {}
    found = got.tolist()
    logits_of = [
        [row[token] if 0 <= token < vocab_size else None for row, token in zip(rows.tolist(), tokens, strict=True)]
        for tokens in (expected.tolist(), found)
    ]
    return {
        "error": f"expected torch.int64 tokens {expected.tolist()} with the logits {logits_of[0]}, got {got.dtype} "
        f"{found} with {logits_of[1]}"
    }


def sample_mixed(device: str = "cpu") -> Result:
    """Rows of all kinds in one batch, in a tensor whose rows have a stride; the columns are not all alike."""
    rows = torch.randn(6, 64)[:, :50] * 3
    arguments = (
        rows, torch.tensor([0, 1, 0.5, 2, 0, 1]), torch.tensor([50, 50, 5, 50, 3, 10]).int(),
        torch.tensor([1, 0.3, 1, 0.9, 0.1, 0.5]), torch.tensor([0, 0, 0, 0.1, 0, 0.01]),
        torch.tensor([3, 1, 4, 1, 5, 9]), torch.tensor([2, 6, 5, 3, 5, 8]),
    )  # fmt: skip
    expected = reference.sample(*arguments)
    strided, *columns = arguments
    if device != "cpu":
        strided = F.pad(strided, (0, 14)).to(device)[:, :50]
    got = sampling.sample(strided, *(each.to(device) for each in columns)).cpu()
    return {} if torch.equal(got, expected) else {"error": f"expected tokens {expected.tolist()}, got {got.tolist()}"}


def compare_masked(
    dtype: str, num_queries: int = 9, num_keys: int = 40, head_dim: int = 16, mask: str = "random", scale: float = 0.25,
    device: str = "cpu",
) -> Result:  # fmt: skip
    query = random(2, 3, num_queries, head_dim, dtype=dtype)
    key, value = (random(2, 3, num_keys, head_dim, dtype=dtype) for _ in range(2))
    visible = torch.rand(num_queries, num_keys) < 0.5
    if mask != "random":
        visible = torch.full_like(visible, mask != "none")
    if mask == "causal":
        visible = visible.tril(num_keys - num_queries)
    elif mask == "random" and num_queries > 8:
        visible[2], visible[3, :35], visible[4, 1:], visible[5, :-1] = False, False, False, False
    expected = reference_masked_attention(query, key, value, visible, scale)
    got = masked_attention.masked_attention(*(each.to(device) for each in (query, key, value, visible)), scale)
    additions = {"float32": 3e-5 if scale > 1 else ADDITIONS, "float16": 2**-10, "bfloat16": 2**-7}[dtype]
    return compare(got, expected, query.dtype, additions=additions)


def reference_masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """reference.py::masked_attention in float64."""
    scores = query.double() @ key.double().transpose(-1, -2) * scale
    return scores.masked_fill(~mask, -torch.inf).softmax(dim=-1).nan_to_num(0.0) @ value.double()


def far_tensor(*shape: int, dtype: torch.dtype) -> Tensor:
    """Memory that is not touched costs nothing, however much it is."""
    count = torch.Size(shape).numel()
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=NO_ROOM)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)


def far_rows(which: str) -> Result:
    """Rows that begin 2³¹ elements into a tensor. Of each kernel, only the last program runs."""
    size, num_rows = 1_024, 2**21 + 1
    width = 2 * size if which == "silu_and_mul" else size
    rows = far_tensor(num_rows, width, dtype=torch.float16)
    rows[-1] = torch.randn(width)
    last, weight = rows[-1:].clone(), torch.randn(size).half()
    if which == "softmax":
        return compare(softmax.softmax(rows)[-1:], last.double().softmax(dim=-1), torch.float16)
    if which == "online softmax":
        with mock.patch.multiple(softmax, MAX_FUSED_SIZE=0, ONLINE_TILE_SIZE=512):
            return compare(softmax.softmax(rows)[-1:], last.double().softmax(dim=-1), torch.float16)
    if which == "silu_and_mul":
        gate, up = last.double().chunk(2, dim=-1)
        return compare(activation.silu_and_mul(rows)[-1:], F.silu(gate) * up, torch.float16)
    if which == "rms_norm":
        expected = F.rms_norm(last.double(), (size,), weight.double(), 1e-6)
        return compare(norm.rms_norm(rows, weight, 1e-6)[-1:], expected, torch.float16)
    assert which == "sample"
    logits, ones, seeds = far_tensor(3, 2**30 + 64, dtype=torch.float32)[:, :50], torch.ones(3), torch.arange(3)
    logits[2] = torch.randn(50)
    columns = (ones, ones.int() * 20, ones * 0.9, ones * 0, seeds, seeds)
    got = sampling.sample(logits, *columns)[2]
    wanted = reference.sample(logits[2:], *(column[2:] for column in columns))[0]
    return {} if got == wanted else {"error": f"expected token {int(wanted)}, got {int(got)}"}


def far_cache(which: str) -> Result:
    """A block that begins 2³¹ codes into the pool."""
    block_size, head_dim = 4, 16
    num_blocks = 2**31 // (block_size * 2 * head_dim) + 2
    kv_cache = far_tensor(num_blocks, block_size, 2, 1, head_dim, dtype=torch.int8)
    block, query = num_blocks - 1, torch.randn(1, 1, head_dim)
    if which == "rotate_and_store":
        value, slots = torch.randn(1, 1, head_dim) * 50, torch.tensor([block * block_size + 1])
        table, scales = torch.ones(1, head_dim), torch.ones(2, 1)
        rotary.rotate_and_store(query, query, value, torch.tensor([0]), table, kv_cache, slots, scales)
        return compare(kv_cache[block, 1, 1].float(), value[0].double().round(), torch.float32)
    kv_cache[block] = torch.randint(-127, 128, (block_size, 2, 1, head_dim)).to(torch.int8)
    tables, starts, lens = (torch.tensor(each).int() for each in ([[block]], [0, 1], [4]))
    expected = dense(query[0].double(), *kv_cache[block].double().unbind(1), 0.01)
    return compare(split_kv.split_kv(query, kv_cache, tables, starts, lens, 1, 0.01)[0], expected, torch.float32)


def far_parts() -> Result:
    """A part whose outputs begin 2³¹ elements into the tensor of all parts."""
    num_rows, head_dim = 2**26 + 1, 16
    outputs = far_tensor(3, num_rows, head_dim, dtype=torch.float32)
    log_sums = far_tensor(3, num_rows, dtype=torch.float32)
    outputs[:, -1], log_sums[:, -1] = torch.randn(3, head_dim), torch.randn(3)
    expected = reference.merge_states(outputs[:, -1].double(), log_sums[:, -1].double())[0]
    return compare(split_kv.merge_states(outputs, log_sums)[0][-1], expected, torch.float32)


def far_masked(which: str) -> Result:
    """Queries, or keys, of a head that begins 2³¹ elements into the tensor."""
    shapes = {"keys": (1, 2**17 + 1, 1, 16, 2**10), "queries": (1, 1, 2**27 + 1, 16, 40)}
    batch_size, num_heads, num_queries, head_dim, num_keys = shapes[which]
    query = far_tensor(batch_size, num_heads, num_queries, head_dim, dtype=torch.float16)
    key, value = (far_tensor(batch_size, num_heads, num_keys, head_dim, dtype=torch.float16) for _ in range(2))
    mask = far_tensor(num_queries, num_keys, dtype=torch.bool)
    query[:, -1, -1], key[:, -1], value[:, -1] = torch.randn(head_dim), *torch.randn(2, num_keys, head_dim)
    mask[-1] = torch.rand(num_keys) < 0.5
    expected = reference_masked_attention(query[:, -1:, -1:], key[:, -1:], value[:, -1:], mask[-1:], 0.25)
    got = masked_attention.masked_attention(query, key, value, mask, 0.25)[:, -1:, -1:]
    return compare(got, expected, torch.float16, additions=2**-10)


FAR: dict[str, tuple[Callable[..., Result], Case]] = {
    **{f"far rows, {which}": (far_rows, {"which": which}) for which in
       ("softmax", "online softmax", "rms_norm", "silu_and_mul", "sample")},
    **{f"far cache, {which}": (far_cache, {"which": which}) for which in ("rotate_and_store", "split_kv")},
    "far parts, merge_states": (far_parts, {}),
    **{f"far {which}, masked_attention": (far_masked, {"which": which}) for which in ("keys", "queries")},
}  # fmt: skip


class Guarded:
    """A kernel whose tensors end where memory ends that may be touched: an access past an end ends the process, and a
    write before a beginning raises."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **sizes: Any) -> None:
            guarded = [at_the_end(each) if isinstance(each, Tensor) else (each, None) for each in arguments]
            self.kernel[grid](*(each for each, _ in guarded), **sizes)
            for original, (copy, before) in zip(arguments, guarded, strict=True):
                if isinstance(original, Tensor):
                    assert before is None or bool((before == 0xA5).all()), "a write before a tensor's beginning"
                    original.copy_(copy)

        return launch


def at_the_end(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
    """A copy, with the same strides, before a page that can't be read or written; and the bytes before it."""
    if not tensor.numel():
        return tensor, None
    length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    used_bytes = length * tensor.element_size()
    num_bytes = (used_bytes // mmap.PAGESIZE + 2) * mmap.PAGESIZE  # with at least a page before it
    memory = mmap.mmap(-1, num_bytes + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + num_bytes), mmap.PAGESIZE, 0) == 0
    before = torch.frombuffer(memory, dtype=torch.uint8, count=num_bytes - used_bytes).fill_(0xA5)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=length, offset=num_bytes - used_bytes)
    return copy.as_strided(tensor.shape, tensor.stride()).copy_(tensor), before


class LastProgram:
    """A kernel of which only the last program runs."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        from triton.runtime import interpreter

        builder, dims = interpreter.interpreter_builder, (*grid, 1, 1)[:3]

        def set_grid_idx(*_: int) -> None:
            builder.grid_idx = (dims[0] - 1, dims[1] - 1, dims[2] - 1)

        def set_grid_dim(*_: int) -> None:
            builder.grid_dim = dims

        def launch(*arguments: Any, **sizes: Any) -> None:
            replaced = {"set_grid_idx": set_grid_idx, "set_grid_dim": set_grid_dim}
            with mock.patch.multiple(builder, **replaced):
                self.kernel[1, 1](*arguments, **sizes)

        return launch


class Launch(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    sizes: dict[str, Any]


class Recorder:
    """A kernel that does not run: its launches are kept."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **sizes: self.launches.append(Launch(self.kernel, grid, arguments, sizes))


@contextmanager
def kernels_as(wrap: Callable[[Any], Any]) -> Iterator[None]:
    """All kernels of all modules, wrapped."""
    with ExitStack() as stack:
        for module in MODULES:
            for name, value in list(vars(module).items()):
                if name.startswith("_") and name.endswith("_kernel"):
                    stack.enter_context(mock.patch.object(module, name, wrap(value)))
        yield


def record(call: Callable[[], object]) -> list[Launch]:
    """What a call launches. Nothing runs."""
    launches = list[Launch]()
    with kernels_as(lambda kernel: Recorder(kernel, launches)):
        call()
    return launches


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor without numbers: a call that waits for the device raises."""
    return torch.empty(shape, dtype=dtype, device="meta")


def call_rotary(num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, kv_dtype: torch.dtype) -> object:
    qkv = meta(8, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    counts = [num_heads, num_kv_heads, num_kv_heads]
    heads = (part.unflatten(1, (-1, head_dim)) for part in qkv.split([count * head_dim for count in counts], dim=1))
    positions, table = meta(8, dtype=torch.int64), meta(100, head_dim, dtype=torch.float32)
    kv_cache = meta(10, 16, 2, num_kv_heads, head_dim, dtype=kv_dtype)
    scales = None if kv_dtype == dtype else meta(2, num_kv_heads, dtype=torch.float32)
    return rotary.rotate_and_store(*heads, positions, table, kv_cache, positions, scales)


def call_split(
    num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, kv_dtype: torch.dtype, num_seqs: int = 8
) -> object:
    query, kv_cache = (
        meta(num_seqs, num_heads, head_dim, dtype=dtype),
        meta(99, 16, 2, num_kv_heads, head_dim, dtype=kv_dtype),
    )
    tables, starts, lens = (meta(*each, dtype=torch.int32) for each in ((num_seqs, 512), (num_seqs + 1,), (num_seqs,)))
    return split_kv.split_kv(query, kv_cache, tables, starts, lens, 1, 0.1)


def call_sample(num_rows: int, vocab_size: int) -> object:
    floats, ids = (meta(num_rows, dtype=dtype) for dtype in (torch.float32, torch.int64))
    logits = meta(num_rows, vocab_size, dtype=torch.float32)
    return sampling.sample(logits, floats, meta(num_rows, dtype=torch.int32), floats, floats, ids, ids)


def call_masked(head_dim: int, dtype: torch.dtype) -> object:
    heads = meta(2, 8, 512, head_dim, dtype=dtype)
    return masked_attention.masked_attention(heads, heads, heads, meta(512, 512, dtype=torch.bool), 0.1)


def compiled_calls() -> dict[str, Callable[[], object]]:
    """Calls of each operation with the shapes of real models. Nothing of them runs."""
    bf16, fp16, fp32, int8, fp8 = torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.uint8
    return {
        "softmax, rows of 128": lambda: softmax.softmax(meta(64, 128, dtype=bf16)),
        "softmax, rows of 32,768": lambda: softmax.softmax(meta(64, 32_768, dtype=fp32)),
        "softmax, rows of 128,256": lambda: softmax.softmax(meta(64, 128_256, dtype=bf16)),
        "add_rms_norm, rows of 4,096": lambda: norm.add_rms_norm(
            *(meta(64, 4_096, dtype=bf16) for _ in range(2)), meta(4_096, dtype=bf16), 1e-6
        ),
        "add_rms_norm, rows of 32,768": lambda: norm.add_rms_norm(
            *(meta(64, 32_768, dtype=fp32) for _ in range(2)), meta(32_768, dtype=fp32), 1e-6
        ),
        "rms_norm, heads of 128": lambda: norm.rms_norm(
            meta(64, 48, 128, dtype=fp16)[:, :32], meta(128, dtype=fp16), 1e-6
        ),
        "silu_and_mul, rows of 14,336": lambda: activation.silu_and_mul(meta(64, 28_672, dtype=bf16)),
        "rotate_and_store, bfloat16": lambda: call_rotary(32, 8, 128, bf16, bf16),
        "rotate_and_store, float32": lambda: call_rotary(8, 4, 32, fp32, fp32),
        "rotate_and_store, int8": lambda: call_rotary(28, 4, 128, fp16, int8),
        "rotate_and_store, fp8": lambda: call_rotary(32, 2, 256, bf16, fp8),
        "split_kv, bfloat16": lambda: call_split(32, 8, 128, bf16, bf16),
        "split_kv, heads of 256": lambda: call_split(16, 1, 256, bf16, bf16),
        "split_kv, int8": lambda: call_split(28, 4, 128, fp16, int8),
        "split_kv, fp8": lambda: call_split(32, 8, 128, bf16, fp8),
        "split_kv, float32, fp8": lambda: call_split(32, 8, 128, fp32, fp8),
        "split_kv, float32": lambda: call_split(8, 4, 32, fp32, fp32),
        "merge_states": lambda: split_kv.merge_states(meta(16, 64, 128, dtype=fp32), meta(16, 64, dtype=fp32)),
        "sample": lambda: call_sample(8, 128_256),
        "masked_attention, heads of 128": lambda: call_masked(128, bf16),
        "masked_attention, heads of 256": lambda: call_masked(256, fp16),
        "masked_attention, float32": lambda: call_masked(128, fp32),
    }


def compile_call(architecture: int, name: str) -> Result:
    """Compile to machine code what a call would compile, and look at what came out. Needs no GPU."""
    return first_error(*(compile_launch(architecture, launch) for launch in record(compiled_calls()[name])))


def compile_launch(architecture: int, launch: Launch) -> Result:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, _, arguments, sizes = launch
    constants = {name: value for name, value in sizes.items() if name in kernel.arg_names}
    options = {name: value for name, value in sizes.items() if name not in constants}  # num_warps
    types = [TYPES[each.dtype if isinstance(each, Tensor) else type(each)] for each in arguments]
    signature = dict(zip(kernel.arg_names, types + ["constexpr"] * len(constants), strict=True))
    constants |= {kernel.arg_names[i]: None for i, each in enumerate(arguments) if each is None}
    # a launch also tells the compiler which pointers and strides are multiples of 16: it loads wide and ahead then
    multiples = {
        (i,): [["tt.divisibility", 16]]
        for i, each in enumerate(arguments)
        if isinstance(each, Tensor) or (isinstance(each, int) and each % 16 == 0)
    }
    source, target = ASTSource(kernel, signature, constants, multiples), GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target, options)
    shared_bytes, ptx = compiled.metadata.shared, compiled.asm["ptx"]
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    cubin = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    print(f"    {kernel.fn.__name__}: {used}, shared {shared_bytes}", file=sys.stderr)
    where = f"{kernel.fn.__name__} on sm_{architecture}"
    if set(used) != {"REG", "STACK", "LOCAL"}:
        return {"error": f"{where}: cuobjdump says nothing of registers: {usage!r}"}
    if used["STACK"] or used["LOCAL"]:
        return {"error": f"{where}: expected all numbers in registers, got {used}: it spills to memory"}
    if shared_bytes > MAX_SHARED_BYTES:
        return {"error": f"{where}: {shared_bytes} bytes of shared memory, expected at most {MAX_SHARED_BYTES}"}
    if "tf32" in ptx:
        return {"error": f"{where}: float32 numbers are rounded to TF32, which has 10 bits"}
    return check_ptx(kernel.fn.__name__, ptx, arguments)


def check_ptx(name: str, ptx: str, arguments: tuple[Any, ...]) -> Result:
    """What only the machine code shows: the interpreter divides exactly, and keeps small numbers and both additions."""
    cache_dtypes = {each.dtype for each in arguments if isinstance(each, Tensor)} & set(CACHE_DTYPES.values())
    if name == "_rotate_and_store_kernel" and cache_dtypes:
        if "div.rn.f32" not in ptx or "div.full.f32" in ptx:
            return {"error": "a code needs a number divided exactly, by div_rn"}
        if torch.int8 in cache_dtypes and not ("0f4B400000" in ptx and "0fCB400000" in ptx):
            return {"error": "the compiler has simplified (x + c) - c, which rounds, to x"}
        if ".ftz" in ptx:
            return {"error": "an instruction with .ftz makes 0 of small numbers"}
    if name == "_sample_kernel":
        if "div.rn.f32" not in ptx or "div.full.f32" in ptx:
            return {"error": "scaled logits need an exact division, by div_rn, else ties differ from the reference's"}
        if "lg2.approx" in ptx:
            return {"error": "the noise needs a logarithm that is right near 1; lg2.approx is not"}
    return {}


def interpreter_jobs() -> dict[str, tuple[Callable[..., Result], Case]]:
    jobs: dict[str, tuple[Callable[..., Result], Case]] = {}
    for dtype in DTYPES:
        for operation, (function, cases) in OPERATIONS.items():
            names = IN_FLOAT16.get(operation, cases) if dtype == "float16" else cases
            for name, case in ((name, cases[name]) for name in names):
                jobs[f"{operation}: {name}, {dtype}"] = function, {"dtype": dtype, **case}
        for kv_dtype in CACHE_DTYPES:
            jobs[f"each code, {kv_dtype}, {dtype}"] = encode_all, {"kv_dtype": kv_dtype, "dtype": dtype}
        jobs[f"split_kv, padding, {dtype}"] = split_padding, {"dtype": dtype}
    jobs |= {f"merge_states: {name}": (compare_merge, case) for name, case in MERGE.items()}
    jobs |= {f"merge_states: {count} parts": (merge_at_random, {"num_parts": count}) for count in (1, 16, 37)}
    jobs |= {f"sample: {name}": (compare_sample, case) for name, case in SAMPLE.items()}
    jobs["sample: mixed"] = sample_mixed, {}
    jobs["paged_attention: decodes"] = compare_attention, {"query_lens": [1, 1], "context_lens": [290, 7]}
    jobs["paged_attention: a mixed step"] = compare_attention, {"query_lens": [1, 5], "context_lens": [290, 7]}
    return jobs | FAR


OPERATIONS: dict[str, tuple[Callable[..., Result], dict[str, Case]]] = {
    "softmax": (compare_softmax, SOFTMAX),
    "norm": (compare_norm, NORM),
    "silu_and_mul": (compare_activation, ACTIVATION),
    "rotate_and_store": (compare_rotary, ROTARY),
    "split_kv": (compare_split, SPLIT),
    "masked_attention": (compare_masked, MASKED),
}


def compile_jobs() -> dict[str, tuple[Callable[..., Result], Case]]:
    return {
        f"{name} on sm_{architecture}": (compile_call, {"architecture": architecture, "name": name})
        for name in compiled_calls()
        for architecture in ARCHITECTURES
    }


def look(name: str) -> str:
    """Where to look if a case fails."""
    module = next((module for operation, module in FUNCTIONS.items() if operation in name), rotary)
    return f"See worker/kernels/triton/{Path(inspect.getfile(module)).name}, and worker/kernels/reference.py."


def run_mode(mode: str, cache: Path) -> dict[str, Result]:
    """This file in a process of its own, in one of main's modes. Returns a result, or an error, for each case."""
    require_triton()
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONWARNINGS": "ignore"}  # numpy's, of exp(1000) and log(0)
    if mode == "interpret":
        environment["TRITON_INTERPRET"] = "1"
    process = subprocess.run([sys.executable, __file__, mode], env=environment, capture_output=True, text=True)
    if process.returncode < 0:
        case = process.stderr.strip().splitlines()[-1]
        pytest.fail(
            f"a kernel accessed memory outside of its tensors (signal {-process.returncode}), in the case {case!r}: is "
            f"a mask missing, or an offset wrong? {look(case)}"
        )
    assert process.returncode == 0, f"{mode} ended with {process.returncode}: {process.stderr[-2000:]}"
    return dict(json.loads(process.stdout))


def require_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (Linux only: pip install triton)")


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    return run_mode("interpret", tmp_path_factory.mktemp("triton"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    return run_mode("compile", tmp_path_factory.mktemp("triton"))


def check(name: str, result: Result) -> None:
    assert not result, f"{name}: {result['error']}. {look(name)}"


@pytest.mark.parametrize("name", interpreter_jobs())
def test_operations(name: str, interpreted: dict[str, Result]) -> None:
    check(name, interpreted[name])


@pytest.mark.parametrize("name", compile_jobs())
def test_the_kernels_compile(name: str, compiled: dict[str, Result]) -> None:
    check(name, compiled[name])


@pytest.mark.parametrize(
    ("num_programs", "max_context", "num_multiprocessors", "expected"),
    [
        (8, 8_192, 132, 64),  # one sequence with 8 KV heads: one part for every 128 tokens
        (8, 100_000, 132, 66),  # 4 programs for each multiprocessor
        (1, 100_000, 132, 128),  # at most MAX_PARTS
        (8, 255, 132, 1),  # too short for two parts of MIN_PART_SIZE
        (8, 0, 132, 1),
        (256, 8_192, 132, 2),
        (529, 8_192, 132, 1),  # busy without a split
        (0, 8_192, 132, 64),
    ],
)
def test_number_of_parts(num_programs: int, max_context: int, num_multiprocessors: int, expected: int) -> None:
    got = split_kv.choose_num_parts(num_programs, max_context, num_multiprocessors)
    assert got == expected, (
        f"{num_programs} programs, contexts of up to {max_context} tokens, {num_multiprocessors} multiprocessors: "
        f"expected {expected} parts of each context, got {got}. See split_kv.py::choose_num_parts"
    )


def test_a_decode_of_one_sequence_fills_a_gpu() -> None:
    require_triton()
    launches = record(lambda: call_split(32, 8, 128, torch.bfloat16, torch.bfloat16, num_seqs=1))
    grids = [launch.grid for launch in launches]
    assert grids == [(1, 8, 64), (32,)], (
        f"one sequence, 8 KV heads, a context of up to 8,192 tokens: expected a grid of (1, 8, 64), and one program of "
        f"the merge for each of 32 heads; got {grids}. See split_kv.py::split_kv"
    )


@pytest.mark.parametrize(
    ("num_seqs", "max_blocks", "max_query_len", "expected"),
    [
        (1, 512, 1, "split_kv"),
        (8, 512, 1, "split_kv"),
        (1, 8, 1, "unsplit"),  # up to 128 tokens: too short for two parts
        (80, 512, 1, "unsplit"),  # 640 programs: busy without a split
        (2, 512, 9, "unsplit"),  # a step with a chunk
    ],
)
def test_a_few_long_decodes_are_split(
    num_seqs: int, max_blocks: int, max_query_len: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = list[str]()
    for name in ("split_kv", "unsplit"):
        monkeypatch.setattr(attention, name, lambda *arguments, name=name: called.append(name))
    query, kv_cache = torch.empty(num_seqs, 32, 128), meta(99, 16, 2, 8, 128, dtype=torch.float32)
    tables, lens = meta(num_seqs, max_blocks, dtype=torch.int32), meta(num_seqs, dtype=torch.int32)
    attention.paged_attention(query, kv_cache, tables, lens, lens, max_query_len, 0.1)
    assert called == [expected], (
        f"{num_seqs} sequences of up to {max_blocks * 16} tokens, up to {max_query_len} queries: expected {expected}, "
        f"got {called}. See triton/attention.py::paged_attention"
    )


def test_few_queries_get_small_tiles() -> None:
    require_triton()
    expected = {1: 16, 17: 32, 500: 64}
    found = {}
    for num_queries in expected:
        heads, mask = meta(1, 2, num_queries, 64, dtype=torch.float16), meta(num_queries, num_queries, dtype=torch.bool)
        arguments = (heads, heads, heads, mask, 1.0)
        launches = record(lambda arguments=arguments: masked_attention.masked_attention(*arguments))
        found[num_queries] = launches[0].sizes["TILE_QUERIES"]
    assert found == expected, f"TILE_QUERIES by queries: expected {expected}, got {found}. {look('masked_attention')}"


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "softmax of a view": (lambda: softmax.softmax(torch.zeros(4, 8)[:, ::2]), "contiguous"),
    "a residual of another shape": (
        lambda: norm.add_rms_norm(torch.zeros(2, 4), torch.zeros(3, 4), torch.ones(4), 1e-6), "differ"
    ),
    "a residual that is a view": (
        lambda: norm.add_rms_norm(torch.zeros(2, 4), torch.zeros(2, 8)[:, :4], torch.ones(4), 1e-6), "contiguous"
    ),
    "a norm of long rows": (lambda: norm.rms_norm(torch.zeros(1, 40_000), torch.ones(40_000), 1e-6), "32768"),
    "an odd number of gates and ups": (lambda: activation.silu_and_mul(torch.zeros(2, 5)), "gates"),
    "several queries for each sequence": (
        lambda: split_kv.split_kv(
            torch.zeros(2, 1, 16), torch.zeros(1, 4, 2, 1, 16), *(torch.zeros(1, 1).int(),) * 3, 2, 1.0
        ),
        "one query",
    ),
    "codes without scales": (
        lambda: rotary.rotate_and_store(
            *(torch.zeros(1, 1, 4),) * 3, torch.zeros(1).long(), torch.zeros(1, 4),
            torch.zeros(1, 1, 2, 1, 4, dtype=torch.int8), torch.zeros(1).long(),
        ),
        "scales",
    ),
    "heads that are not contiguous": (
        lambda: rotary.rotate_and_store(
            *(torch.zeros(1, 4, 2).transpose(1, 2),) * 3, torch.zeros(1).long(), torch.zeros(1, 4),
            torch.zeros(1, 1, 2, 2, 4), torch.zeros(1).long(),
        ),
        "contiguous",
    ),
    "logits in float16": (
        lambda: sampling.sample(torch.zeros(1, 5).half(), *(torch.ones(1),) * 4, *(torch.ones(1).long(),) * 2),
        "float32",
    ),
    "top_k as int64": (
        lambda: sampling.sample(
            torch.zeros(1, 5), torch.ones(1), torch.ones(1).long(), *(torch.ones(1),) * 2, *(torch.ones(1).long(),) * 2
        ),
        "top_k",
    ),
    "a mask of numbers": (
        lambda: masked_attention.masked_attention(*(torch.zeros(1, 1, 2, 4),) * 3, torch.zeros(2, 2), 1.0), "mask"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_arguments_are_refused(name: str) -> None:
    require_triton()
    call, word = REFUSED[name]
    launches = list[Launch]()
    with kernels_as(lambda kernel: Recorder(kernel, launches)), pytest.raises(AssertionError, match=word):
        call()
    assert not launches, f"{name}: expected no launch, got {len(launches)}"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the tests above run the interpreter instead")
@pytest.mark.parametrize("dtype", [*DTYPES, "bfloat16"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_on_a_gpu(operation: str, dtype: str) -> None:
    function, cases = OPERATIONS[operation]
    for name, case in cases.items():
        torch.manual_seed(0)
        check(f"{operation}: {name}, {dtype}, on the GPU", function(dtype=dtype, device="cuda", **case))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the tests above run the interpreter instead")
@pytest.mark.parametrize("name", [name for name in interpreter_jobs() if name.startswith(("merge", "sample", "each"))])
def test_other_operations_on_a_gpu(name: str) -> None:
    function, case = interpreter_jobs()[name]
    torch.manual_seed(0)
    check(f"{name}, on the GPU", function(device="cuda", **case))


def test_without_triton_the_modules_import_and_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # makes `import triton` fail
    modules = {}
    for module in (triton_attention, *MODULES):
        spec = importlib.util.spec_from_file_location(module.__name__, module.__file__)
        assert spec is not None and spec.loader is not None
        modules[module.__name__.rpartition(".")[2]] = alone = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, module.__name__, alone)  # the later ones import the first
        spec.loader.exec_module(alone)
    rows, heads = torch.zeros(1, 16), torch.zeros(1, 1, 1, 16)
    calls: dict[str, Callable[[], object]] = {
        "softmax": lambda: modules["softmax"].softmax(rows),
        "rms_norm": lambda: modules["norm"].rms_norm(rows, rows[0], 1e-6),
        "add_rms_norm": lambda: modules["norm"].add_rms_norm(rows, rows, rows[0], 1e-6),
        "silu_and_mul": lambda: modules["activation"].silu_and_mul(rows),
        "rotate_and_store": lambda: modules["rotary"].rotate_and_store(*(heads[0],) * 3, *(rows,) * 4),
        "split_kv": lambda: modules["split_kv"].split_kv(heads[0], *(rows,) * 4, 1, 1.0),
        "merge_states": lambda: modules["split_kv"].merge_states(rows, rows[:, 0]),
        "sample": lambda: modules["sampling"].sample(*(rows,) * 7),
        "paged_attention": lambda: modules["attention"].paged_attention(heads[0], heads, *(rows,) * 3, 1, 1.0),
        "masked_attention": lambda: modules["masked_attention"].masked_attention(*(heads,) * 3, rows, 1.0),
    }
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match="triton.*not installed"):
            call()
        assert name in FUNCTIONS


def main(mode: str) -> None:
    """Print each case's result as JSON. Modes: `interpret`, in Triton's interpreter, and `compile`, without it."""
    if mode == "interpret":
        from tests.triton_interpreter import patch_language_once

        patch_language_once()
    results: dict[str, Result] = {}
    for name, (function, arguments) in (interpreter_jobs() if mode == "interpret" else compile_jobs()).items():
        print(name, file=sys.stderr, flush=True)
        is_far, is_interpreted = name in FAR, mode == "interpret"
        # torch.empty is NaN then, so what the kernel does not write is seen; that would fill all of a far tensor
        torch.set_deterministic_debug_mode("error" if is_interpreted and not is_far else "default")
        wrap = (LastProgram if is_far else Guarded) if is_interpreted else (lambda kernel: kernel)
        torch.manual_seed(0)
        try:
            with kernels_as(wrap):
                results[name] = function(**arguments)
        except Exception as error:  # one case's failure is that case's result
            causes = [error]
            while (cause := causes[-1].__cause__) is not None:
                causes.append(cause)
            results[name] = {"error": "; ".join(f"{type(each).__name__}: {each}" for each in causes)[-1000:]}
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
