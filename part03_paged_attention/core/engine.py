"""The engine: requests in, tokens out, in static batches over a paged KV cache."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from common.checkpoint import resolve_checkpoint
from common.limits import EngineLimits
from common.outputs import Logprob
from common.sampling_params import SamplingParams

from ..config import EngineConfig, resolve_config
from ..messages import EngineCoreOutput, NewRequest, ScheduledRequest, StepInput, StepOutput
from .block_manager import BlockManager
from .executor import Executor
from .request import Request, RequestStatus, check_stop
from .validation import check_request


class LLMEngine:
    """Static batching: a batch is formed when the previous one has ended, and runs until its longest answer is done.

    add_request() queues a request, step() runs one forward pass of the batch, abort_requests() removes requests
    wherever they are. num_failures: failed steps since the last successful one. num_steps, num_preemptions: totals.
    """

    def __init__(self, config: EngineConfig) -> None:
        checkpoint = resolve_checkpoint(config.model)
        config = resolve_config(config, checkpoint)
        assert config.max_model_len is not None, "resolve_config fills it in"
        self.eos_token_ids = checkpoint.eos_token_ids
        self.max_num_seqs, self.max_num_batched_tokens = config.max_num_seqs, config.max_num_batched_tokens
        self.executor = Executor(config)
        self.blocks = BlockManager(self.executor.num_blocks, config.block_size)
        self.limits = EngineLimits(
            max_model_len=config.max_model_len,
            vocab_size=checkpoint.config.vocab_size,
            num_kv_tokens=(self.blocks.num_blocks - 1) * config.block_size,
            max_prompt_len=config.max_num_batched_tokens,
        )
        self.unfinished = set[str]()  # ids of the requests whose last output has not been returned
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.free_rows = list(reversed(range(config.max_num_seqs)))
        self.num_steps = self.num_preemptions = self.num_failures = 0

    @property
    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting or self.running)

    def add_request(self, request_id: str, prompt_token_ids: list[int], params: SamplingParams) -> None:
        """Queue a request. Raises FieldError as check_request does."""
        check_request(prompt_token_ids, params, self.limits)
        self.unfinished.add(request_id)
        max_num_tokens = min(len(prompt_token_ids) + params.max_tokens, self.limits.max_model_len)
        self.waiting.append(Request(request_id, prompt_token_ids, params, max_num_tokens))

    def abort_requests(self, request_ids: Iterable[str]) -> None:
        """Remove requests and free their blocks. Unknown ids are ignored."""
        wanted = set(request_ids)
        self.unfinished -= wanted
        for request in [request for request in (*self.waiting, *self.running) if request.request_id in wanted]:
            if request.status is RequestStatus.RUNNING:
                self._leave_batch(request)
            else:
                self.waiting.remove(request)
            request.status = RequestStatus.FINISHED_ABORTED

    def fail(self, error: Exception) -> list[EngineCoreOutput]:
        """Call this after a step has raised: every request ends with the error, and all blocks are free again."""
        self.num_failures += 1
        cause = f"{type(error).__name__}: {error}"
        request_ids = sorted(self.unfinished)
        self.abort_requests(request_ids)
        self.blocks.reset()
        return [EngineCoreOutput(request_id, [], error=cause) for request_id in request_ids]

    def step(self) -> list[EngineCoreOutput]:
        """One forward pass. Returns the new token of each request in the batch."""
        step = self._schedule()
        return self._update(self.executor.execute(step)) if step.requests else []

    def _schedule(self) -> StepInput:
        """A new batch computes all tokens of its requests (prefill), a running batch each one's newest (decode)."""
        if self.running:
            self._grow_batch()
            return StepInput([], [self._share(request, request.num_tokens - 1) for request in self.running])
        self._form_batch()
        return StepInput(
            new_requests=[self._describe(request) for request in self.running],
            requests=[self._share(request, 0) for request in self.running],
        )

    def _form_batch(self) -> None:
        """Take as many requests from the head of the queue as batch size, token budget and free blocks allow."""
        # exercise: form_batch
        budget = self.max_num_batched_tokens
        while self.waiting and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            if self.running and request.num_tokens > budget:  # a preempted request may exceed it: it runs alone
                break
            if not self.blocks.admit(request.request_id, request.num_tokens):
                break
            budget -= request.num_tokens
            self.running.append(self.waiting.popleft())
            request.status = RequestStatus.RUNNING
        # exercise: end

    def _grow_batch(self) -> None:
        """Give a block to each request whose newest token needs one; if none is free, preempt the latest request."""
        # exercise: grow_batch
        for request in list(self.running):
            while request in self.running and not self.blocks.grow(request.request_id, request.num_tokens):
                self._preempt(self.running[-1])
        # exercise: end

    def _preempt(self, request: Request) -> None:
        """Free all blocks of a request. It keeps its tokens; a later batch computes their keys and values again."""
        self._leave_batch(request)
        request.status = RequestStatus.PREEMPTED
        self.waiting.appendleft(request)
        self.num_preemptions += 1

    def _leave_batch(self, request: Request) -> None:
        self.running.remove(request)
        self.blocks.free(request.request_id)
        if request.row is not None:
            self.free_rows.append(request.row)
        request.row, request.num_sent_blocks = None, 0

    def _describe(self, request: Request) -> NewRequest:
        """What the worker needs to know about a request that joins the batch."""
        request.row = self.free_rows.pop()
        return NewRequest(request.row, request.token_ids, len(request.prompt_token_ids), request.params)

    def _share(self, request: Request, num_computed_tokens: int) -> ScheduledRequest:
        """The request's share of a step: all its tokens from position num_computed_tokens on."""
        assert request.row is not None, f"request {request.request_id} is not in the batch"
        table = self.blocks.block_tables[request.request_id]
        new_block_ids, request.num_sent_blocks = table[request.num_sent_blocks :], len(table)
        num_scheduled_tokens = request.num_tokens - num_computed_tokens
        return ScheduledRequest(request.row, num_computed_tokens, num_scheduled_tokens, new_block_ids)

    def _update(self, output: StepOutput) -> list[EngineCoreOutput]:
        """Append the sampled tokens. Requests that end leave the batch and free their blocks."""
        self.num_steps, self.num_failures = self.num_steps + 1, 0
        for found in output.prompt_logprobs:
            self.running[found.index].add_prompt_logprobs(found.position, found.logprobs)
        results = zip(list(self.running), output.token_ids, output.logprobs, strict=True)
        outputs = [self._append(request, token_id, logprobs) for request, token_id, logprobs in results]
        self.unfinished.difference_update(output.request_id for output in outputs if output.finish_reason)
        return outputs

    def _append(self, request: Request, token_id: int, logprobs: dict[int, Logprob] | None) -> EngineCoreOutput:
        """Append a request's newest token. A request that ends leaves the batch at once."""
        request.output_token_ids.append(token_id)
        if stop := check_stop(request, self.eos_token_ids):
            request.finish(*stop)
            self._leave_batch(request)
        return EngineCoreOutput(
            request_id=request.request_id,
            token_ids=[token_id],
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            logprobs=None if logprobs is None else [logprobs],
            prompt_logprobs=request.take_prompt_logprobs(),
        )
