"""Which kernel is chosen, why, and that measurements are kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import FieldError
from part15_full_architecture.config import EngineConfig
from part15_full_architecture.kernel_names import BACKENDS, NAMES, parse_kernels, show_kernels
from part15_full_architecture.worker.kernels import autotune, ops
from part15_full_architecture.worker.kernels.autotune import Tuner
from part15_full_architecture.worker.kernels.build import NoCompilerError

LOOK = "Look at worker/kernels/ops.py::choose"
H100 = torch.device("cuda", 0)


def situation(device: str = "cpu", **changes: Any) -> ops.Situation:
    values: dict[str, Any] = {
        "device": torch.device(device), "dtype": torch.float32, "kv_dtype": torch.float32, "num_heads": 4,
        "num_kv_heads": 2, "head_dim": 32, "hidden_size": 64, "vocab_size": 100, **changes,
    }  # fmt: skip
    return ops.Situation(**values)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with an H100, but no kernel may run."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100")
    monkeypatch.setattr(ops, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(ops, "load", lambda operation, backend, function: (operation, backend))
    monkeypatch.setattr(ops, "warm_up", lambda *args: None)


class ScriptedTuner(Tuner):
    """Says how long each backend takes, without a measurement."""

    def __init__(self, times: dict[str, float]) -> None:
        self.times, self.asked = times, list[str]()

    def measure(self, name: str, candidates: Any, make_case: Any, device: torch.device) -> dict[str, float]:
        self.asked.append(name.partition(" ")[0])
        return {each: self.times[each] for each in candidates}


def test_one_name_for_all_operations() -> None:
    for name in ("auto", "tuned", *BACKENDS):
        assert parse_kernels(name) == dict.fromkeys(NAMES, name), f"--kernels {name} is for all operations"


def test_a_list_names_some_operations_and_the_others_are_auto() -> None:
    found = parse_kernels("attention=torch, norm=cuda")
    expected = dict.fromkeys(NAMES, "auto") | {"attention": "torch", "norm": "cuda"}
    assert found == expected, f"expected {expected}, got {found}"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("fast", ("kernels", "'fast'", "numba")),
        ("attention=fast", ("kernels", "attention=fast", "triton")),
        ("matmul=torch", ("kernels", "'matmul'", "attention")),
        ("attention=", ("kernels", "attention=", "triton")),
        ("", ("kernels", "''", "numba")),
    ],
)
def test_a_wrong_flag_names_what_is_wrong(text: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(FieldError) as caught:
        EngineConfig(kernels=text)
    missing = [part for part in parts if part not in str(caught.value)]
    assert not missing, f"--kernels {text!r}: the message lacks {missing}: {caught.value}"


def test_a_cpu_gets_numba() -> None:
    choices = ops.choose_kernels("auto", situation()).choices
    assert {choice.backend for choice in choices.values()} == {"numba"}, f"got {choices}. {LOOK}"


def test_float16_on_a_cpu_gets_torch_for_attention_and_says_why() -> None:
    choice = ops.choose_kernels("auto", situation(dtype=torch.float16, kv_dtype=torch.float16)).choices["attention"]
    assert choice.backend == "torch" and "numba does not support float16" in choice.reason, f"got {choice}. {LOOK}"


@pytest.mark.parametrize(("backend", "why"), [("triton", "needs a GPU"), ("numba", "runs only on a CPU")])
def test_what_was_asked_for_and_cannot_be_is_refused(backend: str, why: str, gpu: None) -> None:
    device = "cpu" if backend == "triton" else "cuda"
    with pytest.raises(FieldError, match=f"kernels: attention={backend}: .*{why}"):
        ops.choose_kernels(f"attention={backend}", situation(device), ScriptedTuner({}))


def test_the_fastest_is_taken_on_a_gpu(gpu: None) -> None:
    tuner = ScriptedTuner({"triton": 2e-5, "cuda": 1e-5, "torch": 9e-5})
    choices = ops.choose_kernels("auto", situation("cuda"), tuner).choices
    assert choices["attention"].backend == "cuda", f"cuda took half the time: got {choices['attention']}. {LOOK}"
    reason = choices["attention"].reason
    assert "triton 20 µs" in reason and "cuda 10 µs" in reason, f"the reason has no times: {reason}"
    assert choices["grouped_linear"].backend == "triton", "what is not measured takes the first that can be used"


def test_ranks_that_share_layers_do_not_measure(gpu: None) -> None:
    tuner = ScriptedTuner({"triton": 2e-5, "cuda": 1e-5, "torch": 9e-5})
    choice = ops.choose_kernels("auto", situation("cuda", num_ranks=2), tuner).choices["attention"]
    assert not tuner.asked and choice.backend == "triton" and "all ranks" in choice.reason, f"got {choice}. {LOOK}"


def test_a_head_size_without_a_kernel_takes_another_backend(gpu: None) -> None:
    tuner = ScriptedTuner({"triton": 2e-5, "cuda": 1e-5, "torch": 9e-5})
    choice = ops.choose_kernels("auto", situation("cuda", head_dim=80), tuner).choices["attention"]
    assert choice.backend == "triton" and "head_dim 80" in choice.reason, f"got {choice}. {LOOK}"


@pytest.mark.parametrize(
    ("capability", "dtype", "why"),
    [((6, 1), torch.float16, "expected 7.0"), ((7, 5), torch.bfloat16, "expected 8.0"), ((7, 5), torch.float16, "")],
)
def test_older_gpus_fall_back(
    capability: tuple[int, int], dtype: torch.dtype, why: str, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    reason = ops.why_not("attention", "cuda", situation("cuda", dtype=dtype))
    assert (why in reason) if why else not reason, f"compute capability {capability}, {dtype}: got {reason!r}. {LOOK}"


@pytest.mark.parametrize(
    ("capability", "head_dim", "is_refused"),
    [((7, 5), 256, True), ((7, 5), 128, False), ((7, 0), 256, False), ((8, 9), 256, False)],
)
def test_attention_with_256_dimensions_needs_more_shared_memory_than_turing_has(
    capability: tuple[int, int], head_dim: int, is_refused: bool, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    reason = ops.why_not("attention", "cuda", situation("cuda", head_dim=head_dim))
    assert ("64 KiB of shared memory: expected at most 128" in reason) if is_refused else not reason, (
        f"compute capability {capability}, head_dim {head_dim}: got {reason!r}. See worker/kernels/ops.py::why_not"
    )
    if is_refused:
        assert not ops.why_not("norm", "cuda", situation("cuda", head_dim=head_dim)), "only attention is affected"
        tuner = ScriptedTuner({"triton": 2e-5, "cuda": 1e-5, "torch": 9e-5})
        choice = ops.choose_kernels("auto", situation("cuda", head_dim=head_dim), tuner).choices["attention"]
        assert choice.backend == "triton" and "64 KiB" in choice.reason, f"got {choice}. {LOOK}"


def test_without_nvcc_the_next_backend_is_taken_and_the_message_says_how_to_get_it(
    gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> str:
        raise NoCompilerError("nvcc was not found: pip install -e '.[cuda]' brings it, or set CUDA_HOME")

    monkeypatch.setattr(ops, "find_nvcc", missing)
    tuner = ScriptedTuner({"triton": 2e-5, "torch": 9e-5})
    choice = ops.choose_kernels("auto", situation("cuda"), tuner).choices["norm"]
    assert choice.backend == "triton" and "pip install -e '.[cuda]'" in choice.reason, f"got {choice}. {LOOK}"


def test_a_measurement_is_made_once_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "autotune.json"
    first, second = Tuner(path), Tuner(path)
    chosen = ops.choose_kernels("tuned", situation(), first).choices
    again = ops.choose_kernels("tuned", situation(), second).choices
    assert first.num_measured == 5, f"five operations have a case: {first.num_measured} were measured"
    assert second.num_measured == 0, "the second engine must find the first one's measurements in the file"
    assert chosen == again, f"the same measurements, but other choices: {chosen} and {again}"
    assert all("measured: " in chosen[name].reason for name in ("attention", "norm", "sampling")), f"got {chosen}"
    third = Tuner(path)
    ops.choose_kernels("tuned", situation(head_dim=64), third)
    assert third.num_measured == 5, "another head_dim is another measurement"


def test_the_file_is_read_once_for_many_matrices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Tuner(tmp_path / "autotune.json"), Tuner(tmp_path / "autotune.json")
    read, num_reads = second._read, list[int]()
    monkeypatch.setattr(second, "_read", lambda: num_reads.append(1) or read())
    for tuner in (first, second, second, second):
        for name in "xy":
            tuner.measure(name, {"one": 1}, lambda: lambda which: None, torch.device("cpu"))
    assert second.num_measured == 0 and len(num_reads) == 1, (
        f"expected all from one read of the file, got {second.num_measured} measurements and {len(num_reads)} reads. "
        "See autotune.py::Tuner.measure"
    )


@pytest.fixture
def _forget_cpu() -> Iterator[None]:
    autotune.cpu_name.cache_clear()
    yield
    autotune.cpu_name.cache_clear()


@pytest.mark.usefixtures("_forget_cpu")
@pytest.mark.parametrize(
    "other", [("AMD EPYC", "znver5", 8), ("AMD EPYC 9R14", "znver4", 8), ("AMD EPYC", "znver4", 4)], ids=str
)
def test_another_cpu_is_measured_again(
    other: tuple[str, str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache directory may be shared by machines, and a virtual machine may hide the CPU's full name."""
    num_measured = []
    for model, llvm_name, num_cores in (("AMD EPYC", "znver4", 8), other, ("AMD EPYC", "znver4", 8)):
        autotune.cpu_name.cache_clear()
        monkeypatch.setattr(autotune, "machine_stamp", lambda model=model: {"cpu": model})
        monkeypatch.setattr(autotune, "get_host_cpu_name", lambda llvm_name=llvm_name: llvm_name)
        monkeypatch.setattr(autotune.os, "cpu_count", lambda num_cores=num_cores: num_cores)
        tuner = Tuner(tmp_path / "autotune.json")
        tuner.measure("x", {"one": 1}, lambda: lambda which: None, torch.device("cpu"))
        num_measured.append(tuner.num_measured)
    assert num_measured == [1, 1, 0], (
        f"the first CPU, {other}, and the first again: expected 1, 1 and 0 measurements, got {num_measured}. "
        "See autotune.py::cpu_name"
    )


@pytest.mark.parametrize("entry", [None, 5, "x", {"numba": 0.0}, {"numba": -1.0}, {"numba": "1"}, {"numba": None}])
def test_an_entry_that_makes_no_sense_is_measured_again(entry: object, tmp_path: Path) -> None:
    path = tmp_path / "autotune.json"
    tuner = Tuner(path)
    ops.choose_kernels("norm=tuned", situation(), tuner)
    [key] = json.loads(path.read_text())
    path.write_text(json.dumps({key: entry}))
    next_start = Tuner(path)
    ops.choose_kernels("norm=tuned", situation(), next_start)
    assert next_start.num_measured == 1, f"{entry} is no time for a candidate. See autotune.py::has_times"


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    """Each shape is measured once, and not once for each of its matrices."""
    path = tmp_path / "autotune.json"
    path.mkdir()
    tuner = Tuner(path)
    for _ in range(2):
        tuner.measure("x", {"one": 1}, lambda: lambda which: None, torch.device("cpu"))
    assert tuner.num_measured == 1, f"expected one measurement, got {tuner.num_measured}. See autotune.py::Tuner"
    left = [each.name for each in tmp_path.iterdir()]
    assert left == ["autotune.json"], f"{left}: a temporary file is left. See autotune.py::Tuner._write"


@pytest.mark.parametrize("content", ["", "not JSON", "[1]", pytest.param("[" * 200_000, id="too deep")])
def test_a_damaged_file_is_measured_again(content: str, tmp_path: Path) -> None:
    path = tmp_path / "autotune.json"
    path.write_text(content)
    tuner = Tuner(path)
    ops.choose_kernels("norm=tuned", situation(), tuner)
    assert tuner.num_measured == 1, "a file that can't be read counts as empty"
    assert len(json.loads(path.read_text())) == 1, "and is replaced"


def test_runs_that_another_program_slows_down_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = iter([9.0, 2.0, 9.0, 2.0, 9.0, 2.0, 1.0, 2.0, *[9.0, 2.0] * (autotune.REPEATS - 4)])
    monkeypatch.setattr(autotune, "seconds", lambda *_: next(given))
    tuner = Tuner(tmp_path / "a.json")
    times = tuner.measure("x", {"slowed": 1, "other": 2}, lambda: lambda which: None, torch.device("cpu"))
    assert times == {"slowed": 1.0, "other": 2.0}, f"expected the best of each, got {times}. See autotune.py::time_all"


def test_a_candidate_that_fails_is_left_out(tmp_path: Path) -> None:
    def run(which: str) -> None:
        if which == "broken":
            raise RuntimeError("out of registers")

    times = Tuner(tmp_path / "a.json").measure(
        "x", {"good": "good", "broken": "broken"}, lambda: run, torch.device("cpu")
    )
    assert list(times) == ["good"], f"expected the good one alone, got {times}. See autotune.py::time_all"


def test_the_line_at_the_start() -> None:
    assert show_kernels(dict.fromkeys(NAMES, ("numba", ""))) == "numba"
    found = show_kernels({"attention": ("cuda", ""), "norm": ("triton", ""), "rotary": ("cuda", "")})
    assert found == "cuda for attention and rotary, triton for norm", f"got {found!r}"
