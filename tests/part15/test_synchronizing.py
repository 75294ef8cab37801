"""A step never waits for the device: nothing in it reads a tensor's value on the host.

On a CPU, the kernels are exempt: they are functions of the host. Where there is a GPU, they are checked as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode

from part15_full_architecture.worker import worker
from part15_full_architecture.worker.kernels.ops import Kernels, choose_kernels
from tests.contract.engines import SmallEngine, SmallModels

PART = "part15_full_architecture"
LOOK = "the host would wait for all earlier steps. See worker/model_runner.py::ModelRunner.run"
PROMPTS = [[5, 6, 7, 5, 6, 7, 5, 6], [11, 12, 13, 14, 15, 16, 17, 18, 19], [21], [31, 32, 33, 34, 35]]
FIELDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "top_p": 0.8, "top_k": 20},
    {"temperature": 0.7, "seed": 3, "min_p": 0.1, "logprobs": 2},
    {"temperature": 0.5, "presence_penalty": 0.5, "repetition_penalty": 1.1, "logit_bias": {7: 2.0}, "min_tokens": 3},
]


BY_VALUE = ("item", "is_nonzero", "_local_scalar_dense", "nonzero", "masked_select", "unique2", "bincount")


class SynchronizingCalls(TorchDispatchMode):
    """Notes the operators that read a tensor's value on the host: a number, a shape that depends on values, or a copy
    between devices that the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.found = list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        tensors = [each for each in (*args, output) if isinstance(each, torch.Tensor)]
        devices = {tensor.device for tensor in tensors}
        is_copy = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default) and len(devices) > 1
        non_blocking = (kwargs or {}).get("non_blocking", args[2] if len(args) > 2 else False)
        has_mask = any(
            isinstance(each, torch.Tensor) and each.dtype == torch.bool
            for argument in args[1:] if isinstance(argument, (list, tuple)) for each in argument
        )  # fmt: skip
        is_index = func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_, torch.ops.aten.index_put)
        if (
            func.overloadpacket.__name__ in BY_VALUE
            or torch.Tag.data_dependent_output in func.tags
            or (torch.Tag.dynamic_output_shape in func.tags and not is_index)
            or (is_index and has_mask)
            or (is_copy and not non_blocking)
        ):
            self.found.append(str(func))
        return output


@contextmanager
def watched(engine: SmallEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[SynchronizingCalls]:
    """Inside, the calls are noted that steps make after prepare() and before their results are wanted."""
    calls, run = SynchronizingCalls(), engine.worker.runner.run
    tolist = torch.Tensor.tolist

    def noted(tensor: torch.Tensor) -> Any:
        if _get_current_dispatch_mode() is calls:
            calls.found.append("Tensor.tolist")
        return tolist(tensor)

    def watch(*args: Any) -> Any:
        with calls:
            return run(*args)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "tolist", noted)
        patch.setattr(engine.worker.runner, "run", watch)
        yield calls


def exempt(kernel: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with _disable_current_modes():
            return kernel(*args)

    return call


def exempt_kernels(*args: Any) -> Kernels:
    """choose_kernels(), with kernels that may look at values."""
    kernels = choose_kernels(*args)
    functions = {spec.name: getattr(kernels, spec.name) for spec in dataclasses.fields(kernels)}
    return dataclasses.replace(kernels, **{name: exempt(each) for name, each in functions.items() if callable(each)})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> SmallModels:
    return SmallModels(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
@pytest.mark.parametrize(
    "flags",
    [
        {}, {"max_num_batched_tokens": 8, "max_num_seqs": 4}, {"speculative_method": "ngram", "prompt_lookup_min": 1},
        {"cudagraph_capture_sizes": "1,2,4,8,16"}, {"kv_cache_dtype": "int8"},
        {"num_kv_blocks": 12},
    ],
    ids=str,
)  # fmt: skip
def test_a_step_makes_no_synchronizing_call(
    flags: dict[str, Any], device: str, models: SmallModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cpu":
        monkeypatch.setattr(worker, "choose_kernels", exempt_kernels)
    engine = SmallEngine(PART, models, device=device, **flags)
    with watched(engine, monkeypatch) as calls:
        for index, (prompt, fields) in enumerate(zip(PROMPTS, FIELDS, strict=True)):
            engine.add(str(index), prompt, max_tokens=6, **fields)
        engine.finish()
    assert not calls.found, f"{flags}: expected no synchronizing call, got {calls.found[:5]}: {LOOK}"


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("aten.item.default", lambda tensor: tensor[0].item()),
        ("aten.is_nonzero.default", lambda tensor: bool((tensor > 0).all())),
        ("aten.nonzero.default", lambda tensor: tensor.nonzero()),
        ("aten.index.Tensor", lambda tensor: tensor[tensor > 0]),
        ("Tensor.tolist", lambda tensor: tensor.tolist()),
    ],
)
def test_the_watch_sees_a_synchronizing_call(
    name: str, read: Callable[[torch.Tensor], Any], models: SmallModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = SmallEngine(PART, models)
    sample_rows = engine.worker.runner.sampler.sample

    def sample(logits: torch.Tensor, *rest: Any) -> Any:
        sampled = sample_rows(logits, *rest)
        read(sampled.token_ids)
        return sampled

    monkeypatch.setattr(engine.worker.runner.sampler, "sample", sample)
    with watched(engine, monkeypatch) as calls:
        engine.add("0", PROMPTS[0], max_tokens=2)
        engine.finish()
    assert set(calls.found) == {name}, f"expected {name}, got {calls.found}"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_itself_reports_no_synchronizing_call(models: SmallModels) -> None:
    """The same with torch's own check, which knows the calls inside operators as well."""
    engine = SmallEngine(PART, models, device="cuda")
    launch = engine.worker.launch

    def checked(step: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    engine.worker.launch = checked
    for index, (prompt, fields) in enumerate(zip(PROMPTS, FIELDS, strict=True)):
        engine.add(str(index), prompt, max_tokens=6, **fields)
    engine.finish()
