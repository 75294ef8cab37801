"""python -m tools.diagrams writes docs/diagrams/*.svg; with --check it names each file that differs, and fails."""

from __future__ import annotations

import argparse
from pathlib import Path

from .catalog import DIAGRAMS

DIRECTORY = Path(__file__).parents[2] / "docs" / "diagrams"


def expected_files() -> dict[Path, str]:
    """Every file that the scripts make, and its content."""
    return {DIRECTORY / f"{name}.svg": draw().svg() for name, draw in DIAGRAMS.items()}


def differing_files() -> list[Path]:
    """Files that are missing, or not what the scripts make."""
    expected = expected_files()
    return [
        path for path, text in sorted(expected.items()) if not path.exists() or path.read_text(encoding="utf-8") != text
    ]


def write_files() -> None:
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    for path, text in expected_files().items():
        path.write_text(text, encoding="utf-8", newline="\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.diagrams", description="Draw the course's diagrams.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file would change")
    if not parser.parse_args().check:
        write_files()
        return 0
    differing = differing_files()
    for path in differing:
        print(f"{path.relative_to(DIRECTORY.parents[1])} is not what the scripts make: run python -m tools.diagrams")
    return 1 if differing else 0


if __name__ == "__main__":
    raise SystemExit(main())
