"""Clients of a server: greedy answers, complete or streamed."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx

from workshop.failures.checks import DEADLINE_S, CheckFailed, until

# of all requests; no certificates: to load them takes longer than to ask
HTTP: dict[str, Any] = {"timeout": DEADLINE_S, "trust_env": False, "verify": False}
GREEDY = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete one."""

    text: str
    token_ids: list[int]
    num_prompt_tokens: int


def ask(url: str, prompt: str | list[int], max_tokens: int) -> Answer:
    """One greedy answer of exactly max_tokens tokens. prompt: text, or token ids. Raises CheckFailed for an error."""
    body = {**GREEDY, "prompt": prompt, "max_tokens": max_tokens}
    response = httpx.post(f"{url}/v1/completions", json=body, **HTTP)
    if response.status_code != 200:
        raise CheckFailed("the answer's status", 200, f"{response.status_code}: {response.text}")
    [answer] = answers_in(response.json())
    return answer


def ask_at_once(url: str, prompts: Sequence[str], max_tokens: int) -> list[Answer]:
    """An answer to each prompt, of requests that run at the same time."""
    with ThreadPoolExecutor(len(prompts)) as threads:
        return list(threads.map(lambda prompt: ask(url, prompt, max_tokens), prompts))


def answers_in(body: Mapping[str, Any]) -> list[Answer]:
    """The choices of a response."""
    num_prompt_tokens = body["usage"]["prompt_tokens"]
    return [Answer(choice["text"], choice["token_ids"], num_prompt_tokens) for choice in body["choices"]]


@dataclass(slots=True)
class Stream:
    """An answer that is being streamed, as far as it has come. error: how it has broken off."""

    client: int
    token_ids: list[int] = field(default_factory=list)
    error: str | None = None
    has_ended: bool = False


class Clients:
    """Clients in threads, one for each prompt, that stream its answer again and again until stop().

    So there are open streams whenever the learner breaks something. streams: all so far.
    """

    def __init__(self, url: str, prompts: Sequence[str], max_tokens: int) -> None:
        self.url, self.prompts, self.max_tokens = url, prompts, max_tokens
        self.streams: list[Stream] = []
        self._is_stopping = False
        numbers = range(len(prompts))
        self._threads = [threading.Thread(target=self._run, args=(number,), daemon=True) for number in numbers]
        for thread in self._threads:
            thread.start()

    @property
    def open(self) -> list[Stream]:
        return [stream for stream in self.streams if not stream.has_ended]

    @property
    def num_tokens(self) -> int:
        """Of all streams together."""
        return sum(len(stream.token_ids) for stream in self.streams)

    def wait_for_tokens(self) -> None:
        """Until each client is in the first half of an answer, and has got some of it."""

        def are_streaming() -> bool:
            lengths = [len(stream.token_ids) for stream in self.open]
            return len(lengths) == len(self.prompts) and all(0 < each <= self.max_tokens / 2 for each in lengths)

        until(are_streaming, f"{len(self.prompts)} streams from {self.url}")

    def stop(self) -> list[Stream]:
        """Let the open streams come to their ends. Returns all streams."""
        self._is_stopping = True
        until(lambda: not any(thread.is_alive() for thread in self._threads), f"all streams from {self.url} to end")
        return self.streams

    def leave(self) -> None:
        """Ask for no more answers. Open streams end with their server."""
        self._is_stopping = True

    def _run(self, number: int) -> None:
        while not self._is_stopping:
            stream = Stream(number)
            self.streams.append(stream)
            try:
                self._read(stream)
            except httpx.HTTPError as error:
                stream.error = f"{type(error).__name__}: {error}"
            stream.has_ended = True
            if stream.error is not None:
                time.sleep(0.1)

    def _read(self, stream: Stream) -> None:
        body = {**GREEDY, "prompt": self.prompts[stream.client], "max_tokens": self.max_tokens, "stream": True}
        url = f"{self.url}/v1/completions"
        with httpx.stream("POST", url, json=body, **HTTP) as response:
            if response.status_code != 200:
                stream.error = f"status {response.status_code}: {response.read().decode()}"
                return
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    stream.error = event["error"]["message"]
                for choice in event.get("choices", ()):
                    stream.token_ids += choice["token_ids"]
