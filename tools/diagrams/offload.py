"""Part 12: where KV blocks are, and when the weights of a layer are on the device."""

from __future__ import annotations

from .geometry import Rect
from .metrics import BODY, BOLD, SMALL
from .svg import CELL_RADIUS, MARGIN, Drawing

CELL = (38.0, 30.0)
DEVICE, HOST, DISK = 178.0, 372.0, 614.0  # where the columns begin
HUES = {"A": "blue", "B": "orange"}
STATES: tuple[tuple[str, str, list[str], list[str], list[str]], ...] = (
    ("Ada's prompt", "is computed: A0 to A3", ["A0", "A1", "A2", "A3"], ["A0", "A1", "A2", "A3"],
     ["A0", "A1", "A2", "A3"]),
    ("Ben's prompt", "needs all four blocks", ["B0", "B1", "B2", "B3"], ["A0", "A1", "B0", "B1", "B2", "B3"],
     ["A0", "A1", "A2", "A3", "B0", "B1", "B2", "B3"][:6] + ["…"]),
    ("Ada comes back", "with a new question", ["A0", "A1", "A2", "A3"], ["A0", "A1", "A2", "A3", "B0", "B1"],
     ["A0", "A1", "A2", "A3", "B0", "B1", "…"]),
)  # fmt: skip


def kv_tiers() -> Drawing:
    """Three moments of a device with four blocks, a host with six, and a disk with room for all."""
    drawing = Drawing(
        "KV tiers",
        "Three moments. First, Ada's prompt is computed in the device's four blocks A0 to A3; they are saved to host "
        "memory and written on to disk. Then Ben's prompt needs all four blocks of the device. Its blocks B0 to B3 "
        "are saved, too; host memory has room for six blocks, so A2 and A3 leave it. Then Ada comes back: A0 and A1 "
        "are loaded from host memory, A2 and A3 from disk.",
    )
    top = drawing.heading("The device has room for four blocks, host memory for six, the disk for all.")
    for x, label, line in (
        (DEVICE, "Device", "the pool"), (HOST, "Host memory", "LRU"), (DISK, "Disk or Redis", "all engines share it"),
    ):  # fmt: skip
        end = drawing.text(x, top + 14, label, BOLD).right
        drawing.text(end + 8, top + 14, line, SMALL, "muted")
    for number, (title, line, device, host, disk) in enumerate(STATES):
        y = top + 44 + number * 84
        drawing.text(MARGIN, y + 8, f"{number + 1}. {title}", BOLD)
        drawing.text(MARGIN + 16, y + 28, line, SMALL, "muted")
        on_device, in_host = _blocks(drawing, DEVICE, y, device), _blocks(drawing, HOST, y, host)
        on_disk = _blocks(drawing, DISK, y, disk)
        if number < 2:
            drawing.arrow([on_device.right_center, in_host.left_center])
            drawing.text((on_device.right + in_host.x) / 2, y - 8, "save", SMALL, "muted", "middle")
            drawing.arrow([in_host.right_center, (on_disk.x, in_host.cy)])
        else:
            drawing.arrow([in_host.left_center, on_device.right_center])
            drawing.text((on_device.right + in_host.x) / 2, y - 8, "load", SMALL, "muted", "middle")
            drawing.text(HOST, y + 50, "A0, A1: from host memory", SMALL, "blue-ink")
            drawing.text(DISK, y + 50, "A2, A3: from disk, then saved again", SMALL, "blue-ink")
    return drawing


def _blocks(drawing: Drawing, x: float, y: float, names: list[str]) -> Rect:
    """A row of blocks; returns its outline."""
    for number, name in enumerate(names):
        hue = HUES.get(name[0], "grey")
        drawing.cells(x + number * CELL[0] * 0.82, y, [name], (CELL[0] * 0.82, CELL[1]), hue, font=SMALL)
    return Rect(x, y, len(names) * CELL[0] * 0.82, CELL[1])


LANE, SCALE = 150.0, 44.0  # where time begins, and pixels per unit
COMPUTE = ((0, "0"), (1, "1"), (2, "2"), (3, "3"), (4, "4"), (5, "5"), (6, "0"), (7, "1"), (8, "2"))
FETCHES = ((0, 2, "2", "A"), (2, 4, "4", "B"), (4, 6, "0", "A"), (6, 8, "2", "B"))


def weight_prefetch() -> Drawing:
    """Six layers, of which three are fetched into two buffers."""
    drawing = Drawing(
        "Fetching weights one layer ahead",
        "A time axis with a lane for layers that compute and two lanes for buffers. Layers 0, 2 and 4 of six are "
        "offloaded. While layers 0 and 1 compute, layer 2 is fetched into buffer A; while layers 2 and 3 compute, "
        "layer 4 into buffer B; while layers 4 and 5 compute, layer 0 of the next step into buffer A.",
    )
    top = drawing.heading("Layers 0, 2 and 4 of six are offloaded. Each is fetched while the layers before it compute.")
    for label, offset in (("Layers compute", 14), ("Buffer A", 62), ("Buffer B", 110)):
        drawing.text(MARGIN, top + offset + 14, label, BODY)
    for start, label in COMPUTE:
        is_offloaded = label in "024"
        rect = Rect(LANE + start * 1.5 * SCALE, top + 14, 1.5 * SCALE - 4, 30)
        drawing.shape(rect, "orange-strong" if is_offloaded else "green", CELL_RADIUS)
        drawing.text(rect.cx, rect.cy, label, BOLD, anchor="middle")
    for start, end, label, buffer in FETCHES:
        y = top + (62 if buffer == "A" else 110)
        rect = Rect(LANE + start * 1.5 * SCALE, y, (end - start) * 1.5 * SCALE - 4, 30)
        drawing.shape(rect, "orange", CELL_RADIUS)
        drawing.text(rect.cx, rect.cy, f"fetch {label}", SMALL, anchor="middle")
    step = LANE + 6 * 1.5 * SCALE - 2
    drawing.line([(step, top + 6), (step, top + 146)], dashed=True, check=False)
    drawing.text(step + 6, top + 158, "next step", SMALL, "muted")
    drawing.legend(LANE, top + 158, [("green", "always on the device"), ("orange-strong", "offloaded")])
    return drawing
