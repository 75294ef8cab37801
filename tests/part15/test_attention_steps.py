"""Two steps of attention in CUDA, each alone: how many keys a query sees, and how the parts of a context are merged."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from part15_full_architecture.worker.kernels import reference
from part15_full_architecture.worker.kernels.build import NoCompilerError, find_cxx
from part15_full_architecture.worker.kernels.cuda.attention import merge_states, prefill_tiled
from part15_full_architecture.worker.kernels.cuda.library import KernelError

LOOK_VISIBLE = "See worker/kernels/cuda/paged_cache.cuh::num_visible"
LOOK_MERGE = "See worker/kernels/cuda/split_kv.cu::merge_parts"
HEAD_DIM, BLOCK_SIZE = 32, 4


@pytest.fixture(scope="module", autouse=True)
def _compiler() -> None:
    try:
        find_cxx()
    except NoCompilerError as error:
        pytest.skip(str(error))


def num_keys_seen(query_len: int, context_len: int, num_heads: int) -> Tensor:
    """Keys that each query of a sequence sees: [query_len, num_heads].

    All keys weigh the same, the first one's value is 1, and the others' are 0: the output is 1 / the number of keys.
    """
    num_blocks = -(-context_len // BLOCK_SIZE)
    kv_cache = torch.zeros(num_blocks, BLOCK_SIZE, 2, 1, HEAD_DIM)
    kv_cache[0, 0, 1] = 1.0
    query = torch.zeros(query_len, num_heads, HEAD_DIM)
    output = torch.zeros_like(query)
    tables, starts = torch.arange(num_blocks, dtype=torch.int32)[None], torch.tensor([0, query_len], dtype=torch.int32)
    try:
        prefill_tiled(
            query, kv_cache, tables, starts, torch.tensor([context_len], dtype=torch.int32), query_len, 1.0, output
        )
    except KernelError as error:
        if "part15 num_visible" in str(error):  # the exercise is not written yet
            raise
        raise AssertionError(f"{error}. {LOOK_VISIBLE}") from error
    return 1 / output[..., 0]


@pytest.mark.parametrize("num_heads", [1, 2, 3])
@pytest.mark.parametrize(("query_len", "context_len"), [(2, 2), (5, 5), (3, 20), (40, 40), (70, 133)])
def test_a_query_sees_all_keys_up_to_its_own(query_len: int, context_len: int, num_heads: int) -> None:
    found = num_keys_seen(query_len, context_len, num_heads)
    for query in range(query_len):
        expected = context_len - query_len + query + 1
        for head in range(num_heads):
            got = float(found[query, head])
            assert math.isclose(got, expected, rel_tol=1e-4), (
                f"{query_len} new tokens in a context of {context_len}, {num_heads} query heads per KV head: new token "
                f"{query}, head {head} sees {got:.4g} keys, expected {expected}. {LOOK_VISIBLE}"
            )


def check_merged(outputs: Tensor, log_sums: Tensor, what: str) -> None:
    try:
        found, total = merge_states(outputs, log_sums)
    except KernelError as error:
        if "part15 merge_parts" in str(error):
            raise
        raise AssertionError(f"{error}. {LOOK_MERGE}") from error
    expected, expected_total = reference.merge_states(outputs, log_sums)
    for name, got, wanted in (("output", found, expected), ("log-sum-exp", total, expected_total)):
        assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-6), (
            f"{what}: the {name} is {got.flatten()[:4].tolist()}, expected {wanted.flatten()[:4].tolist()}. "
            f"{LOOK_MERGE}"
        )


def test_the_example_of_the_lesson() -> None:
    check_merged(torch.tensor([[[1.0]], [[3.0]]]), torch.tensor([[0.0], [math.log(3)]]), "1 (0) and 3 (log 3)")


def test_an_empty_part_does_not_count() -> None:
    check_merged(
        torch.tensor([[[1.0]], [[math.nan]], [[3.0]]]), torch.tensor([[0.0], [-math.inf], [math.log(3)]]),
        "the part between is empty, and its output was never written",
    )  # fmt: skip


def test_only_empty_parts_give_zero() -> None:
    check_merged(torch.full((2, 1, 3), math.nan), torch.full((2, 1), -math.inf), "all parts are empty")


@pytest.mark.parametrize("offset", [-500.0, 0.0, 500.0])
@pytest.mark.parametrize("num_parts", [2, 31, 40])
def test_many_parts(num_parts: int, offset: float) -> None:
    """More parts than lanes, and sums whose exponentials overflow."""
    generator = torch.Generator().manual_seed(num_parts)
    outputs = torch.randn(num_parts, 3, 40, generator=generator)
    log_sums = torch.randn(num_parts, 3, generator=generator) * 3 + offset
    check_merged(outputs, log_sums, f"{num_parts} parts, log-sum-exps around {offset}")
