"""worker/kernels/cuda: number formats, softmax, RMSNorm, RoPE, SiLU, sampling and masked attention equal their
references. The kernels run on this CPU, in the emulation, and on a GPU if there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from part15_full_architecture.worker.kernels import reference
from part15_full_architecture.worker.kernels.build import NoCompilerError, find_cxx, find_nvcc
from part15_full_architecture.worker.kernels.cuda import activation, norm, rotary, sampling
from part15_full_architecture.worker.kernels.cuda import masked_attention as masked_attention_module
from part15_full_architecture.worker.kernels.cuda import softmax as softmax_module
from part15_full_architecture.worker.kernels.cuda.activation import silu_and_mul
from part15_full_architecture.worker.kernels.cuda.library import KernelError, Library
from part15_full_architecture.worker.kernels.cuda.masked_attention import masked_attention
from part15_full_architecture.worker.kernels.cuda.norm import add_rms_norm, rms_norm
from part15_full_architecture.worker.kernels.cuda.rotary import rotate_and_store
from part15_full_architecture.worker.kernels.cuda.sampling import sample
from part15_full_architecture.worker.kernels.cuda.softmax import (
    softmax_fused,
    softmax_naive,
    softmax_online,
    softmax_warp,
)

RUNGS = (softmax_naive, softmax_warp, softmax_fused, softmax_online)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EPS = 1e-6

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
by_rung = pytest.mark.parametrize("softmax", RUNGS, ids=lambda softmax: softmax.__name__)


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Where the kernels run: in the emulation, and on a GPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    try:
        find_nvcc() if request.param == "cuda" else find_cxx()
    except NoCompilerError as error:
        pytest.skip(str(error))
    return request.param


GUARD = 256  # numbers before and after an output


@pytest.fixture(autouse=True)
def guards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Puts guards around all tensors from torch.empty, to notice a kernel that writes outside its output."""
    real_empty, blocks = torch.empty, []

    def empty(*shape: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Tensor:
        size = torch.Size(shape[0] if isinstance(shape[0], tuple) else shape)
        memory = real_empty(GUARD + size.numel() + GUARD, dtype=dtype, device=device)
        memory[:GUARD], memory[-GUARD:] = 99, 99
        blocks.append((memory, size))
        return memory[GUARD:-GUARD].view(size)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", lambda t: empty(*t.shape, dtype=t.dtype, device=t.device))
    yield
    for memory, size in blocks:
        for name, guard in (("before", memory[:GUARD]), ("after", memory[-GUARD:])):
            assert bool((guard == 99).all()), f"a kernel wrote {name} a tensor of shape {tuple(size)}"


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def unaligned(tensor: Tensor) -> Tensor:
    """A contiguous copy that begins 2 or 4 bytes after a multiple of 16: packs of 16 bytes can't be loaded from it."""
    memory = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return memory[1:].view(tensor.shape).copy_(tensor)


def check(got: Tensor, exact: Tensor, see: str, case: str, error: float = 1e-5) -> None:
    """Compare a kernel's result with the reference's, which has been computed in float32 and not been rounded.

    error: what is allowed, in units of the largest number, besides two units in the last place of got's dtype."""
    got, exact = got.cpu(), exact.cpu()
    assert got.shape == exact.shape, f"{case}: expected shape {tuple(exact.shape)}, got {tuple(got.shape)}. {see}"
    two_units = 0.0 if got.dtype == torch.float32 else 2 * torch.finfo(got.dtype).eps
    allowed = exact.abs() * two_units + error * exact.abs().nan_to_num(0.0).amax()
    is_wrong = ((got.float() - exact).abs() > allowed) | (got.isnan() != exact.isnan())
    if is_wrong.any():
        at = tuple(is_wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{case}: {int(is_wrong.sum())} of {got.numel()} numbers differ; "
            f"at {at}: expected {exact[at]:.6g}, got {got[at]:.6g}. {see}"
        )


def check_equal(got: Tensor, expected: Tensor, see: str, case: str) -> None:
    got, expected = got.cpu(), expected.cpu()
    if not torch.equal(got, expected):
        at = tuple((got != expected).nonzero()[0].tolist())
        raise AssertionError(f"{case}: at {at}: expected {expected[at]}, got {got[at]}. {see}")


# Number formats

CONVERSIONS = """
#include "common.cuh"
template <class From, class To> __global__ void convert_kernel(const From* from, To* to, index_t size) {
    const index_t i = blockIdx.x * (index_t)blockDim.x + threadIdx.x;
    if (i < size) to[i] = from_float<To>(to_float(from[i]));
}
template <class From, class To> int convert(const void* from, void* to, index_t size, void* stream) {
    LAUNCH((convert_kernel<From, To>), (unsigned)ceil_div(size, 128), 128, 0, stream)((const From*)from, (To*)to, size);
    return cudaGetLastError();
}
extern "C" int decode_fp8(const void* a, void* b, index_t n, void* s) { return convert<fp8_t, float>(a, b, n, s); }
extern "C" int encode_fp8(const void* a, void* b, index_t n, void* s) { return convert<float, fp8_t>(a, b, n, s); }
typedef signed char code_t;
extern "C" int decode_int8(const void* a, void* b, index_t n, void* s) { return convert<code_t, float>(a, b, n, s); }
extern "C" int encode_int8(const void* a, void* b, index_t n, void* s) { return convert<float, code_t>(a, b, n, s); }
"""


@pytest.fixture(scope="module")
def convert(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Tensor, torch.dtype], Tensor]:
    """Runs one of the conversions in common.cuh, in a kernel made for the test."""
    library = Library("conversions")
    library.source = tmp_path_factory.mktemp("kernels") / "conversions.cu"
    Path(library.source).write_text(CONVERSIONS)

    def run(symbol: str, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        converted = torch.empty(numbers.shape, dtype=dtype, device=numbers.device)
        library.call(symbol, numbers, converted, numbers.numel())
        return converted.cpu()

    return run


def test_fp8_codes_decode_as_in_torch(device: str, convert: Callable[..., Tensor]) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    got = convert("decode_fp8", codes.to(device), torch.float32)
    expected = codes.view(torch.float8_e4m3fn).float()
    see = "See common.cuh::to_float(fp8_t)"
    check_equal(got.isnan(), expected.isnan(), see, "which of the 256 codes are NaN")
    got, expected = got.nan_to_num(0.0), expected.nan_to_num(0.0)
    check_equal(got.view(torch.int32), expected.view(torch.int32), see, "bits of the floats of the 256 codes")


def test_floats_encode_to_fp8_as_in_torch(device: str, convert: Callable[..., Tensor]) -> None:
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # 0 to 448
    ties = (codes[1:] + codes[:-1]) / 2
    up, down = ties.nextafter(torch.tensor(torch.inf)), ties.nextafter(torch.tensor(0.0))
    special = torch.tensor([448.01, 463.9, 464, 480, 1e5, 3e38, torch.inf, 1e-45, 1e-38, torch.nan])
    any_bits = torch.arange(0, 2**31, 32_749, dtype=torch.int64).to(torch.int32).view(torch.float32)
    positive = torch.cat((codes, ties, up, down, special, any_bits))
    numbers = torch.cat((positive, -positive))
    got = convert("encode_fp8", numbers.to(device), torch.uint8)
    expected = numbers.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    is_nan = numbers.isnan()
    assert bool((got[is_nan] & 0x7F == 0x7F).all()), "NaN: expected code 0x7f. See common.cuh::from_float<fp8_t>"
    for number, code, other in zip(numbers[~is_nan], expected[~is_nan], got[~is_nan], strict=True):
        if code != other:
            raise AssertionError(
                f"{number:.9g}: expected code {code:#04x}, got {other:#04x}. See common.cuh::from_float<fp8_t>"
            )


def test_floats_encode_to_int8_as_in_torch(device: str, convert: Callable[..., Tensor]) -> None:
    numbers = torch.cat((torch.arange(-1200, 1200) / 8, torch.tensor([1e9, -1e9, 3e38, torch.inf, -torch.inf])))
    got = convert("encode_int8", numbers.to(device), torch.int8)
    expected = numbers.round().clamp(-127, 127).to(torch.int8)
    check_equal(got, expected, "See common.cuh::from_float<signed char>", "eighths from -150 to 150, and infinities")
    decoded = convert("decode_int8", got.to(device), torch.float32)
    check_equal(decoded, got.float(), "See common.cuh::to_float(signed char)", "codes from -127 to 127")


# Softmax


@by_rung
@by_dtype
def test_softmax_equals_the_reference(softmax: Callable[[Tensor], Tensor], dtype: torch.dtype, device: str) -> None:
    for shape in ((1, 1), (5, 3), (130, 4), (3, 32), (9, 33), (2, 1000), (1, 1024), (2, 5003), (1, 8448)):
        rows = 4 * randn(*shape, dtype=dtype)
        got, exact = softmax(rows.to(device)), reference.softmax(rows.float())
        assert got.dtype == dtype, f"expected {dtype}, got {got.dtype}. See cuda/softmax.py::launch_softmax"
        # One thread of softmax_naive adds a whole row, number by number, and each addition rounds.
        error = 1e-5 if softmax is not softmax_naive else max(1e-5, shape[1] * 2**-24)
        check(got, exact, f"See cuda/{softmax.__name__}.cu", f"rows of shape {shape}", error)
    rows = randn(3, 64, dtype=dtype)
    got = softmax(unaligned(rows.to(device)))
    check(got, reference.softmax(rows.float()), f"See cuda/{softmax.__name__}.cu", "rows at an odd address")
    assert softmax(rows[:0].to(device)).shape == (0, 64), "no rows: expected shape (0, 64)"


@by_rung
@by_dtype
def test_softmax_of_special_rows(softmax: Callable[[Tensor], Tensor], dtype: torch.dtype, device: str) -> None:
    size, inf, nan = 600, torch.inf, torch.nan
    see, largest = f"See cuda/{softmax.__name__}.cu", torch.finfo(dtype).max
    rows = randn(12, size)
    rows[0] = -inf
    rows[1, :400] = -inf  # some threads see only -inf
    rows[2] = torch.where(torch.arange(size) == 517, 5.0, -inf)
    rows[3, 0], rows[4, 599], rows[5, 300] = nan, inf, nan
    rows[5, :300], rows[5, 301:] = -inf, -inf
    rows[6, 7], rows[6, 300] = inf, inf
    rows[7], rows[8], rows[9] = largest, -largest, torch.linspace(-largest, largest, size)
    rows[10] = torch.linspace(-100, 100, size)
    rows[11] = torch.linspace(100, -100, size)
    rows = rows.to(dtype)
    exact = rows.float().softmax(dim=-1)
    exact[0] = 0.0
    got = softmax(rows.to(device))
    names = (
        "only -inf", "-inf in the first 400", "one finite number", "NaN in the first place", "+inf in the last place",
        "NaN and -inf", "+inf twice", "all the largest number", "all the lowest number", "the lowest to the largest",
        "-100 to 100", "100 to -100",
    )  # fmt: skip
    for row, name in enumerate(names):
        check(got[row], exact[row], see, f"row with {name}")


def test_fused_softmax_refuses_rows_that_do_not_fit_in_shared_memory(device: str) -> None:
    rows = randn(1, 25_281).to(device)
    check(softmax_fused(rows[:, :25_280].contiguous()), reference.softmax(rows.cpu()[:, :25_280]),
          "See cuda/softmax_fused.cu::launch_softmax_fused", "25,280 floats, 99 KiB with the reductions")  # fmt: skip
    with pytest.raises(KernelError, match="no kernel"):
        softmax_fused(rows)


def test_online_softmax_has_no_limit(device: str) -> None:
    rows = 4 * randn(1, 60_000)
    check(softmax_online(rows.to(device)), reference.softmax(rows), "See cuda/softmax_online.cu", "60,000 floats")


def test_softmax_refuses_what_the_kernels_take_for_granted() -> None:
    with pytest.raises(AssertionError, match="contiguous"):
        softmax_warp(torch.zeros(8, 4).T)
    with pytest.raises(AssertionError, match=r"\[num_rows, size\]"):
        softmax_warp(torch.zeros(8))


# RMSNorm

NORM = "See cuda/norm.cu::add_rms_norm_kernel"
NORM_SHAPES = (
    (1, 1), (3, 2), (130, 5), (70, 20), (33, 32), (11, 64), (9, 128), (5, 200), (3, 256), (3, 264), (2, 1000),
    (2, 5003), (1, 16_384),
)  # fmt: skip


@by_dtype
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
def test_add_rms_norm_equals_the_reference(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    rows, residual, weight = (randn(*s, dtype=dtype, seed=seed) for seed, s in enumerate((shape, shape, shape[1:])))
    expected_residual = residual.clone()
    expected = reference.add_rms_norm(rows, expected_residual, weight, EPS)
    exact = reference.add_rms_norm(rows.float(), residual.float().clone(), weight.float(), EPS)
    residual = residual.to(device)
    got = add_rms_norm(rows.to(device), residual, weight.to(device), EPS)
    check(got, exact, NORM, f"{shape}: output")
    check_equal(residual, expected_residual, NORM, f"{shape}: residual")
    num_equal = int((got.cpu() == expected).sum())
    assert dtype == torch.float32 or num_equal >= 0.95 * got.numel() - 1, (
        f"only {num_equal} of {got.numel()} numbers are rounded as in the reference: "
        f"the norm must read the sum before it is rounded. {NORM}"
    )


@by_dtype
def test_rms_norm_equals_the_reference(dtype: torch.dtype, device: str) -> None:
    for shape in NORM_SHAPES:
        rows, weight = randn(*shape, dtype=dtype), randn(shape[1], dtype=dtype, seed=1)
        exact = reference.add_rms_norm(rows.float(), torch.zeros(shape), weight.float(), EPS)
        check(rms_norm(rows.to(device), weight.to(device), EPS), exact, NORM, f"{shape} without a residual")
    zeros = torch.zeros(2, 64, dtype=dtype, device=device)
    check(rms_norm(zeros, zeros[0] + 1, EPS), zeros.float(), NORM, "zeros: eps prevents a division by 0")


@by_dtype
def test_rms_norm_of_heads_in_a_larger_projection(dtype: torch.dtype, device: str) -> None:
    cases = ((5, 3, 32, 160, 0), (2, 4, 128, 1024, 512), (3, 2, 64, 131, 0), (3, 2, 64, 160, 1), (1, 1, 6, 7, 1))
    for num_tokens, num_heads, head_dim, columns, start in cases:
        qkv = randn(num_tokens, columns, dtype=dtype).to(device)
        heads = qkv[:, start : start + num_heads * head_dim].unflatten(1, (num_heads, head_dim))
        weight = randn(head_dim, dtype=dtype, seed=1)
        rows = heads.cpu().float().flatten(0, 1)
        exact = reference.add_rms_norm(rows, torch.zeros_like(rows), weight.float(), EPS).view(heads.shape)
        got = rms_norm(heads, weight.to(device), EPS)
        check(got, exact, NORM, f"{num_heads} heads of {head_dim}, {columns} numbers from a token to the next")
        assert got.is_contiguous(), "expected a contiguous result. See cuda/norm.py::launch"


def test_norm_of_unaligned_and_of_no_rows(device: str) -> None:
    rows, residual, weight = randn(4, 64), randn(4, 64, seed=1), randn(64, seed=2)
    exact = reference.add_rms_norm(rows, residual.clone(), weight, EPS)
    for which, name in enumerate(("rows", "residual", "weight")):
        tensors = [tensor.to(device).clone() for tensor in (rows, residual, weight)]
        tensors[which] = unaligned(tensors[which])
        check(add_rms_norm(tensors[0], tensors[1], tensors[2], EPS), exact, NORM, f"{name} at an odd address")
    assert rms_norm(rows[:0].to(device), weight.to(device), EPS).shape == (0, 64), "no rows: expected shape (0, 64)"


# RoPE and the write to the KV cache

ROTARY = "See cuda/rotary.cu::rotate_and_store_kernel"
CACHE_DTYPES = (None, torch.int8, torch.uint8)


def rotary_batch(
    num_tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: str, extra: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values as slices of one projection; positions; a table of angles.

    extra: unused columns. If there are any, the slices begin at the second column, so at an odd address."""
    size, start = (num_heads + 2 * num_kv_heads) * head_dim, min(extra, 1)
    qkv = 3 * randn(num_tokens, size + extra, dtype=dtype).to(device)
    heads = qkv[:, start : start + size].unflatten(1, (-1, head_dim))
    query, key, value = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    positions = torch.randperm(300, generator=torch.Generator().manual_seed(1))[:num_tokens].to(device)
    angles = torch.outer(torch.arange(300.0), 1e4 ** (-torch.arange(head_dim // 2) / (head_dim // 2)))
    return query, key, value, positions, torch.cat((angles.cos(), angles.sin()), dim=1).to(device)


@by_dtype
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES, ids=["numbers", "int8", "fp8"])
@pytest.mark.parametrize(
    ("sizes", "extra"),
    [((9, 4, 2, 32), 0), ((5, 8, 1, 64), 0), ((3, 6, 3, 128), 0), ((4, 2, 2, 20), 0), ((4, 3, 1, 6), 0),
     ((4, 4, 2, 64), 1), ((4, 4, 2, 64), 16), ((2, 40, 10, 8), 0)],
    ids=str,
)  # fmt: skip
def test_rotate_and_store_equals_the_reference(
    sizes: tuple[int, int, int, int], extra: int, dtype: torch.dtype, cache_dtype: torch.dtype | None, device: str
) -> None:
    query, key, value, positions, table = rotary_batch(*sizes, dtype, device, extra)
    num_tokens, _, num_kv_heads, head_dim = sizes
    slots = torch.randperm(24, generator=torch.Generator().manual_seed(2))[:num_tokens]
    slots[1] = -1
    scales = None if cache_dtype is None else 0.02 + torch.rand(2, num_kv_heads) / 20
    cache = torch.empty(6, 4, 2, num_kv_heads, head_dim, dtype=cache_dtype or dtype, device=device).fill_(77)
    expected_cache = cache.cpu().clone()
    arguments = [tensor.cpu() for tensor in (query, key, value, positions, table)]
    expected = reference.rotate_and_store(*arguments, expected_cache, slots, scales)
    exact = reference.rotate(query.cpu().float(), *(t.unsqueeze(1) for t in table.cpu()[arguments[3]].chunk(2, dim=-1)))

    got = rotate_and_store(
        query, key, value, positions, table, cache, slots.to(device), None if scales is None else scales.to(device)
    )
    case = f"[tokens, heads, KV heads, head_dim] = {list(sizes)}, {cache.dtype} cache"
    check(got, exact, ROTARY, f"{case}: queries")
    assert got.is_contiguous() and got.dtype == expected.dtype, f"{case}: expected contiguous queries of {dtype}"
    got_keys, got_values = cache.cpu().flatten(0, 1).unbind(1)
    expected_keys, expected_values = expected_cache.flatten(0, 1).unbind(1)
    check_equal(got_values, expected_values, ROTARY, f"{case}: values in [slot, head, dimension]")
    kept = slots[slots >= 0]
    others = torch.ones(24, dtype=torch.bool).index_fill_(0, kept, False)
    check_equal(got_keys[others], expected_keys[others], ROTARY, f"{case}: keys of slots that no token has")
    if scales is None:
        check(got_keys[kept], expected_keys[kept].float(), ROTARY, f"{case}: keys")
        return
    # The reference rounds twice where the kernel has a fused multiply-add, so a few keys end on the next code.
    differs = got_keys[kept] != expected_keys[kept]
    assert int(differs.sum()) <= 2 + differs.numel() // 50, f"{case}: {int(differs.sum())} codes of keys. {ROTARY}"
    step = (got_keys[kept].int() - expected_keys[kept].int()).abs().max()
    assert step <= 1, f"{case}: codes of keys differ by up to {step}: expected 1 at most. {ROTARY}"


def test_queries_keys_and_values_with_different_strides(device: str) -> None:
    query, key, value, positions, table = rotary_batch(5, 2, 2, 32, torch.float32, device)
    for columns, which in product((80, 65), ("query", "key", "value")):  # packs can't be loaded with a stride of 65
        tensors = {"query": query.contiguous(), "key": key.contiguous(), "value": value.contiguous()}
        tensors[which] = torch.zeros(5, columns, device=device)[:, :64].view(5, 2, 32).copy_(tensors[which])
        cache = torch.zeros(2, 4, 2, 2, 32, device=device)
        expected_cache, slots = cache.cpu().clone(), torch.tensor([7, 1, 0, 4, 6])
        arguments = [tensor.cpu() for tensor in (query, key, value, positions, table)]
        expected = reference.rotate_and_store(*arguments, expected_cache, slots)
        got = rotate_and_store(
            **tensors, positions=positions, table=table, kv_cache=cache, slot_mapping=slots.to(device)
        )
        check(got, expected, ROTARY, f"{which} has a stride of {columns}: queries")
        check(cache, expected_cache, ROTARY, f"{which} has a stride of {columns}: cache")


def test_codes_of_values_saturate(device: str) -> None:
    query, key, value, positions, table = rotary_batch(3, 2, 1, 32, torch.float32, device)
    value = 1e6 * value
    for cache_dtype, largest in ((torch.int8, 127.0), (torch.uint8, 448.0)):
        cache = torch.zeros(1, 4, 2, 1, 32, dtype=cache_dtype, device=device)
        scales = torch.ones(2, 1, device=device)
        rotate_and_store(query, key, value, positions, table, cache, torch.arange(3, device=device), scales)
        codes = cache.cpu()[0, :3, 1]
        numbers = (codes.view(torch.float8_e4m3fn) if cache_dtype == torch.uint8 else codes).float()
        check_equal(numbers, largest * value.cpu().sign(), "See common.cuh::from_float", f"{cache_dtype}: large values")


@by_dtype
def test_a_table_of_the_models_dtype(dtype: torch.dtype, device: str) -> None:
    query, key, value, positions, table = rotary_batch(4, 3, 1, 64, dtype, device)
    cache = torch.zeros(2, 4, 2, 1, 64, dtype=dtype, device=device)
    got = rotate_and_store(query, key, value, positions, table.to(dtype), cache, torch.arange(4, device=device))
    cos, sin = table.to(dtype).cpu()[positions.cpu()].float().unsqueeze(1).chunk(2, dim=-1)
    check(got, reference.rotate(query.cpu().float(), cos, sin), ROTARY, f"queries with a table of {dtype}")


def test_a_cache_with_more_numbers_than_an_int_can_count(device: str) -> None:
    query, key, value, positions, table = rotary_batch(2, 2, 1, 64, torch.float32, device)
    num_slots = 2**31 // 128 + 64
    cache = torch.empty(num_slots // 16, 16, 2, 1, 64, dtype=torch.int8, device=device)  # untouched memory is no memory
    slots = torch.tensor([num_slots - 1, 3], device=device)
    cache.view(num_slots, 2, 1, 64)[slots] = 0
    rotate_and_store(query, key, value, positions, table, cache, slots, torch.ones(2, 1, device=device))
    got = cache.view(num_slots, 2, 1, 64)[slots, 1]
    check_equal(got, value.round().to(torch.int8), ROTARY, "values in the last slot of a cache of 2^31 numbers")


def test_rotate_and_store_refuses_what_the_kernel_takes_for_granted() -> None:
    query, key, value, positions, table = rotary_batch(2, 2, 1, 32, torch.float32, "cpu")
    cache, slots = torch.zeros(2, 4, 2, 1, 32), torch.arange(2)
    with pytest.raises(AssertionError, match="codes need scales"):
        rotate_and_store(query, key, value, positions, table, cache.to(torch.int8), slots)
    with pytest.raises(AssertionError, match="int64"):
        rotate_and_store(query, key, value, positions.int(), table, cache, slots)
    with pytest.raises(AssertionError, match="kv_cache"):
        rotate_and_store(query, key, value, positions, table, cache[..., :16], slots)
    assert rotate_and_store(query[:0], key[:0], value[:0], positions[:0], table, cache, slots[:0]).shape == (0, 2, 32)


# SiLU


@by_dtype
def test_silu_and_mul_equals_the_reference(dtype: torch.dtype, device: str) -> None:
    see = "See cuda/activation.cu::silu_and_mul_kernel"
    for num_rows, size in ((1, 1), (7, 3), (3, 64), (5, 100), (2, 1000), (3, 2056), (2, 4100)):
        gate_up = 4 * randn(num_rows, 2 * size, dtype=dtype)
        check(silu_and_mul(gate_up.to(device)), reference.silu_and_mul(gate_up.float()), see, f"{num_rows} x {size}")
    gate_up = torch.tensor([[-1000.0, -90, -20, 0, 20, 90, 1000, 3] + [2.0] * 8], dtype=dtype)
    check(silu_and_mul(gate_up.to(device)), reference.silu_and_mul(gate_up.float()), see, "large and small gates")
    gate_up = randn(3, 64, dtype=dtype)
    check(silu_and_mul(unaligned(gate_up.to(device))), reference.silu_and_mul(gate_up.float()), see, "an odd address")
    assert silu_and_mul(gate_up[:0].to(device)).shape == (0, 32), "no rows: expected shape (0, 32)"


# Sampling

SAMPLING = "See cuda/sampling.cu::sample_kernel"


class Parameters:
    """The columns of sample(); each argument is one value for all rows, or a value for each."""

    def __init__(
        self, num_rows: int, temperature: object = 1.0, top_k: object = 2**30, top_p: object = 1.0, min_p: object = 0.0,
        seed: object = None, position: object = None,
    ) -> None:  # fmt: skip
        def column(value: object, dtype: torch.dtype) -> Tensor:
            return torch.as_tensor(value, dtype=dtype).expand(num_rows).contiguous()

        self.floats = [column(value, torch.float32) for value in (temperature, top_p, min_p)]
        self.top_k = column(top_k, torch.int32)
        self.seeds = column(torch.arange(num_rows) * 7919 - 50 if seed is None else seed, torch.int64)
        self.positions = column(torch.arange(num_rows) if position is None else position, torch.int64)

    def arguments(self, vocab_size: int) -> tuple[Tensor, ...]:
        temperature, top_p, min_p = self.floats
        return temperature, self.top_k.clamp(max=vocab_size), top_p, min_p, self.seeds, self.positions


def check_sample(logits: Tensor, parameters: Parameters, device: str, case: str) -> Tensor:
    """Draws as the reference does. Returns the tokens."""
    arguments = parameters.arguments(logits.shape[1])
    expected = reference.sample(logits, *arguments)
    got = sample(logits.to(device), *(argument.to(device) for argument in arguments)).cpu()
    if not torch.equal(got, expected):
        row = int((got != expected).nonzero()[0])
        names = ("temperature", "top_k", "top_p", "min_p", "seed", "position")
        values = {name: argument[row].item() for name, argument in zip(names, arguments, strict=True)}
        raise AssertionError(
            f"{case}: {int((got != expected).sum())} of {len(got)} tokens differ; row {row} with {values}: "
            f"expected token {expected[row]} with logit {logits[row, expected[row]]}, "
            f"got token {got[row]} with logit {logits[row, got[row]] if 0 <= got[row] < logits.shape[1] else None}. "
            f"{SAMPLING}"
        )
    return got


@pytest.mark.parametrize("vocab_size", [1, 2, 31, 32, 100, 1001, 1028, 5003])
@pytest.mark.parametrize("step", [None, 0.5, 4.0], ids=["all different", "many equal", "few values"])
def test_samples_of_mixed_rows_equal_the_reference(vocab_size: int, step: float | None, device: str) -> None:
    num_rows = 96 if vocab_size < 2000 else 24
    generator = torch.Generator().manual_seed(vocab_size)
    logits = 3 * randn(num_rows, vocab_size, seed=vocab_size)
    if step is not None:
        logits = (logits / step).round() * step

    def choose(*values: float) -> Tensor:
        return torch.tensor(values)[torch.randint(len(values), (num_rows,), generator=generator)]

    parameters = Parameters(
        num_rows, choose(0.0, 0.3, 0.7, 1.0, 1.0, 2.5), choose(1, 2, 5, 20, 50, 2**30, 2**30).int(),
        choose(0.05, 0.3, 0.5, 0.9, 0.99, 1.0, 1.0), choose(0.0, 0.0, 0.0, 0.01, 0.1, 0.5),
    )  # fmt: skip
    check_sample(logits, parameters, device, f"vocabulary of {vocab_size}")


@pytest.mark.parametrize(
    "options",
    [dict(top_k=1), dict(top_k=2), dict(top_p=1e-6), dict(top_p=1e-30), dict(top_p=0.999999), dict(min_p=1.0),
     dict(min_p=1e-4), dict(min_p=0.2, top_k=3, top_p=0.6), dict(temperature=0.0), dict(temperature=1e-30),
     dict(temperature=1e-38, top_k=4, top_p=0.5), dict(temperature=1e-3, top_p=0.9), dict(temperature=1e3, top_k=7),
     dict(temperature=1e6, top_p=0.4), dict(temperature=1e6, min_p=0.5)],
    ids=str,
)  # fmt: skip
def test_samples_with_extreme_parameters_equal_the_reference(options: dict[str, float], device: str) -> None:
    for vocab_size, step in product((2, 203), (0.0, 1.0)):
        logits = 3 * randn(64, vocab_size, seed=5)
        logits = (logits / step).round() * step if step else logits
        case = f"vocabulary of {vocab_size}, steps of {step}"
        check_sample(logits, Parameters(64, **options), device, case)  # type: ignore[arg-type]


def seed_for(bits: int, token: int) -> int:
    """The seed with which a token has these 64 random bits at position 0: noise.py, computed backward."""

    def unmix(x: int) -> int:
        for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
            x ^= x >> shift ^ x >> 2 * shift
            x = x * pow(factor, -1, 2**64) % 2**64
        return x

    seed = unmix(unmix((unmix(bits) - (token + 1) * 0x9E3779B97F4A7C15) % 2**64))
    return seed - 2**64 if seed >= 2**63 else seed


@pytest.mark.parametrize(("bits", "logit", "drawn"), [(0, -60.0, 1), (2**64 - 1, 20.0, 0)], ids=["lowest", "highest"])
def test_the_noise_is_neither_zero_nor_infinite(bits: int, logit: float, drawn: int, device: str) -> None:
    """A division by 0 would make an unlikely token win, one by infinity would make a likely token lose."""
    logits = torch.tensor([[logit, 0.0]])
    tokens = check_sample(logits, Parameters(1, seed=seed_for(bits, 0), position=0), device, f"random bits {bits:#x}")
    see = "See cuda/sampling.cu::exponential_noise"
    assert tokens.tolist() == [drawn], f"random bits {bits:#x}: expected token {drawn}, got {tokens.tolist()}. {see}"


@pytest.mark.parametrize(
    "options",
    [dict(temperature=0.0), dict(), dict(top_k=5), dict(top_p=0.9), dict(min_p=0.1), dict(top_k=9, top_p=0.5)],
    ids=str,
)
def test_tokens_with_logit_minus_infinity_are_never_drawn(options: dict[str, float], device: str) -> None:
    logits = randn(40, 77)
    logits[:20, torch.randperm(77)[:60]] = -torch.inf
    logits[20:30, :76] = -torch.inf
    logits[30:] = -torch.inf
    tokens = check_sample(logits, Parameters(40, **options), device, "rows with -inf")  # type: ignore[arg-type]
    drawn = logits[:30].gather(1, tokens[:30].unsqueeze(1))
    assert bool((drawn > -torch.inf).all()), f"a token with logit -inf was drawn. {SAMPLING}"
    assert bool((tokens[30:] == 0).all()), f"rows of only -inf: expected token 0, got {tokens[30:]}. {SAMPLING}"


def test_equal_logits_go_to_the_first_token(device: str) -> None:
    logits = torch.tensor([[1.0, 3, 3, 2], [0.0, -0.0, -1, -1], [-0.0, 0.0, -1, -1], [-5, -5, -5, -5], [2, 2, 2, 9]])
    tokens = sample(logits.to(device), *(a.to(device) for a in Parameters(5, 0.0).arguments(4))).cpu()
    check_equal(tokens, torch.tensor([1, 0, 0, 0, 3]), "See cuda/sampling.cu::argmax", "greedy rows with equal logits")


def test_equally_likely_tokens_are_kept_or_dropped_together(device: str) -> None:
    logits = torch.tensor([4.0, 3, 3, 3, 2, 1, 1, 0]).expand(4000, -1).contiguous()
    seen: dict[str, set[int]] = {}
    for name, options in (("top_k=2", dict(top_k=2)), ("top_p=0.6", dict(top_p=0.6)), ("top_k=6", dict(top_k=6))):
        arguments = Parameters(4000, 3.0, **options).arguments(8)  # type: ignore[arg-type]
        seen[name] = set(sample(logits.to(device), *(a.to(device) for a in arguments)).tolist())
    expected = {"top_k=2": {0, 1, 2, 3}, "top_p=0.6": {0, 1, 2, 3}, "top_k=6": {0, 1, 2, 3, 4, 5, 6}}
    assert seen == expected, f"expected tokens {expected}, got {seen}. See cuda/sampling.cu::find_limit"


def test_a_large_vocabulary(device: str) -> None:
    logits = 2 * randn(3, 200_000)
    parameters = Parameters(3, 1.5, torch.tensor([2**30, 1000, 150_000]), torch.tensor([0.9, 1.0, 0.7]), 1e-6)
    check_sample(logits, parameters, device, "vocabulary of 200,000")
    with pytest.raises(KernelError, match="no kernel"):
        arguments = Parameters(1).arguments(2**19 + 4)
        sample(torch.zeros(1, 2**19 + 4, device=device), *(a.to(device) for a in arguments))


def test_probability_is_added_exactly(device: str) -> None:
    """20,000 tokens on each of two levels: the sums of their probabilities need more than 32 bits of a counter."""
    logits = torch.tensor([0.0, -0.1]).repeat(20_000).expand(2, -1).contiguous()
    share = 1 / (1 + 2.718281828**-0.1)  # of the likelier half: 0.525
    for top_p, num_levels in ((share - 1e-5, 1), (share + 1e-5, 2)):
        arguments = Parameters(2, 1.0, top_p=top_p, seed=torch.tensor([1, 2])).arguments(40_000)
        tokens = torch.cat([
            sample(logits.to(device), *(a.to(device) for a in (*arguments[:5], arguments[5] + 100 * draw))).cpu()
            for draw in range(8)
        ])  # fmt: skip
        levels = set((tokens % 2).tolist())
        assert len(levels) == num_levels, (
            f"top_p={top_p:.6f}, likelier half {share:.6f}: expected tokens of {num_levels} levels, got {levels}. "
            "See cuda/sampling.cu::Counters"
        )


@pytest.mark.parametrize("options", [dict(), dict(top_k=4), dict(top_p=0.85), dict(min_p=0.15)], ids=str)
def test_tokens_are_drawn_in_proportion_to_their_probabilities(options: dict[str, float], device: str) -> None:
    num_rows, temperature = 10_000, 1.5
    row = torch.tensor([0.3, 2.0, -1.0, 1.2, 0.0, 2.4, -2.0, 1.0, -torch.inf])
    arguments = Parameters(num_rows, temperature, seed=1234, **options).arguments(9)  # type: ignore[arg-type]
    logits = row.expand(num_rows, -1).contiguous()
    tokens = sample(logits.to(device), *(a.to(device) for a in arguments)).cpu()
    probs = (row / temperature).softmax(dim=0)
    order = probs.argsort(descending=True)
    likelier = probs[order].cumsum(0) - probs[order]
    kept = (torch.arange(9) < options.get("top_k", 9)) & (likelier < options.get("top_p", 1.1))
    kept &= probs[order] >= options.get("min_p", 0.0) * probs.max()
    expected = torch.zeros(9).index_put_((order[kept],), probs[order[kept]])
    expected = expected / expected.sum() * num_rows
    counts = tokens.bincount(minlength=9).float()
    check_equal(counts > 0, expected > 0, SAMPLING, "which tokens are drawn")
    drawn = expected > 0
    chi_square = float(((counts - expected)[drawn] ** 2 / expected[drawn]).sum())
    limit = {3: 13.8, 4: 16.3, 5: 18.5, 6: 20.5, 8: 24.3}[int(drawn.sum())]  # exceeded by chance once in 1,000 seeds
    assert chi_square < limit, f"counts {counts.tolist()}, expected {expected.tolist()}: chi-square {chi_square:.1f}"


def test_a_token_depends_on_nothing_but_its_row(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = randn(16, 900)
    arguments = Parameters(16, 1.3, torch.arange(16) * 20 + 1, 0.9, seed=9).arguments(900)
    on_device = [argument.to(device) for argument in (logits, *arguments)]
    together = sample(*on_device).cpu()
    reverse = sample(*(argument.flip(0).contiguous() for argument in on_device)).cpu().flip(0)
    check_equal(reverse, together, SAMPLING, "the same rows, last one first")
    for order in ("reverse", "random:3"):  # of the threads, in the emulation
        monkeypatch.setenv("CUDA_ON_CPU_ORDER", order)
        check_equal(sample(*on_device), together, SAMPLING, f"thread order {order}")


def test_sample_refuses_what_the_kernel_takes_for_granted() -> None:
    logits, arguments = torch.zeros(2, 10), list(Parameters(2).arguments(10))
    assert sample(logits[:0], *(argument[:0] for argument in arguments)).shape == (0,), "no rows: expected shape (0,)"
    with pytest.raises(AssertionError, match="float32"):
        sample(logits.half(), *arguments)
    arguments[1] = arguments[1].long()
    with pytest.raises(AssertionError, match="top_k is torch.int64"):
        sample(logits, *arguments)


# Attention with a mask

ATTENTION = "See cuda/masked_attention.cu::masked_attention_kernel"


@by_dtype
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1, 1, 32), (2, 3, 5, 7, 32), (1, 2, 16, 32, 64), (2, 1, 17, 33, 64), (1, 1, 37, 70, 128),
     (1, 1, 9, 40, 256), (1, 2, 18, 45, 20), (1, 1, 6, 34, 33), (1, 1, 4, 35, 80), (1, 1, 3, 200, 160)],
    ids=str,
)  # fmt: skip
def test_masked_attention_equals_the_reference(sizes: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    batch, num_heads, num_queries, num_keys, head_dim = sizes
    query = randn(batch, num_heads, num_queries, head_dim, dtype=dtype)
    key, value = (randn(batch, num_heads, num_keys, head_dim, dtype=dtype, seed=seed) for seed in (1, 2))
    queries, keys = torch.arange(num_queries).unsqueeze(1), torch.arange(num_keys)
    masks = {
        "everything is visible": torch.ones(num_queries, num_keys, dtype=torch.bool),
        "causal": keys <= queries + num_keys - num_queries,
        "a window of 3": (keys - 2 * queries).abs() < 3,
        "random": randn(num_queries, num_keys, seed=3) > 0.5,
        "the first 32 keys are hidden": (keys >= 32).expand(num_queries, -1),
        "nothing is visible": torch.zeros(num_queries, num_keys, dtype=torch.bool),
    }
    for name, mask in masks.items():
        mask = mask.contiguous()
        exact = reference.masked_attention(query.float(), key.float(), value.float(), mask, head_dim**-0.5)
        got = masked_attention(*(tensor.to(device) for tensor in (query, key, value, mask)), head_dim**-0.5)
        assert got.dtype == dtype, f"expected {dtype}, got {got.dtype}. {ATTENTION}"
        check(got, exact, ATTENTION, f"[batch, heads, queries, keys, head_dim] = {list(sizes)}, {name}")


@by_dtype
def test_masked_attention_with_large_scores(dtype: torch.dtype, device: str) -> None:
    query, key, value = (randn(1, 1, size, 32, dtype=dtype, seed=size) for size in (20, 100, 100))
    mask = torch.ones(20, 100, dtype=torch.bool)
    for order in ("rising", "falling"):
        ordered = key[:, :, (key.float() @ query.float()[0, 0, 0])[0, 0].argsort(descending=order == "falling")]
        exact = reference.masked_attention(query.float(), ordered.float(), value.float(), mask, 20.0)
        got = masked_attention(*(tensor.to(device) for tensor in (query, ordered.contiguous(), value, mask)), 20.0)
        check(got, exact, ATTENTION, f"scores of several hundred, {order} for the first query")


def test_masked_attention_of_unaligned_and_of_no_queries(device: str) -> None:
    query, key, value = (randn(1, 2, 8, 64, seed=seed).to(device) for seed in range(3))
    mask = torch.ones(8, 8, dtype=torch.bool, device=device)
    exact = reference.masked_attention(query.cpu(), key.cpu(), value.cpu(), mask.cpu(), 0.1)
    check(masked_attention(query, unaligned(key), value, mask, 0.1), exact, ATTENTION, "keys at an odd address")
    assert masked_attention(query[:, :, :0], key, value, mask[:0], 0.1).shape == (1, 2, 0, 64), "no queries"
    empty = masked_attention(query, key[:, :, :0], value[:, :, :0], mask[:, :0], 0.1)
    check(empty, torch.zeros(1, 2, 8, 64), ATTENTION, "no keys")


def test_masked_attention_refuses_what_the_kernel_takes_for_granted(device: str) -> None:
    query, mask = torch.zeros(1, 1, 4, 264, device=device), torch.ones(4, 4, dtype=torch.bool, device=device)
    with pytest.raises(KernelError, match="no kernel"):
        masked_attention(query, query, query, mask, 1.0)
    with pytest.raises(AssertionError, match="bool"):
        masked_attention(query, query, query, mask.int(), 1.0)
    with pytest.raises(AssertionError, match="contiguous"):
        masked_attention(query[..., :64], query[..., :64], query[..., :64], mask, 1.0)


# Alignment


def test_packs_are_loaded_only_from_aligned_addresses(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A misaligned load ends a kernel on a GPU; an x86 CPU often allows it, so a sanitizer watches the addresses."""
    try:
        find_cxx()
    except NoCompilerError as error:
        pytest.skip(str(error))

    class Watched(Library):
        def __init__(self, name: str) -> None:
            super().__init__(name, "alignment")

    for module in (activation, masked_attention_module, norm, rotary, sampling, softmax_module):
        monkeypatch.setattr(module, "Library", Watched)
    rows, at = unaligned(randn(4, 64)), torch.arange(4)
    mask, parameters = torch.ones(4, 4, dtype=torch.bool), Parameters(4).arguments(64)
    softmax_fused(rows)
    softmax_online(rows)
    silu_and_mul(rows)
    sample(rows, *parameters)
    for which in range(3):
        tensors = [randn(1, 1, 4, 64) for _ in range(3)]
        tensors[which] = unaligned(tensors[which])
        masked_attention(tensors[0], tensors[1], tensors[2], mask, 1.0)
        tensors = [randn(4, 64), randn(4, 64), randn(64)]
        tensors[which] = unaligned(tensors[which])
        add_rms_norm(tensors[0], tensors[1], tensors[2], EPS)
    for which in range(4):
        tensors = [*(randn(4, 2, 32) for _ in range(3)), torch.zeros(1, 4, 2, 2, 32)]
        tensors[which] = unaligned(tensors[which])
        rotate_and_store(tensors[0], tensors[1], tensors[2], at, randn(4, 32), tensors[3], at)
    rms_norm(randn(4, 131)[:, :128].unflatten(1, (2, 64)), randn(64), EPS)
    assert (report := capfd.readouterr().err) == "", f"a launcher must check the alignment of its pointers: {report}"
