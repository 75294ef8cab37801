"""common/memory.py: how many KV blocks fit, and what the largest step needs on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from common.errors import FieldError
from common.memory import check_memory, num_blocks_in, peak_memory

LOOK = "Look at common/memory.py::num_blocks_in."


@pytest.mark.parametrize(
    ("num_bytes", "expected"), [(2_000, 2), (2_999, 2), (3_000, 3), (1_000_000, 1_000), (123_456, 123)]
)  # fmt: skip
def test_num_blocks_in(num_bytes: int, expected: int) -> None:
    got = num_blocks_in(num_bytes, 1_000, "kv_cache_memory")
    assert got == expected, (
        f"blocks of 1,000 bytes in {num_bytes:,}: expected {expected} (whole ones), got {got}. {LOOK}"
    )


@pytest.mark.parametrize("num_bytes", [0, 999, 1_000, 1_999])
@pytest.mark.parametrize("field", ["kv_cache_memory", "gpu_memory_utilization"])
def test_a_budget_of_fewer_than_two_blocks(num_bytes: int, field: str) -> None:
    """A single block would be the null block."""
    with pytest.raises(FieldError) as caught:
        num_blocks_in(num_bytes, 1_000, field)
    message = str(caught.value)
    assert caught.value.field == field, f"expected the error to name {field}, got {caught.value.field}. {LOOK}"
    for part in (f"{num_bytes:,}", f"{num_bytes // 1_000} blocks", "1,000 bytes", "expected at least 2"):
        assert part in message, f"{num_bytes} bytes: the message must say {part!r}, got {message!r}. {LOOK}"


def test_peak_memory_counts_the_largest_step_and_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1,000 bytes torch holds 330, of which the largest step used 300; 620 are free, so 50 belong to others."""
    calls: list[str] = []

    def record(name: str, result: object = None) -> Callable[[object], object]:
        return lambda device=None: (calls.append(name), result)[1]

    for name, result in (
        ("reset_peak_memory_stats", None),
        ("mem_get_info", (620, 1_000)),
        ("memory_reserved", 330),
        ("max_memory_allocated", 300),
        ("empty_cache", None),
    ):
        monkeypatch.setattr(torch.cuda, name, record(name, result))
    got = peak_memory("cuda:0", lambda: calls.append("the largest step"))
    look = f"Look at common/memory.py::peak_memory; it called {calls}."
    assert got == 350, f"expected 300 + 50 bytes, got {got}. {look}"
    assert calls[:2] == ["reset_peak_memory_stats", "the largest step"], f"the step must run after the reset. {look}"
    assert calls[-1] == "empty_cache", f"the step's memory must be freed. {look}"


def test_more_memory_than_there_is() -> None:
    check_memory("max_num_seqs", 5, 10**6, "cpu")
    with pytest.raises(FieldError, match=r"^max_num_seqs: 1,000,000 needs 1,000,000,000,000,000 bytes, and cpu has \d"):
        check_memory("max_num_seqs", 10**6, 10**15, "cpu")
