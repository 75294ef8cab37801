"""tools/gpu: sections run one by one and record their cases at once; a dry run on the CPU covers all of them."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.checkpoint import resolve_checkpoint
from common.results import read_result
from tools.gpu import __main__ as command_line
from tools.gpu import bandwidth, kernels, nano_vllm, streams, wheels
from tools.gpu.recorder import Recorder
from tools.gpu.runner import Section, run_sections

ROOT = Path(__file__).parents[2]


def section(function: str, name: str = "a", **options: Any) -> Section:
    return Section(name, f"tests.tools.gpu_sections:{function}", **{"budget_s": 60, "min_s": 0, **options})


def run(path: Path, *sections: Section, seconds: float = 60) -> tuple[int, dict[str, Any]]:
    """Returns how many sections failed, and what the result file says about each."""
    num_failed = run_sections(
        sections, path, device="cpu", ends_at=time.monotonic() + seconds, environment={"RESULT": str(path)}
    )
    return num_failed, read_result(path)["measurements"]["sections"]


def recorded(recorder: Recorder) -> dict[str, Any]:
    """The cases that a Recorder over a StringIO has written."""
    lines = map(json.loads, recorder._out.getvalue().splitlines())
    return {line["case"]: line["values"] for line in lines if "case" in line}


def test_a_case_is_written_before_the_next_one_runs(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    num_failed, sections = run(path, section("two_cases"))
    assert (num_failed, sections["a"]["status"]) == (0, "passed"), sections
    assert sections["a"]["cases"]["second"]["first_was_written"], "the first case reached the file only at the end"
    assert sections["a"]["cases"]["first"]["gb_s"] == "nan", "JSON has no NaN"
    assert read_result(path)["machine"] == {"gpu": "made up"}, "the machine comes from a case"


def test_a_failure_is_recorded_and_the_next_section_goes_on(tmp_path: Path) -> None:
    names = ("a_case_fails", "raises", "dies", "skips", "two_cases")
    num_failed, found = run(tmp_path / "gpu.json", *(section(name, name) for name in names[:-1]), section(names[-1]))
    assert num_failed == 3 and found["a"]["status"] == "passed", {name: each["status"] for name, each in found.items()}
    failed = found["a_case_fails"]
    assert (failed["status"], failed["reason"]) == ("failed", "1 cases failed"), failed
    assert failed["cases"]["bad"]["got"] == 3 and "by zero" in failed["cases"]["bad"]["traceback"], failed
    assert str(ROOT) not in json.dumps(found), "the repository's folder must not be recorded"
    assert failed["cases"]["good"] == {"passed": True, "device": "cpu"}, "the cases after a failed one still run"
    assert failed["cases"]["late"] == {"passed": None, "skipped": "no time"}
    assert "nothing there" in found["raises"]["traceback"] and found["raises"]["cases"] == {"first": {"passed": True}}
    assert (found["dies"]["status"], found["dies"]["reason"]) == ("failed", "exit status -9"), found["dies"]
    assert "last words" in found["dies"]["stderr"]
    assert (found["skips"]["status"], found["skips"]["reason"]) == ("skipped", "not here"), found["skips"]


def test_a_section_past_its_budget_is_killed_and_keeps_its_cases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once its first case is in the file, the budget counts as over."""
    path, wait, budgets = tmp_path / "gpu.json", subprocess.Popen.wait, []

    def wait_for_first_case(process: subprocess.Popen[str], timeout: float | None = None) -> int:
        sections = read_result(path)["measurements"]["sections"]
        if timeout is None or "b" in sections:
            return wait(process, timeout)
        budgets.append(timeout)
        deadline = time.monotonic() + timeout
        while "first" not in read_result(path)["measurements"]["sections"]["a"]["cases"]:
            assert time.monotonic() < deadline, f"no case in {timeout} s"
            time.sleep(0.02)
        raise subprocess.TimeoutExpired(process.args, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait_for_first_case)
    num_failed, sections = run(path, section("hangs", budget_s=50), section("skips", "b"))
    assert budgets == [50], f"a section may run for its budget, 50 s: waited for {budgets}"
    assert num_failed == 1 and sections["a"]["reason"] == "killed: not done after 50 s", sections["a"]
    assert sections["a"]["cases"] == {"first": {"passed": True}} and sections["b"]["reason"] == "not here"


def test_with_too_little_time_left_a_section_is_skipped(tmp_path: Path) -> None:
    num_failed, sections = run(tmp_path / "gpu.json", section("raises", min_s=20), seconds=10)
    assert (num_failed, sections["a"]["status"]) == (0, "skipped"), sections
    assert sections["a"]["reason"].endswith("s left, it needs at least 20"), sections


def test_a_failed_required_section_skips_the_others(tmp_path: Path) -> None:
    num_failed, sections = run(tmp_path / "gpu.json", section("raises", is_required=True), section("two_cases", "b"))
    assert num_failed == 1 and (sections["b"]["status"], sections["b"]["reason"]) == ("skipped", "a failed"), sections


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("gpu") / "gpu.json"
    command = [sys.executable, "-m", "tests.tools.forked_sections"]
    options = ["--dry-run-on-cpu", "--out", str(path), "--commit", "abc1234"]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, path.read_text() if path.is_file() else done.stderr
    return read_result(path)


def test_a_dry_run_takes_every_section(dry_run: dict[str, Any]) -> None:
    sections = dry_run["measurements"]["sections"]
    assert list(command_line.SECTIONS) and set(sections) == {each.name for each in command_line.SECTIONS}
    status = {name: each["status"] for name, each in sections.items()}
    kernels_run = "passed" if sections["kernels"].get("reason") != "triton is not installed" else "skipped"
    assert status == {**dict.fromkeys(sections, "passed"), "kernels": kernels_run, "tests": "skipped"}, sections
    assert dry_run["commit"] == "abc1234" and dry_run["machine"]["torch"] == str(torch.__version__)
    oracle = sections["oracle"]["cases"]
    assert any("draft_model" in name for name in oracle) and all(each["passed"] for each in oracle.values()), oracle
    whole = [each["is_whole_benchmark"] for name, each in sections["nano_vllm"]["cases"].items() if name != "load"]
    assert whole == [False] * 3, "a reduced run must say that it is one"


def test_without_a_gpu_the_rest_is_skipped(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    path = tmp_path / "gpu.json"
    assert command_line.main(["--sections", "kernels", "--out", str(path)]) == 1
    sections = read_result(path)["measurements"]["sections"]
    assert "no CUDA device" in sections["machine"]["cases"]["stamp"]["traceback"]
    assert sections["kernels"] == {
        "status": "skipped", "reason": "machine failed", "budget_s": 120, "seconds": 0.0, "cases": {},
    }  # fmt: skip


def test_the_command_needs_only_the_standard_library() -> None:
    """On the GPU machine it has to install the rest first."""
    done = subprocess.run([sys.executable, "-S", "-m", "tools.gpu", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "at most eight minutes" in done.stdout, done.stderr


@pytest.mark.parametrize("fault", ["zeros", "nan", "no new tokens' keys"])
def test_a_wrong_kernel_is_caught(fault: str) -> None:
    shape = kernels.Shape("mixed", 4, 2, 8, ((3, 20), (1, 17)))

    def paged_attention(query: torch.Tensor, *_: Any) -> torch.Tensor:
        batch = kernels.make_batch(shape, shape.seqs, query.dtype, "cpu")
        if fault == "zeros":
            return torch.zeros_like(query)
        if fault == "nan":
            return torch.full_like(query, float("nan"))
        past = kernels.Batch(query, batch.kv_cache, batch.block_tables, batch.query_lens, [19, 16])
        return kernels.reference(past, 8**-0.5).to(query.dtype)

    recorder = Recorder(io.StringIO(), 60, "cpu")
    kernels.compare(recorder, "case", SimpleNamespace(paged_attention=paged_attention), shape, torch.float32)
    assert recorded(recorder)["case"]["passed"] is False, recorded(recorder)
    assert "from the reference" in recorded(recorder)["case"]["traceback"]


def test_a_stream_that_waits_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch that does the work at once, and hands out the result."""
    monkeypatch.setattr(streams, "DEADLINE_S", 0.05)
    monkeypatch.setattr(streams, "open_stream", lambda *_: None)
    monkeypatch.setattr(streams, "launch", lambda part, stream, work: work())
    monkeypatch.setattr(streams, "wait_for", lambda tensor: tensor)
    recorder = Recorder(io.StringIO(), 60, "cpu")
    streams.run(recorder)
    assert [values["passed"] for values in recorded(recorder).values()] == [False, False], recorded(recorder)


@pytest.mark.parametrize(
    ("seconds", "limit_s", "expected"),
    [
        ({}, 0, 256),
        ({16: 10.0}, 160, 256),
        ({16: 10.0}, 100, 160),
        ({16: 10.0, 64: 16.0}, 40, 256),  # a line: 10 s that all share and 1/8 s a request
        ({16: 10.0, 64: 16.0}, 30, 176),
        ({16: 10.0, 64: 16.0}, 17, None),
    ],
)
def test_the_largest_run_that_fits(seconds: dict[int, float], limit_s: float, expected: int | None) -> None:
    assert nano_vllm.largest_fitting(seconds, 256, limit_s) == expected


def test_the_whole_benchmark_is_nano_vllms() -> None:
    requests = nano_vllm.workload(256, on_cpu=False, seed=0)
    found = nano_vllm.figures(requests, elapsed_s=10.0)
    assert (found["prompt_tokens"], found["output_tokens"]) == (142_827, 133_966), found
    assert {request.temperature for request in requests} == {0.6} and all(request.ignore_eos for request in requests)


def test_bytes_of_a_decoded_token() -> None:
    tiny, large = (resolve_checkpoint(name).config for name in ("tiny", "random:qwen3-8b"))
    weights = sum(path.stat().st_size for path in (ROOT / "models" / "tiny").glob("*.safetensors"))
    assert abs(bandwidth.weight_bytes_per_token(tiny, torch.bfloat16) - weights) < 10_000, "its file holds bfloat16"
    assert bandwidth.kv_bytes_per_token(tiny, torch.float32, 100) == 100 * 2 * 6 * 4 * 32 * 4
    num_bytes = bandwidth.weight_bytes_per_token(large, torch.bfloat16)
    assert 15.0e9 < num_bytes < 15.3e9, f"two bytes of 8.19 billion parameters less the embedding's 0.62: {num_bytes}"


def make_wheel(folder: Path, name: str, version: str, *requires: str) -> None:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        lines = ["Metadata-Version: 2.1", f"Name: {name}", *(f"Requires-Dist: {each}" for each in requires), "", ""]
        archive.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(lines))


def test_the_wheels_are_complete_or_what_is_missing_is_named(tmp_path: Path) -> None:
    make_wheel(
        tmp_path, "alpha", "1.0", "beta>=2", "torch", 'old; python_version < "3.11"', 'more; extra == "x"', "numba"
    )
    make_wheel(tmp_path, "beta", "2.1")
    assert wheels.unmet_requirements(tmp_path, ["alpha", "numpy>=2"]) == []
    make_wheel(tmp_path, "gamma", "1.0", "delta", "beta<2")
    assert wheels.unmet_requirements(tmp_path, ["torch>=99"]) == [
        f"the project requires torch>=99, found {wheels.PROVIDED['torch']}",
        "gamma requires delta, found None",
        "gamma requires beta<2, found 2.1",
    ]


def test_no_dependency_of_the_project_is_missing() -> None:
    names = {line.split(">")[0].split("<")[0].split("=")[0] for line in wheels.project_requirements()}
    assert {"torch", "fastapi"} <= names, f"read from pyproject.toml: {names}"
    known = {*wheels.PACKAGES, *wheels.PROVIDED, *wheels.LEFT_OUT}
    assert names <= known, f"tools/gpu/wheels.py: explain how {names - known} gets to the GPU machine"


def test_installing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert wheels.install(tmp_path, tmp_path / "site") is None, "all modules are here: nothing is installed"
    monkeypatch.setattr(wheels, "NEEDED_MODULES", ["no_such_module"])
    with pytest.raises(wheels.WheelError, match="no_such_module is not installed: run `make gpu-wheels` first"):
        wheels.install(tmp_path, tmp_path / "site")
    make_wheel(tmp_path, "torch", "2.0")
    with pytest.raises(wheels.WheelError, match=r"torch-2.0-py3-none-any.whl would replace the machine's own package"):
        wheels.install(tmp_path, tmp_path / "site")
