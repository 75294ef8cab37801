"""Lend bodies of CUDA C++. A compiler reads them from disk, so an import hook can't put them in."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from workshop.bodies import CUDA, find_bodies, language_of
from workshop.course import WorkshopError
from workshop.lending import CopyFinder
from workshop.workspace import IGNORED, sources

FOLDER = Path("worker/kernels/cuda")  # in a part that has such exercises
VARIABLE = "LLM_COURSE_KERNEL_SOURCES"  # part 15's build.py compiles from this folder instead
LENT = "lent"  # the folder beside the sources with the lent bodies


def use_kernel_sources(folder: Path, finder: CopyFinder) -> None:
    """Let the part compile a copy of the learner's kernels that includes the lent bodies. folder: where it is made."""
    own, copy = finder.workspace / finder.reference.name / FOLDER, folder / "cuda"
    if not own.is_dir():
        return
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(own, copy, ignore=IGNORED)
    for path in sources(copy):
        lent = finder.lent_bodies(own / path.relative_to(copy)) if language_of(path.name) is CUDA else {}
        if lent:
            with suppress(WorkshopError):  # a missing marker: the check reports it
                include_bodies(path, copy / LENT, lent)
    os.environ[VARIABLE] = str(copy)


def with_own_paths(text: str, copy: Path) -> str:
    """The text with the learner's folder in place of the one that was prepared from it."""
    prepared = os.environ.get(VARIABLE)
    return text.replace(prepared, str(copy / FOLDER)) if prepared else text


def include_bodies(path: Path, folder: Path, lent: dict[str, tuple[str, ...]]) -> None:
    """Write the lent bodies to a folder, and let a file include them. All its other lines keep their numbers, so that
    the compiler's messages are right for the learner's file."""
    text = path.read_text(encoding="utf-8")
    lines = text.split("\n")
    for body in find_bodies(text, path.name).values():
        if body.name in lent:
            folder.mkdir(exist_ok=True)
            (folder / f"{body.name}.cuh").write_text("\n".join([*lent[body.name], ""]), encoding="utf-8")
            lines[body.first - 1] = f'#include "{LENT}/{body.name}.cuh"'  # in place of the marker
            lines[body.first : body.first + len(body.lines)] = [""] * len(body.lines)
    path.write_text("\n".join(lines), encoding="utf-8")
