"""AsyncLLM.reset_prefix_cache over real sockets, and what else is new in the messages."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from common.outputs import CompletionOutput, join_outputs
from common.sampling_params import SamplingParams
from common.serving import GenerationError
from part07_prefix_caching.api.async_engine import AsyncLLM, RequestStream
from part07_prefix_caching.messages import (
    AddRequest,
    EngineCoreOutput,
    EngineCoreOutputs,
    PrefixCacheReset,
    ResetPrefixCache,
    decode_from_core,
    decode_to_core,
    encode,
)
from tests import gated
from tests.async_checks import until, within_deadline
from tests.gated import Gate
from tests.part07.scripted import PART, scripted_engine

LESSON = 'README "What a client sees"'
LOOK_RESET = f"Look at api/async_engine.py::AsyncLLM.reset_prefix_cache and _read_outputs; {LESSON}."
LOOK_CORE = f"Look at core/engine_core.py::EngineCore.handle; {LESSON}."
LOOK_DEATH = f'Look at api/async_engine.py::AsyncLLM._die; README of part 5, "When a process dies", and {LESSON}.'
LOOK_STATS = f"Look at core/engine_core.py::EngineCore.stats; {LESSON}."
LOOK_MESSAGES = f"Look at messages.py; {LESSON}."


def make_gate(**flags: Any) -> Gate:
    return Gate(PART, scripted_engine(max_model_len=200, **flags))


on_an_event_loop = gated.on_an_event_loop(make_gate, LOOK_DEATH, block_size=4)


def generate(engine: AsyncLLM, **fields: Any) -> RequestStream:
    """A prompt of 10 tokens, an answer of 4."""
    return engine.generate([100] * 10, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, **fields))


async def read(stream: RequestStream) -> list[CompletionOutput]:
    async def outputs() -> list[CompletionOutput]:
        return [output async for output in stream]

    return await within_deadline(outputs(), f"the request to end. {LOOK_RESET}")


async def reset(engine: AsyncLLM) -> bool:
    return await within_deadline(engine.reset_prefix_cache(), f"an answer to the reset. {LOOK_RESET}")


@on_an_event_loop
async def test_a_reset_uncaches_everything(gate: Gate, engine: AsyncLLM) -> None:
    gate.open()
    hits = []
    for turn in range(4):
        hits.append(join_outputs(await read(generate(engine))).num_cached_tokens)
        if turn == 1:
            assert await reset(engine) is True, f"no request runs: expected True. {LOOK_RESET}"
    assert hits == [0, 8, 0, 8], (
        f"10 tokens four times, a reset after the second: expected hits of [0, 8, 0, 8], got {hits}. {LOOK_CORE}"
    )


@on_an_event_loop
async def test_a_reset_is_refused_while_a_request_runs(gate: Gate, engine: AsyncLLM) -> None:
    stream = generate(engine)
    await until(lambda: gate.launched, "a step")
    question = asyncio.ensure_future(engine.reset_prefix_cache())
    await asyncio.sleep(0)
    gate.must_hear = gate.num_sent  # between two steps
    gate.allow(2)
    got = await within_deadline(question, f"an answer to the reset. {LOOK_RESET}")
    assert got is False, f"a request runs: expected False, got {got}. {LOOK_CORE}"
    gate.open()
    outputs = await read(stream)
    assert sum(len(output.token_ids) for output in outputs) == 4, f"expected 4 tokens, got {outputs}. {LOOK_RESET}"
    assert await reset(engine) is True, f"the request has ended: expected True. {LOOK_RESET}"


@on_an_event_loop
async def test_resets_are_answered_in_order(gate: Gate, engine: AsyncLLM) -> None:
    """The first caller has gone; the others get the answers to their own questions."""
    gate.open()
    await read(generate(engine))
    questions = [asyncio.ensure_future(engine.reset_prefix_cache()) for _ in range(2)]
    await asyncio.sleep(0)
    gate.is_open = False  # before there is a request
    stream = generate(engine)
    questions.append(asyncio.ensure_future(engine.reset_prefix_cache()))
    await asyncio.sleep(0)
    questions[0].cancel()
    gate.must_hear = gate.num_sent
    gate.open()
    got = await within_deadline(asyncio.gather(*questions, return_exceptions=True), f"three answers. {LOOK_RESET}")
    assert isinstance(got[0], asyncio.CancelledError) and got[1:] == [True, False], (
        f"the first was canceled, the second was sent while no request ran, the third while one did: expected True and "
        f"False, got {got}. {LOOK_RESET}"
    )
    assert not engine._resets, f"all are answered: expected none to be kept, got {engine._resets}. {LOOK_RESET}"
    await read(stream)


@on_an_event_loop
async def test_a_reset_of_a_dead_core(gate: Gate, engine: AsyncLLM) -> None:
    """One is under way when the core dies, and one is sent later."""
    generate(engine)
    await until(lambda: gate.begun, "the core to wait in a step, where it hears nothing")
    question = asyncio.ensure_future(engine.reset_prefix_cache())
    await asyncio.sleep(0)
    engine.core.process.kill()
    await until(lambda: not engine.is_alive, f"the death to be noticed. {LOOK_DEATH}")
    with pytest.raises(GenerationError, match="the engine core has died"):
        await within_deadline(question, f"an error for the reset that waits. {LOOK_DEATH}")
    with pytest.raises(GenerationError, match="the engine core has died"):
        await reset(engine)


@on_an_event_loop
async def test_a_reset_when_the_server_shuts_down(gate: Gate, engine: AsyncLLM) -> None:
    generate(engine)
    await until(lambda: gate.begun, "the core to wait in a step, where it hears nothing")
    question = asyncio.ensure_future(engine.reset_prefix_cache())
    await asyncio.sleep(0)
    ended = asyncio.ensure_future(asyncio.to_thread(engine.shutdown))
    with pytest.raises(GenerationError, match="the server is shutting down"):
        await within_deadline(question, f"an error for the reset that waits. {LOOK_DEATH}")
    await ended


@on_an_event_loop
async def test_stats(gate: Gate, engine: AsyncLLM) -> None:
    gate.open()
    for _ in range(3):
        await read(generate(engine))
    names = ("prefix_cache_queries", "prefix_cache_hits")
    await until(lambda: engine.stats().get("prefix_cache_queries") == 30, f"30 tokens queried. {LOOK_STATS}")
    got = [engine.stats()[name] for name in names]
    assert got == [30, 16], f"10 tokens three times, block_size=4: expected {names} [30, 16], got {got}. {LOOK_STATS}"


@on_an_event_loop
async def test_a_slow_reader_gets_num_cached_tokens(gate: Gate, engine: AsyncLLM) -> None:
    """All outputs since its last read are joined, and the count is not lost."""
    gate.open()
    await read(generate(engine))
    stream = generate(engine, cache_salt=None)
    await until(lambda: not engine._streams, "the whole answer to arrive")
    [output] = await read(stream)
    assert (output.num_cached_tokens, len(output.token_ids)) == (8, 4), (
        f"expected 4 tokens and a hit of 8, got {output}. Look at api/async_engine.py::RequestStream.put; {LESSON}."
    )


def test_messages() -> None:
    params = SamplingParams(cache_salt="s", max_tokens=3)
    for message in (ResetPrefixCache(), AddRequest("0", [1, 2], params)):
        got = decode_to_core(encode(message))
        assert got == message and type(got) is type(message), f"expected {message}, got {got}. {LOOK_MESSAGES}"
    for answer in (
        PrefixCacheReset(True), PrefixCacheReset(False),
        EngineCoreOutputs([EngineCoreOutput("0", [5], num_cached_tokens=16), EngineCoreOutput("1", [], error="e")], {}),
    ):  # fmt: skip
        got_answer = decode_from_core(encode(answer))
        assert got_answer == answer, f"expected {answer}, got {got_answer}. {LOOK_MESSAGES}"


def test_joined_outputs_keep_the_first_count() -> None:
    outputs = [CompletionOutput(0, "a", [1], None, None, None, 16), CompletionOutput(0, "b", [2], "length", None)]
    got = join_outputs(outputs).num_cached_tokens
    assert got == 16, (
        f"num_cached_tokens comes with the first of two outputs: expected 16, got {got}. Look at "
        f"common/outputs.py::join_outputs; {LESSON}."
    )
    got = join_outputs(outputs[1:]).num_cached_tokens
    assert got is None, f"a later output alone: expected None, got {got}"
