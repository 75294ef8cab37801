"""The engine of part 1, which now yields its tokens one by one. Still one request at a time."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import DynamicCache

from common.checkpoint import DTYPES, default_dtype, load_model, load_tokenizer, resolve_checkpoint
from common.outputs import CompletionOutput, FinishReason, RequestOutput
from common.sampling_params import SamplingParams, check_supported, check_vocabulary
from common.threads import set_num_threads

from .config import EngineConfig
from .detokenizer import IncrementalDetokenizer

SAMPLING_FIELDS = (
    "max_tokens", "min_tokens", "temperature", "top_k", "top_p", "seed", "stop_token_ids", "ignore_eos", "stop",
)  # fmt: skip


class LLM:
    """A model that continues one prompt at a time.

    num_positions_computed counts the positions that the model computed. A KV cache keeps it low.
    """

    def __init__(self, config: EngineConfig) -> None:
        assert config.device is not None, "EngineConfig chooses the device"
        checkpoint = resolve_checkpoint(config.model)
        dtype = default_dtype(config.device) if config.dtype == "auto" else DTYPES[config.dtype]
        self.name, self.device, self.num_threads = config.model, config.device, config.num_threads
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

    def generate(self, prompt_token_ids: list[int], params: SamplingParams) -> RequestOutput:
        """Continue a prompt and return the whole answer."""
        output = join_outputs(list(self.stream(prompt_token_ids, params)))
        return RequestOutput(f"gen-{uuid.uuid4().hex}", prompt_token_ids, [output], finished=True)

    @torch.inference_mode()
    def stream(self, prompt_token_ids: list[int], params: SamplingParams) -> Iterator[CompletionOutput]:
        """Continue a prompt, token by token: each output holds one new token id and the text that can now be shown.

        The last one has a finish_reason. To stop early, stop iterating.
        """
        set_num_threads(self.num_threads)  # here, because the server calls this method in another thread
        check_supported(params, SAMPLING_FIELDS)
        check_vocabulary(params, self.model.config.vocab_size)
        stop_token_ids = set(params.stop_token_ids) | (set() if params.ignore_eos else self.eos_token_ids)
        generator = None
        if params.seed is not None:
            generator = torch.Generator(self.device).manual_seed(params.seed)
        cache = DynamicCache(config=self.model.config)
        detokenizer = IncrementalDetokenizer(self.tokenizer, params.stop, params.min_tokens, prompt_token_ids)
        output_token_ids: list[int] = []
        first_position, new_token_ids = 0, prompt_token_ids  # prefill: the whole prompt in one pass
        while True:
            logits = self.forward(new_token_ids, first_position, cache)
            if len(output_token_ids) < params.min_tokens:
                logits[list(stop_token_ids)] = -torch.inf
            output_token_ids.append(sample(logits, params, generator))
            stop = check_stop(len(prompt_token_ids), output_token_ids, params, self.eos_token_ids, self.max_model_len)
            if stop is None or stop[0] == "length":  # a stop token is not shown
                stop_string = detokenizer.add(output_token_ids[-1], is_last=stop is not None)
                stop = ("stop", stop_string) if stop_string is not None else stop
            text = detokenizer.take(finished=stop is not None)
            yield CompletionOutput(0, text, output_token_ids[-1:], *(stop or (None, None)))
            if stop:
                return
            first_position += len(new_token_ids)  # decode: only the newest token, at the next position
            new_token_ids = output_token_ids[-1:]


def join_outputs(outputs: list[CompletionOutput]) -> CompletionOutput:
    """Join the pieces of a stream into one answer."""
    return CompletionOutput(
        index=0,
        text="".join(output.text for output in outputs),
        token_ids=[token_id for output in outputs for token_id in output.token_ids],
        finish_reason=outputs[-1].finish_reason,
        stop_reason=outputs[-1].stop_reason,
    )


def sample(logits: Tensor, params: SamplingParams, generator: torch.Generator | None) -> int:
    """Choose a token id. logits: [vocab_size]. Order as in vLLM: temperature, then top-k, then top-p."""
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


def check_stop(
    num_prompt_tokens: int,
    output_token_ids: list[int],
    params: SamplingParams,
    eos_token_ids: frozenset[int],
    max_model_len: int,
) -> tuple[FinishReason, int | str | None] | None:
    """Whether to stop after the newest token: (finish_reason, stop_reason), or None. Based on vLLM's check_stop."""
    num_output_tokens, last = len(output_token_ids), output_token_ids[-1]
    if num_output_tokens >= params.min_tokens:
        if last in eos_token_ids and not params.ignore_eos:
            return "stop", None
        if last in params.stop_token_ids:
            return "stop", last
    if num_output_tokens >= params.max_tokens or num_prompt_tokens + num_output_tokens >= max_model_len:
        return "length", None
    return None
