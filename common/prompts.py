"""The prompt of a request body: text, token ids, or chat messages through the model's template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from common.answer_text import special_tokens
from common.errors import FieldError, context_exceeded, ignore_unknown
from common.sampling_params import SamplingParams, check_bool, check_int, show

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_FIELDS = ("prompt", "messages")
ROLES = ("system", "user", "assistant")
# Fields that messages have besides the text when clients send answers back, and their values that mean nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "annotations": ([],), "audio": (), "function_call": (), "refusal": (), "tool_calls": ([],),
    "reasoning": ("",), "reasoning_content": ("",),
}  # fmt: skip
MAX_PROMPTS = 128  # in one request
# Template variables that are set elsewhere.
RESERVED_KWARGS = {
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "documents", "max_length",
    "messages", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "tokenize",
    "tokenizer_kwargs", "tools", "truncation",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PromptOptions:
    """How a prompt becomes tokens, with vLLM's names.

    add_special_tokens: whether the tokenizer adds its own, such as one for the beginning; None: to a prompt, but not to
    messages, because their template adds them. add_generation_prompt: the messages end with the beginning of the
    assistant's turn. continue_final_message: the last message stays open instead, and the answer continues it.
    chat_template_kwargs: more variables for the template. truncate_prompt_tokens: keep only this many tokens, the last.
    """

    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    truncate_prompt_tokens: int | None = None

    @classmethod
    def from_body(cls, body: Mapping[str, Any], max_prompt_len: int, max_model_len: int) -> PromptOptions:
        """Raises FieldError. max_prompt_len: the meaning of truncate_prompt_tokens=-1."""
        for name in ("add_special_tokens", "add_generation_prompt", "continue_final_message"):
            if body.get(name) is not None:
                check_bool(name, body[name])
        is_open = bool(body.get("continue_final_message"))
        if is_open and body.get("add_generation_prompt"):
            raise FieldError("continue_final_message", "cannot be true together with add_generation_prompt, got both")
        kwargs = {} if body.get("chat_template_kwargs") is None else body["chat_template_kwargs"]
        if not isinstance(kwargs, dict):
            raise FieldError("chat_template_kwargs", f"expected an object, got {show(kwargs)}")
        if reserved := RESERVED_KWARGS & set(kwargs):
            raise FieldError("chat_template_kwargs", f"{min(reserved)!r} cannot be set here")
        limit = body.get("truncate_prompt_tokens")
        if limit == -1 and not isinstance(limit, bool):
            limit = max_prompt_len
        if limit is not None:
            check_int("truncate_prompt_tokens", limit, low=1, high=max_model_len, high_name="max_model_len")
        return cls(
            add_special_tokens=body.get("add_special_tokens"),
            add_generation_prompt=body.get("add_generation_prompt") is not False and not is_open,
            continue_final_message=is_open,
            chat_template_kwargs=kwargs,
            truncate_prompt_tokens=limit,
        )


DEFAULTS = PromptOptions()


def encode_prompt(body: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, max_model_len: int) -> list[int]:
    """Token ids of `prompt` or of `messages`. Raises FieldError if it has a wrong type, is empty or too long."""
    field = _given_field(body)
    if field == "prompt":
        token_ids = _encode_one(field, body[field], tokenizer, DEFAULTS)
    else:
        token_ids = _encode_messages(check_messages(body[field]), tokenizer, DEFAULTS)
    return _check_length(field, token_ids, max_model_len)


def encode_prompts(
    body: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, max_model_len: int | None,
    options: PromptOptions = DEFAULTS,
) -> list[list[int]]:  # fmt: skip
    """Token ids of each prompt. Like encode_prompt, but accepts all that OpenAI's API does: see split_prompts
    and plain_messages. max_model_len: None for any length, 0 too."""
    field = _given_field(body)
    if field == "messages":
        encoded = [(field, _encode_messages(plain_messages(body[field]), tokenizer, options))]
    else:
        prompts = split_prompts(body[field])
        encoded = [(name, _encode_one(name, prompt, tokenizer, options)) for name, prompt in prompts]
    num_kept = options.truncate_prompt_tokens or 0  # [-0:] keeps all
    return [_check_length(name, token_ids[-num_kept:], max_model_len) for name, token_ids in encoded]


def split_prompts(prompt: object) -> list[tuple[str, Any]]:
    """A completion's prompts, each with its name for errors. A prompt is text or token ids; a list is a batch."""
    if not isinstance(prompt, list) or not prompt or not isinstance(prompt[0], str | list):
        return [("prompt", prompt)]
    if len({isinstance(one, str) for one in prompt}) > 1:
        raise FieldError("prompt", "expected a list of texts or a list of lists of token ids, got both")
    if len(prompt) > MAX_PROMPTS:
        raise FieldError("prompt", f"expected at most {MAX_PROMPTS} prompts, got {len(prompt)}")
    return [(f"prompt[{number}]", one) for number, one in enumerate(prompt)]


def check_messages(messages: object) -> list[dict[str, str]]:
    """Chat messages, each with a role and text content. Raises FieldError naming the one that is wrong."""
    checked = []
    for number, message in enumerate(_check_message_list(messages)):
        field = f"messages[{number}]"
        _check_message(field, message, ROLES)
        checked.append({"role": message["role"], "content": _check_text(f"{field}.content", message.get("content"))})
    return checked


def plain_messages(messages: object) -> list[dict[str, str]]:
    """Chat messages in the form that templates accept. Raises FieldError naming the one that is wrong.

    Beyond check_messages: the content may be a list of text parts, which are joined with line ends, as vLLM does; the
    role developer is OpenAI's new name for system; a name is checked and dropped, because templates do not use it.
    """
    plain = []
    for number, message in enumerate(_check_message_list(messages)):
        field = f"messages[{number}]"
        _check_message(field, message, (*ROLES, "developer"))
        if message.get("name") is not None:
            _check_text(f"{field}.name", message["name"])
        role = "system" if message["role"] == "developer" else message["role"]
        plain.append({"role": role, "content": _join_parts(f"{field}.content", message.get("content"))})
    return plain


def stop_at_special_tokens(params: SamplingParams, tokenizer: PreTrainedTokenizerBase) -> SamplingParams:
    """Turn stop strings that are special tokens into stop_token_ids, since special tokens never appear in the text.

    Raises FieldError for a stop string that contains a special token and other text.
    """
    if not params.skip_special_tokens:
        return params
    special = special_tokens(tokenizer)
    strings, token_ids = [], list(params.stop_token_ids)
    for text in params.stop:
        if text in special:
            token_ids.append(special[text])
            continue
        if found := [token for token in special if token in text]:
            raise FieldError(
                "stop", f"{show(text)} is never found: the text does not show special tokens like {found[0]!r}"
            )
        strings.append(text)
    if len(strings) == len(params.stop):
        return params
    return replace(params, stop=tuple(strings), stop_token_ids=tuple(dict.fromkeys(token_ids)))


def _given_field(body: Mapping[str, Any]) -> str:
    given = [field for field in PROMPT_FIELDS if body.get(field) is not None]
    if len(given) != 1:
        raise FieldError("prompt", f"expected either prompt or messages, got {' and '.join(given) or 'neither'}")
    return given[0]


def _encode_one(field: str, prompt: object, tokenizer: PreTrainedTokenizerBase, options: PromptOptions) -> list[int]:
    if isinstance(prompt, list):
        return check_token_ids(field, prompt, len(tokenizer))
    add_special_tokens = options.add_special_tokens is not False
    return _encode_text(_check_text(field, prompt), tokenizer, add_special_tokens)


def _encode_messages(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, options: PromptOptions
) -> list[int]:
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=options.add_generation_prompt,
            continue_final_message=options.continue_final_message,
            **options.chat_template_kwargs,
        )
    except Exception as error:  # a template is a program: it may reject a system message, or fail on a variable
        raise FieldError("messages", f"the model's chat template does not accept them: {error}") from error
    return _encode_text(str(text), tokenizer, bool(options.add_special_tokens))


def _encode_text(text: str, tokenizer: PreTrainedTokenizerBase, add_special_tokens: bool) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False)  # quiet if it is too long


def _check_length(field: str, token_ids: list[int], max_model_len: int | None) -> list[int]:
    if max_model_len is None:
        return token_ids
    if not token_ids:
        raise FieldError(field, "expected at least one token, got an empty prompt")
    if len(token_ids) >= max_model_len:
        raise context_exceeded(field, len(token_ids), max_model_len)
    return token_ids


def _check_message_list(messages: object) -> list[Any]:
    if not isinstance(messages, list) or not messages:
        raise FieldError("messages", f"expected a list of at least one message, got {show(messages)}")
    return messages


def _check_message(field: str, message: object, roles: tuple[str, ...]) -> None:
    if not isinstance(message, dict):
        raise FieldError(field, f"expected an object with role and content, got {show(message)}")
    for name, value in message.items():
        if name in NEUTRAL and value is not None and value not in NEUTRAL[name]:
            raise FieldError(f"{field}.{name}", f"{name} is not supported by this engine, got {show(value)}")
        if name not in ("role", "content", "name", *NEUTRAL):
            ignore_unknown(f"messages[].{name}")
    if message.get("role") not in roles:
        raise FieldError(f"{field}.role", f"expected one of {', '.join(roles)}, got {show(message.get('role'))}")


def _join_parts(field: str, content: object) -> str:
    if not isinstance(content, list):
        return _check_text(field, content)
    if not content:
        raise FieldError(field, "expected text or a list of text parts, got []")
    for number, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or "text" not in part:
            raise FieldError(f"{field}[{number}]", f'expected {{"type": "text", "text": …}}, got {show(part)}')
        _check_text(f"{field}[{number}].text", part["text"])
    return "\n".join(part["text"] for part in content)


def check_token_ids(field: str, values: list[object], vocab_size: int) -> list[int]:
    """Raises FieldError naming the first value that is not a token id."""
    for number, value in enumerate(values):
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < vocab_size:
            raise FieldError(f"{field}[{number}]", f"expected a token id from 0 to {vocab_size - 1}, got {show(value)}")
    return list(values)  # type: ignore[arg-type]


def _check_text(field: str, value: object) -> str:
    if not isinstance(value, str):
        raise FieldError(field, f"expected text{' or token ids' * field.startswith('prompt')}, got {show(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise FieldError(field, f"not valid Unicode: half a surrogate pair at character {error.start}") from error
    return value
