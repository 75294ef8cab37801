"""Parts 1 and 2: a request's life, prefill and decode, and streaming."""

from __future__ import annotations

from .geometry import Rect
from .metrics import BOLD, CODE, HEAD, SMALL
from .svg import CELL_RADIUS, MARGIN, WIDTH, Drawing

RIGHT = WIDTH - MARGIN
TINY_WEIGHTS_MB = "23.1 MB"  # 5,770,496 parameters of four bytes
KV_BYTES_PER_TOKEN = "6,144 bytes"  # 2 · 6 layers · 4 KV heads · 32 numbers · 4 bytes

# Title and line of each box, in the rows: ask, cancel, answer.
CLIENT_BOXES = (("Client", "`stream: true`"), ("Client", "disconnects"), ("Client", "reads events"))
LOOP_BOXES = (
    ("`answer`", "parses, tokenizes, queues"), ("`AsyncLLM.abort`", "sets `aborted`"),
    ("`stream_events`", "turns text into events"),
)  # fmt: skip
ENGINE_BOXES = (
    ("`AsyncLLM._run`", "takes the next request"), ("`LLM.stream`", "yields token and text"),
    ("`RequestStream.put`", "called for each output"),
)  # fmt: skip


def request_life() -> Drawing:
    """The stages of a request on a time line, and the loop inside prefill and decode."""
    drawing = Drawing(
        "A request's life",
        "A time line from left to right: the HTTP request, chat template and tokenizer, the queue, prefill, five "
        "decode passes, text, the response. TTFT reaches from sending the request to the end of prefill, ITL from "
        "one decoded token to the next. Below, the loop of LLM.generate: forward, sample, check_stop, and back to "
        "forward with only the newest token, until check_stop returns a reason to stop.",
    )
    drawing.heading("TTFT and ITL are what the client of a streamed answer sees (part 2). The widths are not to scale.")
    _time_line(drawing, y=136)
    _generate_loop(drawing, y=306)
    return drawing


def _time_line(drawing: Drawing, y: float) -> None:
    height, x = 58, float(MARGIN)
    stages = [
        (124, "HTTP request", "`POST /generate`", "grey"),
        (138, "Tokens", "template, tokenizer", "blue"),
        (104, "Queue", "from part 2 on", "grey"),
        (124, "Prefill", "all prompt tokens", "blue"),
    ]
    for width, title, line, hue in stages:
        drawing.box(
            Rect(x, y, width - 3, height), title, [line], hue, strong=title == "Prefill", dashed=title == "Queue"
        )
        x += width
    first_token, decode = x, 34
    header = drawing.shape(Rect(x, y, 5 * decode, 28), "orange-strong", CELL_RADIUS)
    drawing.text(header.cx, header.cy, "Decode", BOLD, anchor="middle")
    drawing.cells(x, y + 28, ["1", "1", "1", "1", "1"], (decode, height - 28), "orange", font=BOLD)
    x += 5 * decode
    drawing.box(Rect(x + 3, y, 66, height), "Text", ["from ids"], "orange")
    drawing.box(Rect(x + 72, y, RIGHT - x - 72, height), "HTTP", ["response"], "grey")
    drawing.brace(MARGIN, first_token, y - 8, "TTFT: time to first token", above=True, font=BOLD)
    drawing.brace(
        first_token + decode, first_token + 2 * decode, y - 8, "ITL: inter-token latency", above=True, font=BOLD
    )
    axis = y + height + 16
    drawing.arrow([(MARGIN, axis), (RIGHT, axis)])
    for at, label, anchor in (
        (MARGIN, "the client sends", "start"),
        (first_token, "first token", "middle"),
        (x, "last token", "middle"),
        (RIGHT, "the answer", "end"),
    ):
        drawing.line([(at, axis - 4), (at, axis + 4)])
        drawing.text(at, axis + 18, label, SMALL, "muted", anchor)
    drawing.brace(first_token - 124, x, axis + 32, "passes: one for the prompt, then one for each further token")


def _generate_loop(drawing: Drawing, y: float) -> None:
    panel = drawing.panel(Rect(MARGIN, y, RIGHT - MARGIN, 176), "The loop in `LLM.generate`")
    top, height = panel.y + 42, 74
    forward = drawing.box(
        Rect(panel.x + 24, top, 218, height),
        "`LLM.forward`",
        ["prefill: the whole prompt", "decode: only the newest token"],
        "green",
    )
    sample = drawing.box(Rect(forward.right + 92, top, 120, height), "`sample`", ["one token id"], "green")
    stop = drawing.box(Rect(sample.right + 36, top, 120, height), "`check_stop`", ["end the answer?"], "green")
    done = drawing.box(Rect(panel.right - 24 - 98, top, 98, height), "`answer_text`", ["ids to text"], "orange")
    drawing.arrow([forward.right_center, sample.left_center], "logits")
    drawing.text((forward.right + sample.x) / 2, forward.cy + 13, "[4096]", CODE, "muted", "middle")
    drawing.arrow([sample.right_center, stop.left_center])
    drawing.arrow([stop.right_center, done.left_center], "reason")
    low = top + height + 36
    drawing.arrow([stop.bottom_center, (stop.cx, low), (forward.cx, low), forward.bottom_center])
    drawing.text((forward.cx + stop.cx) / 2, low - 13, "`None`: continue with the new token", SMALL, "muted", "middle")


def prefill_decode() -> Drawing:
    """Four forward passes: which tokens are computed, which keys and values are read, and all weights each time."""
    drawing = Drawing(
        "Prefill and decode",
        "Four forward passes for a prompt of six tokens, one row each. Prefill computes all six tokens with one "
        "reading of the weights. Each decode pass computes one token, reads the keys and values of all tokens "
        "before it from the KV cache, and reads all weights again.",
    )
    top = drawing.heading("A prompt of 6 tokens and an answer of 4. Each row is one forward pass of the model.")
    left, size, pitch = 132, (38.0, 36.0), 50
    weights = Rect(left + 9 * size[0] + 34, top + 34, 176, size[1])
    drawing.text(left, top + 12, "Keys and values, by position", BOLD)
    drawing.text(weights.x, top + 12, "Weights", BOLD)
    drawing.text(weights.right + 26, top + 12, "Tokens computed", BOLD)
    for row in range(4):
        y = weights.y + row * pitch
        drawing.text(MARGIN, y + size[1] / 2, "Prefill" if row == 0 else f"Decode {row}", HEAD)
        last = _pass_cells(drawing, left, y, size, row)
        drawing.box(Rect(weights.x, y, weights.width, size[1]), "", [f"all {TINY_WEIGHTS_MB} are read"], "green")
        drawing.text(weights.right + 26, y + size[1] / 2, "6 in one pass" if row == 0 else "1", HEAD)
        if row < 3:
            target = last.right + size[0] / 2
            drawing.arrow([last.right_center, (target, last.cy), (target, y + pitch)])
    drawing.text(left + 6.5 * size[0] + 12, weights.y + size[1] / 2, "sampled token", SMALL, "muted")
    y = weights.y + 4 * pitch + 6
    computed = [("blue-strong", "computed, prompt"), ("orange-strong", "computed, answer")]
    end = drawing.legend(left, y, [*computed, ("grey", "read from the KV cache")])
    drawing.text(end + 8, y, f"({KV_BYTES_PER_TOKEN} per token)", SMALL, "muted")
    _two_bounds(drawing, y + 28)
    return drawing


def _pass_cells(drawing: Drawing, x: float, y: float, size: tuple[float, float], row: int) -> Rect:
    """The positions that a pass reads from the cache, and those it computes. Returns the last one's cell."""
    num_cached, num_computed, hue = (0, 6, "blue") if row == 0 else (5 + row, 1, "orange")
    drawing.cells(x, y, [str(position) for position in range(num_cached)], size)
    new = [str(num_cached + index) for index in range(num_computed)]
    return drawing.cells(x + num_cached * size[0], y, new, size, hue, strong=True)[-1]


def _two_bounds(drawing: Drawing, y: float) -> None:
    half = (RIGHT - MARGIN - 20) / 2
    left, right = Rect(MARGIN, y, half, 58), Rect(MARGIN + half + 20, y, half, 58)
    drawing.box(left, "Prefill is bound by compute", ["Many tokens share one read of the weights."], "blue")
    drawing.box(right, "Decode is bound by memory bandwidth", ["One read of the weights for each token."], "orange")


def streaming() -> Drawing:
    """Part 2: a request crosses from the event loop to the engine thread, and its tokens come back one by one."""
    drawing = Drawing(
        "Streaming: two threads",
        "A client, the event loop and the engine thread, from left to right. The event loop parses a request and "
        "appends it to the waiting queue; the engine thread takes it and runs LLM.stream. Each output goes back "
        "through call_soon_threadsafe into the request's asyncio.Queue, and stream_events sends it as a line of "
        "server-sent events. If the client disconnects, AsyncLLM.abort sets a flag that the engine thread reads "
        "after each token.",
    )
    top = drawing.heading(
        "The event loop handles HTTP, the engine thread runs the model. Requests go one way, tokens come back."
    )
    loop = drawing.panel(Rect(186, top, 236, 300), "Event loop", "blue")
    engine = drawing.panel(Rect(616, top, 220, 300), "Engine thread", "purple")
    rows = [top + 40, top + 132, top + 224]
    clients = _column(drawing, MARGIN, 112, rows, "grey", CLIENT_BOXES)
    loops = _column(drawing, loop.x + 16, 204, rows, "blue", LOOP_BOXES)
    engines = _column(drawing, engine.x + 16, 188, rows, "purple", ENGINE_BOXES)
    for row, is_dashed in enumerate((False, True)):
        drawing.arrow([clients[row].right_center, loops[row].left_center], dashed=is_dashed)
        drawing.arrow([loops[row].right_center, engines[row].left_center], dashed=is_dashed)
        drawing.arrow([engines[row].bottom_center, engines[row + 1].top_center])
    drawing.arrow([engines[2].left_center, loops[2].right_center])
    drawing.arrow([loops[2].left_center, clients[2].right_center])
    middle = (loop.right + engine.x) / 2
    _queue(drawing, middle, loops[0].cy, "`waiting`", "at most 64 requests")
    drawing.text(middle, loops[1].cy - 13, "read after each token", SMALL, "muted", "middle")
    _queue(drawing, middle, loops[2].cy, "`asyncio.Queue`", "`call_soon_threadsafe`")
    _event_lines(drawing, engine.bottom + 24)
    return drawing


def _column(
    drawing: Drawing, x: float, width: float, rows: list[float], hue: str, boxes: tuple[tuple[str, str], ...]
) -> list[Rect]:
    """A box in each row. Cancelling, in the second, is dashed outside of the engine."""
    return [
        drawing.box(Rect(x, y, width, 58), title, [line], hue, dashed=y == rows[1] and hue != "purple")
        for y, (title, line) in zip(rows, boxes, strict=True)
    ]


def _queue(drawing: Drawing, x: float, y: float, name: str, note: str) -> None:
    """Three cells across an arrow, with a name above and a note below."""
    drawing.cells(x - 33, y - 11, ["", "", ""], (22, 22), "grey", strong=True)
    drawing.text(x, y - 24, name, SMALL, anchor="middle")
    drawing.text(x, y + 25, note, SMALL, "muted", "middle")


def _event_lines(drawing: Drawing, y: float) -> None:
    panel = drawing.panel(Rect(MARGIN, y, RIGHT - MARGIN, 136), "What the client reads: server-sent events", "blue")
    lines = (
        ('data: {…,"choices":[{…,"delta":{"role":"assistant","content":""}}]}', "first the role"),
        ('data: {…,"choices":[{…,"delta":{"content":"A"}}]}', "one event per piece of text"),
        ('data: {…,"choices":[{…,"delta":{"content":" KV"}}]}', ""),
        ('data: {…,"choices":[{…,"finish_reason":"stop","delta":{},…}]}', "the end, and why"),
        ("data: [DONE]", ""),
    )
    for index, (line, note) in enumerate(lines):
        at = panel.y + 43 + 19 * index
        drawing.text(panel.x + 14, at, line, CODE)
        drawing.text(panel.right - 14, at, note, SMALL, "muted", "end")
