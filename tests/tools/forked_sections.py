"""The command line of tools/gpu with sections that are forks of this process: torch is loaded once, not for each.

    python -m tests.tools.forked_sections ARGUMENTS

A section still loads the parts, in the environment that it is given. Triton reads its settings when it is loaded, which
transformers does, so the kernels have an interpreter of their own.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from tools.gpu import __main__ as command_line
from tools.gpu import child

LOADED = [torch, LlamaForCausalLM]
NOT_FORKED = ["tools.gpu.kernels:run"]


class Fork(subprocess.Popen[str]):
    """subprocess.Popen, in which `python -m tools.gpu.child` is a fork and not a new interpreter."""

    def __init__(self, command: list[str], *, cwd: Path, env: dict[str, str], **options: Any) -> None:
        expected = [sys.executable, "-m", "tools.gpu.child"]
        if command[:3] != expected or command[3] in NOT_FORKED:
            super().__init__(command, cwd=cwd, env=env, **options)
            return

        def run() -> None:
            status = 1
            try:
                os.closerange(3, 1_000)  # one of them tells the parent that the process has started
                os.environ.clear()
                os.environ.update(env)
                torch.set_num_threads(int(env["OMP_NUM_THREADS"]))  # OpenMP reads it when it is loaded
                status = child.main(command[3:])
            finally:
                os._exit(status)

        super().__init__(command, cwd=cwd, env=env, preexec_fn=run, **options)


if __name__ == "__main__":
    gc.freeze()
    subprocess.Popen = Fork  # type: ignore[misc]
    sys.exit(command_line.main(sys.argv[1:]))
