"""messages.py: what the rooms say to each other arrives as it was sent, and nothing else is decoded."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from common.limits import EngineLimits
from common.outputs import Logprob
from common.sampling_params import SamplingParams
from part05_async_scheduling import messages
from part05_async_scheduling.config import EngineConfig
from part05_async_scheduling.core.block_manager import BlockManager
from part05_async_scheduling.core.engine import LLMEngine
from part05_async_scheduling.core.request import Request
from part05_async_scheduling.core.scheduler import Scheduler
from part05_async_scheduling.core.validation import SAMPLING_FIELDS
from part05_async_scheduling.messages import (
    AbortRequests,
    AddRequest,
    EngineCoreDead,
    EngineCoreOutput,
    EngineCoreOutputs,
    NewRequest,
    PromptLogprobs,
    Ready,
    ScheduledRequest,
    Start,
    StartFailed,
    StepInput,
    StepOutput,
    decode_from_core,
    decode_to_core,
    encode,
)
from tests.part05.scripted import run_dry

LOOK = 'Look at messages.py; README "Two processes".'
PART_DIR = Path(messages.__file__).parent
ALL_SET = SamplingParams(
    max_tokens=77, min_tokens=3, temperature=0.7, top_k=11, top_p=0.9, seed=2**63 - 1, stop_token_ids=(5, 9),
    stop=("the", "¤🦊"), ignore_eos=True, n=2, presence_penalty=-1.5, frequency_penalty=0.5, repetition_penalty=1.3,
    logit_bias={7: 1.5, 100: -100.0}, logprobs=20, min_p=0.1, prompt_logprobs=4, include_stop_str_in_output=True,
    skip_special_tokens=False,
)  # fmt: skip
CONFIG = EngineConfig(
    model="tiny", device="cpu", dtype="bfloat16", num_threads=1, max_model_len=100,
    max_num_seqs=3, max_num_batched_tokens=200, max_queued_requests=0, async_scheduling=False, block_size=8,
    num_kv_blocks=50, kv_cache_memory=12_345, gpu_memory_utilization=0.5, trace="a file", attention_backend="torch",
)  # fmt: skip
TO_CORE = [
    Start(CONFIG),
    Start(EngineConfig()),
    AddRequest("17", [1, 2, 3], ALL_SET),
    AddRequest("0", [], SamplingParams()),
    AbortRequests(["1", "2"]),
    AbortRequests([]),
]
STEP = StepInput(
    [NewRequest(3, [1, 2, 3], 2, ALL_SET), NewRequest(0, [7], 1, SamplingParams())],
    [ScheduledRequest(3, 0, 3, [9, 4]), ScheduledRequest(0, 0, 1, [1]), ScheduledRequest(2, 17, 1, [])],
)
PROMPT_LOGPROBS = [PromptLogprobs(0, 1, [{2: Logprob(-0.5, 1)}]), PromptLogprobs(2, 7, [])]
LOGPROBS = [None, {6: Logprob(-0.5, 1), 9: Logprob(-1.5, 2)}, None]
STEP_OUTPUT = StepOutput([5, 6, 7], LOGPROBS, PROMPT_LOGPROBS, 1.5, 1.75)
FROM_CORE = [
    Ready(EngineLimits(512, 4_096, 10_000), 701, {"num_requests_running": 0}),
    StartFailed("kv_cache_memory", "10 bytes hold 0 blocks"),
    StartFailed(None, "no such file"),
    EngineCoreOutputs([], {}),
    EngineCoreOutputs(
        [
            EngineCoreOutput("1", [5]),
            EngineCoreOutput("2", [6], "stop", 6),
            EngineCoreOutput("3", [7], "length", None, [{7: Logprob(-0.5, 2), 8: Logprob(-0.25, 1)}]),
            EngineCoreOutput("4", [], error="ValueError: the cat sat on it"),
            EngineCoreOutput("5", [8], prompt_logprobs=[None, {3: Logprob(-0.5, 1)}]),
        ],
        {"num_requests_running": 3, "kv_cache_usage_perc": 0.125},
    ),
    EngineCoreDead("two steps in a row failed"),
]


def test_the_messages_of_this_test_set_everything() -> None:
    supported = {EngineConfig: {field.name for field in dataclasses.fields(EngineConfig)} - {"model"}}
    supported[SamplingParams] = {*SAMPLING_FIELDS, "n"}  # later parts have more
    for value in (ALL_SET, CONFIG):
        defaults = {field.name: field.default for field in dataclasses.fields(value)}
        same = [name for name in supported[type(value)] if getattr(value, name) == defaults[name]]
        assert not same, f"{type(value).__name__}: this test leaves {same} at their defaults, so it proves nothing"


@pytest.mark.parametrize("message", TO_CORE, ids=lambda message: type(message).__name__)
def test_messages_to_the_core(message: Any) -> None:
    got = decode_to_core(encode(message))
    assert got == message and type(got) is type(message), f"expected {message}, got {got}. {LOOK}"


@pytest.mark.parametrize("message", FROM_CORE, ids=lambda message: type(message).__name__)
def test_messages_from_the_core(message: Any) -> None:
    got = decode_from_core(encode(message))
    assert got == message and type(got) is type(message), f"expected {message}, got {got}. {LOOK}"


def test_types_survive() -> None:
    """MessagePack has no tuples, and its maps' keys are often strings: these must be what they were."""
    params = decode_to_core(encode(TO_CORE[2])).params  # type: ignore[union-attr]
    assert params == ALL_SET and hash(params) == hash(ALL_SET), f"params are hashed: tuples stay tuples. {LOOK}"
    outputs = decode_from_core(encode(FROM_CORE[4])).outputs  # type: ignore[union-attr]
    [entry] = outputs[2].logprobs
    assert list(entry) == [7, 8] and isinstance(entry[7], Logprob), f"the sampled token comes first: {entry}. {LOOK}"


def test_params_are_checked_again_by_the_core() -> None:
    """A value out of range raises in the core as it does here."""
    raw = msgspec.msgpack.encode(
        {"type": "AddRequest", "request_id": "1", "prompt_token_ids": [1], "params": {"temperature": -5.0}}
    )
    with pytest.raises((msgspec.ValidationError, ValueError), match="temperature"):
        decode_to_core(raw)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"garbage",
        b"\x80\x04\x95\x00.",  # how a pickle begins
        msgspec.msgpack.encode({"type": "Nothing"}),
        msgspec.msgpack.encode({"type": "AbortRequests"}),
        msgspec.msgpack.encode({"type": "AbortRequests", "request_ids": [1]}),
        msgspec.msgpack.encode({"type": "EngineCoreOutputs", "outputs": [["1", ["x"]]], "stats": {}}),
        msgspec.msgpack.encode([1, 2]),
        encode(AbortRequests(["1"]))[:-1],
        encode(AbortRequests(["1"])) + b"\x00",
    ],
    ids=lambda data: repr(data[:24]),
)
def test_garbage_is_refused(data: bytes) -> None:
    for decode in (decode_to_core, decode_from_core):
        with pytest.raises(msgspec.MsgspecError):
            decode(data)


def test_each_side_decodes_only_its_own_messages() -> None:
    """The core decodes no outputs, and the client no requests."""
    for message in TO_CORE:
        with pytest.raises(msgspec.ValidationError):
            decode_from_core(encode(message))
    for message in FROM_CORE:
        with pytest.raises(msgspec.ValidationError):
            decode_to_core(encode(message))


# Steps


@pytest.mark.parametrize("value", [STEP, STEP_OUTPUT], ids=lambda value: type(value).__name__)
def test_a_step_survives(value: Any) -> None:
    got = msgspec.msgpack.Decoder(type(value)).decode(encode(value))
    assert got == value, f"expected {value}, got {got}. {LOOK}"


def test_the_steps_of_this_test_set_everything() -> None:
    for value in (STEP, STEP.new_requests[0], STEP.requests[0], STEP_OUTPUT):
        empty = [name for name in value.__struct_fields__ if name != "num_computed_tokens" and not getattr(value, name)]
        assert not empty, f"{type(value).__name__}: {empty} are empty, so this test proves nothing"


def test_a_decode_step_is_small() -> None:
    """For 32 requests under 4 KB, however long they are: blocks and tokens are sent once, when they are new."""
    scheduler = Scheduler(BlockManager(10_000, 16), 32, 100_000)
    for number in range(32):
        scheduler.add_request(Request(str(number), [7] * (1_023 + number), ALL_SET, 3_000))
    first, second = scheduler.schedule().step, scheduler.schedule().step
    assert len(second.requests) == 32 and not second.new_requests, f"expected 32 decodes, got {second}"
    assert len(encode(second)) < 4_096, f"32 decodes: expected under 4,096 bytes, got {len(encode(second))}. {LOOK}"
    assert len(encode(first)) > 32_000, "the prompts are to be long"


def test_decoded_steps_give_the_same_answers(make_engine: Callable[..., LLMEngine], prompt_of: Any) -> None:
    """The worker gets what it would get in another process. A small pool, so that requests are preempted."""
    answers = []
    for is_encoded in (False, True):
        engine = make_engine(block_size=4, num_kv_blocks=1 + 14, max_num_seqs=4)
        if is_encoded:
            pass_through_bytes(engine)
        for number in range(8):
            params = SamplingParams(max_tokens=9, seed=number, logprobs=2 if number % 2 else None, ignore_eos=True)
            engine.add_request(str(number), prompt_of(5 + number, number), params)
        answers.append(run_dry(engine))
        assert engine.scheduler.num_preemptions > 0, "this test needs preemptions"
    for name, answer in answers[0].items():
        assert answers[1][name] == answer, (
            f"request {name}: {answer}, and from decoded steps {answers[1][name]}. {LOOK}"
        )


def pass_through_bytes(engine: LLMEngine) -> None:
    """From here on each step goes to the worker as bytes, and its answer comes back as bytes."""
    launch = engine.executor.launch
    decode_input = msgspec.msgpack.Decoder(StepInput).decode
    decode_output = msgspec.msgpack.Decoder(StepOutput).decode

    def launch_bytes(step: StepInput) -> Any:
        handle = launch(decode_input(encode(step)))
        return SimpleNamespace(result=lambda: decode_output(encode(handle.result())))

    engine.executor.launch = launch_bytes  # type: ignore[method-assign]


# Nothing is unpickled


FORBIDDEN = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
METHODS = {"recv_pyobj", "send_pyobj", "ForkingPickler"}


def test_nothing_is_unpickled() -> None:
    """Writing to a socket must not be enough to run code. multiprocessing itself uses inherited pipes."""
    for path in sorted(PART_DIR.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Attribute):
                assert node.attr not in METHODS, f"{path.name}:{node.lineno} calls {node.attr}. {LOOK}"
            elif isinstance(node, ast.Name):
                assert node.id not in FORBIDDEN | {"eval", "exec"}, f"{path.name}:{node.lineno} uses {node.id}. {LOOK}"
            found = [name for name in names if name.split(".")[0] in FORBIDDEN or "connection" in name]
            assert not found, f"{path.name}:{node.lineno} imports {found}. {LOOK}"  # type: ignore[attr-defined]
