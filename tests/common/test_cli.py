"""common/cli.py: a config dataclass as a command line; a bad command line prints one line and exits with 2."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from common.cli import check_minimums, exit_on_error, option, parse_config, parse_configs
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
    for word in [*words, "90% or 100%s (default: 1.5)"]:  # a % stays a %, although argparse formats help texts
        assert word in text, f"expected {word!r} in --help:\n{text}"
    assert "What it does.\n\n  an example\n" in text, f"the description keeps its lines:\n{text}"


# Several configs


@dataclass(frozen=True, slots=True)
class Outer:
    host: str = option("here", "where")
    port: int = option(80, "which port", 0)

    def __post_init__(self) -> None:
        check_minimums(self)
        if self.port > 99:
            raise FieldError("port", f"expected 0 to 99, got {self.port}")


@dataclass(frozen=True, slots=True)
class Inner:
    model: str = option("tiny", "which model")
    max_num_seqs: int | None = option(None, "how many", 1)
    share: float = option(0.5, "how much", 0)

    def __post_init__(self) -> None:
        check_minimums(self)


def parse_both(*argv: str) -> list[Any]:
    return parse_configs((Outer, Inner), "", "prog", argv)


def test_configs_share_a_command_line() -> None:
    assert parse_both() == [Outer(), Inner()]
    got = parse_both("--max-num-seqs", "3", "--port", "7", "--model", "x", "--host", "there", "--share", "1")
    assert got == [Outer("there", 7), Inner("x", 3, 1.0)]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--port", "100"], "--port: expected 0 to 99, got 100"),
        (["--port", "-1"], "--port: expected at least 0, got -1"),
        (["--max-num-seqs", "0"], "--max-num-seqs: expected at least 1, got 0"),
        (["--share", "-0.5"], "--share: expected at least 0, got -0.5"),
        (["--block-size", "3"], "--block-size"),
    ],
    ids=str,
)
def test_each_config_refuses_its_own_flags(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_both(*argv)
    output = capsys.readouterr()
    assert (caught.value.code, output.out) == (2, ""), f"{argv}: got {caught.value.code}, {output}"
    assert output.err.startswith("prog: error: ") and output.err.count("\n") == 1, f"{argv}: got {output.err!r}"
    assert message in output.err, f"{argv}: expected {message!r} in {output.err!r}"


def test_help_explains_the_flags_of_all_configs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_both("--help")
    text = capsys.readouterr().out
    for flag in ("--host", "--port", "--model", "--max-num-seqs", "--share"):
        assert f"  {flag} " in text, f"--help does not explain {flag}: {text}"


# Minimums


def test_check_minimums_names_the_first_field_that_is_out_of_range() -> None:
    @dataclass(frozen=True)
    class Limited:
        free: int = option(-5, "no minimum")
        some: int | None = option(None, "a minimum of 2, or None", 2)
        none: int = option(0, "a minimum of 0", 0)

    for good in (Limited(), Limited(some=2), Limited(some=3, none=7)):
        check_minimums(good)
    for bad, message in (
        (Limited(some=1, none=-1), "some: expected at least 2, got 1"),
        (Limited(some=0), "some: expected at least 2, got 0"),
        (Limited(none=-1), "none: expected at least 0, got -1"),
        (Limited(none=2**63), "none: expected at most 9223372036854775807, got 9223372036854775808"),
    ):
        with pytest.raises(FieldError) as caught:
            check_minimums(bad)
        assert str(caught.value) == message, f"{bad}: expected {message!r}, got {str(caught.value)!r}"
        assert caught.value.field == message.split(":")[0]


def test_check_minimums_of_fields_without_options() -> None:
    @dataclass
    class Plain:
        count: int = -1

    check_minimums(Plain())


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


def test_exit_on_error_does_not_hide_a_bug(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError):
        exit_on_error("prog", raising(ZeroDivisionError()))
    exit_on_error("prog", lambda: print("fine"))
    assert capsys.readouterr() == ("fine\n", "")
