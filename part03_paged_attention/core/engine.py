"""The engine: requests in, tokens out, in static batches over a paged KV cache."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from common.checkpoint import load_tokenizer, resolve_checkpoint
from common.errors import FieldError
from common.outputs import CompletionOutput, FinishReason, Logprob, RequestOutput
from common.sampling_params import SamplingParams, check_supported, check_vocabulary

from ..api.detokenizer import IncrementalDetokenizer
from ..config import EngineConfig
from ..worker.model_runner import ModelRunner
from ..worker.sampler import Sampler
from .block_manager import BlockManager
from .request import Request, RequestStatus

SAMPLING_FIELDS = (
    "max_tokens", "min_tokens", "temperature", "top_k", "top_p", "seed", "stop_token_ids", "ignore_eos", "stop",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "logprobs",
)  # fmt: skip


class LLMEngine:
    """Static batches: a batch is formed when the one before has ended, and runs until its last member ends.

    add_request() queues, step() advances the batch by one forward pass and returns a piece of output for each of its
    requests, abort_request() takes a request out wherever it is. num_steps and num_preemptions count.
    """

    def __init__(self, config: EngineConfig) -> None:
        assert config.device is not None, "EngineConfig chooses the device"
        checkpoint = resolve_checkpoint(config.model)
        self.model_name, self.device = config.model, config.device
        self.tokenizer = load_tokenizer(checkpoint)
        self.eos_token_ids = checkpoint.eos_token_ids
        self.max_model_len = min(config.max_model_len or checkpoint.max_model_len, checkpoint.max_model_len)
        self.max_num_seqs, self.max_num_batched_tokens = config.max_num_seqs, config.max_num_batched_tokens
        self.runner = ModelRunner(config, checkpoint)
        self.blocks = BlockManager(self.runner.kv_cache.num_blocks, config.block_size)
        self.sampler = Sampler(self.eos_token_ids)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_steps = self.num_preemptions = 0

    @property
    def vocab_size(self) -> int:
        return self.runner.model_config.vocab_size

    @property
    def num_kv_tokens(self) -> int:
        """What the whole KV pool holds."""
        return (self.blocks.num_blocks - 1) * self.blocks.block_size

    @property
    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting or self.running)

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
        if len(prompt_token_ids) > self.max_num_batched_tokens:
            raise FieldError(
                "prompt", f"expected at most max_num_batched_tokens={self.max_num_batched_tokens} tokens, "
                f"got {len(prompt_token_ids)}"
            )  # fmt: skip

    def add_request(self, request_id: str, prompt_token_ids: list[int], params: SamplingParams) -> None:
        """Queue a request. Raises FieldError as check_request does."""
        self.check_request(prompt_token_ids, params)
        generator = None if params.seed is None else torch.Generator(self.device).manual_seed(params.seed)
        detokenizer = IncrementalDetokenizer(self.tokenizer, params.stop, params.min_tokens)
        self.waiting.append(Request(request_id, prompt_token_ids, params, detokenizer, generator))

    def abort_request(self, request_id: str) -> None:
        """Forget a request and free its blocks. One that has ended is no error."""
        for queue in (self.waiting, self.running):
            for request in [request for request in queue if request.request_id == request_id]:
                queue.remove(request)
                request.status = RequestStatus.FINISHED_ABORTED
                self.blocks.free(request_id)

    def step(self) -> list[tuple[str, CompletionOutput]]:
        """One forward pass. Returns (request_id, its new token and text) for each request of the batch."""
        is_prefill = not self.running
        batch = self._form_batch() if is_prefill else self._grow_batch()
        if not batch:
            return []
        logits = self.runner.execute(batch, is_prefill, self.blocks)
        sampled = self.sampler.sample(logits, batch)
        self.num_steps += 1
        return self._update(batch, sampled.token_ids, sampled.logprobs)

    def _form_batch(self) -> list[Request]:
        """From the head of the queue, as many as max_num_seqs, max_num_batched_tokens and the free blocks allow."""
        # exercise: form_batch
        budget = self.max_num_batched_tokens
        while self.waiting and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            # One that was preempted may have outgrown the budget; alone it is let in.
            if self.running and request.num_tokens > budget:
                break
            if not self.blocks.allocate(request.request_id, request.num_tokens):
                break
            budget -= request.num_tokens
            self.running.append(self.waiting.popleft())
            request.status = RequestStatus.RUNNING
        return list(self.running)
        # exercise: end

    def _grow_batch(self) -> list[Request]:
        """A block for each request that crosses into a new one; if there is none, the latest goes back to the queue."""
        # exercise: grow_batch
        for request in list(self.running):
            while request in self.running and not self.blocks.allocate(request.request_id, request.num_tokens):
                self._preempt(self.running[-1])
        return list(self.running)
        # exercise: end

    def _preempt(self, request: Request) -> None:
        """Take all blocks of a request away. It keeps its tokens; a later batch computes keys and values again."""
        self.running.remove(request)
        self.blocks.free(request.request_id)
        request.status = RequestStatus.WAITING
        self.waiting.appendleft(request)
        self.num_preemptions += 1

    def _update(
        self, batch: list[Request], token_ids: list[int], logprobs: list[dict[int, Logprob] | None]
    ) -> list[tuple[str, CompletionOutput]]:
        """Append the sampled tokens; requests that end leave the batch and give their blocks back."""
        outputs = []
        for request, token_id, logprob in zip(batch, token_ids, logprobs, strict=True):
            text = self._append(request, token_id)
            output = CompletionOutput(0, text, [token_id], request.finish_reason, request.stop_reason)
            outputs.append((request.request_id, output if logprob is None else _with_logprobs(output, logprob)))
            if request.status.is_finished:
                self.running.remove(request)
                self.blocks.free(request.request_id)
        return outputs

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


def _with_logprobs(output: CompletionOutput, logprobs: dict[int, Logprob]) -> CompletionOutput:
    return CompletionOutput(
        output.index, output.text, output.token_ids, output.finish_reason, output.stop_reason, [logprobs]
    )


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
            for request_id in pieces:
                self.engine.abort_request(request_id)
        return [
            RequestOutput(request_id, list(prompt), [join_outputs(outputs)], finished=True)
            for (request_id, outputs), prompt in zip(pieces.items(), prompts, strict=True)
        ]
