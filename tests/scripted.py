"""An engine whose worker follows a script: no weights, and a step runs when its result is asked for, not before."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import time
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import msgspec

from common.sampling_params import SamplingParams

END = 0  # the token that ends an answer
UNWRITTEN = 255  # what the script reads where nothing was written
VOCAB_SIZE = 256
NOTHING = (UNWRITTEN, b"nothing")  # what a slot of PrefixExecutor's cache holds if nothing was written there
LOOK_BORDER = "Look at core/scheduler.py::Scheduler._start and _add: the worker knows only what a StepInput says."


class Part:
    """A part's modules by their names: Part("part05_async_scheduling").engine is its core/engine.py."""

    def __init__(self, package: str) -> None:
        self.package = package

    def __getattr__(self, name: str) -> ModuleType:
        for room in ("api.", "core.", "worker.", "lab.", ""):  # the root last: `worker` is worker/worker.py
            if has_module(f"{self.package}.{room}{name}"):
                self.__dict__[name] = found = importlib.import_module(f"{self.package}.{room}{name}")  # look only once
                return found
        raise AttributeError(f"{self.package} has no module {name}")


def has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # not even its package
        return False


def next_token(token_ids: Sequence[int]) -> int:
    """The scripted model: a token out of all tokens so far; one in twenty is END."""
    return zlib.crc32(bytes(token_ids)) % 20


def answer_alone(
    prompt: list[int], max_tokens: int, ignore_eos: bool = False, script: Callable[[Sequence[int]], int] = next_token
) -> list[int]:
    """What a request gets if it is alone."""
    output: list[int] = []
    while len(output) < max_tokens and (ignore_eos or END not in output):
        output.append(script(prompt + output))
    return output


def params_for(max_tokens: int, **fields: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **fields)


def ids(requests: Sequence[Any]) -> list[str]:
    return [request.request_id for request in requests]


def shares(output: Any) -> list[tuple[Any, Any]]:
    """Of a SchedulerOutput: each Request with its ScheduledRequest."""
    requests, step = output.requests, output.step.requests
    assert len(requests) == len(step), (
        f"a step has {len(step)} ScheduledRequests for the requests {ids(requests)}: expected one for each, in "
        "the same order. Look at core/scheduler.py::Scheduler._add."
    )
    return list(zip(requests, step, strict=True))


@dataclass
class Work:
    """One request's share of a step, as the worker knew it when the step was launched.

    share: the part's ScheduledRequest. slots: of all positions from 0 to the last one of the share. sampled: the tokens
    that it brought. request_id: for messages and counts; a real worker does not know it.
    """

    request_id: str
    share: Any
    params: SamplingParams
    slots: list[int]
    sampled: list[int] = field(default_factory=list)

    @property
    def row(self) -> int:
        return self.share.row

    @property
    def start(self) -> int:
        return self.share.num_computed_tokens

    @property
    def end(self) -> int:
        return self.share.num_computed_tokens + self.share.num_scheduled_tokens

    @property
    def is_sampled(self) -> bool:
        """False for a chunk that ends before the last known token."""
        return getattr(self.share, "is_sampled", True)

    @property
    def draft_token_ids(self) -> list[int]:
        """None before part 8."""
        return getattr(self.share, "draft_token_ids", [])

    @property
    def num_known(self) -> int:
        """Where its first sampled token goes: after its last token that is not a draft token."""
        return self.end - len(self.draft_token_ids)

    @property
    def input_slots(self) -> list[int]:
        return self.slots[self.start :]


@dataclass(eq=False)
class ScriptedStep:
    """A step that was launched. It runs when its result is asked for, after all that were launched before it."""

    executor: ScriptedExecutor
    number: int
    new_rows: list[tuple[int, list[int]]]
    work: list[Work]
    error: Exception | None = None

    def result(self) -> Any:
        executor = self.executor
        while self in executor.pending:
            executor.run(executor.pending.popleft())
        executor.log.append(f"result {self.number}")
        if self.error is not None:
            raise self.error
        return executor.decode_output(executor.encode(executor.output(self)))


class ScriptedExecutor:
    """In the Executor's place, with a worker whose KV cache holds tokens: slot → token.

    It knows what a StepInput says and nothing else, and gets it as it would in another process: encoded and decoded.
    The script sees a request's tokens as its blocks hold them. So a token that went to the wrong row or slot, or that
    was read too early, changes an answer.

    tokens: a row of the token buffer each. tables: each row's block table. log: launches and results in their order.
    scheduled: the last SchedulerOutput. It serves to name requests in messages, and to see a preemption.
    """

    def __init__(self, part: Part, config: Any) -> None:
        self.part, self.config = part, config
        self.num_blocks, self.num_host_blocks = config.num_kv_blocks, 0
        self.weight_bytes = self.bytes_per_block = 0
        self.kernels: dict[str, tuple[str, str]] = {}
        self.encode = part.messages.encode
        self.decode_input = msgspec.msgpack.Decoder(part.messages.StepInput).decode
        self.decode_output = msgspec.msgpack.Decoder(part.messages.StepOutput).decode
        self.tokens = [[UNWRITTEN] * config.max_model_len for _ in range(config.max_num_seqs)]
        self.tables: dict[int, list[int]] = {}
        self.params: dict[int, SamplingParams] = {}
        self.cache: dict[int, Any] = {}
        self.script: Callable[[Sequence[int]], int] = next_token
        self.pending: deque[ScriptedStep] = deque()
        self.launched: list[ScriptedStep] = []
        self.log: list[str] = []
        self.scheduled: Any = None
        self.launch_error: Exception | None = None  # raised by the next launch
        self.preemption_error: Exception | None = None  # raised by the next launch after a preemption
        self.result_error: Exception | None = None  # raised by the result of the next step that is launched
        self.num_tokens_computed = 0

    def launch(self, step: Any) -> ScriptedStep:
        is_named = self.scheduled is not None and self.scheduled.step is step
        if self.preemption_error is not None and is_named and self.scheduled.preempted:
            error, self.preemption_error = self.preemption_error, None
            raise error
        if self.launch_error is not None:
            error, self.launch_error = self.launch_error, None
            raise error
        names = ids(self.scheduled.requests) if is_named else [f"of row {share.row}" for share in step.requests]
        assert len(names) == len(step.requests), (
            f"the step is for the requests {names}, and its StepInput has {len(step.requests)} ScheduledRequests: "
            f"expected one for each. {LOOK_BORDER}"
        )
        launched = self.prepare(self.decode_input(self.encode(step)), names)
        self.pending.append(launched)
        self.launched.append(launched)
        self.log.append(f"launch {launched.number}")
        return launched

    def prepare(self, step: Any, names: Sequence[str]) -> ScriptedStep:
        """What happens at launch: rows are taken over, block tables grow. Tokens and the cache stay as they are."""
        new_rows = [new.row for new in step.new_requests]
        rows = [share.row for share in step.requests]
        assert len(set(rows)) == len(rows) and set(new_rows) <= set(rows) <= set(range(len(self.tokens))), (
            f"new requests in rows {new_rows}, scheduled are rows {rows} of {len(self.tokens)}: expected each row "
            f"once, and the new ones among them. {LOOK_BORDER}"
        )
        for new in step.new_requests:
            self.tables[new.row], self.params[new.row] = [], new.params
        work = [self.work_of(share, name) for share, name in zip(step.requests, names, strict=True)]
        self.num_tokens_computed += sum(share.num_scheduled_tokens for share in step.requests)
        error, self.result_error = self.result_error, None
        return ScriptedStep(
            self, len(self.launched) + 1, [(new.row, new.token_ids) for new in step.new_requests], work, error
        )

    def work_of(self, share: Any, name: str) -> Work:
        assert share.row in self.tables, (
            f"request {name} is scheduled in row {share.row}, which no NewRequest has taken. {LOOK_BORDER}"
        )
        table, block_size = self.tables[share.row], self.config.block_size
        table += share.new_block_ids
        end = share.num_computed_tokens + share.num_scheduled_tokens
        assert share.num_scheduled_tokens > 0 and end <= len(table) * block_size, (
            f"request {name} computes positions {share.num_computed_tokens} to {end - 1}; the worker knows its blocks "
            f"{table} of {block_size} tokens, expected {-(-end // block_size)} of them. {LOOK_BORDER}"
        )
        assert end <= len(self.tokens[share.row]), (
            f"request {name} computes positions {share.num_computed_tokens} to {end - 1}, and the context has "
            f"{len(self.tokens[share.row])} tokens. {LOOK_BORDER}"
        )
        slots = [table[position // block_size] * block_size + position % block_size for position in range(end)]
        return Work(name, share, self.params[share.row], slots)

    def run(self, step: ScriptedStep) -> None:
        if step.error is not None:
            return  # nothing of it happens
        for row, token_ids in step.new_rows:
            self.tokens[row][: len(token_ids)] = token_ids
        for work in step.work:  # all keys and values are written before any is read
            self.write(work)
        for work in step.work:
            tokens = self.read(work, step.number)
            work.sampled = self.sample(work, tokens) if work.is_sampled else []
        for work in step.work:
            self.tokens[work.row][work.num_known : work.num_known + len(work.sampled)] = work.sampled

    def write(self, work: Work) -> None:
        self.cache.update(zip(work.input_slots, self.tokens[work.row][work.start : work.end], strict=True))

    def read(self, work: Work, number: int) -> list[int]:
        """The tokens of a request as its blocks hold them. number: the step's."""
        return [self.cache.get(slot, UNWRITTEN) for slot in work.slots]

    def sample(self, work: Work, tokens: list[int]) -> list[int]:
        """What follows: one token. tokens: all up to the end of the share."""
        return [self.script(tokens)]

    def output(self, step: ScriptedStep) -> Any:
        """What the worker answers: the part's StepOutput, with one token for each sampled request."""
        token_ids = [work.sampled[0] for work in step.work if work.is_sampled]
        now = time.perf_counter()
        return self.part.messages.StepOutput(token_ids, [None] * len(token_ids), start_s=now, end_s=now)

    def num_samples(self, request_id: str) -> int:
        """How many steps brought a request tokens, wanted or not."""
        return sum(work.request_id == request_id and work.is_sampled for step in self.launched for work in step.work)


def follow(before: bytes, token_id: int) -> bytes:
    """What a token's key and value depend on: itself, and what the one before it depends on."""
    return hashlib.blake2b(before + bytes([token_id]), digest_size=8).digest()


def first_of(cache_salt: str | None) -> bytes:
    """Keys and values depend on no salt. Here they do, so that it is seen if another salt's block is found."""
    return (cache_salt or "").encode()


def contents(token_ids: Sequence[int], cache_salt: str | None) -> list[bytes]:
    """What the cache holds at each position of a request."""
    found, last = list[bytes](), first_of(cache_salt)
    for token_id in token_ids:
        last = follow(last, token_id)
        found.append(last)
    return found


class PrefixExecutor(ScriptedExecutor):
    """Its cache is: slot → token, and all that it depends on.

    problems has an entry for each request that has read a slot with other contents than its tokens say.
    meaning: a block's hash → what the last slot of such a block holds.
    """

    def __init__(self, part: Part, config: Any) -> None:
        super().__init__(part, config)
        self.problems: dict[str, str] = {}
        self.meaning: dict[bytes, bytes] = {}

    def write(self, work: Work) -> None:
        """Tokens, and what they depend on: what the slot before them holds."""
        start = work.start
        last = self.cache.get(work.slots[start - 1], NOTHING)[1] if start else first_of(work.params.cache_salt)
        for slot, token_id in zip(work.input_slots, self.tokens[work.row][start : work.end], strict=True):
            last = follow(last, token_id)
            self.cache[slot] = (token_id, last)

    def read(self, work: Work, number: int) -> list[int]:
        """The tokens of a request as its blocks hold them, which is as they are in its row."""
        wanted, salt = self.tokens[work.row][: work.end], work.params.cache_salt
        held = [self.cache.get(slot, NOTHING) for slot in work.slots]
        pairs = zip(held, contents(wanted, salt), strict=True)
        wrong = [position for position, ((_, got), expected) in enumerate(pairs) if got != expected]
        if wrong:
            self.problems.setdefault(
                work.request_id,
                f"step {number} reads keys and values of request {work.request_id} (salt {salt!r}) at positions "
                f"{wrong}, slots {[work.slots[p] for p in wrong]}. Its tokens there are {[wanted[p] for p in wrong]}; "
                f"the slots hold {[held[p][0] for p in wrong]}, or the same tokens after a different prefix.",
            )
        return [token_id for token_id, _ in held]


def make_scripted_engine(
    part: Part,
    executor: Callable[[Part, Any], ScriptedExecutor],
    max_model_len: int,
    script: Callable[[Sequence[int]], int],
    **flags: Any,
) -> Any:
    """The part's LLMEngine over a scripted worker; flags are EngineConfig's."""
    checkpoint = SimpleNamespace(
        eos_token_ids=frozenset({END}), max_model_len=max_model_len, config=SimpleNamespace(vocab_size=VOCAB_SIZE)
    )
    name = "make_executor" if hasattr(part.engine, "make_executor") else "Executor"  # from part 9 on there are two
    places = {name: lambda config, *_: executor(part, config), "resolve_checkpoint": lambda _: checkpoint}
    with mock.patch.multiple(part.engine, **places):
        engine = part.engine.LLMEngine(part.config.EngineConfig(**{"device": "cpu", "num_kv_blocks": 1_000, **flags}))
    scripted, schedule = executor_of(engine), engine.scheduler.schedule
    scripted.script = script

    def noted() -> Any:
        scripted.scheduled = schedule()
        return scripted.scheduled

    engine.scheduler.schedule = noted
    return engine


def executor_of(engine: Any) -> Any:
    """The part's own kind of ScriptedExecutor."""
    assert isinstance(engine.executor, ScriptedExecutor)
    return engine.executor
