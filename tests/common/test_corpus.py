"""The calibration text."""

from __future__ import annotations

from common.checkpoint import load_tokenizer, resolve_checkpoint
from common.corpus import calibration_rows


def test_some_rows_are_the_first_of_all_rows() -> None:
    """Only as much text is encoded as they need."""
    tokenizer = load_tokenizer(resolve_checkpoint("tiny"))
    rows = calibration_rows(tokenizer, 1_000)
    for count in (1, 7, len(rows), len(rows) + 1):
        found = calibration_rows(tokenizer, 1_000, count)
        assert found == rows[:count], f"{count} rows are not the first of {len(rows)}. See corpus.py::calibration_rows."
