"""What the server of `common.openai_app` asks of an engine, and the errors that an engine raises."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from common.outputs import CompletionOutput
from common.sampling_params import SamplingParams


class QueueFullError(Exception):
    """Too many requests wait already."""


class GenerationError(Exception):
    """The engine failed at this request. The message names the cause."""


class OutputStream(Protocol):
    """One request: iterate once, on the event loop that made it, over its outputs as they come.

    Each output holds what is new since the one before. The last one, and only it, has a finish_reason. Raises
    GenerationError instead if the engine fails, dies or shuts down.
    """

    def __aiter__(self) -> AsyncIterator[CompletionOutput]: ...


class ServingEngine(Protocol):
    """An engine that an asyncio server can stand on. All methods but shutdown are called on the event loop.

    max_model_len is in tokens, prompt and answer together. vocab_size is the model's, which may exceed the tokenizer's.
    An engine that schedules by priority has an attribute supports_priority = True, and its generate takes a keyword
    `priority: int` (lower runs earlier, as in vLLM); any other engine need not have either.
    """

    @property
    def model_name(self) -> str: ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    @property
    def max_model_len(self) -> int: ...

    @property
    def max_request_len(self) -> int:
        """What one request can reach, prompt and answer: max_model_len, or less if the KV cache holds less."""
        ...

    @property
    def max_num_unfinished(self) -> int:
        """So many requests may run and wait; generate refuses one more."""
        ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def is_alive(self) -> bool:
        """False once no request can succeed any more."""
        ...

    def start(self) -> None:
        """Begin to serve; called once, before anything else."""
        ...

    def shutdown(self) -> None:
        """End all threads and processes, and whatever stream is still open. Blocks; called once, from another thread.

        The server calls it when its requests have ended, or were given up: abort may come a moment later.
        """
        ...

    def generate(self, prompt_token_ids: list[int], params: SamplingParams) -> OutputStream:
        """Queue a request for one answer: params.n is 1. Does not wait.

        Raises QueueFullError, or FieldError for what this engine cannot do with this prompt or these params.
        """
        ...

    def abort(self, stream: Any) -> None:  # what generate() returned
        """Nobody wants this stream any more: free what it holds. Does nothing to a stream that has ended."""
        ...

    def stats(self) -> Mapping[str, float]:
        """Gauges under vLLM's names without prefix: num_requests_running, num_requests_waiting, kv_cache_usage_perc."""
        ...
