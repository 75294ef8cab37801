"""Paged decode in Triton with each context split over several programs (Flash-Decoding), and the merge of the parts."""

from __future__ import annotations

import torch
from torch import Tensor

from ...triton_attention import _jit, dot_size, to_numbers, triton

if triton is not None:
    import triton.language as tl

PROGRAMS_PER_MULTIPROCESSOR = 4  # enough that while some wait for memory, others compute
DEFAULT_MULTIPROCESSORS = 132  # an H100's, where there is no GPU to ask
MIN_PART_SIZE = 128  # tokens; for fewer, the merge costs more than the split saves
MAX_PARTS = 128
TILE_KEYS = {2: 32, 4: 16}  # by bytes of a query's number: keys that a program reads at once before registers spill
NUM_WARPS = {2: 4, 4: 8}
MERGE_TILE_PARTS = 16  # parts that a program of the merge reads at once


def split_kv(
    query: Tensor, kv_cache: Tensor, block_tables: Tensor, query_start_loc: Tensor, context_lens: Tensor,
    max_query_len: int, scale: float,
) -> Tensor:  # fmt: skip
    """Attention of sequences with one new token each, over contexts that several programs share (Dao et al., 2023).

    A decode of one sequence has one program per KV head, so most of a GPU has no work. Here each context is split into
    parts: a program attends to one part, and a second kernel merges the parts by their log-sum-exps. attention.py calls
    this if there is more than one part.

    The arguments are triton_attention.py::paged_attention's, with max_query_len == 1: a sequence has one query or none.
    Returns query's shape and dtype; zeros for a query whose context has no tokens, as padding may have. Nothing is read
    back from the device. Raises RuntimeError if Triton is not installed.
    """
    if triton is None:
        raise RuntimeError("split_kv needs the package triton, which is not installed (Linux: pip install triton)")
    assert max_query_len == 1, f"split_kv is for decodes with one query per sequence, got up to {max_query_len}"
    num_tokens, num_heads, head_dim = query.shape
    block_size, _, num_kv_heads = kv_cache.shape[1:4]
    group_size = num_heads // num_kv_heads
    assert num_heads % num_kv_heads == 0, f"{num_heads} query heads do not share {num_kv_heads} KV heads evenly"
    row_strides = (kv_cache.stride(4), block_tables.stride(1), query_start_loc.stride(0), context_lens.stride(0))
    assert row_strides == (1, 1, 1, 1), f"rows must be contiguous, got strides of {row_strides}"
    num_seqs, max_context = len(context_lens), block_tables.shape[1] * block_size
    num_parts = choose_num_parts(num_seqs * num_kv_heads, max_context, count_multiprocessors(query.device))
    query, output = query.contiguous(), torch.empty_like(query, memory_format=torch.contiguous_format)
    outputs = query.new_empty(num_parts, num_tokens, num_heads, head_dim, dtype=torch.float32)
    log_sums = query.new_empty(num_parts, num_tokens, num_heads, dtype=torch.float32)
    with torch.cuda.device_of(query):  # Triton launches on the current device
        _split_kv_kernel[(num_seqs, num_kv_heads, num_parts)](
            query, kv_cache, block_tables, query_start_loc, context_lens, outputs, log_sums, scale, num_tokens,
            *kv_cache.stride()[:4], block_tables.stride(0), GROUP_SIZE=group_size, HEAD_DIM=head_dim,
            BLOCK_SIZE=block_size, TILE_KEYS=TILE_KEYS[query.element_size()], TILE_ROWS=dot_size(group_size),
            PADDED_HEAD_DIM=dot_size(head_dim), num_warps=NUM_WARPS[query.element_size()],
        )  # fmt: skip
    launch_merge(outputs, log_sums, output, None)
    return output


def choose_num_parts(num_programs: int, max_context: int, num_multiprocessors: int) -> int:
    """Parts of each context: enough that the GPU is busy, but no parts of fewer than MIN_PART_SIZE tokens.

    num_programs: how many there are without a split. max_context: the longest possible, since the real ones are known
    only on the device; a part of a shorter context has fewer tokens.
    """
    wanted = PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors // max(1, num_programs)
    return max(1, min(wanted, max_context // MIN_PART_SIZE, MAX_PARTS))


def count_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return DEFAULT_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def merge_states(outputs: Tensor, log_sums: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over parts of a context, put together: each part weighs exp(its log-sum-exp).

    outputs: [num_parts, …, head_dim], float32: attention over each part alone; log_sums: [num_parts, …], float32: -inf
    for an empty part, whose output is not read. Both are contiguous. Returns the attention over all parts, and its
    log-sum-exp: zeros and -inf if all parts are empty. (FlashAttention 2, FlashInfer) Raises RuntimeError if Triton is
    not installed.
    """
    if triton is None:
        raise RuntimeError("merge_states needs the package triton, which is not installed (Linux: pip install triton)")
    assert outputs.shape[:-1] == log_sums.shape, (
        f"outputs {list(outputs.shape)} need log_sums {list(outputs.shape[:-1])}, got {list(log_sums.shape)}"
    )
    assert outputs.dtype == log_sums.dtype == torch.float32, f"expected float32, got {outputs.dtype}, {log_sums.dtype}"
    assert outputs.is_contiguous() and log_sums.is_contiguous(), "outputs and log_sums must be contiguous"
    output, total = torch.empty_like(outputs[0]), torch.empty_like(log_sums[0])
    launch_merge(outputs, log_sums, output, total)
    return output, total


def launch_merge(outputs: Tensor, log_sums: Tensor, output: Tensor, total: Tensor | None) -> None:
    num_parts, head_dim = len(outputs), outputs.shape[-1]
    num_rows = log_sums[0].numel()
    with torch.cuda.device_of(outputs):
        _merge_states_kernel[(num_rows,)](
            outputs, log_sums, output, total, num_parts, num_rows, HEAD_DIM=head_dim,
            PADDED_PARTS=triton.next_power_of_2(num_parts), TILE_PARTS=MERGE_TILE_PARTS,
            PADDED_HEAD_DIM=triton.next_power_of_2(head_dim),
        )  # fmt: skip


@_jit
def _split_kv_kernel(
    query_ptr, kv_cache_ptr, block_tables_ptr, query_start_loc_ptr, context_lens_ptr, outputs_ptr, log_sums_ptr, scale,
    num_tokens, block_stride, token_stride, value_stride, kv_head_stride, table_stride,
    GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE_KEYS: tl.constexpr,
    TILE_ROWS: tl.constexpr, PADDED_HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """One program per sequence, KV head and part of the context: the query heads of the group share the keys.

    See triton_attention.py::_paged_attention_kernel for the loop. Letters give the shapes: r(ow, a head of the group),
    k(ey), d(imension).
    """
    seq, kv_head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    token = tl.load(query_start_loc_ptr + seq)
    if tl.load(query_start_loc_ptr + seq + 1) == token:  # no query
        return
    context_len = tl.load(context_lens_ptr + seq)
    part_size = tl.cdiv(tl.cdiv(context_len, tl.num_programs(2)), TILE_KEYS) * TILE_KEYS  # whole tiles for all parts
    part_start = tl.program_id(2) * part_size
    part_end = tl.minimum(part_start + part_size, context_len)  # not after the start for parts that are empty

    r, k, d = tl.arange(0, TILE_ROWS), tl.arange(0, TILE_KEYS), tl.arange(0, PADDED_HEAD_DIM)
    is_row, is_dim = r < GROUP_SIZE, d[None, :] < HEAD_DIM
    num_heads = tl.num_programs(1) * GROUP_SIZE
    rows = (token * num_heads + kv_head * GROUP_SIZE + r).to(tl.int64)
    offsets, is_query = rows[:, None] * HEAD_DIM + d[None, :], is_row[:, None] & is_dim
    query = tl.load(query_ptr + offsets, mask=is_query, other=0.0)  # [r, d]

    maximum = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([TILE_ROWS], tl.float32)
    accumulator = tl.zeros([TILE_ROWS, PADDED_HEAD_DIM], tl.float32)
    for start in range(part_start, part_end, TILE_KEYS):
        positions = start + k
        in_part = positions < part_end  # where false, neither the table nor the cache is read
        block_id_ptr = block_tables_ptr + seq * table_stride + positions // BLOCK_SIZE
        # in int32, block · stride overflows from 2³¹ elements on
        block_ids = tl.load(block_id_ptr, mask=in_part, other=0).to(tl.int64)
        cache_offsets = block_ids * block_stride + positions % BLOCK_SIZE * token_stride + kv_head * kv_head_stride
        key_ptr = kv_cache_ptr + cache_offsets[:, None] + d[None, :]
        key = tl.load(key_ptr, mask=in_part[:, None] & is_dim, other=0)  # [k, d]
        value = tl.load(key_ptr + value_stride, mask=in_part[:, None] & is_dim, other=0)
        key, value = to_numbers(key, query.dtype), to_numbers(value, query.dtype)

        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale  # [r, k], float32
        scores = tl.where(in_part[None, :], scores, float("-inf"))  # the first key is there, so the maximum is finite
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        rescale = tl.exp(maximum - new_maximum)
        weights = tl.exp(scores - new_maximum[:, None])
        total = total * rescale + tl.sum(weights, axis=1)
        weighted = tl.dot(weights.to(value.dtype), value, input_precision="ieee")  # [r, d], float32
        accumulator = accumulator * rescale[:, None] + weighted
        maximum = new_maximum

    # an empty part has -inf + log(0) = -inf, which is all that the merge reads of it
    part_rows = part * num_tokens * num_heads + rows
    tl.store(log_sums_ptr + part_rows, maximum + tl.log(total), mask=is_row)
    if part_start < part_end:
        part_offsets = part_rows[:, None] * HEAD_DIM + d[None, :]
        tl.store(outputs_ptr + part_offsets, accumulator / total[:, None], mask=is_query)


@_jit
def _merge_states_kernel(
    outputs_ptr, log_sums_ptr, output_ptr, total_ptr, num_parts, num_rows, HEAD_DIM: tl.constexpr,
    PADDED_PARTS: tl.constexpr, TILE_PARTS: tl.constexpr, PADDED_HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """One program per row, which is a query head. total_ptr: where the log-sum-exps go, or None. Letters give the
    shapes: p(art), d(imension)."""
    row = tl.program_id(0).to(tl.int64)
    all_parts, d = tl.arange(0, PADDED_PARTS), tl.arange(0, PADDED_HEAD_DIM)
    all_log_sums = load_log_sums(log_sums_ptr, all_parts, num_parts, num_rows, row)
    maximum = tl.max(all_log_sums, axis=0)
    maximum = tl.where(maximum == float("-inf"), 0.0, maximum)  # all parts are empty: avoid -inf - -inf, which is NaN
    total = maximum + tl.log(tl.sum(tl.exp(all_log_sums - maximum), axis=0))
    if total_ptr is not None:
        tl.store(total_ptr + row, total)

    merged = tl.zeros([PADDED_HEAD_DIM], tl.float32)
    for start in range(0, num_parts, TILE_PARTS):
        p = start + tl.arange(0, TILE_PARTS)
        log_sums = load_log_sums(log_sums_ptr, p, num_parts, num_rows, row)
        weights = tl.where(log_sums == float("-inf"), 0.0, tl.exp(log_sums - total))  # [p]
        offsets = (p.to(tl.int64) * num_rows + row)[:, None] * HEAD_DIM + d[None, :]
        is_read = (weights > 0)[:, None] & (d < HEAD_DIM)[None, :]  # the output of an empty part was not written
        outputs = tl.load(outputs_ptr + offsets, mask=is_read, other=0.0)  # [p, d]
        merged += tl.sum(weights[:, None] * outputs, axis=0)
    tl.store(output_ptr + row * HEAD_DIM + d, merged.to(output_ptr.dtype.element_ty), mask=d < HEAD_DIM)


@_jit
def load_log_sums(log_sums_ptr, p, num_parts, num_rows, row):
    """The log-sum-exps of some parts; -inf past the last part."""
    return tl.load(log_sums_ptr + p.to(tl.int64) * num_rows + row, mask=p < num_parts, other=float("-inf"))
