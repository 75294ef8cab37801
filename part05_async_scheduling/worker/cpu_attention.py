"""Paged attention for decode as a Numba kernel: it reads the KV cache in place, without gathering a context first."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numba.extending import overload
from torch import Tensor

TILE_SIZE = 64  # keys between two updates of the softmax; a multiple of four
# fastmath=True would add "nnan" and "ninf", and then a NaN in a key might come out as a plausible number.
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz", "arcp"}}


def paged_decode(query: Tensor, kv_cache: Tensor, block_tables: Tensor, context_lens: Tensor, scale: float) -> Tensor:
    """Attention of one new token per sequence over its cached context (PagedAttention: Kwon et al., 2023).

    query: [num_seqs, num_heads, head_dim]. kv_cache: [num_blocks, block_size, 2, num_kv_heads, head_dim] of one layer,
    contiguous, float32 or bfloat16. block_tables: [num_seqs, max_blocks], int32; entries past a context's end are not
    read. context_lens: [num_seqs], int32, at least 1, the new token included. Returns query's shape and dtype; sums are
    kept in float32. Several threads may call it at once: it releases the GIL and starts no threads of its own.
    """
    num_heads, num_kv_heads = query.shape[1], kv_cache.shape[3]
    assert num_heads % num_kv_heads == 0, f"{num_heads} query heads do not share {num_kv_heads} KV heads evenly"
    assert block_tables.dtype == context_lens.dtype == torch.int32, "block_tables and context_lens must be int32"
    output = torch.empty(query.shape, dtype=torch.float32)
    _paged_decode_kernel(
        query.float().contiguous().numpy(), slots_as_numpy(kv_cache), block_tables.contiguous().numpy(),
        context_lens.contiguous().numpy(), kv_cache.shape[1], float(scale), output.numpy(),
    )  # fmt: skip
    return output.to(query.dtype)


def slots_as_numpy(kv_cache: Tensor) -> np.ndarray:
    """The same memory by slots: [num_slots, 2, num_kv_heads, head_dim]. NumPy has no bfloat16: its bits, as uint16."""
    assert kv_cache.is_contiguous(), f"kv_cache must be contiguous, got strides {kv_cache.stride()}"
    assert kv_cache.dtype in (torch.float32, torch.bfloat16), f"kv_cache is {kv_cache.dtype}: float32 or bfloat16 only"
    slots = kv_cache.flatten(0, 1)
    return (slots if slots.dtype == torch.float32 else slots.view(torch.uint16)).numpy()


def warm_up(dtype: torch.dtype) -> None:
    """Compile the kernel for a KV cache of this dtype, which takes seconds, or load it from disk; for all shapes."""
    no_tables, no_lens = torch.empty(0, 1, dtype=torch.int32), torch.empty(0, dtype=torch.int32)
    paged_decode(torch.empty(0, 1, 1), torch.empty(1, 1, 2, 1, 1, dtype=dtype), no_tables, no_lens, 1.0)


def _jit_cached(kernel: Callable[..., None]) -> Any:
    """Compile at the first call, and keep the result on disk: in __pycache__ or in the user's cache directory."""
    try:
        return numba.njit(cache=True, **OPTIONS)(kernel)
    except RuntimeError:  # neither directory can be written: compile again in each process
        return numba.njit(**OPTIONS)(kernel)


@_jit_cached
def _paged_decode_kernel(query, kv_cache, block_tables, context_lens, block_size, scale, output):
    scale = np.float32(scale)  # a float64 would make every loop that uses it compute in float64
    for seq in range(len(query)):
        token_attention(output[seq], query[seq], kv_cache, block_tables[seq], context_lens[seq], block_size, scale)


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
