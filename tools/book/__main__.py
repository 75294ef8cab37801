"""Make the book: python -m tools.book [--serve]. `make docs` sets up its environment first.

The pages of the repository are copied to build/book with their links changed, source files and step diffs become pages
beside them, and mkdocs makes build/site of it. A link that leads nowhere is an error.
"""

from __future__ import annotations

import os
import posixpath
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from .links import BrokenLinkError, rewritten, title_of
from .repository import ROOT, Repository, part_title
from .sources import diff_page, folder_page, source_page

BOOK, SITE = ROOT / "build" / "book", ROOT / "build" / "site"
PICTURES = (".svg", ".png", ".gif")
FIRST = ("README.md", "docs/transformer_primer.md", "GLOSSARY.md")
MORE = (
    "workshop/TEACHING.md",
    "results/README.md",
    "models/README.md",
    "docs/http_api.md",
    "docs/kubernetes/README.md",
    "CONTRIBUTING.md",
)
NOT_REFERENCE = ("__init__", "__main__", "demo", "bench", "lab")  # a part's modules without an interface for others


def write(name: str, text: str) -> None:
    path = BOOK / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def copy_pages(repository: Repository) -> list[str]:
    """Markdown pages and pictures. Returns what is wrong with links."""
    problems = []
    for page in repository.pages:
        try:
            write(page, rewritten(repository, page))
        except BrokenLinkError as error:
            problems.append(str(error))
    for name in repository.files:
        if name.endswith(PICTURES):
            (BOOK / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(repository.root / name, BOOK / name)
    return problems


def write_sources(repository: Repository) -> None:
    for name in repository.sources:
        write(f"{name}.html", source_page(name, repository.text(name)))
    for folder in repository.folders - {"."}:
        readme = f"{folder}/README.md"
        inside = sorted(name for name in repository.files if posixpath.dirname(name) == folder)
        below = sorted(posixpath.basename(each) for each in repository.folders if posixpath.dirname(each) == folder)
        addresses = [f"{posixpath.basename(name)}.html" for name in inside if name in repository.sources]
        if readme not in repository.files:
            write(f"{folder}/index.html", folder_page(folder, addresses, below))
    for before, part in zip(repository.parts, repository.parts[1:], strict=False):
        if f"{part}/step.diff" in repository.files:
            write(f"{part}/step.html", diff_page(part, before, repository.text(f"{part}/step.diff")))


def write_reference(repository: Repository) -> list[dict[str, Any]]:
    """Pages made of the docstrings of the newest part and of what all parts share, folder by folder."""
    modules: dict[str, list[dict[str, str]]] = {}
    for name in repository.sources:
        path = PurePosixPath(name)
        if path.parts[0] not in (repository.parts[-1], "common") or not name.endswith(".py"):
            continue
        if any(each.removesuffix(".py") in NOT_REFERENCE for each in path.parts[1:]):
            continue
        module = ".".join(path.with_suffix("").parts)
        write(f"reference/{module}.md", f"# {name}\n\n::: {module}\n")
        folder = "/".join(path.parent.parts[path.parts[0] != "common" :]) or "config, llm, messages"
        modules.setdefault(folder, []).append({path.name: f"reference/{module}.md"})
    return [{folder: entries} for folder, entries in sorted(modules.items())]


def part_entries(repository: Repository, part: str) -> Iterator[dict[str, str]]:
    """A part's pages: the lesson, the exercises, the others, and the step diff."""
    yield {"Lesson": f"{part}/README.md"}
    yield {"Exercises": f"{part}/exercises.md"}
    for page in repository.pages:
        if page.startswith(f"{part}/") and page not in (f"{part}/README.md", f"{part}/exercises.md"):
            yield {title_of(repository.text(page), page): page}


def settings(repository: Repository, reference: list[dict[str, Any]]) -> dict[str, Any]:
    """mkdocs.yml."""
    parts = [
        {part_title(repository.text(f"{part}/README.md")): list(part_entries(repository, part))}
        for part in repository.parts
    ]
    first = [{title_of(repository.text(page), page): page} for page in FIRST]
    more = [{title_of(repository.text(page), page): page} for page in MORE]
    config: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "mkdocs.yml").read_text("utf-8"))
    python = next(each for each in config["plugins"] if "mkdocstrings" in each)["mkdocstrings"]["handlers"]["python"]
    python["paths"] = [str(repository.root)]
    nav = [{"Start": first}, {"Parts": parts}, {"More": more}, {"Reference": reference}]
    return {**config, "docs_dir": str(BOOK), "site_dir": str(SITE), "nav": nav}


def build() -> None:
    repository = Repository()
    shutil.rmtree(BOOK, ignore_errors=True)
    if problems := copy_pages(repository):
        sys.exit("\n".join([*problems, f"{len(problems)} links lead nowhere"]))
    write_sources(repository)
    write("javascripts/iframe-worker.js", (Path(__file__).parent / "iframe-worker.js").read_text("utf-8"))
    config = BOOK.parent / "mkdocs.yml"
    config.write_text(yaml.safe_dump(settings(repository, write_reference(repository)), sort_keys=False), "utf-8")
    command = [sys.executable, "-m", "mkdocs", "build", "--clean", "--quiet", "-f", str(config)]
    if subprocess.run(command, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, check=False).returncode:
        sys.exit("python -m tools.book: error: mkdocs found mistakes, see above")
    print(f"{SITE / 'index.html'}: open it in a browser")


if __name__ == "__main__":
    build()
