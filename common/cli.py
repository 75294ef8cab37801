"""Build a command line from frozen config dataclasses: one flag per field, with help from its metadata."""

from __future__ import annotations

import argparse
import signal
import sys
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, field, fields
from typing import Any, NoReturn, TypeVar

from common.errors import FieldError

Config = TypeVar("Config")


def option(default: Any, help: str, minimum: int | None = None) -> Any:
    """A config field with its --help text and the smallest value that check_minimums accepts."""
    return field(default=default, metadata={"help": help, "minimum": minimum})


def argument(help: str) -> Any:
    """A config field that is given by its place on the command line, not by a flag."""
    return field(metadata={"help": help, "is_positional": True})


def required(help: str) -> Any:
    """A config field whose flag must be given."""
    return field(metadata={"help": help})


MAX_INT = 2**63 - 1


def check_minimums(config: Any) -> None:
    """Raises FieldError naming the first field that is below its minimum, or too large to be sent to another process.
    None is always allowed."""
    for spec in fields(config):
        minimum, value = spec.metadata.get("minimum"), getattr(config, spec.name)
        if minimum is not None and value is not None and value < minimum:
            raise FieldError(spec.name, f"expected at least {minimum}, got {value}")
        if isinstance(value, int) and value > MAX_INT:
            raise FieldError(spec.name, f"expected at most {MAX_INT}, got {value}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def parse_config(config_class: type[Config], description: str, prog: str, argv: Sequence[str] | None = None) -> Config:
    """Parse argv into a config_class. An unknown flag or a bad value prints one line and exits with status 2."""
    return parse_configs((config_class,), description, prog, argv)[0]


def parse_configs(
    config_classes: Sequence[type[Any]], description: str, prog: str, argv: Sequence[str] | None = None
) -> list[Any]:
    """Parse argv into several configs that share one command line. Exits like parse_config."""
    parser = _Parser(prog=prog, description=description, formatter_class=_HelpFormatter, allow_abbrev=False)
    for config_class in config_classes:
        hints = typing.get_type_hints(config_class)
        for spec in fields(config_class):
            _add_flag(parser, spec, hints[spec.name])
    values = vars(parser.parse_args(argv))
    try:
        return [each(**{spec.name: values[spec.name] for spec in fields(each)}) for each in config_classes]
    except FieldError as error:
        parser.error(f"--{error.field.replace('_', '-')}{str(error)[len(error.field) :]}")


def _add_flag(parser: argparse.ArgumentParser, spec: Field, hint: Any) -> None:
    flag = "--" + spec.name.replace("_", "-")
    options: dict[str, Any] = {"help": spec.metadata.get("help", " ").replace("%", "%%")}  # argparse formats it
    if spec.metadata.get("is_positional"):
        parser.add_argument(spec.name, **options)
        return
    options |= {"required": True} if spec.default is MISSING else {"default": spec.default}
    members = [m for m in typing.get_args(hint) if m is not type(None)]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = members[0]
    if hint is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif typing.get_origin(hint) is typing.Literal:
        options["choices"] = typing.get_args(hint)
    else:
        options |= {"type": hint, "metavar": hint.__name__.upper()}
    parser.add_argument(flag, **options)


def exit_on_error(prog: str, run: Callable[[], None]) -> None:
    """Run a command. FieldError and OSError print one line and exit with status 2; Ctrl-C exits with 130, SIGTERM with
    143, both after everything has been cleaned up."""
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        run()
    except (FieldError, OSError) as error:
        sys.exit(_report(prog, error))
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _report(prog: str, error: Exception) -> int:
    print(f"{prog}: error: {error}", file=sys.stderr)
    return 2
