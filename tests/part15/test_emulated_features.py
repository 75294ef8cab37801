"""The rows of test_all_features.py in which CUDA kernels run on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.forked_servers import Host
from tests.part15.features import Row
from tests.part15.references import quantized
from tests.part15.rows import check_row, has_cxx, name_of, on_linux, rows_of
from tests.part15.running import prompts

pytestmark = [on_linux, pytest.mark.skipif(not has_cxx(), reason="there is no C++ compiler: g++ or clang++")]
NUMBERS = (("as they are", "as it is"), ("int8", "int8"), ("int4", "fp8"), ("fp8", "as it is"))


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """All kernels, for all types of numbers, once: else each rank of a row would compile them."""
    for weights, kv_cache in NUMBERS:
        quantized("tiny-moe", weights, kv_cache, (("kernels", "cuda"),)).greedy(prompts()[0], 2)


@pytest.mark.parametrize("row", [row for row in rows_of("cpu") if row["kernels"] == "cuda"], ids=name_of)
def test_row(row: Row, host: Host, tmp_path: Path) -> None:
    check_row(row, "cpu", host, tmp_path)
