"""`workshop bundle`: a folder from which the course is set up without a network, for a USB stick or a local server.

It holds the repository and a wheelhouse: every package as a file that pip can install. Packages with compiled code are
those of this system and this Python: learners with another one need a bundle that was made there.
"""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from packaging.requirements import Requirement

from workshop.course import WorkshopError

PROJECT, EXTRA = "llm-engine-course", "dev"
TO_BUILD = ("setuptools>=77", "pip")  # pyproject.toml's build-system; pip itself
CONTENTS = (COURSE, WHEELS, README) = ("course.gitbundle", "wheels", "README.txt")
INSTRUCTIONS = """\
The course "Build an LLM inference engine in fifteen parts", with all packages it needs.

For {system} on {machine} with Python {python}. Nothing is downloaded. In this folder:

    git clone course.gitbundle llm-engine-course
    cd llm-engine-course
    make setup PYTHON={executable} PIP_ARGS="--no-index --find-links=$PWD/../wheels"
    make doctor

Leave this folder in place until set-up has ended.
"""


def make_bundle(root: Path, folder: Path, pip_args: Sequence[str], say: Callable[[str], None]) -> None:
    """folder: new, empty, or a bundle whose download was interrupted; what is there is not downloaded again.

    Raises WorkshopError if the folder is in use, root is no git repository, or a package can't be downloaded.
    """
    if folder.exists() and (not folder.is_dir() or any(path.name not in CONTENTS for path in folder.iterdir())):
        raise WorkshopError(f"{folder} exists, and has other contents than a bundle: name a new folder")
    if not (root / ".git").exists():
        raise WorkshopError(f"{root} is not a git repository: learners clone it from the bundle")
    folder.mkdir(parents=True, exist_ok=True)
    course = str((folder / COURSE).resolve())
    call(["git", "-C", str(root), "bundle", "create", course, "HEAD", "--branches"])
    say("Downloading packages; a few minutes on a good line.")
    call(download_command(root, folder / WHEELS, pip_args))
    (folder / README).write_text(instructions(), encoding="utf-8")
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    say(f"{folder} has the course and its packages, {num_bytes / 1e9:.1f} GB. {README} there says how to set it up.")


def download_command(root: Path, wheels: Path, pip_args: Sequence[str]) -> list[str]:
    """pip's command that fetches the versions of constraints.txt as wheels."""
    constraints = str(root / "constraints.txt")
    return [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--prefer-binary",
        "--dest", str(wheels), "-c", constraints, *pip_args, *requirements(), *TO_BUILD,
    ]  # fmt: skip


def requirements() -> list[str]:
    """What `make setup` installs, besides the course itself."""
    found = [Requirement(line) for line in importlib.metadata.requires(PROJECT) or []]
    wanted = [each for each in found if each.marker is None or each.marker.evaluate({"extra": EXTRA})]
    return [f"{each.name}{extras(each)}{each.specifier}" for each in wanted]


def extras(requirement: Requirement) -> str:
    return f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""


def instructions() -> str:
    major, minor = sys.version_info[:2]
    return INSTRUCTIONS.format(
        system=platform.system(), machine=platform.machine(), python=f"{major}.{minor}",
        executable=f"python{major}.{minor}",
    )  # fmt: skip


def call(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no output"]
        raise WorkshopError(f"{command[0]} failed with status {done.returncode}: {lines[-1]}")
