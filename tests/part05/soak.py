"""Requests of all kinds over HTTP, a third of them cut off by their clients, and what they should be answered."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from common.load_client import SseParser
from common.sampling_params import SamplingParams
from part05_async_scheduling.llm import LLM

LOOK = 'Look at api/async_engine.py and core/engine_core.py; README "Two processes".'
DEADLINE_S = 300  # for what takes milliseconds; only a leak makes the test wait this long
NUM_REQUESTS, NUM_AT_ONCE = 100, 12
ENDLESS = 80  # tokens, so that a request that is cut off has not ended
MIXED: list[dict[str, Any]] = [
    {},
    {"stop": [" the", "a"]},
    {"frequency_penalty": 1.5, "repetition_penalty": 1.3},
    {"temperature": 1.0, "seed": 11},
    {"logprobs": 2},
    {"temperature": 0.8, "seed": 12, "top_p": 0.9, "presence_penalty": 1.0, "stop": ["."]},
    {"min_tokens": 3, "ignore_eos": False},
    {"temperature": 1.0},  # no seed: its text is not known
]


@dataclass
class Ask:
    """cut_after: how many events its client reads before it hangs up; without a stream it hangs up after so many ms."""

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


def make_asks(prompt_of: Callable[..., list[int]]) -> list[Ask]:
    rng, asks = random.Random(0), []
    for number in range(NUM_REQUESTS):
        length, fields = rng.choice([1, 4, 9, 20]), MIXED[number % len(MIXED)]
        asks.append(Ask(prompt_of(length, number % 40), rng.random() < 0.5, rng.choice([4, 6, 12]), fields))
        if number % 3 == 2:
            asks[-1].max_tokens, asks[-1].fields, asks[-1].cut_after = ENDLESS, {}, rng.randrange(4)
    return asks


def talk_to(url: str, asks: list[Ask]) -> list[Answer | None]:
    """Each answer, None for one that was cut off. Each has a connection of its own."""

    async def talk() -> list[Answer | None]:
        slots = asyncio.Semaphore(NUM_AT_ONCE)

        async def one(ask: Ask) -> Answer | None:
            # verify=False: there is no TLS here, and to load the certificates each time takes longer than all the rest
            client = httpx.AsyncClient(base_url=url, timeout=DEADLINE_S, trust_env=False, verify=False)
            async with slots, client:
                body = {"prompt": ask.prompt, "stream": ask.stream, **ask.sampling}
                if ask.stream:
                    return await read_stream(client, body, ask.cut_after)
                answer = asyncio.ensure_future(client.post("/v1/completions", json=body))
                if ask.cut_after is None:
                    choice = (await answer).json()["choices"][0]
                    return Answer(choice["text"], choice["finish_reason"], count_logprobs(choice))
                await asyncio.wait([answer], timeout=0.002 * ask.cut_after)
                answer.cancel()
                return None

        return await asyncio.gather(*map(one, asks))

    return asyncio.run(talk())


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


def check_answers(asks: list[Ask], answers: list[Answer | None], llm: LLM) -> None:
    """Requests that were not cut off got what LLM.generate answers, a step at a time."""
    params = [SamplingParams(**ask.sampling) for ask in asks]
    num_cut = sum(answer is None for answer in answers)
    assert num_cut == NUM_REQUESTS // 3, f"{num_cut} clients hung up, expected {NUM_REQUESTS // 3}. {LOOK}"
    whole = [number for number, ask in enumerate(asks) if ask.cut_after is None]
    known = [number for number in whole if params[number].temperature == 0 or params[number].seed is not None]
    expected = llm.generate([asks[n].prompt for n in known], [params[n] for n in known])
    for number, result in zip(known, expected, strict=True):
        ask, answer, output = asks[number], answers[number], result.outputs[0]
        want = Answer(output.text, output.finish_reason, len(output.token_ids) if params[number].logprobs else 0)
        assert answer == want, f"request {number}, {ask}: LLM.generate says {want}, over HTTP {answer}. {LOOK}"
