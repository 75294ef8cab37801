"""Build responses as JSON: the complete answer, or chunks of a stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from common.openai_app.logprobs import LogprobsWriter, TokenTexts
from common.openai_app.protocol import ApiRequest
from common.outputs import CompletionOutput


def describe_model(model: str, max_model_len: int, created: int) -> dict[str, Any]:
    """An entry of /v1/models. created: when the server started, in seconds since 1970."""
    return {
        "id": model, "object": "model", "created": created, "owned_by": "local", "root": model, "parent": None,
        "max_model_len": max_model_len,
    }  # fmt: skip


class ResponseWriter:
    """Builds the response to one request. Pass each output once, either to `chunks` or to `response`."""

    def __init__(self, request: ApiRequest, texts: TokenTexts) -> None:
        self.request = request
        self._num_tokens = [0] * request.num_choices
        self._is_started = [False] * request.num_choices
        self._num_cached: dict[int, int] = {}  # by choice, once the engine has reported it
        self._logprobs: list[LogprobsWriter] = []
        if request.params.logprobs is not None:
            self._logprobs = [LogprobsWriter(request, texts) for _ in range(request.num_choices)]

    def response(self, outputs: list[CompletionOutput]) -> dict[str, Any]:
        """The complete answer. outputs: all outputs of all choices, in order within each choice."""
        texts = [self._echo(index) for index in range(self.request.num_choices)]
        ends: dict[int, dict[str, Any]] = {}
        for output in outputs:
            self._add(output)
            texts[output.index] += output.text
            if output.finish_reason:
                ends[output.index] = {"finish_reason": output.finish_reason, "stop_reason": output.stop_reason}
        return {
            **self._head("chat.completion"),
            "choices": [
                {"index": index, **self._whole(text), "logprobs": self._take_logprobs(index), **ends[index]}
                for index, text in enumerate(texts)
            ],
            "usage": self._usage(),
        }

    def chunks(self, output: CompletionOutput) -> Iterator[dict[str, Any]]:
        """A choice's first output begins with the role (chat), or with the prompt if it is echoed.

        No chunk for an output without text (half a character, the beginning of a stop string) unless it is the last.
        The log probabilities of such an output are sent with the choice's next chunk.
        """
        self._add(output)
        if not self._is_started[output.index]:
            self._is_started[output.index] = True
            yield from self._first_chunk(output.index)
        if output.text:
            part = {"delta": {"content": output.text}} if self.request.is_chat else {"text": output.text}
            yield self._chunk(output.index, {**part, "logprobs": self._take_logprobs(output.index)})
        if output.finish_reason:
            end: dict[str, Any] = {"delta": {}} if self.request.is_chat else {"text": ""}
            end |= {"finish_reason": output.finish_reason, "stop_reason": output.stop_reason}
            yield self._chunk(output.index, {**end, "logprobs": self._take_logprobs(output.index)})

    def last_chunks(self) -> Iterator[dict[str, Any]]:
        """The usage, if requested."""
        if self.request.stream and self.request.stream.include_usage:
            yield {**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage()}

    def _first_chunk(self, index: int) -> Iterator[dict[str, Any]]:
        if self.request.is_chat:
            yield self._chunk(index, {"delta": {"role": "assistant", "content": ""}})
        elif self._echo(index):
            yield self._chunk(index, {"text": self._echo(index)})

    def _add(self, output: CompletionOutput) -> None:
        self._num_tokens[output.index] += len(output.token_ids)
        if output.num_cached_tokens is not None:
            self._num_cached[output.index] = output.num_cached_tokens
        if self._logprobs:
            self._logprobs[output.index].add(output)

    def _take_logprobs(self, index: int) -> dict[str, Any] | None:
        return self._logprobs[index].take() if self._logprobs else None

    def _echo(self, index: int) -> str:
        return "" if self.request.echo is None else self.request.echo[index // self.request.params.n]

    def _whole(self, text: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"message": message} if self.request.is_chat else {"text": text}

    def _head(self, chat_object: str) -> dict[str, Any]:
        return {
            "id": self.request.id,
            "object": chat_object if self.request.is_chat else "text_completion",
            "created": self.request.created,
            "model": self.request.model,
            "system_fingerprint": None,
        }

    def _chunk(self, index: int, choice: dict[str, Any]) -> dict[str, Any]:
        choice = {"index": index, "logprobs": None, "finish_reason": None, **choice}
        chunk = {**self._head("chat.completion.chunk"), "choices": [choice]}
        options = self.request.stream
        if options and options.continuous_usage_stats:
            chunk["usage"] = _count(len(self.request.prompts[index // self.request.params.n]), self._num_tokens[index])
        elif options and options.include_usage:
            chunk["usage"] = None
        return chunk

    def _usage(self) -> dict[str, Any]:
        """Each prompt counts once, as in OpenAI's API; its cached tokens are those of its first answer."""
        num_prompt_tokens = sum(map(len, self.request.prompts))
        first_choices = range(0, self.request.num_choices, self.request.params.n)
        num_cached = [self._num_cached[index] for index in first_choices if index in self._num_cached]
        details = {"prompt_tokens_details": {"cached_tokens": sum(num_cached)}} if num_cached else {}
        return {**details, **_count(num_prompt_tokens, sum(self._num_tokens))}


def _count(num_prompt_tokens: int, num_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt_tokens + num_tokens,
    }
