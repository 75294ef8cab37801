"""A server whose cores share experts ends with all its processes, whichever of them is lost."""

from __future__ import annotations

import operator
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from part11_expert_parallelism import config
from tests.forked_servers import GREEDY, READY, ForkedServer, Host, until
from tests.http_checks import COMPLETIONS
from tests.left_behind import Traces, tracing
from tests.process_checks import check_command_lines, serve
from workshop.failures.servers import children_of

PART_DIR = Path(config.__file__).parent
PART = PART_DIR.name
LOOK = 'Look at core/ranks.py::Ranks, core/engine_core.py::EngineCore and core/lockstep.py; README "Cores in step".'
FLAGS = ["--num-threads", "1", "--num-kv-blocks", "64", "--model", "tiny-moe", "--data-parallel-size", "2",
         "--enable-expert-parallel"]  # fmt: skip
NO_TRACEBACK = r"(?s)(?!.*Traceback).*"
BODY = {**GREEDY, "model": "tiny-moe", "prompt": [6] * 10, "max_tokens": 400, "stream": True}
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for what processes leave behind in /proc")


@pytest.fixture
def traces() -> Iterator[Traces]:
    with tracing(PART_DIR, LOOK) as found:
        yield found


def all_ranks(server: ForkedServer) -> list[int]:
    """Those of both cores."""
    cores = children_of(server.pid)
    return [rank for core in cores for rank in children_of(core)]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_is_killed_while_tokens_travel(host: Host, victim: int) -> None:
    """One core has a request, the other takes dummy steps. A rank of either is killed in the middle of a stream."""
    server = host.serve(PART, *FLAGS, forks_ranks=True)
    ranks = all_ranks(server)
    assert len(ranks) == 2, f"expected a rank for each core, got {ranks}. {LOOK}"
    with server.stream(COMPLETIONS, BODY) as response:
        chunks = response.iter_text()
        text = next(chunks)
        os.kill(ranks[victim], signal.SIGKILL)
        text += "".join(chunks)
    assert re.search(r"core [01], rank 0 was killed by SIGKILL", text) and '"error"' in text, (
        f"expected an error that names the rank and its core, got {text[-300:]!r}. {LOOK}"
    )
    server.check_end(1, NO_TRACEBACK, LOOK)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_the_server_is_ended_while_it_starts(host: Host, number: signal.Signals) -> None:
    """When the ranks of both cores look for each other."""
    server = host.start(PART, *FLAGS, forks_ranks=True)
    until(lambda: len(all_ranks(server)) == 2, "the ranks to begin")
    assert list(server.temporary.glob("llm-cores-*")), f"expected a folder that both cores know. {LOOK}"
    os.kill(server.pid, number)
    server.check_end(-number if number == signal.SIGKILL else 128 + number, NO_TRACEBACK, LOOK)


def test_it_comes_to_rest_and_drains(traces: Traces) -> None:
    """After the last request, all cores stop: their ranks use no processor time. After SIGTERM in the middle of a
    stream, they go on until it ends. As a user starts it; the servers of the other tests are forked."""
    ready = READY.replace(r"(?P<core>\d+)", r"(?P<cores>[\d, ]+)")
    command = ["-m", PART, "--port", "0", "--device", "cpu", "--no-log-stats", *FLAGS]
    with serve(command, ready, traces.folder / "stderr", PART_DIR.parent, traces.env, LOOK) as server:
        with server.stream(COMPLETIONS, {**BODY, "max_tokens": 5}) as response:
            response.read()

        def ticks() -> list[int]:
            stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in traces.ranks()]
            return [int(each[11]) + int(each[12]) for each in stats]

        def is_at_rest() -> bool:
            before = ticks()
            time.sleep(0.5)  # dozens of steps, which take all of a core; an idle rank wakes up a few times
            return max(map(operator.sub, ticks(), before)) <= 5

        until(is_at_rest, f"the ranks to come to rest. {LOOK}")
        pid = server.process.pid
        server.check_finishes_a_stream_after(
            lambda: os.kill(pid, signal.SIGTERM), COMPLETIONS, {**BODY, "max_tokens": 40}, LOOK
        )
        server.check_ends_after_sigterm(LOOK)
    traces.check_nothing_is_left()


def test_bad_command_lines() -> None:
    tp, ep, copies = ["--tensor-parallel-size", "2"], "--enable-expert-parallel", "--num-redundant-experts"
    check_command_lines(
        PART_DIR,
        (config.EngineConfig,),
        {
            "one rank": ([ep], ["enable-expert-parallel", "several ranks"]),
            "halves without experts": ([*tp, "--enable-dbo"], ["enable-dbo", "enable_expert_parallel"]),
            "balancing without experts": ([*tp, "--enable-eplb"], ["enable-eplb", "enable_expert_parallel"]),
            "copies that are never placed": ([*tp, ep, copies, "2"], ["num-redundant-experts", "enable_eplb"]),
            "stages of one rank": ([ep, "--pipeline-parallel-size", "2"], ["enable-expert-parallel", "several ranks"]),
            "balancing over stages": (
                [*tp, ep, "--enable-eplb", "--pipeline-parallel-size", "2"],
                ["enable-eplb", "one pipeline stage"],
            ),
            "too many copies": (
                [*tp, ep, "--enable-eplb", copies, "9999"],
                ["num-redundant-experts", "at most 1024"],
            ),
            "no interval": (["--eplb-step-interval", "0"], ["eplb-step-interval", "at least 1"]),
            "stages and cores": (
                [ep, "--data-parallel-size", "2", "--pipeline-parallel-size", "2"],
                ["enable-expert-parallel", "one pipeline stage"],
            ),
        },
        LOOK,
    )
