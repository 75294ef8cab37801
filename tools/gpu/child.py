"""Run one section in its own process: python -m tools.gpu.child MODULE:FUNCTION SECONDS DEVICE. One JSON line per case.

So an error that leaves CUDA unusable, or a kernel that never ends, fails only its own section.
"""

from __future__ import annotations

import importlib
import os
import sys

from tools.gpu.recorder import Recorder, SkipSection, format_error


def main(argv: list[str]) -> int:
    """Call the function with a Recorder. Exit status: 0 passed or skipped, 1 failed."""
    function, budget_s, device = argv
    module, _, name = function.partition(":")
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # library output goes to stderr, so that stdout has only cases
    recorder = Recorder(out, float(budget_s), device)
    try:
        getattr(importlib.import_module(module), name)(recorder)
    except SkipSection as reason:
        recorder.emit({"skipped": str(reason)})
    except Exception:
        recorder.emit({"traceback": format_error()})
        return 1
    return 1 if recorder.num_failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
