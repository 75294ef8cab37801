"""The packages for a GPU machine without network, as wheels: `python -m tools.gpu.wheels` fills build/wheels.

The machine has Python 3.12 and the packages in PROVIDED. Copy build/wheels to it; `python -m tools.gpu` then installs
it into build/gpu-site, a plain folder on PYTHONPATH. A virtual environment with --system-site-packages would not work:
if `python3` is itself in one, the new one sees the base interpreter's packages but not its torch.
"""

from __future__ import annotations

import email
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WHEELS, SITE = ROOT / "build" / "wheels", ROOT / "build" / "gpu-site"
MAX_BYTES = 60 * 2**20
PYTHON_VERSION = "3.12"
MANYLINUX = ("_2_28", "_2_27", "_2_26", "_2_24", "_2_17", "2014", "_2_12", "2010", "_2_5", "1")  # pip matches exactly
PROVIDED = {"torch": "2.11.0", "triton": "3.6.0", "numpy": "2.5.2", "safetensors": "0.8.0", "tokenizers": "0.23.2"}
LEFT_OUT = {
    "matplotlib": "plots are drawn elsewhere",
    "numba": "kernels for CPUs only, and 60 MB with llvmlite",
    "watchfiles": "only for the workshop",
}
PACKAGES = """
aiohappyeyeballs aiohttp aiosignal annotated-doc annotated-types anyio attrs blinker certifi click fastapi filelock
flask frozenlist fsspec h11 hf-xet httpcore httpcore2 httpx httpx2 huggingface-hub hypothesis idna iniconfig
itsdangerous jinja2 markdown-it-py markupsafe mdurl msgspec multidict opentelemetry-api packaging pluggy
prometheus-client propcache pydantic pydantic-core pygments pytest pyyaml pyzmq redis regex rich shellingham sniffio
sortedcontainers starlette tqdm transformers truststore typer typing-extensions typing-inspection uvicorn werkzeug yarl
""".split()
NEEDED_MODULES = """
aiohttp fastapi flask httpx huggingface_hub hypothesis jinja2 msgspec prometheus_client pytest rich transformers uvicorn
zmq
""".split()


class WheelError(Exception):
    """The wheels are missing or incomplete; the message is one line for the user."""


def download(folder: Path, python_version: str = PYTHON_VERSION) -> None:
    """Empty the folder, then fill it with one wheel per package, at the versions in constraints.txt."""
    shutil.rmtree(folder, ignore_errors=True)
    target = ["--python-version", python_version, "--implementation", "cp"]
    target += [option for tag in MANYLINUX for option in ("--platform", f"manylinux{tag}_x86_64")]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *target]
    subprocess.run([*command, "-c", str(ROOT / "constraints.txt"), "-d", str(folder), *PACKAGES], check=True)


def unmet_requirements(folder: Path, roots: list[str], python_version: str = PYTHON_VERSION) -> list[str]:
    """Requirements of the wheels and roots that neither the wheels nor the machine meet, one line each.

    roots: requirements such as "transformers>=5.0". Extras do not count.
    """
    from packaging.requirements import Requirement  # not needed on the GPU machine, so not at the top
    from packaging.utils import canonicalize_name, parse_wheel_filename

    environment = {
        "python_version": python_version, "python_full_version": f"{python_version}.0", "extra": "",
        "sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix",
        "implementation_name": "cpython", "platform_python_implementation": "CPython",
    }  # fmt: skip
    wheels = sorted(folder.glob("*.whl"))
    versions = dict(PROVIDED)
    for wheel in wheels:
        name, version, _, _ = parse_wheel_filename(wheel.name)
        versions[name] = str(version)
    unmet = []
    for source, lines in [("the project", roots), *((wheel.name.split("-")[0], requires(wheel)) for wheel in wheels)]:
        for requirement in map(Requirement, lines):
            name = canonicalize_name(requirement.name)
            if name in LEFT_OUT or (requirement.marker and not requirement.marker.evaluate(environment)):
                continue
            found = versions.get(name)
            if found is None or not requirement.specifier.contains(found, prereleases=True):
                unmet.append(f"{source} requires {requirement.name}{requirement.specifier}, found {found}")
    return unmet


def requires(wheel: Path) -> list[str]:
    """The Requires-Dist lines of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        [metadata] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(metadata)).get_all("Requires-Dist", [])


def install(wheels: Path = WHEELS, site: Path = SITE) -> Path | None:
    """Install the wheels if a needed module is missing. Returns the folder for PYTHONPATH, or None if none is.

    Raises WheelError if the wheels are missing, or one would replace a package in PROVIDED.
    """
    missing = [module for module in NEEDED_MODULES if find_spec(module) is None]
    if not missing:
        return None
    found = sorted(wheels.glob("*.whl"))
    if not found:
        raise WheelError(f"{missing[0]} is not installed: run `make gpu-wheels` first and copy {wheels} here")
    if provided := [wheel.name for wheel in found if wheel.name.split("-")[0].lower() in PROVIDED]:
        raise WheelError(f"{provided[0]} would replace the machine's own package: delete it from {wheels}")
    shutil.rmtree(site, ignore_errors=True)
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--target", str(site)]
    done = subprocess.run([sys.executable, "-m", "pip", "install", *options, *map(str, found)])
    if done.returncode:
        raise WheelError(f"pip could not install {wheels} with Python {sys.version.split()[0]}")
    return site


def project_requirements() -> list[str]:
    """The `dependencies` of pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    block = text.partition("\ndependencies = [")[2].partition("\n]")[0]
    return [line.strip().strip('",') for line in block.splitlines() if line.strip()]


def main() -> int:
    download(WHEELS)
    num_bytes = sum(wheel.stat().st_size for wheel in WHEELS.glob("*.whl"))
    problems = unmet_requirements(WHEELS, project_requirements())
    if num_bytes > MAX_BYTES:
        problems.append(f"{num_bytes:,} bytes, expected at most {MAX_BYTES:,}")
    print(f"build/wheels: {len(PACKAGES)} wheels for Python {PYTHON_VERSION}, {num_bytes / 2**20:.1f} MiB")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
