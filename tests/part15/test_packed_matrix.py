"""Matrices in oneDNN's layout: in place of the plain ones, or beside those that the megakernel reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from part15_full_architecture.worker import packed_matrix
from part15_full_architecture.worker.kernels.autotune import Tuner
from part15_full_architecture.worker.linear import Linear
from part15_full_architecture.worker.megakernel import MAX_TOKENS, can_be_one_kernel
from part15_full_architecture.worker.packed_matrix import PackedMatrix, pack_copies, pack_matrices
from part15_full_architecture.worker.worker import Worker
from tests.contract.engines import GROUP_SIZE, SmallEngine, SmallModels

PART = "part15_full_architecture"
LOOK = "Look at worker/packed_matrix.py"
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


class GivenTimes(Tuner):
    """gains: how many times as fast as the plain matrix the packed one is, by the number of rows; 1 for others."""

    def __init__(self, gains: Mapping[int, float]) -> None:
        super().__init__(Path("/no/such/file"))
        self.gains = gains

    def measure(
        self, name: str, candidates: Mapping[str, Any], make_case: Callable[[], Callable[[Any], object]], *_: object
    ) -> dict[str, float]:
        run = make_case()
        for candidate in candidates.values():
            run(candidate)
        return {"plain": self.gains.get(int(name.split()[1]), 1.0), "packed": 1.0}


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    """Of an engine that has packed nothing."""
    return SmallEngine(PART, SmallModels(tmp_path), pack_weights=False, megakernel=False).worker


def linears(worker: Worker) -> list[Linear]:
    return [module for module in worker.model.modules() if isinstance(module, Linear)]


@pytest.mark.parametrize("num_rows", [0, 1, 5, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_that_of_the_plain_matrix(dtype: torch.dtype, num_rows: int) -> None:
    torch.manual_seed(0)
    matrix, bias, rows = (torch.randn(shape).to(dtype) for shape in ((48, 32), (48,), (num_rows, 32)))
    with torch.inference_mode():
        got, expected = PackedMatrix(matrix).product(rows, bias), F.linear(rows, matrix, bias)
    torch.testing.assert_close(got, expected, msg=lambda text: f"{num_rows} rows: {text} {LOOK}.")


def test_packed_matrices_take_the_place_of_the_plain_ones(worker: Worker) -> None:
    weights, before = [linear.weight for linear in linears(worker)], worker.weight_bytes
    head = worker.model.output_embedding
    assert head is not None
    num_packed = pack_matrices(worker.model, GivenTimes({1: 1.0, 32: 1.5}))
    assert num_packed == len(weights) + 1, f"expected all matrices and the LM head, got {num_packed}. {LOOK}"
    assert all(weight.packed is not None and not weight.data.numel() for weight in weights), LOOK
    assert not can_be_one_kernel(worker.model, worker.runner.attention.kernels, None), (
        f"there is nothing that the megakernel could read. {LOOK}::pack_matrices"
    )
    got, expected = worker.weight_bytes, before + head.weight.nbytes
    assert got == expected, f"only the LM head is there twice: expected {expected} bytes, got {got}. {LOOK}"


def test_copies_leave_the_megakernel_its_matrices(worker: Worker) -> None:
    """Larger steps use the copies."""
    weights, before, model = [linear.weight for linear in linears(worker)], worker.weight_bytes, worker.model
    num_packed = pack_copies(model, MAX_TOKENS, GivenTimes({4 * MAX_TOKENS: 1.5, packed_matrix.LARGE_STEP: 1.5}))
    assert num_packed == len(weights), f"expected all matrices of layers, got {num_packed}. {LOOK}"
    assert all(weight.packed is not None and weight.data.numel() for weight in weights), LOOK
    got, expected = worker.weight_bytes, before + sum(weight.data.nbytes for weight in weights)
    assert got == expected, f"the matrices are there twice: expected {expected} bytes, got {got}. {LOOK}"
    kernels = worker.runner.attention.kernels
    assert can_be_one_kernel(model, kernels, None), f"the megakernel finds its matrices. {LOOK}::pack_copies"
    rows = torch.randn(100, weights[0].shape[1])
    with torch.inference_mode():
        product = weights[0](rows)
        torch.testing.assert_close(product, F.linear(rows, weights[0].data), msg=lambda text: f"{text} {LOOK}.")
        weights[0].data.zero_()
        assert torch.equal(weights[0](rows), product), f"a larger step must use the copy. {LOOK}"


@pytest.mark.parametrize(
    "gains",
    [{}, {4 * MAX_TOKENS: 1.5, packed_matrix.LARGE_STEP: 0.9}, {4 * MAX_TOKENS: 1.05, packed_matrix.LARGE_STEP: 1.05}],
    ids=["no gain", "a loss", "hardly a gain"],
)
def test_no_copies_where_they_do_not_pay(worker: Worker, gains: dict[int, float]) -> None:
    got = pack_copies(worker.model, MAX_TOKENS, GivenTimes(gains))
    assert got == 0, f"{gains}: expected no copy, got {got}. {LOOK}::is_faster"


def test_no_copies_of_a_large_model(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    num_bytes = sum(linear.weight.data.nbytes for linear in linears(worker))
    tuner = GivenTimes({4 * MAX_TOKENS: 2.0})
    monkeypatch.setattr(packed_matrix, "MAX_COPIES", num_bytes - 1)
    got = pack_copies(worker.model, MAX_TOKENS, tuner)
    assert got == 0, f"copies would take {num_bytes} bytes, one too many: got {got} of them. {LOOK}::pack_copies"
    monkeypatch.setattr(packed_matrix, "MAX_COPIES", num_bytes)
    got = pack_copies(worker.model, MAX_TOKENS, tuner)
    assert got == len(linears(worker)), f"copies take what they may: expected all, got {got}. {LOOK}::pack_copies"


@pytest.mark.parametrize("megakernel", [True, False])
@pytest.mark.parametrize("kind", ["no drafts", "weight offload", "int4", "int8 draft"])
def test_answers_with_all_matrices_packed(
    kind: str, megakernel: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a CPU for which they are faster."""
    models = SmallModels(tmp_path)
    monkeypatch.setattr(packed_matrix, "is_faster", lambda *_: True)
    flags: dict[str, Any] = {
        "no drafts": {}, "weight offload": {"cpu_offload_gb": 1.0},
        "int4": {"quantization": "int4", "quantization_group_size": GROUP_SIZE},
        "int8 draft": {
            "speculative_method": "draft_model", "speculative_model": models.draft, "speculative_quantization": "int8",
        },
    }[kind]  # fmt: skip
    engine = SmallEngine(PART, models, megakernel=megakernel, **flags)
    for prompt in ([5, 6, 7], list(range(10, 110))):
        got, expected = engine.generate(prompt, max_tokens=12), models.of(flags).greedy(prompt, 12)
        assert got == expected, f"{kind}, {len(prompt)} tokens: expected {expected}, got {got}. {LOOK}"


def test_without_one_dnn_nothing_is_packed(worker: Worker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object) -> None:
        raise NotImplementedError("no such operator")

    monkeypatch.setattr(PackedMatrix, "__init__", fail)
    got = pack_copies(worker.model, MAX_TOKENS, Tuner(tmp_path / "autotune.json"))
    assert got == 0, f"expected the plain matrices, got {got} copies. {LOOK}::measure"
