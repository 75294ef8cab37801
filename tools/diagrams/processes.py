"""Part 5: two processes and their messages, and steps that overlap."""

from __future__ import annotations

from .geometry import Rect
from .metrics import BODY, BOLD, CODE, HEAD, SMALL
from .svg import CELL_RADIUS, MARGIN, WIDTH, Drawing

RIGHT = WIDTH - MARGIN


def processes() -> Drawing:
    """The API process, the engine core process, their threads, sockets and messages."""
    drawing = Drawing(
        "Two processes",
        "Left, the API process: its event loop runs the HTTP server, AsyncLLM, OutputProcessor and CoreClient. "
        "Right, the engine core process: the main thread runs EngineCore.run, which receives messages, takes a "
        "step of LLMEngine and sends its outputs; the model thread runs the model; the thread parent-watch ends "
        "the process when its parent ends. Between them two ZeroMQ sockets: requests carries Start, AddRequest and "
        "AbortRequests; outputs carries Ready, StartFailed, EngineCoreOutputs and EngineCoreDead.",
    )
    top = drawing.heading("From part 5 on, HTTP and text are in one process, the scheduler and the model in another.")
    api = drawing.panel(Rect(MARGIN, top, 236, 404), "API process", "blue")
    core = drawing.panel(Rect(RIGHT - 250, top, 250, 404), "Engine core process", "purple")
    client = _api_process(drawing, api)
    busy_loop = _core_process(drawing, core)
    _sockets(drawing, api, core, client, busy_loop)
    y = api.bottom + 28
    sockets = "The sockets are files in a directory that only you can enter."
    drawing.text(MARGIN, y, f"Messages are msgspec structs; nothing is unpickled. {sockets}", ink="muted")
    return drawing


def _api_process(drawing: Drawing, panel: Rect) -> Rect:
    x, width = panel.x + 16, panel.width - 32
    drawing.text(x, panel.y + 42, "event loop", SMALL, "muted")
    server = drawing.box(Rect(x, panel.y + 54, width, 54), "HTTP server", ["JSON, server-sent events"], "blue")
    llm = drawing.shape(Rect(x, server.bottom + 34, width, 122), "blue")
    drawing.text(llm.cx, llm.y + 18, "`AsyncLLM`", BOLD, anchor="middle")
    drawing.text(llm.cx, llm.y + 36, "one stream per request", SMALL, anchor="middle")
    inner = Rect(x + 12, llm.y + 52, width - 24, 58)
    drawing.box(inner, "`OutputProcessor`", ["ids to text, stop strings"], "blue", strong=True)
    client = drawing.box(
        Rect(x, llm.bottom + 34, width, 76), "`CoreClient`", ["starts the core,", "notices if it dies"], "blue"
    )
    for above, below in ((server, llm), (llm, client)):
        drawing.arrow([above.bottom_center, below.top_center], both=True)
    return client


def _core_process(drawing: Drawing, panel: Rect) -> Rect:
    x, width = panel.x + 16, panel.width - 32
    drawing.text(x, panel.y + 42, "main thread", SMALL, "muted")
    loop = drawing.box(
        Rect(x, panel.y + 54, width, 92), "`EngineCore.run`",
        ["`receive` messages", "`step` the engine", "send its outputs"], "purple",
    )  # fmt: skip
    engine = drawing.box(
        Rect(x, loop.bottom + 26, width, 54), "`LLMEngine.step`", ["schedule, launch, update"], "purple"
    )
    drawing.text(x, engine.bottom + 26, "model thread, or CUDA stream", SMALL, "muted")
    runner = drawing.box(
        Rect(x, engine.bottom + 38, width, 54), "`ModelRunner.run`", ["one step after the other"], "green"
    )
    drawing.text(x, runner.bottom + 20, "thread `parent-watch`", SMALL, "muted")
    drawing.box(Rect(x, runner.bottom + 32, width, 40), "", ["ends the core if the API ends"], "grey")
    drawing.arrow([loop.bottom_center, engine.top_center], both=True)
    drawing.arrow([(runner.right - 20, engine.bottom), (runner.right - 20, runner.y)], both=True)
    return loop


def _sockets(drawing: Drawing, api: Rect, core: Rect, client: Rect, busy_loop: Rect) -> None:
    x, right = api.right + 34, core.x - 34
    requests = Rect(x, api.y + 54, right - x, 118)
    outputs = Rect(x, requests.bottom + 74, right - x, 140)
    for rect, name, kinds, messages in (
        (requests, "socket `requests`", "PUSH to PULL", ("Start", "AddRequest", "AbortRequests")),
        (
            outputs,
            "socket `outputs`",
            "PULL from PUSH",
            ("Ready", "StartFailed", "EngineCoreOutputs", "EngineCoreDead"),
        ),
    ):
        drawing.panel(rect)
        drawing.text(rect.cx, rect.y + 20, name, BOLD, anchor="middle")
        drawing.text(rect.cx, rect.y + 38, kinds, SMALL, "muted", "middle")
        for index, message in enumerate(messages):
            drawing.text(rect.cx, rect.y + 62 + 20 * index, message, CODE, anchor="middle")
    bend = api.right + 17
    low = core.x - 17
    drawing.arrow([(client.right, client.y + 18), (bend, client.y + 18), (bend, requests.cy), requests.left_center])
    drawing.arrow([requests.right_center, (core.x + 16, requests.cy)])
    drawing.arrow(
        [(busy_loop.x, busy_loop.bottom - 18), (low, busy_loop.bottom - 18), (low, outputs.cy), outputs.right_center]
    )
    drawing.arrow([(outputs.x, client.bottom - 20), (client.right, client.bottom - 20)])


MODEL_MS, ENGINE_MS = 10, 4  # as in part 5's scripted bench
PX_PER_MS = 16.0
LANE_LEFT = 132.0


def overlap() -> Drawing:
    """Part 5: schedule, execute and update of successive steps, in step and one step ahead."""
    drawing = Drawing(
        "Synchronous, and one step ahead",
        "Two time axes with a lane for the engine and one for the device. Synchronous: the engine schedules step "
        "1, the device runs it, the engine updates, schedules step 2, and so on; the device is idle for 4 ms "
        "between two steps. One step ahead: step 2 is scheduled while step 1 runs, with a placeholder for step 1's "
        "token, and the device runs without a gap. The token itself stays in the token buffer on the device.",
    )
    top = drawing.heading(
        "Each step takes 10 ms on the device and 4 ms in the engine. S: schedule and launch. U: update with the result."
    )
    _synchronous(drawing, top + 8)
    _one_step_ahead(drawing, top + 176)
    return drawing


def _lanes(drawing: Drawing, y: float, title: str) -> tuple[float, float]:
    """Two lanes under a title. Returns their heights."""
    drawing.text(MARGIN, y, title, HEAD)
    for offset, label in ((44, "Engine"), (88, "Device")):
        drawing.text(MARGIN, y + offset, label, BODY)
    return y + 28, y + 72


def _bar(drawing: Drawing, y: float, start: float, end: float, label: str, hue: str) -> Rect:
    rect = Rect(LANE_LEFT + start * PX_PER_MS, y, (end - start) * PX_PER_MS, 32)
    drawing.shape(rect, hue, CELL_RADIUS)
    if label:
        drawing.text(rect.cx, rect.cy, label, BOLD, anchor="middle")
    return rect


def _axis(drawing: Drawing, y: float, end: int) -> None:
    for tick in range(0, end + 1, 10):
        x = LANE_LEFT + tick * PX_PER_MS
        drawing.line([(x, y), (x, y + 5)])
        drawing.text(x, y + 15, f"{tick} ms", SMALL, "muted", "middle")


def _synchronous(drawing: Drawing, y: float) -> None:
    engine, device = _lanes(drawing, y, "Synchronous: the device waits for the engine")
    for step in (1, 2, 3):
        start = (step - 1) * (MODEL_MS + ENGINE_MS)
        _bar(drawing, engine, start, start + 2, f"S{step}", "purple-strong")
        _bar(drawing, device, start + 2, start + 2 + MODEL_MS, f"step {step}", "green-strong")
        _bar(drawing, engine, start + 2 + MODEL_MS, start + 4 + MODEL_MS, f"U{step}", "purple")
        if step < 3:
            idle = start + 2 + MODEL_MS
            _bar(drawing, device, idle, idle + ENGINE_MS, "", "hatch")
    drawing.legend(LANE_LEFT + 43 * PX_PER_MS - 96, y, [("hatch", "idle: 4 ms")])
    _axis(drawing, device + 36, 40)


def _one_step_ahead(drawing: Drawing, y: float) -> None:
    engine, device = _lanes(drawing, y, "One step ahead: the device never waits")
    for step in (1, 2, 3, 4):
        start = 2 + (step - 1) * MODEL_MS
        _bar(drawing, device, start, start + MODEL_MS, f"step {step}", "green-strong")
        scheduled = 2 * (step - 1) if step <= 2 else start - MODEL_MS + 2
        _bar(drawing, engine, scheduled, scheduled + 2, f"S{step}", "purple-strong")
        if step < 4:
            _bar(drawing, engine, start + MODEL_MS, start + MODEL_MS + 2, f"U{step}", "purple")
    _axis(drawing, device + 36, 40)
    _known_tokens(drawing, device + 76)


def _known_tokens(drawing: Drawing, y: float) -> None:
    """What the scheduler knows of a request when it schedules each step."""
    panel = drawing.panel(Rect(MARGIN, y, RIGHT - MARGIN, 186), "What the scheduler knows of one request", "purple")
    size = (34.0, 26.0)
    for row, (step, known, pending, note) in enumerate(
        (
            (1, [], False, "step 1 computes the prompt"),
            (2, [], True, "step 1 still runs: it will sample one token, not known yet"),
            (3, ["t1"], True, "U1 has replaced the placeholder by t1; step 2 still runs"),
        )
    ):
        at = panel.y + 40 + 34 * row
        drawing.text(panel.x + 14, at + 13, f"at S{step}", BODY)
        drawing.cells(panel.x + 76, at, ["prompt"], (64, 26), "blue")
        drawing.cells(panel.x + 140, at, known, size, "orange", strong=True)
        if pending:
            drawing.cells(panel.x + 140 + len(known) * size[0], at, ["?"], size, "grey", dashed=True)
        drawing.text(panel.x + 232, at + 13, note, BODY, "muted")
    drawing.text(
        panel.x + 14, panel.y + 160,
        "? is a placeholder. The model needs the token itself: step 2 reads it from the `TokenBuffer`, where step "
        "1 wrote it.",
    )  # fmt: skip
