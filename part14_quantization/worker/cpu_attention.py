"""Paged attention on the CPU: decodes and prompt chunks in one batch. A Numba kernel reads the KV cache in place."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import torch
import torch.nn.functional as F
from numba.extending import overload
from torch import Tensor

from .attention import causal_mask
from .quantization.kv_codes import decode_kv

FP8_SHIFT = np.float32(2.0**120)  # e4m3's exponents are stored plus 7, float32's plus 127
TILE_SIZE = 64  # keys between two updates of the softmax; a multiple of four
MAX_KERNEL_TOKENS = 8  # per sequence; from 16 on, SDPA's matrix products over gathered keys take half the time
# fastmath=True would add "nnan" and "ninf", and then a NaN in a key might come out as a plausible number. (A quantized
# cache can't store a NaN, so there a NaN key does become one. But its token's hidden state was NaN before that.)
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz", "arcp"}}


def paged_attention(
    query: Tensor, kv_cache: Tensor, block_tables: Tensor, query_start_loc: Tensor, context_lens: Tensor,
    max_query_len: int, scale: float,
) -> Tensor:  # fmt: skip
    """Causal attention of each sequence's new tokens over its cached context, for any number of new tokens.

    PagedAttention (Kwon et al., 2023) over sequences laid end to end. The mask is aligned at the bottom right: in a
    sequence with q new tokens and a context of c, query i is at position c - q + i and sees keys 0 to c - q + i.

    query: [num_tokens, num_heads, head_dim]. kv_cache: [num_blocks, block_size, 2, num_kv_heads, head_dim] of one
    layer, contiguous, of float32, bfloat16, or codes: int8, or uint8 for FP8; the new tokens' keys and values are there
    already. block_tables: [num_seqs, max_blocks], int32; entries past a context's end are not read. query_start_loc:
    [num_seqs + 1], int32, where each sequence's queries begin. context_lens: [num_seqs], int32, the new tokens
    included. max_query_len: the largest number of new tokens in a sequence. Returns query's shape and dtype; sums are
    kept in float32. Several threads may call it at once: the kernel releases the GIL and starts no threads of its own.
    """
    num_heads, num_kv_heads = query.shape[1], kv_cache.shape[3]
    assert num_heads % num_kv_heads == 0, f"{num_heads} query heads do not share {num_kv_heads} KV heads evenly"
    dtypes = {tensor.dtype for tensor in (block_tables, query_start_loc, context_lens)}
    assert dtypes == {torch.int32}, f"block_tables, query_start_loc and context_lens must be int32, got {dtypes}"
    output = torch.empty(query.shape, dtype=torch.float32)
    _paged_attention_kernel(
        query.float().contiguous().numpy(), slots_as_numpy(kv_cache), block_tables.contiguous().numpy(),
        query_start_loc.contiguous().numpy(), context_lens.contiguous().numpy(), kv_cache.shape[1], float(scale),
        output.numpy(),
    )  # fmt: skip
    starts = query_start_loc.tolist() if max_query_len > MAX_KERNEL_TOKENS else []  # else the kernel did them all
    for seq, (start, end) in enumerate(pairwise(starts)):
        if end - start > MAX_KERNEL_TOKENS:
            key, value = gather_context(kv_cache, block_tables[seq], int(context_lens[seq]))
            key, value = decode_kv(key, query.dtype), decode_kv(value, query.dtype)
            output[start:end] = chunk_attention(query[start:end], key, value, scale)
    return output.to(query.dtype)


def gather_context(kv_cache: Tensor, block_table: Tensor, context_len: int) -> tuple[Tensor, Tensor]:
    """A copy of one sequence's keys and values in the order of positions: [context_len, num_kv_heads, head_dim]."""
    num_blocks = -(-context_len // kv_cache.shape[1])
    blocks = kv_cache.index_select(0, block_table[:num_blocks])
    key, value = blocks.flatten(0, 1)[:context_len].unbind(1)
    return key, value


def chunk_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention of a sequence's last tokens over the whole sequence, each token over those up to itself.

    query: [num_queries, num_heads, head_dim]; key, value: [num_context, num_kv_heads, head_dim], of which the last
    num_queries belong to the queries. Returns query's shape.
    """
    q, k, v = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
    num_queries, num_context = len(query), len(key)
    mask = None if num_queries == num_context else causal_mask(num_queries, num_context, query.device)
    attended = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=True)
    return attended[0].transpose(0, 1)


def slots_as_numpy(kv_cache: Tensor) -> np.ndarray:
    """The same memory by slots: [num_slots, 2, num_kv_heads, head_dim]. NumPy has no bfloat16: its bits, as uint16."""
    assert kv_cache.is_contiguous(), f"kv_cache must be contiguous, got strides {kv_cache.stride()}"
    dtypes = (torch.float32, torch.bfloat16, torch.int8, torch.uint8)
    assert kv_cache.dtype in dtypes, f"kv_cache is {kv_cache.dtype}: expected one of {dtypes}"
    slots = kv_cache.flatten(0, 1)
    return (slots.view(torch.uint16) if slots.dtype == torch.bfloat16 else slots).numpy()


def warm_up(dtype: torch.dtype) -> None:
    """Compile the kernel for a KV cache of this dtype, which takes seconds, or load it from disk; for all shapes."""
    no_tables, no_lens = torch.empty(0, 1, dtype=torch.int32), torch.empty(0, dtype=torch.int32)
    starts, kv_cache = torch.zeros(1, dtype=torch.int32), torch.empty(1, 1, 2, 1, 1, dtype=dtype)
    paged_attention(torch.empty(0, 1, 1), kv_cache, no_tables, starts, no_lens, 0, 1.0)


def _jit_cached(kernel: Callable[..., None]) -> Any:
    """Compile at the first call, and keep the result on disk: in __pycache__ or in the user's cache directory."""
    try:
        return numba.njit(cache=True, **OPTIONS)(kernel)
    except RuntimeError:  # neither directory can be written: compile again in each process
        return numba.njit(**OPTIONS)(kernel)


@_jit_cached
def _paged_attention_kernel(
    query, kv_cache, block_tables, query_start_loc, context_lens, block_size, scale, output
):  # fmt: skip
    """Each new token attends to the keys up to its own. Sequences with more than MAX_KERNEL_TOKENS are skipped."""
    scale = np.float32(scale)  # a float64 would make every loop that uses it compute in float64
    for seq in range(len(context_lens)):
        start, end = query_start_loc[seq], query_start_loc[seq + 1]
        if end - start <= MAX_KERNEL_TOKENS:
            for token in range(start, end):
                num_visible = context_lens[seq] - (end - 1 - token)  # the last token sees all of it
                token_attention(
                    output[token], query[token], kv_cache, block_tables[seq], num_visible, block_size, scale
                )


@numba.njit(**OPTIONS)
def token_attention(output, query, kv_cache, block_table, context_len, block_size, scale):
    """All heads of one token over the first context_len positions. output, query: [num_heads, head_dim].

    Online softmax (Milakov and Gimelshein, 2018): after every tile of keys, `output / total` is the attention over the
    keys so far; a larger maximum rescales both.
    """
    num_heads, head_dim = query.shape
    slots, scores = np.empty(TILE_SIZE, np.int64), np.empty((num_heads, TILE_SIZE), np.float32)
    maximum, total = np.full(num_heads, -np.inf, np.float32), np.zeros(num_heads, np.float32)
    output[:] = 0
    for start in range(0, context_len, TILE_SIZE):
        num_keys = min(TILE_SIZE, context_len - start)
        find_slots(slots, block_table, start, num_keys, block_size)
        score_keys(scores, query, kv_cache, slots, num_keys, scale)
        for head in range(num_heads):
            new_maximum, tile_total = maximum[head], np.float32(0)
            for i in range(num_keys):
                new_maximum = max(new_maximum, scores[head, i])
            for i in range(num_keys):
                scores[head, i] = exp(scores[head, i] - new_maximum)
                tile_total += scores[head, i]
            rescale = exp(maximum[head] - new_maximum)
            total[head] = total[head] * rescale + tile_total
            for dim in range(head_dim):
                output[head, dim] *= rescale
            maximum[head] = new_maximum
        add_values(output, scores, kv_cache, slots, num_keys)
    for head in range(num_heads):
        for dim in range(head_dim):
            output[head, dim] /= total[head]


@numba.njit(**OPTIONS)
def find_slots(slots, block_table, start, num_keys, block_size):
    """The slots of a tile: num_keys positions from start on. The last slot is repeated up to the tile's end."""
    for i in range(num_keys):
        position = start + i
        slots[i] = block_table[position // block_size] * np.int64(block_size) + position % block_size
    slots[num_keys:] = slots[num_keys - 1]  # score_keys and add_values read four at a time


@numba.njit(**OPTIONS)
def score_keys(scores, query, kv_cache, slots, num_keys, scale):
    """scores[head, i] = scale · query[head] · key[i] for a tile. Consecutive query heads share a KV head.

    Four keys per pass: each number of the query is loaded once for four products. The last pass may score up to three
    keys past num_keys. All heads of a key come before the next key, since that is their order in memory.
    """
    num_kv_heads, head_dim = kv_cache.shape[2:]
    group_size = len(query) // num_kv_heads
    for i in range(0, num_keys, 4):
        a, b, c, d = slots[i], slots[i + 1], slots[i + 2], slots[i + 3]
        for kv_head in range(num_kv_heads):
            for head in range(kv_head * group_size, (kv_head + 1) * group_size):
                sum_a = sum_b = sum_c = sum_d = np.float32(0)
                for dim in range(head_dim):
                    sum_a += query[head, dim] * to_float32(kv_cache[a, 0, kv_head, dim])
                    sum_b += query[head, dim] * to_float32(kv_cache[b, 0, kv_head, dim])
                    sum_c += query[head, dim] * to_float32(kv_cache[c, 0, kv_head, dim])
                    sum_d += query[head, dim] * to_float32(kv_cache[d, 0, kv_head, dim])
                scores[head, i], scores[head, i + 1] = sum_a * scale, sum_b * scale
                scores[head, i + 2], scores[head, i + 3] = sum_c * scale, sum_d * scale


@numba.njit(**OPTIONS)
def add_values(output, weights, kv_cache, slots, num_keys):
    """output[head] += weights[head, i] · value[i] over a tile, four values per pass."""
    num_kv_heads, head_dim = kv_cache.shape[2:]
    group_size = len(output) // num_kv_heads
    weights[:, num_keys:] = 0  # the last pass may go past num_keys
    for i in range(0, num_keys, 4):
        a, b, c, d = slots[i], slots[i + 1], slots[i + 2], slots[i + 3]
        for kv_head in range(num_kv_heads):
            for head in range(kv_head * group_size, (kv_head + 1) * group_size):
                weight_a, weight_b = weights[head, i], weights[head, i + 1]
                weight_c, weight_d = weights[head, i + 2], weights[head, i + 3]
                for dim in range(head_dim):
                    output[head, dim] += (
                        weight_a * to_float32(kv_cache[a, 1, kv_head, dim])
                        + weight_b * to_float32(kv_cache[b, 1, kv_head, dim])
                        + weight_c * to_float32(kv_cache[c, 1, kv_head, dim])
                        + weight_d * to_float32(kv_cache[d, 1, kv_head, dim])
                    )


def to_float32(stored: Any) -> Any:
    """A number of the KV cache as float32. The code depends on the cache's dtype: see _to_float32."""
    raise NotImplementedError("to_float32 works only inside a kernel")


@overload(to_float32)
def _to_float32(stored):
    if stored == numba.uint16:  # a bfloat16 is the upper half of a float32
        return lambda stored: np.int32(np.int32(stored) << np.int32(16)).view(np.float32)
    if stored == numba.int8:
        return lambda stored: np.float32(stored)
    if stored == numba.uint8:  # e4m3: a float32 with another offset of the exponent
        return lambda stored: (
            np.int32(
                ((np.int32(stored) & np.int32(0x7F)) << np.int32(20))
                | ((np.int32(stored) & np.int32(0x80)) << np.int32(24))
            ).view(np.float32)
            * FP8_SHIFT
        )
    return lambda stored: stored


LOG2_E = np.float32(math.log2(math.e))
ROUND = np.float32(1.5 * 2**23)  # a float32 of this size has no fraction: adding it rounds, and the low bits are n
SMALLEST = np.float32(-127)  # here the exponent bits are 0, so 2^n is 0 as well
POWER_OF_2 = tuple(np.float32(math.log(2) ** k / math.factorial(k)) for k in range(6, -1, -1))  # Taylor, highest first


@numba.njit(fastmath={"contract"})  # with "reassoc", x + ROUND - ROUND would be x
def exp(x):
    """e^x for x ≤ 0, with a relative error up to 4e-6, and 0 for x < -88. LLVM can vectorize it, but not np.exp.

    e^x = 2^n · 2^f with f between -0.5 and 0.5: a polynomial gives 2^f, and n is the exponent field of a float32.
    """
    y = x * LOG2_E
    y = SMALLEST if y < SMALLEST else y  # written so that NaN stays NaN
    shifted = y + ROUND
    f = y - (shifted - ROUND)
    power = POWER_OF_2[0]
    for term in POWER_OF_2[1:]:
        power = power * f + term
    exponent = np.int32(np.float32(shifted).view(np.int32) << np.int32(23)) + np.int32(127 << 23)
    return power * np.int32(exponent).view(np.float32)
