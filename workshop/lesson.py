"""The lesson in the learner's copy: its links and images lead where those of the original do."""

from __future__ import annotations

import os
import re
import shutil
from functools import partial
from pathlib import Path

from workshop.course import Part

LINK = re.compile(r"(!?\[[^\]]*\]\()(\.\./[^)#\s]+)")


def place_lesson(part: Part) -> None:
    """Copy the images that the copy's pages show to workspace/, and let its other links out of the part lead to the
    originals."""
    for page in part.copy.rglob("*.md"):
        original = part.path / page.relative_to(part.copy)
        renew = partial(place, part, page, original)
        page.write_text(LINK.sub(renew, page.read_text(encoding="utf-8")), encoding="utf-8")


def place(part: Part, page: Path, original: Path, link: re.Match[str]) -> str:
    """A link's new beginning. link: its text up to the bracket, and its target, which begins with ../."""
    opening, target = link.groups()
    linked = Path(os.path.normpath(original.parent / target))
    if linked.is_relative_to(part.path):
        return link[0]
    if not opening.startswith("!"):
        return f"{opening}../{target}"
    copy = Path(os.path.normpath(page.parent / target))
    if linked.is_file():
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(linked, copy)
    return opening + target
