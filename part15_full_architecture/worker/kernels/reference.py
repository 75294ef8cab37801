"""What each operation means, in plain torch: the functions that every kernel must equal.

A kernel has the name, the arguments and the result of its reference. All are computed in float32, whatever the dtype of
the tensors, and rounded once, at the end.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..noise import exponential_noise
from ..quantization.kv_codes import decode_kv, encode_kv
from ..quantization.packing import unpack_nibbles


def softmax(rows: Tensor) -> Tensor:
    """rows: [num_rows, size]. Returns the same shape and dtype; a row of -inf alone becomes zeros."""
    is_empty = (rows == -torch.inf).all(dim=-1, keepdim=True)
    return rows.float().softmax(dim=-1).masked_fill(is_empty, 0.0).to(rows.dtype)


def add_rms_norm(rows: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add rows to the residual stream, in place, and normalize it: two operations of a layer in one pass over memory.

    rows, residual: [num_rows, size]; weight: [size]. Returns residual / sqrt(mean(residual²) + eps) · weight, of
    rows' shape and dtype. The norm reads the sum before it is rounded to residual's dtype.
    """
    total = rows.float() + residual.float()
    residual.copy_(total)
    return (total * (total.square().mean(dim=-1, keepdim=True) + eps).rsqrt() * weight.float()).to(rows.dtype)


def rms_norm(rows: Tensor, weight: Tensor, eps: float) -> Tensor:
    """rows / sqrt(mean(rows²) + eps) · weight. rows: […, size]; weight: [size]. Returns rows' shape and dtype."""
    return F.rms_norm(rows, weight.shape, weight, eps)


def rotate_and_store(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor, table: Tensor, kv_cache: Tensor, slot_mapping: Tensor,
    scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Rotate queries and keys by their positions (RoPE), and write keys and values to their slots of the KV cache.

    query: [num_tokens, num_heads, head_dim]; key, value: [num_tokens, num_kv_heads, head_dim]: rows may have a stride,
    heads are contiguous. positions: [num_tokens], int64. table: [max_positions, head_dim], cosines then sines.
    kv_cache: [num_blocks, block_size, 2, num_kv_heads, head_dim] of one layer. slot_mapping: [num_tokens], int64;
    tokens with slot -1 are not written. scales: [2, num_kv_heads], float32, if the cache has codes: int8, or FP8 as
    uint8. Returns the rotated queries, contiguous.
    """
    cos, sin = table[positions].float().unsqueeze(1).chunk(2, dim=-1)
    rotated_query, rotated_key = (rotate(heads.float(), cos, sin).to(heads.dtype) for heads in (query, key))
    keys_and_values = torch.stack((rotated_key, value), dim=1)
    if scales is not None:
        keys_and_values = encode_kv(keys_and_values, scales, kv_cache.dtype)
    is_kept = slot_mapping >= 0
    slots = kv_cache.view(-1, *kv_cache.shape[2:])  # the same memory: a copy would be lost
    slots[slot_mapping[is_kept]] = keys_and_values[is_kept].to(kv_cache.dtype)
    return rotated_query


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """heads: [num_tokens, num_heads, head_dim]; cos, sin: [num_tokens, 1, head_dim / 2]. Dimension i pairs with
    i + head_dim / 2."""
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) · up. gate_up: [num_rows, 2 · size], gates then ups. Returns [num_rows, size]."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def paged_attention(
    query: Tensor, kv_cache: Tensor, block_tables: Tensor, query_start_loc: Tensor, context_lens: Tensor,
    max_query_len: int, scale: float,
) -> Tensor:  # fmt: skip
    """The last tokens of each sequence attend to its context in the KV cache, each token up to itself.

    query: [num_tokens, num_heads, head_dim]; kv_cache: [num_blocks, block_size, 2, num_kv_heads, head_dim], of numbers
    or of codes without their scales; the others as in AttentionMetadata. Returns query's shape. A sequence may have no
    tokens in the step. Slow: a loop over the sequences.
    """
    block_size, num_kv_heads = kv_cache.shape[1], kv_cache.shape[3]
    output = torch.empty_like(query)
    for seq, (start, end) in enumerate(pairwise(query_start_loc.tolist())):
        context_len = int(context_lens[seq])
        block_ids = block_tables[seq, : -(-context_len // block_size)].long()
        context = kv_cache[block_ids].flatten(0, 1)[:context_len]
        key, value = decode_kv(context, torch.float32).unbind(1)  # [context_len, num_kv_heads, head_dim]
        grouped = query[start:end].float().unflatten(1, (num_kv_heads, -1))  # the query heads that share a KV head
        scores = torch.einsum("qkgd,lkd->kgql", grouped, key) * scale
        is_visible = causal_mask(end - start, context_len, query.device)
        weights = scores.masked_fill(~is_visible, -torch.inf).softmax(dim=-1)
        output[start:end] = torch.einsum("kgql,lkd->qkgd", weights, value).flatten(1, 2)
    return output


@lru_cache(maxsize=4)  # the same for all layers of a step
def causal_mask(num_queries: int, context_len: int, device: torch.device) -> Tensor:
    """Which positions each query sees if the queries are the last tokens of the context: all positions up to its own.

    Returns [num_queries, context_len], bool: a triangle aligned at the bottom right.
    """
    positions = torch.arange(context_len, device=device)
    return positions <= positions[context_len - num_queries :].unsqueeze(1)


def merge_states(outputs: Tensor, log_sums: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over parts of a context, put together: each part weighs exp(its log-sum-exp).

    outputs: [num_parts, …, head_dim], float32: attention over each part alone. log_sums: [num_parts, …], float32, the
    log of the sum of exp(scores) in each part: -inf for an empty part, whose output does not count. Returns the
    attention over all parts, and its log-sum-exp: zeros and -inf if all parts are empty, NaN if a log-sum-exp is NaN.
    (FlashAttention 2, FlashInfer)
    """
    total = log_sums.logsumexp(dim=0)
    weights = (log_sums - total).exp().masked_fill(log_sums == -torch.inf, 0.0).unsqueeze(-1)
    return torch.where(weights != 0, weights * outputs, 0.0).sum(dim=0), total


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Dense attention with any mask: softmax(query · keyᵀ · scale where mask) · value.

    query: [batch, num_heads, num_queries, head_dim]; key, value: [batch, num_heads, num_keys, head_dim]. mask:
    [num_queries, num_keys], bool, True where a query sees a key. Returns query's shape; zeros for a query that sees
    nothing.
    """
    scores = query.float() @ key.float().transpose(-1, -2) * scale
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    weights = weights.masked_fill(~mask.any(dim=-1, keepdim=True), 0.0)
    return (weights @ value.float()).to(query.dtype)


def sample(
    logits: Tensor, temperatures: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, positions: Tensor
) -> Tensor:  # fmt: skip
    """A token for each row of logits: the likeliest where the temperature is 0, else a random draw from those that
    min-p, top-k and top-p keep.

    logits: [num_rows, vocab_size], float32. All others: [num_rows]: temperatures, top_p and min_p float32; top_k,
    int32, from 1 to vocab_size; seeds and positions int64: the noise of a row is a function of both, see noise.py.
    Returns token ids: [num_rows], int64.

    min-p keeps tokens that are at least min_p times as likely as the likeliest; top-k those that are not less likely
    than the k-th; top-p, of the tokens that are left, those for which all likelier ones together have less than top_p
    of the probability, and all tokens if it is 1. Equally likely tokens are kept or dropped together.
    """
    greedy = logits.argmax(dim=-1)
    temperatures, top_k, top_p, min_p = (column.unsqueeze(1) for column in (temperatures, top_k, top_p, min_p))
    scaled = logits / torch.where(temperatures > 0, temperatures, 1.0)
    scaled = scaled.masked_fill(scaled < scaled.amax(dim=-1, keepdim=True) + min_p.log(), -torch.inf)
    ordered = scaled.sort(dim=-1, descending=True).values
    kth = ordered.gather(1, top_k.long() - 1)
    ordered = ordered.masked_fill(ordered < kth, -torch.inf)
    probs = ordered.softmax(dim=-1)
    is_first = F.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0), value=True)  # of equally likely tokens
    before = probs.cumsum(dim=-1) - probs
    likelier = torch.where(is_first, before, 0).cummax(dim=-1).values
    is_kept = (ordered > -torch.inf) & ((likelier < top_p) | (top_p >= 1) | (ordered == ordered[:, :1]))
    limit = torch.where(is_kept, ordered, torch.inf).amin(dim=-1, keepdim=True)
    noise = exponential_noise(seeds, positions, logits.shape[-1])
    weights = (scaled - scaled.amax(dim=-1, keepdim=True)).exp()
    drawn = torch.where(scaled >= limit, weights / noise, -1.0).argmax(dim=-1)
    return torch.where(temperatures.squeeze(1) > 0, drawn, greedy)


def quantized_linear(
    rows: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, codes_per_byte: int
) -> Tensor:
    """rows · matrixᵀ, with the matrix as codes (W8A16, W4A16): number = (code - zero) · scale.

    rows: [num_rows, columns]. codes: [out_features, columns / codes_per_byte], int8: one code in each byte, or two as
    packing.py::pack_nibbles stores them. scale: [out_features, num_groups], float32; zero: the same shape, int8, or
    None; each for group_size columns. Returns [num_rows, out_features], of rows' dtype.
    """
    numbers = (
        (unpack_nibbles(codes, group_size) if codes_per_byte == 2 else codes).float().unflatten(1, (-1, group_size))
    )
    if zero is not None:
        numbers = numbers - zero.float().unsqueeze(-1)
    matrix = (numbers * scale.unsqueeze(-1)).flatten(1).to(rows.dtype)
    return F.linear(rows, matrix)


def grouped_linear(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """The first counts[0] rows times weight[0], the next counts[1] rows times weight[1], and so on: a layer's experts.

    rows: [n, in_features]. weight: [num_groups, out_features, in_features]. counts: [num_groups], int64, with sum n.
    Returns [n, out_features].
    """
    starts = accumulate(counts.tolist(), initial=0)
    parts = [rows[start:end] @ weight[group].T for group, (start, end) in enumerate(pairwise(starts))]
    return torch.cat(parts)
