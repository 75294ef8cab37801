"""The failure lab on real servers: it breaks them, sees that they recover, and says so if they don't."""

from __future__ import annotations

import ast
import builtins
import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import pytest
from rich.console import Console

from tests.forked_servers import ForkedProcess, Host, until
from tests.process_checks import TIMEOUT_S
from workshop.__main__ import ROOT
from workshop.course import WorkshopError
from workshop.failures import (
    SCENARIOS,
    checks,
    corrupt_transfer,
    cut_client,
    explain,
    fill_pool,
    main,
    poison_block,
    servers,
)
from workshop.failures.checks import CheckFailed
from workshop.failures.lab import Lab
from workshop.failures.servers import children_of, is_running
from workshop.report import Report

Call = Callable[..., tuple[int, str, str]]
LOOK = "Look at workshop/failures/lab.py."
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")
SLOW = pytest.mark.slow
LONG = ("slow_rank", "kill_decode_worker", "corrupt_transfer")  # 20 to 40 s, most of them until all servers are ready
EVIDENCE = {  # of a run that recovers
    "fill_pool": [r"✓ preemptions: [1-9]", r"✓ answers with both pools: 8 of 8", r"✓ KV blocks .* 24 of 24"],
    "cut_client": [r"✓ aborted requests: 1", r"✓ tokens .* of 1,500: \d", r"KV blocks in use +\d"],
    "slow_rank": [r"Seen: process \d+ is stopped", r"For 2 s, no token has come", r"✓ answers: (\d+) of \1 equal"],
    "poison_block": [r"tokens loaded from disk +0 +32", r"✓ answers: 1 of 1", r"log: .* is damaged"],
    "kill_decode_worker": [r"then: http://\S+ broke off", r"✓ new requests: 4 of 4", r"available .* killed .* 1 +0"],
    "corrupt_transfer": [r"✓ failed transfers: 1", r"log: .* a piece was damaged", r"✓ the answer: 1 of 1"],
}  # fmt: skip


@pytest.fixture
def forking(host: Host, monkeypatch: pytest.MonkeyPatch) -> Host:
    """The lab's servers are forked. test_a_learner_breaks_it_or_leaves starts one as a learner does."""

    def start(command: list[str], stdout: IO[str], stderr: IO[str], env: dict[str, str], **_: object) -> ForkedProcess:
        python, _, module, *argv = command
        assert python == sys.executable, f"expected a server of the course, got {command}"
        outputs = {"stdout": Path(stdout.name), "stderr": Path(stderr.name), "temporary": Path(env["TMPDIR"])}
        return ForkedProcess(host, host.fork(module, argv, **outputs, env=env))

    faked = SimpleNamespace(Popen=start, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(servers, "subprocess", faked)
    return host


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], forking: Host, monkeypatch: pytest.MonkeyPatch) -> Iterator[Call]:
    """It leaves no process and no file."""
    folder = tempfile.mkdtemp(prefix="t-", dir="/tmp")  # short: a socket's path has about 100 characters
    monkeypatch.setattr(tempfile, "tempdir", folder)

    def call(name: str | None, *, is_auto: bool = True, prediction: str | None = None) -> tuple[int, str, str]:
        status = main(name, is_auto=is_auto, prediction=prediction, report=Report(Console(highlight=False)))
        out, err = capsys.readouterr()
        return status, out, err

    yield call
    until(lambda: not forking.ask(alive=True)["alive"], f"all processes to end. {LOOK}")
    Path(folder).rmdir()


@ON_LINUX
@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW) if name in LONG else name for name in SCENARIOS])
def test_the_engine_recovers(name: str, call: Call) -> None:
    status, out, err = call(name, prediction=SCENARIOS[name].answer)
    assert status == 0, f"{out}{err}"
    for pattern in EVIDENCE[name]:
        assert re.search(pattern, out), f"expected {pattern!r} in the output, got {out}"
    assert "before" in out and f"Your prediction, {SCENARIOS[name].answer}, was right." in out, out


# Checks that fail


def fails(call: Call, name: str, *patterns: str) -> None:
    """The scenario ends with status 1, and says this."""
    status, out, _ = call(name)
    assert status == 1, f"expected that the check fails, got {out}"
    for pattern in ("The check failed: ", "expected  ", "found     ", "look at   ", *patterns):
        assert re.search(pattern, out), f"expected {pattern!r} in the output, got {out}"
    assert "The answer:" not in out, f"nothing is explained that has not happened: {out}"


@ON_LINUX
def test_a_pool_that_is_large_enough(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fill_pool, "SMALL", fill_pool.LARGE)
    fails(call, "fill_pool", "expected  at least 1\n", "found     0\n", r"core/scheduler\.py::Scheduler\.preempt")


@ON_LINUX
def test_a_stream_with_another_token(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*args: object) -> object:
        answer = real(*args)
        return replace(answer, token_ids=[*answer.token_ids[:7], 4_095, *answer.token_ids[8:]])

    real = cut_client.ask
    monkeypatch.setattr(cut_client, "ask", ask)
    fails(call, "cut_client", r"answers of the other client, answer 0", r"expected  token 4095 at place 7\n")


@ON_LINUX
def test_a_damaged_file_that_is_not_read(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the device nor host memory has forgotten anything."""

    def until(condition: Callable[[], object], what: str) -> None:
        checks.until(condition, what, 0.5 if "is damaged" in what else None)

    monkeypatch.setattr(poison_block.Prompts, "forget", lambda _: None)
    monkeypatch.setattr(poison_block, "until", until)
    fails(call, "poison_block", r"expected  a line in the log that says 'is damaged'\n", r"open_sealed")


@SLOW
@ON_LINUX
def test_an_engine_that_does_not_compute_what_is_missing(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corrupt_transfer, "FLAGS", (*corrupt_transfer.FLAGS, "--kv-load-failure-policy", "fail"))
    fails(call, "corrupt_transfer", "The check failed: the answer's status", "expected  200\n", "a piece was damaged")


@ON_LINUX
def test_a_server_that_does_not_start(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut_client, "FLAGS", ("--block-size", "15"))
    fails(call, "cut_client", "expected  a server\n", "expected a power of two, got 15")


def test_messages_name_what_was_expected() -> None:
    with lab_of("fill_pool") as lab:
        with pytest.raises(CheckFailed, match="preemptions: expected 1, found 0"):
            lab.check("preemptions", 1, 0)
        with pytest.raises(CheckFailed, match="answers, answer 1: expected token 3 at place 1, found token 4"):
            lab.check_answers("answers", [[1], [2, 3]], [[1], [2, 4]])
        with pytest.raises(CheckFailed, match="expected 2 tokens, found 1 tokens, all of them equal"):
            lab.check_answers("answers", [[1, 2]], [[1]])


# The learner


def lab_of(name: str, *, is_auto: bool = False, prediction: str | None = None) -> Lab:
    return Lab(SCENARIOS[name], Report(Console(highlight=False)), is_auto, prediction)


def test_the_list(call: Call) -> None:
    status, out, _ = call(None)
    assert status == 0 and [line.split()[0] for line in out.splitlines() if "  part " in line] == list(SCENARIOS), out
    assert "workshop failure fill_pool" in out, out


@pytest.mark.parametrize(
    ("name", "prediction", "message"),
    [
        ("flood", None, "there is no failure 'flood': expected fill_pool, cut_client"),
        ("fill_pool", "e", "--predict: expected one of a, b, c, d, got 'e'"),
        ("fill_pool", "", "--predict: expected one of a, b, c, d, got ''"),
    ],
)
def test_wrong_usage(name: str, prediction: str | None, message: str, call: Call) -> None:
    status, out, err = call(name, prediction=prediction)
    assert status == 2 and message in err and out == "", f"got status {status}, {out!r}, {err!r}"


def test_the_prediction_is_asked_for_until_it_is_a_choice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = iter(["", "yes", " C "])
    monkeypatch.setattr(builtins, "input", lambda *_: next(given))
    with lab_of("fill_pool") as lab:
        lab.predict()
    out = capsys.readouterr().out
    assert lab.prediction == "c" and "expected one of a, b, c, d, got 'yes'" in out, out


def test_no_input_for_the_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(*_: object) -> str:
        raise EOFError

    monkeypatch.setattr(builtins, "input", end)
    with lab_of("fill_pool") as lab, pytest.raises(WorkshopError, match="use --predict LETTER, or --auto"):
        lab.predict()


def test_it_waits_until_the_learner_has_broken_it(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = itertools.count()
    with lab_of("fill_pool") as lab:
        lab.break_it("Kill it.", "kill -9 1234", lambda: next(numbers) == 3, "it is dead", do=lambda: pytest.fail("no"))
    out = capsys.readouterr().out
    assert next(numbers) == 4 and "Kill it. In another terminal:\n  $ kill -9 1234\n" in out, out
    assert "Seen: it is dead." in out, out


def test_a_wrong_prediction_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    scenario = SCENARIOS["fill_pool"]
    explain(scenario, "a", Report(Console(highlight=False)))
    out = capsys.readouterr().out
    assert "Your prediction, a, was not right; it is c." in out, out
    assert out.count("Wrong: ") == 3 and out.count("Right: ") == 1 and f"vLLM: {scenario.vllm}" in out, out


@contextlib.contextmanager
def killed_at_last(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Popen's own end would wait for it."""
    try:
        yield
    finally:
        process.kill()


@ON_LINUX
@pytest.mark.parametrize("has_broken_it", [False, True], ids=["Ctrl-C", "by hand"])
def test_a_learner_breaks_it_or_leaves(has_broken_it: bool) -> None:
    """As in a terminal. However it ends, no process and no file is left."""
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder:
        log = Path(folder) / "output"
        (Path(folder) / "tmp").mkdir()
        with log.open("w") as output, subprocess.Popen(
            [sys.executable, "-m", "workshop", "failure", "poison_block", "--predict", "a"], cwd=ROOT, stdout=output,
            stderr=output, stdin=subprocess.DEVNULL, env={**os.environ, "TMPDIR": str(Path(folder) / "tmp")},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what runs in the background ignores it
        ) as process, killed_at_last(process):  # fmt: skip
            pattern = r"In another terminal:\n  \$ (printf .*)\n"
            until(lambda: re.search(pattern, log.read_text()) or process.poll() is not None, f"a command. {LOOK}")
            found = re.search(pattern, log.read_text())
            assert found, log.read_text()
            servers = children_of(process.pid)
            assert len(servers) == 1, f"expected one server, got {servers}. {LOOK}"
            started = [*servers, *children_of(servers[0])]
            if has_broken_it:
                subprocess.run(["sh", "-c", found[1]], check=True, capture_output=True)
            else:
                process.send_signal(signal.SIGINT)
            status = process.wait(TIMEOUT_S)
        out = log.read_text()
        assert status == (0 if has_broken_it else 130), f"got status {status}: {out}"
        assert not has_broken_it or "Your prediction, a, was not right; it is b." in out, out
        assert "Traceback" not in out, out
        until(lambda: not any(is_running(pid) for pid in started), f"all of {started} to end. {LOOK}")
        left = list((Path(folder) / "tmp").glob("l*"))
        assert not left, f"files are left: {left}. {LOOK}"


# The scenarios


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_scenario_is_complete(name: str) -> None:
    scenario = SCENARIOS[name]
    assert scenario.name == name and [*scenario.choices] == [*"abcd"] and scenario.answer in scenario.choices
    for choice in scenario.choices.values():
        assert choice.text[-1] == choice.why[-1] == "." and ". " not in choice.why, f"one sentence: {choice}"
        assert choice.why[0].islower(), f"it follows 'Right: ' or 'Wrong: ': {choice.why}"
    for place in scenario.look:
        file, _, symbol = place.partition("::")
        assert (ROOT / file).is_file(), f"{name} names {file}, which does not exist"
        assert symbol in symbols_of(ROOT / file), f"{file} has no {symbol}"
    assert any(place.startswith(f"part{scenario.part:02}_") for place in scenario.look), f"{name}: nothing of its part"


def test_the_answers_are_not_always_the_same_letter() -> None:
    assert len({scenario.answer for scenario in SCENARIOS.values()}) == 4


def symbols_of(file: Path) -> set[str]:
    """Functions, classes and methods."""
    found = set[str]()
    for node in ast.parse(file.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = (ast.FunctionDef, ast.AsyncFunctionDef)
            found |= {f"{node.name}.{each.name}" for each in node.body if isinstance(each, methods)}
    return found


def test_teaching_names_every_scenario() -> None:
    page = (ROOT / "workshop" / "TEACHING.md").read_text("utf-8")
    section = page.partition("\n## The failure lab\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) min \|", section, re.MULTILINE)
    expected = [(each.name, str(each.part), str(each.minutes)) for each in SCENARIOS.values()]
    assert rows == expected, f"expected {expected}, got {rows}"
