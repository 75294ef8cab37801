"""Part 3 as a user starts it: how it loads."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from part03_paged_attention import config
from tests.process_checks import check_loading_starts_no_helpers

PART_DIR = Path(config.__file__).parent


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_loading_leaves_the_processor_to_the_engines_thread() -> None:
    check_loading_starts_no_helpers(PART_DIR, "Look at __main__.py::serve and common/serve.py::single_threaded.")
