"""worker/quantization/layouts.py: which groups a rank has, and what is refused."""

from __future__ import annotations

import pytest

from common.errors import FieldError
from part14_quantization.worker.quantization.layouts import group_slice
from part14_quantization.worker.quantization.scheme import Scheme
from part14_quantization.worker.weight import Part

LOOK = 'Look at worker/quantization/layouts.py::group_slice; README "Groups and ranks".'


def groups_of(columns: slice, group_size: int | None, num_columns: int = 768) -> list[int]:
    """The groups that a rank gets."""
    found = group_slice(Scheme(bits=4, group_size=group_size), Part(256, num_columns, columns=columns), "down_proj")
    return list(range(num_columns // (group_size or num_columns)))[found]


@pytest.mark.parametrize(
    ("columns", "group_size", "expected"),
    [
        (slice(None), 128, [0, 1, 2, 3, 4, 5]),
        (slice(0, 384), 128, [0, 1, 2]),
        (slice(384, 768), 128, [3, 4, 5]),
        (slice(640, 768), 128, [5]),
        (slice(192, 384), 64, [3, 4, 5]),
        (slice(0, 768), 32, list(range(24))),
    ],
)
def test_the_groups_of_a_rank(columns: slice, group_size: int, expected: list[int]) -> None:
    got = groups_of(columns, group_size)
    assert got == expected, (
        f"columns {columns.start} to {columns.stop}, in groups of {group_size}: expected groups {expected}, got {got}. "
        f"{LOOK}"
    )


@pytest.mark.parametrize("columns", [slice(None), slice(0, 384), slice(384, 768), slice(192, 384)])
def test_a_row_without_groups_has_one_scale_for_all_ranks(columns: slice) -> None:
    got = groups_of(columns, None)
    assert got == [0], f"columns {columns.start} to {columns.stop}: expected the row's only scale, got {got}. {LOOK}"


@pytest.mark.parametrize("columns", [slice(192, 384), slice(0, 192), slice(192, 512)])
def test_a_group_on_two_ranks_is_refused(columns: slice) -> None:
    """192 is in the middle of a group of 128."""
    try:
        got = groups_of(columns, 128)
    except FieldError as error:
        assert (error.field, "down_proj: columns" in str(error)) == ("tensor_parallel_size", True), f"{error}. {LOOK}"
        return
    where = f"columns {columns.start} to {columns.stop} begin or end within a group"
    raise AssertionError(f"{where}: expected an error, got {got}. {LOOK}")
