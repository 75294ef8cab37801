"""Every CUDA kernel under ThreadSanitizer, which names missing barriers, and under AddressSanitizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from part15_full_architecture.worker.kernels import reference
from part15_full_architecture.worker.kernels.build import NoCompilerError, Target, build, find_cxx
from part15_full_architecture.worker.kernels.cuda import (
    activation,
    attention,
    grouped_linear,
    masked_attention,
    norm,
    quantized_linear,
    rotary,
    sampling,
    softmax,
)
from part15_full_architecture.worker.kernels.cuda.library import Library, only
from tests.part15.sanitized_calls import SanitizedProcess

HALF = torch.float16
BLOCK_SIZE, NUM_BLOCKS = 4, 12


def numbers(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def batch(query_lens: list[int], context_lens: list[int], head_dim: int = 32) -> tuple[Any, ...]:
    """paged_attention's arguments: 4 query heads, 2 KV heads."""
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    blocks = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(1)).to(torch.int32)
    tables = blocks[: len(query_lens) * 4].view(len(query_lens), 4).contiguous()
    return (
        numbers(sum(query_lens), 4, head_dim), numbers(NUM_BLOCKS, BLOCK_SIZE, 2, 2, head_dim), tables, starts,
        torch.tensor(context_lens, dtype=torch.int32), max(query_lens), 0.3,
    )  # fmt: skip


DECODES, CHUNKS = batch([1, 1, 1], [3, 16, 9]), batch([5, 7], [9, 16])
SAMPLED = (
    numbers(3, 300, dtype=torch.float32), torch.tensor([0.7, 1.0, 1.0]),
    torch.tensor([20, 300, 300], dtype=torch.int32), torch.tensor([0.9, 0.5, 1.0]),
    torch.tensor([0.0, 0.01, 0.0]), torch.tensor([1, 2, 3]), torch.tensor([3, 4, 5]),
)  # fmt: skip
CODES = torch.randint(-128, 128, (40, 32), generator=torch.Generator().manual_seed(2)).to(torch.int8)
SCALE, ZERO = numbers(40, 2, dtype=torch.float32).abs(), torch.ones(40, 2, dtype=torch.int8)


def attend(kernel: Callable[..., object], arguments: tuple[Any, ...]) -> Tensor:
    output = torch.zeros_like(arguments[0])
    kernel(*arguments, output)
    return output


def add_rms_norm(function: Callable[..., Tensor]) -> Tensor:
    residual = numbers(3, 64)
    normalized = function(numbers(3, 64) * 2, residual, numbers(64), 1e-5)
    return torch.cat((normalized, residual))


def rotate_and_store(function: Callable[..., Tensor]) -> Tensor:
    """Into a cache of int8 codes; the second token has no slot."""
    query, key, value = numbers(3, 8, 16).split((4, 2, 2), dim=1)
    kv_cache, slots = torch.zeros(2, 4, 2, 2, 16, dtype=torch.int8), torch.tensor([5, -1, 2])
    table, scales = numbers(9, 16), torch.full((2, 2), 0.05)
    rotated = function(query, key, value, torch.tensor([3, 8, 0]), table, kv_cache, slots, scales)
    return torch.cat((rotated.flatten().float(), kv_cache.flatten().float()))


TOLERANCE = 0.02  # float16, and sums in another order
CASES: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "softmax_naive": lambda: (softmax.softmax_naive(numbers(3, 70)), reference.softmax(numbers(3, 70))),
    "softmax_warp": lambda: (softmax.softmax_warp(numbers(3, 70)), reference.softmax(numbers(3, 70))),
    "softmax_fused": lambda: (softmax.softmax_fused(numbers(3, 700)), reference.softmax(numbers(3, 700))),
    "softmax_online": lambda: (softmax.softmax_online(numbers(3, 700)), reference.softmax(numbers(3, 700))),
    "add_rms_norm": lambda: (add_rms_norm(norm.add_rms_norm), add_rms_norm(reference.add_rms_norm)),
    "rotate_and_store": lambda: (
        rotate_and_store(rotary.rotate_and_store), rotate_and_store(reference.rotate_and_store)
    ),
    "silu_and_mul": lambda: (activation.silu_and_mul(numbers(3, 64)), reference.silu_and_mul(numbers(3, 64))),
    "sample": lambda: (sampling.sample(*SAMPLED), reference.sample(*SAMPLED)),
    "masked_attention": lambda: (
        masked_attention.masked_attention(*[numbers(1, 2, 20, 32)] * 3, torch.ones(20, 20).tril().bool(), 0.2),
        reference.masked_attention(*[numbers(1, 2, 20, 32)] * 3, torch.ones(20, 20).tril().bool(), 0.2),
    ),
    "paged_decode": lambda: (attend(attention.paged_decode, DECODES), reference.paged_attention(*DECODES)),
    "split_kv": lambda: (attend(attention.split_kv, DECODES), reference.paged_attention(*DECODES)),
    "prefill_tiled": lambda: (attend(attention.prefill_tiled, CHUNKS), reference.paged_attention(*CHUNKS)),
    "prefill_wmma": lambda: (attend(attention.prefill_wmma, CHUNKS), reference.paged_attention(*CHUNKS)),
    "prefill_mma": lambda: (attend(attention.prefill_mma, CHUNKS), reference.paged_attention(*CHUNKS)),
    "quantized_gemv": lambda: (
        quantized_linear.gemv(numbers(3, 32), CODES, SCALE, ZERO, 16, 1),
        reference.quantized_linear(numbers(3, 32), CODES, SCALE, ZERO, 16, 1),
    ),
    "quantized_gemm": lambda: (
        quantized_linear.gemm(numbers(20, 64), CODES, SCALE, ZERO, 32, 2),
        reference.quantized_linear(numbers(20, 64), CODES, SCALE, ZERO, 32, 2),
    ),
    "grouped_linear": lambda: (
        grouped_linear.grouped_linear(numbers(9, 40), numbers(3, 24, 40), torch.tensor([4, 0, 5])),
        reference.grouped_linear(numbers(9, 40), numbers(3, 24, 40), torch.tensor([4, 0, 5])),
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=["thread", "address"])
def sanitizer(request: pytest.FixtureRequest) -> Iterator[SanitizedProcess]:
    try:
        process = SanitizedProcess(request.param, find_cxx())
    except NoCompilerError as error:
        pytest.skip(str(error))
    yield process
    process.close()


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_is_clean(name: str, sanitizer: SanitizedProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[str]()

    def call(library: Library, symbol: str, *args: Any) -> None:
        built = build(library.source, Target("cpu", sanitizer.sanitizer, only(args)))
        status = sanitizer.call(built, symbol, *args)
        calls.append(symbol)
        assert status == 0, f"{symbol} ended with status {status}. See worker/kernels/cuda/{library.source.name}"

    monkeypatch.setattr(Library, "call", call)
    found, expected = CASES[name]()
    assert calls, f"{name} did not call a kernel"
    difference = float((found.float() - expected.float()).abs().max())
    largest = float(expected.float().abs().max())
    assert difference <= TOLERANCE * max(1.0, largest), (
        f"{name}: the largest difference to the reference is {difference:g}, of {largest:g}"
    )


def test_every_kernel_has_a_case() -> None:
    """A file without a case would never be watched."""
    files = {path.stem for path in Library("norm").source.parent.glob("*.cu")}
    covered = {"norm", "rotary", "activation", "sampling", *CASES}
    assert files <= covered, f"no case for {sorted(files - covered)}"


def test_a_block_table_outside_the_cache_is_named(sanitizer: SanitizedProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    if sanitizer.sanitizer != "address":
        pytest.skip("AddressSanitizer finds it")
    own = SanitizedProcess("address", find_cxx())  # it ends at the first report

    def call(library: Library, symbol: str, *args: Any) -> None:
        own.call(build(library.source, Target("cpu", "address", only(args))), symbol, *args)

    monkeypatch.setattr(Library, "call", call)
    query, kv_cache, tables, *rest = DECODES
    wrong = tables.clone()
    wrong[1, 2] = NUM_BLOCKS
    with pytest.raises(AssertionError, match=r"heap-buffer-overflow[\s\S]*paged_decode.cuh:\d+"):
        attend(attention.paged_decode, (query, kv_cache, wrong, *rest))
