"""Which machine this is, and how fast its memory is."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from common.results import machine_stamp
from tools.gpu.recorder import Recorder
from tools.gpu.timing import copy_bandwidth_gb_s


def run(recorder: Recorder) -> None:
    with recorder.case("stamp") as values:
        assert recorder.on_cpu or torch.cuda.is_available(), "torch sees no CUDA device"
        values["machine"] = {**machine_stamp(), **gpu_stamp(recorder.device)}
    if not recorder.num_failed:
        with recorder.case("copy") as values:
            values["gb_s"] = copy_bandwidth_gb_s(recorder.device)


def gpu_stamp(device: str) -> dict[str, Any]:
    """What GPU results depend on in addition to machine_stamp()."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    if device == "cpu":
        return {"triton": triton}
    properties = torch.cuda.get_device_properties(0)
    return {
        "triton": triton,
        "cuda": torch.version.cuda,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "gpu_multiprocessors": properties.multi_processor_count,
        "compute_capability": f"{properties.major}.{properties.minor}",
    }
