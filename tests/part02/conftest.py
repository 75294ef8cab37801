"""One engine for all tests of part 2: loading it costs more than most tests."""

from __future__ import annotations

import pytest
import torch

from part02_streaming.config import EngineConfig
from part02_streaming.engine import LLM

__all__ = ["llm"]
torch.set_num_threads(1)  # for models this small a second thread only waits; on a busy machine it waits long


@pytest.fixture(scope="session")
def llm() -> LLM:
    """The shipped model on the CPU, in float32."""
    return LLM(EngineConfig(model="tiny", device="cpu"))
