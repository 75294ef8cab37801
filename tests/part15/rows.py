"""The rows of this machine, and what is checked of each: shared by the files that run them side by side."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest
import torch

from part12_cpu_offloading.lab.redis_server import is_installed
from part15_full_architecture.worker.kernels.build import NoCompilerError, find_cxx
from tests.forked_servers import Host
from tests.part15.acts import check_that_it_acts
from tests.part15.features import FEATURES, RANKS, Machine, Matrix, Row
from tests.part15.references import MIN_SHARE, TF32_MARGIN, Comparison, reference_of
from tests.part15.running import LOOK, run_row

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


def has_cxx() -> bool:
    try:
        return bool(find_cxx())
    except NoCompilerError:
        return False


def machine(device: str) -> Machine:
    """This one."""
    out = []
    if not is_installed():
        out.append(("KV offloading", "host and Redis", "redis-server is not installed"))
    if device == "cpu":
        out.append(("kernels", "triton", "it needs a GPU"))
        if not has_cxx():
            out.append(("kernels", "cuda", "there is no C++ compiler"))
    elif torch.cuda.device_count() < 4:
        out += [(name, "2", "it needs up to four GPUs") for name in RANKS]
    return Machine(device, tuple(out))


@functools.cache
def matrix_of(device: str) -> Matrix:
    return Matrix(machine(device))


@functools.cache
def rows_of(device: str) -> list[Row]:
    """Empty without such a device."""
    return matrix_of(device).rows() if device == "cpu" or torch.cuda.is_available() else []


def name_of(row: Row) -> str:
    """What differs from an engine that is told nothing, after a number by which pytest's -k finds it."""
    different = [f"{name}: {value}" for name, value in row.items() if value != next(iter(FEATURES[name]))]
    number = next((number for device in ("cpu", "cuda") for number, own in enumerate(rows_of(device)) if own is row), 0)
    return f"row{number:02}, {', '.join(different) or 'no flags'}"


def check_row(row: Row, device: str, host: Host, directory: Path) -> None:
    where, result = name_of(row), run_row(row, device, host, directory)
    check_that_it_acts(row, device, result, where)
    reference, comparison = reference_of(row), Comparison()
    margin = max(reference.margin, TF32_MARGIN if device == "cuda" else 0.0)
    for prompt, answer in result.answers:
        comparison.add(reference, margin, prompt, answer, f"{where}. {LOOK}")
    assert comparison.num_best >= MIN_SHARE * comparison.num_tokens, (
        f"{where}: {comparison.num_best} of {comparison.num_tokens} tokens are the reference's best: expected at least "
        f"{MIN_SHARE:.0%}. {LOOK}"
    )
