"""Parse request bodies: from JSON to a checked ApiRequest."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from common.answer_text import end_of_prompt
from common.errors import FieldError
from common.openai_app.errors import ApiError
from common.openai_app.fields import given_fields
from common.prompts import PromptOptions, encode_prompts, split_prompts, stop_at_special_tokens
from common.request_body import parse_json
from common.sampling_params import (
    MAX_LOGPROBS,
    MIN_SEED,
    SamplingParams,
    check_int,
    check_vocabulary,
    show,
)
from common.serving import ServingEngine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's; a chat may fill the context
MAX_REQUEST_ID_CHARS = 128
STREAM_OPTIONS = ("include_usage", "continuous_usage_stats", "include_obfuscation")


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """include_usage: a last chunk with the usage. continuous_usage_stats: the usage so far in all chunks, as vLLM's."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


@dataclass(frozen=True, slots=True)
class ApiRequest:
    """A checked request, with the fields that its responses repeat.

    prompts: one, or a batch; each gets params.n answers. echo: the text to put before each prompt's answers, or None.
    is_prompt_only: max_tokens is 0, and the token that the engine has to generate is dropped. return_token_ids,
    wants_prompt_logprobs: what the response tells beside the text.
    """

    id: str
    created: int
    model: str
    is_chat: bool
    prompts: list[list[int]]
    echo: list[str] | None
    params: SamplingParams
    stream: StreamOptions | None
    is_prompt_only: bool = False
    return_token_ids: bool = False
    wants_prompt_logprobs: bool = False

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.params.n

    def engine_requests(self) -> Iterator[tuple[list[int], SamplingParams]]:
        """The engine requests, one per choice: sample j of prompt i is choice i * n + j and has its own seed."""
        for prompt_token_ids in self.prompts:
            for sample in range(self.params.n):
                seed = self.params.seed
                seed = None if seed is None else (seed + sample - MIN_SEED) % 2**64 + MIN_SEED
                yield prompt_token_ids, replace(self.params, n=1, seed=seed)


def parse_request(raw: bytes, is_chat: bool, engine: ServingEngine, request_id: str | None = None) -> ApiRequest:
    """Raises FieldError naming the first invalid or unsupported field, ApiError 404 for another model.

    request_id: the client's name for the request, which becomes part of its id.
    """
    return build_request(parse_json(raw), is_chat, engine, request_id)


def build_request(body: dict[str, Any], is_chat: bool, engine: ServingEngine, request_id: str | None) -> ApiRequest:
    """parse_request, from the JSON on."""
    check_model(body, engine)
    given = given_fields(body, is_chat)
    stream = _parse_stream(given)
    logprobs = _parse_chat_logprobs(given) if is_chat else _parse_completion_logprobs(given)
    echo = _parse_flag(given, "echo")
    if stream and given.get("prompt_logprobs") is not None:
        raise FieldError("prompt_logprobs", "only allowed when stream is false")
    wants_prompt_logprobs = given.get("prompt_logprobs") is not None
    if echo and logprobs is not None:
        given.setdefault("prompt_logprobs", logprobs)
    field = "messages" if is_chat else "prompt"
    if field not in given:
        raise FieldError(field, "expected a list of messages, got none" if is_chat else "expected a prompt, got none")
    max_tokens = _parse_max_tokens(given, 0 if echo else 1, engine.max_model_len)
    num_reserved = max_tokens or (1 if is_chat else DEFAULT_COMPLETION_TOKENS)
    options = PromptOptions.from_body(given, max(1, engine.max_model_len - num_reserved), engine.max_model_len)
    prompts = encode_prompts({field: given[field]}, engine.tokenizer, engine.max_model_len, options)
    default_max_tokens = max(1, engine.max_request_len - len(prompts[0])) if is_chat else DEFAULT_COMPLETION_TOKENS
    params = _parse_params({**given, "max_tokens": max_tokens}, default_max_tokens, logprobs, engine.default_sampling)
    params = stop_at_special_tokens(params, engine.tokenizer)
    check_vocabulary(params, engine.vocab_size)
    return ApiRequest(
        id=f"{'chatcmpl' if is_chat else 'cmpl'}-{_base_id(body, request_id)}",
        created=int(time.time()),
        model=engine.model_name,
        is_chat=is_chat,
        prompts=prompts,
        echo=_prompt_texts(given["prompt"], prompts, engine.tokenizer, options) if echo else None,
        params=params,
        stream=stream,
        is_prompt_only=max_tokens == 0,
        return_token_ids=_parse_flag(given, "return_token_ids"),
        wants_prompt_logprobs=wants_prompt_logprobs,
    )


def check_model(body: dict[str, Any], engine: ServingEngine) -> None:
    """Raises ApiError 404 for another model than the one that is served; no name means that one."""
    if body.get("model") not in (None, engine.model_name):
        message = f"model: {show(body['model'])} is not served here, expected {engine.model_name!r}"
        raise ApiError(404, message, "model", code="model_not_found")


def usable_id(given: object) -> str | None:
    """An id that a client has sent, cut to MAX_REQUEST_ID_CHARS. None if it is not printable ASCII."""
    is_usable = isinstance(given, str) and given != "" and given.isprintable() and given.isascii()
    return given[:MAX_REQUEST_ID_CHARS] if is_usable else None  # type: ignore[index]


def _base_id(body: dict[str, Any], request_id: str | None) -> str:
    """The client's id, from the header or the body, if it can be one."""
    return usable_id(request_id) or usable_id(body.get("request_id")) or uuid.uuid4().hex


def _parse_flag(given: dict[str, Any], name: str, field: str | None = None) -> bool:
    value = given.get(name)
    if not isinstance(value, bool | None):
        raise FieldError(field or name, f"expected true or false, got {show(value)}")
    return bool(value)


def _parse_stream(given: dict[str, Any]) -> StreamOptions | None:
    """None if the answer is not to be streamed."""
    is_streamed, options = _parse_flag(given, "stream"), given.get("stream_options")
    if options is not None and not is_streamed:
        raise FieldError("stream_options", "only allowed when stream is true")
    if not isinstance(options, dict | None) or set(options or ()) - set(STREAM_OPTIONS):
        raise FieldError("stream_options", f"expected an object with {', '.join(STREAM_OPTIONS)}, got {show(options)}")
    flags = [_parse_flag(options or {}, name, f"stream_options.{name}") for name in STREAM_OPTIONS]
    return StreamOptions(*flags[:2]) if is_streamed else None


def _parse_chat_logprobs(given: dict[str, Any]) -> int | None:
    wanted, num_top = _parse_flag(given, "logprobs"), given.get("top_logprobs")
    if num_top is not None:
        check_int("top_logprobs", num_top, low=0, high=MAX_LOGPROBS)
        if num_top and not wanted:
            raise FieldError("top_logprobs", f"only allowed when logprobs is true, got {num_top}")
    return (num_top or 0) if wanted else None


def _parse_completion_logprobs(given: dict[str, Any]) -> int | None:
    num_top = given.get("logprobs")
    if num_top is None or num_top is False:
        return None
    check_int("logprobs", num_top, low=0, high=MAX_LOGPROBS)
    return num_top


def _parse_max_tokens(given: dict[str, Any], low: int, max_model_len: int) -> int | None:
    names = [name for name in ("max_tokens", "max_completion_tokens") if name in given]
    for name in names:
        check_int(name, given[name], low=low, high=max_model_len, high_name="max_model_len")
        if given[name] != given[names[0]]:
            raise FieldError(name, f"{show(given[name])} contradicts {names[0]}, {show(given[names[0]])}")
    return given[names[0]] if names else None


def _parse_params(
    given: dict[str, Any], default_max_tokens: int, logprobs: int | None, defaults: Mapping[str, Any]
) -> SamplingParams:
    max_tokens, min_tokens = given["max_tokens"], given.get("min_tokens")
    if max_tokens is None:
        is_longer = isinstance(min_tokens, int) and min_tokens > default_max_tokens
        max_tokens = min_tokens if is_longer else default_max_tokens
    max_tokens = max(1, max_tokens)  # 0 asks for the prompt alone; the engine generates a token at least
    if given.get("top_k") == -1:  # vLLM's other way to say that all tokens stay
        given = {**given, "top_k": 0}
    params = SamplingParams.from_body({**given, "max_tokens": max_tokens, "logprobs": logprobs}, defaults)
    best_of = given.get("best_of", params.n)
    if isinstance(best_of, bool) or best_of != params.n:
        raise FieldError("best_of", f"not supported: expected n, {params.n}, or nothing, got {show(best_of)}")
    return params


def _prompt_texts(
    prompt: object, prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase, options: PromptOptions
) -> list[str]:
    """Each prompt as text: as it was sent, or decoded from its token ids up to where the answer's text begins."""
    texts = []
    for (_, given), token_ids in zip(split_prompts(prompt), prompts, strict=True):
        if isinstance(given, str) and len(token_ids) != options.truncate_prompt_tokens:  # else it may have lost some
            texts.append(given)
            continue
        tail, end = end_of_prompt(tokenizer, token_ids)
        whole = token_ids[: len(token_ids) - len(tail) + end]
        texts.append(str(tokenizer.decode(whole, skip_special_tokens=isinstance(given, str))))
    return texts
