"""Deployments that start with one flag: --preset NAME reads presets/NAME.yaml."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from common.errors import FieldError

FOLDER = Path(__file__).parent / "presets"
FLAG = "--preset"
SEPARATOR = "--"  # what follows it are the flags of the engines behind a router or proxy
COMMANDS = ("engine", "router", "proxy")
Value = str | int | float | bool


@dataclass(frozen=True, slots=True)
class Preset:
    """A file of presets/. starts: one of COMMANDS. engine_flags: of the engines behind a router or proxy."""

    name: str
    purpose: str
    starts: str
    flags: dict[str, Value]
    engine_flags: dict[str, Value]

    def command_line(self, flags: Sequence[str] = ()) -> list[str]:
        """The preset's flags, then those of the user, which win. The user's, too, may have two halves."""
        flags = list(flags)
        place = flags.index(SEPARATOR) if SEPARATOR in flags else len(flags)
        own, engines = as_flags(self.flags) + flags[:place], as_flags(self.engine_flags) + flags[place + 1 :]
        return [*own, SEPARATOR, *engines] if self.starts != "engine" else own + engines


def as_flags(values: dict[str, Value]) -> list[str]:
    """{"max_num_seqs": 8, "enforce_eager": False} → --max-num-seqs=8 --no-enforce-eager"""
    flags = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags.append(f"--{flag}={value}")
    return flags


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_preset(name: str) -> Preset:
    """Raises FieldError if there is no such preset."""
    if name not in names():
        raise FieldError("preset", f"expected one of {', '.join(names())}, got {name[:100]!r}")
    found = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    preset = Preset(name, found["purpose"], found["starts"], found.get("flags") or {}, found.get("engine_flags") or {})
    assert preset.starts in COMMANDS, f"presets/{name}.yaml starts {preset.starts!r}, expected one of {COMMANDS}"
    return preset


def take_preset(argv: Sequence[str]) -> tuple[Preset | None, list[str]]:
    """The preset that a command line names, and its other flags. Raises FieldError."""
    argv = list(argv)
    for index, argument in enumerate(argv):
        if argument == SEPARATOR:
            break
        flag, has_value, value = argument.partition("=")
        if flag == FLAG:
            if not has_value and index + 1 == len(argv):
                raise FieldError("preset", f"expected one of {', '.join(names())}")
            end = index + (1 if has_value else 2)
            return load_preset(value if has_value else argv[index + 1]), argv[:index] + argv[end:]
    return None, argv
