"""Every combination in combinations.md is refused with the words that stand there."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.checkpoint import MODELS_DIR
from common.cli import parse_configs
from common.errors import FieldError
from common.serve import ListenConfig
from common.testing import small_model
from part15_full_architecture import config as config_module
from part15_full_architecture.config import EngineConfig
from part15_full_architecture.disagg.config import DisaggConfig
from part15_full_architecture.disagg.proxy import create_app as create_proxy
from part15_full_architecture.kv_params import SECRET_VARIABLE
from part15_full_architecture.llm import LLM
from part15_full_architecture.router.app import create_app as create_router
from part15_full_architecture.router.config import RouterConfig
from part15_full_architecture.torchrun import Torchrun
from part15_full_architecture.worker.quantization.choice import QuantizationFlags, choose_layouts
from part15_full_architecture.worker.quantization.layouts import group_slice, take_part
from part15_full_architecture.worker.quantization.scheme import Scheme
from part15_full_architecture.worker.weight import Part
from tests.part15.features import Machine, Matrix, check, choose_all
from tests.part15.refused import PAGE, Refused, table

LOOK = f"See {PAGE.name}, which must have a row with the words of each error, and the code that raises it"
TABLE = table()


def read(configs: Sequence[type[Any]], words: list[str]) -> list[Any]:
    """The configs of a command line. A FieldError stays one, and doesn't end the process."""
    try:
        return parse_configs(configs, "", "", words)
    except SystemExit as end:
        raise end.__context__ or end from None


def start_engine(row: Refused, **changes: Any) -> None:
    """Far enough for the error: the configs, the model's shape, or at last the model."""
    [config] = read([EngineConfig], row.words)
    config = replace(config, **changes)
    check(config)
    LLM(config)


def start_torchrun(row: Refused, world_size: int = 2, master_addr: str = "127.0.0.1") -> None:
    [config] = read([EngineConfig], row.words)
    Torchrun(0, 0, world_size, master_addr, 1).check(config)


def start_router(row: Refused) -> None:
    server, config = read([ListenConfig, RouterConfig], row.words)
    create_router(config, server)


def start_proxy(row: Refused) -> None:
    server, config = read([ListenConfig, DisaggConfig], row.words)
    create_proxy(config, server)


def load_quantized(row: Refused) -> None:
    config = SimpleNamespace(quantization_config={"quant_method": "gptq"})
    choose_layouts(config, QuantizationFlags(row.words[1]))


def split_groups(row: Refused) -> None:
    """On the second of two ranks."""
    part = Part(256, 384, columns=slice(192, 384))
    group_slice(Scheme(bits=4, group_size=128), part, "down_proj")


def split_scattered_groups(row: Refused) -> None:
    groups = torch.arange(256) % 2
    part = Part(4, 256, columns=slice(128, 256))
    codes, scale = torch.zeros(4, 256, dtype=torch.int8), torch.ones(4, 2)
    take_part(codes, scale, None, groups, "down_proj", part, Scheme(bits=4, group_size=128))


WITHOUT_A_PROGRAM: dict[str, Callable[[Refused], None]] = {
    "LLM": start_engine,
    "torchrun": start_torchrun,
    "torchrun, which has started 2 ranks": start_torchrun,
    "torchrun on several machines": lambda row: start_torchrun(row, master_addr="10.0.0.1"),
    "router": start_router,
    "proxy": start_proxy,
    "for a checkpoint that is quantized": load_quantized,
    "for a checkpoint in groups of 128 that ranks would split": split_groups,
    "for a checkpoint with scattered groups": split_scattered_groups,
}


def run(row: Refused, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What must raise the row's error."""
    if row.situation in WITHOUT_A_PROGRAM:
        WITHOUT_A_PROGRAM[row.situation](row)
    elif row.situation == "without Linux":
        monkeypatch.delattr(os, "memfd_create", raising=False)
        start_engine(row)
    elif "another vocabulary" in row.situation:
        small_model("llama", seed=1).save_pretrained(directory)
        for path in (MODELS_DIR / "tiny").glob("tokenizer*"):
            shutil.copy(path, directory)
        start_engine(row, speculative_model=str(directory), max_model_len=128)
    else:
        start_with_kernels(row, monkeypatch)


def start_with_kernels(row: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the GPU and the head_dim that stand in the row, and a compiler for both."""
    capability, head_dim = (
        re.search(r"compute capability (\d)\.(\d)", row.situation),
        re.search(r"head_dim (\d+)", row.situation),
    )
    found = (9, 0) if capability is None else tuple(map(int, capability.groups()))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found)
    if "cuda" in row.words[:2]:
        monkeypatch.setattr(config_module, "default_device", lambda: "cuda")
    if not row.situation and "--kernels" not in row.words:
        start_engine(row)
        return
    [config] = read([EngineConfig], row.words)
    size = 32 if head_dim is None else int(head_dim[1])
    choose_all(config.kernels, str(config.device), config.dtype, size)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.flags.replace("`", ""))
def test_a_combination_is_refused(row: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)
    with pytest.raises(FieldError) as caught:
        run(row, tmp_path, monkeypatch)
    assert str(caught.value) == row.error, f"{row.flags}: expected {row.error!r}, got {str(caught.value)!r}. {LOOK}"


def test_the_whole_table_is_read() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and line.count("|") > 3]
    headings = [line for line in rows if line.startswith("| flags ")]
    assert len(rows) - len(headings) == len(TABLE) > 40, (
        f"{PAGE.name} has {len(rows) - len(headings)} rows, {len(TABLE)} of which can be read: expected `--flags`, "
        "`field: message` and a sentence"
    )
    for row in TABLE:
        assert re.fullmatch(r"[A-Z].*\.", row.why), f"{row.flags}: expected a sentence that says why, got {row.why!r}"


def test_what_the_matrix_leaves_out_is_in_the_table() -> None:
    """On any machine: with all tiers, and the kernels of a GPU refused on a CPU."""
    matrix = Matrix(Machine("cpu"))
    matrix.allowed_pairs()
    known = {row.error for row in TABLE}
    assert len(matrix.refusals) > 6, f"expected more errors, got {list(matrix.refusals)}"
    for error, row in matrix.refusals.items():
        assert error in known, f"{row} is refused with {error!r}. {LOOK}"
