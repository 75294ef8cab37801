"""The prebuilt environment: built and run where there is a container engine, else read."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from workshop.__main__ import ROOT
from workshop.doctor import PYTHON_VERSIONS

FOLDER = ROOT / ".devcontainer"
DOCKERFILE = (FOLDER / "Dockerfile").read_text(encoding="utf-8")


def find_engine() -> str | None:
    """One that can build: a client without its daemon can't."""
    for name in ("docker", "podman"):
        if shutil.which(name) and subprocess.run([name, "info"], capture_output=True).returncode == 0:
            return name
    return None


ENGINE = find_engine()


def test_what_the_files_name_exists() -> None:
    config = json.loads((FOLDER / "devcontainer.json").read_text(encoding="utf-8"))
    assert (FOLDER / config["build"]["dockerfile"]).is_file()
    context = (FOLDER / config["build"]["context"]).resolve()
    assert context == ROOT, f"the Dockerfile copies from {context}"
    script = ROOT / config["postCreateCommand"]
    assert os.access(script, os.X_OK), f"{script} is not executable"
    assert f"useradd --create-home {config['remoteUser']}" in DOCKERFILE
    for names in re.findall(r"^COPY (.+) \./$", DOCKERFILE, re.MULTILINE):
        for name in names.split():
            assert (ROOT / name).is_file(), f"the Dockerfile copies {name}"
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert not {"pyproject.toml", "constraints.txt", "README.md"} & set(ignored)
    major, minor = map(int, re.findall(r"^FROM python:(\d+)\.(\d+)-slim$", DOCKERFILE, re.MULTILINE)[0])
    assert PYTHON_VERSIONS[0] <= (major, minor) <= PYTHON_VERSIONS[1], f"Python {major}.{minor} is not tested"


def test_the_script_makes_an_environment_of_the_images(tmp_path: Path) -> None:
    """With a folder that stands for the image's, and a pip that only writes down how it was called."""
    image, course = tmp_path / "image", tmp_path / "course"
    (image / "bin").mkdir(parents=True)
    for name in ("pip", "workshop"):
        (image / "bin" / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/calls\n')
        (image / "bin" / name).chmod(0o755)
    (course / ".devcontainer").mkdir(parents=True)
    script = course / ".devcontainer" / "set-up.sh"
    script.write_text((FOLDER / "set-up.sh").read_text().replace("/opt/course/.venv", str(image)))
    for _ in range(2):  # a container may be created anew on the same folder
        subprocess.run(["bash", str(script)], check=True)
    assert (course / ".venv").readlink() == image and (course / ".venv" / ".ready").is_file()
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[:2] == ["pip install --quiet --no-index --no-deps --no-build-isolation -e .", "workshop doctor"], calls
    (course / ".venv").unlink()
    (course / ".venv").mkdir()
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True)
    assert done.returncode == 1 and "delete it" in done.stderr, "an environment from outside is not overwritten"


@pytest.mark.skipif(ENGINE is None, reason="there is no container engine")
def test_the_image_runs_the_course() -> None:
    assert ENGINE is not None
    built = subprocess.run(
        [ENGINE, "build", "--quiet", "--file", str(FOLDER / "Dockerfile"), str(ROOT)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    copy = "cp -r /source ~/course && cd ~/course && rm -rf .venv && .devcontainer/set-up.sh"
    ran = subprocess.run(
        [ENGINE, "run", "--rm", "--network=none", "--volume", f"{ROOT}:/source:ro", built.stdout.strip(), "bash", "-c",
         copy], capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0 and "This machine can run the course" in ran.stdout, ran.stdout + ran.stderr
