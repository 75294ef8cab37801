"""The exercises of part 3: markers in the code, and for each a task with hints and a test."""

from __future__ import annotations

from pathlib import Path

import pytest

from part03_paged_attention import config
from tests.exercise_checks import check_body, check_names, check_task, read_tasks

PART_DIR = Path(config.__file__).parent
NAMES = {"grow", "slot_mapping", "online_softmax", "form_batch", "grow_batch"}


def test_part_3_has_its_exercises() -> None:
    check_names(PART_DIR, NAMES)


@pytest.mark.parametrize("name", sorted(read_tasks(PART_DIR)))
def test_an_exercise_has_a_task(name: str) -> None:
    check_task(PART_DIR, name)


@pytest.mark.parametrize("name", sorted(read_tasks(PART_DIR)))
def test_an_exercise_is_the_body_of_the_function_it_names(name: str) -> None:
    check_body(PART_DIR, name)
