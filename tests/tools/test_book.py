"""The book: links of pages, source pages, and step diffs side by side."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tools.book.glossary import terms_of, with_links
from tools.book.links import BrokenLinkError, rewritten, title_of
from tools.book.repository import Repository, part_title
from tools.book.sources import diff_page, folder_page, parse_diff, source_page

DIFF = '''diff --git a/part01_a/engine.py b/part02_b/engine.py
--- a/part01_a/engine.py
+++ b/part02_b/engine.py
@@ -1,3 +1,4 @@ class Engine:
 first
-old = 1 < 2
+new = 2
+newer = """a
 last
diff --git a/part02_b/queue.py b/part02_b/queue.py
new file mode 100644
--- /dev/null
+++ b/part02_b/queue.py
@@ -0,0 +1,2 @@
+one
+two
diff --git a/part01_a/gone.py b/part01_a/gone.py
deleted file mode 100644
--- a/part01_a/gone.py
+++ /dev/null
@@ -1 +0,0 @@
-gone
'''


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """A small checkout with two parts."""
    files = {
        "README.md": "# The course\n\n[one](part01_a/README.md), [folder](part01_a/core)",
        "GLOSSARY.md": "# Glossary\n\n**KV cache.** What attention needs.\n\n**ITL (inter-token latency).** Seconds.\n",
        "part01_a/README.md": "# Part 1: `a`\n\nSee `core/engine.py::Engine.step`, [all](core/engine.py), `none.py`.\n"
        "\n```python\n[no](link.md)  # `core/engine.py`\n```\n\n[more](../README.md#top) [web](https://example.org/x)"
        "\n\n**KV caches** grow, and a **KV cache** is **large**.\n",
        "part01_a/core/engine.py": "class Engine:\n    def step(self):\n        pass\n",
        "part02_b/README.md": "[diff](step.diff)",
        "part02_b/step.diff": DIFF,
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return Repository(tmp_path)


def test_links_lead_to_pages_of_the_book(repository: Repository) -> None:
    front, lesson = rewritten(repository, "README.md"), rewritten(repository, "part01_a/README.md")
    assert "[one](part01_a/README.md)" in front and "[folder](part01_a/core/index.html)" in front, front
    assert "[`core/engine.py::Engine.step`](core/engine.py.html#line-2)" in lesson, lesson
    assert "[all](core/engine.py.html)" in lesson and "`none.py`." in lesson, lesson
    assert "[no](link.md)  # `core/engine.py`\n" in lesson, f"code stays as it is: {lesson}"
    assert "[more](../README.md#top)" in lesson and "(https://example.org/x)" in lesson, lesson
    assert "[diff](step.html)" in rewritten(repository, "part02_b/README.md")


def test_a_link_that_leads_nowhere(repository: Repository) -> None:
    (repository.root / "README.md").write_text("[x](part03/README.md)")
    with pytest.raises(BrokenLinkError, match="README.md: part03/README.md leads nowhere"):
        rewritten(Repository(repository.root), "README.md")


def test_terms_lead_to_the_glossary(repository: Repository) -> None:
    """At their first use in bold."""
    lesson, glossary = rewritten(repository, "part01_a/README.md"), rewritten(repository, "GLOSSARY.md")
    assert "[**KV caches**](../GLOSSARY.md#term-kv-cache) grow, and a **KV cache** is **large**." in lesson, lesson
    assert '<span id="term-kv-cache"></span>**KV cache.** What' in glossary, glossary


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the **inter-token latency (ITL)** is", "[**inter-token latency (ITL)**](G#term-itl-inter-token-latency)"),
        ("**ITL.** Seconds", "[**ITL.**](G#term-itl-inter-token-latency)"),
        ("**top-p**", "[**top-p**](G#term-top-k-top-p)"),
        ("[**KV cache**](x)", "[**KV cache**](x)"), ("**`KV cache`**", "**`KV cache`**"), ("**cache**", "**cache**"),
    ],
)  # fmt: skip
def test_which_terms_are_linked(text: str, expected: str) -> None:
    glossary = "**KV cache.** K.\n\n**ITL (inter-token latency).** S.\n\n**Top-k, top-p.** T.\n"
    got = with_links(text, terms_of(glossary), "G")
    assert expected in got and got.count("](") == expected.count("]("), got


def test_titles() -> None:
    assert title_of("text\n# Part 1: `a`\n", "x/README.md") == "Part 1: a"
    assert part_title("# Part 12: KV offloading\n\nText") == "12. KV offloading"


def test_a_diff_side_by_side() -> None:
    changed, new, gone = parse_diff(DIFF)
    assert [(each.name, each.kind) for each in (changed, new, gone)] == [
        ("engine.py", "changed"), ("queue.py", "new"), ("gone.py", "removed"),
    ]  # fmt: skip
    assert changed.rows == [
        "class Engine:", ((1, "first"), (1, "first")), ((2, "old = 1 < 2"), (2, "new = 2")),
        (None, (3, 'newer = """a')), ((3, "last"), (4, "last")),
    ]  # fmt: skip
    page = diff_page("part02_b", "part01_a", DIFF)
    assert '<a href="queue.py.html">queue.py</a> (2)' in page and "Removed: gone.py." in page, page
    assert page.count("<tr") == 5 and 'class="removed"' in page and "1 &lt; 2" in re.sub(r"<[^>]+>", "", page), page


def test_source_and_folder_pages() -> None:
    page = source_page("part01_a/core/engine.py", "x = '<b>'\n\ny = 2\n")
    assert 'id="line-3"' in page and "&lt;b&gt;" in page and '<a href="../index.html">part01_a</a>' in page, page
    folder = folder_page("part01_a/core", ["engine.py.html"], ["kernels"])
    assert '<a href="engine.py.html">engine.py</a>' in folder and '<a href="kernels/index.html">' in folder, folder


def test_every_link_of_the_repositorys_pages() -> None:
    """What `make docs` checks as well, without its environment."""
    repository = Repository()
    problems = []
    for page in repository.pages:
        try:
            rewritten(repository, page)
        except BrokenLinkError as error:
            problems.append(str(error))
    assert not problems, "\n".join(problems)
