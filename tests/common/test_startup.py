"""common/startup.py: no collections while a process starts, and then again."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from common import startup

LOOK = "Look at common/startup.py."


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    gc.enable()
    gc.unfreeze()


def test_no_collections_until_the_process_is_ready() -> None:
    startup.begin()
    assert not gc.isenabled(), f"after begin(). {LOOK}"
    startup.end()
    assert gc.isenabled() and gc.get_freeze_count(), f"after end(): {gc.get_freeze_count()} objects are frozen. {LOOK}"


def test_what_was_not_begun_does_not_end() -> None:
    """An engine in another program, such as a test, must not freeze what is garbage there."""
    startup.end()
    assert not gc.get_freeze_count(), LOOK
