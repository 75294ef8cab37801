"""Paged attention on the CPU, in Numba: each tile of keys and values is read once for many tokens of a sequence.

A row is the query of one head and one token. All rows that share a KV head are multiplied by a tile of its keys: a
matrix product, as is the sum of the values. Both run at about 90 GFLOPS on one core with AVX-512, since LLVM turns
their inner loops, of constant length, into vector instructions: 4 rows times 4 dimensions of TILE_SIZE keys, or times
4 keys of CHUNK dimensions. Sequences with few rows, as in decode, use cpu_attention.py::token_attention instead: it has
no tile to copy.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from ... import cpu_attention
from ...cpu_attention import OPTIONS, _jit_cached, exp, to_float32, token_attention
from .. import reference
from .memory import CACHE_LINE, DTYPES, LIKE, numbers_at, prefetch
from .team import get_team, make_counters, tasks

TILE_SIZE = 64  # keys
CHUNK = 32  # dimensions; head_dim must be a multiple of it
MIN_SPAN, MAX_SPAN = 32, 256  # of a span: tokens of a sequence for which its keys are read once
SPANS_PER_THREAD = 4  # so that all threads end at about the same time
MIN_TEAM_PRODUCTS = 1 << 20  # for less, waking another thread takes longer than the work
NO_SCORE = np.float32(-1e30)  # less than any score, but finite: -inf - -inf would be NaN


def paged_attention(
    query: Tensor, kv_cache: Tensor, block_tables: Tensor, query_start_loc: Tensor, context_lens: Tensor,
    max_query_len: int, scale: float,
) -> Tensor:  # fmt: skip
    """See reference.py::paged_attention. query is float32 or bfloat16; the cache is one of these or has codes.

    float16, and a head_dim that is not a multiple of 32, go to cpu_attention.py or the reference. All but query are
    contiguous. By several threads if there is enough to do, without the GIL.
    """
    (num_tokens, num_heads, head_dim), (num_seqs,) = query.shape, context_lens.shape
    num_blocks, block_size, _, num_kv_heads, _ = kv_cache.shape
    has_kernel = query.dtype in DTYPES and kv_cache.dtype in LIKE
    if not has_kernel or head_dim % CHUNK:
        attention = cpu_attention.paged_attention if has_kernel else reference.paged_attention
        return attention(query, kv_cache, block_tables, query_start_loc, context_lens, max_query_len, scale)
    assert num_heads % num_kv_heads == 0, f"{num_heads} query heads do not share {num_kv_heads} KV heads evenly"
    assert kv_cache.shape[4] == head_dim and kv_cache.is_contiguous(), f"cache: {kv_cache.shape}, {kv_cache.stride()}"
    assert query_start_loc.shape == (num_seqs + 1,) and block_tables.shape[0] == num_seqs, "a row for each sequence"
    dtypes = block_tables.dtype, query_start_loc.dtype, context_lens.dtype
    assert dtypes == (torch.int32,) * 3, f"block_tables, query_start_loc and context_lens must be int32, got {dtypes}"
    are_contiguous = block_tables.is_contiguous() and query_start_loc.is_contiguous() and context_lens.is_contiguous()
    assert are_contiguous, "block_tables, query_start_loc and context_lens must be contiguous"
    rows = query.float().contiguous()
    output = torch.empty_like(rows)
    max_context = block_tables.shape[1] * block_size
    is_short = num_tokens * num_heads * head_dim * max_context < MIN_TEAM_PRODUCTS
    num_threads = 1 if is_short else torch.get_num_threads()
    max_tokens = min(MAX_SPAN, max(MIN_SPAN, num_tokens // (SPANS_PER_THREAD * num_threads)))
    spans = find_spans(query_start_loc.numpy(), max_tokens)
    get_team(num_threads).run(
        _paged_attention_kernel, make_counters(1), spans, rows.data_ptr(), kv_cache.data_ptr(),
        block_tables.data_ptr(), query_start_loc.data_ptr(), context_lens.data_ptr(), output.data_ptr(), num_tokens,
        num_heads, num_kv_heads, head_dim, num_blocks, block_size, num_seqs, block_tables.shape[1],
        min_rows(head_dim, kv_cache.dtype), scale, LIKE[kv_cache.dtype],
    )  # fmt: skip
    return output.to(query.dtype)


def min_rows(head_dim: int, dtype: torch.dtype) -> int:
    """With fewer rows for each KV head, copying a tile takes longer than it saves; measured for head_dim 32 to 128."""
    return head_dim // (2 if dtype == torch.uint8 else 4)  # FP8 takes longer to decode


@_jit_cached
def _paged_attention_kernel(
    counters, spans, query, kv_cache, block_tables, query_start_loc, context_lens, output, num_tokens, num_heads,
    num_kv_heads, head_dim, num_blocks, block_size, num_seqs, max_blocks, min_rows, scale, like,
):  # fmt: skip
    """counters: see team.py. spans: see find_spans(). The next six are addresses."""
    number, integer = np.float32(0), np.int32(0)
    queries = numbers_at(query, 0, (num_tokens, num_heads, head_dim), number)
    outputs = numbers_at(output, 0, (num_tokens, num_heads, head_dim), number)
    starts = numbers_at(query_start_loc, 0, num_seqs + 1, integer)
    lens = numbers_at(context_lens, 0, num_seqs, integer)
    for index in tasks(counters, np.int64(0), len(spans)):
        seq, first, last = spans[index]
        block_table = numbers_at(block_tables, seq * max_blocks, max_blocks, integer)
        num_visible = lens[seq] - (starts[seq + 1] - last)
        span_attention(
            outputs[first:last], queries[first:last], kv_cache, num_blocks * block_size, num_kv_heads, block_table,
            num_visible, block_size, 0, 1, min_rows, scale, like,
        )  # fmt: skip


@numba.njit(**OPTIONS)
def span_attention(
    output, query, kv_cache, num_slots, num_kv_heads, block_table, num_visible, block_size, part, num_parts, min_rows,
    scale, like,
):  # fmt: skip
    """A few tokens of a sequence. The last of them sees num_visible keys, and each before it one less.

    output, query: [num_tokens, num_heads, head_dim]. kv_cache: an address. With few rows, it computes the heads of one
    of num_parts parts of the KV heads; with more, all of them, in the first part.
    """
    scale = np.float32(scale)  # a float64 would make every loop that uses it compute in float64
    num_tokens, num_heads, head_dim = query.shape
    if num_tokens * num_heads >= min_rows * num_kv_heads and head_dim % CHUNK == 0:
        if part == 0:
            slots = find_slots(block_table, np.int64(num_visible), block_size)
            shape = (num_slots, 2, num_kv_heads, head_dim // CHUNK, CHUNK)
            chunk_attention(output, query, numbers_at(kv_cache, 0, shape, like), kv_cache, slots, num_visible, scale)
        return
    by_head = numbers_at(kv_cache, 0, (num_slots, 2, num_kv_heads, head_dim), like)
    first, last = part * num_kv_heads // num_parts, (part + 1) * num_kv_heads // num_parts
    heads = slice(first * (num_heads // num_kv_heads), last * (num_heads // num_kv_heads))
    for token in range(num_tokens):
        token_attention(
            output[token, heads], query[token, heads], by_head, first, last - first, block_table,
            num_visible - (num_tokens - 1 - token), block_size, scale,
        )  # fmt: skip


@_jit_cached
def find_spans(starts, max_tokens):
    """Spans of up to max_tokens, the tasks of the kernel: [num_spans, 3], a sequence, and where the span begins and
    ends in the batch. starts: [num_seqs + 1]."""
    num_spans = 0
    for seq in range(len(starts) - 1):
        num_spans += -(-(starts[seq + 1] - starts[seq]) // max_tokens)
    spans, index = np.empty((num_spans, 3), np.int64), 0
    for seq in range(len(starts) - 1):
        for first in range(starts[seq], starts[seq + 1], max_tokens):
            spans[index] = seq, first, min(first + max_tokens, starts[seq + 1])
            index += 1
    return spans


@numba.njit(**OPTIONS)
def find_slots(block_table, context_len, block_size):
    """The slots of all positions. The last one is repeated up to the end of the last tile."""
    slots = np.empty(-(-context_len // TILE_SIZE) * TILE_SIZE, np.int64)
    for index in range(-(-context_len // block_size)):
        start, first_slot = index * block_size, block_table[index] * np.int64(block_size)
        for i in range(min(block_size, context_len - start)):
            slots[start + i] = first_slot + i
    slots[context_len:] = slots[context_len - 1]
    return slots


@numba.njit(**OPTIONS)
def chunk_attention(output, query, kv_cache, address, slots, context_len, scale):
    """Attention of the last tokens of a context: online softmax, as in cpu_attention.py::token_attention.

    output, query: [num_tokens, num_heads, head_dim]. kv_cache: [num_slots, 2, num_kv_heads, num_chunks, CHUNK], and
    its address. Row r of a KV head is the query of token r // group_size and of head r % group_size in its group; rows
    are computed in groups of four.
    """
    num_tokens, num_heads, _ = query.shape
    num_kv_heads, num_chunks = kv_cache.shape[2:4]
    group_size, num_before = num_heads // num_kv_heads, context_len - num_tokens
    rows = pack_rows(query, num_kv_heads, num_chunks, scale)
    num_fours = rows.shape[1]
    keys = np.empty((num_chunks, CHUNK // 4, 4 * TILE_SIZE), np.float32)
    values = np.empty((num_chunks, TILE_SIZE // 4, 4 * CHUNK), np.float32)
    scores = np.empty((num_fours, 4 * TILE_SIZE), np.float32)
    sums = np.zeros((num_kv_heads, num_fours, num_chunks, 4 * CHUNK), np.float32)
    maximum = np.full((num_kv_heads, num_fours, 4), NO_SCORE)
    total = np.zeros((num_kv_heads, num_fours, 4), np.float32)
    for start in range(0, context_len, TILE_SIZE):
        first = max(0, start - num_before) * group_size // 4  # the rows before it see no key of the tile
        for kv_head in range(num_kv_heads):
            prefetch_next(kv_cache, address, slots, start, kv_head)
            copy_tile(keys, values, kv_cache, slots[start : start + TILE_SIZE], kv_head)
            score_tile(scores[first:], rows[kv_head, first:], keys)
            if start + TILE_SIZE > num_before + 1:
                hide_later_keys(scores, first, num_before + 1 - start, group_size)
            for four in range(first, num_fours):
                softmax(scores[four], sums[kv_head, four], maximum[kv_head, four], total[kv_head, four])
            add_values(sums[kv_head, first:], scores[first:], values)
    unpack_rows(output, sums, total)


@numba.njit(**OPTIONS)
def pack_rows(query, num_kv_heads, num_chunks, scale):
    """Four dimensions of four rows next to each other: [num_kv_heads, num_fours, num_chunks, CHUNK / 4, 4 · 4]."""
    num_tokens, num_heads, _ = query.shape
    group_size = num_heads // num_kv_heads
    rows = np.zeros((num_kv_heads, -(-num_tokens * group_size // 4), num_chunks, CHUNK // 4, 16), np.float32)
    for token in range(num_tokens):
        for head in range(num_heads):
            kv_head, row = head // group_size, token * group_size + head % group_size
            for chunk in range(num_chunks):
                for group in range(CHUNK // 4):
                    four, first_dim = rows[kv_head, row // 4, chunk, group], chunk * CHUNK + 4 * group
                    for i in range(4):
                        four[row % 4 * 4 + i] = query[token, head, first_dim + i] * scale
    return rows


@numba.njit(**OPTIONS)
def unpack_rows(output, sums, total):
    num_tokens, num_heads, _ = output.shape
    group_size = num_heads // len(sums)
    for token in range(num_tokens):
        for head in range(num_heads):
            kv_head, row = head // group_size, token * group_size + head % group_size
            factor = np.float32(1) / total[kv_head, row // 4, row % 4]
            for chunk in range(sums.shape[2]):
                four, attended = sums[kv_head, row // 4, chunk], output[token, head]
                for dim in range(CHUNK):
                    attended[chunk * CHUNK + dim] = four[row % 4 * CHUNK + dim] * factor


@numba.njit(**OPTIONS)
def prefetch_next(kv_cache, address, slots, start, kv_head):
    """The keys and values of the next head, or of the next tile's first head, while this one is computed. They are
    small pieces far from each other, which the CPU would not fetch by itself."""
    num_slots, _, num_kv_heads, num_chunks, _ = kv_cache.shape
    num_bytes = num_chunks * CHUNK * kv_cache.itemsize
    next_head, next_start = (kv_head + 1, start) if kv_head + 1 < num_kv_heads else (0, start + TILE_SIZE)
    for position in range(next_start, min(next_start + TILE_SIZE, len(slots))):
        for which in range(2):
            head = address + ((slots[position] * 2 + which) * num_kv_heads + next_head) * num_bytes
            for offset in range(0, num_bytes, CACHE_LINE):
                prefetch(head + offset)


@numba.njit(**OPTIONS)
def copy_tile(keys, values, kv_cache, slots, kv_head):
    """One head's tile, as float32. keys: [num_chunks, CHUNK / 4, 4 · TILE_SIZE], four dimensions of all keys, then the
    next four. values: [num_chunks, TILE_SIZE / 4, 4 · CHUNK], a chunk of four values, then of the next four."""
    for group in range(TILE_SIZE // 4):
        i = 4 * group
        slot_a, slot_b, slot_c, slot_d = slots[i], slots[i + 1], slots[i + 2], slots[i + 3]
        for chunk in range(len(keys)):
            a, b = kv_cache[slot_a, 0, kv_head, chunk], kv_cache[slot_b, 0, kv_head, chunk]
            c, d = kv_cache[slot_c, 0, kv_head, chunk], kv_cache[slot_d, 0, kv_head, chunk]
            for four in range(CHUNK // 4):
                transpose(keys[chunk, four], i, a, b, c, d, 4 * four)
            a, b = kv_cache[slot_a, 1, kv_head, chunk], kv_cache[slot_b, 1, kv_head, chunk]
            c, d = kv_cache[slot_c, 1, kv_head, chunk], kv_cache[slot_d, 1, kv_head, chunk]
            stored = values[chunk, group]
            for dim in range(CHUNK):
                stored[dim], stored[CHUNK + dim] = to_float32(a[dim]), to_float32(b[dim])
                stored[2 * CHUNK + dim], stored[3 * CHUNK + dim] = to_float32(c[dim]), to_float32(d[dim])


@numba.njit(**OPTIONS)
def transpose(keys, i, a, b, c, d, dim):
    """Dimensions dim to dim + 3 of four keys go to places i to i + 3 of [4 · TILE_SIZE]: a block for the registers."""
    a0, a1, a2, a3 = to_float32(a[dim]), to_float32(a[dim + 1]), to_float32(a[dim + 2]), to_float32(a[dim + 3])
    b0, b1, b2, b3 = to_float32(b[dim]), to_float32(b[dim + 1]), to_float32(b[dim + 2]), to_float32(b[dim + 3])
    c0, c1, c2, c3 = to_float32(c[dim]), to_float32(c[dim + 1]), to_float32(c[dim + 2]), to_float32(c[dim + 3])
    d0, d1, d2, d3 = to_float32(d[dim]), to_float32(d[dim + 1]), to_float32(d[dim + 2]), to_float32(d[dim + 3])
    j, k, m = TILE_SIZE + i, 2 * TILE_SIZE + i, 3 * TILE_SIZE + i
    keys[i], keys[i + 1], keys[i + 2], keys[i + 3] = a0, b0, c0, d0
    keys[j], keys[j + 1], keys[j + 2], keys[j + 3] = a1, b1, c1, d1
    keys[k], keys[k + 1], keys[k + 2], keys[k + 3] = a2, b2, c2, d2
    keys[m], keys[m + 1], keys[m + 2], keys[m + 3] = a3, b3, c3, d3


@numba.njit(**OPTIONS)
def score_tile(scores, rows, keys):
    """scores[row] = rows[row] · keysᵀ. scores: [num_fours, 4 · TILE_SIZE]."""
    for four in range(len(scores)):
        own = scores[four]
        own[:] = 0
        for chunk in range(len(keys)):
            for group in range(CHUNK // 4):
                multiply(own, rows[four, chunk, group], 0, 4, keys[chunk, group], TILE_SIZE)


@numba.njit(**OPTIONS)
def add_values(sums, weights, values):
    """sums[row] += weights[row] · values.

    sums: [num_fours, num_chunks, 4 · CHUNK]; weights: [num_fours, 4 · TILE_SIZE].
    """
    for four in range(len(sums)):
        for chunk in range(len(values)):
            for group in range(TILE_SIZE // 4):
                multiply(sums[four, chunk], weights[four], 4 * group, TILE_SIZE, values[chunk, group], CHUNK)


@numba.njit(inline="always", **OPTIONS)
def multiply(sums, factors, start, stride, columns, size):
    """sums[r, i] += Σ factors[r, j] · columns[j, i], for four r, four j and all i < size.

    sums, columns: [4 · size]. factors[r, j] is number start + r · stride + j. Each number of columns is loaded once for
    four products, and each sum for four.
    """
    a, b, c, d = start, start + stride, start + 2 * stride, start + 3 * stride
    a0, a1, a2, a3 = factors[a], factors[a + 1], factors[a + 2], factors[a + 3]
    b0, b1, b2, b3 = factors[b], factors[b + 1], factors[b + 2], factors[b + 3]
    c0, c1, c2, c3 = factors[c], factors[c + 1], factors[c + 2], factors[c + 3]
    d0, d1, d2, d3 = factors[d], factors[d + 1], factors[d + 2], factors[d + 3]
    for i in range(size):
        x0, x1, x2, x3 = columns[i], columns[size + i], columns[2 * size + i], columns[3 * size + i]
        sums[i] += a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3
        sums[size + i] += b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3
        sums[2 * size + i] += c0 * x0 + c1 * x1 + c2 * x2 + c3 * x3
        sums[3 * size + i] += d0 * x0 + d1 * x1 + d2 * x2 + d3 * x3


@numba.njit(**OPTIONS)
def hide_later_keys(scores, first, num_visible, group_size):
    """The causal mask. num_visible: how many keys of the tile the first token sees; each token sees one more."""
    for four in range(first, len(scores)):
        for index in range(4):
            token = (4 * four + index) // group_size
            for i in range(max(0, num_visible + token), TILE_SIZE):
                scores[four, index * TILE_SIZE + i] = -np.inf


@numba.njit(**OPTIONS)
def softmax(scores, sums, maximum, total):
    """Scores become weights. scores: [4 · TILE_SIZE]; sums: [num_chunks, 4 · CHUNK]; maximum, total: [4].

    Four maxima at once: each is a chain of comparisons in which one waits for the other.
    """
    a, b, c, d = maximum[0], maximum[1], maximum[2], maximum[3]
    for i in range(TILE_SIZE):
        a, b = max(a, scores[i]), max(b, scores[TILE_SIZE + i])
        c, d = max(c, scores[2 * TILE_SIZE + i]), max(d, scores[3 * TILE_SIZE + i])
    rescale(sums, maximum, total, 0, a)
    rescale(sums, maximum, total, 1, b)
    rescale(sums, maximum, total, 2, c)
    rescale(sums, maximum, total, 3, d)
    for index in range(4):
        own_maximum, own_total = maximum[index], np.float32(0)
        for i in range(TILE_SIZE):
            weight = exp(scores[index * TILE_SIZE + i] - own_maximum)
            scores[index * TILE_SIZE + i] = weight
            own_total += weight
        total[index] += own_total


@numba.njit(**OPTIONS)
def rescale(sums, maximum, total, index, new_maximum):
    if new_maximum > maximum[index]:
        factor = exp(maximum[index] - new_maximum)
        total[index] *= factor
        for chunk in range(len(sums)):
            for dim in range(CHUNK):
                sums[chunk, index * CHUNK + dim] *= factor
        maximum[index] = new_maximum
