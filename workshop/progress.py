"""How far a learner is, and telling the board of a room about it, if the learner has joined one."""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import httpx
import msgspec

from workshop.course import Exercise, Part, WorkshopError, read_parts
from workshop.results import Saved, State
from workshop.workspace import is_caught_up, is_started

Status = Literal["open", "started", "fails", "solved", "filled in"]
LEARNER = "[0-9a-f]{32}"
MAX_NAME, MAX_PARTS, MAX_EXERCISES = 40, 100, 100
CODE_HEADER = "x-room-code"
TIMEOUT_S = 2.0  # a board that doesn't answer must not hold a learner up


class ExerciseProgress(msgspec.Struct, frozen=True):
    """filled in: by `catch-up`. num_hints: that were shown."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=60)]
    status: Status
    num_hints: Annotated[int, msgspec.Meta(ge=0, le=9)]


class PartProgress(msgspec.Struct, frozen=True):
    number: Annotated[int, msgspec.Meta(ge=1, le=99)]
    exercises: Annotated[list[ExerciseProgress], msgspec.Meta(max_length=MAX_EXERCISES)]

    @property
    def num_solved(self) -> int:
        return sum(each.status == "solved" for each in self.exercises)


class LearnerProgress(msgspec.Struct, frozen=True):
    """What a board is told. learner: a secret of this copy of the course, so that nobody else can report for it. parts:
    those that are started."""

    learner: Annotated[str, msgspec.Meta(pattern=f"^{LEARNER}$")]
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME)]
    parts: Annotated[list[PartProgress], msgspec.Meta(max_length=MAX_PARTS)]


def status_of(part: Part, exercise: Exercise, saved: Saved) -> Status:
    """Of the last check. What has changed since then is not looked at."""
    if not is_started(part, exercise):
        return "open"
    if is_caught_up(part, exercise):
        return "filled in"
    if not saved.fingerprint:
        return "started"
    return "solved" if saved.passes else "fails"


def progress_of(root: Path) -> list[PartProgress]:
    """The parts that have a copy in workspace/. An exercise whose markers are broken counts as started."""
    return [
        PartProgress(part.number, [exercise_progress(part, each) for each in part.exercises])
        for part in read_parts(root)
        if part.copy.is_dir() and part.exercises
    ]


def exercise_progress(part: Part, exercise: Exercise) -> ExerciseProgress:
    saved = State.load(part).of(exercise)
    try:
        status = status_of(part, exercise, saved)
    except WorkshopError:
        status = "started"
    return ExerciseProgress(exercise.name, status, min(saved.num_hints, len(exercise.hints)))


# The board that a learner has joined


@dataclass(frozen=True, slots=True)
class Membership:
    """The contents of workspace/.cache/board.json."""

    url: str
    code: str
    name: str
    learner: str


def membership_path(root: Path) -> Path:
    return root / "workspace" / ".cache" / "board.json"


def membership(root: Path) -> Membership | None:
    """None if no board was joined."""
    try:
        return Membership(**json.loads(membership_path(root).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise WorkshopError(f"{membership_path(root)} is damaged ({error}): join again, or leave") from error


def learner_of(root: Path) -> str:
    """The secret of this copy of the course. It stays the same, so that a learner who joins again keeps the row."""
    path = membership_path(root).with_name("learner")
    saved = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if not re.fullmatch(LEARNER, saved):
        saved = secrets.token_hex(16)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(saved, encoding="utf-8")
    return saved


def join(root: Path, url: str, code: str, name: str) -> Membership:
    """Join a board, and tell it the progress so far. Raises WorkshopError if it can't be joined: nothing is saved."""
    name = " ".join(name.split())
    if not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise WorkshopError(f"the name: expected 1 to {MAX_NAME} characters, got {name!r}")
    if not url.startswith(("http://", "https://")):
        raise WorkshopError(f"the board's address: expected http://…, got {url!r}")
    code = code.strip().upper()
    if not (code.isascii() and code.isalpha()):
        raise WorkshopError(f"the room code: expected letters from A to Z, got {code!r}")
    member = Membership(url.rstrip("/"), code, name, learner_of(root))
    tell(member, progress_of(root))
    path = membership_path(root)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(member)), encoding="utf-8")
    return member


def leave(root: Path) -> bool:
    """Tell the board nothing any longer. What it shows stays until it ends. Returns whether one had been joined."""
    path = membership_path(root)
    was_member = path.exists()
    path.unlink(missing_ok=True)
    return was_member


def tell(member: Membership, parts: list[PartProgress]) -> None:
    """Raises WorkshopError if the board has not taken it."""
    body = msgspec.json.encode(LearnerProgress(member.learner, member.name, parts))
    try:
        got = httpx.post(
            f"{member.url}/progress", content=body, headers={CODE_HEADER: member.code}, timeout=TIMEOUT_S,
            trust_env=False,
        )  # fmt: skip
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeEncodeError) as error:
        raise WorkshopError(f"the board at {member.url} does not answer: {error}") from error
    if got.status_code != 204:
        is_text = got.headers.get("content-type", "").startswith("text/plain")
        says = " ".join(got.text.split())[:200] if is_text else f"status {got.status_code}; is it a board?"
        raise WorkshopError(f"the board at {member.url} says: {says}")


def tell_board(root: Path) -> str | None:
    """After a command: tell the board, if one was joined. Returns what went wrong, for the learner to read."""
    try:
        member = membership(root)
        if member is not None:
            tell(member, progress_of(root))
    except WorkshopError as error:
        return str(error)
    return None
