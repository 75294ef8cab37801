"""The line of statistics in the log, on a clock that only the tests move."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from common.openai_app import AppOptions, create_app
from common.openai_app.metrics import Metrics
from common.openai_app.stats_log import INTERVAL_S, StatsLog, format_stats
from common.serve import ServerConfig
from tests.common.openai_fakes import FakeEngine, Server, serving
from tests.http_checks import CHAT

LOOK = "Look at common/openai_app/stats_log.py."
TICK_S = 0.125  # a binary fraction, so that sums are exact


@dataclass
class Clocked:
    """A log over stats that a test sets, and a clock that ticks about as often as the server does."""

    caplog: pytest.LogCaptureFixture
    stats: dict[str, float] = field(default_factory=dict)
    now_s: float = 1_000.0

    def __post_init__(self) -> None:
        self.metrics = Metrics(lambda: self.stats)
        self.log = StatsLog(self.metrics)

    def add(self, num_prompt_tokens: int = 0, num_tokens: int = 0) -> None:
        self.metrics.prompt_tokens.inc(num_prompt_tokens)
        self.metrics.generation_tokens.inc(num_tokens)

    def run(self, seconds: float) -> list[str]:
        """The lines of so many seconds."""
        self.caplog.clear()
        for _ in range(round(seconds / TICK_S)):
            self.log.tick(self.now_s)
            self.now_s += TICK_S
        return [record.getMessage() for record in self.caplog.records]


@pytest.fixture
def clocked(caplog: pytest.LogCaptureFixture) -> Iterator[Clocked]:
    return Clocked(caplog)


def test_nothing_without_activity(clocked: Clocked) -> None:
    assert clocked.run(60) == [], f"no request has come. {LOOK}"


def test_a_line_each_interval_then_one_that_is_idle_then_silence(clocked: Clocked) -> None:
    clocked.run(3)
    clocked.add(50, 100)
    assert clocked.run(INTERVAL_S) == [], f"the interval begins with the first tokens. {LOOK}"
    assert clocked.run(1) == ["prompt 5 tok/s, generation 10 tok/s"], f"50 and 100 tokens in 10 s. {LOOK}"
    clocked.add(0, 200)
    assert clocked.run(INTERVAL_S) == ["prompt 0 tok/s, generation 20 tok/s"], f"200 more tokens in 10 s. {LOOK}"
    idle = ["prompt 0 tok/s, generation 0 tok/s"]
    assert clocked.run(INTERVAL_S) == idle, f"one line says that the engine is idle. {LOOK}"
    assert clocked.run(100) == [], f"the engine is idle: silence. {LOOK}"
    clocked.add(10, 20)
    assert clocked.run(INTERVAL_S + 1) == ["prompt 1 tok/s, generation 2 tok/s"], f"active again. {LOOK}"


def test_a_short_run_says_nothing(clocked: Clocked) -> None:
    """As a served process in a test, whose stderr must stay empty."""
    clocked.run(500)
    clocked.add(5, 5)
    assert clocked.run(INTERVAL_S - 1) == [], f"it ended within an interval of its first request. {LOOK}"


@pytest.mark.parametrize("name", ["num_requests_running", "num_requests_waiting"])
def test_unfinished_requests_are_activity(clocked: Clocked, name: str) -> None:
    """Also while no token comes: a stuck engine must be seen."""
    clocked.stats = {name: 1}
    assert len(clocked.run(3 * INTERVAL_S + 1)) == 3, f"{name}=1: expected a line each interval. {LOOK}"
    clocked.stats = {name: 0}
    assert len(clocked.run(3 * INTERVAL_S)) == 1, f"{name}=0: expected one last line. {LOOK}"


def test_a_late_tick_divides_by_the_time_that_has_passed(clocked: Clocked) -> None:
    clocked.add(0, 1)
    clocked.run(TICK_S)
    clocked.add(0, 999)
    clocked.now_s += 50 - TICK_S
    assert clocked.run(TICK_S) == ["prompt 0 tok/s, generation 20 tok/s"], f"1,000 tokens in 50 s. {LOOK}"


def test_what_the_line_says() -> None:
    before = {
        "prompt_tokens": 100, "generation_tokens": 1_000, "prefix_cache_queries": 1_000, "prefix_cache_hits": 1_000,
        "spec_decode_num_draft_tokens": 5, "spec_decode_num_accepted_tokens": 0,
    }  # fmt: skip
    after = {
        "num_requests_running": 3, "num_requests_waiting": 1, "kv_cache_usage_perc": 0.42, "num_preemptions": 7,
        "prompt_tokens": 4_220, "generation_tokens": 1_870, "prefix_cache_queries": 2_000, "prefix_cache_hits": 1_613,
        "spec_decode_num_drafts": 40, "spec_decode_num_draft_tokens": 105, "spec_decode_num_accepted_tokens": 71,
    }  # fmt: skip
    expected = (
        "Running: 3 reqs, Waiting: 1 reqs, prompt 412 tok/s, generation 87 tok/s, KV cache 42.0%, "
        "prefix hit 61.3%, draft acceptance 71%"
    )
    assert format_stats(before, after, 10) == expected, LOOK
    # A part of the line needs a number that the engine has, and a share needs a whole.
    parts = {name: after[name] for name in ("prompt_tokens", "generation_tokens", "kv_cache_usage_perc")}
    assert format_stats(before, parts, 10) == "prompt 412 tok/s, generation 87 tok/s, KV cache 42.0%", LOOK
    nothing_new = {**parts, "prefix_cache_queries": 1_000, "prefix_cache_hits": 1_000}
    assert "prefix hit" not in format_stats(before, nothing_new, 10), f"no prompt was looked up. {LOOK}"


def test_the_counters_are_those_of_metrics(engine: FakeEngine, caplog: pytest.LogCaptureFixture) -> None:
    with serving(engine, AppOptions(log_stats=True)) as server:
        tick = server.app.state.log_stats
        tick(0.0)
        num_prompt_tokens, num_tokens = ask(server)
        for now_s in (1.0, 2.0):
            tick(now_s + INTERVAL_S)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "common.openai_app.stats_log"]
    # The engine's gauge says that 3 requests run, so the first interval begins at 0.
    rates = f"prompt {num_prompt_tokens / 11:.0f} tok/s, generation {num_tokens / 11:.0f} tok/s"
    assert line == f"Running: 3 reqs, {rates}, KV cache 25.0%", f"got {line!r}. {LOOK}"


def ask(server: Server) -> tuple[int, int]:
    """Some tokens, as the responses count them."""
    usages = [server.whole(CHAT, max_tokens=20)["usage"] for _ in range(5)]
    return sum(each["prompt_tokens"] for each in usages), sum(each["completion_tokens"] for each in usages)


def test_who_gets_the_line(engine: FakeEngine) -> None:
    """serve_app calls app.state.log_stats; running_app, which tests and benchmarks use, does not."""
    wanted = [AppOptions.from_config(ServerConfig(log_stats=flag)) for flag in (True, False)] + [AppOptions()]
    found = [hasattr(create_app(engine, options).state, "log_stats") for options in wanted]
    assert found == [True, False, False], f"--log-stats, --no-log-stats, no options: got {found}. {LOOK}"


def test_the_logger_shows_info_where_nothing_is_set_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("common.openai_app.stats_log")
    for name, value in (("handlers", []), ("propagate", False)):  # as in a process without logging.basicConfig
        monkeypatch.setattr(logger, name, value)
    metrics = Metrics(lambda: {})
    logs = [StatsLog(metrics), StatsLog(metrics)]
    metrics.generation_tokens.inc(100)
    for now_s in (0.0, INTERVAL_S):
        logs[1].tick(now_s)
    said = capsys.readouterr()
    assert said.out == "", f"stdout has only the line that says where the server is, got {said.out!r}. {LOOK}"
    assert said.err.endswith(" INFO prompt 0 tok/s, generation 10 tok/s\n") and said.err.count("\n") == 1, (
        f"expected one line on stderr, got {said.err!r}. {LOOK}"
    )


def test_every_number_of_the_engine_is_explained_in_metrics(server: Server) -> None:
    server.engine.gauges = {"num_requests_waiting": 1, "prefix_cache_hits": 2, "some_new_number": 3}
    text = server.client.get("/metrics").text
    for line in (
        "# HELP engine:num_requests_waiting Requests that wait in the queue now.",
        "# HELP engine:prefix_cache_hits_total Tokens that were found in the prefix cache.",
        "# HELP engine:some_new_number_total some_new_number, counted since the engine started.",
    ):
        assert f"{line}\n" in text, f"/metrics lacks {line!r}: {text[:2_000]}"
