"""/tokenize and /detokenize, as vLLM's server has them."""

from __future__ import annotations

from typing import Any

from common.errors import FieldError
from common.openai_app.protocol import check_model
from common.prompts import PromptOptions, check_token_ids, encode_prompts
from common.request_body import parse_json
from common.sampling_params import check_bool, show
from common.serving import ServingEngine


def tokenize(raw: bytes, engine: ServingEngine) -> dict[str, Any]:
    """The token ids of `prompt`, or of `messages` as the chat template writes them.

    Raises FieldError, ApiError 404 for another model.
    """
    body = parse_json(raw)
    check_model(body, engine)
    given = {name: body[name] for name in ("prompt", "messages") if body.get(name) is not None}
    if (wants_texts := body.get("return_token_strs")) is not None:
        check_bool("return_token_strs", wants_texts)
    options = PromptOptions.from_body(
        {**body, "truncate_prompt_tokens": None}, engine.max_model_len, engine.max_model_len
    )
    if not isinstance(given.get("prompt", ""), str):
        raise FieldError("prompt", f"expected text, got {show(given['prompt'])}")
    [token_ids] = encode_prompts(given, engine.tokenizer, None, options)
    texts = engine.tokenizer.convert_ids_to_tokens(token_ids) if wants_texts else None
    return {
        "count": len(token_ids), "max_model_len": engine.max_model_len, "tokens": token_ids, "token_strs": texts,
    }  # fmt: skip


def detokenize(raw: bytes, engine: ServingEngine) -> dict[str, Any]:
    """The text of `tokens`. Raises FieldError, ApiError 404 for another model."""
    body = parse_json(raw)
    check_model(body, engine)
    if not isinstance(body.get("tokens"), list):
        raise FieldError("tokens", f"expected a list of token ids, got {show(body.get('tokens'))}")
    token_ids = check_token_ids("tokens", body["tokens"], len(engine.tokenizer))
    return {"prompt": engine.tokenizer.decode(token_ids)}
