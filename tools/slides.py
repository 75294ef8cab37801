"""Slides for a workshop, in one HTML file: `python -m tools.slides [FILE]`, by default build/slides.html.

For each part: TEACHING.md's message and questions, and the diagrams of its lesson. They work without a network. Answers
appear at a key, and a printer puts a slide on each page.
"""

from __future__ import annotations

import argparse
import base64
import html
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[1]
TEACHING = ROOT / "workshop" / "TEACHING.md"
TEMPLATE = Path(__file__).with_name("slides.html")
SECTION = re.compile(r"^### Part (\d+): (.+?) · \d+ minutes\n(.*?)(?=^##|\Z)", re.MULTILINE | re.DOTALL)
MESSAGE = re.compile(r"^\*\*Message\.\*\* (.+)$", re.MULTILINE)
ROW = re.compile(r"^\| (\d+) \| ([^|]+) \|[^|]*\|[^|]*\| ([^|]+\?) ([^|]+) \|$", re.MULTILINE)  # of the last parts
TITLE = re.compile(r"# Part \d+: (.+)")
QUESTION = re.compile(r"^- \*(.+?)\* (.+)$", re.MULTILINE)
IMAGE = re.compile(r"^!\[([^\]]*)\]\(([^)\s]+)\)$", re.MULTILINE)
LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")
KINDS = {".svg": "image/svg+xml", ".png": "image/png"}
markdown = MarkdownIt("commonmark", {"html": False})


@dataclass(frozen=True, slots=True)
class PartSection:
    """A part as TEACHING.md describes it. questions: with their answers."""

    number: int
    title: str
    message: str
    questions: list[tuple[str, str]]


def read_sections(text: str) -> list[PartSection]:
    """Raises ValueError for a part without a message or questions."""
    found = []
    for number, title, body in SECTION.findall(text):
        message, questions = MESSAGE.search(body), QUESTION.findall(body)
        if message is None or not questions:
            raise ValueError(f"TEACHING.md, part {number}: expected **Message.** and questions")
        found.append(PartSection(int(number), title, message[1], questions))
    for number, message, question, answer in ROW.findall(text):
        found.append(PartSection(int(number), title_of(int(number)), sentence(message), [(question, sentence(answer))]))
    return found


def lesson_of(part: int) -> Path:
    [lesson] = ROOT.glob(f"part{part:02}_*/README.md")
    return lesson


def title_of(part: int) -> str:
    """The title of its lesson."""
    title = TITLE.match(lesson_of(part).read_text(encoding="utf-8"))
    assert title is not None, f"the lesson of part {part} has no title"
    return title[1]


def sentence(text: str) -> str:
    """A table's cell as a sentence."""
    return f"{text[0].upper()}{text[1:].rstrip('.')}."


def images_of(part: int) -> Iterator[tuple[str, Path]]:
    """The pictures of a part's lesson with their descriptions, in its order."""
    lesson = lesson_of(part)
    for description, target in IMAGE.findall(lesson.read_text(encoding="utf-8")):
        yield description, (lesson.parent / target).resolve()


def inline(text: str) -> str:
    """Markdown of one line as HTML. Links become text: there may be no network."""
    return markdown.renderInline(LINK.sub(r"\1", text))


def slide(title: str, body: str, kind: str = "") -> str:
    return f'<section class="slide {kind}" aria-label="{html.escape(title, quote=True)}">\n{body}\n</section>'


def picture(description: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    text = html.escape(description, quote=True)
    image = f'<img alt="{text}" src="data:{KINDS[path.suffix]};base64,{data}">'
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>"


def slides_of(section: PartSection) -> Iterator[str]:
    name = f"Part {section.number}: {section.title}"
    heading = f"<h2>{html.escape(name)}</h2>"
    yield slide(name, f'{heading}\n<p class="message">{inline(section.message)}</p>', "first")
    for description, path in images_of(section.number):
        yield slide(f"{name}: {description}", f"{heading}\n{picture(description, path)}")
    items = [f"<li>{inline(question)}<p hidden>{inline(answer)}</p></li>" for question, answer in section.questions]
    questions = f"{heading}\n<ol>{''.join(items)}</ol>\n<button>Show the next answer (A)</button>"
    yield slide(f"{name}: questions", questions, "questions")


def build() -> str:
    """The whole page."""
    sections = read_sections(TEACHING.read_text(encoding="utf-8"))
    contents = "".join(
        f'<li><a href="#{html.escape(section.title, quote=True)}" data-part="{section.number}">'
        f"{html.escape(section.title)}</a></li>"
        for section in sections
    )
    architecture = picture("The whole engine", ROOT / "docs" / "diagrams" / "architecture.svg")
    slides = [
        slide(
            "Contents", f"<h1>Build an LLM inference engine in fifteen parts</h1>\n<ol class=contents>{contents}</ol>"
        ),
        slide("The whole engine", f"<h2>The whole engine</h2>\n{architecture}"),
    ]
    for section in sections:
        slides += slides_of(section)
    return TEMPLATE.read_text(encoding="utf-8").replace("<!-- slides -->", "\n".join(slides))


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools.slides", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, default=ROOT / "build" / "slides.html")
    file: Path = parser.parse_args().file
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(build(), encoding="utf-8")
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
