"""A server whose model is on several ranks: it drains, and ends with all its processes, however one of them ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.trace import read_trace
from part09_tensor_parallelism import config
from tests.forked_servers import GREEDY, READY, Host, is_alive, until
from tests.http_checks import COMPLETIONS
from tests.left_behind import Traces, tracing
from tests.process_checks import check_command_lines, serve
from workshop.failures.servers import children_of, command_line

PART_DIR = Path(config.__file__).parent
PART = PART_DIR.name
LOOK = 'Look at core/ranks.py::Ranks, worker/rank_process.py::run_rank and core/engine_core.py; README "When a rank is lost".'  # noqa: E501
LOOK_FLAGS = 'Look at config.py::EngineConfig and worker/model.py::check_divisible; README "Heads".'
SMALL = ["--num-threads", "1", "--num-kv-blocks", "64"]
TWO = ["--tensor-parallel-size", "2"]
NO_TRACEBACK = r"(?s)(?!.*Traceback).*"
BODY = {**GREEDY, "prompt": [6] * 10, "max_tokens": 400, "stream": True}
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for what processes leave behind in /proc")


TOO_LONG = f"""
from {PART}.config import EngineConfig
try:
    LLM(EngineConfig(device="cpu", tensor_parallel_size=2))
except OSError as error:
    print("OSError", error)
"""


@pytest.fixture
def traces() -> Iterator[Traces]:
    with tracing(PART_DIR, LOOK) as found:
        yield found


def interrupt_all(traces: Traces, pid: int) -> None:
    """As a terminal does: all processes of the server's group."""
    for each in traces.processes():
        if os.getpgid(each) == os.getpgid(pid) or os.getsid(each) == os.getsid(pid):
            os.kill(each, signal.SIGINT)


def test_it_drains_after_ctrl_c_and_leaves_a_trace_of_all_ranks(traces: Traces, tmp_path: Path) -> None:
    """As a user starts it; the servers of the other tests are forked (tests/forked_servers.py)."""
    path = tmp_path / "trace.jsonl"
    flags = ["--port", "0", "--device", "cpu", "--no-log-stats", *SMALL, *TWO, "--trace", str(path)]
    with serve(["-m", PART, *flags], READY, traces.folder / "stderr", PART_DIR.parent, traces.env, LOOK) as server:
        assert len(traces.ranks()) == 2, f"expected two ranks among {traces.processes()}. {LOOK}"
        for pid in traces.ranks():
            shared = [line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "/dev/shm" in line]
            assert not shared, f"rank process {pid} has shared memory: {shared}. {LOOK}"
        pid, body = server.process.pid, {**BODY, "max_tokens": 40}
        server.check_finishes_a_stream_after(lambda: interrupt_all(traces, pid), COMPLETIONS, body, LOOK)
        server.check_ends_after_sigterm(LOOK)
    traces.check_nothing_is_left()
    steps = read_trace(path).steps
    ranks = [[each.rank for each in step.ranks] for step in steps]
    assert ranks == [[0, 1]] * len(steps), f"every step has both ranks, got {ranks}. {LOOK}"
    counts = {len(each.collectives) for step in steps for each in step.ranks}
    assert counts == {14}, f"tiny has 14 collectives in a step, got {counts}. {LOOK}"


@pytest.mark.parametrize("who", ["engine core", "rank 1"])
def test_one_of_the_processes_is_killed(host: Host, who: str) -> None:
    """In the middle of a stream, whose client gets an error that says so. (If the API process is killed, the core ends:
    that's part 5's test.) A core that is killed leaves its fork server behind, which ends by itself."""
    flags = ["--pipeline-parallel-size", "2"] if who == "engine core" else TWO
    server = host.serve(PART, *SMALL, *flags, forks_ranks=who == "rank 1")
    ranks = server.ranks()
    with server.stream(COMPLETIONS, BODY) as response:
        chunks = response.iter_text()
        text = next(chunks)
        os.kill(server.core if who == "engine core" else ranks[1], signal.SIGKILL)
        text += "".join(chunks)
    cause = "rank 1 was killed by SIGKILL" if who == "rank 1" else "engine core has died (killed by SIGKILL)"
    assert cause in text, f"expected {cause!r} in the error, got {text[-300:]!r}. {LOOK}"
    server.check_end(1, NO_TRACEBACK, LOOK)
    assert not any(map(is_alive, ranks)), f"rank processes of {ranks} are left. {LOOK}"


def test_a_rank_is_stopped_and_nothing_is_left(host: Host) -> None:
    """It does not hear SIGTERM: the core kills it, although the server tells the core to end meanwhile."""
    server = host.serve(PART, *SMALL, *TWO, "--distributed-timeout", "4", forks_ranks=True)
    ranks = server.ranks()
    with server.stream(COMPLETIONS, BODY) as response:
        chunks = response.iter_text()
        text = next(chunks)
        os.kill(ranks[1], signal.SIGSTOP)
        text += "".join(chunks)
    named = re.search("rank 1 (has not answered for 4 s|does not answer)", text)
    assert named, f"the error names the rank, got {text[-300:]!r}. {LOOK}"
    assert server.wait() == 1, f"{server.stderr.read_text()}. {LOOK}"
    assert not any(map(is_alive, ranks)), f"rank processes of {ranks} are left. {LOOK}"
    server.check_end(1, NO_TRACEBACK, LOOK)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_the_server_is_ended_while_it_starts(host: Host, number: signal.Signals) -> None:
    """With SIGTERM, as soon as the process that forks the ranks has begun. With SIGKILL, as soon as a rank has: it is
    who removes the files then."""

    def has_begun() -> bool:
        cores = children_of(server.pid)
        forking = [pid for core in cores for pid in children_of(core) if "forkserver" in command_line(pid)]
        return bool(children_of(forking[0]) if forking and number == signal.SIGKILL else forking)

    server = host.start(PART, *SMALL, *TWO)
    until(has_begun, "the ranks to begin")
    os.kill(server.pid, number)
    expected = -number if number == signal.SIGKILL else 128 + number
    server.check_end(expected, NO_TRACEBACK, LOOK)


def test_bad_command_lines() -> None:
    check_command_lines(
        PART_DIR,
        (config.EngineConfig,),
        {
            "no ranks": (["--tensor-parallel-size", "0"], ["tensor-parallel-size", "at least 1"]),
            "no stages": (["--pipeline-parallel-size", "0"], ["pipeline-parallel-size", "at least 1"]),
            "no time": (["--distributed-timeout", "0"], ["distributed-timeout", "at least 1"]),
            "too much time": (["--distributed-timeout", "10000000000"], ["distributed-timeout", "at most 86400"]),
            "too many ranks": (["--tensor-parallel-size", "9999"], ["tensor-parallel-size", "at most 1024"]),
            "no secret": (["--distributed-secret", ""], ["distributed-secret", "at least 8 characters"]),
        },
        LOOK_FLAGS,
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tensor-parallel-size", "3"], "tensor_parallel_size: expected a divisor of num_attention_heads, 8, got 3"),
        (["--pipeline-parallel-size", "7"], "pipeline_parallel_size: expected at most num_hidden_layers, 6, got 7"),
    ],
)
def test_a_model_that_the_ranks_cannot_share(host: Host, flags: list[str], words: str) -> None:
    server = host.start(PART, *flags)
    server.check_end(2, f"{PART}: error: {words}\n", LOOK_FLAGS)


def test_a_temporary_directory_whose_name_is_too_long(traces: Traces) -> None:
    long = traces.folder / ("x" * 60)
    long.mkdir()
    command = [sys.executable, "-c", f"from {PART}.llm import LLM\n{TOO_LONG}"]
    done = subprocess.run(
        command, cwd=PART_DIR.parent, env=traces.env | {"TMPDIR": str(long)}, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.startswith("OSError cannot start rank 0") and str(long) in done.stdout, f"{done}. {LOOK}"
