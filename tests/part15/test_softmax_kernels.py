"""The online softmax: states that merge, in a warp and in a block, on the CPU's emulation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from part15_full_architecture.worker.kernels import reference
from part15_full_architecture.worker.kernels.build import NoCompilerError, Target, build, find_cxx
from part15_full_architecture.worker.kernels.cuda.library import KernelError, Library, only
from part15_full_architecture.worker.kernels.cuda.softmax import softmax_online
from tests.part15.sanitized_calls import SanitizedProcess

LOOK_MERGE = "See worker/kernels/cuda/softmax_online.cu::merge"
LOOK_BLOCK = "See worker/kernels/cuda/softmax_online.cu::merge_block"


@pytest.fixture(scope="module", autouse=True)
def _compiler() -> None:
    try:
        find_cxx()
    except NoCompilerError as error:
        pytest.skip(str(error))


def check(rows: torch.Tensor, look: str) -> None:
    try:
        found, expected = softmax_online(rows), reference.softmax(rows)
    except KernelError as error:
        if "part15 merge" in str(error):  # the exercise is not written yet
            raise
        raise AssertionError(f"{error}. {look}") from error
    for row in range(len(rows)):
        worst = int((found[row] - expected[row]).abs().nan_to_num(torch.inf).argmax())
        total = float(found[row].sum())
        assert torch.allclose(found[row], expected[row], rtol=1e-5, atol=1e-7), (
            f"row {row} of {rows.shape[1]} numbers: probability {worst} is {float(found[row, worst]):g}, expected "
            f"{float(expected[row, worst]):g}; all together are {total:g}. {look}"
        )


@pytest.mark.parametrize("size", [2, 4, 8, 32, 100, 128])
def test_states_of_a_warp_merge(size: int) -> None:
    """Up to 128 numbers: one warp, four numbers per lane."""
    check(torch.randn(3, size, generator=torch.Generator().manual_seed(size)) * 4, LOOK_MERGE)


def test_a_larger_maximum_rescales_the_sum() -> None:
    """The example of the lesson, in two lanes: (1, 3, …) and (5, …), and the other way around."""
    first, second = [1.0, 3.0, -torch.inf, -torch.inf], [5.0, -torch.inf, -torch.inf, -torch.inf]
    check(torch.tensor([first + second, second + first]), LOOK_MERGE)


@pytest.mark.parametrize("shift", [-1e4, -200.0, 200.0, 1e4])
def test_no_exponential_overflows(shift: float) -> None:
    """Only differences to the maximum may be exponentiated."""
    check(torch.randn(2, 64, generator=torch.Generator().manual_seed(0)) + shift, LOOK_MERGE)


def test_empty_parts_change_nothing() -> None:
    rows = torch.full((2, 64), -torch.inf)
    rows[0, 37] = 2.0
    check(rows, LOOK_MERGE)


@pytest.mark.parametrize("size", [132, 256, 300, 1_000, 4_096, 5_000])
def test_states_of_a_block_merge(size: int) -> None:
    """More than 128 numbers: several warps, up to 32."""
    check(torch.randn(2, size, generator=torch.Generator().manual_seed(size)) * 4, LOOK_BLOCK)


@pytest.mark.parametrize("size", [64, 300])
def test_a_block_with_few_warps(size: int) -> None:
    """There is room for the states of 32 warps, but only some have written theirs. No state is above these numbers."""
    check(torch.randn(2, size, generator=torch.Generator().manual_seed(size)) - 1e4, LOOK_BLOCK)


@pytest.mark.parametrize("order", ["reverse", "random:1", "random:2"])
def test_the_order_of_the_threads_does_not_matter(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_ON_CPU_ORDER", order)
    check(torch.randn(2, 1_000, generator=torch.Generator().manual_seed(3)) * 4, f"order {order}. {LOOK_BLOCK}")


@pytest.fixture(scope="module")
def thread_sanitizer() -> Iterator[SanitizedProcess]:
    process = SanitizedProcess("thread", find_cxx())
    yield process
    process.close()


@pytest.mark.slow
def test_no_barrier_is_missing(thread_sanitizer: SanitizedProcess) -> None:
    """ThreadSanitizer reports a read of shared memory that no barrier separates from the write."""
    rows = torch.randn(2, 300, generator=torch.Generator().manual_seed(4))
    output = torch.empty_like(rows)
    library = build(Library("softmax_online").source, Target("cpu", "thread", only([rows.dtype])))
    try:
        status = thread_sanitizer.call(library, "softmax_online", rows, output, rows.dtype, *rows.shape)
    except AssertionError as error:
        raise AssertionError(f"a barrier is missing. {LOOK_BLOCK}. {error}") from None
    assert status == 0, f"the launch failed with status {status}. {LOOK_BLOCK}"
    assert torch.allclose(output, reference.softmax(rows), rtol=1e-5, atol=1e-7), f"wrong probabilities. {LOOK_BLOCK}"
