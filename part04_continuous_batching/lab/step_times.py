"""Where the time of a step goes, measured with timers around the functions that make it up."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from ..core.engine import LLMEngine
from ..worker import attention, model

PARTS = (
    "prefill attention", "decode attention", "layer products (QKV, O, MLP)", "logits", "norms", "rotation", "KV store",
    "sampling", "rest of the model", "schedule", "prepare", "update", "rest of the step",
)  # fmt: skip
OUTSIDE = PARTS[-4:]  # outside the model and the sampler


class StepTimer:
    """Seconds by part of the step. A part's time does not include that of the parts called inside it, so the parts add
    up to the whole step. CPU only: on a GPU a function returns before its kernels have run."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._parts: list[str] = []  # those that are running, the innermost last
        self._changed_at = 0.0

    def timed(self, part: str, call: Any) -> Any:
        """Wrap call so that its time counts for part."""

        @functools.wraps(call)
        def run(*args: Any, **kwargs: Any) -> Any:
            self._count()
            self._parts.append(part)
            try:
                return call(*args, **kwargs)
            finally:
                self._count()
                self._parts.pop()

        return run

    def _count(self) -> None:
        """Add the time since the last change to the innermost part."""
        now = time.perf_counter()
        if self._parts:
            self.seconds[self._parts[-1]] += now - self._changed_at
        self._changed_at = now


@contextmanager
def step_timer(engine: LLMEngine) -> Iterator[StepTimer]:
    """Timers around the functions of this engine's step, until the end of the block."""
    runner, timer = engine.executor.worker.runner, StepTimer()
    assert runner.attention is not None, "the executor sets the cache"
    places: list[tuple[str, Any, str]] = [
        ("rest of the step", engine, "step"),
        ("schedule", engine.scheduler, "schedule"),
        ("update", engine, "_update"),
        ("prepare", runner, "_prepare"),
        ("rest of the model", runner.model, "forward"),
        ("logits", runner.model, "compute_logits"),
        ("sampling", runner.sampler, "sample"),
        ("prefill attention", attention, "prefill_attention"),
        ("decode attention", runner.attention, "decode"),
        ("KV store", runner.attention.kv_cache, "store"),
        ("rotation", runner.model.rotary_embedding, "forward"),
        ("rotation", model, "rotate"),
        ("norms", runner.model.norm, "forward"),
    ]
    for layer in runner.model.layers:
        own: Any = layer.self_attn
        mlp: Any = layer.mlp
        products = (own.qkv_proj, own.o_proj, mlp.gate_up_proj, mlp.down_proj)
        places += [("layer products (QKV, O, MLP)", each, "forward") for each in products]
        norms = (layer.input_layernorm, layer.post_attention_layernorm, own.q_norm, own.k_norm)
        places += [("norms", each, "forward") for each in norms]
    with ExitStack() as stack:
        for part, owner, name in places:
            stack.enter_context(mock.patch.object(owner, name, timer.timed(part, getattr(owner, name))))
        yield timer
