"""Part 15: how a backend is chosen for each operation."""

from __future__ import annotations

from collections.abc import Mapping

from .geometry import Rect
from .metrics import BOLD, CODE, HEAD, SMALL, SMALL_BOLD
from .svg import MARGIN, WIDTH, Drawing

RIGHT = WIDTH - MARGIN
# Each operation and its functions, as in ops.py.
OPERATIONS = {
    "attention": ("paged_attention",), "norm": ("add_rms_norm", "rms_norm"), "rotary": ("rotate_and_store",),
    "activation": ("silu_and_mul",), "sampling": ("sample",), "quantized_linear": ("quantized_linear",),
    "grouped_linear": ("grouped_linear",),
}  # fmt: skip
CANDIDATES = {"cpu": ("numba", "torch"), "cuda": ("triton", "cuda", "torch")}
MEASURED = ("attention", "norm", "rotary", "activation", "sampling")  # those of which autotune.py has a case
ORDER = ("first", "second", "third")
METRIC = 'engine:kernel_backend_info{backend="numba",operation="norm",reason="first choice"} 1.0'
MATRIX: Mapping[str, tuple[float, float]] = {"cpu": (372.0, 82.0), "cuda": (560.0, 92.0)}  # left edge, cell width


def place(operation: str, device: str, backend: str) -> str:
    """What becomes of a candidate that can compute an operation, with --kernels auto."""
    if device == "cuda" and operation in MEASURED:
        return "measured"
    return ORDER[CANDIDATES[device].index(backend)]


def kernel_choice() -> Drawing:
    """The four steps of a choice, and the candidates of every operation."""
    drawing = Drawing(
        "A kernel for each operation",
        "Four boxes from left to right. Candidates: on a CPU Numba, then torch; on a GPU Triton, CUDA and torch. Can "
        "it compute this? Head size, dtype, compute capability and compiler decide. Which is fastest? Measured once "
        "and kept in autotune.json. The choice: a backend and a reason, which /metrics shows. On a CPU, with several "
        "ranks, or if one candidate is left, nothing is measured, and the first is taken. Below, seven operations: "
        "on a CPU, Numba is the first choice for all and torch the second. On a GPU, attention, norm, rotary, "
        "activation and sampling are measured with Triton, CUDA and torch; for quantized_linear and grouped_linear, "
        "Triton is the first, CUDA the second, and torch the third.",
    )
    top = drawing.heading(
        "With `--kernels auto`, a backend is chosen for each operation by itself, once, when the engine starts."
    )
    bottom = _steps(drawing, top + 34)
    bottom = _matrix(drawing, bottom + 44)
    drawing.text(MARGIN, bottom + 28, "In `/metrics`, on a CPU:", SMALL_BOLD)
    drawing.text(MARGIN, bottom + 48, METRIC, CODE)
    note = (
        "`--kernels norm=cuda` asks for a backend by name: it is used, or the engine refuses to start and says why. On "
        "a CPU, cuda is an emulation. `--kernels tuned` measures on a CPU, too, but never the last two operations."
    )
    drawing.paragraph(MARGIN, bottom + 76, note, RIGHT - MARGIN, SMALL, "muted")
    return drawing


def _steps(drawing: Drawing, y: float) -> float:
    """Returns their lower edge."""
    steps = (
        ("1. Candidates", ["CPU: " + ", ".join(CANDIDATES["cpu"]), "GPU: " + ", ".join(CANDIDATES["cuda"])], "grey"),
        ("2. Can it compute this?", ["head size, dtype, compiler,", "compute capability"], "purple"),
        ("3. Which is fastest?", ["on a GPU: measured once,", "kept in `autotune.json`"], "purple"),
        ("4. Choice", ["a backend, and a reason", "in `/metrics`"], "orange"),
    )
    gap, height = 28.0, 70.0
    width = (RIGHT - MARGIN - gap * (len(steps) - 1)) / len(steps)
    rects = [Rect(MARGIN + index * (width + gap), y, width, height) for index in range(len(steps))]
    for rect, (title, lines, hue) in zip(rects, steps, strict=True):
        drawing.box(rect, title, lines, hue, strong=hue == "orange")
    for start, end in zip(rects, rects[1:], strict=False):
        drawing.arrow([start.right_center, end.left_center])
    lane = y - 18
    drawing.arrow([rects[1].top_center, (rects[1].cx, lane), (rects[3].cx, lane), rects[3].top_center])
    label = "on a CPU, with several ranks, or if only one can: the first usable backend"
    drawing.text((rects[1].cx + rects[3].cx) / 2, lane - 11, label, SMALL, "muted", "middle")
    drawing.text(rects[1].x, rects[1].bottom + 15, "If not, the reason is noted.", SMALL, "muted")
    return y + height + 16


def _matrix(drawing: Drawing, y: float) -> float:
    """Every operation with its candidates. Returns the lower edge."""
    drawing.text(MARGIN, y + 20, "Operation", HEAD)
    drawing.text(164, y + 20, "Functions", HEAD)
    pitch, height = 32.0, 28.0
    for device, title in (("cpu", "On a CPU"), ("cuda", "On a GPU")):
        left, width = MATRIX[device]
        names = CANDIDATES[device]
        drawing.text(left + len(names) * width / 2, y, title, HEAD, anchor="middle")
        for index, backend in enumerate(names):
            drawing.text(left + (index + 0.5) * width, y + 22, backend, BOLD, anchor="middle")
    for row, (operation, functions) in enumerate(OPERATIONS.items()):
        top = y + 40 + row * pitch
        drawing.text(MARGIN, top + height / 2, operation, CODE)
        drawing.text(164, top + height / 2, ", ".join(f"`{function}`" for function in functions), SMALL)
        for device, names in CANDIDATES.items():
            left, width = MATRIX[device]
            for index, backend in enumerate(names):
                label = place(operation, device, backend)
                is_likely = label in ("first", "measured")
                drawing.cells(
                    left + index * width, top, [label], (width, height),
                    "green" if label == "first" else "orange" if label == "measured" else "grey", strong=is_likely,
                )  # fmt: skip
    return y + 40 + len(OPERATIONS) * pitch
