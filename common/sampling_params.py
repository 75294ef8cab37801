"""How a request wants its tokens chosen and its answer ended, under vLLM's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from common.errors import FieldError

MAX_SEED = 2**63 - 1
MAX_STOP_TOKEN_IDS = 128
MIN_TEMPERATURE = 1e-5  # below it is greedy, as in vLLM: float32 logits divided by less overflow
MIN_TOP_P = 1e-9  # float32 would round a smaller one to 0; either way only the likeliest token stays


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Raises FieldError naming field, value and limit if a value is out of range.

    temperature 0 (or below 1e-5) is greedy; top_k 0 keeps all tokens. A seed makes the request's draws reproducible.
    min_tokens holds back the end-of-sequence token and stop_token_ids until that many tokens are out.
    """

    max_tokens: int = 128
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check_int("max_tokens", self.max_tokens, low=1)
        _check_int("min_tokens", self.min_tokens, low=0, high=self.max_tokens, high_name="max_tokens")
        _check_float("temperature", self.temperature, 0.0, 100.0)
        _check_int("top_k", self.top_k, low=0)
        _check_float("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise FieldError("top_p", "expected a number above 0 and up to 1, got 0")
        if self.seed is not None:
            _check_int("seed", self.seed, low=0, high=MAX_SEED)
        if not isinstance(self.stop_token_ids, list | tuple):
            raise FieldError("stop_token_ids", f"expected a list of integers, got {show(self.stop_token_ids)}")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise FieldError(
                "stop_token_ids", f"expected at most {MAX_STOP_TOKEN_IDS} ids, got {len(self.stop_token_ids)}"
            )
        for token_id in self.stop_token_ids:
            _check_int("stop_token_ids", token_id, low=0)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "temperature", 0.0 if self.temperature < MIN_TEMPERATURE else self.temperature)
        object.__setattr__(self, "top_p", max(self.top_p, MIN_TOP_P))
        if not isinstance(self.ignore_eos, bool):
            raise FieldError("ignore_eos", f"expected true or false, got {show(self.ignore_eos)}")

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> SamplingParams:
        """The sampling fields of a request body; a null means the default. Other fields are the caller's to check."""
        names = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in body.items() if name in names and value is not None})


def check_known_fields(body: Mapping[str, Any], others: tuple[str, ...]) -> None:
    """Raises FieldError for the first field that is neither SamplingParams' nor one of the others."""
    known = {f.name for f in fields(SamplingParams)} | set(others)
    for name in body:
        if name not in known:
            raise FieldError(show(name).strip("'"), f"unknown field: expected one of {', '.join(sorted(known))}")


def check_vocabulary(params: SamplingParams, vocab_size: int) -> None:
    """Raises FieldError if stop_token_ids names a token that the model does not have."""
    for token_id in params.stop_token_ids:
        if token_id >= vocab_size:
            raise FieldError(
                "stop_token_ids", f"expected ids below {vocab_size} (the vocabulary), got {show(token_id)}"
            )


def show(value: object, limit: int = 60) -> str:
    """A value as an error message quotes it: short, whatever was sent."""
    try:
        text = repr(value)
    except RecursionError:
        return f"a {type(value).__name__}, nested too deeply"
    return text if len(text) <= limit else f"{text[:limit]}…"


def _check_int(field: str, value: object, low: int, high: int | None = None, high_name: str = "") -> None:
    wanted = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    if high_name:
        wanted += f" ({high_name})"
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        raise FieldError(field, f"expected {wanted}, got {show(value)}")


def _check_float(field: str, value: object, low: float, high: float) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # type: ignore[operator]  # NaN fails every comparison
        raise FieldError(field, f"expected a number from {low:g} to {high:g}, got {show(value)}")
