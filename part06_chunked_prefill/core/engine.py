"""The engine: requests in, tokens out. Long prompts are computed in chunks beside the decodes."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from common.checkpoint import resolve_checkpoint
from common.limits import EngineLimits
from common.outputs import Logprob
from common.sampling_params import SamplingParams
from common.trace import StepTrace

from ..config import EngineConfig, resolve_config
from ..messages import EngineCoreOutput
from .block_manager import BlockManager
from .executor import Executor, StepHandle
from .request import Request, check_stop
from .scheduler import Scheduler, SchedulerOutput
from .step_tracer import StepTracer
from .validation import check_request


@dataclass(frozen=True, slots=True)
class StepInFlight:
    """A step that was launched and whose result has not been read."""

    scheduled: SchedulerOutput
    handle: StepHandle
    trace: StepTrace | None


class LLMEngine:
    """Continuous batching that runs one step ahead of its results.

    add_request() queues a request, step() launches a forward pass and returns the tokens of the previous one,
    abort_requests() removes requests wherever they are. The engine handles only tokens; OutputProcessor turns them into
    text. num_failures: failed steps since the last successful one.
    """

    def __init__(self, config: EngineConfig) -> None:
        checkpoint = resolve_checkpoint(config.model)
        config = resolve_config(config, checkpoint)
        assert config.max_model_len and config.max_num_batched_tokens, "resolve_config fills them in"
        self.eos_token_ids = checkpoint.eos_token_ids
        self.executor = Executor(config)
        self.blocks = BlockManager(self.executor.num_blocks, config.block_size)
        self.scheduler = Scheduler(
            self.blocks, config.max_num_seqs, config.max_num_batched_tokens,
            enable_chunked_prefill=config.enable_chunked_prefill,
            long_prefill_token_threshold=config.long_prefill_token_threshold,
        )  # fmt: skip
        self.limits = EngineLimits(
            max_model_len=config.max_model_len, vocab_size=checkpoint.config.vocab_size,
            num_kv_tokens=(self.blocks.num_blocks - 1) * config.block_size,
        )  # fmt: skip
        self.tracer = StepTracer(config.trace, self.scheduler, config.model)
        self.max_steps_in_flight = 2 if config.async_scheduling else 1
        self.in_flight: deque[StepInFlight] = deque()
        self.unfinished = set[str]()  # ids of the requests whose last output has not been returned
        self.num_steps = self.num_failures = 0

    @property
    def has_unfinished_requests(self) -> bool:
        return self.scheduler.has_unfinished_requests or bool(self.in_flight)

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
        """Call this after a step has raised: the steps in flight are dropped, every request ends with the error, and
        all blocks are free again."""
        for step in self.in_flight:
            with contextlib.suppress(Exception):  # one error is enough
                step.handle.result()
        self.in_flight.clear()
        self.num_failures += 1
        cause = f"{type(error).__name__}: {error}"
        self.scheduler.reset()
        request_ids, self.unfinished = sorted(self.unfinished), set()
        self.tracer.aborted += request_ids
        return [EngineCoreOutput(request_id, [], error=cause) for request_id in request_ids]

    def step(self) -> list[EngineCoreOutput]:
        """Launch a step, then wait for the previous one. Returns the previous step's tokens: none the first time."""
        self.tracer.begin()
        scheduled = self.scheduler.schedule()
        if scheduled.requests:
            self.in_flight.append(self._launch(scheduled))
            if len(self.in_flight) < self.max_steps_in_flight:
                return []
        return self._update(self.in_flight.popleft()) if self.in_flight else []

    def _launch(self, scheduled: SchedulerOutput) -> StepInFlight:
        self.num_steps += 1
        handle = self.executor.launch(scheduled.step)
        return StepInFlight(scheduled, handle, self.tracer.launched(scheduled))

    def _update(self, step: StepInFlight) -> list[EngineCoreOutput]:
        """Wait for a step and append its tokens. Requests that end leave the batch at once."""
        output = step.handle.result()
        self.num_failures = 0
        self.tracer.executed(step.trace, output)
        for found in output.prompt_logprobs:
            step.scheduled.requests[found.index].add_prompt_logprobs(found.position, found.logprobs)
        results = zip(step.scheduled.sampled_requests, output.token_ids, output.logprobs, strict=True)
        outputs = [appended for result in results if (appended := self._append(*result))]
        self.tracer.updated(step.trace, outputs)
        self.unfinished.difference_update(output.request_id for output in outputs if output.finish_reason)
        return outputs

    def _append(self, request: Request, token_id: int, logprobs: dict[int, Logprob] | None) -> EngineCoreOutput | None:
        """Replace a placeholder with its token. Returns None if the request has ended: then the token is dropped."""
        request.num_output_placeholders -= 1
        if request.status.is_finished:
            return None
        request.output_token_ids.append(token_id)
        if stop := check_stop(request, self.eos_token_ids):
            request.finish(*stop)
            self.scheduler.finish(request)
        return EngineCoreOutput(
            request_id=request.request_id, token_ids=[token_id], finish_reason=request.finish_reason,
            stop_reason=request.stop_reason, logprobs=None if logprobs is None else [logprobs],
            prompt_logprobs=request.take_prompt_logprobs(),
        )  # fmt: skip
