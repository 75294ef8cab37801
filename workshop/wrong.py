"""Plausible wrong solutions, patches in tests/partNN/wrong/, and which of them a failure matches."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from workshop.course import Exercise, Part, WorkshopError
from workshop.results import Result
from workshop.runner import Runner
from workshop.workspace import IGNORED, sources

HEADER = re.compile(r"Name: ([^\n]+)\nCaught by: ([^\n]+)\nExplanation: (.+?)\n+(?=diff |--- )", re.DOTALL)
# What differs from run to run: addresses, and which of a kernel's threads was the first to notice a mistake.
VARYING = re.compile(r"0x[0-9a-f]+|\b(block|thread) \(\d+,\d+,\d+\)")
Signature = dict[str, str]  # failing test → its message


@dataclass(frozen=True, slots=True)
class WrongSolution:
    """One patch to the reference.

    name: the mistake in a few words; explanation: why it is wrong; caught_by: one of the tests that fail on it.
    """

    path: Path
    name: str
    caught_by: str
    explanation: str


def read_wrong_solutions(part: Part, exercise: Exercise) -> list[WrongSolution]:
    """The ones for an exercise: tests/partNN/wrong/NAME-short-title.patch. Raises WorkshopError on a bad header."""
    found = []
    for path in sorted((part.tests / "wrong").glob(f"{exercise.name}-*.patch")):
        header = HEADER.match(path.read_text(encoding="utf-8"))
        if header is None:
            raise WorkshopError(f"{path}: expected `Name: …`, `Caught by: …` and `Explanation: …` before the diff")
        found.append(WrongSolution(path, header[1], header[2], " ".join(header[3].split())))
    return found


def write_wrong_copy(part: Part, wrong: WrongSolution, workspace: Path) -> None:
    """Write the reference with the patch applied under workspace. Raises WorkshopError if it does not apply."""
    shutil.copytree(part.path, workspace / part.name, ignore=IGNORED)
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    env["GIT_CEILING_DIRECTORIES"] = str(workspace.resolve().parent)  # the folder is in no repository
    done = subprocess.run(
        ["git", "apply", "-C0", "--recount", "--whitespace=nowarn", str(wrong.path)],
        cwd=workspace, env=env, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode != 0:
        raise WorkshopError(f"{wrong.path} no longer applies to {part.name}, recreate its diff: {done.stderr.strip()}")


def signature(result: Result) -> Signature:
    return {failure.test: VARYING.sub("…", failure.message) for failure in result.failures}


def find_lookalikes(
    part: Part, exercise: Exercise, result: Result, runner: Runner, cancelled: Callable[[], bool] = lambda: False
) -> list[WrongSolution] | None:
    """The wrong solutions that fail the same tests as the learner's, most of them with the same message.

    Each is run once and then cached. None if cancelled.
    """
    found: dict[int, list[WrongSolution]] = {}  # by the number of equal messages
    failing = signature(result)
    for wrong in read_wrong_solutions(part, exercise) if shutil.which("git") else []:
        if not any(test.startswith(wrong.caught_by) for test in failing):
            continue
        known = cached_signature(part, exercise, wrong, runner, cancelled)
        if known is None:
            return None
        num_equal = sum(failing.get(test) == message for test, message in known.items())
        if known.keys() == failing.keys() and num_equal >= len(failing) / 2:
            found.setdefault(num_equal, []).append(wrong)
    return found[max(found)] if found else []


def cached_signature(
    part: Part, exercise: Exercise, wrong: WrongSolution, runner: Runner, cancelled: Callable[[], bool]
) -> Signature | None:
    """None if cancelled."""
    path = part.workspace / ".cache" / "wrong" / f"{wrong.path.stem}-{digest(part, wrong)}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix="workshop-") as name:
        write_wrong_copy(part, wrong, Path(name))
        result = runner.run_exercise(exercise, workspace=Path(name), cancelled=cancelled)
    if result is None:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(signature(result)), encoding="utf-8")
    return signature(result)


def digest(part: Part, wrong: WrongSolution) -> str:
    """A hash of all files that a wrong solution's failures depend on."""
    tests = part.root / "tests"
    files = {wrong.path, *sources(part.path), *part.tests.glob("*.py"), *tests.glob("*.py")}
    files |= {*(part.root / "common").rglob("*.py")}
    hashed = hashlib.sha256()
    for file in sorted(files):
        hashed.update(hashlib.sha256(file.read_bytes()).digest())
    return hashed.hexdigest()[:16]
