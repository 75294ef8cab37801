"""The engine: requests in, tokens out; every step its own batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from common.checkpoint import load_tokenizer, resolve_checkpoint
from common.errors import FieldError
from common.outputs import CompletionOutput, FinishReason, RequestOutput
from common.sampling_params import SamplingParams, check_supported, check_vocabulary

from ..api.detokenizer import IncrementalDetokenizer
from ..config import EngineConfig
from ..worker.model_runner import ModelRunner
from ..worker.sampler import Sampler, SamplerOutput
from .block_manager import BlockManager
from .request import Request
from .scheduler import Scheduler, SchedulerOutput
from .step_tracer import StepTracer

SAMPLING_FIELDS = (
    "max_tokens", "min_tokens", "temperature", "top_k", "top_p", "seed", "stop_token_ids", "ignore_eos", "stop",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "logprobs",
)  # fmt: skip


class LLMEngine:
    """Continuous batching: before every step it is decided anew who is in it.

    add_request() queues, step() runs one forward pass and returns a piece of output for each request in it,
    abort_requests() takes requests out wherever they are.
    """

    def __init__(self, config: EngineConfig) -> None:
        assert config.device is not None, "EngineConfig chooses the device"
        checkpoint = resolve_checkpoint(config.model)
        self.model_name, self.device = config.model, config.device
        self.tokenizer = load_tokenizer(checkpoint)
        self.eos_token_ids = checkpoint.eos_token_ids
        self.max_model_len = min(config.max_model_len or checkpoint.max_model_len, checkpoint.max_model_len)
        self.max_num_batched_tokens = config.max_num_batched_tokens or max(2_048, self.max_model_len)
        if self.max_num_batched_tokens < self.max_model_len:
            raise FieldError(
                "max_num_batched_tokens",
                f"expected at least max_model_len={self.max_model_len}, since a prompt is computed in one step, "
                f"got {self.max_num_batched_tokens}",
            )
        self.runner = ModelRunner(config, checkpoint, self.max_num_batched_tokens)
        self.blocks = BlockManager(self.runner.kv_cache.num_blocks, config.block_size)
        self.scheduler = Scheduler(self.blocks, config.max_num_seqs, self.max_num_batched_tokens)
        self.sampler = Sampler(self.eos_token_ids)
        self.tracer = StepTracer(config.trace, self.scheduler, config.model)
        self.num_steps = 0

    @property
    def vocab_size(self) -> int:
        return self.runner.model_config.vocab_size

    @property
    def num_kv_tokens(self) -> int:
        """What the whole KV pool holds."""
        return (self.blocks.num_blocks - 1) * self.blocks.block_size

    @property
    def has_unfinished_requests(self) -> bool:
        return self.scheduler.has_unfinished_requests

    def check_request(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """Raises FieldError if the request can never be served."""
        check_supported(params, SAMPLING_FIELDS)
        check_vocabulary(params, self.vocab_size)
        if not prompt_token_ids:
            raise FieldError("prompt", "expected at least one token, got an empty prompt")
        if min(prompt_token_ids) < 0 or max(prompt_token_ids) >= self.vocab_size:
            raise FieldError("prompt", f"expected token ids from 0 to {self.vocab_size - 1} (the vocabulary)")
        if len(prompt_token_ids) >= self.max_model_len:
            limit = f"max_model_len is {self.max_model_len} tokens"
            raise FieldError("prompt", f"{len(prompt_token_ids)} tokens leave no room for an answer: {limit}")
        num_tokens = min(len(prompt_token_ids) + params.max_tokens, self.max_model_len)
        if num_tokens - 1 > self.num_kv_tokens:  # the last token's key and value are never stored
            raise FieldError(
                "prompt",
                f"{len(prompt_token_ids)} tokens and an answer of up to {num_tokens - len(prompt_token_ids)} "
                f"can never fit: the KV cache holds {self.num_kv_tokens} tokens; lower max_tokens or start with more "
                "KV blocks",
            )

    def add_request(self, request_id: str, prompt_token_ids: list[int], params: SamplingParams) -> None:
        """Queue a request. Raises FieldError as check_request does."""
        self.check_request(prompt_token_ids, params)
        generator = None if params.seed is None else torch.Generator(self.device).manual_seed(params.seed)
        detokenizer = IncrementalDetokenizer(self.tokenizer, params.stop, params.min_tokens)
        self.scheduler.add_request(Request(request_id, prompt_token_ids, params, detokenizer, generator))

    def abort_requests(self, request_ids: Iterable[str]) -> None:
        """Forget requests and free their blocks. One that has ended is no error."""
        self.tracer.aborted += [request.request_id for request in self.scheduler.abort(request_ids)]

    def step(self) -> list[tuple[str, CompletionOutput]]:
        """One forward pass. Returns (request_id, its new token and text) for each request in it."""
        if not self.has_unfinished_requests:
            return []
        self.tracer.begin()
        scheduled = self.scheduler.schedule()
        self.tracer.scheduled(scheduled)
        sampled = self._execute(scheduled)
        self.tracer.executed()
        outputs = self._update(scheduled, sampled)
        self.tracer.updated(outputs)
        return outputs

    def _execute(self, scheduled: SchedulerOutput) -> SamplerOutput:
        self.num_steps += 1
        logits = self.runner.execute(scheduled.requests, self.blocks)
        return self.sampler.sample(logits, scheduled.requests)

    def _update(self, scheduled: SchedulerOutput, sampled: SamplerOutput) -> list[tuple[str, CompletionOutput]]:
        """Append the sampled tokens; requests that end leave at once."""
        # exercise: update
        outputs = []
        for request, token_id, logprob in zip(scheduled.requests, sampled.token_ids, sampled.logprobs, strict=True):
            request.num_computed_tokens = request.num_tokens
            text = self._append(request, token_id)
            logprobs = None if logprob is None else [logprob]
            output = CompletionOutput(0, text, [token_id], request.finish_reason, request.stop_reason, logprobs)
            outputs.append((request.request_id, output))
            if request.status.is_finished:
                self.scheduler.finish(request)
        return outputs
        # exercise: end

    def _append(self, request: Request, token_id: int) -> str:
        """Add a token, decide whether it ends the request, and return the text that can now be shown."""
        request.output_token_ids.append(token_id)
        stop = check_stop(request, self.eos_token_ids, self.max_model_len)
        if stop is None or stop[0] == "length":  # a stop token is not shown
            stop_string = request.detokenizer.add(token_id, is_last=stop is not None)
            stop = ("stop", stop_string) if stop_string is not None else stop
        if stop:
            request.finish(*stop)
        return request.detokenizer.take(finished=stop is not None)


def check_stop(
    request: Request, eos_token_ids: frozenset[int], max_model_len: int
) -> tuple[FinishReason, int | str | None] | None:
    """Why to stop after the newest token: (finish_reason, stop_reason), or None to go on. After vLLM's check_stop."""
    params, num_output_tokens, last = request.params, len(request.output_token_ids), request.output_token_ids[-1]
    if num_output_tokens >= params.min_tokens:
        if last in eos_token_ids and not params.ignore_eos:
            return "stop", None
        if last in params.stop_token_ids:
            return "stop", last
    if num_output_tokens >= params.max_tokens or request.num_tokens >= max_model_len:
        return "length", None
    return None


def join_outputs(outputs: list[CompletionOutput]) -> CompletionOutput:
    """One answer out of the pieces of a stream."""
    logprobs = [entry for output in outputs for entry in output.logprobs or []]
    return CompletionOutput(
        index=0,
        text="".join(output.text for output in outputs),
        token_ids=[token_id for output in outputs for token_id in output.token_ids],
        finish_reason=outputs[-1].finish_reason,
        stop_reason=outputs[-1].stop_reason,
        logprobs=logprobs or None,
    )


class LLM:
    """The engine for programs without a server: prompts in, answers out, in order."""

    def __init__(self, config: EngineConfig) -> None:
        self.engine = LLMEngine(config)
        self.tokenizer, self.max_model_len = self.engine.tokenizer, self.engine.max_model_len

    def generate(
        self, prompts: Sequence[list[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[RequestOutput]:
        """Answer all prompts. One SamplingParams serves for all, or one for each is given."""
        all_params = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        if len(all_params) != len(prompts):
            raise FieldError("params", f"expected one, or {len(prompts)} (one for each prompt), got {len(all_params)}")
        pieces: dict[str, list[CompletionOutput]] = {str(number): [] for number in range(len(prompts))}
        for prompt, each in zip(prompts, all_params, strict=True):
            self.engine.check_request(prompt, each)
        try:
            for request_id, prompt, each in zip(pieces, prompts, all_params, strict=True):
                self.engine.add_request(request_id, list(prompt), each)
            while self.engine.has_unfinished_requests:
                for request_id, output in self.engine.step():
                    pieces[request_id].append(output)
        finally:  # a step that failed, or Ctrl-C, must not leave requests to the next call
            self.engine.abort_requests(pieces)
        return [
            RequestOutput(request_id, list(prompt), [join_outputs(outputs)], finished=True)
            for (request_id, outputs), prompt in zip(pieces.items(), prompts, strict=True)
        ]
