"""All features together: in rows of real engines, every pair of values that is allowed, and answers as part 1's.

The rows with emulated CUDA kernels are in test_emulated_features.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.forked_servers import Host
from tests.part15.features import Row, pairs_of
from tests.part15.rows import check_row, matrix_of, name_of, on_linux, rows_of


def test_all_pairs_are_covered() -> None:
    matrix, rows = matrix_of("cpu"), rows_of("cpu")
    allowed = matrix.allowed_pairs()
    missing = allowed - pairs_of(rows)
    print(f"{len(rows)} rows have {len(allowed)} pairs; {matrix.num_pairs - len(allowed)} pairs are refused")
    for feature, value, why in matrix.machine.left_out:
        print(f"left out: {feature}={value}, because {why}")
    assert not missing, f"no row has {sorted(missing)}. See features.py::Matrix.rows"


@on_linux
@pytest.mark.parametrize("row", [row for row in rows_of("cpu") if row["kernels"] != "cuda"], ids=name_of)
def test_row(row: Row, host: Host, tmp_path: Path) -> None:
    check_row(row, "cpu", host, tmp_path)


@pytest.mark.skipif(not rows_of("cuda"), reason="needs a GPU")
@pytest.mark.parametrize("row", rows_of("cuda"), ids=name_of)
def test_row_on_a_gpu(row: Row, host: Host, tmp_path: Path) -> None:
    """With CUDA graphs."""
    check_row(row, "cuda", host, tmp_path)
