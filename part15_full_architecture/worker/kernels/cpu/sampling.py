"""Sampling on the CPU, in Numba, without sorting: of most blocks of tokens, only the largest logit is looked at.

Logits are compared as integers in the same order, their keys. A bisection over integers finds a threshold exactly, in
at most 32 steps, each a pass over the tokens that are left.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from ...cpu_attention import OPTIONS, _jit_cached, exp
from .memory import EXACT, numbers_at

BLOCK_SIZE = 64  # tokens with a common maximum
LOWEST, HIGHEST = np.int32(-(2**31)), np.int32(2**31 - 1)
MINUS_INFINITY = np.int32(-0x7F800000)  # its key
COLUMN_DTYPES = (torch.float32, torch.int32, torch.float32, torch.float32, torch.int64, torch.int64)  # after logits
GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)  # the constants of noise.py, as unsigned numbers
LEAST_UNIFORM, LARGEST_UNIFORM = np.float32(2.0**-33), np.float32(1 - 2.0**-24)
SLACK = np.float32(1 + 2.0**-20)  # for log1p's last bit
FACTOR_1, FACTOR_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def sample(
    logits: Tensor, temperatures: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, positions: Tensor
) -> Tensor:  # fmt: skip
    """See reference.py::sample. A row with a NaN gets any token. In one thread, without the GIL.

    logits: [num_rows, vocab_size], float32, contiguous. All others: [num_rows], contiguous: float32 but for top_k,
    int32, and seeds and positions, int64. Returns [num_rows], int64.
    """
    num_rows, vocab_size = logits.shape
    columns = temperatures, top_k, top_p, min_p, seeds, positions
    dtypes = tuple([column.dtype for column in columns])
    assert dtypes == COLUMN_DTYPES, f"temperatures to positions must be {COLUMN_DTYPES}, got {dtypes}"
    are_right = all([column.shape == (num_rows,) and column.is_contiguous() for column in columns])
    assert are_right, f"expected {num_rows} contiguous numbers, got {[column.shape for column in columns]}"
    assert logits.dtype == torch.float32 and logits.is_contiguous(), f"logits: {logits.dtype}, {logits.stride()}"
    token_ids = seeds.new_empty(num_rows)
    _sample_kernel(
        logits.data_ptr(), temperatures.data_ptr(), top_k.data_ptr(), top_p.data_ptr(), min_p.data_ptr(),
        seeds.data_ptr(), positions.data_ptr(), token_ids.data_ptr(), num_rows, vocab_size,
    )  # fmt: skip
    return token_ids


@_jit_cached
def _sample_kernel(logits, temperatures, top_k, top_p, min_p, seeds, positions, token_ids, num_rows, vocab_size):
    """All but the last two are addresses."""
    number, integer = np.float32(0), np.int64(0)
    temperatures, top_k = numbers_at(temperatures, 0, num_rows, number), numbers_at(top_k, 0, num_rows, np.int32(0))
    top_p, min_p = numbers_at(top_p, 0, num_rows, number), numbers_at(min_p, 0, num_rows, number)
    seeds, positions = numbers_at(seeds, 0, num_rows, integer), numbers_at(positions, 0, num_rows, integer)
    token_ids = numbers_at(token_ids, 0, num_rows, integer)
    keys, maxima = np.empty(vocab_size, np.int32), np.empty(-(-vocab_size // BLOCK_SIZE), np.int32)
    kept, tokens = np.empty(vocab_size, np.int32), np.empty(vocab_size, np.int32)
    weights = np.empty(vocab_size, np.float32)
    for row in range(num_rows):
        is_greedy = not temperatures[row] > 0
        temperature = np.float32(1) if is_greedy else temperatures[row]
        find_keys(keys, maxima, numbers_at(logits, row * vocab_size, vocab_size, number), temperature)
        maximum = largest(maxima)
        if is_greedy:
            token_ids[row] = first_token(keys, maxima, maximum)
            continue
        limit = MINUS_INFINITY + np.int32(1)
        if min_p[row] > 0:
            limit = max(limit, to_key(to_number(maximum) + np.log(min_p[row])))
        if top_k[row] <= len(maxima):  # in each of so many blocks, a token is at least as likely as the k-th
            limit = find_limit(maxima, None, limit, maximum, top_k[row])
        num_kept = keep(kept, tokens, keys, maxima, limit)
        own, own_weights = kept[:num_kept], weights[:num_kept]
        if top_k[row] < num_kept:
            limit = find_limit(own, None, limit, maximum, top_k[row])
        total = find_weights(own_weights, own, maximum, limit)
        if top_p[row] < 1:
            limit = find_limit(own, own_weights, limit, maximum, top_p[row] * total)
            drop(own_weights, own, limit)
        token_ids[row] = draw(own_weights, tokens, stream(seeds[row], positions[row]))


@numba.njit(**EXACT)
def find_keys(keys, maxima, logits, temperature):
    """keys: [vocab_size], of logits / temperature; maxima: of each block's keys. EXACT, since x · (1 / temperature)
    could make equal numbers of two that differ."""
    for block in range(len(maxima)):
        own, numbers = keys[block * BLOCK_SIZE :][:BLOCK_SIZE], logits[block * BLOCK_SIZE :][:BLOCK_SIZE]
        for i in range(len(own)):
            own[i] = to_key(numbers[i] / temperature)
        maxima[block] = largest(own)


@numba.njit(**EXACT)
def to_key(number):
    """An integer with a float32's place in their order; 0 and -0 have the same, and NaN is the largest.

    The bits of positive floats are in order already, those of negative ones in reverse.
    """
    bits = np.float32(number).view(np.int32)
    key = np.int32(LOWEST - bits) if bits < 0 else bits
    return key if number == number else HIGHEST


@numba.njit(**EXACT)
def to_number(key):
    """to_key() undone."""
    bits = np.int32(LOWEST - key) if key < 0 else key
    return np.int32(bits).view(np.float32)


@numba.njit(**EXACT)
def largest(keys):
    found = LOWEST
    for i in range(len(keys)):
        found = max(found, keys[i])
    return found


@numba.njit(**EXACT)
def first_token(keys, maxima, maximum):
    """The first token with this key."""
    block = 0
    while maxima[block] != maximum:
        block += 1
    token = block * BLOCK_SIZE
    while keys[token] != maximum:
        token += 1
    return token


@numba.njit(**EXACT)
def keep(kept, tokens, keys, maxima, limit):
    """Collect the keys that are at least limit, and their tokens. Returns how many there are."""
    num_kept = 0
    for block in range(len(maxima)):
        if maxima[block] >= limit:
            for token in range(block * BLOCK_SIZE, min((block + 1) * BLOCK_SIZE, len(keys))):
                kept[num_kept], tokens[num_kept] = keys[token], token
                num_kept += keys[token] >= limit
    return num_kept


@numba.njit(**OPTIONS)
def find_limit(keys, weights, lower, upper, budget):
    """The smallest limit from lower to upper, the largest key, such that the keys above it weigh less than budget."""
    too_low, found = np.int64(lower) - 1, np.int64(upper)
    while found - too_low > 1:
        middle = (too_low + found) >> 1
        if weight_above(keys, weights, np.int32(middle)) < budget:
            found = middle
        else:
            too_low = middle
    return np.int32(max(found, lower))


@numba.njit(**OPTIONS)
def weight_above(keys, weights, limit):
    """weights: None if each key weighs 1. Numba compiles only one of the loops then."""
    if weights is None:
        count = np.int32(0)
        for i in range(len(keys)):
            count += np.int32(keys[i] > limit)
        return count
    total = np.float32(0)
    for i in range(len(keys)):
        total += weights[i] if keys[i] > limit else np.float32(0)
    return total


@numba.njit(**OPTIONS)
def find_weights(weights, keys, maximum, limit):
    """Probabilities times the same factor: 1 for the likeliest token, and 0 below the limit. Returns their sum."""
    maximum, total = to_number(maximum), np.float32(0)
    for i in range(len(keys)):
        number = to_number(keys[i])
        weight = np.float32(1) if number == maximum else exp(number - maximum)
        weights[i] = weight if keys[i] >= limit else np.float32(0)
        total += weights[i]
    return total


@numba.njit(**OPTIONS)
def drop(weights, keys, limit):
    for i in range(len(keys)):
        weights[i] = weights[i] if keys[i] >= limit else np.float32(0)


@numba.njit(**EXACT)
def draw(weights, tokens, stream):
    """The token with the largest weight / noise, which is a random draw; see noise.py::exponential_noise.

    The noise is -log(1 - uniform), which is more than uniform: the logarithm is computed only for tokens whose
    weight / uniform is larger than the best so far.
    """
    bounds = np.empty(BLOCK_SIZE, np.float32)
    best, best_token = np.float32(-1), 0
    for start in range(0, len(weights), BLOCK_SIZE):
        own, own_tokens = weights[start:][:BLOCK_SIZE], tokens[start:][:BLOCK_SIZE]
        own_bounds = bounds[: len(own)]
        for i in range(len(own)):
            own_bounds[i] = own[i] / uniform(stream, own_tokens[i]) * SLACK
        if to_number(largest(own_bounds.view(np.int32))) > best:  # floats that are not negative are in order as bits
            for i in range(len(own)):
                if own_bounds[i] > best:
                    ratio = own[i] / -np.log1p(-uniform(stream, own_tokens[i]))
                    if ratio > best:
                        best, best_token = ratio, own_tokens[i]
    return best_token


@numba.njit(**EXACT)
def stream(seed, position):
    return mix(mix(np.uint64(seed)) + np.uint64(position) * GOLDEN_RATIO)


@numba.njit(**EXACT)
def uniform(stream, token):
    """The random number of a token, between 0 and 1. All numbers have 64 bits and no sign: they overflow as intended,
    and >> brings in zeros."""
    bits = mix(stream + np.uint64(token + 1) * GOLDEN_RATIO) >> np.uint64(33)
    number = np.float32(np.int32(bits)) * np.float32(2.0**-31)
    number = LEAST_UNIFORM if number < LEAST_UNIFORM else number
    return LARGEST_UNIFORM if number > LARGEST_UNIFORM else number


@numba.njit(**EXACT)
def mix(x):
    x = (x ^ (x >> np.uint64(30))) * FACTOR_1
    x = (x ^ (x >> np.uint64(27))) * FACTOR_2
    return x ^ (x >> np.uint64(31))
