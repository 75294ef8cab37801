"""An engine whose model follows a script: no weights, and a step runs when somebody waits for it, not before."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

from common.sampling_params import SamplingParams

END = 0  # the token that ends an answer
UNWRITTEN = 255  # what the script reads where nobody has written
VOCAB_SIZE = 256
NOTHING = (UNWRITTEN, b"nothing")  # what is in a slot to which nobody has written


class Part:
    """A part's modules by their names: Part("part05_async_scheduling").engine is its core/engine.py."""

    def __init__(self, package: str) -> None:
        self.package = package

    def __getattr__(self, name: str) -> ModuleType:
        for room in ("", "api.", "core.", "worker.", "lab."):
            with contextlib.suppress(ModuleNotFoundError):
                return importlib.import_module(f"{self.package}.{room}{name}")
        raise AttributeError(f"{self.package} has no module {name}")


def next_token(token_ids: Sequence[int]) -> int:
    """The scripted model: a token out of all tokens so far; one in twenty is END."""
    return zlib.crc32(bytes(token_ids)) % 20


def answer_alone(
    prompt: list[int], max_tokens: int, ignore_eos: bool = False, script: Callable[[Sequence[int]], int] = next_token
) -> list[int]:
    output: list[int] = []
    while len(output) < max_tokens and (ignore_eos or END not in output):
        output.append(script(prompt + output))
    return output


def params_for(max_tokens: int, **fields: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **fields)


def ids(requests: Sequence[Any]) -> list[str]:
    return [request.request_id for request in requests]


@dataclass
class Work:
    """What one request does in a step: positions are given as places in the token buffer and slots in the cache.

    output_places: none for a chunk that brings no token; one more than there are guesses (from part 8 on).
    """

    request_id: str
    cache_salt: str | None
    row: int
    input_places: list[int]
    input_slots: list[int]
    context_slots: list[int]
    output_places: list[int]
    draft_ids: list[int]


@dataclass(eq=False)
class ScriptedStep:
    """A step that was launched. It runs when its result is asked for, after all that were launched before it."""

    runner: ScriptedRunner
    number: int
    new_rows: list[tuple[int, list[int]]] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)
    error: Exception | None = None
    sampled: list[int] = field(default_factory=list)

    def result(self) -> Any:
        while self in self.runner.pending:
            self.runner.run(self.runner.pending.popleft())
        self.runner.log.append(f"result {self.number}")
        if self.error is not None:
            raise self.error
        now = time.perf_counter()
        return self.runner.part.stream.StepResult(self.runner.sampler_output(self), now, now)


class ScriptedRunner:
    """In ModelRunner's place, with a real token buffer, and a KV cache of tokens: slot → token.

    The script sees a request's tokens as its blocks hold them. So a token that went to a wrong place or a wrong owner,
    or that was read too early, changes an answer. log: launches and results in their order.
    """

    def __init__(
        self, part: Part, config: Any, checkpoint: Any, max_model_len: int, max_num_batched_tokens: int
    ) -> None:
        self.part = part
        self.kv_cache = SimpleNamespace(num_blocks=config.num_kv_blocks)
        self.model_config = SimpleNamespace(vocab_size=VOCAB_SIZE)
        self.tokens = part.token_buffer.TokenBuffer(config.max_num_seqs, max_model_len, "cpu")
        self.tokens.data.fill_(UNWRITTEN)
        self.cache: dict[int, Any] = {}
        self.script: Callable[[Sequence[int]], int] = next_token
        self.pending: deque[ScriptedStep] = deque()
        self.launched: list[ScriptedStep] = []
        self.log: list[str] = []
        self.launch_error: Exception | None = None  # raised by the next launch
        self.preemption_error: Exception | None = None  # raised by the next launch after a preemption
        self.result_error: Exception | None = None  # raised by the result of the next step that is launched
        self.num_tokens_computed = 0

    def launch(self, scheduled: Any, blocks: Any) -> ScriptedStep:
        self.tokens.release(scheduled.left)
        if self.preemption_error is not None and scheduled.preempted:
            error, self.preemption_error = self.preemption_error, None
            raise error
        if self.launch_error is not None:
            error, self.launch_error = self.launch_error, None
            raise error
        step = ScriptedStep(self, len(self.launched) + 1, error=self.result_error)
        self.result_error = None
        for request, start, end, num_sampled in self.shares(scheduled):
            name = request.request_id
            if self.is_new(name, start):
                step.new_rows.append((self.tokens.acquire(name), request.token_ids))
            row = self.tokens.rows[name]
            slots = [blocks.slot(name, position) for position in range(end)]
            inputs = [self.tokens.place(row, position) for position in range(start, end)]
            outputs = [self.tokens.place(row, end - number) for number in reversed(range(num_sampled))]
            salt, drafts = request.params.cache_salt, list(getattr(request, "draft_token_ids", []))
            step.work.append(Work(name, salt, row, inputs, slots[start:], slots, outputs, drafts))
            self.num_tokens_computed += end - start
        self.pending.append(step)
        self.launched.append(step)
        self.log.append(f"launch {step.number}")
        return step

    def shares(self, scheduled: Any) -> Iterator[tuple[Any, int, int, int]]:
        """Of each request: itself, the positions from where to where it computes, and how many tokens that brings."""
        counts = (scheduled.num_computed_tokens, scheduled.num_scheduled_tokens, scheduled.num_sampled_tokens)
        for request, start, num_tokens, num_sampled in zip(scheduled.requests, *counts, strict=True):
            yield request, start, start + num_tokens, num_sampled

    def is_new(self, request_id: str, start: int) -> bool:
        return start == 0

    def run(self, step: ScriptedStep) -> None:
        if step.error is not None:
            return  # nothing of it happens
        for row, token_ids in step.new_rows:
            self.tokens.fill(row, token_ids)
        for work in step.work:  # all keys and values are written before any is read
            self.write(work)
        output_places = list[int]()
        for work in step.work:
            tokens = self.read(work, step.number)
            for number, place in enumerate(work.output_places, len(tokens) - len(work.output_places) + 1):
                step.sampled.append(self.script(tokens[:number]))
                output_places.append(place)
        self.write_tokens(output_places, step.sampled)

    def write_tokens(self, places: list[int], token_ids: list[int]) -> None:
        self.tokens.write(torch.tensor(places, dtype=torch.int64), torch.tensor(token_ids, dtype=torch.int64))

    def write(self, work: Work) -> None:
        tokens = self.tokens.read(torch.tensor(work.input_places)).tolist()
        self.cache.update(zip(work.input_slots, tokens, strict=True))

    def read(self, work: Work, number: int) -> list[int]:
        """The tokens of a request as its blocks hold them."""
        return [self.cache.get(slot, UNWRITTEN) for slot in work.context_slots]

    def sampler_output(self, step: ScriptedStep) -> Any:
        return self.part.sampler.SamplerOutput(torch.tensor(step.sampled, dtype=torch.int64), None)

    def num_samples(self, request_id: str) -> int:
        """How many steps brought a request tokens, wanted or not."""
        return sum(
            work.request_id == request_id and bool(work.output_places) for step in self.launched for work in step.work
        )


def follow(before: bytes, token_id: int) -> bytes:
    """What a token's key and value depend on: itself, and what the one before it depends on."""
    return hashlib.blake2b(before + bytes([token_id]), digest_size=8).digest()


def first_of(cache_salt: str | None) -> bytes:
    """Keys and values depend on no salt. Here they do, so that it is seen if another salt's block is found."""
    return (cache_salt or "").encode()


def contents(token_ids: Sequence[int], cache_salt: str | None) -> list[bytes]:
    """What stands in the cache at each position of a request."""
    found, last = list[bytes](), first_of(cache_salt)
    for token_id in token_ids:
        last = follow(last, token_id)
        found.append(last)
    return found


class PrefixRunner(ScriptedRunner):
    """Its cache is: slot → token, and all that it depends on.

    problems has an entry for each request that has read a slot in which something else was than it believed.
    meaning: a block's name → what the last slot of such a block holds.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.problems: dict[str, str] = {}
        self.meaning: dict[bytes, bytes] = {}

    def is_new(self, request_id: str, start: int) -> bool:
        return request_id not in self.tokens.rows

    def write(self, work: Work) -> None:
        """Tokens, and what they depend on: what stands in the slot before."""
        tokens = self.tokens.read(torch.tensor(work.input_places)).tolist()
        start = len(work.context_slots) - len(tokens)
        last = self.cache.get(work.context_slots[start - 1], NOTHING)[1] if start else first_of(work.cache_salt)
        for slot, token_id in zip(work.input_slots, tokens, strict=True):
            last = follow(last, token_id)
            self.cache[slot] = (token_id, last)

    def read(self, work: Work, number: int) -> list[int]:
        """The tokens of a request as its blocks hold them, which is as they are in the token buffer."""
        first = work.row * self.tokens.max_model_len
        wanted = self.tokens.data.view(-1)[first : first + len(work.context_slots)].tolist()
        held = [self.cache.get(slot, NOTHING) for slot in work.context_slots]
        pairs = zip(held, contents(wanted, work.cache_salt), strict=True)
        wrong = [position for position, ((_, got), expected) in enumerate(pairs) if got != expected]
        if wrong:
            slots = [work.context_slots[position] for position in wrong]
            self.problems.setdefault(
                work.request_id,
                f"step {number} reads keys and values of request {work.request_id} (salt {work.cache_salt!r}) at "
                f"positions {wrong}, slots {slots}. Its tokens there are {[wanted[p] for p in wrong]}; the slots hold "
                f"{[held[p][0] for p in wrong]}, or the same tokens after another beginning.",
            )
        return [token_id for token_id, _ in held]


def make_scripted_engine(
    part: Part, runner: type[ScriptedRunner], max_model_len: int, script: Callable[[Sequence[int]], int], **flags: Any
) -> Any:
    """The part's LLMEngine over the scripted model; flags are EngineConfig's."""
    checkpoint = SimpleNamespace(eos_token_ids=frozenset({END}), max_model_len=max_model_len)
    parts = {"ModelRunner": functools.partial(runner, part), "resolve_checkpoint": lambda _: checkpoint}
    with mock.patch.multiple(part.engine, **parts):
        engine = part.engine.LLMEngine(part.config.EngineConfig(**{"device": "cpu", "num_kv_blocks": 1_000, **flags}))
    runner_of(engine).script = script
    return engine


def runner_of(engine: Any) -> Any:
    """The part's own kind of ScriptedRunner."""
    assert isinstance(engine.runner, ScriptedRunner)
    return engine.runner
