"""config.py: a flag that is out of range is refused by name, and the model fills in what depends on it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from common.errors import FieldError
from part03_paged_attention import config as config_module
from part03_paged_attention.config import EngineConfig, resolve_config

LOOK = "Look at config.py::EngineConfig."


def refused(flags: dict[str, Any], field: str, *words: str) -> None:
    with pytest.raises(FieldError) as caught:
        EngineConfig(**{"device": "cpu", **flags})
    assert caught.value.field == field, f"{flags}: expected the error to name {field}, got {caught.value.field}. {LOOK}"
    for word in words:
        assert word in str(caught.value), f"{flags}: expected {word!r} in {str(caught.value)!r}. {LOOK}"


@pytest.mark.parametrize(
    ("field", "minimum"),
    [
        ("max_model_len", 2),
        ("max_num_seqs", 1),
        ("max_num_batched_tokens", 1),
        ("max_queued_requests", 0),
        ("block_size", 1),
        ("num_kv_blocks", 2),
        ("kv_cache_memory", 1),
    ],
)
def test_the_smallest_value_of_a_flag(field: str, minimum: int) -> None:
    got = getattr(EngineConfig(**{"device": "cpu", field: minimum}), field)
    assert got == minimum, f"{field}={minimum}: got {got}. {LOOK}"
    refused({field: minimum - 1}, field, f"expected at least {minimum}, got {minimum - 1}")


@pytest.mark.parametrize(
    ("flags", "field", "words"),
    [
        (dict(block_size=12), "block_size", ["power of two", "12"]),
        (dict(gpu_memory_utilization=0.0), "gpu_memory_utilization", ["above 0 and up to 1", "0.0"]),
        (dict(gpu_memory_utilization=1.1), "gpu_memory_utilization", ["above 0 and up to 1", "1.1"]),
        (dict(device="tpu"), "device", ["cpu", "cuda", "'tpu'"]),
        (dict(attention_backend="triton"), "attention_backend", ["triton needs a GPU", "numba"]),
    ],
    ids=str,
)
def test_a_flag_out_of_range(flags: dict[str, Any], field: str, words: list[str]) -> None:
    refused(flags, field, *words)


def test_the_backend_fits_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in ("auto", "torch", "numba"):
        assert EngineConfig(device="cpu", attention_backend=backend).attention_backend == backend  # type: ignore
    monkeypatch.setattr(config_module, "default_device", lambda: "cuda")
    for backend in ("auto", "torch", "triton"):
        assert EngineConfig(device="cuda:1", attention_backend=backend).device == "cuda:1"  # type: ignore
    refused(dict(device="cuda", attention_backend="numba"), "attention_backend", "numba runs only on a CPU", "triton")


@pytest.mark.parametrize("found", ["cpu", "cuda"])
def test_the_device_is_a_gpu_if_there_is_one(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "default_device", lambda: found)
    assert EngineConfig().device == found, f"a machine with {found}: got {EngineConfig().device}. {LOOK}"
    assert EngineConfig(device="cpu").device == "cpu", f"--device cpu on a machine with {found}. {LOOK}"


def test_cuda_on_a_machine_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "default_device", lambda: "cpu")
    refused({"device": "cuda"}, "device", "cuda where torch sees a GPU", "'cuda'")


def test_the_context_is_at_most_the_models() -> None:
    checkpoint: Any = SimpleNamespace(max_model_len=256)
    for asked, expected in ((None, 256), (100, 100), (1_000, 256)):
        got = resolve_config(EngineConfig(device="cpu", max_model_len=asked), checkpoint)
        assert got.max_model_len == expected, (
            f"--max-model-len {asked}, the model has 256: expected {expected}, got {got.max_model_len}. "
            "Look at config.py::resolve_config."
        )
