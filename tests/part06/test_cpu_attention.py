"""worker/cpu_attention.py: decodes and prompt chunks in one batch equal dense causal attention."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest
import torch
from numba.core.dispatcher import Dispatcher
from torch import Tensor

from part06_chunked_prefill.worker import cpu_attention
from part06_chunked_prefill.worker.attention import reference_attention
from part06_chunked_prefill.worker.cpu_attention import MAX_KERNEL_TOKENS, chunk_attention, paged_attention

LOOK_KERNEL = 'Look at worker/cpu_attention.py::_paged_attention_kernel; README "One kernel for decodes and chunks".'
LOOK_CHUNK = 'Look at worker/cpu_attention.py::chunk_attention; README "The causal mask of a chunk".'
LOOK_PAGED = 'Look at worker/cpu_attention.py::paged_attention; README "One kernel for decodes and chunks".'
MOST = MAX_KERNEL_TOKENS  # new tokens of a sequence that the kernel takes; chunk_attention takes the longer ones
DECODES = [(1, 1), (1, 16), (1, 17), (1, 65), (1, 300)]  # (new tokens, context) of each sequence
SHORT = [(2, 2), (3, 17), (5, 64), (5, 66), (MOST, MOST), (MOST, 300), (4, 131)]
LONG = [(MOST + 1, MOST + 1), (MOST + 1, 100), (40, 40), (17, 33), (33, 300)]
MIXED = [(1, 33), (5, 70), (20, 20), (1, 1), (MOST, 17), (MOST + 1, 130), (3, 3), (1, 129)]
TOLERANCE = 1e-5
NUM_TABLE_ENTRIES_LEFT = 70  # more than a tile: an index past the end of a context still hits the table
group_sizes = pytest.mark.parametrize("group_size", [1, 2, 3, 8])
block_sizes = pytest.mark.parametrize("block_size", [1, 4, 16, 32])


@dataclass
class Batch:
    """One step over a pool with shuffled blocks, and what dense attention in float64 makes of it."""

    seqs: list[tuple[int, int]]
    query: Tensor
    kv_cache: Tensor
    block_tables: Tensor
    query_start_loc: Tensor
    context_lens: Tensor
    scale: float
    expected: Tensor

    def attend(self) -> Tensor:
        lens = (self.query_start_loc, self.context_lens)
        return paged_attention(
            self.query,
            self.kv_cache,
            self.block_tables,
            *lens,
            int(lens[0].diff().max()) if len(lens[0]) > 1 else 0,
            self.scale,
        )


def make_batch(
    seqs: list[tuple[int, int]], group_size: int = 2, num_kv_heads: int = 2, head_dim: int = 16, block_size: int = 16,
    dtype: torch.dtype = torch.float32, scale: float | None = None, seed: int = 0, unused: float = torch.nan,
) -> Batch:  # fmt: skip
    """seqs: (new tokens, context) of each. Slots that no token owns, and the null block's, hold `unused`.

    Table entries past a context's end name a block that holds nothing else.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-context // block_size) for _, context in seqs]
    foreign, *pool = (torch.randperm(sum(counts) + 3, generator=generator) + 1).tolist()
    kv_cache = torch.full((len(pool) + 2, block_size, 2, num_kv_heads, head_dim), unused, dtype=dtype)
    width = max(counts, default=0) + NUM_TABLE_ENTRIES_LEFT
    block_tables = torch.full((len(seqs), width), foreign, dtype=torch.int32)
    query_lens = torch.tensor([0, *(new for new, _ in seqs)])
    starts = query_lens.cumsum(0)
    query = torch.randn(int(starts[-1]), num_kv_heads * group_size, head_dim, generator=generator).to(dtype)
    scale = head_dim**-0.5 if scale is None else scale
    expected = torch.empty(query.shape, dtype=torch.float64)
    for seq, ((new, context), count) in enumerate(zip(seqs, counts, strict=True)):
        blocks = [pool.pop() for _ in range(count)]
        block_tables[seq, :count] = torch.tensor(blocks)
        keys_and_values = torch.randn(context, 2, num_kv_heads, head_dim, generator=generator).to(dtype)
        for position in range(context):
            kv_cache[blocks[position // block_size], position % block_size] = keys_and_values[position]
        key, value = keys_and_values.double().repeat_interleave(group_size, dim=2).unbind(1)
        for i in range(new):  # query i sees the first `visible` keys
            row, visible = int(starts[seq]) + i, context - new + i + 1
            weights = torch.einsum("hd,khd->hk", query[row].double() * scale, key[:visible]).softmax(dim=1)
            expected[row] = torch.einsum("hk,khd->hd", weights, value[:visible])
    context_lens = torch.tensor([context for _, context in seqs], dtype=torch.int32)
    return Batch(seqs, query, kv_cache, block_tables, starts.int(), context_lens, scale, expected)


def check(batch: Batch, got: Tensor, what: str, look: str = LOOK_KERNEL, tolerance: float = TOLERANCE) -> None:
    expected = batch.expected
    assert got.shape == expected.shape, f"{what}: expected shape {list(expected.shape)}, got {list(got.shape)}. {look}"
    for seq, (new, context) in enumerate(batch.seqs):
        start = int(batch.query_start_loc[seq])
        difference = (got[start : start + new].double() - expected[start : start + new]).abs().amax(dim=(1, 2))
        wrong = [i for i, number in enumerate(difference.tolist()) if not number < tolerance]  # NaN is not
        assert not wrong, (
            f"{what}, sequence {seq} with {new} new tokens and a context of {context}: expected dense attention within "
            f"{tolerance:g}, got a difference of {float(difference.max()):.2e}; wrong at its new tokens {wrong[:5]} "
            f"(token i sees {context - new} + i + 1 keys). NaN means: read from a slot that is not its own. {look}"
        )


# Each kind of sequence, then all together


def test_decodes() -> None:
    batch = make_batch(DECODES)
    check(batch, batch.attend(), "decodes only")


@pytest.mark.parametrize("seq", SHORT, ids=str)
def test_a_few_tokens_each_see_the_keys_up_to_their_own(seq: tuple[int, int]) -> None:
    batch = make_batch([seq])
    check(batch, batch.attend(), f"up to {MOST} tokens, in the kernel")


@pytest.mark.parametrize("seq", LONG, ids=str)
def test_a_long_chunk_sees_the_keys_up_to_its_own(seq: tuple[int, int]) -> None:
    batch = make_batch([seq])
    check(batch, batch.attend(), f"more than {MOST} tokens, in chunk_attention", LOOK_CHUNK)


@block_sizes
@group_sizes
def test_a_mixed_batch(group_size: int, block_size: int) -> None:
    for head_dim in (16, 80):
        batch = make_batch(MIXED, group_size, head_dim=head_dim, block_size=block_size)
        what = f"{2 * group_size} heads over 2 KV heads, head_dim {head_dim}, block_size {block_size}"
        check(batch, batch.attend(), what, LOOK_PAGED)


@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_head_sizes(head_dim: int) -> None:
    batch = make_batch(MIXED, head_dim=head_dim)
    check(batch, batch.attend(), f"head_dim {head_dim}", LOOK_PAGED)


def test_any_order_of_decodes_and_chunks() -> None:
    for seed in range(5):
        order = torch.randperm(len(MIXED), generator=torch.Generator().manual_seed(seed)).tolist()
        batch = make_batch([MIXED[i] for i in order], seed=seed)
        check(batch, batch.attend(), f"sequences in the order {order}", LOOK_PAGED)


def test_a_prompt_in_chunks_of_any_size_is_the_whole_prompt() -> None:
    whole = make_batch([(100, 100)])
    expected = whole.attend()
    for size in (1, 3, MOST, MOST + 1, 50):
        for start in range(0, 100, size):
            end = min(start + size, 100)
            lens = (torch.tensor([0, end - start], dtype=torch.int32), torch.tensor([end], dtype=torch.int32))
            got = paged_attention(
                whole.query[start:end], whole.kv_cache, whole.block_tables, *lens, end - start, whole.scale
            )
            difference = float((got - expected[start:end]).abs().max())
            assert difference < TOLERANCE, (
                f"100 tokens in chunks of {size}, tokens {start} to {end - 1}: expected the whole prompt's output "
                f"within {TOLERANCE:g}, got a difference of {difference:.2e}. {LOOK_PAGED}"
            )


def test_bfloat16() -> None:
    batch = make_batch(MIXED, head_dim=32, dtype=torch.bfloat16)
    got = batch.attend()
    assert got.dtype == torch.bfloat16, f"expected query's dtype, bfloat16, got {got.dtype}. {LOOK_PAGED}"
    check(batch, got, "bfloat16 (SDPA rounds more than the output)", LOOK_PAGED, tolerance=3e-2)


@pytest.mark.parametrize("scale", [0.05, 2.0])
def test_the_scale_is_passed_on(scale: float) -> None:
    batch = make_batch(MIXED, scale=scale)
    check(batch, batch.attend(), f"scale {scale}", LOOK_PAGED)


# What must not be read


@pytest.mark.parametrize("unused", [torch.nan, torch.inf, -torch.inf, 1e30])
@block_sizes
def test_slots_that_no_token_owns_are_never_read(block_size: int, unused: float) -> None:
    batch = make_batch(MIXED, block_size=block_size, unused=unused)
    before = batch.kv_cache.clone()
    what = f"{unused} in all slots but the sequences' own, block_size {block_size}"
    check(batch, batch.attend(), what, LOOK_PAGED)
    assert torch.equal(before.nan_to_num(0.5), batch.kv_cache.nan_to_num(0.5)), f"the KV cache changed. {LOOK_PAGED}"


@pytest.mark.parametrize("new", [2, MOST, MOST + 1, 30])
def test_later_tokens_do_not_change_earlier_ones(new: int) -> None:
    """The last token's key and value are huge: no token before it may see them."""
    batch = make_batch([(new, 70)], block_size=1)
    before = batch.attend()
    batch.kv_cache[batch.block_tables[0, 69]] = 1e6
    got = batch.attend()
    difference = float((got[:-1] - before[:-1]).abs().max())
    assert difference < TOLERANCE, (
        f"{new} new tokens: the last one's key and value changed the output of those before it by {difference:.2e}, "
        f"expected no change. {LOOK_KERNEL if new <= MOST else LOOK_CHUNK}"
    )
    assert not torch.equal(got[-1], before[-1]), f"the last token does not see its own key. {LOOK_KERNEL}"


# Arguments


def test_a_query_that_is_a_view() -> None:
    batch = make_batch(MIXED)
    expected = batch.attend()
    batch.query = torch.cat((batch.query, batch.query), dim=1)[:, :4]
    assert not batch.query.is_contiguous()
    assert torch.equal(batch.attend(), expected), f"a query that is not contiguous gave another answer. {LOOK_PAGED}"


def test_zero_sequences() -> None:
    got = make_batch([]).attend()
    assert got.shape == (0, 4, 16), f"expected shape [0, 4, 16], got {list(got.shape)}. {LOOK_PAGED}"


def test_a_sequence_without_new_tokens() -> None:
    """It takes no row of the output."""
    batch = make_batch([(1, 5), (0, 40), (3, 9), (0, 1), (20, 30)])
    check(batch, batch.attend(), "two sequences that have nothing to compute", LOOK_PAGED)


def test_the_kernel_leaves_long_chunks_to_chunk_attention() -> None:
    """Else they would be computed twice."""
    batch = make_batch([(1, 5), (MOST, 20), (MOST + 1, 20), (2, 2)])
    rows = torch.full(batch.query.shape, torch.nan)
    cpu_attention._paged_attention_kernel(
        batch.query.numpy(), cpu_attention.slots_as_numpy(batch.kv_cache), batch.block_tables.numpy(),
        batch.query_start_loc.numpy(), batch.context_lens.numpy(), 16, batch.scale, rows.numpy(),
    )  # fmt: skip
    for (new, _), got in zip(batch.seqs, rows.split([new for new, _ in batch.seqs]), strict=True):
        assert got.isnan().all() if new > MOST else got.isfinite().all(), (
            f"{new} new tokens: expected the kernel to compute them {'not at all' if new > MOST else 'all'}, since "
            f"MAX_KERNEL_TOKENS is {MOST}. {LOOK_KERNEL}"
        )


def test_what_the_kernel_does_not_take_is_refused() -> None:
    batch = make_batch([(3, 3)])
    batch.query_start_loc = batch.query_start_loc.long()
    with pytest.raises(AssertionError, match="must be int32"):
        batch.attend()


# Threads and compilation (what does not change from part 3 on is tested there)


def test_two_threads_at_once() -> None:
    batches = [make_batch([*DECODES, *SHORT] * 3, head_dim=64, seed=seed) for seed in range(2)]
    gate, failures = threading.Barrier(2, timeout=60), list[str]()

    def run(batch: Batch) -> None:
        gate.wait()
        try:
            for _ in range(10):
                check(batch, batch.attend(), "two threads in the kernel at once")
        except AssertionError as error:
            failures.append(str(error))

    threads = [threading.Thread(target=run, args=(batch,)) for batch in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not failures, failures[0]


def test_how_the_kernel_is_compiled() -> None:
    kernel = cpu_attention._paged_attention_kernel
    assert kernel.targetoptions.get("nogil") and not kernel.targetoptions.get("parallel"), LOOK_KERNEL
    for name, item in vars(cpu_attention).items():
        if isinstance(item, Dispatcher):
            flags = item.targetoptions.get("fastmath", set())
            assert isinstance(flags, set) and not flags & {"fast", "nnan", "ninf"}, f"{name}: fastmath={flags}"


def test_warm_up_is_enough_for_all_shapes() -> None:
    """Else a request in the middle of serving waits seconds for a compiler."""
    kernel = cpu_attention._paged_attention_kernel
    for dtype in (torch.float32, torch.bfloat16):
        cpu_attention.warm_up(dtype)
        before = len(kernel.signatures)
        for seqs, head_dim in (([(1, 1)], 8), (MIXED, 1), ([], 16), ([(2, 5)] * 3, 32)):
            make_batch(seqs, head_dim=head_dim, num_kv_heads=1, dtype=dtype, scale=1).attend()
        with torch.inference_mode():
            make_batch(MIXED, dtype=dtype).attend()
        assert len(kernel.signatures) == before, (
            f"{dtype}: expected {before} compiled kernels after warm_up, got {len(kernel.signatures)}. "
            "Look at worker/cpu_attention.py::warm_up."
        )


# The reference


@group_sizes
def test_the_reference_equals_dense_attention(group_size: int) -> None:
    for block_size in (1, 16):
        b = make_batch(MIXED, group_size, block_size=block_size)
        got = reference_attention(
            b.query,
            b.kv_cache,
            b.block_tables,
            b.query_start_loc,
            b.context_lens,
            int(b.query_start_loc.diff().max()),
            b.scale,
        )
        check(b, got, f"the reference, block_size {block_size}", "Look at reference_attention.")


def test_chunk_attention_over_any_context() -> None:
    generator = torch.Generator().manual_seed(0)
    for num_queries, num_context in ((1, 1), (1, 9), (4, 9), (9, 9)):
        query = torch.randn(num_queries, 4, 8, generator=generator)
        key, value = torch.randn(2, num_context, 2, 8, generator=generator)
        table = torch.zeros(1, 1, dtype=torch.int32)
        lens = (torch.tensor([0, num_queries]), torch.tensor([num_context]))
        expected = reference_attention(
            query, torch.stack((key, value), dim=1).unsqueeze(0), table, *lens, len(query), 0.3
        )
        difference = float((chunk_attention(query, key, value, 0.3) - expected).abs().max())
        assert difference < TOLERANCE, (
            f"{num_queries} queries over {num_context} keys: expected the reference within {TOLERANCE:g}, got a "
            f"difference of {difference:.2e}. {LOOK_CHUNK}"
        )
