"""Three rooms, one direction: api → core → worker. The imports of every part are walked."""

from __future__ import annotations

import ast
import functools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOMS = ("api", "core", "worker")
SHARED = {"messages", "config", "torchrun", "kv_params", "kernel_names"}  # what every room may import of its part
MAY_IMPORT = {  # a room, or a module at the part's root → what it may import of its part
    "api": {"api", "core"} | SHARED,
    "core": {"core"} | SHARED,
    "worker": {"worker"} | SHARED,
    "messages": SHARED,
    "config": {"kv_params", "kernel_names"},
    "torchrun": {"config"},
    "kv_params": set[str](),
    "kernel_names": set[str](),
}
DOOR = "core/executor.py"  # the only module of core that may import the worker
FORBIDDEN = {  # third-party and standard packages, by room
    "api": {"torch", "numpy", "numba", "triton"},
    "core": {"torch", "numpy", "numba", "triton", "asyncio", "http", "fastapi", "starlette", "uvicorn", "httpx"},
}
RULE = "Calls and imports go one way: api → core → worker; everyone may import messages, config and common."


@functools.cache
def imports_in(source: str) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]


def imported_by(path: Path, part_dir: Path) -> Iterator[tuple[int, list[str], bool]]:
    """Each import: its line, the dotted path, and whether that path begins in the part."""
    package = list(path.relative_to(part_dir).parts[:-1])
    for node in imports_in(path.read_text(encoding="utf-8")):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first, *rest = alias.name.split(".")
                is_own = first == part_dir.name
                yield node.lineno, rest if is_own else [first, *rest], is_own
        else:
            start = package[: len(package) - node.level + 1] if node.level else []
            dotted = [*start, *(node.module.split(".") if node.module else [])]
            is_own = node.level > 0 or dotted[0] == part_dir.name
            for alias in node.names:
                yield node.lineno, [*(dotted if node.level or not is_own else dotted[1:]), alias.name], is_own


def back_arrows(part_dir: Path) -> list[str]:
    """Every import that a room, messages.py or config.py may not have."""
    found = []
    for path in sorted(part_dir.rglob("*.py")):
        name = path.relative_to(part_dir).as_posix()
        room = name.split("/")[0].removesuffix(".py")
        if room not in MAY_IMPORT:
            continue  # llm, demo, bench, lab and __main__ put the rooms together
        allowed = MAY_IMPORT[room] | ({"worker"} if name == DOOR else set())
        for line, dotted, is_own in imported_by(path, part_dir):
            forbidden = dotted[0] not in allowed if is_own else dotted[0] in FORBIDDEN.get(room, set())
            if forbidden:
                found.append(f"{part_dir.name}/{name}:{line} imports {'.'.join(dotted)}. {RULE}")
    return found


@pytest.mark.since(3)
def test_imports_go_from_api_to_core_to_worker(part_dir: Path) -> None:
    for room in ROOMS:
        assert (part_dir / room / "__init__.py").is_file(), f"{part_dir.name} has no room {room}. {RULE}"
    found = back_arrows(part_dir)
    assert not found, "\n".join(found)


PLANTED = {  # what is wrong → the file, and a line to add to it
    "the worker imports core": ("worker/model_runner.py", "from ..core.request import Request"),
    "the worker imports core as a package": ("worker/model_runner.py", "from .. import core"),
    "the worker imports api": ("worker/kv_cache.py", "from ..api.server import create_app"),
    "core imports api": ("core/engine.py", "from ..api.output_processor import OutputProcessor"),
    "core imports the worker, not in executor.py": ("core/engine.py", "from ..worker.sampler import Sampler"),
    "core imports the worker in a function": ("core/request.py", "def f():\n    from ..worker import device"),
    "core imports the worker by its full name": ("core/block_manager.py", "import {part}.worker.kv_cache"),
    "api imports the worker": ("api/async_engine.py", "from ..worker.device import to_device"),
    "api imports the executor's worker": ("api/server.py", "from {part}.worker import worker"),
    "messages import a room": ("messages.py", "from .core.request import Request"),
    "config imports messages": ("config.py", "from .messages import StepInput"),
    "config imports a room": ("config.py", "from . import worker"),
    "a room imports the lab": ("core/engine.py", "from ..lab import anything"),
    "a room imports LLM": ("api/async_engine.py", "from ..llm import LLM"),
    "core imports torch": ("core/validation.py", "import torch"),
    "core imports a part of torch": ("core/executor.py", "from torch import nn"),
    "core imports numpy": ("core/block_manager.py", "import numpy as np"),
    "core imports asyncio": ("core/engine.py", "import asyncio"),
    "core imports an HTTP package": ("core/engine.py", "from fastapi import FastAPI"),
    "api imports torch": ("api/detokenizer.py", "import torch.nn.functional as F"),
}


@pytest.mark.since(3)
def test_a_planted_back_arrow_is_found(part_dir: Path, tmp_path: Path) -> None:
    """Each kind, in a copy of the part: exactly this file and this line are named."""
    copy = tmp_path / part_dir.name
    shutil.copytree(part_dir, copy, ignore=shutil.ignore_patterns("__pycache__", "*.md", "*.diff", "*.png"))
    assert not back_arrows(copy), f"an unchanged copy of {part_dir.name} has back arrows: {back_arrows(copy)}"
    for what, (name, line) in PLANTED.items():
        path = copy / name
        text = path.read_text(encoding="utf-8")
        path.write_text(f"{text}\n{line.format(part=part_dir.name)}\n", encoding="utf-8")
        last = path.read_text(encoding="utf-8").count("\n")
        found = back_arrows(copy)
        path.write_text(text, encoding="utf-8")
        assert len(found) == 1 and found[0].startswith(f"{part_dir.name}/{name}:{last} imports "), (
            f"{what}: expected {name}:{last} to be found, got {found}"
        )
