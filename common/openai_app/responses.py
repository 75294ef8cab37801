"""Build responses as JSON: the complete answer, or chunks of a stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from common.openai_app.logprobs import LogprobsWriter, TokenTexts
from common.openai_app.protocol import ApiRequest
from common.outputs import CompletionOutput


def list_models(model: str, max_model_len: int) -> dict[str, Any]:
    entry = {"id": model, "object": "model", "created": 0, "owned_by": "local", "max_model_len": max_model_len}
    return {"object": "list", "data": [entry]}


class ResponseWriter:
    """Builds the response to one request. Pass each output once, either to `chunks` or to `response`."""

    def __init__(self, request: ApiRequest, texts: TokenTexts) -> None:
        self.request = request
        self._num_tokens = 0
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

    def first_chunks(self) -> Iterator[dict[str, Any]]:
        """The first chunk of each choice: the role (chat), or the prompt if it is echoed."""
        for index in range(self.request.num_choices):
            if self.request.is_chat:
                yield self._chunk(index, {"delta": {"role": "assistant", "content": ""}})
            elif self._echo(index):
                yield self._chunk(index, {"text": self._echo(index)})

    def chunks(self, output: CompletionOutput) -> Iterator[dict[str, Any]]:
        """No chunk for an output without text (half a character, the beginning of a stop string) unless it is the last.

        The log probabilities of such an output are sent with the choice's next chunk.
        """
        self._add(output)
        if output.text:
            part = {"delta": {"content": output.text}} if self.request.is_chat else {"text": output.text}
            yield self._chunk(output.index, {**part, "logprobs": self._take_logprobs(output.index)})
        if output.finish_reason:
            end: dict[str, Any] = {"delta": {}} if self.request.is_chat else {"text": ""}
            end |= {"finish_reason": output.finish_reason, "stop_reason": output.stop_reason}
            yield self._chunk(output.index, {**end, "logprobs": self._take_logprobs(output.index)})

    def last_chunks(self) -> Iterator[dict[str, Any]]:
        """The usage, if requested."""
        if self.request.include_usage:
            yield {**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage()}

    def _add(self, output: CompletionOutput) -> None:
        self._num_tokens += len(output.token_ids)
        if output.num_cached_tokens is not None:
            self._num_cached[output.index] = output.num_cached_tokens
        if self._logprobs:
            self._logprobs[output.index].add(output)

    def _take_logprobs(self, index: int) -> dict[str, Any] | None:
        return self._logprobs[index].take() if self._logprobs else None

    def _echo(self, index: int) -> str:
        return "" if self.request.echo is None else self.request.echo[index // self.request.params.n]

    def _whole(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}} if self.request.is_chat else {"text": text}

    def _head(self, chat_object: str) -> dict[str, Any]:
        return {
            "id": self.request.id,
            "object": chat_object if self.request.is_chat else "text_completion",
            "created": self.request.created,
            "model": self.request.model,
        }

    def _chunk(self, index: int, choice: dict[str, Any]) -> dict[str, Any]:
        choice = {"index": index, "logprobs": None, "finish_reason": None, **choice}
        chunk = {**self._head("chat.completion.chunk"), "choices": [choice]}
        return {**chunk, "usage": None} if self.request.include_usage else chunk

    def _usage(self) -> dict[str, Any]:
        """Each prompt counts once, as in OpenAI's API; its cached tokens are those of its first answer."""
        num_prompt_tokens = sum(map(len, self.request.prompts))
        first_choices = range(0, self.request.num_choices, self.request.params.n)
        num_cached = [self._num_cached[index] for index in first_choices if index in self._num_cached]
        details = {"prompt_tokens_details": {"cached_tokens": sum(num_cached)}} if num_cached else {}
        return {
            **details,
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": self._num_tokens,
            "total_tokens": num_prompt_tokens + self._num_tokens,
        }
