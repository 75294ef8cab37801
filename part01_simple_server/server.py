"""The whole server: tokenize, prefill, decode with a KV cache, sample, stop, answer over HTTP.

Start at the bottom, as the lesson does: `create_app` is the HTTP server. It calls `LLM.generate`, which is the loop.
`sample` and `check_stop` are the loop's two decisions.
"""

from __future__ import annotations

import uuid
from typing import Any

import torch
from flask import Flask, Response, jsonify, request
from torch import Tensor
from transformers import DynamicCache
from werkzeug.exceptions import HTTPException, MethodNotAllowed, RequestEntityTooLarge, UnsupportedMediaType

from common.answer_text import answer_text
from common.checkpoint import DTYPES, default_dtype, load_model, load_tokenizer, resolve_checkpoint
from common.errors import FieldError, openai_error
from common.outputs import CompletionOutput, FinishReason, RequestOutput
from common.prompts import PROMPT_FIELDS, encode_prompt
from common.request_body import parse_json
from common.sampling_params import SamplingParams, check_known_fields, check_supported, check_vocabulary
from common.threads import set_num_threads

from .config import EngineConfig

MAX_BODY_BYTES = 1_000_000
SAMPLING_FIELDS = (
    "max_tokens", "min_tokens", "temperature", "top_k", "top_p", "seed", "stop_token_ids", "ignore_eos",
)  # fmt: skip


class LLM:
    """A model that continues one prompt at a time.

    num_positions_computed counts the positions that the model computed. A KV cache keeps it low.
    """

    def __init__(self, config: EngineConfig) -> None:
        assert config.device is not None, "EngineConfig chooses the device"
        set_num_threads(config.num_threads)
        checkpoint = resolve_checkpoint(config.model)
        dtype = default_dtype(config.device) if config.dtype == "auto" else DTYPES[config.dtype]
        self.name, self.device = config.model, config.device
        self.model = load_model(checkpoint, dtype, config.device)
        self.tokenizer = load_tokenizer(checkpoint)
        self.eos_token_ids = checkpoint.eos_token_ids
        defaults = checkpoint.default_sampling  # for requests that do not name them
        self.default_sampling = {name: defaults[name] for name in SAMPLING_FIELDS if name in defaults}
        self.max_model_len = min(config.max_model_len or checkpoint.max_model_len, checkpoint.max_model_len)
        self.num_positions_computed = 0

    def forward(self, token_ids: list[int], first_position: int, cache: DynamicCache | None) -> Tensor:
        """Run tokens, the first one at first_position. Returns the logits of the last one: [vocab_size], float32.

        With a cache, the keys and values of these positions are appended to it, and attention includes the cached ones.
        """
        positions = torch.arange(first_position, first_position + len(token_ids), device=self.device)
        output = self.model(
            input_ids=torch.tensor([token_ids], device=self.device),
            position_ids=positions.unsqueeze(0),
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=1,
        )
        self.num_positions_computed += len(token_ids)
        return output.logits[0, -1].float()

    @torch.inference_mode()
    def generate(self, prompt_token_ids: list[int], params: SamplingParams, use_cache: bool = True) -> RequestOutput:
        """Continue a prompt. Without a cache, every token takes a pass over the whole text so far."""
        check_supported(params, SAMPLING_FIELDS)
        check_vocabulary(params, self.model.config.vocab_size)
        stop_token_ids = set(params.stop_token_ids) | (set() if params.ignore_eos else self.eos_token_ids)
        generator = None
        if params.seed is not None:
            generator = torch.Generator(self.device).manual_seed(params.seed)
        cache = DynamicCache(config=self.model.config) if use_cache else None
        output_token_ids: list[int] = []
        # exercise: decode_loop
        first_position, new_token_ids = 0, prompt_token_ids  # prefill: the whole prompt in one pass
        while True:
            logits = self.forward(new_token_ids, first_position, cache)
            if len(output_token_ids) < params.min_tokens:
                logits[list(stop_token_ids)] = -torch.inf
            output_token_ids.append(sample(logits, params, generator))
            stop = check_stop(len(prompt_token_ids), output_token_ids, params, self.eos_token_ids, self.max_model_len)
            if stop:
                break
            if use_cache:  # decode: only the newest token, at the next position
                first_position += len(new_token_ids)
                new_token_ids = output_token_ids[-1:]
            else:
                new_token_ids = prompt_token_ids + output_token_ids
        # exercise: end
        finish_reason, stop_reason = stop
        shown = output_token_ids[:-1] if finish_reason == "stop" else output_token_ids
        text = answer_text(self.tokenizer, prompt_token_ids, shown)
        output = CompletionOutput(0, text, output_token_ids, finish_reason, stop_reason)
        return RequestOutput(f"gen-{uuid.uuid4().hex}", prompt_token_ids, [output], finished=True)


def kv_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Bytes of KV cache per token: a key and a value for every layer and KV head."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * dtype.itemsize


def sample(logits: Tensor, params: SamplingParams, generator: torch.Generator | None) -> int:
    """Choose a token id. logits: [vocab_size]. Order as in vLLM: temperature, then top-k, then top-p."""
    # exercise: sample
    if params.temperature == 0:
        return int(logits.argmax())
    logits = logits / params.temperature
    if 0 < params.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(params.top_k).values[-1], -torch.inf)
    probs = logits.softmax(dim=-1)
    if params.top_p < 1:
        ordered, order = probs.sort(descending=True)
        before = ordered.cumsum(dim=-1) - ordered  # mass of the likelier tokens; 0 for the first, so it is always kept
        probs[order[before >= params.top_p]] = 0
    return int(torch.multinomial(probs, 1, generator=generator))
    # exercise: end


def check_stop(
    num_prompt_tokens: int,
    output_token_ids: list[int],
    params: SamplingParams,
    eos_token_ids: frozenset[int],
    max_model_len: int,
) -> tuple[FinishReason, int | None] | None:
    """Whether to stop after the newest token: (finish_reason, stop_reason), or None. Based on vLLM's check_stop."""
    # exercise: check_stop
    num_output_tokens, last = len(output_token_ids), output_token_ids[-1]
    if num_output_tokens >= params.min_tokens:
        if last in eos_token_ids and not params.ignore_eos:
            return "stop", None
        if last in params.stop_token_ids:
            return "stop", last
    if num_output_tokens >= params.max_tokens or num_prompt_tokens + num_output_tokens >= max_model_len:
        return "length", None
    return None
    # exercise: end


def create_app(llm: LLM) -> Flask:
    """POST /generate and GET /health over one engine."""
    app = Flask(__name__)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY_BYTES + 1  # the limit for a chunked body, which has no length
    app.json.sort_keys = False  # type: ignore[attr-defined]

    @app.post("/generate")
    def generate() -> Response:
        if not request.is_json:  # browsers let any web page send other types to this server without a preflight
            raise UnsupportedMediaType(f"Content-Type: expected application/json, got {request.mimetype or 'none'}")
        raw = request.get_data()
        if len(raw) > MAX_BODY_BYTES:
            raise RequestEntityTooLarge
        body = parse_json(raw)
        check_known_fields(body, PROMPT_FIELDS + SAMPLING_FIELDS)
        params = SamplingParams.from_body(body, llm.default_sampling)
        result = llm.generate(encode_prompt(body, llm.tokenizer, llm.max_model_len), params)
        output = result.outputs[0]
        return jsonify(
            text=output.text,
            token_ids=output.token_ids,
            finish_reason=output.finish_reason,
            stop_reason=output.stop_reason,
            usage=result.usage,
        )

    @app.get("/health")
    def health() -> Response:
        return jsonify(status="ok", model=llm.name)

    @app.errorhandler(FieldError)
    def bad_field(error: FieldError) -> tuple[Response, int]:
        return jsonify(openai_error(str(error), error.field)), 400

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> tuple[Response, int, dict[str, str]]:
        status = error.code or 500
        if status == 413:
            got = request.content_length or "more"
            error.description = f"body: expected at most {MAX_BODY_BYTES:,} bytes, got {got}"
        kind = "invalid_request_error" if status < 500 else "internal_error"
        headers = {"Allow": ", ".join(error.valid_methods or [])} if isinstance(error, MethodNotAllowed) else {}
        body = openai_error(error.description or error.name, "body" if status == 413 else None, kind)
        return jsonify(body), status, headers

    return app
