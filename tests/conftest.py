"""Fixtures for all parts. Nothing here touches the network."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis.internal.conjecture import providers

from tests.chromium import Browser, running_chromium
from tests.quick_uvicorn import quick_uvicorn

if TYPE_CHECKING:
    from tests.forked_servers import Host

ROOT = Path(__file__).parent
__all__ = ["browser", "host", "one_browser", "one_host", "quick_uvicorn"]

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

# The files that take longest come first: with two workers, none is left alone with one of them at the end.
SLOW = (
    "workshop/test_exercises.py", "part15/test_all_features.py", "workshop/test_failures.py",
    "part15/test_sanitizers.py", "part15/test_small_cuda_kernels.py", "part15/test_cuda_attention.py",
    "contract/test_process.py", "part15/test_emulated_features.py", "part09/test_process.py", "part11/test_process.py",
    "part09/test_ranks.py", "part09/test_torchrun.py", "contract/test_seeds.py", "contract/test_prompt_logprobs.py",
    "part10/test_fleet.py", "part13/test_process.py", "part15/test_presets.py", "part15/test_triton_operations.py",
    "part14/test_answers.py", "contract/test_contract.py", "common/test_viewer_in_a_browser.py",
)  # fmt: skip

# Hypothesis likes to draw constants that it finds in the modules loaded so far, so what a test draws would depend on
# which tests ran before it in the same process.
_no_constants = providers.Constants()
providers._get_local_constants = lambda: _no_constants


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: tests of servers and ranks wait for other processes a quarter of the time."""
    return (os.cpu_count() or 1) + 1


gc.disable()  # the many objects that imports and collection make stay, and looking through them takes half of the time


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    gc.freeze()
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {ROOT / name: place for place, name in enumerate(SLOW)}
    items.sort(key=lambda item: places.get(item.path, len(SLOW)))


@pytest.fixture(scope="session")
def one_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    from tests.forked_servers import Host

    host = Host(tmp_path_factory.mktemp("host"))
    yield host
    host.close()


@pytest.fixture
def host(one_host: Host) -> Iterator[Host]:
    """Forks servers of parts 3 and later; those that a test has started end with it."""
    yield one_host
    one_host.ask(end=True)


@pytest.fixture(scope="session")
def one_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with running_chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(one_browser: Browser) -> Iterator[Browser]:
    """The tabs that a test has opened are closed at its end."""
    yield one_browser
    one_browser.close_tabs()
