"""The front page's picture: the final architecture, each box with the number of the part that adds it."""

from __future__ import annotations

from dataclasses import dataclass

from .geometry import Rect
from .metrics import HEAD, SMALL
from .svg import MARGIN, PANEL_RADIUS, WIDTH, Drawing

NEWEST_PART = 15  # boxes of later parts are dashed
RIGHT = WIDTH - MARGIN
REPLICA_RIGHT, SIDE_LEFT = 648.0, 690.0
INNER_LEFT, INNER_RIGHT = 50.0, 622.0
BOX_HEIGHT, ROW_GAP, HEADER = 46.0, 14.0, 36.0


@dataclass(frozen=True, slots=True)
class Part:
    """A box: its title, what it does, and the parts that add it and extend it most."""

    title: str
    line: str
    parts: tuple[int, ...]


API = (
    (
        Part("API server", "HTTP, SSE", (1,)),
        Part("AsyncLLM", "streams", (2,)),
        Part("Output processor", "ids to text", (2,)),
    ),
)
CORE = (
    (Part("LLMEngine", "schedule, execute, update", (3, 5)), Part("Scheduler", "batches, chunks", (4, 6)),
     Part("Block manager", "block tables", (3,))),
    (Part("EngineCore", "messages, busy loop", (5,)), Part("Speculation", "draft tokens", (8,)),
     Part("Prefix cache", "block hashes", (7,))),
    (Part("Executor", "one worker, or many", (3, 9)), Part("KV offloading", "which tier, and when", (12,)),
     Part("KV connector", "what to fetch, and when", (13,))),
)  # fmt: skip
WORKER = (
    (Part("Model runner", "flat batch", (3,)), Part("Model", "decoder", (3,)), Part("Attention", "paged", (3, 15)),
     Part("KV cache", "blocks", (3, 14)), Part("KV sender", "and receiver", (13,))),
    (Part("Token buffer", "on the device", (3,)), Part("Parallel layers", "a slice each", (9,)),
     Part("Kernels", "CUDA, Triton", (15,)), Part("CUDA graphs", "one launch", (15,)),
     Part("Block copier", "between tiers", (12,))),
    (Part("Sampler", "verifies draft tokens", (1, 8)), Part("Experts", "all-to-all", (11,)),
     Part("Quantized layers", "fewer bits", (14,)), Part("Draft model", "proposes", (8,))),
)  # fmt: skip


def architecture() -> Drawing:
    """Router, replicas, one replica opened with its three packages, prefill pool and KV tiers."""
    rooms = (("api", API), ("core", CORE), ("worker", WORKER))
    boxes = "; ".join(f"{name}: {', '.join(_spoken(part) for row in rows for part in row)}" for name, rows in rooms)
    drawing = Drawing(
        "The architecture of all fifteen parts",
        "Clients send requests to the router (part 10), which chooses a replica. One replica is open and shows "
        f"three packages. {boxes}. Between api and core there is a process border (part 5); workers are one process "
        "per rank (part 9). At the right: more replicas (part 10), a prefill pool that sends KV blocks (part 13), "
        "and the KV tiers CPU memory, disk and Redis (part 12).",
    )
    drawing.heading("The number on a box is the part that adds it. A second number is a part that extends it.")
    _front(drawing)
    top = 214.0
    replica = drawing.shape(Rect(MARGIN, top, REPLICA_RIGHT - MARGIN, 646), "page", PANEL_RADIUS)
    drawing.text(replica.x + 14, top + 19, "One replica", HEAD)
    drawing.text(replica.right - 14, top + 19, "in the decode pool, from part 13 on", SMALL, "muted", "end")
    api = _room(drawing, "api", "serves clients", "blue", top + 36, API)
    core = _room(drawing, "core", "decides", "purple", api.bottom + 30, CORE)
    worker = _room(drawing, "worker", "computes", "green", core.bottom + 30, WORKER, num_cards=2)
    _border(drawing, api, core, "process border: ZeroMQ", 5)
    _border(drawing, core, worker, "one process per rank", 9)
    _neighbors(drawing, api, core, worker)
    return drawing


def _spoken(part: Part) -> str:
    return f"{part.title} (part {part.parts[0]})"


def _box(drawing: Drawing, rect: Rect, part: Part, hue: str) -> Rect:
    drawing.box(rect, part.title, [part.line] if part.line else [], hue, dashed=part.parts[0] > NEWEST_PART)
    x = rect.right - 14
    for number in reversed(part.parts):
        x = drawing.badge(x, rect.y - 4, str(number), hue).x - 16
    return rect


def _front(drawing: Drawing) -> None:
    clients = drawing.box(Rect(360, 84, 140, 34), "Clients", hue="grey")
    part = Part("Router, proxy", "routing policies, health, draining, prefill and decode roles", (10, 13))
    router = _box(drawing, Rect(MARGIN, 142, RIGHT - MARGIN, BOX_HEIGHT), part, "orange")
    drawing.arrow([clients.bottom_center, router.top_center], both=True)


def _room(
    drawing: Drawing, name: str, job: str, hue: str, y: float, rows: tuple[tuple[Part, ...], ...], num_cards: int = 0
) -> Rect:
    height = HEADER + len(rows) * BOX_HEIGHT + (len(rows) - 1) * ROW_GAP + 12
    room = Rect(INNER_LEFT - 14, y, INNER_RIGHT - INNER_LEFT + 28, height)
    for card in range(num_cards, 0, -1):  # the other ranks, behind
        card_rect = Rect(room.x + 5 * card, y + 5 * card, room.width - 5 * num_cards, height)
        drawing.shape(card_rect, "panel", PANEL_RADIUS, check=False)
    drawing.panel(room)
    end = drawing.text(room.x + 14, y + 15, name, HEAD, f"{hue}-ink").right
    drawing.text(end + 10, y + 15, job, SMALL, "muted")
    for row, parts in enumerate(rows):
        gap = 16.0
        width = (INNER_RIGHT - INNER_LEFT - gap * (len(parts) - 1)) / len(parts)
        for column, part in enumerate(parts):
            x = INNER_LEFT + column * (width + gap)
            _box(drawing, Rect(x, y + HEADER + row * (BOX_HEIGHT + ROW_GAP), width, BOX_HEIGHT), part, hue)
    return room


def _border(drawing: Drawing, above: Rect, below: Rect, label: str, part: int) -> None:
    """A dashed line between two rooms, with a label and the part's number."""
    y, x = (above.bottom + below.y) / 2, INNER_LEFT + 100
    end = drawing.text(x + 14, y, label, SMALL, "muted").right
    badge = drawing.badge(end + 20, y, str(part), "grey")
    drawing.line([(above.x, y), (INNER_LEFT + 30, y)], dashed=True)
    drawing.line([(INNER_LEFT + 50, y), (x + 6, y)], dashed=True)
    drawing.line([(badge.right + 8, y), (above.right, y)], dashed=True)
    drawing.arrow([(INNER_LEFT + 40, above.bottom), (INNER_LEFT + 40, below.y)], both=True)


def _neighbors(drawing: Drawing, api: Rect, core: Rect, worker: Rect) -> None:
    width = RIGHT - SIDE_LEFT
    drawing.arrow([(INNER_LEFT + 158, 142 + BOX_HEIGHT), (INNER_LEFT + 158, api.y)], both=True)
    replicas = [Rect(SIDE_LEFT, 240 + index * 64, width, BOX_HEIGHT) for index in range(2)]
    for number, rect in enumerate(replicas, start=2):
        _box(drawing, rect, Part(f"Replica {number}", "the same again", (10,)), "orange")
    drawing.arrow([(replicas[0].cx, 142 + BOX_HEIGHT), replicas[0].top_center], both=True)
    engines = (("Engine", "computes prompts"), ("Engine", "computes prompts"))
    pool = _side_panel(drawing, core.bottom - HEADER - 2 * (BOX_HEIGHT + ROW_GAP), "Prefill pool", engines, 13)
    x, receiver_y = (pool.x + REPLICA_RIGHT) / 2, worker.y + HEADER + BOX_HEIGHT / 2
    pool_y = pool.bottom - ROW_GAP - BOX_HEIGHT / 2
    drawing.arrow([(pool.x, pool_y), (x, pool_y), (x, receiver_y), (INNER_RIGHT, receiver_y)])
    drawing.text(x + 8, (pool.bottom + worker.y) / 2, "KV", SMALL, "muted")
    copier_y = worker.y + HEADER + BOX_HEIGHT + ROW_GAP + BOX_HEIGHT / 2
    tiers = (("CPU memory", ""), ("Disk", ""), ("Redis", ""))
    side = _side_panel(drawing, worker.y, "KV tiers", tiers, 12)
    drawing.arrow([(INNER_RIGHT, copier_y), (side.x, copier_y)], both=True)
    drawing.text((side.x + REPLICA_RIGHT) / 2, copier_y - 12, "KV", SMALL, "muted", "middle")


def _side_panel(drawing: Drawing, y: float, title: str, boxes: tuple[tuple[str, str], ...], part: int) -> Rect:
    height = HEADER + len(boxes) * (BOX_HEIGHT + ROW_GAP)
    panel = drawing.panel(Rect(SIDE_LEFT, y, RIGHT - SIDE_LEFT, height), title, dashed=part > NEWEST_PART)
    for index, (name, line) in enumerate(boxes):
        rect = Rect(panel.x + 14, y + HEADER + index * (BOX_HEIGHT + ROW_GAP), panel.width - 28, BOX_HEIGHT)
        _box(drawing, rect, Part(name, line, (part,)), "orange")
    return panel
