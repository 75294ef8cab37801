"""Part 15: two threads that compute one kernel, and share the tasks of its phases."""

from __future__ import annotations

from dataclasses import dataclass

from .geometry import Rect
from .metrics import BOLD, SMALL, SMALL_BOLD
from .svg import MARGIN, WIDTH, Drawing

RIGHT = WIDTH - MARGIN
HIDDEN_SIZE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, OUTPUTS_PER_TASK = 256, 8, 4, 32, 32


@dataclass(frozen=True, slots=True)
class Phase:
    """duration: of a task. hue: as in the legend."""

    name: str
    num_tasks: int
    duration: float
    hue: str


# The first phases of a layer of `tiny`, in a step of one token with two threads.
PHASES = (
    Phase("norm", 1, 1.8, "orange"),
    Phase("QKV", (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM // OUTPUTS_PER_TASK, 1.3, "grey-strong"),
    Phase("rotary", 1, 1.8, "orange"),
    Phase("attention", 2, 3.6, "green-strong"),
    Phase("output", HIDDEN_SIZE // OUTPUTS_PER_TASK, 1.3, "grey-strong"),
)
LATE = 4.6  # when the second thread has been woken
STOPPED = (9.45, 15.6)  # when the system runs something else on its core
LEFT, LANE_HEIGHT, LANE_PITCH = 118.0, 40.0, 62.0


@dataclass(frozen=True, slots=True)
class Task:
    thread: int
    phase: int
    number: int
    start: float
    end: float


def schedule() -> list[Task]:
    """Each thread takes the next task as soon as it is free, and the next phase when all tasks of this one are done.

    The second thread comes late, and is stopped for a while in the middle of a task.
    """
    free, tasks = [0.0, LATE], list[Task]()
    for index, phase in enumerate(PHASES):
        done = 0.0
        for number in range(phase.num_tasks):
            thread = free.index(min(free))
            start = free[thread]
            end = start + phase.duration
            if thread == 1 and start < STOPPED[0] < end:
                end += STOPPED[1] - STOPPED[0]
            tasks.append(Task(thread, index, number, start, end))
            free[thread] = end
            done = max(done, end)
        free = [max(each, done) for each in free]
    return tasks


def shared_tasks() -> Drawing:
    tasks = schedule()
    counts = ", ".join(f"{phase.name} {phase.num_tasks}" for phase in PHASES)
    drawing = Drawing(
        "Two threads share the tasks of a kernel",
        f"The first phases of a layer and their tasks: {counts}. The first thread begins alone. The second is woken "
        "when the first is in the second phase, and takes tasks from then on. Later, the system stops it in the "
        "middle of a task. The first thread takes all others, and waits for this one.",
    )
    top = drawing.heading(
        "A thread takes the next task that nobody has taken. When none is left, it waits until all are done."
    )
    scale = (RIGHT - LEFT) / max(task.end for task in tasks)
    y = top + 44
    for thread in range(2):
        lane = y + thread * LANE_PITCH
        drawing.text(MARGIN, lane + LANE_HEIGHT / 2, f"thread {thread + 1}", BOLD)
        for task in tasks:
            if task.thread == thread:
                _task(drawing, task, lane, scale)
        _waits(drawing, tasks, thread, lane, scale)
    for index, phase in enumerate(PHASES):
        own = [task for task in tasks if task.phase == index]
        left, right = LEFT + min(task.start for task in own) * scale, LEFT + max(task.end for task in own) * scale
        drawing.text((left + right) / 2, y - 16, phase.name, SMALL_BOLD, "", "middle")
        drawing.line([(right, y - 26), (right, y + LANE_PITCH + LANE_HEIGHT + 6)], dashed=True, check=False)
    below = y + LANE_PITCH + LANE_HEIGHT + 26
    drawing.text(LEFT, below, "the second thread is woken", SMALL, "muted")
    drawing.text(LEFT + STOPPED[0] * scale, below, "the system runs another program on its core", SMALL, "muted")
    drawing.legend(MARGIN, below + 34, [
        ("grey-strong", "task of a product: 32 outputs"), ("green-strong", "half of the heads"), ("orange", "a token"),
        ("hatch", "waits"),
    ])  # fmt: skip
    drawing.text(MARGIN, below + 66, "Lengths are not to scale.", SMALL, "muted")
    return drawing


def _task(drawing: Drawing, task: Task, lane: float, scale: float) -> None:
    phase, left, width = PHASES[task.phase], LEFT + task.start * scale, (task.end - task.start) * scale
    rect = Rect(left, lane, width, LANE_HEIGHT)
    drawing.shape(rect, phase.hue, 2)
    drawing.text(rect.x + phase.duration * scale / 2, rect.cy, str(task.number), SMALL, "", "middle")
    if task.end - task.start > 1.01 * phase.duration:
        stopped = Rect(LEFT + STOPPED[0] * scale, lane, (STOPPED[1] - STOPPED[0]) * scale, LANE_HEIGHT)
        drawing.shape(stopped, "grey", 2, dashed=True)
        drawing.text(stopped.cx, stopped.cy, "stopped", SMALL, "muted", "middle")


def _waits(drawing: Drawing, tasks: list[Task], thread: int, lane: float, scale: float) -> None:
    """The gaps between a thread's tasks."""
    time = 0.0 if thread == 0 else LATE
    for task in [task for task in tasks if task.thread == thread]:
        if task.start > time + 1e-9:
            drawing.shape(Rect(LEFT + time * scale, lane, (task.start - time) * scale, LANE_HEIGHT), "hatch", 2)
        time = task.end
