"""Access to the parts for the sections: their names, and `LLM.generate`."""

from __future__ import annotations

import importlib
from dataclasses import fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FIRST_PAGED_PART = 3


def part_names() -> list[str]:
    """The folders of the parts with a paged KV cache, in order; the last is the newest part."""
    return sorted(path.name for path in ROOT.glob("part[0-9][0-9]_*") if int(path.name[4:6]) >= FIRST_PAGED_PART)


def has_flag(part: str, flag: str) -> bool:
    return flag in {spec.name for spec in fields(importlib.import_module(f"{part}.config").EngineConfig)}


def load_llm(part: str, **flags: Any) -> Any:
    """A part's LLM. flags: of its EngineConfig."""
    config = importlib.import_module(f"{part}.config").EngineConfig(**flags)
    module = "llm" if (ROOT / part / "llm.py").is_file() else "core.engine"
    return importlib.import_module(f"{part}.{module}").LLM(config)
