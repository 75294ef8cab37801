"""core/engine_core.py and api/data_parallel_client.py: cores that need each other, scripted."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from common.errors import FieldError
from part11_expert_parallelism.api import data_parallel_client as module
from part11_expert_parallelism.config import EngineConfig
from part11_expert_parallelism.core.engine_core import EngineCore
from part11_expert_parallelism.core.executor import MultiprocExecutor
from part11_expert_parallelism.messages import (
    AbortRequests,
    CoreGroup,
    EngineCoreOutputs,
    MeasureExperts,
    PlaceExperts,
    decode_from_core,
)

LOOK_CORE = "Look at core/engine_core.py::EngineCore.run."
LOOK_EXECUTOR = "Look at core/executor.py::MultiprocExecutor.balance_experts."
LOOK_CLIENT = "Look at api/data_parallel_client.py::DataParallelClient.__init__."


class BusyEngine:
    """Has no requests, and takes dummy steps for another core."""

    has_unfinished_requests, lockstep = True, None

    def __init__(self) -> None:
        self.aborted = list[str]()

    def step(self) -> list[Any]:
        return []

    def abort_requests(self, request_ids: list[str]) -> None:
        self.aborted += request_ids


class ScriptedEngineCore(EngineCore):
    """inboxes: what each turn receives; then the process ends."""

    def receive(self) -> list[Any]:
        return next(self.inboxes)

    def stats(self) -> dict[str, float]:
        return {"num_requests_running": 0}


class Outputs:
    def __init__(self) -> None:
        self.sent = list[Any]()

    def send(self, message: bytes) -> None:
        self.sent.append(decode_from_core(message))


def test_a_core_that_takes_dummy_steps_reports_after_an_abort() -> None:
    """Else the load balancer thinks that it still has the request."""
    outputs, engine = Outputs(), BusyEngine()
    core: Any = ScriptedEngineCore(engine, None, outputs)  # type: ignore[arg-type]
    core.inboxes = itertools.chain([[], [AbortRequests(["a"])], [], []])
    with pytest.raises(StopIteration):
        core.run()
    assert engine.aborted == ["a"]
    assert outputs.sent == [EngineCoreOutputs([], {"num_requests_running": 0})], (
        f"expected one report, after the abort, got {outputs.sent}. {LOOK_CORE}"
    )


class StartingCore:
    """In the place of a CoreClient: core 0 waits for core 1, which fails after three turns."""

    num_made = num_shut_down = 0

    def __init__(self, config: EngineConfig, waits: bool, cores: CoreGroup) -> None:
        assert not waits and cores.num_cores == 2
        self.number, self.num_turns = cores.core, 0
        self.process = self
        self.pid = None
        StartingCore.num_made += 1

    def is_ready(self) -> bool:
        self.num_turns += 1
        assert self.num_turns < 10, (
            f"core {self.number} is waited for, although the other one has failed. {LOOK_CLIENT}"
        )
        if self.number == 1 and self.num_turns == 3:
            raise FieldError("num_kv_blocks", "expected less")
        return False

    def shutdown(self) -> None:
        StartingCore.num_shut_down += 1


def test_the_error_of_the_core_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CoreClient", StartingCore)
    with pytest.raises(FieldError, match="num_kv_blocks: expected less"):
        module.DataParallelClient(EngineConfig(device="cpu", data_parallel_size=2, enable_expert_parallel=True))
    assert (StartingCore.num_made, StartingCore.num_shut_down) == (2, 2), f"all must end. {LOOK_CLIENT}"


def test_nothing_moves_if_no_expert_got_a_token() -> None:
    """Between two placements, there may be only dummy steps."""
    executor: Any = MultiprocExecutor.__new__(MultiprocExecutor)
    executor.num_expert_ranks, executor.num_redundant_experts, executor.placements = 2, 0, None
    executor.ranks = Ranks([[[0, 0, 0, 0]] * 2, [[9, 5, 1, 1], [0, 0, 0, 0]]])
    assert executor.balance_experts() is None and executor.placements is None, f"nothing to go by. {LOOK_EXECUTOR}"
    assert executor.ranks.sent == [MeasureExperts()], f"got {executor.ranks.sent}. {LOOK_EXECUTOR}"
    before, after = executor.balance_experts()
    assert (before, after) == (8 / 14, 8 / 10), (
        f"experts 0 and 1 have 14 of 16 tokens, then 0 and 2 10: {before}, {after}"
    )
    assert executor.ranks.sent[-1] == PlaceExperts(executor.placements), LOOK_EXECUTOR


class Ranks:
    """loads: what the ranks answer."""

    def __init__(self, loads: list[list[list[int]]]) -> None:
        self.loads, self.sent = loads, list[Any]()

    def send(self, message: Any) -> None:
        self.sent.append(message)

    def expert_loads(self) -> list[list[int]]:
        return self.loads.pop(0)
