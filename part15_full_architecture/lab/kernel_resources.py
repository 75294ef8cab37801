"""What nvcc says of each kernel: registers, shared memory and spills, for the GPUs that the course targets.

    python -m part15_full_architecture.lab.kernel_resources            compile, compare with results/part15_nvcc.json
    python -m part15_full_architecture.lab.kernel_resources --write    compile, and write that file

It needs nvcc, but no GPU. Other versions of nvcc give other numbers: then only spills are compared.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..worker.kernels.build import SOURCES, NoCompilerError, find_nvcc, nvcc_paths, version

ARCHITECTURES = ("sm_80", "sm_90")  # A100, H100
RECORD = Path(__file__).parents[2] / "results" / "part15_nvcc.json"
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(sm_\d+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?, (\d+) bytes smem)?")
Resources = dict[
    str, dict[str, list[int]]
]  # "sm_90 file.cu" → kernel → registers, bytes of static shared memory, spills


def compile_all(num_jobs: int = 2) -> Resources:
    """Compile every .cu file. Raises NoCompilerError, or CalledProcessError with what nvcc printed."""
    sources = sorted(SOURCES.glob("*.cu"))
    with ThreadPoolExecutor(num_jobs) as pool:
        found = list(pool.map(resources_of, sources))
    return {key: kernels for each in found for key, kernels in sorted(each.items())}


def resources_of(source: Path) -> Resources:
    """One file, for all architectures."""
    targets = [f"-gencode=arch=compute_{arch[3:]},code={arch}" for arch in ARCHITECTURES]
    with tempfile.TemporaryDirectory() as directory:
        command = [
            find_nvcc(),
            "-std=c++17",
            "-O3",
            "-fatbin",
            *targets,
            "-Xptxas",
            "-v",
            *nvcc_paths(),
            f"-I{SOURCES}",
        ]
        command += [str(source), "-o", f"{directory}/out.fatbin"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
    return parse(done.stderr, source.name)


def parse(log: str, file: str) -> Resources:
    """ptxas prints three lines for each kernel: its name, its stack, and what it uses."""
    found: Resources = {}
    name, key, spills = "", "", 0
    for line in log.splitlines():
        if match := ENTRY.search(line):
            name, key = match[1], f"{match[2]} {file}"
        elif match := STACK.search(line):
            spills = int(match[2]) + int(match[3])
        elif (match := USED.search(line)) and name:
            found.setdefault(key, {})[name] = [int(match[1]), int(match[2] or 0), spills]
            name, spills = "", 0
    return {key: demangled(kernels) for key, kernels in found.items()}


def demangled(kernels: dict[str, list[int]]) -> dict[str, list[int]]:
    """The same with the names that the source has, without their parameters."""
    text = subprocess.run(["c++filt"], input="\n".join(kernels), capture_output=True, text=True, check=True).stdout
    names = [re.sub(r"^void ", "", line.partition("(")[0]) for line in text.splitlines()]
    return dict(sorted(zip(names, kernels.values(), strict=True)))


def compare(expected: Resources, found: Resources, is_same_nvcc: bool) -> list[str]:
    """What differs, in words: a line for each kernel."""
    problems = []
    for key in sorted({*expected, *found}):
        old, new = expected.get(key, {}), found.get(key, {})
        for name in sorted({*old, *new}):
            if name not in old or name not in new:
                problems.append(f"{key}: {name} is {'new' if name in new else 'gone'}")
            elif is_same_nvcc and old[name] != new[name]:
                problems.append(f"{key}: {name}: registers, shared memory, spills were {old[name]}, are {new[name]}")
            elif new[name][2] > old[name][2]:
                problems.append(f"{key}: {name} spills {new[name][2]} bytes")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {RECORD.name}")
    arguments = parser.parse_args()
    try:
        nvcc, found = version(find_nvcc()).split("release ")[-1].split(",")[0], compile_all()
    except NoCompilerError as error:
        print(f"not checked: {error}")
        return 0
    except subprocess.CalledProcessError as error:
        print(error.stderr, file=sys.stderr)
        return 1
    num_kernels = sum(map(len, found.values()))
    if arguments.write:
        RECORD.write_text(json.dumps({"nvcc": nvcc, "kernels": found}, indent=0, sort_keys=True) + "\n")
        print(f"{num_kernels} kernels written to {RECORD.name}")
        return 0
    record = json.loads(RECORD.read_text())
    problems = compare(record["kernels"], found, record["nvcc"] == nvcc)
    print("\n".join(problems) or f"{num_kernels} kernels, as recorded with nvcc {record['nvcc']}; this is {nvcc}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
