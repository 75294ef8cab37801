"""`collect` by itself: no socket, no model, and a client that disconnects on demand."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from starlette.requests import Request

from common.outputs import CompletionOutput
from common.sampling_params import SamplingParams
from part02_streaming.async_engine import GenerationError, RequestStream
from part02_streaming.server import collect

LOOK = 'Look at server.py::collect; README "When the client goes away".'
DEADLINE_S = 5  # for what takes no time at all; only a mistake makes a test wait this long


class Engine:
    """An AsyncLLM that remembers what was aborted."""

    def __init__(self) -> None:
        self.aborted: list[RequestStream] = []

    def abort(self, request: RequestStream) -> None:
        self.aborted.append(request)


class Scene:
    """A request whose body has been read, its stream, and an engine. Make it on the event loop."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.request = Request({"type": "http", "method": "POST", "headers": []}, self.messages.get)
        self.engine, self.stream = Engine(), RequestStream([1, 2], SamplingParams())
        self.outputs = [CompletionOutput(0, f" {number}", [number], None, None) for number in range(3)]
        self.outputs.append(CompletionOutput(0, " end", [9], "stop", None))

    def collect(self) -> asyncio.Task:
        return asyncio.ensure_future(collect(self.request, self.engine, self.stream))  # type: ignore[arg-type]

    def leave(self) -> None:
        self.messages.put_nowait({"type": "http.disconnect"})


def play(scene: Coroutine[Any, Any, None]) -> None:
    async def run() -> None:
        await scene
        await some_turns()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert not others, f"collect left tasks that never end: {others}. {LOOK}"

    asyncio.run(run())


async def some_turns() -> None:
    """Run all coroutines that can run without new events."""
    for _ in range(20):
        await asyncio.sleep(0)


async def check_waits(task: asyncio.Task, why: str) -> None:
    await some_turns()
    if task.done():
        pytest.fail(f"{why}, but collect returned {task.result()}. {LOOK}")  # or raise what collect raised


async def result_of(task: asyncio.Task, when: str) -> Any:
    await asyncio.wait([task], timeout=DEADLINE_S)
    if not task.done():
        task.cancel()
        pytest.fail(f"{when}: expected collect to return, but it still waits. {LOOK}")
    return task.result()


@pytest.mark.parametrize("early", [0, 2, 4])
def test_a_whole_answer(early: int) -> None:
    async def scene() -> None:
        s = Scene()
        for output in s.outputs[:early]:
            s.stream.put(output)
        task = s.collect()
        for output in s.outputs[early:]:
            await check_waits(task, "the answer was not complete yet")
            s.stream.put(output)
        got = await result_of(task, "the answer is complete")
        assert got == s.outputs, f"expected all outputs {s.outputs}, got {got}. {LOOK}"

    play(scene())


@pytest.mark.parametrize("num_outputs", [0, 1, 3])
def test_a_client_that_disconnects(num_outputs: int) -> None:
    async def scene() -> None:
        s = Scene()
        task = s.collect()
        for output in s.outputs[:num_outputs]:
            s.stream.put(output)
        await check_waits(task, "the client was connected and the answer was not complete")
        s.leave()
        got = await result_of(task, f"the client disconnected after {num_outputs} outputs")
        assert got is None, f"the client has disconnected: expected None, got {got}. {LOOK}"
        assert s.stream in s.engine.aborted, f"the client disconnected, but the request was not aborted. {LOOK}"

    play(scene())


def test_a_client_that_disconnected_before() -> None:
    async def scene() -> None:
        s = Scene()
        s.leave()
        got = await result_of(s.collect(), "the client had disconnected before")
        assert got is None, f"the client has disconnected: expected None, got {got}. {LOOK}"
        assert s.stream in s.engine.aborted, f"the client had disconnected, but the request was not aborted. {LOOK}"

    play(scene())


def test_other_messages_are_not_a_disconnect() -> None:
    async def scene() -> None:
        s = Scene()
        s.messages.put_nowait({"type": "http.request", "body": b"", "more_body": False})
        task = s.collect()
        await check_waits(task, "only http.disconnect means that the client has disconnected")
        assert not s.engine.aborted, f"the client is connected, but its request was aborted. {LOOK}"
        for output in s.outputs:
            s.stream.put(output)
        got = await result_of(task, "the answer is complete")
        assert got == s.outputs, f"expected all outputs {s.outputs}, got {got}. {LOOK}"

    play(scene())


@pytest.mark.parametrize("num_outputs", [0, 2])
def test_an_engine_error_is_raised(num_outputs: int) -> None:
    async def scene() -> None:
        s = Scene()
        for output in s.outputs[:num_outputs]:
            s.stream.put(output)
        s.stream.put(GenerationError("the cat sat on the GPU"))
        try:
            got = await result_of(s.collect(), "the engine failed")
        except GenerationError as error:
            assert str(error) == "the cat sat on the GPU", f"got {error!r}. {LOOK}"
        else:
            pytest.fail(
                f"the engine failed on this request: expected its GenerationError to be raised, got {got}. {LOOK}"
            )

    play(scene())


def test_collect_cancelled() -> None:
    """As when a server shuts down without waiting for its last requests."""

    async def scene() -> None:
        s = Scene()
        task = s.collect()
        await some_turns()
        task.cancel()
        await asyncio.wait([task], timeout=DEADLINE_S)
        assert task.cancelled(), f"cancelled, collect must end: {task}. {LOOK}"
        assert s.stream in s.engine.aborted, f"collect was canceled, but the request was not aborted. {LOOK}"

    play(scene())
