"""The interface between the server in `common.openai_app` and an engine, and the errors that an engine raises."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from common.outputs import CompletionOutput
from common.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class QueueFullError(Exception):
    """Too many requests are already waiting."""


class GenerationError(Exception):
    """The engine failed on this request. The message gives the cause."""


class ShutdownError(GenerationError):
    """The engine is shutting down. The same request may succeed elsewhere, or later."""


class OutputStream(Protocol):
    """One request's outputs as they arrive: iterate once, on the event loop that created the stream.

    Each output holds what is new since the previous one. Only the last one has a finish_reason. Raises GenerationError
    if the engine fails or dies, ShutdownError if it shuts down.
    """

    def __aiter__(self) -> AsyncIterator[CompletionOutput]: ...


class ServingEngine(Protocol):
    """An engine that an asyncio server can use. All methods but shutdown are called on the event loop.

    max_model_len is in tokens, prompt and answer together. vocab_size is the model's, which may exceed the tokenizer's.
    """

    @property
    def model_name(self) -> str: ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    @property
    def default_sampling(self) -> Mapping[str, Any]:
        """Fields of SamplingParams for requests that do not name them: the model's own defaults."""
        ...

    @property
    def max_model_len(self) -> int: ...

    @property
    def max_request_len(self) -> int:
        """The longest possible request, prompt plus answer: max_model_len, or less if the KV cache is smaller."""
        ...

    @property
    def max_num_unfinished(self) -> int:
        """The most requests that may run and wait; generate rejects one more."""
        ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def is_alive(self) -> bool:
        """False once no request can succeed anymore."""
        ...

    def start(self) -> None:
        """Start serving; called once, before all other methods."""
        ...

    def shutdown(self) -> None:
        """Stop all threads and processes, and end all open streams. Blocks; called from another thread, maybe twice.

        The server calls it when its requests have ended or must end; abort may still be called afterwards.
        """
        ...

    def generate(self, prompt_token_ids: list[int], params: SamplingParams) -> OutputStream:
        """Queue a request for one answer: params.n is 1. Does not wait.

        Raises QueueFullError, or FieldError if this engine does not support the prompt or the params.
        """
        ...

    def abort(self, stream: Any) -> None:  # what generate() returned
        """Abort a stream and free its resources. Does nothing to a stream that has ended."""
        ...

    def stats(self) -> Mapping[str, float]:
        """Gauges under vLLM's names without prefix: num_requests_running, num_requests_waiting, kv_cache_usage_perc."""
        ...
