"""common/cli.py: a config dataclass as a command line; a bad one ends in one line and status 2."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import pytest

from common.cli import exit_on_error, option, parse_config
from common.errors import FieldError


@dataclass(frozen=True, slots=True)
class Config:
    needed: str
    count: int = option(3, "how many")
    rate: float = option(1.5, "90% or 100%s")
    max_things: int | None = option(None, "the most (None: no limit)")
    mode: Literal["slow", "fast"] = option("slow", "how")
    level: Literal["a", "b"] | None = option(None, "how high")
    is_loud: bool = option(False, "whether to shout")

    def __post_init__(self) -> None:
        if self.max_things is not None and self.max_things < 1:
            raise FieldError("max_things", f"expected at least 1, got {self.max_things}")


def parse(*argv: str) -> Config:
    return parse_config(Config, "What it does.\n\n  an example", "prog", argv)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line on stderr with which a command line is refused."""
    with pytest.raises(SystemExit) as caught:
        parse(*argv)
    output = capsys.readouterr()
    assert caught.value.code == 2, f"{argv}: expected exit status 2, got {caught.value.code}"
    assert output.out == "" and output.err.count("\n") == 1, f"{argv}: expected one line on stderr, got {output}"
    assert output.err.startswith("prog: error: "), f"{argv}: got {output.err}"
    return output.err


def test_defaults() -> None:
    assert parse("--needed", "x") == Config("x", 3, 1.5, None, "slow", None, False)


def test_every_flag() -> None:
    argv = [
        "--needed=x",
        "--count",
        "-4",
        "--rate",
        "2",
        "--max-things",
        "9",
        "--mode",
        "fast",
        "--level=b",
        "--is-loud",
    ]
    config = parse(*argv)
    assert config == Config("x", -4, 2.0, 9, "fast", "b", True)
    assert isinstance(config.rate, float) and isinstance(config.max_things, int)
    assert parse(*argv, "--no-is-loud").is_loud is False


def test_argv_comes_from_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["whatever", "--needed", "y"])
    assert parse_config(Config, "", "prog").needed == "y"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["--needed", "required"]),
        (["--needed"], ["--needed"]),
        (["--needed", "x", "--cuont", "3"], ["--cuont"]),
        (["--needed", "x", "--coun", "3"], ["--coun"]),
        (["--needed", "x", "stray"], ["stray"]),
        (["--needed", "x", "--count", "three"], ["--count", "'three'"]),
        (["--needed", "x", "--count", "3.5"], ["--count", "'3.5'"]),
        (["--needed", "x", "--rate", "often"], ["--rate", "'often'"]),
        (["--needed", "x", "--max-things", "None"], ["--max-things", "'None'"]),
        (["--needed", "x", "--max-things", "0"], ["--max-things: expected at least 1, got 0"]),
        (["--needed", "x", "--mode", "medium"], ["--mode", "medium", "slow", "fast"]),
        (["--needed", "x", "--level", "c"], ["--level", "'c'"]),
        (["--needed", "x", "--is-loud", "yes"], ["yes"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_bad_command_line(capsys: pytest.CaptureFixture[str], argv: list[str], words: list[str]) -> None:
    line = refused(capsys, *argv)
    for word in [*words, "--help"]:
        assert word in line, f"{argv}: expected {word!r} in {line!r}"


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    text = capsys.readouterr().out
    assert caught.value.code == 0
    words = ["--needed", "--count", "how many (default: 3)", "--max-things", "{slow,fast}", "--no-is-loud"]
    for word in [*words, "90% or 100%s (default: 1.5)"]:  # a % stands for itself, though argparse formats help texts
        assert word in text, f"expected {word!r} in --help:\n{text}"
    assert "What it does.\n\n  an example\n" in text, f"the description keeps its lines:\n{text}"


def raising(error: BaseException) -> Callable[[], None]:
    def run() -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (FieldError("model", "none such"), 2, "prog: error: model: none such\n"),
        (OSError("no such host"), 2, "prog: error: no such host\n"),
        (FileNotFoundError(2, "No such file", "x.json"), 2, "prog: error: [Errno 2] No such file: 'x.json'\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=lambda value: type(value).__name__,
)
def test_exit_on_error(capsys: pytest.CaptureFixture[str], error: BaseException, status: int, text: str) -> None:
    with pytest.raises(SystemExit) as caught:
        exit_on_error("prog", raising(error))
    assert (caught.value.code, capsys.readouterr().err) == (status, text)


def test_exit_on_error_hides_no_bug(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError):
        exit_on_error("prog", raising(ZeroDivisionError()))
    exit_on_error("prog", lambda: print("fine"))
    assert capsys.readouterr() == ("fine\n", "")
