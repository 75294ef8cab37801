"""The border between core and worker: only plain data crosses it, so a step may as well go through bytes."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from tests.contract.engines import VOCAB_SIZE, SmallEngine, SmallModels, kinds_of, number_of, prompts_of

LOOK = "Look at messages.py::StepInput and StepOutput, and at what core/scheduler.py and worker/ do with them."
MAX_DECODE_BYTES = 4_096
NUM_DECODES = 32
PROPOSERS = ("n-gram lookup", "a draft model that is right")
TEN_TOKENS = {token_id: 30.0 for token_id in range(40, 50)}  # answers that repeat themselves: drafts are accepted
MIXED: list[dict[str, Any]] = [
    {},
    {"logit_bias": TEN_TOKENS},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.8, "seed": 4, "top_p": 0.9, "top_k": 20, "presence_penalty": 1.0, "logprobs": 2},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "logprobs": 0},
    {"temperature": 1.0, "seed": 5, "logit_bias": TEN_TOKENS, "min_tokens": 4, "stop_token_ids": [41, 43]},
]


@dataclass
class Border:
    """What crosses between core and worker. through_bytes: both ways as MessagePack."""

    engine: SmallEngine
    through_bytes: bool
    sizes: list[tuple[int, int, int]] = field(default_factory=list)  # requests, bytes of the step, of its output
    num_chunks: int = 0  # requests that computed tokens in a step and sampled none
    num_drafts: int = 0

    def __post_init__(self) -> None:
        executor, messages = self.engine.core.executor, self.engine.module("messages")
        self.step_type, self.output_type = messages.StepInput, messages.StepOutput
        name = "launch" if hasattr(executor, "launch") else "execute"
        self.real = getattr(executor, name)
        setattr(executor, name, self.launch if name == "launch" else self.execute)

    def execute(self, step: Any) -> Any:
        self.num_chunks += sum(not getattr(request, "is_sampled", True) for request in step.requests)
        self.num_drafts += sum(len(getattr(request, "draft_token_ids", ())) for request in step.requests)
        data = msgspec.msgpack.encode(step)
        output = self.real(msgspec.msgpack.decode(data, type=self.step_type) if self.through_bytes else step)
        self.sizes.append((0 if step.new_requests else len(step.requests), len(data), 0))
        return output if hasattr(output, "result") else self.receive(output, len(self.sizes) - 1)

    def launch(self, step: Any) -> Any:
        return Handle(self, self.execute(step), len(self.sizes) - 1)

    def receive(self, output: Any, number: int) -> Any:
        data = msgspec.msgpack.encode(output)
        self.sizes[number] = (*self.sizes[number][:2], len(data))
        return msgspec.msgpack.decode(data, type=self.output_type) if self.through_bytes else output


@dataclass
class Handle:
    border: Border
    real: Any
    number: int

    def result(self) -> Any:
        return self.border.receive(self.real.result(), self.number)


def live(part: str, models: SmallModels, flags: dict[str, Any], through_bytes: bool) -> tuple[list[list[Any]], Border]:
    """Random arrivals and aborts in a small pool. Returns the outputs of each step, without times."""
    rng, prompts = random.Random(1), list(prompts_of(20))
    flags = {"num_kv_blocks": 1 + 14, "max_num_seqs": 5, "max_model_len": 64, **flags}
    engine = SmallEngine(part, models, **flags)
    border, steps, num_aborted = Border(engine, through_bytes), list[list[Any]](), 0
    while prompts or engine.core.has_unfinished_requests:
        for _ in range(rng.choice([0, 0, 1, 3])):
            if prompts:
                number = len(prompts)
                engine.add(str(number), prompts.pop(), max_tokens=rng.randint(1, 20), **MIXED[number % len(MIXED)])
        there = [*engine.queues.running, *engine.queues.waiting]
        if there and rng.random() < 0.1:
            engine.core.abort_requests([rng.choice(there).request_id])
            num_aborted += 1
        steps.append([without_times(output) for output in engine.step()])
        assert len(steps) < 1_000, f"{part}: {engine.queues.running} still run. {LOOK}"
    engine.check_empty(LOOK)
    counts = (engine.queues.num_preemptions, num_aborted)
    assert min(counts) > 1, f"{part}, {flags}: this test needs preemptions and aborts, got {counts}"
    return steps, border


def without_times(output: Any) -> Any:
    """An output as plain data; of its events, which there are from part 15 on, only the kinds."""
    fields = msgspec.structs.asdict(output)
    return {**fields, "events": [event.kind for event in fields.get("events", [])]}


@pytest.mark.since(4)
def test_a_life_through_bytes_gives_the_same_tokens(part: str, small_models: SmallModels) -> None:
    """Every step is encoded, decoded and run; its output comes back the same way.

    With offloading, no two runs have the same steps, since copies end at times of their own.
    """
    seen: dict[str, int] = {"chunks": 0, "drafts": 0, "found in the cache": 0}
    for kind, flags in kinds_of(part, small_models).items():
        if "kv_offload_gib" in flags:
            continue
        expected, _ = live(part, small_models, flags, through_bytes=False)
        got, border = live(part, small_models, flags, through_bytes=True)
        for number, (want, have) in enumerate(zip(expected, got, strict=True)):
            assert have == want, f"{part}, {kind}, step {number}: expected {want}, through bytes {have}. {LOOK}"
        seen["chunks"] += border.num_chunks
        seen["drafts"] += border.num_drafts
        seen["found in the cache"] += getattr(border.engine.queues, "num_hit_tokens", 0)
    flags_used = {name for flags in kinds_of(part, small_models).values() for name in flags}
    needed = {
        "chunks": "max_num_batched_tokens" in flags_used, "drafts": "speculative_method" in flags_used,
        "found in the cache": number_of(part) >= 7,
    }  # fmt: skip
    missing = [name for name, is_needed in needed.items() if is_needed and not seen[name]]
    assert not missing, f"{part}: this test needs steps with {missing}, got {seen}"


@pytest.mark.since(4)
def test_a_decode_step_is_small(part: str, small_models: SmallModels) -> None:
    kinds = {"": {}} | {kind: flags for kind, flags in kinds_of(part, small_models).items() if kind in PROPOSERS}
    for kind, flags in kinds.items():
        if kind:
            flags = {**flags, "speculative_max_num_seqs": NUM_DECODES}
        engine = SmallEngine(part, small_models, max_num_seqs=NUM_DECODES, block_size=16, **flags)
        border, rng = Border(engine, through_bytes=False), random.Random(0)
        for number in range(NUM_DECODES):
            prompt = [rng.randrange(VOCAB_SIZE) for _ in range(150)]
            engine.add(str(number), prompt, max_tokens=40 if kind else 18, logit_bias=TEN_TOKENS)
        engine.finish()
        sizes = [(step, output) for num_requests, step, output in border.sizes if num_requests == NUM_DECODES]
        assert len(sizes) > 3, f"{part}, {kind}: this test needs steps of {NUM_DECODES} decodes, got {border.sizes}"
        for what, largest in (("StepInput", max(sizes)[0]), ("StepOutput", max(output for _, output in sizes))):
            assert largest < MAX_DECODE_BYTES, (
                f"{part}, {kind}: the {what} of {NUM_DECODES} decodes has up to {largest} bytes, expected fewer than "
                f"{MAX_DECODE_BYTES}. {LOOK}"
            )
