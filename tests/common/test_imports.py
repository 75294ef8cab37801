"""common/: no part is imported from here, and no two modules import each other, not even by way of a third."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "common").rglob("*.py")
}


def imports(path: Path) -> set[str]:
    """Every module that is imported anywhere in a file, in functions as well."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: common/ imports by full names"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def test_no_import_cycle() -> None:
    graph = {
        name: {other for other in imports(path) if other in MODULES and other != "common"}
        for name, path in MODULES.items()
    }
    assert any(graph.values()), "this test sees no import at all"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules of common/ import each other in a circle: {' → '.join(error.args[1])}")


def test_no_part_is_imported() -> None:
    for name, path in MODULES.items():
        parts = sorted(module for module in imports(path) if module.startswith("part0") or module.startswith("part1"))
        assert not parts, f"{name} imports {parts}: common/ is used by parts and knows none of them"
