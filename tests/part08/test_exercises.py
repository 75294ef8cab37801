"""The exercises of part 8: markers in the code, and for each a task with hints and a test."""

from __future__ import annotations

from pathlib import Path

import pytest

from part08_speculative_decoding.core import scheduler
from tests.exercise_checks import check_body, check_names, check_task, read_tasks

PART_DIR = Path(scheduler.__file__).parents[1]
NAMES = {"extend", "propose", "rejection_sample", "num_tokens", "verified", "append"}


def test_part_8_has_its_exercises() -> None:
    check_names(PART_DIR, NAMES)


@pytest.mark.parametrize("name", sorted(read_tasks(PART_DIR)))
def test_an_exercise_has_a_task(name: str) -> None:
    check_task(PART_DIR, name)


@pytest.mark.parametrize("name", sorted(read_tasks(PART_DIR)))
def test_an_exercise_is_the_body_of_the_function_it_names(name: str) -> None:
    check_body(PART_DIR, name)
