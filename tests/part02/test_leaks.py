"""Two hundred streams, a third of them cut off by their clients: afterwards no resource of theirs is left."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import json
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from common.load_client import SseParser
from common.sampling_params import SamplingParams
from common.serve import running_app
from common.testing import small_model
from part02_streaming.async_engine import AsyncLLM, RequestStream
from part02_streaming.engine import LLM
from part02_streaming.server import create_app
from tests.http_checks import Watched

LOOK = 'Look at server.py::EventStream, server.py::collect and async_engine.py; README "When the client goes away".'
DEADLINE_S = 30  # for what takes milliseconds; only a leak makes the test wait this long
NUM_AT_ONCE = 8
NUM_TOKENS = 5
ENDLESS = 100_000  # tokens: minutes of work, so that every cut happens in the middle
PROMPTS = ["Once upon a time", "The fox", "1 2 3", "What is a KV cache?", "Nora and", "a b c", "naïve 🦊"]
FDS = Path("/proc/self/fd")


@dataclass
class Census:
    """What exists now, without the threads of asyncio's pool, which keeps up to a fixed number of them."""

    threads: Counter[str]
    tasks: Counter[str]
    num_fds: int

    @classmethod
    def take(cls, loop: asyncio.AbstractEventLoop) -> Census:
        threads = (thread.name for thread in threading.enumerate() if not thread.name.startswith("asyncio_"))
        tasks = (task.get_coro().__qualname__ for task in asyncio.all_tasks(loop))  # type: ignore[union-attr]
        return cls(Counter(threads), Counter(tasks), len(os.listdir(FDS)) if FDS.is_dir() else 0)  # noqa: PTH208

    def is_within(self, before: Census) -> bool:
        """Nothing exists that did not exist before. (Leftovers of other tests may disappear at any time.)"""
        return self.threads <= before.threads and self.tasks <= before.tasks and self.num_fds <= before.num_fds


@pytest.fixture(scope="module")
def quick_llm(llm: LLM) -> LLM:
    """A random model of a few thousand parameters: its answers take next to no time."""
    quick = copy.copy(llm)
    quick.model = small_model("llama", seed=0, vocab_size=llm.model.config.vocab_size)
    quick.max_model_len = 2 * ENDLESS
    return quick


def num_request_streams() -> int:
    gc.collect()
    return sum(type(thing) is RequestStream for thing in gc.get_objects())


def until(condition: Callable[[], object], what: Callable[[], str]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what()}, still so after {DEADLINE_S} s. {LOOK}"
        time.sleep(0.01)


@contextlib.contextmanager
def nothing_left_behind(llm: LLM) -> Iterator[tuple[str, AsyncLLM]]:
    """A server's URL and engine. At the end, what its requests needed must be gone, then what the server needed."""
    threads_before, app = set(threading.enumerate()), Watched(create_app(llm))
    with running_app(app) as url:
        engine: AsyncLLM = app.app.state.engine
        asyncio.run(talk(url, engine, [Ask(PROMPTS[0], stream) for stream in (True, False)], 2))  # what is made once
        assert app.loop is not None
        until(lambda: is_idle(engine), lambda: "the engine is not idle after two answers")
        loop = app.loop
        until(lambda: not connections(url), lambda: f"two clients have disconnected, but {connections(url)} are open")
        num_streams, before = num_request_streams(), Census.take(loop)
        yield url, engine
        until(lambda: is_idle(engine), lambda: f"engine: running {engine.running}, waiting {engine.waiting}")
        until(lambda: not connections(url), lambda: f"all clients have disconnected, but {connections(url)} are open")
        until(
            lambda: Census.take(loop).is_within(before), lambda: f"expected at most {before}, got {Census.take(loop)}"
        )
        # The engine's thread may keep the last request until the next one arrives.
        until(
            lambda: num_request_streams() <= max(1, num_streams),
            lambda: f"{num_request_streams()} RequestStream objects are alive, expected at most 1",
        )
    left = set(threading.enumerate()) - threads_before
    assert not left, f"the server has ended and its threads have not: {left}. {LOOK}"


def is_idle(engine: AsyncLLM) -> bool:
    return engine.running is None and not engine.waiting


def connections(url: str) -> set[int]:
    """The descriptors of the server's ends of connections that are open."""
    port = int(url.rpartition(":")[2])
    sockets = [thing for thing in gc.get_objects() if type(thing) is socket.socket]
    return {sock.fileno() for sock in sockets if is_connection(sock, port)}


def is_connection(sock: socket.socket, port: int) -> bool:
    try:
        is_at_port = sock.family == socket.AF_INET and sock.getsockname()[1] == port
        return is_at_port and not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError:  # its descriptor is closed, by its owner or, as earlier tests leave them, behind its back
        return False


@dataclass
class Ask:
    """cut_after: how many events its client reads before it leaves; without a stream it leaves once it is queued."""

    prompt: str | list[int]
    stream: bool
    cut_after: int | None = None

    @property
    def body(self) -> dict[str, Any]:
        max_tokens = NUM_TOKENS if self.cut_after is None else ENDLESS
        sampling = {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        return {"prompt": self.prompt, "stream": self.stream, **sampling}


async def talk(url: str, engine: AsyncLLM, asks: list[Ask], num_at_once: int) -> list[str | None]:
    """The text of each answer, None for one that was cut off. Each has a connection of its own."""
    slots = asyncio.Semaphore(num_at_once)

    async def one(ask: Ask) -> str | None:
        async with slots:
            text = await read(ask)
            deadline = time.monotonic() + DEADLINE_S
            while ask.cut_after is not None and is_queued(engine, ask):
                assert time.monotonic() < deadline, (
                    f"its client has disconnected, but the request is still there after {DEADLINE_S} s. {LOOK}"
                )
                await asyncio.sleep(0.001)
            return text

    async def read(ask: Ask) -> str | None:
        # verify=False: there is no TLS here, and to load the certificates 260 times takes longer than all the rest
        async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False, verify=False) as client:
            if ask.stream:
                return await read_stream(client, ask)
            answer = asyncio.ensure_future(client.post("/v1/completions", json=ask.body))
            if ask.cut_after is None:
                return (await answer).json()["choices"][0]["text"]
            while not is_queued(engine, ask) and not answer.done():
                await asyncio.sleep(0.001)
            assert not answer.done(), f"expected to leave in the middle of an answer, got {answer.result().text}"
            answer.cancel()
            return None

    return await asyncio.gather(*map(one, asks))


def is_queued(engine: AsyncLLM, ask: Ask) -> bool:
    return any(request and request.prompt_token_ids == ask.prompt for request in [*engine.waiting, engine.running])


async def read_stream(client: httpx.AsyncClient, ask: Ask) -> str | None:
    text, num_events, parser = "", 0, SseParser()
    async with client.stream("POST", "/v1/completions", json=ask.body) as response:
        assert response.status_code == 200, f"got {response.status_code}: {await response.aread()!r}"
        if ask.cut_after == 0:
            return None
        async for chunk in response.aiter_bytes():
            for _, data in parser.feed(chunk):
                if data == "[DONE]":
                    continue
                text += json.loads(data)["choices"][0]["text"]
                num_events += 1
                if num_events == ask.cut_after:
                    return None
    return text


# Garbage collection may emit warnings about objects of earlier tests: those are not this test's.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("stream", "num_requests"), [(True, 200), (False, 60)], ids=["streams", "whole answers"])
def test_nothing_is_left_of_many_requests(quick_llm: LLM, stream: bool, num_requests: int) -> None:
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
    encode = quick_llm.tokenizer.encode
    expected = {prompt: quick_llm.generate(encode(prompt), params).outputs[0].text for prompt in PROMPTS}
    assert len(set(expected.values())) == len(PROMPTS), f"each prompt has an answer of its own: {expected}"
    asks = [Ask(PROMPTS[n % len(PROMPTS)], stream) for n in range(num_requests)]
    for n in range(0, num_requests, 3):
        asks[n] = Ask([70, n], stream, cut_after=n // 3 % 3)
    half = num_requests // 2
    with nothing_left_behind(quick_llm) as (url, engine):
        aborted_before = engine.num_aborted
        texts = asyncio.run(talk(url, engine, asks[:half], 1))
        texts += asyncio.run(talk(url, engine, asks[half:], NUM_AT_ONCE))
        until(lambda: is_idle(engine), lambda: f"engine: running {engine.running}, waiting {engine.waiting}")
        num_aborted = engine.num_aborted - aborted_before
        num_completed = sum(text is not None for text in texts)
        assert num_aborted + num_completed == num_requests, (
            f"{num_aborted} aborted + {num_completed} completed = {num_aborted + num_completed}, "
            f"expected {num_requests}. {LOOK}"
        )
        for ask, text in zip(asks, texts, strict=True):
            if isinstance(ask.prompt, str):
                want = expected[ask.prompt]
                assert text == want, f"{ask.prompt!r}: the whole answer is {want!r}, streamed {text!r}. {LOOK}"
