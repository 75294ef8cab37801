"""Paged attention in CUDA: five kernels, each for the sequences that it can handle, and the choice among them."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .library import Library

MIN_PART_LEN = 128  # keys: the work of a smaller part would not be worth its block
BLOCKS_PER_MULTIPROCESSOR = 3  # of a decode kernel, which need to be resident to keep the memory busy
VECTOR_BYTES = 16  # what a thread reads at once
MAX_GRID_SIZE = 65_535  # of a grid's second and third dimension
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
CODES = (torch.int8, torch.uint8)
MMA_HEAD_DIMS = (32, 64, 128)
WMMA_HEAD_DIMS = (32, 64, 96, 128)
TURING_HEAD_DIMS = (32, 64)  # for WMMA on compute capability 7.5, whose blocks have at most 64 KiB of shared memory


class Device(NamedTuple):
    """What the choice of a kernel depends on. capability: of the GPU, such as (9, 0)."""

    capability: tuple[int, int]
    num_multiprocessors: int


EMULATED_DEVICE = Device((9, 0), 132)  # an H100: the emulation on a CPU runs all kernels


def paged_attention(
    query: Tensor, kv_cache: Tensor, block_tables: Tensor, query_start_loc: Tensor, context_lens: Tensor,
    max_query_len: int, scale: float,
) -> Tensor:  # fmt: skip
    """Causal attention of each sequence's new tokens over its cached context, for any number of new tokens.

    A decode kernel takes the sequences with one query, a prefill kernel those with more. A sequence may have no
    queries, or no context: then nothing is written for it. Which sequences are which is known on the device only, so
    both are launched unless max_query_len is 1.

    query: [num_tokens, num_heads, head_dim], contiguous, float32, float16 or bfloat16. kv_cache: [num_blocks,
    block_size, 2, num_kv_heads, head_dim] of one layer, contiguous, of the query's dtype or codes without scales: int8,
    or uint8 for FP8. block_size: a power of two. block_tables: [num_seqs, max_blocks], int32; entries past a context's
    end are not read. query_start_loc: [num_seqs + 1], int32, where each sequence's queries begin. context_lens:
    [num_seqs], int32, the new tokens included. max_query_len: at least the longest sequence's number of new tokens.
    Returns query's shape and dtype. Raises KernelError for a head_dim that no kernel was compiled for.
    """
    output, device = torch.empty_like(query), describe(query.device)
    arguments = (query, kv_cache, block_tables, query_start_loc, context_lens, max_query_len, scale, output)
    num_parts = choose_num_parts(
        len(context_lens) * kv_cache.shape[3], max_context_len(kv_cache, block_tables), device.num_multiprocessors
    )
    decode = split_kv if num_parts > 1 else paged_decode
    decode(*arguments)
    if max_query_len > 1:
        prefills = {"mma": prefill_mma, "wmma": prefill_wmma, "tiled": prefill_tiled}
        prefills[choose_prefill(query.dtype, query.shape[2], device.capability)](*arguments)
    return output


def choose_num_parts(num_blocks: int, max_context_len: int, num_multiprocessors: int) -> int:
    """Into how many parts split_kv cuts each context, so that enough blocks keep all multiprocessors busy.

    num_blocks: blocks if contexts are not cut: num_seqs · num_kv_heads. 1: paged_decode does as well.
    """
    max_parts = -(-max_context_len // MIN_PART_LEN)
    wanted = num_multiprocessors * BLOCKS_PER_MULTIPROCESSOR // max(num_blocks, 1)
    return max(1, min(wanted, max_parts, MAX_GRID_SIZE))


def choose_prefill(dtype: torch.dtype, head_dim: int, capability: tuple[int, int]) -> str:
    """The fastest prefill kernel that there is for a dtype, a head_dim and a GPU: "mma", "wmma" or "tiled"."""
    is_ampere = capability >= (8, 0)
    if dtype == torch.float32 or capability < (7, 0) or (dtype == torch.bfloat16 and not is_ampere):
        return "tiled"  # there are no tensor cores, or they don't know this dtype
    if is_ampere and head_dim in MMA_HEAD_DIMS:
        return "mma"
    return "wmma" if head_dim in (WMMA_HEAD_DIMS if is_ampere else TURING_HEAD_DIMS) else "tiled"


def paged_decode(
    query: Tensor, kv_cache: Tensor, block_tables: Tensor, query_start_loc: Tensor, context_lens: Tensor,
    max_query_len: int, scale: float, output: Tensor,
) -> None:  # fmt: skip
    """Fill the rows of output that belong to sequences with one query: a block for each of them and KV head.

    head_dim: a multiple of 8 up to 256; up to 16 query heads per KV head. The other arguments: see paged_attention.
    """
    call("paged_decode", query, kv_cache, block_tables, query_start_loc, context_lens, scale, output)


def split_kv(
    query: Tensor, kv_cache: Tensor, block_tables: Tensor, query_start_loc: Tensor, context_lens: Tensor,
    max_query_len: int, scale: float, output: Tensor,
) -> None:  # fmt: skip
    """As paged_decode, with each context cut into parts for several blocks (Flash-Decoding, Dao et al., 2023)."""
    num_seqs, (_, num_heads, head_dim) = len(context_lens), query.shape
    num_parts = choose_num_parts(
        num_seqs * kv_cache.shape[3],
        max_context_len(kv_cache, block_tables),
        describe(query.device).num_multiprocessors,
    )
    outputs = torch.empty(num_parts, num_seqs * num_heads, head_dim, dtype=torch.float32, device=query.device)
    log_sums = torch.empty(num_parts, num_seqs * num_heads, dtype=torch.float32, device=query.device)
    call(
        "split_kv", query, kv_cache, block_tables, query_start_loc, context_lens, scale, output,
        (outputs, log_sums), (num_parts, MIN_PART_LEN),
    )  # fmt: skip


def merge_states(outputs: Tensor, log_sums: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over parts of a context, put together: each part weighs exp(its log-sum-exp).

    outputs: [num_parts, …, head_dim], log_sums: [num_parts, …]: contiguous, float32; -inf for an empty part, whose
    output does not count. Returns the attention over all parts, and its log-sum-exp: zeros and -inf if all are empty.
    """
    for name, tensor in (("outputs", outputs), ("log_sums", log_sums)):
        assert tensor.dtype == torch.float32, f"{name} must be float32, got {tensor.dtype}"
        assert tensor.is_contiguous(), f"{name} must be contiguous, got strides of {tensor.stride()}"
    assert outputs.shape[:-1] == log_sums.shape, f"got outputs of {outputs.shape} and log_sums of {log_sums.shape}"
    output, total = torch.empty_like(outputs[0]), torch.empty_like(log_sums[0])
    if total.numel():
        Library("split_kv").call(
            "merge_states", outputs, log_sums, output, total, len(outputs), total.numel(), outputs.shape[-1]
        )
    return output, total


def prefill_tiled(
    query: Tensor, kv_cache: Tensor, block_tables: Tensor, query_start_loc: Tensor, context_lens: Tensor,
    max_query_len: int, scale: float, output: Tensor,
) -> None:  # fmt: skip
    """Fill the rows of output that belong to sequences with several queries, without tensor cores: for all dtypes.

    head_dim: 32, 64, 96, 128 or 256. The other arguments: see paged_attention.
    """
    prefill("prefill_tiled", query, kv_cache, block_tables, query_start_loc, context_lens, max_query_len, scale, output)


def prefill_wmma(
    query: Tensor, kv_cache: Tensor, block_tables: Tensor, query_start_loc: Tensor, context_lens: Tensor,
    max_query_len: int, scale: float, output: Tensor,
) -> None:  # fmt: skip
    """As prefill_tiled, on tensor cores through WMMA. float16 and bfloat16; head_dim: one of WMMA_HEAD_DIMS."""
    prefill("prefill_wmma", query, kv_cache, block_tables, query_start_loc, context_lens, max_query_len, scale, output)


def prefill_mma(
    query: Tensor, kv_cache: Tensor, block_tables: Tensor, query_start_loc: Tensor, context_lens: Tensor,
    max_query_len: int, scale: float, output: Tensor,
) -> None:  # fmt: skip
    """As prefill_tiled, with FlashAttention-2's algorithm (Dao, 2023) on tensor cores. float16 and bfloat16; head_dim:
    one of MMA_HEAD_DIMS; compute capability 8.0 or later."""
    prefill("prefill_mma", query, kv_cache, block_tables, query_start_loc, context_lens, max_query_len, scale, output)


def prefill(
    name: str, query: Tensor, kv_cache: Tensor, block_tables: Tensor, query_start_loc: Tensor, context_lens: Tensor,
    max_query_len: int, scale: float, output: Tensor,
) -> None:  # fmt: skip
    """Launch a prefill kernel, unless all sequences have at most one query."""
    if max_query_len > 1:
        call(
            name, query, kv_cache, block_tables, query_start_loc, context_lens, scale, output, sizes=(max_query_len,)
        )  # fmt: skip


def call(
    name: str, query: Tensor, kv_cache: Tensor, block_tables: Tensor, query_start_loc: Tensor, context_lens: Tensor,
    scale: float, output: Tensor, workspace: tuple[Tensor, ...] = (), sizes: tuple[int, ...] = (),
) -> None:  # fmt: skip
    """Check what all kernels take for granted, and launch one. workspace, sizes: what it takes besides."""
    num_seqs, block_size, num_kv_heads = len(context_lens), kv_cache.shape[1], kv_cache.shape[3]
    num_tokens, num_heads, head_dim = query.shape
    shape = (kv_cache.shape[0], block_size, 2, num_kv_heads, head_dim)
    assert kv_cache.shape == shape, f"kv_cache is {tuple(kv_cache.shape)}: expected {shape}"
    assert num_heads % num_kv_heads == 0, f"{num_heads} query heads do not share {num_kv_heads} KV heads evenly"
    assert block_size & (block_size - 1) == 0, f"block_size must be a power of two, got {block_size}"
    assert scale > 0, f"scale must be positive, got {scale}"
    assert num_seqs <= MAX_GRID_SIZE, f"{num_seqs} sequences: a grid has room for {MAX_GRID_SIZE}"
    dtypes = (query.dtype, *CODES)
    assert query.dtype in FLOATS, f"query is {query.dtype}: expected one of {FLOATS}"
    assert kv_cache.dtype in dtypes, f"kv_cache is {kv_cache.dtype}: expected one of {dtypes}"
    assert (output.shape, output.dtype) == (query.shape, query.dtype), "output must have query's shape and dtype"
    indices = (block_tables, query_start_loc, context_lens)
    index_dtypes = {tensor.dtype for tensor in indices}
    assert index_dtypes == {torch.int32}, f"tables, starts and lengths must be int32, got {index_dtypes}"
    lengths = (len(block_tables), len(query_start_loc) - 1)
    assert lengths == (num_seqs, num_seqs), f"{num_seqs} lengths, but tables and starts for {lengths} sequences"
    is_contiguous = [tensor.is_contiguous() for tensor in (query, kv_cache, query_start_loc, context_lens, output)]
    assert all(is_contiguous), f"query, kv_cache, starts, lengths, output must be contiguous, got {is_contiguous}"
    assert block_tables.stride(1) == 1, f"rows of block_tables must be contiguous, got {block_tables.stride()}"
    addresses = [tensor.data_ptr() % VECTOR_BYTES for tensor in (query, kv_cache, output)]
    assert not any(addresses), f"query, kv_cache and output must begin at multiples of {VECTOR_BYTES} bytes"
    if num_seqs == 0 or num_tokens == 0:
        return
    Library(name).call(
        name, query, kv_cache, *indices, output, *workspace, query.dtype, kv_cache.dtype, num_seqs, num_heads,
        num_kv_heads, head_dim, block_size, block_tables.stride(0), *sizes, float(scale),
    )  # fmt: skip


def max_context_len(kv_cache: Tensor, block_tables: Tensor) -> int:
    """What the block tables have room for. The lengths themselves are on the device: reading them would wait for it."""
    return block_tables.shape[1] * kv_cache.shape[1]


@cache
def describe(device: torch.device) -> Device:
    if device.type != "cuda":
        return EMULATED_DEVICE
    properties = torch.cuda.get_device_properties(device)
    return Device((properties.major, properties.minor), properties.multi_processor_count)
