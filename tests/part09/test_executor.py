"""core/executor.py: what the engine makes of the ranks' answers. The ranks are scripted."""

from __future__ import annotations

from typing import Any

import pytest

from common.errors import FieldError
from part09_tensor_parallelism.config import EngineConfig
from part09_tensor_parallelism.core import executor as executors
from part09_tensor_parallelism.core.executor import MultiprocExecutor, UniProcExecutor, make_executor
from part09_tensor_parallelism.core.ranks import RankDied
from part09_tensor_parallelism.messages import (
    AllocateCache,
    CacheAllocated,
    RankLoaded,
    RankTimes,
    StepInput,
    StepOutput,
)

LOOK = 'Look at core/executor.py::MultiprocExecutor; README "One step on all ranks".'
CONFIG = EngineConfig(device="cpu", tensor_parallel_size=2, num_threads=1)


def loaded(rank: int, num_blocks: int = 100, fingerprint: str = "a") -> RankLoaded:
    return RankLoaded(
        rank=rank, num_blocks=num_blocks, fingerprint=fingerprint, num_layers=6, num_heads=4, num_kv_heads=2,
        num_parameters=10, num_bytes_read=20, kv_bytes_per_token=30,
    )  # fmt: skip


class ScriptedRanks:
    """In the place of Ranks: answers what it is told to, and notes what it is asked."""

    def __init__(self, answers: list[RankLoaded], error: RankDied | None = None) -> None:
        self.answers, self.error = answers, error
        self.sent: list[Any] = []
        self.outputs: list[StepOutput] = []
        self.num_shutdowns = 0
        self.has_directory = True

    def __call__(self, *args: Any) -> ScriptedRanks:
        return self

    def all_results(self, kind: type[Any]) -> list[Any]:
        if self.error is not None:
            raise self.error
        return self.answers if kind is RankLoaded else [CacheAllocated(each.rank) for each in self.answers]

    def send(self, message: Any) -> None:
        self.sent.append(message)

    def result(self) -> StepOutput:
        return self.outputs.pop(0)

    def times(self) -> list[RankTimes]:
        return [RankTimes(rank, 1.0, 2.0, []) for rank in range(2)]

    def remove_directory(self) -> None:
        self.has_directory = False

    def shutdown(self) -> None:
        self.num_shutdowns += 1


def executor_over(monkeypatch: pytest.MonkeyPatch, ranks: ScriptedRanks, config: EngineConfig = CONFIG) -> Any:
    monkeypatch.setattr(executors, "Ranks", ranks)
    return make_executor(config)


def test_the_smallest_rank_decides_how_many_blocks_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = ScriptedRanks([loaded(1, num_blocks=70), loaded(0, num_blocks=90)])  # in the order of their arrival
    executor = executor_over(monkeypatch, ranks)
    assert isinstance(executor, MultiprocExecutor)
    assert executor.num_blocks == 70, f"ranks have room for 90 and 70 blocks, got {executor.num_blocks}. {LOOK}"
    assert ranks.sent == [AllocateCache(70)], f"all ranks are told, got {ranks.sent}. {LOOK}"
    assert [each.rank for each in executor.ranks_loaded] == [0, 1], f"in order, got {executor.ranks_loaded}. {LOOK}"
    assert not ranks.has_directory, f"all are connected: nothing of the sockets may stay behind. {LOOK}"


def test_ranks_with_different_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = ScriptedRanks([loaded(0), loaded(1, fingerprint="b")])
    with pytest.raises(FieldError, match="the weights of rank 1 differ from those of rank 0") as caught:
        executor_over(monkeypatch, ranks)
    assert caught.value.field == "model" and ranks.num_shutdowns == 1, f"{caught.value.field}. {LOOK}"


@pytest.mark.parametrize("field", [None, "block_size"])
def test_a_rank_that_is_lost_at_the_start(monkeypatch: pytest.MonkeyPatch, field: str | None) -> None:
    """The processes end, and the error is one that ends the server with one line."""
    ranks = ScriptedRanks([], RankDied("rank 1: oh no", field))
    kind = OSError if field is None else FieldError
    with pytest.raises(kind, match="rank 1: oh no"):
        executor_over(monkeypatch, ranks)
    assert ranks.num_shutdowns == 1, f"the other ranks still run. {LOOK}"


@pytest.mark.parametrize("trace", [None, "a file"])
def test_a_step_goes_to_all_ranks_and_one_answers(monkeypatch: pytest.MonkeyPatch, trace: str | None) -> None:
    config = EngineConfig(device="cpu", tensor_parallel_size=2, trace=trace)
    ranks = ScriptedRanks([loaded(0), loaded(1)])
    executor = executor_over(monkeypatch, ranks, config)
    steps, outputs = (
        [StepInput([], []) for _ in range(2)],
        [StepOutput([[number]], [None], [[]]) for number in range(2)],
    )
    handles = [executor.launch(step) for step in steps]
    assert ranks.sent[1:] == steps, f"both steps are sent before any result is read, got {ranks.sent}. {LOOK}"
    ranks.outputs += outputs
    assert [handle.result().token_ids for handle in handles] == [[[0]], [[1]]], f"in their order. {LOOK}"
    num_ranks = [len(output.ranks) for output in outputs]
    assert num_ranks == ([0, 0] if trace is None else [2, 2]), f"times of the ranks: {num_ranks}. {LOOK}"
    executor.shutdown()
    assert ranks.num_shutdowns == 1


def test_one_rank_needs_no_process() -> None:
    executor = make_executor(
        EngineConfig(device="cpu", num_threads=1, num_kv_blocks=8, max_model_len=64, max_num_batched_tokens=64)
    )
    assert isinstance(executor, UniProcExecutor) and executor.num_blocks == 8
