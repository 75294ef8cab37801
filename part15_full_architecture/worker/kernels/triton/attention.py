"""Paged attention in Triton, with two kernels: one splits contexts, for decodes of a few sequences."""

from __future__ import annotations

from torch import Tensor

from ...triton_attention import paged_attention as unsplit
from .split_kv import choose_num_parts, count_multiprocessors, split_kv


def paged_attention(
    query: Tensor, kv_cache: Tensor, block_tables: Tensor, query_start_loc: Tensor, context_lens: Tensor,
    max_query_len: int, scale: float,
) -> Tensor:  # fmt: skip
    """Causal attention of each sequence's new tokens over its cached context, for any number of new tokens.

    A step of decodes is split if its contexts may be long enough, and its sequences so few that a GPU would not be busy
    otherwise. See triton_attention.py::paged_attention for the arguments and what is raised.
    """
    num_programs = len(context_lens) * kv_cache.shape[3]
    max_context = block_tables.shape[1] * kv_cache.shape[1]
    num_parts = choose_num_parts(num_programs, max_context, count_multiprocessors(query.device))
    attend = split_kv if max_query_len == 1 and num_parts > 1 else unsplit
    return attend(query, kv_cache, block_tables, query_start_loc, context_lens, max_query_len, scale)
