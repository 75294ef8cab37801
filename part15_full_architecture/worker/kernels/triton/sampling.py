"""Sampling without a sort, in Triton: top-k and top-p are found by a search over all float32 numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from ...triton_attention import _jit, triton

if triton is not None:
    import triton.language as tl

TILE_SIZE = 4_096  # logits that a program reads at once
NUM_WARPS = 16


def sample(
    logits: Tensor, temperatures: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, positions: Tensor
) -> Tensor:  # fmt: skip
    """A token for each row of logits: the likeliest where the temperature is 0, else a random draw from those that
    min-p, top-k and top-p keep. kernels/reference.py::sample defines which these are.

    logits: [num_rows, vocab_size], float32, without NaN and +inf; rows may have a stride. All others: [num_rows]:
    temperatures, top_p and min_p float32; top_k, int32, from 1 to vocab_size; seeds and positions int64. Returns token
    ids: [num_rows], int64. Raises RuntimeError if Triton is not installed.

    A limit is the answer to "which is the smallest number that at least k logits reach?", and a pass over the row says
    if a number is too small or too large. Float32 numbers are as many as 32-bit integers, so 32 passes find it
    (FlashInfer's samplers search likewise). A greedy row takes one pass; one with neither top-k nor top-p takes two.

    Equal to the reference but for rounding: a token whose likelier ones have top_p of the probability, up to the last
    bits of a float32 sum, may be kept by one and dropped by the other. Sums are made in a fixed order, so the same row
    gives the same token in every batch. top_p = 0 keeps the likeliest token.
    """
    if triton is None:
        raise RuntimeError("sample needs the package triton, which is not installed (Linux: pip install triton)")
    num_rows, vocab_size = logits.shape
    assert logits.dtype == torch.float32 and logits.stride(1) == 1, (
        f"logits: expected contiguous rows of float32, got {logits.dtype}, strides of {logits.stride()}"
    )
    columns = {"temperatures": (temperatures, torch.float32), "top_k": (top_k, torch.int32)}
    columns |= {"top_p": (top_p, torch.float32), "min_p": (min_p, torch.float32)}
    columns |= {"seeds": (seeds, torch.int64), "positions": (positions, torch.int64)}
    for name, (column, dtype) in columns.items():
        assert column.shape == (num_rows,) and column.dtype == dtype and column.is_contiguous(), (
            f"{name}: expected [{num_rows}] contiguous numbers of {dtype}, got {column.dtype} {list(column.shape)}"
        )
    token_ids = torch.empty_like(seeds)
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        _sample_kernel[(num_rows,)](
            logits, temperatures, top_k, top_p, min_p, seeds, positions, token_ids, vocab_size, logits.stride(0),
            TILE_SIZE=min(TILE_SIZE, triton.next_power_of_2(vocab_size)), num_warps=NUM_WARPS,
        )  # fmt: skip
    return token_ids


@_jit
def _sample_kernel(
    logits_ptr, temperatures_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seeds_ptr, positions_ptr, token_ids_ptr, vocab_size,
    row_stride, TILE_SIZE: tl.constexpr,
):  # fmt: skip
    """One program per row. A tile of the row has a token for each lane."""
    row = tl.program_id(0).to(tl.int64)  # in int32, row · stride overflows from 2³¹ elements on
    logits_ptr += row * row_stride
    largest, token = find_largest(logits_ptr, vocab_size, TILE_SIZE)
    temperature = tl.load(temperatures_ptr + row)
    if (temperature > 0) & (largest > float("-inf")):
        # div_rn, here and below: a GPU's `/` may be off by two units in the last place, and so make or break ties
        maximum = tl.div_rn(largest, temperature)
        limit = maximum + tl.log(tl.load(min_p_ptr + row))
        k = tl.load(top_k_ptr + row)
        if k < vocab_size:
            kth_logit = find_kth(logits_ptr, vocab_size, k, largest, TILE_SIZE)
            limit = tl.maximum(limit, tl.div_rn(kth_logit, temperature))
        least = to_ordered(limit)
        p = tl.load(top_p_ptr + row)
        if p < 1:
            least = find_top_p(logits_ptr, vocab_size, temperature, maximum, least, p, TILE_SIZE)
        stream = mix(mix(tl.load(seeds_ptr + row)) + golden_steps(tl.load(positions_ptr + row)))
        token = draw(logits_ptr, vocab_size, temperature, maximum, least, stream, TILE_SIZE)
    tl.store(token_ids_ptr + row, token.to(tl.int64))


@_jit
def find_largest(logits_ptr, vocab_size, TILE_SIZE: tl.constexpr):
    """The largest logit, and the first token that has it: 0 if all are -inf."""
    lane = tl.arange(0, TILE_SIZE)
    best, best_tokens = tl.full([TILE_SIZE], float("-inf"), tl.float32), lane
    for start in range(0, vocab_size, TILE_SIZE):
        tokens = start + lane
        logits = tl.load(logits_ptr + tokens, mask=tokens < vocab_size, other=float("-inf"))
        best_tokens = tl.where(logits > best, tokens, best_tokens)
        best = tl.maximum(best, logits)
    return first_of_largest(best, best_tokens)


@_jit
def first_of_largest(best, best_tokens):
    """Of the best of each lane, the largest number and the first token that has it."""
    largest = tl.max(best, axis=0)
    return largest, tl.min(tl.where(best == largest, best_tokens, 2**31 - 1), axis=0)


@_jit
def find_kth(logits_ptr, vocab_size, k, largest, TILE_SIZE: tl.constexpr):
    """The k-th largest logit. Counts are integers, so it is exact.

    `low` is always reached by at least k logits, and a number above `high` by fewer. A count also finds the smallest
    logit that reaches the number: it may take `low` further than to the middle, and ends the search if just k do.
    """
    low = tl.full([], -0x7F800000, tl.int64)  # -inf, which all logits reach
    high = to_ordered(largest).to(tl.int64)
    while low < high:
        middle = (low + high + 1) >> 1
        count, smallest = count_from(logits_ptr, vocab_size, middle.to(tl.int32), TILE_SIZE)
        if count >= k:
            low = smallest
            if count == k:
                high = smallest
        else:
            high = middle - 1
    return from_ordered(low)


@_jit
def count_from(logits_ptr, vocab_size, least, TILE_SIZE: tl.constexpr):
    """How many logits are at least `least`, and the smallest of them: both as to_ordered() numbers them."""
    lane = tl.arange(0, TILE_SIZE)
    counts, smallest = tl.zeros([TILE_SIZE], tl.int32), tl.full([TILE_SIZE], 2**31 - 1, tl.int32)
    for start in range(0, vocab_size, TILE_SIZE):
        tokens = start + lane
        ordered = to_ordered(tl.load(logits_ptr + tokens, mask=tokens < vocab_size, other=0.0))
        is_counted = (ordered >= least) & (tokens < vocab_size)
        counts += is_counted.to(tl.int32)
        smallest = tl.minimum(smallest, tl.where(is_counted, ordered, 2**31 - 1))
    return tl.sum(counts, axis=0), tl.min(smallest, axis=0).to(tl.int64)


@_jit
def find_top_p(logits_ptr, vocab_size, temperature, maximum, least, p, TILE_SIZE: tl.constexpr):
    """The smallest number, of those from `least` on, such that all tokens above it have less than p of the probability.
    All numbers are scaled logits, as to_ordered() numbers them.

    Rounding keeps the order of sums that are made in the same order, of terms none of which is smaller. So the sums
    fall from each number to the next, as the search needs it.
    """
    target = p * sum_above(logits_ptr, vocab_size, temperature, maximum, least - 1, TILE_SIZE)
    low, high = least.to(tl.int64), to_ordered(maximum).to(tl.int64)  # low + high does not fit in int32
    while low < high:
        middle = (low + high) >> 1
        if sum_above(logits_ptr, vocab_size, temperature, maximum, middle.to(tl.int32), TILE_SIZE) < target:
            high = middle
        else:
            low = middle + 1
    return low.to(tl.int32)


@_jit
def sum_above(logits_ptr, vocab_size, temperature, maximum, limit, TILE_SIZE: tl.constexpr):
    """The sum of exp(scaled - maximum) of the tokens whose scaled logit is above the limit."""
    lane = tl.arange(0, TILE_SIZE)
    totals = tl.zeros([TILE_SIZE], tl.float32)
    for start in range(0, vocab_size, TILE_SIZE):
        tokens = start + lane
        logits = tl.load(logits_ptr + tokens, mask=tokens < vocab_size, other=float("-inf"))
        scaled = tl.div_rn(logits, temperature)
        totals += tl.where(to_ordered(scaled) > limit, tl.exp(scaled - maximum), 0.0)
    return tl.sum(totals, axis=0)


@_jit
def draw(logits_ptr, vocab_size, temperature, maximum, least, stream, TILE_SIZE: tl.constexpr):
    """A random token of those whose scaled logit is at least `least`: the argmax of weight / noise."""
    lane = tl.arange(0, TILE_SIZE)
    best, best_tokens = tl.full([TILE_SIZE], -1.0, tl.float32), lane
    for start in range(0, vocab_size, TILE_SIZE):
        tokens = start + lane
        logits = tl.load(logits_ptr + tokens, mask=tokens < vocab_size, other=float("-inf"))
        scaled = tl.div_rn(logits, temperature)
        scores = tl.div_rn(tl.exp(scaled - maximum), exponential_noise(stream, tokens))
        is_better = (to_ordered(scaled) >= least) & (scores > best)  # the likeliest has more than the 0 of padding
        best_tokens = tl.where(is_better, tokens, best_tokens)
        best = tl.where(is_better, scores, best)
    _, token = first_of_largest(best, best_tokens)
    return token


@_jit
def to_ordered(numbers):
    """float32 numbers as int32 numbers in the same order; -0.0 and 0.0 are the same."""
    bits = numbers.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


@_jit
def from_ordered(ordered):
    """The float32 number that to_ordered() made this of."""
    bits = tl.where(ordered < 0, -ordered | 0x80000000, ordered).to(tl.int32)
    return bits.to(tl.float32, bitcast=True)


@_jit
def exponential_noise(stream, tokens):
    """The noise of noise.py::exponential_noise for some tokens: the same integers, and logarithms that may differ in
    the last bits."""
    bits = mix(stream + golden_steps(tokens.to(tl.int64) + 1))
    uniform = shift_right(bits, 33).to(tl.int32).to(tl.float32) * 4.656612873077393e-10  # 2⁻³¹
    uniform = tl.minimum(tl.maximum(uniform, 1.1641532182693481e-10), 0.9999999403953552)  # 2⁻³³ and 1 - 2⁻²⁴
    # log1p(-uniform), which Triton has not: what rounding 1 - uniform did is taken back by the quotient (Kahan)
    rest = 1.0 - uniform
    correction = tl.div_rn(uniform, tl.where(rest == 1.0, 1.0, 1.0 - rest))
    return tl.where(rest == 1.0, uniform, -tl.log(rest) * correction)


@_jit
def golden_steps(count):
    """count steps of noise.py::GOLDEN_RATIO, modulo 2⁶⁴."""
    return count * -0x61C8864680B583EB


@_jit
def mix(x):
    """noise.py::mix: SplitMix64's output function (Steele, Lea and Flood, 2014)."""
    x = (x ^ shift_right(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ shift_right(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ shift_right(x, 31)


@_jit
def shift_right(x, NUM_BITS: tl.constexpr):
    """A logical shift of int64; >> copies the sign bit."""
    return (x >> NUM_BITS) & ((1 << (64 - NUM_BITS)) - 1)
