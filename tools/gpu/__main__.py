"""Run everything that needs a CUDA device, most important first: `make gpu`, or `python -m tools.gpu`.

    make gpu-wheels                        on a machine with network: download packages to build/wheels
    make gpu                               on the GPU machine, with build/wheels copied to it; at most eight minutes
    make gpu ARGS="--sections kernels"     only some sections
    python -m tools.gpu --dry-run-on-cpu   every section at the smallest size, without a GPU

The result file is written after every case, so a killed run keeps what it has measured. A section that fails is
recorded with its traceback and the next one runs; a section is skipped if too little time is left.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from tools.gpu.runner import ROOT, Section, run_sections
from tools.gpu.wheels import WheelError, install

TIME_LIMIT_S = 480
SECTIONS = (
    Section("machine", "tools.gpu.machine:run", budget_s=40, min_s=10, is_required=True),
    Section("kernels", "tools.gpu.kernels:run", budget_s=120, min_s=20),
    Section("cuda_kernels", "tools.gpu.cuda_kernels:run", budget_s=200, min_s=60),
    Section("streams", "tools.gpu.streams:run", budget_s=40, min_s=15),
    Section("oracle", "tools.gpu.oracle:run", budget_s=100, min_s=25),
    Section("nano_vllm", "tools.gpu.nano_vllm:run", budget_s=160, min_s=40),
    Section("bandwidth", "tools.gpu.bandwidth:run", budget_s=100, min_s=40),
    Section("tests", "tools.gpu.gpu_tests:run", budget_s=90, min_s=20),
)


def environment_of(site: Path | None, device: str) -> dict[str, str]:
    """The environment of the sections' processes: package paths, no network, and no GPU in a dry run."""
    paths = [str(site)] if site else []
    paths += [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    environment = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)}
    if device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return environment


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    started = time.monotonic()
    names = [section.name for section in SECTIONS]
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu",
        description=__doc__,
        epilog="Exit status: 0 all passed or skipped; 1 a section failed; 2 wrong usage, or something is missing.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sections", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--time-limit-s", type=float, default=TIME_LIMIT_S, help=f"in total (default: {TIME_LIMIT_S})")
    parser.add_argument("--out", type=Path, help="the result file (default: results/gpu.json, in a dry run build/)")
    parser.add_argument("--commit", help="commit for the result file where there is no git (default: from git)")
    parser.add_argument("--dry-run-on-cpu", action="store_true", help="every section at the smallest size")
    args = parser.parse_args(argv)
    device = "cpu" if args.dry_run_on_cpu else "cuda"
    try:
        site = install()
    except WheelError as error:
        print(f"gpu: {error}", file=sys.stderr)
        return 2
    folder = ROOT / ("build" if args.dry_run_on_cpu else "results")
    num_failed = run_sections(
        [section for section in SECTIONS if section.name in {"machine", *args.sections}],
        args.out or folder / "gpu.json",
        device=device,
        ends_at=started + args.time_limit_s,
        config={"time_limit_s": args.time_limit_s, "sections": args.sections},
        commit=args.commit,
        environment=environment_of(site, device),
    )
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
