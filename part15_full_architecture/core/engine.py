"""The engine: requests in, tokens out. A step may produce several tokens for a request."""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from common.checkpoint import resolve_checkpoint
from common.limits import EngineLimits
from common.sampling_params import SamplingParams
from common.trace import StepTrace

from ..config import EngineConfig, resolve_config
from ..messages import CoreGroup, EngineCoreOutput, KVTransferParams, ScheduledRequest, StepOutput
from .block_manager import BlockManager
from .executor import StepHandle, make_executor
from .kv_connector import Connectors, Orders
from .kv_transfer import KVTransfer
from .lockstep import Lockstep
from .offload import Offloader
from .request import Request, RequestStatus, check_stop
from .scheduler import Scheduler, SchedulerOutput
from .speculation import Speculation
from .step_tracer import StepTracer
from .validation import check_request

MIN_TOKENS_MEASURED = 16  # per request, in a step whose speed is that of prompts
TRANSFER_WAIT_S = 0.005  # how long step() waits for transfers if there is nothing else to do; a request may come


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
    text. num_failures: failed steps since the last successful one. cores: those whose ranks share experts with this
    one's; then lockstep says when to take dummy steps.
    """

    def __init__(self, config: EngineConfig, cores: CoreGroup | None = None) -> None:
        checkpoint = resolve_checkpoint(config.model)
        config = resolve_config(config, checkpoint)
        assert config.max_model_len and config.max_num_batched_tokens, "resolve_config fills them in"
        self.eos_token_ids = checkpoint.eos_token_ids
        self.executor = make_executor(config, cores)
        self.lockstep = None if cores is None else Lockstep()
        self.blocks = BlockManager(
            self.executor.num_blocks, config.block_size, config.enable_prefix_caching, config.prefix_caching_hash_seed
        )
        self.orders = Orders()
        self.transfers = KVTransfer(self.blocks, self.orders, config.kv_load_failure_policy == "fail")
        self.offloader = Offloader(self.blocks, self.orders, self.executor.num_host_blocks, config.has_kv_tiers)
        self.connector = Connectors([self.transfers, self.offloader])
        self.speculation = Speculation(config)
        self.scheduler = Scheduler(
            self.blocks, config.max_num_seqs, config.max_num_batched_tokens,
            enable_chunked_prefill=config.enable_chunked_prefill,
            long_prefill_token_threshold=config.long_prefill_token_threshold, speculation=self.speculation,
            num_stages=config.pipeline_parallel_size, connector=self.connector,
        )  # fmt: skip
        self.limits = EngineLimits(
            max_model_len=config.max_model_len, vocab_size=checkpoint.config.vocab_size,
            num_kv_tokens=(self.blocks.num_blocks - 1) * config.block_size,
        )  # fmt: skip
        self.tracer = StepTracer(config.trace, self.scheduler, config.model)
        self.expert_balance = (1.0, 1.0)  # before and after the last placement
        self.eplb_step_interval = config.eplb_step_interval if config.enable_eplb else sys.maxsize
        self.max_steps_in_flight = max(2 if config.async_scheduling else 1, config.pipeline_parallel_size)
        self.in_flight: deque[StepInFlight] = deque()
        self.unfinished = set[str]()  # ids of the requests whose last output has not been returned
        self.num_steps = self.num_failures = 0

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether step() must be called: for requests of its own, for transfers, or for requests of other cores."""
        is_busy = self.scheduler.has_unfinished_requests or bool(self.in_flight) or self.connector.is_busy
        return is_busy or bool(self.orders.new or self.orders.pending) or self.takes_part

    @property
    def takes_part(self) -> bool:
        """Whether steps must be taken, with requests or without."""
        return self.lockstep is not None and self.lockstep.is_running

    def add_request(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams,
        kv_transfer: KVTransferParams | None = None,
    ) -> None:  # fmt: skip
        """Queue a request. kv_transfer: where its KV comes from, or that it is for another engine. Raises FieldError as
        check_request does."""
        check_request(prompt_token_ids, params, self.limits)
        self.unfinished.add(request_id)
        max_num_tokens = min(len(prompt_token_ids) + params.max_tokens, self.limits.max_model_len)
        request = Request(request_id, prompt_token_ids, params, max_num_tokens, kv_transfer=kv_transfer)
        request.note("queued")
        self.scheduler.add_request(request)

    def abort_requests(self, request_ids: Iterable[str]) -> None:
        """Remove requests and free their blocks. Unknown ids are ignored."""
        request_ids = list(request_ids)
        self.unfinished.difference_update(request_ids)
        self.tracer.aborted += [request.request_id for request in self.scheduler.abort(request_ids)]

    def fail(self, error: Exception) -> list[EngineCoreOutput]:
        """Call this after a step has raised: the steps in flight are dropped, every request ends with the error, and
        once the transfers have ended, all blocks are free again."""
        for step in self.in_flight:
            with contextlib.suppress(Exception):  # one error is enough
                step.handle.result()
        self.in_flight.clear()
        self.num_failures += 1
        cause = f"{type(error).__name__}: {error}"
        self.scheduler.reset()
        self.connector.reset()
        self.orders.drop_copies()
        self._finish_transfers()
        request_ids, self.unfinished = sorted(self.unfinished), set()
        self.tracer.aborted += request_ids
        return [EngineCoreOutput(request_id, [], error=cause) for request_id in request_ids]

    def reset_prefix_cache(self) -> bool:
        """Uncache all blocks on the device; copies in slower memory stay, as in vLLM. While requests are in the engine,
        do nothing and return False."""
        if self.scheduler.has_unfinished_requests:
            return False
        try:
            while self.in_flight:  # a step whose requests have all ended
                self._update(self.in_flight.popleft())
        except Exception as error:
            self.fail(error)  # no request is left to report it to
        self.transfers.reset()
        self._finish_transfers()
        self.blocks.reset()
        return True

    def shutdown(self) -> None:
        """Write the rest of the trace, and end the processes of other ranks. Nothing may be called afterwards."""
        self.tracer.close()
        self.executor.shutdown()

    def step(self) -> list[EngineCoreOutput]:
        """Launch a step, then wait for the previous one, or the other way round if the new step depends on the previous
        step's tokens. Returns the tokens of the step that was waited for: none the first time."""
        outputs = []
        if self.in_flight and not self.scheduler.can_run_ahead():
            outputs = self._update(self.in_flight.popleft())
        self._note_transfers()
        outputs += self._fail_unloaded()
        is_launched = self._schedule()
        if self.in_flight and (len(self.in_flight) == self.max_steps_in_flight or not is_launched):
            outputs += self._update(self.in_flight.popleft())
        self._start_saves()
        if not is_launched and not outputs:
            self._note_transfers(TRANSFER_WAIT_S)
        outputs += self._fail_unloaded()
        self.unfinished.difference_update(output.request_id for output in outputs if output.finish_reason)
        return outputs

    def _schedule(self) -> bool:
        """Schedule a step and launch it. Returns False if there is nothing to compute."""
        self.tracer.begin()
        scheduled = self.scheduler.schedule()
        self._start_transfers()  # before the launch: loads need not wait for this step
        is_launched = bool(scheduled.requests) or self.takes_part
        if is_launched:
            self.in_flight.append(self._launch(scheduled))
        return is_launched

    def _launch(self, scheduled: SchedulerOutput) -> StepInFlight:
        if self.num_steps and self.num_steps % self.eplb_step_interval == 0:
            self.expert_balance = self.executor.balance_experts() or self.expert_balance
        self.num_steps += 1
        if self.lockstep is not None:
            scheduled.step.has_requests = self.lockstep.begin_step(self.scheduler.has_unfinished_requests)
        handle = self.executor.launch(scheduled.step)
        self.connector.note_launch()
        return StepInFlight(scheduled, handle, self.tracer.launched(scheduled))

    def _update(self, step: StepInFlight) -> list[EngineCoreOutput]:
        """Wait for a step and append its tokens. Requests that end leave the batch at once."""
        output = step.handle.result()
        self.num_failures = 0
        self.connector.note_result()
        self._measure(step, output)
        if self.lockstep is not None and output.any_has_requests is not None:
            self.lockstep.note_answer(output.any_has_requests)
        self.tracer.executed(step.trace, output)
        for found in output.prompt_logprobs:
            step.scheduled.requests[found.index].add_prompt_logprobs(found.position, found.logprobs)
        sampled = [pair for pair in step.scheduled.pairs if pair[1].is_sampled]
        outputs = [
            appended
            for index, (request, share) in enumerate(sampled)
            if (appended := self._append(request, share, output, index))
        ]
        self.tracer.updated(step.trace, outputs)
        return outputs

    def _measure(self, step: StepInFlight, output: StepOutput) -> None:
        """How fast prompts are computed, from a step that computes mostly prompts."""
        num_tokens = step.scheduled.total_num_scheduled_tokens
        if num_tokens >= MIN_TOKENS_MEASURED * max(1, len(step.scheduled.requests)):
            self.offloader.cost.compute.add(num_tokens, output.end_s - output.start_s)

    def _start_transfers(self) -> None:
        """Send the worker the transfers that may begin."""
        while self.orders.new:
            self.executor.transfer(self.orders.new[0])
            self.orders.new.popleft()  # not before: if it fails, the worker hasn't got it

    def _start_saves(self) -> None:
        """The same, when steps have succeeded, or none is in flight."""
        if not self.in_flight:
            self.connector.note_launch()
            self.connector.note_result()
        self._start_transfers()

    def _note_transfers(self, timeout_s: float = 0.0) -> None:
        """Note the transfers that have ended. If none has, wait for one for so long."""
        if self.orders.pending:
            for done in self.executor.finished_transfers(timeout_s):
                pending = self.orders.note_done(done)
                self.tracer.transferred(pending.transfer, pending.request, done)

    def _finish_transfers(self) -> None:
        """No step is in flight: wait until no transfer is, either."""
        self._start_saves()
        while self.orders.pending:
            self._note_transfers(TRANSFER_WAIT_S)

    def _fail_unloaded(self) -> list[EngineCoreOutput]:
        """End the requests whose KV has not arrived, if they are not to be computed here."""
        if not self.transfers.failed:
            return []
        failed, self.transfers.failed = self.transfers.failed, []
        failed = [(request, error) for request, error in failed if request.request_id in self.unfinished]
        self.abort_requests(request.request_id for request, _ in failed)
        return [EngineCoreOutput(request.request_id, [], error=f"its KV has not arrived: {e}") for request, e in failed]

    def _append(
        self, request: Request, share: ScheduledRequest, output: StepOutput, index: int
    ) -> EngineCoreOutput | None:
        """Replace a request's placeholders with its tokens. Returns None if it has ended: then they are dropped.

        share: what it computed in the step; index: where its results are in the output.
        """
        token_ids, num_drafts = output.token_ids[index], len(share.draft_token_ids)
        request.num_output_placeholders -= 1 + num_drafts
        if request.status.is_finished:
            return None
        self.speculation.verified(request, num_drafts, len(token_ids) - 1)
        if request.status is RequestStatus.RUNNING:  # else it was preempted and will be computed again
            request.num_computed_tokens -= 1 + num_drafts - len(token_ids)  # minus rejected draft tokens
            request.draft_token_ids = output.draft_token_ids[index]
            request.num_pending_drafts -= share.num_next_drafts  # a later step may propose some too
        is_first = not request.output_token_ids
        token_ids = self._append_until_stop(request, token_ids)
        logprobs = output.logprobs[index]
        return EngineCoreOutput(
            request_id=request.request_id, token_ids=token_ids, finish_reason=request.finish_reason,
            stop_reason=request.stop_reason, logprobs=None if logprobs is None else logprobs[: len(token_ids)],
            prompt_logprobs=request.take_prompt_logprobs(),
            num_cached_tokens=request.num_cached_tokens if is_first else None,
            events=request.take_events(),
        )  # fmt: skip

    def _append_until_stop(self, request: Request, token_ids: list[int]) -> list[int]:
        """Append tokens until one of them ends the request, and drop the rest. Returns the appended tokens."""
        for num_appended, token_id in enumerate(token_ids, start=1):
            request.output_token_ids.append(token_id)
            if stop := check_stop(request, self.eos_token_ids):
                request.finish(*stop)
                self.scheduler.finish(request)
                return token_ids[:num_appended]
        return token_ids
