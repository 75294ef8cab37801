"""core/ranks.py and worker/rank_process.py: ranks in real processes, and what happens when one is lost."""

from __future__ import annotations

import functools
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from common.errors import FieldError
from common.sampling_params import SamplingParams
from part09_tensor_parallelism.config import EngineConfig
from part09_tensor_parallelism.core.executor import MultiprocExecutor
from part09_tensor_parallelism.core.ranks import RankDied
from part09_tensor_parallelism.llm import LLM
from part09_tensor_parallelism.messages import RankFailed
from part09_tensor_parallelism.worker import rank_process
from tests.part09.faulty_rank import run_faulty_rank

LOOK = 'Look at core/ranks.py::Ranks; README "When a rank is lost".'
FORKSERVER: Any = multiprocessing.forkserver._forkserver  # type: ignore[attr-defined]
TIMEOUT_S = 4  # distributed_timeout where a rank hangs
PROMPT, GREEDY = [5] * 7, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After each test, no process and no file of a rank is left."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    alive = [process.name for process in multiprocessing.active_children()]
    assert not alive, f"processes {alive} are left. {LOOK}"
    assert not list(tmp_path.glob("llm-*")), f"left: {list(tmp_path.iterdir())}. {LOOK}"


@pytest.fixture
def make_llm() -> Iterator[Callable[..., LLM]]:
    made: list[LLM] = []

    def make(**flags: Any) -> LLM:
        made.append(LLM(EngineConfig(**{"tensor_parallel_size": 2, "num_kv_blocks": 64, "num_threads": 1, **flags})))
        return made[-1]

    yield make
    for llm in made:
        llm.engine.shutdown()


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """fault("1:3:killed"): rank 1 is killed in its third step."""

    def set_fault(text: str) -> None:
        monkeypatch.setattr(rank_process, "run_rank", functools.partial(run_faulty_rank, text))

    return set_fault


def message_of(rank: int, what: str) -> str:
    return {
        "killed": f"rank {rank} was killed by SIGKILL",
        "stopped": f"rank {rank} (has not answered for {TIMEOUT_S} s|does not answer, .* waiting {TIMEOUT_S}000ms)",
        "failing": f"rank {rank}: ZeroDivisionError: the cat sat on the rank",
        "hanging": f"a step has not ended for {TIMEOUT_S} s .* rank {rank} is behind",
    }[what]


@pytest.mark.parametrize(
    ("rank", "step", "what"),
    [(0, 2, "killed"), (1, 1, "killed"), (1, 3, "killed"), (1, 3, "stopped"), (1, 3, "failing"), (1, 3, "hanging")],
)
def test_a_rank_is_lost_in_a_step(
    make_llm: Callable[..., LLM], fault: Callable[[str], None], rank: int, step: int, what: str
) -> None:
    """The error names the rank, and what comes later gets it too."""
    fault(f"{rank}:{step}:{what}")
    llm = make_llm(distributed_timeout=TIMEOUT_S)
    for _ in range(2):
        with pytest.raises(RankDied, match=message_of(rank, what)):
            llm.generate([PROMPT] * 3, GREEDY)


def test_a_stage_is_lost(make_llm: Callable[..., LLM], fault: Callable[[str], None]) -> None:
    """The other one waits for its hidden states."""
    fault("1:3:killed")
    llm = make_llm(tensor_parallel_size=1, pipeline_parallel_size=2)
    with pytest.raises(RankDied, match=message_of(1, "killed")):
        llm.generate([PROMPT] * 3, GREEDY)


@pytest.mark.parametrize("where", ["start", "load"])
@pytest.mark.parametrize("what", ["killed", "stopped", "failing"])
def test_a_rank_is_lost_before_the_first_step(
    make_llm: Callable[..., LLM], fault: Callable[[str], None], where: str, what: str
) -> None:
    """(A rank may load for as long as it answers pings.)"""
    fault(f"1:{where}:{what}")
    words = {
        "stopped": "does not answer" if where == "load" else "1 of 2 ranks have come within",
        "failing": "rank 1 ended with status 1" if where == "start" else message_of(1, what),
    }.get(what, message_of(1, what))
    with pytest.raises(OSError, match=words):
        make_llm(distributed_timeout=TIMEOUT_S)


def test_a_rank_is_lost_between_requests(make_llm: Callable[..., LLM]) -> None:
    llm = make_llm()
    executor = llm.engine.executor
    assert isinstance(executor, MultiprocExecutor)
    llm.generate([PROMPT], GREEDY)
    os.kill(executor.ranks.processes[1].pid or 0, signal.SIGKILL)
    with pytest.raises(RankDied, match="rank 1 was killed by SIGKILL"):
        llm.generate([PROMPT], GREEDY)


def test_a_rank_that_is_silent_when_a_collective_fails(make_llm: Callable[..., LLM]) -> None:
    """As one on another machine is that has died: it isn't known how long it has been silent."""
    executor = make_llm().engine.executor
    assert isinstance(executor, MultiprocExecutor)
    os.kill(executor.ranks.processes[1].pid or 0, signal.SIGSTOP)
    failed = RankFailed(rank=0, field=None, message="connection closed by peer", is_collective=True)
    got = str(executor.ranks._find_cause(failed))
    assert got == "rank 1 does not answer, and on rank 0: connection closed by peer", f"got {got!r}. {LOOK}"


def test_the_fork_server_is_lost(make_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch) -> None:
    """While it starts a rank, and later: the next engine has a new one."""
    real = FORKSERVER.ensure_running

    def stopped_and_then_killed() -> None:
        real()
        os.kill(FORKSERVER._forkserver_pid, signal.SIGSTOP)  # so that it accepts the connection, and doesn't answer
        threading.Timer(0.2, os.kill, (FORKSERVER._forkserver_pid, signal.SIGKILL)).start()

    with monkeypatch.context() as patch:
        patch.setattr(FORKSERVER, "ensure_running", stopped_and_then_killed)
        with pytest.raises(OSError, match="cannot start rank 0: .*; TMPDIR is "):
            make_llm()
    llm = make_llm()
    llm.generate([PROMPT], GREEDY)
    os.kill(FORKSERVER._forkserver_pid, signal.SIGKILL)
    with pytest.raises(RankDied, match="or the fork server was killed"):
        llm.generate([PROMPT], GREEDY)


def test_the_processes_end_with_the_engine(make_llm: Callable[..., LLM]) -> None:
    llm = make_llm()
    executor = llm.engine.executor
    assert isinstance(executor, MultiprocExecutor)
    processes = executor.ranks.processes
    assert [process.is_alive() for process in processes] == [True, True]
    for _ in range(2):  # a second call does nothing
        llm.engine.shutdown()
    assert [process.is_alive() for process in processes] == [False, False], f"{LOOK}"


@pytest.mark.parametrize(
    ("flags", "field", "words"),
    [
        (dict(tensor_parallel_size=3), "tensor_parallel_size", "a divisor of num_attention_heads, 8, got 3"),
        (dict(tensor_parallel_size=16), "tensor_parallel_size", "a divisor of num_attention_heads, 8, got 16"),
        (dict(pipeline_parallel_size=7), "pipeline_parallel_size", "at most num_hidden_layers, 6, got 7"),
        (dict(tensor_parallel_size=2, num_kv_blocks=10**9), "num_kv_blocks", "rank"),
    ],
)
def test_a_model_that_the_ranks_cannot_share(
    make_llm: Callable[..., LLM], flags: dict[str, int], field: str, words: str
) -> None:
    with pytest.raises(FieldError, match=words) as caught:
        make_llm(**flags)
    assert caught.value.field == field
