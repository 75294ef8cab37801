"""Part 12: where KV blocks are, and when the weights of a layer are on the device."""

from __future__ import annotations

from .geometry import Rect
from .metrics import BODY, BOLD, SMALL
from .svg import CELL_RADIUS, MARGIN, Drawing

CELL = (38.0, 30.0)
BLOCK_WIDTH = 31.0
DEVICE, HOST, DISK = 178.0, 380.0, 614.0  # where the columns begin
HUES = {"A": "blue", "B": "orange"}
STATES: tuple[tuple[str, str, list[str], list[str], list[str]], ...] = (
    ("Ada's prompt", "is computed", ["A0", "A1", "A2", "A3", "A4"], ["A0", "A1", "A2", "A3"],
     ["A0", "A1", "A2", "A3"]),
    ("Ben's prompt", "needs all five blocks", ["B0", "B1", "B2", "B3", "B4"], ["A0", "A1", "B0", "B1", "B2", "B3"],
     ["A0", "A1", "A2", "A3", "B0", "B1", "…"]),
    ("Ada comes back", "with a new question", ["A0", "A1", "A2", "A3", "A4"], ["A0", "A1", "A2", "A3", "B0", "B1"],
     ["A0", "A1", "A2", "A3", "B0", "B1", "…"]),
)  # fmt: skip


def kv_tiers() -> Drawing:
    """Three moments of a device with five blocks, a host with six, and a disk with room for all."""
    drawing = Drawing(
        "KV tiers",
        "Three moments. First, Ada's prompt is computed in the device's blocks A0 to A4; all but A4 are full. "
        "These are saved to host memory and written on to disk. Then Ben's prompt needs all five blocks of the "
        "device. Its full blocks B0 to B3 are saved, too; host memory has room for six blocks, so A2 and A3 are "
        "evicted. Then Ada comes back: A0 and A1 are loaded from host memory, A2 and A3 from disk.",
    )
    top = drawing.heading(
        "The device has room for five blocks, host memory for six, the disk for all. Dashed: not full, so not saved."
    )
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
            under = y + CELL[1] + 16
            start, end = on_disk.x + 2.5 * BLOCK_WIDTH, on_device.x + 3 * BLOCK_WIDTH
            drawing.arrow([(start, on_disk.bottom), (start, under), (end, under), (end, on_device.bottom)])
            drawing.text(HOST, under + 16, "A0, A1 from host memory, A2, A3 from disk", SMALL, "blue-ink")
    return drawing


def _blocks(drawing: Drawing, x: float, y: float, names: list[str]) -> Rect:
    """A row of blocks; returns its outline."""
    for number, name in enumerate(names):
        hue, is_full = HUES.get(name[0], "grey"), not name.endswith("4")
        drawing.cells(x + number * BLOCK_WIDTH, y, [name], (BLOCK_WIDTH, CELL[1]), hue, font=SMALL, dashed=not is_full)
    return Rect(x, y, len(names) * BLOCK_WIDTH, CELL[1])


LANE, SCALE = 150.0, 44.0  # where time begins, and pixels per unit
COMPUTE = ((0, "0"), (1, "1"), (2, "2"), (3, "3"), (4, "4"), (5, "5"), (6, "0"), (7, "1"), (8, "2"))
FETCHES = ((0, 2, "2", "B"), (2, 4, "4", "A"), (4, 6, "0", "B"), (6, 8, "2", "A"))


def weight_prefetch() -> Drawing:
    """Six layers, of which three are fetched into two buffers."""
    drawing = Drawing(
        "Fetching weights one layer ahead",
        "A time axis with a lane for layers that compute and two lanes for buffers. Layers 0, 2 and 4 of six are "
        "offloaded. Layer 0 is in buffer A. While layers 0 and 1 compute, layer 2 is fetched into buffer B; while "
        "layers 2 and 3 compute, layer 4 into buffer A; while layers 4 and 5 compute, layer 0 of the next step into "
        "buffer B.",
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
    first = Rect(LANE, top + 62, 1.5 * SCALE - 4, 30)
    drawing.shape(first, "orange", CELL_RADIUS)
    drawing.text(first.cx, first.cy, "has 0", SMALL, anchor="middle")
    step = LANE + 6 * 1.5 * SCALE - 2
    drawing.line([(step, top + 6), (step, top + 146)], dashed=True, check=False)
    drawing.text(step + 6, top + 158, "next step", SMALL, "muted")
    drawing.legend(LANE, top + 158, [("green", "always on the device"), ("orange-strong", "offloaded")])
    return drawing
