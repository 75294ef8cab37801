"""Record an answer of part 1 and a streamed one of the newest part, and draw both: python -m tools.recording [--draw].

Writes results/recording.json (the question, the pieces of the answer and when they arrived), and from it the animated
picture docs/diagrams/recording.svg, which plays both side by side in slow motion. --draw only draws.
"""

from __future__ import annotations

import json
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import httpx

from common.load_client import SseParser
from common.results import read_result, write_result
from common.serve import server_process
from tools.diagrams.theme import MONO, style_sheet

ROOT = Path(__file__).parents[1]
RESULT, PICTURE = ROOT / "results" / "recording.json", ROOT / "docs" / "diagrams" / "recording.svg"
QUESTION = "What is continuous batching?"
PLAY_S, PAUSE_S = 7.0, 3.0  # how long the picture plays, and shows the end before it begins again
WIDTH, HEIGHT, PANEL_WIDTH, LINE_CHARS = 860, 330, 406, 46
LINE_HEIGHT, FONT_SIZE = 20, 13
STILL = "@media (prefers-reduced-motion: reduce){.piece{animation:none !important;fill-opacity:1}}"

Piece = tuple[float, str]  # milliseconds after the question was sent, and the text that arrived


@dataclass(frozen=True, slots=True)
class Panel:
    """One of the two servers. pieces: its answer, with the first one at the TTFT."""

    title: str
    x: float
    pieces: list[Piece]


def body(**more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 80, **more}


def ask_whole(url: str) -> list[Piece]:
    """Part 1's answer, which comes in one piece."""
    started = time.perf_counter()
    response = httpx.post(f"{url}/generate", json=body(), timeout=60)
    response.raise_for_status()
    return [(1e3 * (time.perf_counter() - started), response.json()["text"])]


def ask_streamed(url: str) -> list[Piece]:
    """The pieces of a streamed answer."""
    parser, pieces, started = SseParser(), list[Piece](), time.perf_counter()
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body(stream=True), timeout=60) as response:
        response.raise_for_status()
        for chunk in response.iter_bytes():
            now = 1e3 * (time.perf_counter() - started)
            for _, data in parser.feed(chunk):
                choices = [] if data == "[DONE]" else json.loads(data)["choices"]
                text = "".join(choice["delta"].get("content") or "" for choice in choices)
                if text:
                    pieces.append((now, text))
    return pieces


def record() -> dict[str, Any]:
    newest = sorted(ROOT.glob("part[0-9][0-9]_*"))[-1].name
    with server_process("part01_simple_server") as url:
        ask_whole(url)  # warm-up
        whole = ask_whole(url)
    with server_process(newest, "--no-enable-prefix-caching") as url:
        ask_streamed(url)
        streamed = ask_streamed(url)
    assert "".join(text for _, text in streamed) == whole[0][1], "all parts give the same answer"
    rounded = [[[round(ms, 2), text] for ms, text in pieces] for pieces in (whole, streamed)]
    return {"part 1": rounded[0], f"part {int(newest[4:6])}": rounded[1]}


def draw(measurements: dict[str, list[list[Any]]]) -> str:
    """The animated SVG. It plays in slow motion, so that the last piece arrives after PLAY_S seconds."""
    panels = [
        Panel(name, 16 + number * (PANEL_WIDTH + 16), [(ms, text) for ms, text in pieces])
        for number, (name, pieces) in enumerate(measurements.items())
    ]
    last_ms = max(panel.pieces[-1][0] for panel in panels)
    slowdown = 1e3 * PLAY_S / last_ms
    parts = [draw_panel(panel, slowdown, number) for number, panel in enumerate(panels)]
    css = "\n".join([style_sheet(), *(rule for _, rules in parts for rule in rules)])
    note = f"The same question, the same answer. Real timing on two CPU cores, slowed down {slowdown:.0f}×."
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img">\n<title>An answer of part 1 and a streamed answer, side by side</title>\n'
        f"<desc>{escape(note)}</desc>\n"
        f"<style>\n{css}\n{STILL}\n</style>\n"
        f'<rect class="page" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="12"/>\n'
        + "\n".join(markup for markup, _ in parts)
        + f'\n<text class="muted" x="16" y="{HEIGHT - 16}" font-size="12">{escape(note)}</text>\n</svg>\n'
    )


def draw_panel(panel: Panel, slowdown: float, number: int) -> tuple[str, list[str]]:
    """The markup of a panel, and the CSS that lets its pieces appear one after the other."""
    rules, first_ms, end_ms = list[str](), panel.pieces[0][0], panel.pieces[-1][0]
    lines = [
        f'<rect class="panel" x="{panel.x}" y="16" width="{PANEL_WIDTH}" height="{HEIGHT - 54}" rx="10"/>',
        f'<text class="bold" x="{panel.x + 16}" y="42" font-size="15">{panel.title}</text>',
        f'<text class="muted" x="{panel.x + PANEL_WIDTH - 16}" y="42" font-size="13" text-anchor="end">'
        f"TTFT {first_ms:.0f} ms · full answer {end_ms:.0f} ms</text>",
        _line(panel.x, 74, f"&gt; {escape(QUESTION)}", "blue-ink"),
    ]
    for row, line in enumerate(wrap(panel.pieces)):
        spans = []
        for ms, text in line:
            name = f"p{number}_{len(rules)}"
            start = 100 * ms * slowdown / 1e3 / (PLAY_S + PAUSE_S)
            rules.append(
                f"@keyframes {name}{{0%,{start:.2f}%{{fill-opacity:0}}"
                f"{min(start + 0.01, 100):.2f}%,100%{{fill-opacity:1}}}}"
            )
            style = f"animation:{name} {PLAY_S + PAUSE_S:g}s infinite"
            spans.append(f'<tspan class="piece" style="{style}">{escape(text)}</tspan>')
        lines.append(_line(panel.x, 104 + row * LINE_HEIGHT, "".join(spans)))
    return "\n".join(lines), rules


def wrap(pieces: list[Piece]) -> list[list[Piece]]:
    """The pieces in lines of at most LINE_CHARS characters; one that crosses a line's end is cut there."""
    text = "".join(piece for _, piece in pieces)
    times = [ms for ms, piece in pieces for _ in piece]
    lines, at = [], 0
    for line in textwrap.wrap(text, LINE_CHARS):
        at = text.index(line, at)
        row: list[Piece] = []
        for ms, char in zip(times[at : at + len(line)], line, strict=True):
            if row and row[-1][0] == ms:
                row[-1] = (ms, row[-1][1] + char)
            else:
                row.append((ms, char))
        lines.append(row)
        at += len(line)
    return lines


def _line(x: float, y: float, content: str, style: str = "") -> str:
    return (
        f'<text class="mono {style}" x="{x + 16}" y="{y}" font-size="{FONT_SIZE}" xml:space="preserve" '
        f"style='font-family:{MONO}'>{content}</text>"
    )


def main(argv: list[str]) -> int:
    if argv not in ([], ["--draw"]):
        print(__doc__)
        return 2
    if not argv:
        write_result(
            RESULT, benchmark="recording", config={"question": QUESTION}, seed=0, repeats=1, measurements=record()
        )
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(draw(read_result(RESULT)["measurements"]), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
