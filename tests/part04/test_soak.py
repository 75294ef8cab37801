"""300 requests of all kinds over HTTP, a third of them cut off by their clients: nothing remains of any of them."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from common.load_client import SseParser
from common.sampling_params import SamplingParams
from common.serve import ServerConfig, running_app
from part04_continuous_batching.api import server
from part04_continuous_batching.api.async_engine import AsyncLLM, RequestStream
from part04_continuous_batching.config import EngineConfig
from part04_continuous_batching.core.request import Request
from part04_continuous_batching.llm import LLM
from tests.http_checks import Watched

LOOK = 'Look at api/async_engine.py and core/scheduler.py::Scheduler.abort; README "Aborts, failures and slow readers".'
DEADLINE_S = 120  # for what takes milliseconds; only a leak makes the test wait this long
NUM_REQUESTS, NUM_AT_ONCE = 300, 12
ENDLESS = 80  # tokens, so that an answer is cut off in the middle
MIXED: list[dict[str, Any]] = [
    {},
    {"stop": [" the", "a"]},
    {"frequency_penalty": 1.5, "repetition_penalty": 1.3},
    {"temperature": 1.0, "seed": 11},
    {"logprobs": 2},
    {"temperature": 0.8, "seed": 12, "top_p": 0.9, "presence_penalty": 1.0, "stop": ["."]},
    {"min_tokens": 3, "ignore_eos": False},
    {"temperature": 1.0},  # no seed: its answer is not known in advance
]


@dataclass
class Ask:
    """cut_after: how many events its client reads before it leaves; without a stream it leaves once it is queued."""

    prompt: list[int]
    stream: bool
    max_tokens: int
    fields: dict[str, Any] = field(default_factory=dict)
    cut_after: int | None = None

    @property
    def sampling(self) -> dict[str, Any]:
        return {"max_tokens": self.max_tokens, "temperature": 0, "ignore_eos": True, **self.fields}


@dataclass
class Answer:
    text: str
    finish_reason: str | None = None
    num_logprobs: int = 0


def census(app: Watched) -> tuple[Counter[str], Counter[str]]:
    """Threads and tasks by name, without the threads of asyncio's pool, which keeps up to a fixed number of them."""
    assert app.loop is not None
    threads = (thread.name for thread in threading.enumerate() if not thread.name.startswith("asyncio_"))
    tasks = (task.get_coro().__qualname__ for task in asyncio.all_tasks(app.loop))  # type: ignore[union-attr]
    return Counter(threads), Counter(tasks)


def num_alive() -> tuple[int, int]:
    gc.collect()
    kinds = [type(thing) for thing in gc.get_objects()]
    return kinds.count(Request), kinds.count(RequestStream)


def until(condition: Callable[[], object], what: Callable[[], str]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what()}, still so after {DEADLINE_S} s. {LOOK}"
        time.sleep(0.01)


def make_asks(prompt_of: Callable[..., list[int]]) -> list[Ask]:
    rng, asks = random.Random(0), []
    for number in range(NUM_REQUESTS):
        length, fields = rng.choice([1, 4, 9, 20]), MIXED[number % len(MIXED)]
        asks.append(Ask(prompt_of(length, number % 40), rng.random() < 0.5, rng.choice([4, 6, 12]), fields))
        if number % 3 == 2:
            asks[-1].max_tokens, asks[-1].fields, asks[-1].cut_after = ENDLESS, {}, rng.randrange(4)
            asks[-1].prompt = [100 + number, *asks[-1].prompt]  # to tell it from the others
    return asks


async def talk(url: str, engine: AsyncLLM, asks: list[Ask]) -> list[Answer | None]:
    """Each answer, None for one that was cut off. Each has a connection of its own."""
    slots = asyncio.Semaphore(NUM_AT_ONCE)

    async def one(ask: Ask) -> Answer | None:
        # verify=False: there is no TLS here, and to load the certificates 300 times takes longer than all the rest
        async with slots, httpx.AsyncClient(base_url=url, timeout=DEADLINE_S, trust_env=False, verify=False) as client:
            body = {"prompt": ask.prompt, "stream": ask.stream, **ask.sampling}
            if ask.stream:
                return await read_stream(client, body, ask.cut_after)
            answer = asyncio.ensure_future(client.post("/v1/completions", json=body))
            if ask.cut_after is None:
                choice = (await answer).json()["choices"][0]
                return Answer(choice["text"], choice["finish_reason"], count_logprobs(choice))
            while not any(s.prompt_token_ids == ask.prompt for s in list(engine._streams.values())):
                assert not answer.done(), f"expected to leave in the middle of an answer, got {answer.result().text}"
                await asyncio.sleep(0.001)
            answer.cancel()
            return None

    return await asyncio.gather(*map(one, asks))


async def read_stream(client: httpx.AsyncClient, body: dict[str, Any], cut_after: int | None) -> Answer | None:
    answer, num_events, parser = Answer(""), 0, SseParser()
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, f"got {response.status_code}: {await response.aread()!r}"
        if cut_after == 0:
            return None
        async for chunk in response.aiter_bytes():
            for _, data in parser.feed(chunk):
                if data == "[DONE]":
                    continue
                choice = json.loads(data)["choices"][0]
                answer.text += choice["text"]
                answer.finish_reason = choice["finish_reason"] or answer.finish_reason
                answer.num_logprobs += count_logprobs(choice)
                num_events += 1
                if num_events == cut_after:
                    return None
    return answer


def count_logprobs(choice: dict[str, Any]) -> int:
    return len((choice.get("logprobs") or {}).get("tokens", []))


# It collects garbage, and with it objects of earlier tests, whose warnings are not this test's.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_nothing_remains_of_many_requests(
    make_config: Callable[..., EngineConfig], llm: LLM, prompt_of: Callable[..., list[int]]
) -> None:
    asks = make_asks(prompt_of)
    params = [SamplingParams(**ask.sampling) for ask in asks]
    whole = [number for number, ask in enumerate(asks) if ask.cut_after is None]
    known = [number for number in whole if params[number].temperature == 0 or params[number].seed is not None]
    expected = llm.generate([asks[n].prompt for n in known], [params[n] for n in known])
    config = make_config(block_size=4, num_kv_blocks=1 + 27, max_num_seqs=8, max_queued_requests=300)
    engine = AsyncLLM(config)
    inner = engine.engine
    threads_before, alive_before = set(threading.enumerate()), num_alive()
    app = Watched(server.create_app(engine, ServerConfig()))

    def is_idle() -> bool:
        return not (inner.has_unfinished_requests or engine._streams or engine._inbox or engine._aborted)

    with running_app(app) as url:
        before = census(app)  # before the first request: no task of one that just ends is among them
        answers = asyncio.run(talk(url, engine, asks))
        until(is_idle, lambda: f"{inner.scheduler.running} run, {inner.scheduler.waiting} wait, {engine._streams}")
        assert inner.blocks.num_free_blocks == inner.blocks.num_blocks - 1, (
            f"idle, and blocks are held: {inner.blocks.block_tables}. {LOOK}"
        )
        until(  # what other tests left may go at any time
            lambda: all(now <= then for now, then in zip(census(app), before, strict=True)),
            lambda: f"threads and tasks: expected at most {before}, got {census(app)}",
        )
        until(
            lambda: all(now <= then for now, then in zip(num_alive(), alive_before, strict=True)),
            lambda: f"(Request, RequestStream) objects: expected {alive_before}, got {num_alive()}",
        )
        gauges = httpx.get(f"{url}/metrics", timeout=DEADLINE_S, trust_env=False).text
        assert re.search(r"num_requests_running\S* 0\.0\n", gauges), f"idle, and /metrics says {gauges}"
    remaining = set(threading.enumerate()) - threads_before
    assert not remaining, f"the server has ended and its threads have not: {remaining}. {LOOK}"
    assert inner.scheduler.num_preemptions > 0, f"this test needs preemptions, got {inner.scheduler.num_preemptions}"
    num_cut = sum(answer is None for answer in answers)
    assert num_cut == NUM_REQUESTS // 3, f"{num_cut} requests were cut off, expected {NUM_REQUESTS // 3}. {LOOK}"
    for number, result in zip(known, expected, strict=True):
        ask, answer, output = asks[number], answers[number], result.outputs[0]
        want = Answer(output.text, output.finish_reason, len(output.token_ids) if params[number].logprobs else 0)
        assert answer == want, f"request {number}, {ask}: LLM.generate says {want}, over HTTP {answer}. {LOOK}"
