"""All layers of a step in one kernel, in Numba: for steps of few tokens, by several threads together.

The other kernels are called layer by layer from Python, and torch wakes its threads for each matrix product. Here, a
step is one call, and its threads stay awake until it ends. On a GPU, such a kernel is called a megakernel.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from ...cpu_attention import OPTIONS, _jit_cached, to_float32
from .activation import silu_row
from .attention import span_attention
from .memory import CACHE_LINE, numbers_at, prefetch
from .norm import _norm_kernel
from .rotary import _rotate_and_store_kernel
from .team import tasks

NUM_AT_ONCE = 4  # rows of a matrix in the inner loop of a product
NUM_OUTPUTS = 8 * NUM_AT_ONCE  # of a product, in a task
PHASES_PER_LAYER = 8
NUMBER, INTEGER = np.float32(0), np.int32(0)
BYTES = 4  # of a float32

# Addresses of a layer's weights and of its KV cache; 0 for what a model doesn't have. Matrices are [outputs, inputs],
# in the model's dtype; the other weights are float32.
FIELDS = (
    "input_norm", "qkv", "qkv_bias", "query_norm", "key_norm", "output", "output_bias", "post_norm", "gate_up",
    "gate_up_bias", "down", "down_bias", "kv_cache",
)  # fmt: skip
LAYER = np.dtype([(name, np.int64) for name in FIELDS])


class Sizes(NamedTuple):
    """Of the model, and of its KV cache."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_slots: int
    block_size: int
    min_rows: int  # see attention.py
    eps: float
    scale: float  # of the scores


class Buffers(NamedTuple):
    """Addresses of float32 numbers, a row for each token. In a phase, no task reads what another one writes."""

    residual: int  # hidden_size, like normed and hidden
    normed: int
    hidden: int
    qkv: int  # (num_heads + 2 · num_kv_heads) · head_dim
    query: int  # num_heads · head_dim, like attended
    attended: int
    gate_up: int  # 2 · intermediate_size
    activated: int  # intermediate_size


class Step(NamedTuple):
    """The tokens of a step: numbers, and addresses of tensors, see AttentionMetadata. num_parts: of a span's
    attention. More than one takes longer, since a key's heads are neighbors in memory, but occupies more threads."""

    num_tokens: int
    num_seqs: int
    num_parts: int
    max_blocks: int
    positions: int
    rotary_table: int
    slot_mapping: int
    block_tables: int
    query_start_loc: int
    context_lens: int


@_jit_cached
def step_kernel(counters, layers, final_norm, spans, sizes, buffers, step, like, table_like, cache_like):
    """Every thread of a team calls this, with the same arguments. counters: see tasks(). layers: an array of LAYER.
    spans: see attention.py::find_spans. final_norm: an address. like, table_like, cache_like: zeros of the dtypes of
    the matrices, the rotary table and the KV cache, see memory.py::LIKE.

    buffers.residual has the tokens' embeddings at the start, and buffers.normed the last norm's output at the end.
    """
    size, num_tokens = sizes.hidden_size, step.num_tokens
    query_size, kv_size = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    for index in range(len(layers)):
        layer, phase = layers[index], index * PHASES_PER_LAYER
        for token in tasks(counters, phase, num_tokens):
            norm(buffers, token, layer.input_norm, size, sizes.eps, index == 0)
        num_outputs = query_size + 2 * kv_size
        for task in tasks(counters, phase + 1, tasks_of(num_outputs)):
            product(buffers.qkv, buffers.normed, layer.qkv, layer.qkv_bias, num_tokens, size, num_outputs, task, like)
        for token in tasks(counters, phase + 2, num_tokens):
            rotate_and_store(buffers, token, layer, sizes, step, table_like, cache_like)
        for task in tasks(counters, phase + 3, len(spans) * step.num_parts):
            attend(buffers, spans[task // step.num_parts], task % step.num_parts, layer, sizes, step, cache_like)
        for task in tasks(counters, phase + 4, tasks_of(size)):
            product(
                buffers.hidden, buffers.attended, layer.output, layer.output_bias, num_tokens, query_size, size,
                task, like,
            )  # fmt: skip
        for token in tasks(counters, phase + 5, num_tokens):
            norm(buffers, token, layer.post_norm, size, sizes.eps, False)
        for task in tasks(counters, phase + 6, tasks_of(sizes.intermediate_size)):
            gate_and_up(buffers, layer, num_tokens, size, sizes.intermediate_size, task, like)
        for task in tasks(counters, phase + 7, tasks_of(size)):
            product(
                buffers.hidden, buffers.activated, layer.down, layer.down_bias, num_tokens,
                sizes.intermediate_size, size, task, like,
            )  # fmt: skip
    for token in tasks(counters, len(layers) * PHASES_PER_LAYER, num_tokens):
        norm(buffers, token, final_norm, size, sizes.eps, False)


@_jit_cached
def product_kernel(counters, output, rows, matrix, num_rows, num_inputs, num_outputs, like):
    """output = rows · matrixᵀ, by a team: see product()."""
    for task in tasks(counters, np.int64(0), tasks_of(num_outputs)):
        product(output, rows, matrix, 0, num_rows, num_inputs, num_outputs, task, like)


@numba.njit(**OPTIONS)
def norm(buffers, token, weight, size, eps, is_first):
    """Of the residual stream, after the last product was added to it, if there was one."""
    start = token * size * BYTES
    if is_first:
        _norm_kernel(buffers.residual + start, size, 0, weight, buffers.normed + start, 1, 1, size, eps, NUMBER)
    else:
        residual = buffers.residual + start
        _norm_kernel(buffers.hidden + start, size, residual, weight, buffers.normed + start, 1, 1, size, eps, NUMBER)


@numba.njit(**OPTIONS)
def rotate_and_store(buffers, token, layer, sizes, step, table_like, cache_like):
    num_heads, num_kv_heads, head_dim = sizes.num_heads, sizes.num_kv_heads, sizes.head_dim
    stride = (num_heads + 2 * num_kv_heads) * head_dim
    query = buffers.qkv + token * stride * BYTES
    key = query + num_heads * head_dim * BYTES
    value = key + num_kv_heads * head_dim * BYTES
    if layer.query_norm != 0:  # Qwen3
        _norm_kernel(query, stride, 0, layer.query_norm, query, 1, num_heads, head_dim, sizes.eps, NUMBER)
        _norm_kernel(key, stride, 0, layer.key_norm, key, 1, num_kv_heads, head_dim, sizes.eps, NUMBER)
    _rotate_and_store_kernel(
        query, stride, key, stride, value, stride, step.positions + token * 8, step.rotary_table, layer.kv_cache,
        step.slot_mapping + token * 8, 0, buffers.query + token * num_heads * head_dim * BYTES, 1, num_heads,
        num_kv_heads, head_dim, NUMBER, table_like, cache_like,
    )  # fmt: skip


@numba.njit(**OPTIONS)
def attend(buffers, span, part, layer, sizes, step, cache_like):
    """Some tokens of a sequence: see attention.py::find_spans and span_attention."""
    seq, first, last = span
    num_after = numbers_at(step.query_start_loc, 0, step.num_seqs + 1, INTEGER)[seq + 1] - last
    num_visible = numbers_at(step.context_lens, 0, step.num_seqs, INTEGER)[seq] - num_after
    shape = (step.num_tokens, sizes.num_heads, sizes.head_dim)
    output, query = numbers_at(buffers.attended, 0, shape, NUMBER), numbers_at(buffers.query, 0, shape, NUMBER)
    span_attention(
        output[first:last], query[first:last], layer.kv_cache, sizes.num_slots, sizes.num_kv_heads,
        numbers_at(step.block_tables, seq * step.max_blocks, step.max_blocks, INTEGER), num_visible, sizes.block_size,
        part, step.num_parts, sizes.min_rows, sizes.scale, cache_like,
    )  # fmt: skip


@numba.njit(**OPTIONS)
def gate_and_up(buffers, layer, num_tokens, size, intermediate_size, task, like):
    """Some columns of both products, and of SiLU(gate) · up."""
    first = task * NUM_OUTPUTS
    last = min(first + NUM_OUTPUTS, intermediate_size)
    shape = (num_tokens, 2 * intermediate_size)
    both, normed = (
        numbers_at(buffers.gate_up, 0, shape, NUMBER),
        numbers_at(buffers.normed, 0, (num_tokens, size), NUMBER),
    )
    bias = numbers_at(layer.gate_up_bias, 0, shape[1], NUMBER)
    powers = np.empty(last - first, np.float32)
    multiply(both, normed, layer.gate_up, first, last, like)
    multiply(both, normed, layer.gate_up, intermediate_size + first, intermediate_size + last, like)
    for token in range(num_tokens):
        gate, up = both[token, first:last], both[token, intermediate_size + first : intermediate_size + last]
        if layer.gate_up_bias != 0:
            gate += bias[first:last]
            up += bias[intermediate_size + first : intermediate_size + last]
        start = token * intermediate_size + first
        silu_row(numbers_at(buffers.activated, start, last - first, NUMBER), gate, up, powers, NUMBER)


@numba.njit(**OPTIONS)
def product(output, rows, matrix, bias, num_rows, num_inputs, num_outputs, task, like):
    """Some columns of output = rows · matrixᵀ + bias. All four are addresses; bias may be 0."""
    first = task * NUM_OUTPUTS
    last = min(first + NUM_OUTPUTS, num_outputs)
    outputs = numbers_at(output, 0, (num_rows, num_outputs), NUMBER)
    multiply(outputs, numbers_at(rows, 0, (num_rows, num_inputs), NUMBER), matrix, first, last, like)
    if bias != 0:
        for row in range(num_rows):
            outputs[row, first:last] += numbers_at(bias, first, last - first, NUMBER)


@numba.njit(inline="always", **OPTIONS)
def tasks_of(num_outputs):
    return -(-num_outputs // NUM_OUTPUTS)


@numba.njit(**OPTIONS)
def multiply(outputs, rows, matrix, first, last, like):
    """outputs[:, first:last] = rows · matrix[first:last]ᵀ. matrix: an address; last - first is a multiple of 4.

    Four rows of the matrix times two of the input at once: six loads for eight products. Meanwhile, the next four rows
    of the matrix are brought closer, a few cache lines at a time: the CPU would wait for more.
    """
    num_rows, size = rows.shape
    weights = numbers_at(matrix, 0, (outputs.shape[1], size), like)
    num_bytes = NUM_AT_ONCE * size * weights.itemsize
    num_bytes_per_pair = 2 * num_bytes // num_rows
    for i in range(first, last, NUM_AT_ONCE):
        a, b, c, d = weights[i], weights[i + 1], weights[i + 2], weights[i + 3]
        for row in range(0, num_rows - 1, 2):
            next_rows = matrix + (i // NUM_AT_ONCE + 1) * num_bytes + row // 2 * num_bytes_per_pair
            for offset in range(0, num_bytes_per_pair, CACHE_LINE):
                prefetch(next_rows + offset)
            multiply_pair(outputs, rows, row, a, b, c, d, i)
        if num_rows % 2:
            x = rows[num_rows - 1]
            xa = xb = xc = xd = NUMBER
            for j in range(size):
                xj = x[j]
                xa += xj * to_float32(a[j])
                xb += xj * to_float32(b[j])
                xc += xj * to_float32(c[j])
                xd += xj * to_float32(d[j])
            output = outputs[num_rows - 1]
            output[i], output[i + 1], output[i + 2], output[i + 3] = xa, xb, xc, xd


@numba.njit(inline="always", **OPTIONS)
def multiply_pair(outputs, rows, row, a, b, c, d, i):
    """Two rows of the input, from `row` on, times four of the matrix, which are i to i + 3."""
    x, y = rows[row], rows[row + 1]
    xa = xb = xc = xd = ya = yb = yc = yd = NUMBER
    for j in range(len(x)):
        aj, bj, cj, dj = to_float32(a[j]), to_float32(b[j]), to_float32(c[j]), to_float32(d[j])
        xj, yj = x[j], y[j]
        xa += xj * aj
        xb += xj * bj
        xc += xj * cj
        xd += xj * dj
        ya += yj * aj
        yb += yj * bj
        yc += yj * cj
        yd += yj * dj
    output_x, output_y = outputs[row], outputs[row + 1]
    output_x[i], output_x[i + 1], output_x[i + 2], output_x[i + 3] = xa, xb, xc, xd
    output_y[i], output_y[i + 1], output_y[i + 2], output_y[i + 3] = ya, yb, yc, yd
