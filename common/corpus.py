"""Texts that ship with the course: to calibrate quantization on, and to measure it with (models/training/texts.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from common.errors import FieldError

TEXTS_DIR = Path(__file__).parent / "texts"


Pieces = list[tuple[str, bool]]  # of a text, and whether a model is to predict each


def calibration_texts() -> list[Pieces]:
    return _read("calibration")


def held_out_texts() -> list[Pieces]:
    """Texts of the same kinds as the calibration texts, and none of these, though single sentences may be the same."""
    return _read("held_out")


def questions() -> list[tuple[str, str]]:
    """Questions that `tiny` was trained on, and the answers that it learned."""
    return [(line["question"], line["answer"]) for line in _read("questions")]


def encode_text(text: Pieces, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """The tokens of a text, and whether a model is to predict each."""
    token_ids, is_target = list[int](), list[bool]()
    for piece, is_predicted in text:
        ids = tokenizer.encode(piece, add_special_tokens=False)
        token_ids += ids
        is_target += [is_predicted] * len(ids)
    return token_ids, is_target


def calibration_rows(
    tokenizer: PreTrainedTokenizerBase, row_tokens: int, max_rows: int | None = None
) -> list[list[int]]:
    """The tokens of the calibration texts, one text after the other, cut into rows of row_tokens. What is left at the
    end is dropped. Raises FieldError if the texts don't fill a row."""
    token_ids = list[int]()
    for text in calibration_texts():
        token_ids += encode_text(text, tokenizer)[0]
        if max_rows is not None and len(token_ids) >= max_rows * row_tokens:
            break  # encoding the rest takes a tenth of a second
    rows = [token_ids[start : start + row_tokens] for start in range(0, len(token_ids) - row_tokens + 1, row_tokens)]
    if not rows:
        raise FieldError("row_tokens", f"expected at most {len(token_ids)}, got {row_tokens}: the texts have no more")
    return rows[:max_rows]


def _read(name: str) -> list[Any]:
    with (TEXTS_DIR / f"{name}.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
