"""Import the learner's copy of a part, with all bodies but the checked one lent: replaced by the reference's.

So each exercise is checked alone: a part can be solved in any order, and a mistake in a body fails only its own tests.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from workshop.bodies import find_bodies, replace_bodies


class CopyFinder(MetaPathFinder):
    """Finds one part in workspace/ only, whatever sys.path or an editable install contain."""

    def __init__(self, workspace: Path, reference: Path, lent: Iterable[str]) -> None:
        self.workspace, self.reference, self.lent = workspace, reference, frozenset(lent)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != self.reference.name:
            return None
        spec = PathFinder.find_spec(fullname, [str(self.workspace)] if path is None else path)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"{fullname} is not in {self.workspace}", name=fullname)
        spec.loader = LendingLoader(fullname, spec.origin, self)
        spec.cached = None
        return spec

    def lend(self, text: str, path: Path) -> tuple[str, list[int]]:
        """The text of the learner's file with the lent bodies, and each line's number in the file."""
        return replace_bodies(text, self.lent_bodies(path), path.name)

    def lent_bodies(self, path: Path) -> dict[str, tuple[str, ...]]:
        """The lines of the bodies that the reference lends to the learner's file."""
        reference = self.reference / path.relative_to(self.workspace / self.reference.name)
        bodies = find_bodies(reference.read_text(encoding="utf-8"), str(reference)) if reference.is_file() else {}
        return {name: body.lines for name, body in bodies.items() if name in self.lent}


class LendingLoader(SourceFileLoader):
    """Compiles a learner's file with the lent bodies inserted; line numbers stay those of the file."""

    def __init__(self, fullname: str, path: str, finder: CopyFinder) -> None:
        super().__init__(fullname, path)
        self.finder = finder

    def path_stats(self, path: str) -> Any:
        """Disable the bytecode cache: it would hold lent bodies and miss a second save within one second."""
        raise OSError

    def source_to_code(self, data: Any, path: Any, **options: Any) -> CodeType:  # type: ignore[override]
        own = bytes(data).decode("utf-8").replace("\r\n", "\n")
        text, numbers = self.finder.lend(own, Path(path))
        if text == own:
            return compile(text, path, "exec", dont_inherit=True)
        ast.parse(own, path)  # a syntax error is reported at the learner's line
        tree = ast.parse(text, path)
        nodes: list[Any] = [node for node in ast.walk(tree) if hasattr(node, "lineno")]
        for node in nodes:
            node.lineno, node.end_lineno = numbers[node.lineno - 1], numbers[node.end_lineno - 1]
            if node.lineno == node.end_lineno:  # a lent statement of several lines, now all one line
                node.end_col_offset = max(node.end_col_offset, node.col_offset)
        return compile(tree, path, "exec", dont_inherit=True)


def install(finder: CopyFinder) -> None:
    """Make every import of the part from here on find the learner's copy."""
    part = finder.reference.name
    loaded = [name for name in sys.modules if name.partition(".")[0] == part]
    assert not loaded, f"{loaded} were imported before the learner's copy"
    sys.meta_path.insert(0, finder)
