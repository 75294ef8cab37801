"""Build responses as JSON: the complete answer, or chunks of a stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from common.openai_app.logprobs import LogprobsWriter, TokenTexts, describe_prompt
from common.openai_app.protocol import ApiRequest
from common.outputs import CompletionOutput, FinishReason


def describe_model(model: str, max_model_len: int, created: int) -> dict[str, Any]:
    """An entry of /v1/models. created: when the server started, in seconds since 1970."""
    return {
        "id": model, "object": "model", "created": created, "owned_by": "local", "root": model, "parent": None,
        "max_model_len": max_model_len,
    }  # fmt: skip


class ResponseWriter:
    """Builds the response to one request. Pass each output once, either to `chunks` or to `response`."""

    def __init__(self, request: ApiRequest, texts: TokenTexts) -> None:
        self.request, self._texts = request, texts
        self._num_tokens = [0] * request.num_choices
        self._is_started = [False] * request.num_choices
        self._num_cached: dict[int, int] = {}  # by choice, once the engine has reported it
        self._token_ids: list[list[int]] = [[] for _ in range(request.num_choices)]  # what return_token_ids has to send
        self._logprobs: list[LogprobsWriter] = []
        if request.params.logprobs is not None:
            self._logprobs = [LogprobsWriter(request, texts) for _ in range(request.num_choices)]

    def response(self, outputs: list[CompletionOutput]) -> dict[str, Any]:
        """The complete answer. outputs: all outputs of all choices, in order within each choice."""
        texts = [self._echo(index) for index in range(self.request.num_choices)]
        ends: dict[int, dict[str, Any]] = {}
        prompts: dict[int, dict[str, Any]] = {}
        for output in map(self._without_answer, outputs):
            if self._begins(output):
                prompts[output.index] = self._describe_prompt(output)
            self._add(output)
            texts[output.index] += output.text
            if output.finish_reason:
                ends[output.index] = {"finish_reason": output.finish_reason, "stop_reason": output.stop_reason}
        choices = [
            {"index": index, **self._whole(text), **self._take(index), **ends[index]}
            for index, text in enumerate(texts)
        ]
        if self.request.is_chat:  # vLLM tells about a chat's prompt beside the choices, about another prompt in them
            return {**self._head("chat.completion"), "choices": choices, "usage": self._usage(), **prompts[0]}
        choices = [{**choice, **prompts[index]} for index, choice in enumerate(choices)]
        return {**self._head("chat.completion"), "choices": choices, "usage": self._usage()}

    def chunks(self, output: CompletionOutput) -> Iterator[dict[str, Any]]:
        """A choice's first output begins with the role (chat), or with the prompt if it is echoed.

        No chunk for an output without text (half a character, the beginning of a stop string) unless it is the last.
        The log probabilities of such an output are sent with the choice's next chunk.
        """
        output = self._without_answer(output)
        if self._begins(output):
            yield from self._first_chunk(output)
        self._add(output)
        if output.text:
            part = {"delta": {"content": output.text}} if self.request.is_chat else {"text": output.text}
            yield self._chunk(output.index, {**part, **self._take(output.index)})
        if output.finish_reason:
            end: dict[str, Any] = {"delta": {}} if self.request.is_chat else {"text": ""}
            end |= {"finish_reason": output.finish_reason, "stop_reason": output.stop_reason}
            yield self._chunk(output.index, {**end, **self._take(output.index)})

    def last_chunks(self) -> Iterator[dict[str, Any]]:
        """The usage, if requested."""
        if self.request.stream and self.request.stream.include_usage:
            yield {**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage()}

    def _without_answer(self, output: CompletionOutput) -> CompletionOutput:
        """Drop the token that nobody wants if max_tokens is 0."""
        if not self.request.is_prompt_only:
            return output
        end: FinishReason | None = output.finish_reason and "length"
        return replace(output, text="", token_ids=[], logprobs=None, finish_reason=end, stop_reason=None)

    def _begins(self, output: CompletionOutput) -> bool:
        """Whether it is the first of its choice. Then the prompt's log probabilities are collected, if it is echoed."""
        if self._is_started[output.index]:
            return False
        self._is_started[output.index] = True
        if self._logprobs and self.request.echo is not None:
            prompt, logprobs = self._prompt(output.index), output.prompt_logprobs
            assert logprobs is not None, "an echo with logprobs asks for the prompt's"
            self._logprobs[output.index].add_prompt(self._echo(output.index), prompt, logprobs)
        return True

    def _first_chunk(self, output: CompletionOutput) -> Iterator[dict[str, Any]]:
        """The role (chat) or the prompt (echo), if there is anything to tell before the first token."""
        index, prompt = output.index, self._describe_prompt(output)
        if self.request.is_chat:
            yield {**self._chunk(index, {"delta": {"role": "assistant", "content": ""}}), **prompt}
        elif self._echo(index) or prompt:
            yield self._chunk(index, {"text": self._echo(index), **self._take(index), **prompt})

    def _describe_prompt(self, output: CompletionOutput) -> dict[str, Any]:
        """What was asked about the prompt of a choice, whose first output this is."""
        found: dict[str, Any] = {}
        if self.request.return_token_ids:
            found["prompt_token_ids"] = self._prompt(output.index)
        if self.request.wants_prompt_logprobs and output.prompt_logprobs is not None:
            found["prompt_logprobs"] = describe_prompt(self._texts, output.prompt_logprobs)
        return found

    def _add(self, output: CompletionOutput) -> None:
        self._num_tokens[output.index] += len(output.token_ids)
        if output.num_cached_tokens is not None:
            self._num_cached[output.index] = output.num_cached_tokens
        self._token_ids[output.index] += output.token_ids
        if self._logprobs:
            self._logprobs[output.index].add(output)

    def _take(self, index: int) -> dict[str, Any]:
        """What was asked about the tokens that were added since the last call."""
        taken: dict[str, Any] = {"logprobs": self._logprobs[index].take() if self._logprobs else None}
        if self.request.return_token_ids:
            taken["token_ids"], self._token_ids[index] = self._token_ids[index], []
        return taken

    def _prompt(self, index: int) -> list[int]:
        return self.request.prompts[index // self.request.params.n]

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
            chunk["usage"] = _count(len(self._prompt(index)), self._num_tokens[index])
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
