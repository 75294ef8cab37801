"""The engine: requests in, tokens out. Every step has its own batch."""

from __future__ import annotations

from collections.abc import Iterable

from common.checkpoint import resolve_checkpoint
from common.limits import EngineLimits
from common.outputs import Logprob
from common.sampling_params import SamplingParams

from ..config import EngineConfig, resolve_config
from ..messages import EngineCoreOutput, StepOutput
from .block_manager import BlockManager
from .executor import Executor
from .request import Request, check_stop
from .scheduler import Scheduler, SchedulerOutput
from .step_tracer import StepTracer
from .validation import check_request


class LLMEngine:
    """Continuous batching: the scheduler forms a new batch before every step.

    add_request() queues a request, step() runs one forward pass, abort_requests() removes requests wherever they are.
    num_failures: failed steps since the last successful one.
    """

    def __init__(self, config: EngineConfig) -> None:
        checkpoint = resolve_checkpoint(config.model)
        config = resolve_config(config, checkpoint)
        assert config.max_model_len and config.max_num_batched_tokens, "resolve_config fills them in"
        self.eos_token_ids = checkpoint.eos_token_ids
        self.executor = Executor(config)
        self.blocks = BlockManager(self.executor.num_blocks, config.block_size)
        self.scheduler = Scheduler(self.blocks, config.max_num_seqs, config.max_num_batched_tokens)
        self.limits = EngineLimits(
            max_model_len=config.max_model_len, vocab_size=checkpoint.config.vocab_size,
            num_kv_tokens=(self.blocks.num_blocks - 1) * config.block_size,
        )  # fmt: skip
        self.tracer = StepTracer(config.trace, self.scheduler, config.model)
        self.unfinished = set[str]()  # ids of the requests whose last output has not been returned
        self.num_steps = self.num_failures = 0

    @property
    def has_unfinished_requests(self) -> bool:
        return self.scheduler.has_unfinished_requests

    def add_request(self, request_id: str, prompt_token_ids: list[int], params: SamplingParams) -> None:
        """Queue a request. Raises FieldError as check_request does."""
        check_request(prompt_token_ids, params, self.limits)
        self.unfinished.add(request_id)
        max_num_tokens = min(len(prompt_token_ids) + params.max_tokens, self.limits.max_model_len)
        self.scheduler.add_request(Request(request_id, prompt_token_ids, params, max_num_tokens))

    def abort_requests(self, request_ids: Iterable[str]) -> None:
        """Remove requests and free their blocks. Unknown ids are ignored."""
        request_ids = list(request_ids)
        self.unfinished.difference_update(request_ids)
        self.tracer.aborted += [request.request_id for request in self.scheduler.abort(request_ids)]

    def fail(self, error: Exception) -> list[EngineCoreOutput]:
        """Call this after a step has raised: every request ends with the error, and all blocks are free again."""
        self.num_failures += 1
        cause = f"{type(error).__name__}: {error}"
        self.scheduler.reset()
        request_ids, self.unfinished = sorted(self.unfinished), set()
        self.tracer.aborted += request_ids
        return [EngineCoreOutput(request_id, [], error=cause) for request_id in request_ids]

    def step(self) -> list[EngineCoreOutput]:
        """One forward pass. Returns the new token of each request in it."""
        if not self.has_unfinished_requests:
            return []
        self.tracer.begin()
        scheduled = self.scheduler.schedule()
        self.tracer.scheduled(scheduled)
        output = self.executor.execute(scheduled.step)
        self.tracer.executed()
        outputs = self._update(scheduled, output)
        self.tracer.updated(outputs)
        self.unfinished.difference_update(output.request_id for output in outputs if output.finish_reason)
        return outputs

    def _update(self, scheduled: SchedulerOutput, output: StepOutput) -> list[EngineCoreOutput]:
        """Append the sampled tokens. Requests that end leave the batch at once."""
        self.num_steps, self.num_failures = self.num_steps + 1, 0
        for found in output.prompt_logprobs:
            scheduled.requests[found.index].add_prompt_logprobs(found.position, found.logprobs)
        results = zip(scheduled.requests, output.token_ids, output.logprobs, strict=True)
        return [self._append(request, token_id, logprobs) for request, token_id, logprobs in results]

    def _append(self, request: Request, token_id: int, logprobs: dict[int, Logprob] | None) -> EngineCoreOutput:
        """Append a request's newest token. A request that ends leaves the batch at once."""
        # exercise: append
        request.num_computed_tokens = request.num_tokens
        request.output_token_ids.append(token_id)
        if stop := check_stop(request, self.eos_token_ids):
            request.finish(*stop)
            self.scheduler.finish(request)
        # exercise: end
        return EngineCoreOutput(
            request_id=request.request_id, token_ids=[token_id], finish_reason=request.finish_reason,
            stop_reason=request.stop_reason, logprobs=None if logprobs is None else [logprobs],
            prompt_logprobs=request.take_prompt_logprobs(),
        )  # fmt: skip
