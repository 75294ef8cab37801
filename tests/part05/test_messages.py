"""messages.py: what the two processes say to each other arrives as it was, and nothing else is understood."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import pytest

from common.outputs import Logprob
from common.sampling_params import SamplingParams
from part05_async_scheduling import messages
from part05_async_scheduling.config import EngineConfig
from part05_async_scheduling.core.engine import SAMPLING_FIELDS
from part05_async_scheduling.messages import (
    AbortRequests,
    AddRequest,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineLimits,
    Ready,
    Start,
    StartFailed,
    decode_from_core,
    decode_to_core,
    encode,
)

LOOK = 'Look at messages.py; README "Two processes".'
PART_DIR = Path(messages.__file__).parent
ALL_SET = SamplingParams(
    max_tokens=77, min_tokens=3, temperature=0.7, top_k=11, top_p=0.9, seed=2**63 - 1, stop_token_ids=(5, 9),
    stop=("the", "¤🦊"), ignore_eos=True, n=2, presence_penalty=-1.5, frequency_penalty=0.5, repetition_penalty=1.3,
    logit_bias={7: 1.5, 100: -100.0}, logprobs=20,
)  # fmt: skip
CONFIG = EngineConfig(
    model="tiny", host="0.0.0.0", port=1, api_key="key", device="cpu", dtype="bfloat16", num_threads=1,
    max_model_len=100, max_num_seqs=3, max_num_batched_tokens=200, max_queued_requests=0, async_scheduling=False,
    block_size=8, num_kv_blocks=50, kv_cache_memory=12_345, gpu_memory_utilization=0.5, trace="a file",
    attention_backend="torch",
)  # fmt: skip
TO_CORE = [
    Start(CONFIG),
    Start(EngineConfig()),
    AddRequest("17", [1, 2, 3], ALL_SET),
    AddRequest("0", [], SamplingParams()),
    AbortRequests(["1", "2"]),
    AbortRequests([]),
]
FROM_CORE = [
    Ready(EngineLimits(512, 4_096, 10_000), 701),
    StartFailed("kv_cache_memory", "10 bytes hold 0 blocks"),
    StartFailed(None, "no such file"),
    EngineCoreOutputs([], {}),
    EngineCoreOutputs(
        [
            EngineCoreOutput("1", [5]),
            EngineCoreOutput("2", [6], "stop", 6),
            EngineCoreOutput("3", [7], "length", None, [{7: Logprob(-0.5, 2), 8: Logprob(-0.25, 1)}]),
            EngineCoreOutput("4", [], error="ValueError: the cat sat on it"),
        ],
        {"num_requests_running": 3, "kv_cache_usage_perc": 0.125},
    ),
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
    outputs = decode_from_core(encode(FROM_CORE[-1])).outputs  # type: ignore[union-attr]
    [entry] = outputs[2].logprobs
    assert list(entry) == [7, 8] and isinstance(entry[7], Logprob), f"the sampled token comes first: {entry}. {LOOK}"


def test_params_are_checked_again_by_the_core() -> None:
    """A value out of range raises in the core as it does here: nothing that was not checked gets in."""
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


def test_who_may_say_what() -> None:
    """The core understands no outputs, and the client no requests."""
    for message in TO_CORE:
        with pytest.raises(msgspec.ValidationError):
            decode_from_core(encode(message))
    for message in FROM_CORE:
        with pytest.raises(msgspec.ValidationError):
            decode_to_core(encode(message))


FORBIDDEN = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
METHODS = {"recv_pyobj", "send_pyobj", "ForkingPickler"}


def test_nothing_is_unpickled() -> None:
    """Who can write to a socket must not be able to run code. multiprocessing itself talks over inherited pipes."""
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
