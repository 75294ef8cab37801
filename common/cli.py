"""A frozen config dataclass as a command line: one flag a field, named as the field, helped by its metadata."""

from __future__ import annotations

import argparse
import sys
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, field, fields
from typing import Any, NoReturn, TypeVar

from common.errors import FieldError

Config = TypeVar("Config")


def option(default: Any, help: str) -> Any:
    """A config field with its line of --help."""
    return field(default=default, metadata={"help": help})


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def parse_config(config_class: type[Config], description: str, prog: str, argv: Sequence[str] | None = None) -> Config:
    """Read argv into a config_class. Exits with status 2 and one line on an unknown flag or a bad value."""
    parser = _Parser(prog=prog, description=description, formatter_class=_HelpFormatter, allow_abbrev=False)
    hints = typing.get_type_hints(config_class)
    for spec in fields(config_class):  # type: ignore[arg-type]
        _add_flag(parser, spec, hints[spec.name])
    try:
        return config_class(**vars(parser.parse_args(argv)))
    except FieldError as error:
        parser.error(f"--{error.field.replace('_', '-')}{str(error)[len(error.field) :]}")


def _add_flag(parser: argparse.ArgumentParser, spec: Field, hint: Any) -> None:
    flag = "--" + spec.name.replace("_", "-")
    options: dict[str, Any] = {"help": spec.metadata.get("help", " ").replace("%", "%%")}  # argparse formats it
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
    """Run a command; an error at the boundary ends it with one line and status 2, Ctrl-C quietly with 130."""
    try:
        run()
    except (FieldError, OSError) as error:
        sys.exit(_report(prog, error))
    except KeyboardInterrupt:
        sys.exit(130)


def _report(prog: str, error: Exception) -> int:
    print(f"{prog}: error: {error}", file=sys.stderr)
    return 2
