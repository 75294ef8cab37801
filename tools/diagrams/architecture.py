"""The whole architecture after each part: the same picture, which fills up from part to part."""

from __future__ import annotations

from dataclasses import dataclass

from .geometry import Point, Rect
from .metrics import HEAD, SMALL
from .svg import MARGIN, PANEL_RADIUS, WIDTH, Drawing

RIGHT = WIDTH - MARGIN
FIRST_ROOMS, FIRST_BORDER, FIRST_RANKS = 3, 5, 9  # the parts that bring the three rooms, and the process borders
STACK = 5.0  # how far the panels of several ranks are apart
COLUMNS = (128.0, 308.0, 488.0, 668.0)
BOX_WIDTH, BOX_HEIGHT, PILL_HEIGHT = 152.0, 46.0, 26.0


@dataclass(frozen=True, slots=True)
class Version:
    """What a box says from one part on."""

    part: int
    title: str
    line: str


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of the architecture: where it stands in every picture, and its versions."""

    rect: Rect
    hue: str
    versions: tuple[Version, ...]

    def at(self, part: int) -> Version | None:
        """The version that is in force after a part; None before the piece exists."""
        return next((version for version in reversed(self.versions) if version.part <= part), None)


def _piece(
    column: int, y: float, hue: str, *versions: Version, height: float = BOX_HEIGHT, num_columns: int = 1
) -> Piece:
    width = COLUMNS[column + num_columns - 1] - COLUMNS[column] + BOX_WIDTH
    return Piece(Rect(COLUMNS[column], y, width, height), hue, versions)


PIECES = {
    "client": _piece(0, 80, "grey", Version(1, "Client", "curl"), Version(2, "Client", "curl, openai"), height=42),
    "router": _piece(
        1, 80, "grey", Version(10, "Router", "chooses a replica"), Version(13, "Proxy", "chooses two engines"),
        height=42,
    ),
    "replicas": _piece(
        2, 80, "grey", Version(10, "Replicas", "each as below"), Version(13, "Engines", "prefill or decode"),
        height=42,
    ),
    "server": _piece(
        0, 148, "blue", Version(1, "API server", "Flask, one thread"), Version(2, "API server", "FastAPI, SSE stream"),
    ),
    "async_llm": _piece(
        0, 214, "blue", Version(2, "AsyncLLM", "engine thread, queue"), Version(5, "AsyncLLM", "all on the event loop"),
    ),
    "output": _piece(
        1, 214, "blue", Version(2, "Detokenizer", "ids to text"),
        Version(3, "Output processor", "text of all requests"),
    ),
    "core_client": _piece(0, 278, "blue", Version(5, "CoreClient", ""), height=PILL_HEIGHT),
    "dp_client": _piece(2, 214, "blue", Version(10, "DataParallelClient", "a CoreClient per core")),
    "engine_core": _piece(0, 352, "purple", Version(5, "EngineCore", ""), height=PILL_HEIGHT),
    "engine": _piece(
        0, 398, "purple", Version(1, "LLM", "generate: the loop"), Version(2, "LLM", "stream: a generator"),
        Version(3, "LLMEngine", "static batches"), Version(4, "LLMEngine", "schedule, execute, update"),
        Version(5, "LLMEngine", "one step ahead"), Version(8, "LLMEngine", "several tokens a step"),
    ),
    "scheduler": _piece(
        1, 398, "purple", Version(4, "Scheduler", "a new batch each step"),
        Version(5, "Scheduler", "counts placeholders"), Version(6, "Scheduler", "budget, chunks"),
        Version(7, "Scheduler", "looks up cached blocks"), Version(8, "Scheduler", "chunks and draft tokens"),
        Version(9, "Scheduler", "a step for each stage"), Version(13, "Scheduler", "asks the KV connectors"),
    ),
    "blocks": _piece(
        2, 398, "purple", Version(3, "Block manager", "block tables"),
        Version(7, "Block manager", "leases, free queue"),
    ),
    "prefix": _piece(3, 398, "purple", Version(7, "Prefix cache", "block hashes")),
    "executor": _piece(
        0, 464, "purple", Version(3, "Executor", "runs a StepInput"), Version(5, "Executor", "launches a StepInput"),
        Version(9, "Executor", "a process per rank"),
    ),
    "eplb": _piece(2, 464, "purple", Version(11, "EPLB", "places experts")),
    "lockstep": _piece(3, 464, "purple", Version(11, "Lockstep", "cores in step")),
    "speculation": _piece(1, 464, "purple", Version(8, "Speculation", "n-gram lookup, limits")),
    "runner": _piece(
        0, 562, "green", Version(3, "Model runner", "one flat batch"),
        Version(4, "Model runner", "decodes and prompts"), Version(5, "Model runner", "prepare, then run"),
        Version(6, "Model runner", "samples if asked"), Version(13, "Model runner", "reports each layer"),
        Version(15, "Model runner", "replays padded steps"),
    ),
    "model": _piece(
        1, 562, "green", Version(1, "Model", "transformers"), Version(3, "Model", "our own, plain torch"),
        Version(9, "Model", "a part of each layer"), Version(11, "Model", "dense, or experts"),
        Version(14, "Model", "weights or their codes"), Version(15, "Model", "fused operations"),
    ),
    "attention": _piece(
        2, 562, "green", Version(3, "Attention kernel", "paged decode"),
        Version(6, "Attention kernel", "decodes and chunks"), Version(14, "Attention kernel", "reads numbers or codes"),
        Version(15, "Attention kernel", "splits long contexts"),
    ),
    "kv_cache": _piece(
        3, 562, "green", Version(1, "KV cache", "DynamicCache"), Version(3, "KV cache", "a pool of blocks"),
        Version(14, "KV cache", "numbers or codes"), Version(15, "KV cache", "written by a kernel"), height=112,
    ),
    "tokens": _piece(0, 628, "green", Version(3, "Token buffer", "stays on the device")),
    "sampler": _piece(
        1, 628, "green", Version(1, "Sampler", "one token id"), Version(3, "Sampler", "the whole batch"),
        Version(8, "Sampler", "verifies draft tokens"), Version(15, "Sampler", "samples without a sort"),
    ),
    "draft_model": _piece(2, 628, "green", Version(8, "Draft model", "proposes draft tokens")),
    "offloader": _piece(
        2, 352, "purple", Version(12, "Offloader", ""), Version(13, "Offloader", ""), height=PILL_HEIGHT,
    ),
    "transfer": _piece(1, 352, "purple", Version(13, "KVTransfer", ""), height=PILL_HEIGHT),
    "quantization": _piece(
        0, 694, "green", Version(14, "Quantization", "codes and scales"),
        Version(15, "Quantization", "a kernel per backend"),
    ),
    "fetcher": _piece(1, 694, "green", Version(12, "Layer fetcher", "weights that don't fit")),
    "copier": _piece(3, 694, "green", Version(12, "Block copier", "host, disk, Redis")),
    "sender": _piece(2, 694, "green", Version(13, "KV sender, receiver", "from engine to engine")),
    "graphs": _piece(0, 760, "green", Version(15, "CUDA graphs", "a step is one call")),
    "kernels": _piece(
        1, 760, "green", Version(15, "Kernels", "CUDA C++, Triton or Numba for each operation"), num_columns=2
    ),
    "packed": _piece(3, 760, "green", Version(15, "Packed matrices", "in oneDNN's layout")),
}  # fmt: skip

SPINE = (
    "client",
    "router",
    "replicas",
    "server",
    "async_llm",
    "core_client",
    "engine_core",
    "engine",
    "executor",
    "runner",
)
# Of the arrows between two pieces, those are drawn whose ends exist and that nothing has replaced.
ARROWS = (
    ("client", "router"), ("router", "replicas"), ("router", "server"), ("server", "async_llm"),
    ("async_llm", "output"), ("async_llm", "core_client"), ("dp_client", "core_client"),
    ("core_client", "engine_core"), ("engine_core", "engine"), ("engine", "scheduler"), ("scheduler", "blocks"),
    ("blocks", "prefix"), ("engine", "executor"), ("scheduler", "speculation"), ("executor", "runner"),
    ("runner", "model"), ("model", "attention"), ("attention", "kv_cache"), ("runner", "tokens"), ("model", "sampler"),
    ("sampler", "tokens"), ("sampler", "draft_model"), ("draft_model", "kv_cache"), ("offloader", "blocks"),
    ("kv_cache", "copier"), ("transfer", "scheduler"), ("kv_cache", "sender"), ("model", "kernels"),
    ("runner", "graphs"),
)  # fmt: skip
EARLY_ARROWS = (  # (from, to, part in which a piece between them makes the arrow obsolete)
    ("client", "server", 10), ("server", "engine", 2), ("async_llm", "engine", 5), ("engine", "output", 3),
    ("engine", "blocks", 4), ("engine", "model", 3), ("model", "kv_cache", 3),
)  # fmt: skip
LATE_ARROWS = {("async_llm", "output"): 3}  # the first part that has the arrow; the default is 1
ROUTES = {  # around corners
    ("kv_cache", "sender"): [(668.0, 664.0), (654.0, 664.0), (654.0, 717.0), (640.0, 717.0)],
    ("model", "kernels"): [(460.0, 600.0), (474.0, 600.0), (474.0, 760.0)],
    ("runner", "graphs"): [(280.0, 600.0), (294.0, 600.0), (294.0, 783.0), (280.0, 783.0)],
}
ROOMS = (  # (name, what it does, its rectangle)
    ("api", "serves clients", "blue", Rect(MARGIN, 134, RIGHT - MARGIN, 184)),
    ("core", "decides", "purple", Rect(MARGIN, 338, RIGHT - MARGIN, 186)),
    ("worker", "computes", "green", Rect(MARGIN, 548, RIGHT - MARGIN, 272)),
)
SUBTITLES = {
    1: "One process, one thread, one request at a time.",
    2: "An event loop for HTTP, a thread for the engine.",
    3: "Three packages: api serves clients, core decides, worker computes.",
    4: "The scheduler rebuilds the batch before every step.",
    5: "api and core are two processes, and core runs one step ahead of the worker.",
    6: "The scheduler cuts prompts into chunks that fit a token budget.",
    7: "Full blocks are found by a hash of their content.",
    8: "Draft tokens are proposed, and verified by the target model.",
    9: "The worker runs once per rank, each in a process of its own, with a part of every layer.",
    10: "A router sends each request to one of several whole engines.",
    11: "Experts are spread over ranks, also over those of several engine cores.",
    12: "KV blocks and weights that the device has no room for are kept in slower memory.",
    13: "One engine computes the KV of a prompt, another decodes.",
    14: "Weights become codes of 4 or 8 bits, keys and values codes of 8 bits, with scales.",
    15: "Each operation has several kernels, and a small step is launched as one CUDA graph.",
}


def architecture_part(part: int) -> Drawing:
    """The picture after a part; its own pieces are orange and labelled new or changed."""
    present = {name: version for name, piece in PIECES.items() if (version := piece.at(part))}
    drawing = Drawing(
        f"The architecture after part {part}",
        _describe(part, present),
        min_height=ROOMS[-1][3].bottom + MARGIN + (2 * STACK if part >= FIRST_RANKS else 0),
    )
    drawing.heading(SUBTITLES[part])
    if part >= FIRST_ROOMS:
        _rooms(drawing, part)
    for name, piece in PIECES.items():
        if name in present:
            _draw_piece(drawing, piece, present[name], part)
        else:
            drawing.shape(piece.rect, "ghost", dashed=True, check=False)
    _legend(drawing, part)
    _arrows(drawing, part, present)
    if part >= FIRST_ROOMS:
        x = COLUMNS[0] + BOX_WIDTH / 2 + 12
        end = drawing.text(x, 536, "`StepInput` down, `StepOutput` up", SMALL, "muted").right
        if part >= FIRST_RANKS:
            ink, hue = ("orange-ink", "orange") if part == FIRST_RANKS else ("muted", "")
            start = drawing.text(RIGHT, 536, "process border: one process per rank", SMALL, ink, "end").x
            drawing.line([(end + 8, 536), (start - 8, 536)], hue, dashed=True)
    return drawing


def _legend(drawing: Drawing, part: int) -> None:
    items = [("orange-strong", "new" if part == 1 else "new or changed")]
    if part < max(SUBTITLES):
        items.append(("ghost dashed", "later parts"))
    width = sum(21 + SMALL.width(label) for _, label in items) + 20 * (len(items) - 1)
    drawing.legend(RIGHT - width, 34, items)


def _describe(part: int, present: dict[str, Version]) -> str:
    boxes = ", ".join(
        f"{version.title} ({version.line})" if version.line else version.title for version in present.values()
    )
    new = ", ".join(version.title for version in present.values() if version.part == part)
    return f"The boxes from the client down to the model: {boxes}. New or changed in part {part}: {new}."


def _rooms(drawing: Drawing, part: int) -> None:
    for name, job, hue, rect in ROOMS:
        if name == "worker" and part >= FIRST_RANKS:
            for offset in (2 * STACK, STACK):
                behind = Rect(rect.x + offset, rect.y + offset, rect.width, rect.height)
                drawing.shape(behind, "panel", PANEL_RADIUS, check=False)
        drawing.panel(rect)
        drawing.text(rect.x + 16, rect.y + 26, name, HEAD, f"{hue}-ink")
        drawing.paragraph(rect.x + 16, rect.y + 46, job, 84, SMALL, "muted")
    if part >= FIRST_RANKS:
        ink = "orange-ink" if part == FIRST_RANKS else "muted"
        drawing.paragraph(MARGIN + 16, ROOMS[-1][3].y + 72, "on each rank", 84, SMALL, ink)
    if part < FIRST_BORDER:
        drawing.text(RIGHT - 14, ROOMS[0][3].y + 20, "all in one process", SMALL, "muted", "end")
        return
    hue = "orange" if part == FIRST_BORDER else ""
    y = (ROOMS[0][3].bottom + ROOMS[1][3].y) / 2
    spine = COLUMNS[0] + BOX_WIDTH / 2
    drawing.line([(MARGIN, y), (spine - 8, y)], hue, dashed=True)
    drawing.line([(spine + 8, y), (COLUMNS[1], y)], hue, dashed=True)
    label = "process border: messages over ZeroMQ"
    end = drawing.text(COLUMNS[1] + 8, y, label, SMALL, f"{hue}-ink" if hue else "muted").right
    drawing.line([(end + 8, y), (RIGHT, y)], hue, dashed=True)
    drawing.text(RIGHT - 14, ROOMS[0][3].y + 20, "API process", SMALL, "muted", "end")
    drawing.text(RIGHT - 14, ROOMS[1][3].y + 20, "engine core process", SMALL, "muted", "end")


def _draw_piece(drawing: Drawing, piece: Piece, version: Version, part: int) -> None:
    is_new = version.part == part and piece is not PIECES["client"]
    lines = [version.line] if version.line else []
    drawing.box(piece.rect, version.title, lines, "orange" if is_new else piece.hue, strong=is_new)
    if is_new:
        label = "new" if version is piece.versions[0] else "changed"
        drawing.badge(piece.rect.right - (18 if label == "new" else 30), piece.rect.y - 4, label)


def _arrows(drawing: Drawing, part: int, present: dict[str, Version]) -> None:
    early = [(start, end) for start, end, until in EARLY_ARROWS if part < until]
    for start, end in (*ARROWS, *early):
        if start in present and end in present and part >= LATE_ARROWS.get((start, end), 1):
            points = ROUTES.get((start, end)) or _connect(PIECES[start].rect, PIECES[end].rect)
            drawing.arrow(points, both=start in SPINE and end in SPINE)


def _connect(start: Rect, end: Rect) -> list[Point]:
    """From one box to another in the same column or row, up between two columns, or down and then sideways."""
    if start.x == end.x:
        return [start.bottom_center, end.top_center]
    if end.bottom < start.y:
        x = (start.right + end.x) / 2
        return [start.right_center, (x, start.cy), (x, end.cy), end.left_center]
    y = start.cy if end.y <= start.cy <= end.bottom else end.y + min(BOX_HEIGHT, end.height) / 2
    if start.y <= y <= start.bottom:
        return [(start.right, y), (end.x, y)] if start.x < end.x else [(start.x, y), (end.right, y)]
    return [start.bottom_center, (start.cx, y), (end.x if start.cx < end.cx else end.right, y)]
