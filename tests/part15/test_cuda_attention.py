"""worker/kernels/cuda/attention.py: five kernels for paged attention, and the choice among them, against the reference
in float64. They run on this CPU, in the emulation, and on a GPU if there is one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from part15_full_architecture.worker.kernels import reference
from part15_full_architecture.worker.kernels.build import NoCompilerError, find_cxx, find_nvcc
from part15_full_architecture.worker.kernels.cuda import attention
from part15_full_architecture.worker.kernels.cuda.library import KernelError, Library

WHERE = {
    "paged_decode": "See worker/kernels/cuda/paged_decode.cuh::attend_to_keys",
    "split_kv": "See worker/kernels/cuda/split_kv.cu::attend_to_part_kernel and merge_parts",
    "prefill_tiled": "See worker/kernels/cuda/prefill_tiled.cu::prefill_tiled_kernel",
    "prefill_wmma": "See worker/kernels/cuda/prefill_wmma.cu::attend",
    "prefill_mma": "See worker/kernels/cuda/prefill_mma.cu::prefill_mma_kernel",
}
DECODE, TENSOR_CORES = ("paged_decode", "split_kv"), ("prefill_wmma", "prefill_mma")
SMALLEST_DTYPE = {name: torch.float16 if name in TENSOR_CORES else torch.float32 for name in WHERE}
HEAD_DIMS = {
    "paged_decode": (8, 32, 64, 96, 128, 256), "split_kv": (32, 64, 96, 128, 256),
    "prefill_tiled": (32, 64, 96, 128, 256), "prefill_wmma": (32, 64, 96, 128), "prefill_mma": (32, 64, 128),
}  # fmt: skip
# Number of queries and length of the context of each sequence: all kinds, around the borders of blocks and tiles.
SEQS = [(1, 1), (1, 16), (5, 5), (1, 17), (0, 0), (1, 300), (0, 40), (70, 133), (1, 0), (2, 64), (2, 65), (3, 128)]
FEW_SEQS = [(1, 20), (6, 40), (1, 130)]
CASES: dict[str, dict[str, Any]] = {
    **{f"{n} heads a KV head": dict(group_size=n) for n in (1, 2, 3, 4, 7, 8)},
    "11 heads a KV head": dict(group_size=11, seqs=FEW_SEQS, num_kv_heads=1),
    "16 heads a KV head": dict(group_size=16, seqs=FEW_SEQS),
    **{f"blocks of {n}": dict(block_size=n) for n in (1, 2, 32, 128)},
    "one KV head": dict(num_kv_heads=1),
    "five KV heads": dict(num_kv_heads=5, group_size=1),
    "a scale of its own": dict(scale=0.3),
    "large scores": dict(largest_score=100.0),
    "blocks that sequences share": dict(num_shared_blocks=2),
    "several tiles of queries": dict(seqs=[(150, 150), (40, 300), (33, 64)], group_size=1),
    "two parts": dict(seqs=[(1, 701)] + [(1, 3)] * 39, num_kv_heads=4, group_size=1),  # 350 and 351 keys
    "many parts": dict(seqs=[(1, 700), (1, 129), (1, 256), (2, 9)], table_padding=60),
    "the last block of the pool": dict(seqs=[(1, 33), (9, 48)], is_sorted=True),
}
SENTINEL, GUARD = 7.0, 512  # in rows of the output that a kernel must not touch; numbers around the output
UNUSED = {torch.int8: 127, torch.uint8: 0x7F}  # 0x7f is FP8's NaN; float caches have NaN in unused slots, too
OUT_OF_RANGE = 10**8

LOOK_CHOICE = "See worker/kernels/cuda/attention.py::paged_attention"

by_kernel = pytest.mark.parametrize("kernel", WHERE)


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


@pytest.fixture(autouse=True)
def uninitialized_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.empty returns is NaN, as memory that others have used may be."""
    real_empty = torch.empty

    def empty(*args: Any, **options: Any) -> Tensor:
        memory = real_empty(*args, **options)
        return memory.fill_(math.nan) if memory.is_floating_point() and memory.numel() < 1e8 else memory

    monkeypatch.setattr(torch, "empty", empty)


@dataclass
class Batch:
    """What paged_attention takes, and how exact its result can be: relative to the largest number of the result."""

    query: Tensor
    kv_cache: Tensor
    block_tables: Tensor
    query_start_loc: Tensor
    context_lens: Tensor
    scale: float
    tolerance: float

    @property
    def query_lens(self) -> list[int]:
        return self.query_start_loc.diff().tolist()

    def arguments(self, device: str) -> tuple[Any, ...]:
        tensors = (self.query, self.kv_cache, self.block_tables, self.query_start_loc, self.context_lens)
        return (*(tensor.to(device) for tensor in tensors), max(self.query_lens), self.scale)


def make_batch(
    seqs: list[tuple[int, int]] = SEQS, group_size: int = 2, num_kv_heads: int = 2, head_dim: int = 32,
    block_size: int = 16, dtype: torch.dtype = torch.float32, kv_dtype: torch.dtype | None = None,
    scale: float | None = None, largest_score: float | None = None, num_shared_blocks: int = 0, table_padding: int = 2,
    is_sorted: bool = False,
) -> Batch:  # fmt: skip
    """Sequences in shuffled blocks of a pool. Slots that no token owns hold NaN, and so must not be read; nor must the
    padding of block tables, which is out of range."""
    torch.manual_seed(0)
    kv_dtype = kv_dtype or dtype
    counts = [-(-context_len // block_size) for _, context_len in seqs]
    num_blocks = sum(counts) + 2
    pool = torch.arange(num_blocks) if is_sorted else torch.randperm(num_blocks)
    tables = torch.full((len(seqs), max(counts) + table_padding), OUT_OF_RANGE, dtype=torch.int32)
    tables[1::2] = -OUT_OF_RANGE
    used = torch.zeros(num_blocks, block_size, dtype=torch.bool)
    unused_blocks = pool.tolist()
    shared = [unused_blocks.pop() for _ in range(num_shared_blocks)]
    for table, count, (_, context_len) in zip(tables, counts, seqs, strict=True):
        blocks = shared[:count] + [unused_blocks.pop() for _ in range(count - len(shared[:count]))]
        table[:count] = torch.tensor(blocks)
        for i, block in enumerate(blocks):
            used[block, : context_len - i * block_size] = True
    shape = (num_blocks, block_size, 2, num_kv_heads, head_dim)
    kv_cache = make_numbers(shape, kv_dtype)
    kv_cache[~used] = UNUSED.get(kv_dtype, math.nan)
    query_lens = [query_len for query_len, _ in seqs]
    query = torch.randn(sum(query_lens), num_kv_heads * group_size, head_dim) * (0.02 if kv_dtype == torch.int8 else 1)
    scale = head_dim**-0.5 if scale is None else scale
    keys = decode(kv_cache, torch.float32)[used][:, 0]
    found_score = scale * largest_norm(query) * largest_norm(keys)  # an upper limit
    if largest_score is not None:
        query *= largest_score / found_score * 2  # products of random vectors stay below half of the limit
    # float16, bfloat16: one step between the result's largest numbers. float32: the rounding of scores counts, too.
    tolerance = 1e-5 + torch.finfo(torch.float32).eps * (largest_score or found_score)
    if dtype != torch.float32:
        tolerance = torch.finfo(dtype).eps
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    context_lens = torch.tensor([context_len for _, context_len in seqs], dtype=torch.int32)
    return Batch(query.to(dtype), kv_cache, tables, starts, context_lens, scale, tolerance)


def largest_norm(vectors: Tensor) -> float:
    return float(vectors.norm(dim=-1).max()) if vectors.numel() else 0.0


def make_numbers(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random numbers or codes of a KV cache."""
    if dtype == torch.int8:
        return torch.randint(-127, 128, shape, dtype=torch.int8)
    if dtype == torch.uint8:
        return torch.randn(shape).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.randn(shape).to(dtype)


def decode(kv_cache: Tensor, dtype: torch.dtype) -> Tensor:
    return (kv_cache.view(torch.float8_e4m3fn) if kv_cache.dtype == torch.uint8 else kv_cache).to(dtype)


def expected_output(batch: Batch, seq: int) -> Tensor:
    """What the reference computes in float64 for one sequence."""
    start, end = batch.query_start_loc[seq : seq + 2].tolist()
    kv_cache = batch.kv_cache.double() if batch.kv_cache.is_floating_point() else batch.kv_cache
    starts = torch.tensor([0, end - start])
    one = slice(seq, seq + 1)
    return reference.paged_attention(
        batch.query[start:end].double(), kv_cache, batch.block_tables[one], starts, batch.context_lens[one],
        end - start, batch.scale,
    )  # fmt: skip


def run(kernel: str, batch: Batch, device: str) -> Tensor:
    """The output of one kernel, in memory that had SENTINEL everywhere; what surrounds it must still have it."""
    memory = torch.full((batch.query.numel() + 2 * GUARD,), SENTINEL, dtype=batch.query.dtype, device=device)
    output = memory[GUARD:-GUARD].view(batch.query.shape)
    getattr(attention, kernel)(*batch.arguments(device), output)
    guards = torch.cat((memory[:GUARD], memory[-GUARD:]))
    assert (guards == SENTINEL).all(), f"{kernel} wrote outside of the output. {WHERE[kernel]}"
    return output.cpu()


def check(kernel: str, batch: Batch, output: Tensor) -> None:
    """The rows that the kernel is responsible for are right, and the others are as they were."""
    num_checked = 0
    for seq, (query_len, context_len) in enumerate(zip(batch.query_lens, batch.context_lens.tolist(), strict=True)):
        rows = slice(*batch.query_start_loc[seq : seq + 2].tolist())
        is_own = query_len == 1 and context_len > 0 if kernel in DECODE else query_len > 1
        name = f"{kernel}, sequence {seq} ({query_len} queries, context {context_len})"
        if not is_own:
            assert (output[rows] == SENTINEL).all(), f"{name} is not for this kernel, but was written. {WHERE[kernel]}"
            continue
        compare(name, batch, output[rows], seq, WHERE[kernel])
        num_checked += 1
    assert num_checked, f"the batch has no sequence for {kernel}"


def compare(name: str, batch: Batch, got: Tensor, seq: int, where: str) -> None:
    expected = expected_output(batch, seq)
    largest = expected[expected.isfinite()].abs().max() if expected.isfinite().any() else 1.0
    is_same = (got == expected) | (got.isnan() & expected.isnan())
    difference = torch.where(is_same, 0.0, (got.double() - expected).abs().nan_to_num(math.inf)) / largest
    query, head, dim = (int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
    assert difference.max() <= batch.tolerance, (
        f"{name}, query {query}, head {head}, dimension {dim}: expected {expected[query, head, dim]:.6g}, "
        f"got {got[query, head, dim]:.6g}, off by {difference.max():.1e} of the largest number "
        f"({batch.tolerance:.1e} allowed). {where}"
    )


@by_kernel
@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_the_reference(kernel: str, case: str, device: str) -> None:
    is_decode = kernel in DECODE
    if not any(query_len == 1 if is_decode else query_len > 1 for query_len, _ in CASES[case].get("seqs", SEQS)):
        pytest.skip("the case has no sequence for this kernel")
    batch = make_batch(dtype=SMALLEST_DTYPE[kernel], **CASES[case])
    check(kernel, batch, run(kernel, batch, device))


@pytest.mark.parametrize(
    ("kernel", "head_dim"), [(kernel, head_dim) for kernel, sizes in HEAD_DIMS.items() for head_dim in sizes]
)
@pytest.mark.parametrize("kv_dtype", [None, torch.int8], ids=["numbers", "codes"])
def test_head_dims(kernel: str, head_dim: int, kv_dtype: torch.dtype | None, device: str) -> None:
    batch = make_batch(
        [(1, 33), (40, 70), (1, 140)], dtype=SMALLEST_DTYPE[kernel], head_dim=head_dim, kv_dtype=kv_dtype
    )
    check(kernel, batch, run(kernel, batch, device))


@by_kernel
@pytest.mark.parametrize("dtype", attention.FLOATS, ids=str)
@pytest.mark.parametrize("kv_dtype", [None, torch.int8, torch.uint8], ids=str)
def test_dtypes(kernel: str, dtype: torch.dtype, kv_dtype: torch.dtype | None, device: str) -> None:
    if dtype == torch.float32 and kernel in TENSOR_CORES:
        pytest.skip("tensor cores multiply 16-bit numbers")
    batch = make_batch(FEW_SEQS, dtype=dtype, kv_dtype=kv_dtype, head_dim=64)
    check(kernel, batch, run(kernel, batch, device))


@by_kernel
@pytest.mark.parametrize("order", ["reverse", "random:1"])
def test_other_orders_of_threads_give_the_same_result(
    kernel: str, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    batch = make_batch(dtype=SMALLEST_DTYPE[kernel])
    monkeypatch.delenv("CUDA_ON_CPU_ORDER", raising=False)
    expected = run(kernel, batch, "cpu")
    monkeypatch.setenv("CUDA_ON_CPU_ORDER", order)
    got = run(kernel, batch, "cpu")
    assert torch.equal(got, expected), (
        f"{kernel} with CUDA_ON_CPU_ORDER={order}: {int((got != expected).sum())} numbers differ. "
        f"Is a barrier missing? {WHERE[kernel]}"
    )


@by_kernel
def test_nan_reaches_the_queries_that_see_it_and_no_others(kernel: str, device: str) -> None:
    batch = make_batch([(1, 40), (9, 40), (1, 300), (3, 90)], dtype=SMALLEST_DTYPE[kernel])
    for seq, position in ((0, 39), (1, 34), (3, 10)):
        block = int(batch.block_tables[seq, position // 16])
        batch.kv_cache[block, position % 16, 0] = math.nan
    check(kernel, batch, run(kernel, batch, device))


@pytest.mark.parametrize("kernel", DECODE)
def test_infinite_value_stays_in_its_dimension(kernel: str, device: str) -> None:
    """96 dimensions are 12 vectors. The other 4 lanes of a team of 16 must not count, whatever they read."""
    batch = make_batch([(1, 40), (1, 200)], head_dim=96, num_kv_heads=1)
    for seq, position in ((0, 39), (1, 150)):
        block = int(batch.block_tables[seq, position // 16])
        batch.kv_cache[block, position % 16, 1, 0, :5] = math.inf
    check(kernel, batch, run(kernel, batch, device))


@by_kernel
@pytest.mark.parametrize("kv_dtype", [torch.int8, torch.float16], ids=str)
def test_pool_of_more_than_two_billion_numbers(kernel: str, kv_dtype: torch.dtype, device: str) -> None:
    """Offsets in 32 bits would be negative. Memory that is never touched costs nothing on a CPU."""
    batch = make_batch(FEW_SEQS, dtype=torch.float16, kv_dtype=kv_dtype)
    num_blocks, *shape = batch.kv_cache.shape
    num_far = 2**31 // math.prod(shape) + 1
    far = torch.empty(num_far + num_blocks, *shape, dtype=kv_dtype, device=device)
    far[num_far:] = batch.kv_cache.to(device)
    output = torch.full_like(batch.query, SENTINEL, device=device)
    query, _, tables, *others = batch.arguments(device)
    getattr(attention, kernel)(query, far, tables + num_far, *others, output)
    check(kernel, batch, output.cpu())


@by_kernel
def test_rows_of_block_tables_may_be_part_of_a_wider_tensor(kernel: str, device: str) -> None:
    batch = make_batch(dtype=SMALLEST_DTYPE[kernel])
    expected = run(kernel, batch, device)
    wider = torch.full((len(batch.block_tables), batch.block_tables.shape[1] + 5), OUT_OF_RANGE, dtype=torch.int32)
    wider[:, : batch.block_tables.shape[1]] = batch.block_tables
    batch.block_tables = wider
    query, kv_cache, tables, *others = batch.arguments(device)
    output = torch.full_like(batch.query, SENTINEL, device=device)
    getattr(attention, kernel)(query, kv_cache, tables[:, :-5], *others, output)
    assert torch.equal(output.cpu(), expected), f"{kernel} ignores the stride of block_tables. {WHERE[kernel]}"


@by_kernel
def test_without_work_nothing_is_written(kernel: str, device: str) -> None:
    seqs = [(5, 5), (0, 9)] if kernel in DECODE else [(1, 5), (0, 9), (1, 33)]
    for some_seqs in (seqs, [(0, 0)]):
        batch = make_batch(some_seqs, dtype=SMALLEST_DTYPE[kernel])
        output = torch.full_like(batch.query, SENTINEL, device=device)
        getattr(attention, kernel)(*batch.arguments(device)[:5], 5, batch.scale, output)
        assert (output == SENTINEL).all(), f"{kernel} has written rows of {some_seqs}. {WHERE[kernel]}"


def test_batch_without_sequences(device: str) -> None:
    batch = make_batch([(0, 0)])
    batch.block_tables, batch.context_lens = batch.block_tables[:0], batch.context_lens[:0]
    query, kv_cache, tables, starts, lens, *_ = batch.arguments(device)
    got = attention.paged_attention(query, kv_cache, tables, starts[:1], lens, 1, batch.scale)
    assert got.shape == query.shape, f"expected {query.shape}, got {got.shape}. {LOOK_CHOICE}"


# ------------------------------------------------------------------------------------------------------ merge_states


LOOK_MERGE = "See worker/kernels/cuda/split_kv.cu::merge_parts"


def merge(outputs: list[float], log_sums: list[float], device: str) -> tuple[float, float]:
    got = attention.merge_states(torch.tensor(outputs, device=device).view(-1, 1, 1),
                                 torch.tensor(log_sums, device=device).view(-1, 1))  # fmt: skip
    return float(got[0]), float(got[1])


def test_merge_weighs_parts_by_their_sums(device: str) -> None:
    output, total = merge([1.0, 3.0], [0.0, math.log(3)], device)
    assert (output, total) == (pytest.approx(2.5), pytest.approx(math.log(4))), (
        f"1 with a sum of 1, and 3 with a sum of 3: expected 2.5 and ln 4 = 1.3863, got {output}, {total}. {LOOK_MERGE}"
    )


@pytest.mark.parametrize("output_of_empty_part", [0.0, 55.0, math.nan, math.inf])
@pytest.mark.parametrize("is_first", [True, False])
def test_empty_part_does_not_count(output_of_empty_part: float, is_first: bool, device: str) -> None:
    outputs, log_sums = [output_of_empty_part, 3.0], [-math.inf, 1.5]
    if not is_first:
        outputs, log_sums = outputs[::-1], log_sums[::-1]
    got = merge(outputs, log_sums, device)
    assert got == (pytest.approx(3.0), pytest.approx(1.5)), f"expected (3.0, 1.5), got {got}. {LOOK_MERGE}"


def test_merge_of_empty_parts_is_zero_and_not_nan(device: str) -> None:
    got = merge([math.nan, 5.0, math.inf], [-math.inf] * 3, device)
    assert got == (0.0, -math.inf), f"expected (0.0, -inf), got {got}. {LOOK_MERGE}"


@pytest.mark.parametrize("log_sums", [[math.nan, 1.0], [1.0, math.nan], [math.nan, -math.inf], [math.nan] * 2], ids=str)
def test_nan_in_a_part_is_not_hidden(log_sums: list[float], device: str) -> None:
    """Else a sequence with a NaN would get a plausible output. Other sequences keep theirs."""
    outputs = torch.tensor([[[2.0], [3.0]], [[5.0], [7.0]]])
    sums = torch.tensor([[log_sums[0], 0.0], [log_sums[1], -math.inf]])
    found = attention.merge_states(outputs.to(device), sums.to(device))
    for name, (output, total) in {"the kernel": found, "the reference": reference.merge_states(outputs, sums)}.items():
        got = [*output.flatten().tolist(), *total.tolist()]
        assert math.isnan(got[0]) and math.isnan(got[2]), f"{name}: expected NaN, got {got[0]}, {got[2]}. {LOOK_MERGE}"
        assert got[1::2] == [3.0, 0.0], f"{name}: the other row must be [3.0, 0.0], got {got[1::2]}. {LOOK_MERGE}"


@pytest.mark.parametrize("shape", [(1, 3, 8), (2, 5, 2, 32), (7, 1, 33), (40, 3, 64), (100, 2, 256)], ids=str)
@pytest.mark.parametrize("offset", [0.0, 500.0, -500.0])
def test_merge_equals_the_reference(shape: tuple[int, ...], offset: float, device: str) -> None:
    torch.manual_seed(0)
    outputs, log_sums = torch.randn(shape), torch.randn(shape[:-1]) * 3 + offset
    log_sums[torch.rand(shape[:-1]) < 0.3] = -math.inf
    expected = reference.merge_states(outputs.double(), log_sums.double())
    got = attention.merge_states(outputs.to(device), log_sums.to(device))
    for name, one, other in zip(("output", "log-sum-exp"), got, expected, strict=True):
        atol = 2e-6 * max(1.0, abs(offset) / 10)  # a log-sum-exp of 500 has steps of 3e-5
        is_close = torch.isclose(one.cpu().double(), other, rtol=1e-5, atol=atol)
        assert is_close.all(), f"{name} of {shape}: {int((~is_close).sum())} numbers are wrong. {LOOK_MERGE}"


# ------------------------------------------------------------------------------------------------------- the choice


def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are launched from now on."""
    names: list[str] = []
    call = Library.call

    def noted(library: Library, symbol: str, *args: Any) -> None:
        names.append(symbol)
        call(library, symbol, *args)

    monkeypatch.setattr(Library, "call", noted)
    return names


MIXED = {
    "a long decode": ([(1, 700)], torch.float16, 64, ["split_kv"]),
    "short decodes": ([(1, 100), (1, 128), (0, 0)], torch.float16, 64, ["paged_decode"]),
    "as many decodes as the GPU needs": ([(1, 129)] * 150, torch.float32, 32, ["paged_decode"]),
    "a mixed batch": (SEQS, torch.bfloat16, 64, ["split_kv", "prefill_mma"]),
    "a mixed batch, float32": (SEQS, torch.float32, 64, ["split_kv", "prefill_tiled"]),
    "a mixed batch of 96 dimensions": (FEW_SEQS, torch.float16, 96, ["split_kv", "prefill_wmma"]),
    "a mixed batch of 256 dimensions": (FEW_SEQS, torch.float16, 256, ["split_kv", "prefill_tiled"]),
}


@pytest.mark.parametrize("case", MIXED)
def test_paged_attention_fills_all_rows(case: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seqs, dtype, head_dim, kernels = MIXED[case]
    batch = make_batch(seqs, dtype=dtype, head_dim=head_dim, table_padding=0)
    names = launched(monkeypatch)
    output = attention.paged_attention(*batch.arguments(device)).cpu()
    if device == "cpu":  # where the number of multiprocessors is known
        assert names == kernels, f"{case}: expected {kernels}, launched {names}. {LOOK_CHOICE}"
    for seq, (query_len, context_len) in enumerate(seqs):
        rows = slice(*batch.query_start_loc[seq : seq + 2].tolist())
        if query_len and context_len:
            compare(f"{case}, sequence {seq}", batch, output[rows], seq, LOOK_CHOICE)


@pytest.mark.parametrize(
    ("num_blocks", "max_context_len", "expected", "why"),
    [
        (8, 8192, 49, "396 resident blocks, of which 8 · 49 are used"),
        (8, 1000, 8, "no more parts than 128 keys each allow"),
        (8, 128, 1, "a part is not cut"),
        (396, 8192, 1, "there are enough blocks"),
        (199, 8192, 1, "two parts each would be more blocks than are resident"),
        (198, 8192, 2, "two parts each"),
        (0, 0, 1, "an empty batch"),
    ],
)
def test_number_of_parts(num_blocks: int, max_context_len: int, expected: int, why: str) -> None:
    got = attention.choose_num_parts(num_blocks, max_context_len, 132)
    assert got == expected, (
        f"{num_blocks} blocks, context {max_context_len}: expected {expected} ({why}), got {got}. "
        f"See worker/kernels/cuda/attention.py::choose_num_parts"
    )


@pytest.mark.parametrize(
    ("dtype", "head_dim", "capability", "expected"),
    [
        (torch.float16, 128, (9, 0), "mma"),
        (torch.bfloat16, 64, (8, 0), "mma"),
        (torch.bfloat16, 32, (12, 0), "mma"),
        (torch.float16, 96, (8, 6), "wmma"),
        (torch.float16, 64, (7, 5), "wmma"),
        (torch.float16, 128, (7, 5), "tiled"),
        (torch.bfloat16, 64, (7, 5), "tiled"),
        (torch.float16, 64, (6, 1), "tiled"),
        (torch.float16, 256, (9, 0), "tiled"),
        (torch.float32, 64, (9, 0), "tiled"),
    ],
)
def test_choice_of_the_prefill_kernel(
    dtype: torch.dtype, head_dim: int, capability: tuple[int, int], expected: str
) -> None:  # fmt: skip
    got = attention.choose_prefill(dtype, head_dim, capability)
    assert got == expected, (
        f"{dtype}, head_dim {head_dim}, capability {capability}: expected {expected}, got {got}. "
        f"See worker/kernels/cuda/attention.py::choose_prefill"
    )


@by_kernel
def test_sizes_without_a_kernel_are_refused(kernel: str, device: str) -> None:
    batch = make_batch(FEW_SEQS, dtype=SMALLEST_DTYPE[kernel], head_dim=12)
    with pytest.raises(KernelError, match="has no kernel for these dtypes and sizes"):
        run(kernel, batch, device)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a block size of 12": (dict(kv_cache=torch.zeros(4, 12, 2, 2, 32)), "power of two, got 12"),
    "another head_dim": (dict(kv_cache=torch.zeros(4, 16, 2, 2, 64)), r"expected \(4, 16, 2, 2, 32\)"),
    "another dtype": (dict(kv_cache=torch.zeros(4, 16, 2, 2, 32, dtype=torch.float16)), "kv_cache is torch.float16"),
    "heads in uneven groups": (dict(kv_cache=torch.zeros(4, 16, 2, 3, 32)), "4 query heads do not share 3"),
    "int64 tables": (dict(block_tables=torch.zeros(3, 12, dtype=torch.int64)), "must be int32"),
    "a table too few": (dict(block_tables=torch.zeros(2, 12, dtype=torch.int32)), "3 lengths, but tables"),
    "keys apart from values": (
        dict(kv_cache=torch.zeros(4, 2, 16, 2, 32).transpose(1, 2)), "must be contiguous, got"
    ),
    "a negative scale": (dict(scale=-1.0), "scale must be positive, got -1.0"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_kernels_take_for_granted_is_checked(case: str) -> None:
    changes, message = WRONG[case]
    batch = make_batch(FEW_SEQS)
    for name, value in changes.items():
        setattr(batch, name, value)
    with pytest.raises(AssertionError, match=message):
        attention.paged_attention(*batch.arguments("cpu"))
