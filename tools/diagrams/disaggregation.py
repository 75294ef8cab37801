"""Part 13: the proxy, the two kinds of engines, and how KV gets from one to the other."""

from __future__ import annotations

from dataclasses import dataclass

from .geometry import Rect
from .metrics import BODY, BOLD, CODE, HEAD, SMALL, SMALL_BOLD
from .svg import CELL_RADIUS, MARGIN, WIDTH, Drawing

RIGHT = WIDTH - MARGIN
ENGINE_WIDTH, ROOM_MARGIN = 300.0, 14.0


@dataclass(frozen=True, slots=True)
class Engine:
    """What one of the two engines does. agent: the class that moves its KV. orders: what core tells it."""

    title: str
    model: str
    jobs: tuple[str, str]
    agent: str
    agent_job: str
    orders: str
    is_left: bool


PREFILL = Engine(
    "Prefill engine", "computes prompts", ("offers prompts,", "leases blocks"), "KVSender", "reads blocks",
    "Offer, Publish, Confirm", True,
)  # fmt: skip
DECODE = Engine(
    "Decode engine", "computes answers", ("orders fetches,", "leases blocks"), "KVReceiver", "writes blocks",
    "Watch, Fetch, Release", False,
)  # fmt: skip


def disaggregation() -> Drawing:
    """Client, proxy, a prefill engine and a decode engine, and the six things that pass between them."""
    drawing = Drawing(
        "Disaggregated prefill and decode",
        "A client, a proxy, a prefill engine and a decode engine. Each engine has an API server, a core with "
        "KVTransfer, and a worker with a model and a KV pool; the prefill engine's worker has a KVSender, the decode "
        "engine's a KVReceiver. 1: the client sends its request to the proxy. 2: the proxy sends it to the prefill "
        "engine, for one token, with a transfer id. 3: when that engine has admitted it, the proxy sends the client's "
        "request to the decode engine, with the transfer id and the sources. 4: the KVReceiver asks the KVSender: "
        "watch, then fetch. 5: the KVSender sends the KV layer by layer, over TCP or through shared memory. 6: tokens "
        "go from the decode engine through the proxy to the client.",
    )
    top = drawing.heading("Requests and tokens pass through the proxy. KV goes directly from engine to engine.")
    client = drawing.box(Rect(WIDTH / 2 - 70, top + 2, 140, 34), "Client", hue="grey")
    proxy = Rect(MARGIN, client.bottom + 50, RIGHT - MARGIN, 46)
    drawing.box(proxy, "Proxy", ["chooses a prefill engine and a decode engine for each request"], "orange")
    _numbered(drawing, (client.cx - 26, client.bottom), (client.cx - 26, proxy.y), 1, ["request"], "left")
    _numbered(drawing, (client.cx + 26, proxy.y), (client.cx + 26, client.bottom), 6, ["tokens"], "right")
    y = proxy.bottom + 76
    sender = _engine(drawing, PREFILL, MARGIN, y)
    receiver = _engine(drawing, DECODE, RIGHT - ENGINE_WIDTH, y)
    left, right = MARGIN + 140, RIGHT - ENGINE_WIDTH + 150
    lines = ["request for one token,", "transfer id"]
    _numbered(drawing, (left, proxy.bottom), (left, y + 36), 2, lines, "right", (proxy.bottom + y) / 2)
    lines = ["the client's request,", "transfer id, sources"]
    _numbered(drawing, (right, proxy.bottom), (right, y + 36), 3, lines, "left", (proxy.bottom + y) / 2)
    right += 70
    _numbered(drawing, (right, y + 36), (right, proxy.bottom), 6, ["tokens"], "right", (proxy.bottom + y) / 2)
    _between(drawing, sender, receiver)
    drawing.paragraph(
        MARGIN, drawing.page.bottom + 4,
        "The proxy sends 3 when the prefill engine has admitted 2. In 4 and 5, each rank of the decode "
        "engine gets its layers and heads.", WIDTH - 2 * MARGIN, ink="muted",
    )  # fmt: skip
    return drawing


def _numbered(
    drawing: Drawing, start: tuple[float, float], end: tuple[float, float], number: int, lines: list[str], side: str,
    middle: float | None = None,
) -> None:  # fmt: skip
    """A vertical arrow with its number and a label at a side."""
    x, y = start[0], (start[1] + end[1]) / 2 if middle is None else middle
    drawing.arrow([start, end])
    way = -1 if side == "left" else 1
    drawing.badge(x + way * 19, y, str(number))
    first = y - (len(lines) - 1) * SMALL.line_height / 2
    for index, line in enumerate(lines):
        at = x + way * 36, first + index * SMALL.line_height
        drawing.text(*at, line, SMALL, anchor="end" if side == "left" else "start")


def _engine(drawing: Drawing, engine: Engine, x: float, y: float) -> Rect:
    """An engine with its three rooms. Returns the box that sends or receives."""
    panel = drawing.shape(Rect(x, y, ENGINE_WIDTH, 364), "page", 12)
    drawing.text(x + 14, y + 18, engine.title, HEAD)
    inner, width = x + ROOM_MARGIN, ENGINE_WIDTH - 2 * ROOM_MARGIN
    api = _room(drawing, Rect(inner, y + 36, width, 46), "api", "blue")
    drawing.box(Rect(inner + 70, api.y + 8, width - 80, 30), "API server", hue="blue")
    core = _room(drawing, Rect(inner, api.bottom + 26, width, 76), "core", "purple")
    scheduler = drawing.box(Rect(inner + 70, core.y + 8, 72, 60), "Scheduler", hue="purple")
    transfer = drawing.box(
        Rect(scheduler.right + 22, core.y + 8, inner + width - scheduler.right - 32, 60),
        "`KVTransfer`", list(engine.jobs), "purple", strong=True,
    )  # fmt: skip
    drawing.arrow([scheduler.right_center, transfer.left_center], both=True)
    worker = _room(drawing, Rect(inner, core.bottom + 34, width, 130), "worker", "green")
    assert worker.bottom < panel.bottom
    drawing.arrow([(inner + 32, api.bottom), (inner + 32, core.y)], both=True)
    drawing.arrow([(inner + 32, core.bottom), (inner + 32, worker.y)], both=True)
    drawing.text(inner + 48, (core.bottom + worker.y) / 2, engine.orders, CODE, "muted")
    return _worker(drawing, engine, worker)


def _room(drawing: Drawing, rect: Rect, name: str, hue: str) -> Rect:
    drawing.panel(rect)
    drawing.text(rect.x + 12, rect.y + 18, name, HEAD, f"{hue}-ink")
    return rect


def _worker(drawing: Drawing, engine: Engine, worker: Rect) -> Rect:
    pool_x, agent_x = worker.x + 10, worker.right - 120
    if not engine.is_left:
        pool_x, agent_x = worker.right - 124, worker.x + 10
    model = Rect(worker.x + 70, worker.y + 8, worker.width - 80, 40)
    drawing.box(model, "Model", [engine.model], "green")
    pool = drawing.shape(Rect(pool_x, worker.bottom - 62, 114, 54), "green")
    drawing.text(pool.cx, pool.y + 15, "KV pool", BOLD, anchor="middle")
    for number in range(5):
        style = "green-strong" if number in (1, 2, 4) else "page"
        drawing.shape(Rect(pool.x + 9 + 20 * number, pool.bottom - 24, 16, 16), style, CELL_RADIUS)
    agent = Rect(agent_x, pool.y, 110, pool.height)
    drawing.box(agent, f"`{engine.agent}`", [engine.agent_job], "orange", strong=True)
    x = pool.right - 14 if engine.is_left else pool.cx
    drawing.arrow([(x, model.bottom), (x, pool.y)], both=True)
    if engine.is_left:
        drawing.arrow([pool.right_center, agent.left_center])
    else:
        drawing.arrow([agent.right_center, pool.left_center])
    return agent


def _between(drawing: Drawing, sender: Rect, receiver: Rect) -> None:
    """The two things that pass between the engines."""
    middle = (sender.right + receiver.x) / 2
    above, below = sender.y + 14, sender.bottom - 14
    drawing.arrow([(receiver.x, above), (sender.right, above)])
    drawing.arrow([(sender.right, below), (receiver.x, below)], hue="orange")
    drawing.badge(middle, above - 38, "4")
    drawing.text(middle, above - 16, "watch, then fetch", SMALL, anchor="middle")
    drawing.badge(middle, below + 22, "5")
    drawing.text(middle, below + 42, "KV, layer by layer", SMALL_BOLD, anchor="middle")
    drawing.text(middle, below + 58, "over TCP, or through shared memory", SMALL, "muted", "middle")


LANE = 146.0  # where time begins
START, LAYER, NUM_LAYERS, NUM_STEPS = 180.0, 34.0, 4, 3  # the first step; the width of a layer
PIECE, FIRST_PIECE, DELAY = 24.0, 275.0, 14.0  # the width of a piece; when the first is sent, and how late each arrives
DECODE_STEP, ALLOCATED, NUM_WAITED = 42.0, 260.0, 10  # the decode engine's steps; how many of them the fetch takes
STATES = ("orange", "orange-strong", "orange")  # of the pieces of each chunk


def sent_pieces() -> list[tuple[int, int, float]]:
    """(step, layer, when it is sent): one after the other, none before its layer is computed."""
    pieces, free = list[tuple[int, int, float]](), FIRST_PIECE
    for step in range(NUM_STEPS):
        for layer in range(NUM_LAYERS):
            free = max(free, START + (NUM_LAYERS * step + layer + 1) * LAYER)
            pieces.append((step, layer, free))
            free += PIECE
    return pieces


def kv_transfer() -> Drawing:
    """One prompt of three chunks that is computed by one engine, and fetched by another meanwhile."""
    drawing = Drawing(
        "One transfer",
        "A time axis with the lanes of a prefill engine and a decode engine. The prefill engine computes a prompt in "
        "three steps of four layers each. The decode engine watches the prompt; its request waits without blocks. When "
        "the prefill engine has started, the decode engine allocates blocks and fetches. From then on, each layer is "
        "sent as soon as it is computed, while the prefill engine computes the next ones. After the last step, the "
        "prefill engine confirms, and its request ends, but its blocks stay leased. When the fetch has ended, the "
        "decode engine releases the prompt and computes its last token; the prefill engine's blocks are free. "
        "Meanwhile, the decode engine has computed steps of other requests.",
    )
    top = drawing.heading(
        "Each layer is sent as soon as it is computed: most of the KV has arrived when the last layer is computed. A "
        "prompt of three chunks, a model with four layers; numbers are layers. Time goes from left to right."
    )
    prefill = drawing.panel(Rect(MARGIN, top, RIGHT - MARGIN, 172), "Prefill engine", "purple")
    decode = drawing.panel(Rect(MARGIN, prefill.bottom + 74, RIGHT - MARGIN, 190), "Decode engine", "purple")
    sent, end = _prefill_lane(drawing, prefill)
    received = _decode_lane(drawing, decode)
    _messages(drawing, prefill, decode, sent, received, end)
    drawing.legend(
        MARGIN, decode.bottom + 26,
        [("orange", "a piece: the KV of one chunk in one layer"), ("grey", "steps with other requests only"),
         ("green-strong", "with this request, too")],
    )  # fmt: skip
    return drawing


def _bar(drawing: Drawing, left: float, right: float, y: float, label: str, style: str, dashed: bool = False) -> Rect:
    rect = drawing.shape(Rect(left, y, right - left, 28), style, CELL_RADIUS, dashed=dashed)
    if label:
        drawing.text(rect.cx, rect.cy, label, SMALL, anchor="middle")
    return rect


def _prefill_lane(drawing: Drawing, panel: Rect) -> tuple[float, float]:
    """Returns the lower edge of the pieces, and when the last one was sent."""
    x, computed = panel.x + 14, START + NUM_STEPS * NUM_LAYERS * LAYER
    blocks, layers, pieces = panel.y + 36, panel.y + 88, panel.y + 134
    for y, label in ((blocks, "Blocks"), (layers, "Model"), (pieces, "`KVSender`")):
        drawing.text(x, y + 14, label, BODY)
    confirmed, released = computed + 36, ALLOCATED + NUM_WAITED * DECODE_STEP + 22
    _bar(drawing, START, confirmed, blocks, "held by the request, and leased", "purple-strong")
    _bar(drawing, confirmed, released, blocks, "leased", "purple")
    _bar(drawing, released, RIGHT - 14, blocks, "free", "page", dashed=True)
    drawing.text(confirmed, panel.y + 18, "all steps have succeeded: the request ends", SMALL, anchor="middle")
    drawing.arrow([(confirmed, blocks + 28), (confirmed, pieces + 14)])
    drawing.text(confirmed + 8, layers + 14, "`Confirm`", SMALL)
    for step in range(NUM_STEPS):
        left = START + step * NUM_LAYERS * LAYER
        names = [str(layer) for layer in range(NUM_LAYERS)]
        drawing.cells(left, layers, names, (LAYER, 28), "green", strong=step % 2 == 1)
        drawing.text(left + 2 * LAYER, layers - 11, f"chunk {step + 1}", SMALL, "muted", "middle")
    for step, layer, at in sent_pieces():
        rect = Rect(at, pieces, PIECE, 24)
        drawing.shape(rect, STATES[step], CELL_RADIUS)
        drawing.text(rect.cx, rect.cy, str(layer), SMALL, anchor="middle")
    return pieces + 24, confirmed + 14


def _decode_lane(drawing: Drawing, panel: Rect) -> float:
    """Returns the upper edge of the pieces."""
    x = panel.x + 14
    pieces, request, steps = panel.y + 36, panel.y + 82, panel.y + 128
    for y, label in ((pieces, "`KVReceiver`"), (request, "Request"), (steps, "Model")):
        drawing.text(x, y + 12, label, BODY)
    started = ALLOCATED + NUM_WAITED * DECODE_STEP
    for step, layer, at in sent_pieces():
        rect = Rect(at + DELAY, pieces, PIECE, 24)
        drawing.shape(rect, STATES[step], CELL_RADIUS)
        drawing.text(rect.cx, rect.cy, str(layer), SMALL, anchor="middle")
    _bar(drawing, LANE, ALLOCATED, request, "waits, no blocks", "page", dashed=True)
    _bar(drawing, ALLOCATED, started, request, "waits, with blocks for the KV", "purple")
    _bar(drawing, started, RIGHT - 14, request, "runs", "purple-strong")
    at = ALLOCATED - 2 * DECODE_STEP
    drawing.shape(Rect(LANE, steps, at - LANE, 28), "grey", CELL_RADIUS)
    while at + DECODE_STEP < RIGHT:
        is_own = at >= started
        drawing.shape(Rect(at, steps, DECODE_STEP, 28), "green-strong" if is_own else "grey", CELL_RADIUS)
        at += DECODE_STEP
    middle, under = started + DECODE_STEP / 2, steps + 44
    drawing.line([(middle, steps + 28), (middle, under), (middle - 12, under)])
    drawing.text(
        middle - 18, under, "computes the prompt's last token, and samples the answer's first", SMALL, anchor="end"
    )
    return pieces


def _messages(drawing: Drawing, prefill: Rect, decode: Rect, sent: float, received: float, end: float) -> None:
    """What passes between the two engines."""
    upper, lower = prefill.bottom + 24, prefill.bottom + 52
    request = decode.y + 82
    started, run = START + LAYER + 6, ALLOCATED + NUM_WAITED * DECODE_STEP
    drawing.arrow([(LANE + 8, request), (LANE + 8, sent - 10)])
    drawing.text(LANE, upper, "watch", SMALL, anchor="end")
    drawing.arrow([(started, prefill.y + 88 + 28), (started, request)])
    drawing.text(started - 8, upper, "started", SMALL, anchor="end")
    drawing.arrow([(ALLOCATED + 6, request), (ALLOCATED + 6, sent - 10)])
    drawing.text(ALLOCATED - 2, lower, "fetch", SMALL, anchor="end")
    for _, _, at in sent_pieces():
        drawing.arrow([(at + PIECE / 2, sent), (at + DELAY + PIECE / 2, received)], hue="orange")
    drawing.arrow([(end, sent - 10), (end, request)])
    drawing.text(end + 8, upper, "ended", SMALL)
    drawing.arrow([(run + 14, request), (run + 14, prefill.y + 36 + 28)])
    drawing.text(run + 22, upper, "release", SMALL)
