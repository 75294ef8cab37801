"""worker/kernels/cpu: RMSNorm, RoPE, SiLU, sampling and paged attention in Numba equal their references."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from numba.core.dispatcher import Dispatcher
from torch import Tensor

from part15_full_architecture.worker import noise
from part15_full_architecture.worker.kernels import reference
from part15_full_architecture.worker.kernels.cpu import activation, attention, norm, rotary, sampling
from part15_full_architecture.worker.kernels.cpu.activation import silu_and_mul
from part15_full_architecture.worker.kernels.cpu.attention import paged_attention
from part15_full_architecture.worker.kernels.cpu.norm import add_rms_norm, rms_norm
from part15_full_architecture.worker.kernels.cpu.rotary import rotate_and_store
from part15_full_architecture.worker.kernels.cpu.sampling import sample
from part15_full_architecture.worker.quantization.kv_codes import decode_kv, encode_kv

DTYPES = (torch.float32, torch.bfloat16)
CACHE_DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.uint8)
CODES = (torch.int8, torch.uint8)
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8}  # bfloat16: half a step below each power of two
EPS = 1e-5
GUARD, MARK = 64, 77  # numbers on both sides of a tensor, and their value
SEE = "See worker/kernels/cpu/{}."

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
by_cache = pytest.mark.parametrize("cache_dtype", CACHE_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(
    got: Tensor, expected: Tensor, dtype: torch.dtype, what: str, see: str, precision: torch.dtype | None = None,
    tolerance: float = 1e-5,
) -> None:  # fmt: skip
    """expected: in float64, the exact result. Float32 may differ by a part of the largest number, bfloat16 by the
    rounding of each. precision: if it is less than that of got's dtype."""
    assert got.shape == expected.shape and got.dtype == dtype, (
        f"{what}: expected {dtype} {tuple(expected.shape)}, got {got.dtype} {tuple(got.shape)}. {SEE.format(see)}"
    )
    largest = expected.abs().max() if expected.numel() else torch.tensor(0.0)
    precision = precision or dtype
    limit = tolerance * largest + (ROUNDING[precision] * expected.abs() if precision == torch.bfloat16 else 0)
    wrong = ~((got.double() - expected).abs() <= limit)
    assert not wrong.any(), (
        f"{what}: {int(wrong.sum())} of {wrong.numel()} numbers are wrong; number {wrong.nonzero()[0].tolist()} is "
        f"{got[wrong][0]:.7g}, expected {expected[wrong][0]:.7g}. {SEE.format(see)}"
    )


def guarded(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A copy in the middle of a larger memory, and the memory."""
    memory = torch.full((tensor.numel() + 2 * GUARD,), MARK, dtype=tensor.dtype)
    return memory[GUARD:-GUARD].view(tensor.shape).copy_(tensor), memory


def check_guards(memory: Tensor, what: str, see: str) -> None:
    is_kept = bool((memory[:GUARD] == MARK).all() and (memory[-GUARD:] == MARK).all())
    assert is_kept, f"{what}: numbers before or after the tensor were written. {SEE.format(see)}"


@pytest.fixture(autouse=True)
def guards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Outputs are allocated between guards, which no kernel may touch, and filled with numbers that are wrong."""
    memories: list[Tensor] = []

    def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        tensor, memory = guarded(torch.full(shape, MARK, dtype=dtype))
        memories.append(memory)
        return tensor

    monkeypatch.setattr(torch, "empty_like", lambda like, **_: allocate(tuple(like.shape), like.dtype))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda like, *shape: allocate(shape, like.dtype))
    yield
    for memory in memories:
        check_guards(memory, "an output", "")


# RMSNorm


NORM_SHAPES = [(1, 1), (3, 2), (1, 31), (5, 48), (2, 64), (33, 100), (8, 256), (3, 768), (0, 16)]


@by_dtype
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
def test_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows, residual = randn(*shape, dtype=dtype) * 0.5, randn(*shape, dtype=dtype, seed=1)
    weight = randn(shape[1], dtype=dtype, seed=2)
    total = rows.double() + residual.double()
    exact = total * (total.square().mean(dim=-1, keepdim=True) + EPS).rsqrt() * weight.double()
    summed, memory = guarded(residual)
    before = rows.clone()
    got = add_rms_norm(rows, summed, weight, EPS)
    check(got, exact, dtype, f"add_rms_norm of {shape}", "norm.py::_norm_kernel")
    expected = (rows.float() + residual.float()).to(dtype)
    assert torch.equal(summed, expected), f"the residual isn't rows + residual. {SEE.format('norm.py::add')}"
    assert torch.equal(rows, before), f"rows were changed. {SEE.format('norm.py::add')}"
    check_guards(memory, "the residual", "norm.py::add")
    exact = residual.double() * (residual.double().square().mean(dim=-1, keepdim=True) + EPS).rsqrt() * weight.double()
    check(rms_norm(residual, weight, EPS), exact, dtype, f"rms_norm of {shape}", "norm.py::rms_norm")


def test_the_norm_reads_the_sum_before_it_is_rounded() -> None:
    rows, residual = (randn(4, 64, dtype=torch.bfloat16, seed=seed) * 4.0**-seed for seed in (3, 0))
    weight = torch.ones(64, dtype=torch.bfloat16)
    expected = reference.add_rms_norm(rows, residual.clone(), weight, EPS)
    num_wrong = int((add_rms_norm(rows, residual, weight, EPS) != expected).sum())
    assert num_wrong <= 2, f"{num_wrong} of 256 numbers differ from the reference. {SEE.format('norm.py::add')}"


@by_dtype
def test_norm_of_small_and_large_rows(dtype: torch.dtype) -> None:
    """eps counts for the first, and squares of the second are near the end of float32's range."""
    for scale in (1e-4, 1e15):
        rows, weight = (randn(3, 64) * scale).to(dtype), randn(64, dtype=dtype, seed=1)
        exact = rows.double() * (rows.double().square().mean(dim=-1, keepdim=True) + EPS).rsqrt() * weight.double()
        check(rms_norm(rows, weight, EPS), exact, dtype, f"rows of {scale}", "norm.py::_norm_kernel")


@by_dtype
def test_norm_of_heads_in_longer_rows(dtype: torch.dtype) -> None:
    """Qwen3 normalizes queries and keys where they are: in one tensor with the values."""
    qkv, weight = randn(5, 9, 32, dtype=dtype), randn(32, dtype=dtype, seed=1)
    for heads in qkv.split((4, 2, 3), dim=1):
        exact = heads.double() * (heads.double().square().mean(dim=-1, keepdim=True) + EPS).rsqrt() * weight.double()
        got = rms_norm(heads, weight, EPS)
        check(got, exact, dtype, f"heads {tuple(heads.shape)} with strides {heads.stride()}", "norm.py::rms_norm")
        assert got.is_contiguous(), f"the result isn't contiguous. {SEE.format('norm.py::rms_norm')}"


@by_dtype
def test_one_row_does_not_change_another(dtype: torch.dtype) -> None:
    for bad in (torch.nan, torch.inf):
        rows, weight = randn(3, 64, dtype=dtype), torch.ones(64, dtype=dtype)
        rows[1, 5] = bad
        got, expected = rms_norm(rows, weight, EPS), reference.rms_norm(rows, weight, EPS)
        same = torch.allclose(got, expected, atol=ROUNDING[dtype] * 4, equal_nan=True)
        assert same, f"with {bad} in row 1, got {got[:, 5].tolist()}. {SEE.format('memory.py::to_bfloat16')}"


def test_float16_takes_the_reference() -> None:
    rows, weight = randn(3, 32, dtype=torch.float16), randn(32, dtype=torch.float16, seed=1)
    residual = randn(3, 32, dtype=torch.float16, seed=2)
    summed, expected_sum = residual.clone(), residual.clone()
    pairs = [
        (add_rms_norm(rows, summed, weight, EPS), reference.add_rms_norm(rows, expected_sum, weight, EPS)),
        (summed, expected_sum),
        (rms_norm(rows, weight, EPS), reference.rms_norm(rows, weight, EPS)),
        (silu_and_mul(rows), reference.silu_and_mul(rows)),
    ]
    for index, (got, expected) in enumerate(pairs):
        assert torch.equal(got, expected), f"float16, result {index}: expected the reference's. {SEE.format('')}"


# SiLU


@by_dtype
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 64), (5, 100), (3, 768), (0, 8)], ids=str)
def test_silu_and_mul(shape: tuple[int, int], dtype: torch.dtype) -> None:
    num_rows, size = shape
    gate, up = (randn(num_rows, size, seed=seed) * 4 for seed in range(2))
    gate_up = torch.cat((gate, up), dim=1).to(dtype)
    gates, ups = gate_up.double().chunk(2, dim=-1)
    exact = gates * gates.sigmoid() * ups
    check(silu_and_mul(gate_up), exact, dtype, f"silu_and_mul of {shape}", "activation.py::silu_row")


@by_dtype
def test_silu_of_extreme_numbers(dtype: torch.dtype) -> None:
    """Neither overflow nor NaN where the result is a number; and relative precision where it is tiny."""
    gate = torch.tensor([0.0, -0.0, 1e-6, -1e-6, 20.0, -20.0, 80.0, -80.0, 300.0, -300.0, 3e38, -3e38, torch.inf])
    gate_up = torch.stack((gate, torch.full_like(gate, 0.5)), dim=1).to(dtype)
    got, gates = silu_and_mul(gate_up).squeeze(1).double(), gate_up[:, 0].double()
    exact = torch.where(gates == torch.inf, torch.inf, gates * gates.sigmoid() * 0.5)
    wrong = ~torch.isclose(got, exact, rtol=2 * ROUNDING[dtype], atol=1e-36)
    assert not wrong.any(), f"silu({gates[wrong].tolist()}) / 2 is {got[wrong].tolist()}. {SEE.format('activation.py')}"
    got = silu_and_mul(torch.tensor([[torch.nan, 1.0, 2.0, torch.nan]], dtype=dtype))
    assert got.isnan().all(), f"NaN in gate and in up gave {got.tolist()}. {SEE.format('activation.py::silu_row')}"


# RoPE and the KV cache


def rotary_case(
    dtype: torch.dtype, cache_dtype: torch.dtype, num_heads: int = 6, num_kv_heads: int = 2, head_dim: int = 32,
    num_tokens: int = 21, table_dtype: torch.dtype | None = None, seed: int = 0,
) -> list[Any]:  # fmt: skip
    """The arguments: queries, keys and values are slices of one tensor, slots are shuffled, and three are -1."""
    qkv = randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype, seed=seed)
    query, key, value = qkv.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randint(0, 50, (num_tokens,), generator=generator)
    angles = torch.outer(torch.arange(50.0), 10_000 ** -(torch.arange(0, head_dim, 2) / head_dim))
    table = torch.cat((angles.cos(), angles.sin()), dim=1).to(table_dtype or dtype)
    kv_cache = torch.full((8, 4, 2, num_kv_heads, head_dim), 55).to(cache_dtype)
    slots = torch.randperm(32, generator=generator)[:num_tokens]
    slots[torch.arange(num_tokens) % 8 == 3] = -1
    scales = None
    if cache_dtype in CODES:
        scales = torch.rand(2, num_kv_heads, generator=generator) * (0.02 if cache_dtype == torch.int8 else 0.005)
    return [query, key, value, positions, table, kv_cache, slots, scales]


def rotated(heads: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    cos, sin = table.double()[positions].unsqueeze(1).chunk(2, dim=-1)
    return reference.rotate(heads.double(), cos, sin)


def check_stored(stored: Tensor, numbers: Tensor, scale: Tensor | None, dtype: torch.dtype, what: str) -> None:
    """stored: in a cache; numbers: the exact ones, which were rounded to the model's dtype before they were stored."""
    if scale is None:
        precision = torch.bfloat16 if torch.bfloat16 in (dtype, stored.dtype) else torch.float32
        check(stored, numbers.double(), stored.dtype, what, "rotary.py::store", precision)
        return
    least, most = (encode_kv(numbers * (1 + sign * 1e-6), scale, stored.dtype) for sign in (-1, 1))
    if dtype == torch.bfloat16:  # which was rounded before
        steps = [numbers * (1 + sign * 2.0**-8) for sign in (-1, 1)]
        least, most = (encode_kv(each, scale, stored.dtype) for each in steps)
    low, high = (decode_kv(each, torch.float32) for each in (least, most))
    low, high = torch.minimum(low, high), torch.maximum(low, high)
    got = decode_kv(stored, torch.float32)
    wrong = ~((got >= low) & (got <= high))
    assert not wrong.any(), (
        f"{what}: {int(wrong.sum())} of {wrong.numel()} codes are wrong; {wrong.nonzero()[0].tolist()} stands for "
        f"{got[wrong][0]}, expected {low[wrong][0]} to {high[wrong][0]}. {SEE.format('rotary.py::to_stored')}"
    )


@by_cache
@by_dtype
@pytest.mark.parametrize("shape", [(6, 2, 32), (4, 4, 64), (3, 1, 24), (2, 1, 2), (8, 2, 128)], ids=str)
def test_rotate_and_store(shape: tuple[int, int, int], dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    args = rotary_case(dtype, cache_dtype, *shape)
    query, key, value, positions, table, kv_cache, slots, scales = args
    args[5], memory = guarded(kv_cache)
    before = query.clone(), key.clone(), value.clone()
    what = f"{shape}, {dtype} to {cache_dtype}"
    check(rotate_and_store(*args), rotated(query, positions, table), dtype, f"{what}, queries", "rotary.py::rotate")
    is_kept, flat = slots >= 0, args[5].flatten(0, 1)
    stored, keys = flat[slots[is_kept]], rotated(key, positions, table)[is_kept]
    check_stored(stored[:, 0], keys, None if scales is None else scales[0], dtype, f"{what}, keys")
    if scales is None:
        check(stored[:, 1], value[is_kept].double(), cache_dtype, f"{what}, values", "rotary.py::store")
    else:
        expected = encode_kv(value[is_kept], scales[1], cache_dtype)
        wrong = int((stored[:, 1] != expected).sum())
        assert not wrong, f"{what}: {wrong} values differ from encode_kv's. {SEE.format('rotary.py::to_stored')}"
    others = torch.ones(32, dtype=torch.bool)
    others[slots[is_kept]] = False
    assert torch.equal(flat[others], kv_cache.flatten(0, 1)[others]), (
        f"{what}: slots of no token were written; tokens with slot -1 have none. {SEE.format('rotary.py')}"
    )
    unchanged = all(torch.equal(*pair) for pair in zip((query, key, value), before, strict=True))
    assert unchanged, f"{what}: query, key or value were changed. {SEE.format('rotary.py::rotate')}"
    check_guards(memory, what, "rotary.py::_rotate_and_store_kernel")


def test_dtypes_may_differ() -> None:
    """A float32 table for bfloat16 heads, and a cache of another dtype than the heads."""
    for dtype, cache_dtype in (DTYPES, DTYPES[::-1]):
        args = rotary_case(dtype, cache_dtype, table_dtype=torch.float32)
        expected_cache = args[5].clone()
        expected = reference.rotate_and_store(*args[:5], expected_cache, *args[6:])
        got = rotate_and_store(*args)
        check(got, expected.double(), dtype, f"{dtype} to {cache_dtype}, queries", "rotary.py::rotate_and_store")
        check(args[5], expected_cache.double(), cache_dtype, f"{dtype} to {cache_dtype}, cache", "rotary.py::store")


def store_exactly(numbers: Tensor, scale: float, cache_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What keys and values become whose angle is 0."""
    heads, slots = numbers.view(-1, 1, 2), torch.arange(numbers.numel() // 2)
    kv_cache = torch.zeros(len(slots), 1, 2, 1, 2, dtype=cache_dtype)
    table = torch.tensor([[1.0, 0.0]])
    scales = torch.full((2, 1), scale)
    rotate_and_store(heads, heads, heads, torch.zeros_like(slots), table, kv_cache, slots, scales)
    key, value = kv_cache.view(-1, 2, 2).unbind(1)
    return key.flatten(), value.flatten()


def test_every_fp8_code_and_what_lies_between() -> None:
    """Rounded to nearest even: each code's number, the middle between two, and a little above and below it."""
    codes = torch.arange(0x7F, dtype=torch.uint8)
    exact = codes.view(torch.float8_e4m3fn).float()
    middle = (exact[1:] + exact[:-1]) / 2
    infinity = torch.tensor(torch.inf)
    around = torch.cat((middle.nextafter(infinity), middle.nextafter(-infinity), torch.tensor([0.0, 449, 1e30, 1e-30])))
    numbers = torch.cat((exact, middle, around))
    numbers = torch.cat((numbers, -numbers))
    expected = encode_kv(numbers.view(-1, 1, 1), torch.ones(1), torch.uint8).flatten()
    keys, values = store_exactly(numbers, 1.0, torch.uint8)
    keys[(keys & 0x7F == 0) & (expected & 0x7F == 0)] = 0  # the rotation may change the sign of a zero
    for name, got in (("keys", keys), ("values", values)):
        wrong = (got != expected) & ((name == "values") | (expected != 0x80))
        assert not wrong.any(), (
            f"{name}: {numbers[wrong][0]:.9g} became code {int(got[wrong][0]):#x}, expected "
            f"{int(expected[wrong][0]):#x}. {SEE.format('rotary.py::to_fp8')}"
        )
    for bad, expected_code in ((torch.inf, 0x7E), (-torch.inf, 0xFE), (torch.nan, 0x7F), (-torch.nan, 0xFF)):
        _, got = store_exactly(torch.tensor([bad, 1.0]), 1.0, torch.uint8)
        code = int(got[0]) | (0x80 if bad != bad else 0)  # the sign of a NaN doesn't matter
        expected_code |= 0x80 if bad != bad else 0
        assert code == expected_code, f"{bad} became code {code:#x}. {SEE.format('rotary.py::to_fp8')}"


def test_int8_codes_are_rounded_to_even_and_clamped() -> None:
    numbers = torch.arange(-280, 281) * 0.25  # steps of a half, with the scale below
    numbers = torch.cat((numbers, torch.tensor([1e4, -1e4, 1e30, -1e30, 0.0, torch.inf, -torch.inf])))
    expected = (numbers.double() / 0.5).round().clamp(-127, 127).to(torch.int8)
    keys, values = store_exactly(numbers, 0.5, torch.int8)
    for name, got in (("keys", keys[:-4]), ("values", values)):  # in the rotation, inf · 0 is NaN
        wrong = got != expected[: len(got)]
        assert not wrong.any(), (
            f"{name}: {numbers[: len(got)][wrong][0]} / 0.5 became {int(got[wrong][0])}, expected "
            f"{int(expected[: len(got)][wrong][0])}. "
            f"{SEE.format('rotary.py::to_int8')}"
        )


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    bits = torch.arange(0x3F80, 0x3F90, dtype=torch.int32).repeat_interleave(5) << 16
    bits = bits + torch.tensor([0, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32).repeat(16)
    numbers = bits.view(torch.float32)
    kv_cache, slots = torch.zeros(40, 1, 2, 1, 2, dtype=torch.bfloat16), torch.arange(40)
    heads = numbers.view(-1, 1, 2)
    rotate_and_store(heads, heads, heads, torch.zeros_like(slots), torch.tensor([[1.0, 0.0]]), kv_cache, slots)
    got, expected = kv_cache[:, 0, 1, 0].flatten(), numbers.bfloat16()
    wrong = got != expected
    assert not wrong.any(), (
        f"{numbers[wrong][:1].tolist()} became {got[wrong][:1].tolist()}, expected {expected[wrong][:1].tolist()}. "
        f"{SEE.format('memory.py::to_bfloat16')}"
    )


def test_wrong_arguments_are_refused() -> None:
    """Kernels get addresses: a wrong dtype or stride would make them read and write anywhere."""
    rows, weight = randn(4, 32), torch.ones(32)
    args = rotary_case(torch.float32, torch.float32)
    codes = rotary_case(torch.float32, torch.int8)
    logits = sampling_args(2, 10)
    calls: dict[str, Callable[[], object]] = {
        "a residual with strides": lambda: add_rms_norm(rows, randn(32, 4).T, weight, EPS),
        "rows with strides": lambda: add_rms_norm(randn(32, 4).T, rows, weight, EPS),
        "a residual of another dtype": lambda: add_rms_norm(rows, rows.bfloat16(), weight, EPS),
        "a residual of another shape": lambda: add_rms_norm(rows, randn(3, 32), weight, EPS),
        "a weight of another size": lambda: rms_norm(rows, torch.ones(31), EPS),
        "a weight of another dtype": lambda: rms_norm(rows, weight.bfloat16(), EPS),
        "columns with strides": lambda: rms_norm(randn(32, 4).T, weight, EPS),
        "gates with strides": lambda: silu_and_mul(randn(4, 64)[:, :32]),
        "an odd number of columns": lambda: silu_and_mul(randn(4, 31)),
        "int32 slots": lambda: rotate_and_store(*args[:6], args[6].int(), None),
        "int32 positions": lambda: rotate_and_store(*args[:3], args[3].int(), *args[4:]),
        "too few slots": lambda: rotate_and_store(*args[:6], args[6][:5], None),
        "heads with strides": lambda: rotate_and_store(randn(32, 6, 21).permute(2, 1, 0), *args[1:]),
        "a cache with strides": lambda: rotate_and_store(*args[:5], args[5].repeat(1, 2, 1, 1, 1)[:, ::2], *args[6:]),
        "a cache with other heads": lambda: rotate_and_store(*args[:5], args[5][:, :, :, :1].clone(), *args[6:]),
        "codes without scales": lambda: rotate_and_store(*codes[:7], None),
        "scales without codes": lambda: rotate_and_store(*args[:7], codes[7]),
        "float64 logits": lambda: sample(logits[0].double(), *logits[1:]),
        "int64 top_k": lambda: sample(*logits[:2], logits[2].long(), *logits[3:]),
        "too few seeds": lambda: sample(*logits[:5], logits[5][:1], logits[6]),
        "logits with strides": lambda: sample(randn(10, 2).T, *logits[1:]),
    }
    for what, call in calls.items():
        with pytest.raises(AssertionError):
            call()
            pytest.fail(f"{what} must be refused. {SEE.format('')}", pytrace=False)


# Sampling


def sampling_args(
    num_rows: int, vocab_size: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0,
    logits: Tensor | None = None, seed: int = 0,
) -> list[Tensor]:  # fmt: skip
    """The arguments of sample(). top_k: 0 for all tokens."""
    generator = torch.Generator().manual_seed(seed)
    if logits is None:
        logits = torch.randn(num_rows, vocab_size, generator=generator) * 3
    columns = [
        torch.full((num_rows,), value, dtype=dtype)
        for value, dtype in (
            (temperature, torch.float32), (min(top_k or vocab_size, vocab_size), torch.int32), (top_p, torch.float32),
            (min_p, torch.float32),
        )
    ]  # fmt: skip
    seeds = torch.randint(-(2**63), 2**63 - 1, (num_rows,), generator=generator)
    return [logits, *columns, seeds, torch.randint(0, 10_000, (num_rows,), generator=generator)]


def wrong_rows(args: list[Tensor], got: Tensor) -> list[tuple[int, str]]:
    """The rows in which a token could not have been drawn, even with other roundings, and why."""
    logits, temperatures, top_k, top_p, min_p, seeds, positions = args
    noises = noise.exponential_noise(seeds, positions, logits.shape[1]).double()
    found = []
    for row, token in enumerate(got.tolist()):
        if not 0 <= token < logits.shape[1]:
            found.append((row, f"there is no token {token}"))
        elif temperatures[row] == 0:
            if token != int(logits[row].argmax()):
                found.append((row, f"greedy: expected token {int(logits[row].argmax())}, got {token}"))
        else:
            scaled = (logits[row] / temperatures[row]).double()
            kept, surely = kept_tokens(scaled, int(top_k[row]), float(top_p[row]), float(min_p[row]))
            ratios = (scaled - scaled.max()).exp() / noises[row]
            if not kept[token]:
                found.append((row, f"token {token} had to be dropped"))
            elif surely.any() and ratios[token] < ratios[surely].max() * (1 - 3e-5):
                best = int(torch.where(surely, ratios, -1).argmax())
                found.append((row, f"token {best} has a larger weight / noise than token {token}"))
    return found


def kept_tokens(scaled: Tensor, top_k: int, top_p: float, min_p: float) -> tuple[Tensor, Tensor]:
    """The tokens that may be kept if thresholds are rounded, and those that must be. scaled: float64."""
    found = []
    for slack in (1e-5, -1e-5):
        limit = scaled.max() + torch.tensor(min_p).double().log() - slack if min_p else -torch.inf
        own = scaled.masked_fill(scaled < limit, -torch.inf)
        own = own.masked_fill(own < own.sort(descending=True).values[top_k - 1], -torch.inf)
        likelihood = own.softmax(dim=-1)
        values, inverse = own.unique(return_inverse=True)  # ascending
        mass = torch.zeros_like(values).scatter_add_(0, inverse, likelihood)
        likelier = (mass.flip(0).cumsum(0).flip(0) - mass)[inverse]
        is_kept = (own > -torch.inf) & ((likelier < top_p + slack) | (top_p >= 1))
        found.append(is_kept | ((own == own.max()) & (own > -torch.inf)))
    return found[0], found[1]


FILTERS = [
    dict(), dict(top_k=1), dict(top_k=5), dict(top_k=50), dict(top_k=64), dict(top_k=700), dict(top_p=0.9),
    dict(top_p=0.5), dict(top_p=1e-9), dict(top_p=0.999), dict(min_p=0.1), dict(min_p=1.0), dict(min_p=1e-4),
    dict(top_k=50, top_p=0.9), dict(top_k=50, top_p=0.9, min_p=0.05), dict(top_k=3, top_p=0.3, min_p=0.2),
]  # fmt: skip


@pytest.mark.parametrize("vocab_size", [1, 2, 63, 64, 65, 130, 1_000, 4_096, 33_000])
def test_sampling(vocab_size: int) -> None:
    for number, (temperature, values) in enumerate(product((0.01, 0.8, 3.0), FILTERS)):
        args = sampling_args(2, vocab_size, temperature, **values, seed=number)
        args[1][0] = args[1][0] * (number % 5 > 0)  # some rows are greedy
        for rounded in (False, True):
            if rounded:  # many tokens that are equally likely
                args[0] = (args[0] * 2).round() / 2
            wrong = wrong_rows(args, sample(*args))
            what = f"{vocab_size} tokens, temperature {temperature}, {values}, {'with' if rounded else 'no'} ties"
            assert not wrong, f"{what}: row {wrong[0][0]}: {wrong[0][1]}. {SEE.format('sampling.py::_sample_kernel')}"


def test_rows_of_all_sorts_in_one_batch() -> None:
    """Nothing that one row leaves behind may matter to the next; and a row's token does not depend on the others."""
    args = sampling_args(40, 500)
    generator = torch.Generator().manual_seed(1)
    args[1] = torch.tensor([0.0, 0.7, 1.0, 5.0]).repeat(10)
    args[2] = torch.randint(1, 501, (40,), generator=generator).int()
    args[3] = torch.rand(40, generator=generator)
    args[4] = torch.where(torch.rand(40, generator=generator) < 0.5, 0.0, 0.1)
    got = sample(*args)
    wrong = wrong_rows(args, got)
    assert not wrong, f"row {wrong[0][0]}: {wrong[0][1]}. {SEE.format('sampling.py::_sample_kernel')}"
    for order in (torch.arange(40).flip(0), torch.tensor([17]), torch.tensor([], dtype=torch.long)):
        again = sample(*(each[order].contiguous() for each in args))
        assert torch.equal(again, got[order]), f"rows {order.tolist()} alone have other tokens. {SEE.format('')}"


def drawn_tokens(logits: list[float], num_draws: int = 400, **values: Any) -> set[int]:
    args = sampling_args(num_draws, len(logits), logits=torch.tensor([logits]).repeat(num_draws, 1), **values)
    return set(sample(*args).tolist())


def test_which_tokens_can_be_drawn() -> None:
    high = {60: 5.0, 63: 5.0, 64: 4.9, 129: 4.8, 130: 4.7}  # at the borders of blocks, all about equally likely
    logits = [high.get(token, 0.0) for token in range(131)]
    equal = [1.0, 2.0, 2.0, 2.0, 1.0, 0.0]
    cases: list[tuple[str, set[int], set[int]]] = [
        ("top_k 1", drawn_tokens([1.0, 3.0, 2.0], top_k=1), {1}),
        ("top_k 4 of 131", drawn_tokens(logits, top_k=4), {60, 63, 64, 129}),
        ("top_k 5 of 131", drawn_tokens(logits, top_k=5), {60, 63, 64, 129, 130}),
        ("top_k 3 of 131", drawn_tokens(logits, top_k=3), {60, 63, 64}),
        ("top_k 1, two alike", drawn_tokens(logits, top_k=1), {60, 63}),
        ("top_k 2, three alike", drawn_tokens(equal, top_k=2), {1, 2, 3}),
        ("top_k 4, then two alike", drawn_tokens(equal, top_k=4), {0, 1, 2, 3, 4}),
        ("0 and -0 are alike", drawn_tokens([0.0, -1.0, -0.0], top_k=1), {0, 2}),
        ("-0 and 0 are alike", drawn_tokens([-0.0, -1.0, 0.0], top_p=0.1), {0, 2}),
        ("top_p 0.2, three alike", drawn_tokens(equal, top_p=0.2), {1, 2, 3}),
        ("top_p 0.6, four alike", drawn_tokens([0.0, 0.0, 0.0, 0.0], top_p=0.6), {0, 1, 2, 3}),
        ("top_p of what top_k keeps", drawn_tokens([1.0, 1.1, 1.2, 1.3], top_k=2, top_p=0.52), {3}),
        ("top_p, the token that crosses it", drawn_tokens([1.0, 1.1, 1.2, 1.3], top_k=2, top_p=0.53), {2, 3}),
        ("min_p 1", drawn_tokens(equal, min_p=1.0), {1, 2, 3}),
        ("min_p 0.3", drawn_tokens(equal, min_p=0.3), {0, 1, 2, 3, 4}),
        ("min_p 0.4", drawn_tokens(equal, min_p=0.4), {1, 2, 3}),
        ("min_p before top_k", drawn_tokens([0.0, 5.0, 5.0, 4.9], min_p=0.5, top_k=3), {1, 2, 3}),
        ("negative logits", drawn_tokens([-9.0, -5.0, -5.1, -20.0], top_k=2), {1, 2}),
        ("-inf is never drawn", drawn_tokens([-torch.inf, 0.0, -torch.inf, 0.1]), {1, 3}),
        ("-inf with a top_k above", drawn_tokens([-torch.inf, 0.0, -torch.inf], top_k=2), {1}),
        ("a temperature near 0", drawn_tokens([1.0, 1.01, 1.0], temperature=1e-5), {1}),
        ("a large temperature", drawn_tokens([-20.0, 0.0, 20.0], temperature=100.0), {0, 1, 2}),
        ("greedy, two alike", drawn_tokens([1.0, 2.0, 2.0], temperature=0.0), {1}),
        ("greedy, -0 first", drawn_tokens([-1.0, -0.0, 0.0], temperature=0.0), {1}),
        ("greedy, in the last block", drawn_tokens([0.0] * 130 + [1.0], temperature=0.0), {130}),
        ("all -inf", drawn_tokens([-torch.inf] * 5, top_k=2), {0}),
        ("all -inf, top_k 1", drawn_tokens([-torch.inf] * 5, top_k=1), {0}),
        ("all -inf, greedy", drawn_tokens([-torch.inf] * 5, temperature=0.0), {0}),
        ("inf", drawn_tokens([0.0, torch.inf, 0.0]), {1}),
    ]
    for what, got, expected in cases:
        assert got == expected, f"{what}: expected all of {expected}, drew {got}. {SEE.format('sampling.py')}"


def test_a_nan_does_no_harm() -> None:
    for temperature, bits in product((0.0, 1.0), (0x7FC00000, -0x400000)):  # x86 makes negative ones
        args = sampling_args(3, 200, temperature, top_k=20, top_p=0.9, min_p=0.01)
        args[0][1, 77] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
        got = sample(*args)
        assert 0 <= int(got[1]) < 200, f"a row with a NaN: there is no token {int(got[1])}. {SEE.format('sampling.py')}"
        wrong = [each for each in wrong_rows(args, got) if each[0] != 1]
        assert not wrong, f"beside a NaN, row {wrong[0][0]}: {wrong[0][1]}. {SEE.format('sampling.py')}"
        if not temperature:
            assert int(got[1]) == 77, "greedy: NaN counts as the largest number, as for torch.argmax"


def test_the_noise_is_that_of_noise_py() -> None:
    """The same 31 random bits, for any seed and position."""
    seeds = torch.tensor([0, 1, -1, 2**62, -(2**63), 2**63 - 1, 123_456_789])
    positions = torch.tensor([0, 1, 2, 100, 4_095, 2**31, 7])
    expected = noise.exponential_noise(seeds, positions, 300)
    for row, (seed, position) in enumerate(zip(seeds.tolist(), positions.tolist(), strict=True)):
        stream = np.uint64(sampling.stream(seed, position))  # an int that is given to Numba may be taken for an int64
        uniform = [float(sampling.uniform(stream, token)) for token in range(300)]
        got = -torch.log1p(-torch.tensor(uniform))
        assert torch.equal(got, expected[row]), (
            f"seed {seed}, position {position}: {SEE.format('sampling.py::uniform')}"
        )


def test_tokens_are_drawn_with_their_probabilities() -> None:
    """A chi-square test with a fixed seed: above 60 once in 100,000 times if all is right."""
    logits = randn(1, 100) * 1.5
    num_draws = 20_000
    args = sampling_args(num_draws, 100, 0.8, top_k=30, top_p=0.95, logits=logits.repeat(num_draws, 1))
    kept, _ = kept_tokens((logits[0] / 0.8).double(), 30, float(args[3][0]), 0.0)
    expected = torch.where(kept, (logits[0] / 0.8).double(), -torch.inf).softmax(dim=-1) * num_draws
    counts = sample(*args).bincount(minlength=100).double()
    assert not counts[~kept].any(), f"tokens were drawn that top-k or top-p drop. {SEE.format('sampling.py')}"
    chi_square = float(((counts - expected)[kept].square() / expected[kept]).sum())
    what = f"{num_draws} draws from {int(kept.sum())} tokens"
    assert 10 <= int(kept.sum()) <= 30, f"{what}: the test needs other logits"
    assert chi_square < 60, f"{what}: chi-square is {chi_square:.1f}. {SEE.format('sampling.py::draw')}"


# Attention


def attention_case(
    seqs: list[tuple[int, int]], group_size: int = 2, num_kv_heads: int = 2, head_dim: int = 32, block_size: int = 16,
    dtype: torch.dtype = torch.float32, cache_dtype: torch.dtype = torch.float32, scale: float | None = None,
    offset: float = 0.0, seed: int = 0,
) -> tuple[list[Any], Tensor]:  # fmt: skip
    """seqs: of each, its new tokens and its context with these. offset: makes the scores of every second
    head large, or negative. The arguments, and the exact result.

    Blocks are shuffled, and entries past a context's end are not blocks at all. Slots of no token hold NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-context_len // block_size) for _, context_len in seqs]
    pool = torch.randperm(sum(counts) + 2, generator=generator).tolist()
    shape = (len(pool), block_size, 2, num_kv_heads, head_dim)
    kv_cache = torch.full(shape, 0x7F if cache_dtype in CODES else torch.nan, dtype=torch.float32).to(cache_dtype)
    tables = torch.full((len(seqs), max(counts, default=0) + 1), 2**30, dtype=torch.int32)
    query = torch.randn(
        sum(num_tokens for num_tokens, _ in seqs), group_size * num_kv_heads, head_dim, generator=generator
    ).to(dtype)  # fmt: skip
    query[:, ::2, 0] += offset  # only in every second head, so that neighboring rows differ
    scale = head_dim**-0.5 if scale is None else scale
    outputs, start = [], 0
    for seq, ((num_tokens, context_len), count) in enumerate(zip(seqs, counts, strict=True)):
        blocks = [pool.pop() for _ in range(count)]
        tables[seq, :count] = torch.tensor(blocks, dtype=torch.int32)
        numbers = torch.randn(context_len, 2, num_kv_heads, head_dim, generator=generator)
        numbers[:, 0, :, 0] += abs(offset)
        if cache_dtype in CODES:
            stored = encode_kv(numbers, torch.full((2, num_kv_heads), 0.02), cache_dtype)
            scale_of_codes = 0.02
        else:
            stored, scale_of_codes = numbers.to(cache_dtype), 1.0
        for position in range(context_len):
            kv_cache[blocks[position // block_size], position % block_size] = stored[position]
        keys, values = decode_kv(stored, torch.float32).double().unbind(1)
        own = query[start : start + num_tokens].double()
        outputs.append(dense(own, keys, values, scale * scale_of_codes))
        start += num_tokens
    starts = torch.tensor([0, *[num_tokens for num_tokens, _ in seqs]]).cumsum(0).int()
    lens = torch.tensor([context_len for _, context_len in seqs], dtype=torch.int32)
    max_len = max((num_tokens for num_tokens, _ in seqs), default=0)
    scale *= 0.02 if cache_dtype in CODES else 1.0
    expected = torch.cat(outputs) if outputs else torch.empty(0, group_size * num_kv_heads, head_dim).double()
    return [query, kv_cache, tables, starts, lens, max_len, scale], expected


def dense(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """query: [num_tokens, num_heads, head_dim]; keys, values: [context_len, num_kv_heads, head_dim]. In float64."""
    num_tokens, num_heads, _ = query.shape
    context_len, group_size = len(keys), num_heads // keys.shape[1]
    keys, values = (each.repeat_interleave(group_size, dim=1) for each in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query, keys) * scale
    last_visible = torch.arange(num_tokens).unsqueeze(1) + context_len - num_tokens
    weights = scores.masked_fill(torch.arange(context_len) > last_visible, -torch.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, values)


# Decode, drafts, chunks at the start and in the middle, around the borders of blocks and tiles, and sequences that have
# nothing to do in a step.
MIXED = [(1, 1), (1, 64), (5, 5), (8, 200), (0, 0), (17, 64), (0, 30), (64, 65), (33, 130), (1, 129), (70, 70)]


def check_attention(args: list[Any], expected: Tensor, what: str, tolerance: float = 1e-5) -> None:
    got = paged_attention(*args)
    check(got, expected, args[0].dtype, what, "attention.py::chunk_attention", tolerance=tolerance)


@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
def test_attention(head_dim: int, group_size: int) -> None:
    args, expected = attention_case(MIXED, group_size, head_dim=head_dim)
    check_attention(args, expected, f"head_dim {head_dim}, {group_size} query heads for each KV head")


@by_cache
@by_dtype
def test_attention_over_every_cache(dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    args, expected = attention_case(MIXED, 4, head_dim=64, dtype=dtype, cache_dtype=cache_dtype)
    check_attention(args, expected, f"queries of {dtype}, a cache of {cache_dtype}")


@pytest.mark.parametrize("block_size", [1, 4, 16, 128])
def test_attention_with_blocks_of_any_size(block_size: int) -> None:
    args, expected = attention_case(MIXED, 2, block_size=block_size)
    check_attention(args, expected, f"blocks of {block_size}")


def test_every_place_of_the_causal_limit() -> None:
    """Chunks of every length up to a group of rows and beyond, that end at every place in a tile."""
    seqs = [(num_tokens, context_len) for num_tokens in range(1, 12) for context_len in range(60, 69)]
    seqs += [(num_tokens, num_tokens + before) for num_tokens in (62, 63, 64, 65, 66) for before in (0, 1, 63, 64)]
    for group_size in (1, 3, 8):
        args, expected = attention_case(seqs, group_size, num_kv_heads=1)
        check_attention(args, expected, f"{group_size} query heads for each KV head")


def test_chunks_longer_than_one_pass() -> None:
    for num_tokens in (255, 256, 257, 600):
        args, expected = attention_case([(num_tokens, num_tokens + 40), (3, 10)], 2, num_kv_heads=1)
        check_attention(args, expected, f"a chunk of {num_tokens} tokens")


def test_large_scores() -> None:
    """exp must neither overflow nor lose the largest score; later tiles raise the maximum."""
    for scale in (1.0, -4.0, 4.0):  # scores up to 25 and 100, which float32 rounds by 1e-6 and 4e-6
        args, expected = attention_case([(16, 300), (1, 300)], 2, scale=scale)
        check_attention(args, expected, f"scores with a scale of {scale}", 5e-5)
    for offset in (30.0, -30.0):
        args, expected = attention_case([(16, 300), (1, 300)], 2, offset=offset)
        check_attention(args, expected, f"scores of every second row have an offset of {offset}", 5e-5)


def test_sequences_may_share_blocks() -> None:
    args, _ = attention_case([(8, 64), (8, 64)], 2)
    args[2][1] = args[2][0]
    args[0][8:] = args[0][:8]
    got = paged_attention(*args)
    assert torch.equal(got[8:], got[:8]), f"the same queries over the same blocks differ. {SEE.format('attention.py')}"


def test_queries_with_strides_and_other_backends() -> None:
    """A head_dim that is no multiple of 32, and float16, are left to other functions."""
    args, expected = attention_case([(9, 40), (1, 20)], 2, head_dim=32)
    wide = torch.zeros(10, 5, 32)
    wide[:, :4] = args[0]
    check_attention([wide[:, :4], *args[1:]], expected, "queries with strides")
    args, expected = attention_case([(9, 40), (1, 20), (20, 20)], 2, head_dim=48)
    check_attention(args, expected, "head_dim 48")
    args, expected = attention_case([(9, 48), (1, 16)], 2)
    got = paged_attention(args[0].half(), args[1].half(), *args[2:])
    assert got.dtype == torch.float16 and (got.double() - expected).abs().max() < 0.01, f"{SEE.format('attention.py')}"


def test_attention_refuses_wrong_arguments() -> None:
    args, _ = attention_case([(9, 40), (1, 20)], 2)
    calls = {
        "int64 tables": [*args[:2], args[2].long(), *args[3:]],
        "int64 lengths": [*args[:4], args[4].long(), *args[5:]],
        "tables with strides": [*args[:2], args[2].repeat(1, 2)[:, ::2], *args[3:]],
        "too few lengths": [*args[:4], args[4][:1], *args[5:]],
        "a cache with strides": [args[0], args[1].repeat(1, 2, 1, 1, 1)[:, ::2], *args[2:]],
        "heads that no KV heads can share": [args[0][:, :3], *args[1:]],
    }
    for what, call in calls.items():
        with pytest.raises(AssertionError):
            paged_attention(*call)
            pytest.fail(f"{what} must be refused. {SEE.format('attention.py::paged_attention')}", pytrace=False)


# Threads


def test_two_threads_at_once() -> None:
    """As with two engines in one process: scratch memory must not be shared."""
    failures, gate = list[str](), threading.Barrier(2, timeout=60)
    batches = [(attention_case(MIXED, 2, seed=seed), sampling_args(20, 3_000, top_k=40, top_p=0.9)) for seed in (0, 1)]
    rows, weight = randn(50, 256), torch.ones(256)
    normalized = reference.rms_norm(rows, weight, EPS)

    def run(attention_args: list[Any], expected: Tensor, sampling_args: list[Tensor]) -> None:
        gate.wait()
        try:
            for _ in range(20):
                check_attention(attention_args, expected, "two threads in the kernel at once")
                assert not wrong_rows(sampling_args, sample(*sampling_args)), "sampling in two threads at once"
                assert torch.allclose(rms_norm(rows, weight, EPS), normalized, atol=1e-5), "norms in two threads"
        except AssertionError as error:
            failures.append(str(error))

    threads = [threading.Thread(target=run, args=(*case, args)) for case, args in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not failures, failures[0]


def test_how_the_kernels_are_compiled() -> None:
    kernels = [
        norm._norm_kernel, rotary._rotate_and_store_kernel, activation._silu_and_mul_kernel, sampling._sample_kernel,
        attention._paged_attention_kernel,
    ]  # fmt: skip
    for kernel in kernels:
        options = kernel.targetoptions
        assert options.get("nogil"), f"{kernel.__name__}: without nogil, other threads stand still during a step"
        assert not options.get("parallel"), f"{kernel.__name__}: Numba's threads would compete with torch's"
    for module in (norm, rotary, activation, sampling, attention):
        for name, item in vars(module).items():
            if isinstance(item, Dispatcher):
                flags = item.targetoptions.get("fastmath", set())
                assert isinstance(flags, set) and not flags & {"fast", "nnan", "ninf"}, (
                    f"{name} is compiled with fastmath={flags}: LLVM may assume that there is no NaN and no inf"
                )
