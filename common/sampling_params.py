"""How a request's tokens are sampled and when its answer ends, with vLLM's names."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

from common.errors import FieldError

MIN_SEED, MAX_SEED = -(2**63), 2**63 - 1
MAX_COUNT = 2**31 - 1  # more tokens than any model has; larger values are clipped to it, to fit an int32
MAX_STOP_TOKEN_IDS = 128
MAX_STOP_STRINGS, MAX_STOP_CHARS = 16, 1_000
MAX_N = 128  # answers to one prompt
MAX_LOGIT_BIAS = 300  # entries
MAX_LOGPROBS = 20  # OpenAI's limit
MAX_SALT_CHARS = 1_000
TOKEN_ID_KEY = re.compile(r"0|[1-9][0-9]{0,17}")  # a token id as the key of a JSON object
MAX_TEMPERATURE = 2.0  # of a request over HTTP: OpenAI's limit
MIN_TEMPERATURE = 1e-5  # below it, decoding is greedy, as in vLLM: dividing float32 logits by less would overflow
MIN_REPETITION_PENALTY = 1e-5  # logits are divided by it: less might overflow
MIN_TOP_P = 1e-9  # float32 would round a smaller value to 0; both keep only the likeliest token


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Raises FieldError naming field, value and limit if a value is out of range.

    temperature 0 (or below 1e-5) is greedy; top_k 0 keeps all tokens. A seed makes the request's draws reproducible.
    min_tokens: until this many tokens are generated, the end-of-sequence token, stop_token_ids and stop have no effect.
    stop: up to 16 strings; the answer ends before the first one that appears. A single string means a list of one.
    logit_bias: added to the logits of some tokens. Given as a mapping from token id (or its decimal string, as in JSON)
    to a number; stored as (token id, bias) pairs sorted by id, so that the params can be hashed.
    min_p: tokens that are less likely than min_p times the likeliest one are not drawn.
    logprobs: how many of the likeliest tokens to report with each sampled one; None reports nothing.
    prompt_logprobs: the same for each token of the prompt.
    include_stop_str_in_output: the text ends with the stop string, or with the stop token's text.
    skip_special_tokens: the text leaves special tokens out.
    cache_salt: only requests with the same salt share cached prefixes; it does not change the tokens.
    """

    max_tokens: int = 128
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    cache_salt: str | None = None
    min_p: float = 0.0
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        check_int("max_tokens", self.max_tokens, low=1)
        check_int("min_tokens", self.min_tokens, low=0, high=self.max_tokens, high_name="max_tokens")
        check_float("temperature", self.temperature, 0.0, 100.0)
        check_int("top_k", self.top_k, low=0)
        check_float("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise FieldError("top_p", "expected a number above 0 and up to 1, got 0")
        if self.seed is not None:
            check_int("seed", self.seed, low=MIN_SEED, high=MAX_SEED)
        if not isinstance(self.stop_token_ids, list | tuple):
            raise FieldError("stop_token_ids", f"expected a list of integers, got {show(self.stop_token_ids)}")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise FieldError(
                "stop_token_ids", f"expected at most {MAX_STOP_TOKEN_IDS} ids, got {len(self.stop_token_ids)}"
            )
        for token_id in self.stop_token_ids:
            check_int("stop_token_ids", token_id, low=0)
        for name in ("max_tokens", "min_tokens", "top_k"):
            object.__setattr__(self, name, min(getattr(self, name), MAX_COUNT))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "stop", _check_stop_strings(self.stop))
        object.__setattr__(self, "temperature", 0.0 if self.temperature < MIN_TEMPERATURE else self.temperature)
        object.__setattr__(self, "top_p", max(self.top_p, MIN_TOP_P))
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            check_bool(name, getattr(self, name))
        check_float("min_p", self.min_p, 0.0, 1.0)
        check_int("n", self.n, low=1, high=MAX_N)
        check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        check_float("repetition_penalty", self.repetition_penalty, MIN_REPETITION_PENALTY, 2.0)
        object.__setattr__(self, "logit_bias", _check_logit_bias(self.logit_bias))
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), low=0, high=MAX_LOGPROBS)
        if self.cache_salt is not None:
            if not (isinstance(self.cache_salt, str) and 1 <= len(self.cache_salt) <= MAX_SALT_CHARS):
                wanted = f"expected text of 1 to {MAX_SALT_CHARS} characters"
                raise FieldError("cache_salt", f"{wanted}, got {show(self.cache_salt)}")
            _check_unicode("cache_salt", self.cache_salt)

    @classmethod
    def from_body(cls, body: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> SamplingParams:
        """Read the sampling fields of a request body; the caller checks other fields.

        null means the default. defaults: those of the model, which replace the ones above. Raises FieldError as the
        constructor does, and for a temperature above OpenAI's limit: such an answer is noise.
        """
        if body.get("temperature") is not None:
            check_float("temperature", body["temperature"], 0.0, MAX_TEMPERATURE)
        named = {**(defaults or {}), **{name: value for name, value in body.items() if value is not None}}
        given = {f.name: named[f.name] for f in fields(cls) if f.name in named}
        if given.get("logprobs") is False:  # a chat request's way to ask for none
            del given["logprobs"]
        return cls(**given)


def check_known_fields(body: Mapping[str, Any], known: Collection[str]) -> None:
    """Raises FieldError for the first field that is not known."""
    for name in body:
        if name not in known:
            raise FieldError(show(name).strip("'"), f"unknown field: expected one of {', '.join(sorted(known))}")


def check_supported(params: SamplingParams, supported: Collection[str]) -> None:
    """Raises FieldError if params use a field that the engine does not support, so that none is silently ignored."""
    for spec in fields(params):
        if spec.name not in supported and getattr(params, spec.name) != spec.default:
            raise FieldError(spec.name, f"not supported by this part, got {show(getattr(params, spec.name))}")


def check_vocabulary(params: SamplingParams, vocab_size: int) -> None:
    """Raises FieldError if stop_token_ids or logit_bias names a token that the model does not have."""
    biased = [token_id for token_id, _ in params.logit_bias]
    for field, token_ids in (("stop_token_ids", params.stop_token_ids), ("logit_bias", biased)):
        for token_id in token_ids:
            if token_id >= vocab_size:
                raise FieldError(field, f"expected ids below {vocab_size} (the vocabulary), got {show(token_id)}")


def show(value: object, limit: int = 60) -> str:
    """A value as error messages quote it, cut to limit characters."""
    try:
        text = repr(value)
    except RecursionError:
        return f"a {type(value).__name__}, nested too deeply"
    return text if len(text) <= limit else f"{text[:limit]}…"


def _check_stop_strings(stop: object) -> tuple[str, ...]:
    strings = [stop] if isinstance(stop, str) else stop
    if not isinstance(strings, list | tuple) or not all(isinstance(text, str) for text in strings):
        raise FieldError("stop", f"expected a string or a list of strings, got {show(stop)}")
    if len(strings) > MAX_STOP_STRINGS:
        raise FieldError("stop", f"expected at most {MAX_STOP_STRINGS} strings, got {len(strings)}")
    for text in strings:
        if not 1 <= len(text) <= MAX_STOP_CHARS:
            raise FieldError("stop", f"expected 1 to {MAX_STOP_CHARS} characters, got {len(text)}")
        _check_unicode("stop", text)
    return tuple(strings)


def _check_unicode(field: str, text: str) -> None:
    """Reject half a surrogate pair, which JSON can express and UTF-8 cannot."""
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise FieldError(field, "not valid Unicode: half a surrogate pair")


def _check_logit_bias(bias: object) -> tuple[tuple[int, float], ...]:
    if not isinstance(bias, Mapping | tuple):
        raise FieldError("logit_bias", f"expected an object of token ids and numbers, got {show(bias)}")
    if len(bias) > MAX_LOGIT_BIAS:
        raise FieldError("logit_bias", f"expected at most {MAX_LOGIT_BIAS} entries, got {len(bias)}")
    pairs = {}
    for key, value in bias.items() if isinstance(bias, Mapping) else bias:
        token_id = int(key) if isinstance(key, str) and TOKEN_ID_KEY.fullmatch(key) else key
        if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
            raise FieldError("logit_bias", f"expected token ids as keys, got {show(key)}")
        check_float("logit_bias", value, -100.0, 100.0)
        pairs[token_id] = float(value)
    return tuple(sorted(pairs.items()))


def check_int(field: str, value: object, low: int, high: int | None = None, high_name: str = "") -> None:
    """Raises FieldError unless value is an integer from low to high; high_name says where high comes from."""
    wanted = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    if high_name:
        wanted += f" ({high_name})"
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        raise FieldError(field, f"expected {wanted}, got {show(value)}")


def check_bool(field: str, value: object) -> None:
    """Raises FieldError unless value is true or false."""
    if not isinstance(value, bool):
        raise FieldError(field, f"expected true or false, got {show(value)}")


def check_float(field: str, value: object, low: float, high: float) -> None:
    """Raises FieldError unless value is a number from low to high, both included."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # type: ignore[operator]  # NaN fails every comparison
        raise FieldError(field, f"expected a number from {low:g} to {high:g}, got {show(value)}")
