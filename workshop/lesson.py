"""The lesson in the learner's copy: its links and images lead where those of the original do."""

from __future__ import annotations

import re
import shutil

from workshop.course import Part

LINK = re.compile(r"(!?\[[^\]]*\]\()(\.\./[^)#\s]+)")


def place_lesson(part: Part) -> None:
    """Copy the images that the copy's pages show to workspace/, and let its other links out of the part lead to the
    originals."""
    for page in part.copy.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        page.write_text(LINK.sub(lambda link: place(part, link[1], link[2]), text), encoding="utf-8")


def place(part: Part, opening: str, target: str) -> str:
    """A link's new beginning. opening: up to the bracket; target: begins with ../, the root of the repository."""
    if not opening.startswith("!"):
        return f"{opening}../{target}"
    image, copy = part.path / target, part.copy / target
    if image.is_file():
        copy.resolve().parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(image, copy)
    return opening + target
