"""The engine: requests in, tokens out; several of a request in one step, where they were guessed right."""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from common.checkpoint import Checkpoint, load_tokenizer, resolve_checkpoint
from common.errors import FieldError
from common.outputs import CompletionOutput, FinishReason, RequestOutput
from common.sampling_params import SamplingParams, check_supported, check_vocabulary

from ..api.output_processor import OutputProcessor, join_outputs
from ..config import EngineConfig
from ..messages import EngineCoreOutput, EngineLimits
from ..worker.draft_model import DraftModelProposer
from ..worker.model_runner import ModelRunner
from ..worker.sampler import SamplerOutput
from ..worker.stream import StepHandle
from .block_manager import BlockManager
from .ngram import NgramProposer
from .proposer import Proposer
from .request import Request, RequestStatus
from .scheduler import Scheduler, SchedulerOutput
from .speculation import Speculation
from .step_tracer import StepRecord, StepTracer

SAMPLING_FIELDS = (
    "max_tokens", "min_tokens", "temperature", "top_k", "top_p", "seed", "stop_token_ids", "ignore_eos", "stop",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "logprobs", "cache_salt",
)  # fmt: skip


class StepFailedError(Exception):
    """A step raised; the cause is chained. request_ids: the requests that ended by it. The engine can go on."""

    def __init__(self, request_ids: list[str]) -> None:
        super().__init__(f"a step failed, and {len(request_ids)} requests with it")
        self.request_ids = request_ids


@dataclass(frozen=True, slots=True)
class StepInFlight:
    """A step that was launched and has not been looked at since."""

    scheduled: SchedulerOutput
    handle: StepHandle
    record: StepRecord


class LLMEngine:
    """Continuous batching that runs one step ahead of what it knows.

    add_request() queues, step() launches a forward pass and returns what the one before it brought,
    abort_requests() takes requests out wherever they are. It knows tokens only; OutputProcessor makes text of them.
    """

    def __init__(self, config: EngineConfig) -> None:
        assert config.device is not None, "EngineConfig chooses the device"
        checkpoint = resolve_checkpoint(config.model)
        self.device, self.eos_token_ids = config.device, checkpoint.eos_token_ids
        max_model_len = min(config.max_model_len or checkpoint.max_model_len, checkpoint.max_model_len)
        max_num_batched_tokens = token_budget(config, max_model_len)
        draft = draft_checkpoint(config, checkpoint, max_model_len)
        self.runner = ModelRunner(config, checkpoint, max_model_len, max_num_batched_tokens, draft)
        self.blocks = BlockManager(self.runner.kv_cache.num_blocks, config.block_size, config.enable_prefix_caching)
        self.proposer = make_proposer(config, self.runner)
        num_speculative_tokens = config.num_speculative_tokens if self.proposer else 0
        self.speculation = Speculation(num_speculative_tokens, config.speculative_max_num_seqs)
        self.scheduler = Scheduler(
            self.blocks,
            config.max_num_seqs,
            max_num_batched_tokens,
            enable_chunked_prefill=config.enable_chunked_prefill,
            long_prefill_token_threshold=config.long_prefill_token_threshold,
            speculation=self.speculation,
        )
        capacity = (self.blocks.num_blocks - 1) * self.blocks.block_size
        self.limits = EngineLimits(max_model_len, self.runner.model_config.vocab_size, capacity)
        self.tracer = StepTracer(config.trace, self.scheduler, config.model)
        self.max_steps_in_flight = 2 if config.async_scheduling else 1
        self.in_flight: deque[StepInFlight] = deque()
        self.num_steps = 0

    @property
    def has_unfinished_requests(self) -> bool:
        return self.scheduler.has_unfinished_requests or bool(self.in_flight)

    def add_request(self, request_id: str, prompt_token_ids: list[int], params: SamplingParams) -> None:
        """Queue a request. Raises FieldError as check_request does."""
        check_request(prompt_token_ids, params, self.limits)
        generator = None if params.seed is None else torch.Generator(self.device).manual_seed(params.seed)
        max_num_tokens = min(len(prompt_token_ids) + params.max_tokens, self.limits.max_model_len)
        self.scheduler.add_request(Request(request_id, prompt_token_ids, params, max_num_tokens, generator))

    def abort_requests(self, request_ids: Iterable[str]) -> None:
        """Forget requests and free their blocks. One that has ended is no error."""
        self.tracer.aborted += [request.request_id for request in self.scheduler.abort(request_ids)]

    def step(self) -> list[EngineCoreOutput]:
        """Launch a step, then wait for the one before it. Returns what that brought: nothing, the first time.

        Raises StepFailedError if a step fails.
        """
        self.tracer.begin()
        scheduled = self.scheduler.schedule()
        if scheduled.requests:
            self.in_flight.append(self._launch(scheduled))
            if len(self.in_flight) < self.max_steps_in_flight:
                return []
        return self._update(self.in_flight.popleft()) if self.in_flight else []

    def _launch(self, scheduled: SchedulerOutput) -> StepInFlight:
        self.num_steps += 1
        if self.proposer is not None:
            self.proposer.release(scheduled.left)
        with self._blaming(scheduled, later=[]):
            handle = self.runner.launch(scheduled, self.blocks)
        return StepInFlight(scheduled, handle, self.tracer.launched(scheduled))

    def _update(self, step: StepInFlight) -> list[EngineCoreOutput]:
        """Wait for a step and append its tokens; requests that end leave at once, the others' next ones are guessed."""
        requests = step.scheduled.sampled_requests
        with self._blaming(step.scheduled, later=self.in_flight):
            result = step.handle.result()
            self.tracer.executed(step.record, result)
            outputs = self._append_all(requests, [n for n in step.scheduled.num_sampled_tokens if n], result.sampled)
            self._propose(requests)
            self.tracer.updated(step.record, outputs)
            return outputs
        return []  # it failed, and nobody waited for it

    def _append_all(
        self, requests: list[Request], num_rows: list[int], sampled: SamplerOutput
    ) -> list[EngineCoreOutput]:
        """num_rows: for each request, the rows of the sampled tokens that are its own."""
        outputs, first, token_ids = [], 0, sampled.token_ids.tolist()
        accepted = [0] * len(requests) if sampled.num_accepted is None else sampled.num_accepted.tolist()
        for request, count, num_accepted in zip(requests, num_rows, accepted, strict=True):
            rows = range(first, first + num_accepted + 1)
            if rows[-1] in sampled.generators and request.generator is not None:
                request.generator.set_state(sampled.generators[rows[-1]])  # draws for guesses that fell do not count
            if new := self._append(request, [token_ids[row] for row in rows], count):
                num_top, tensors = request.params.logprobs, sampled.logprobs
                logprobs = None
                if num_top is not None and tensors is not None:
                    logprobs = [tensors.of(row, num_top) for row in rows[: len(new)]]
                is_first = len(request.output_token_ids) == len(new)
                outputs.append(
                    EngineCoreOutput(
                        request.request_id, new, request.finish_reason, request.stop_reason, logprobs,
                        request.num_cached_tokens if is_first else None,
                    )
                )  # fmt: skip
            first += count
        return outputs

    def _propose(self, requests: list[Request]) -> None:
        """Guess the next tokens of those that still run and have nothing in flight."""
        if self.proposer is None:
            return
        chosen, counts = [], []
        for request in requests:
            request.draft_token_ids, request.draft_probs = [], None
            if request.status is not RequestStatus.RUNNING or request.num_output_placeholders:
                continue
            count = self.speculation.num_tokens(request, len(self.scheduler.running))
            count = min(count, request.max_num_tokens - request.num_tokens - 1)
            if count > 0 and self.scheduler.allocate_guesses(request, count - 1):
                chosen.append(request)
                counts.append(count)
        if chosen:
            self.proposer.propose(chosen, counts, self.blocks)

    @contextlib.contextmanager
    def _blaming(self, step: SchedulerOutput, later: Iterable[StepInFlight]) -> Iterator[None]:
        """What fails in here is the end of this step's requests, and of those that build on it. If none is left, nobody
        is told.

        later: the steps that were launched after it.
        """
        failed = [request.request_id for request in step.requests if not request.status.is_finished]
        try:
            yield
        except Exception as error:
            ended = self.scheduler.fail_step(step, [each.scheduled for each in later])
            failed += [request.request_id for request in ended if request.request_id not in failed]
            self.tracer.aborted += failed
            if failed:
                raise StepFailedError(failed) from error

    def reset_prefix_cache(self) -> bool:
        """Forget all that is cached. False, and nothing is forgotten, while requests are in the engine."""
        if self.scheduler.has_unfinished_requests:
            return False
        while self.in_flight:  # a step of requests that have ended: it brings nobody anything
            self._update(self.in_flight.popleft())
        return self.blocks.reset()

    def _append(self, request: Request, token_ids: list[int], num_rows: int) -> list[int]:
        """Put tokens in the placeholders' stead. Returns those that count: none if the request has ended meanwhile, and
        none after one that ends it. num_rows: how many there could have been, had all guesses stood."""
        # exercise: append
        request.num_output_placeholders -= num_rows
        if request.status.is_finished:
            return []
        if request.status is RequestStatus.RUNNING:  # else it was preempted, and computes everything again
            request.num_computed_tokens -= num_rows - len(token_ids)
        self.speculation.judged(request, num_rows - 1, len(token_ids) - 1)
        for position, token_id in enumerate(token_ids):
            request.output_token_ids.append(token_id)
            if stop := check_stop(request, self.eos_token_ids):
                request.finish(*stop)
                self.scheduler.finish(request)
                return token_ids[: position + 1]
        return token_ids
        # exercise: end


def draft_checkpoint(config: EngineConfig, target: Checkpoint, max_model_len: int) -> Checkpoint | None:
    """The draft model, if one guesses. Raises FieldError for one that does not fit the target."""
    if config.speculative_method != "draft_model":
        return None
    try:
        draft = resolve_checkpoint(config.speculative_model)
    except FieldError as error:
        raise FieldError("speculative_model", str(error).removeprefix(f"{error.field}: ")) from None
    if draft.max_model_len < max_model_len:
        sizes = f"{draft.max_model_len} tokens, and max_model_len is {max_model_len}"
        raise FieldError("speculative_model", f"its context has {sizes}: expected at least as many")
    if draft.config.vocab_size != target.config.vocab_size:
        sizes = f"{draft.config.vocab_size} tokens, the target's {target.config.vocab_size}"
        raise FieldError("speculative_model", f"its vocabulary has {sizes}: expected the same tokenizer")
    return draft


def make_proposer(config: EngineConfig, runner: ModelRunner) -> Proposer | None:
    if config.speculative_method == "ngram":
        return NgramProposer(config.prompt_lookup_min, config.prompt_lookup_max)
    if runner.draft_model is not None:
        return DraftModelProposer(runner.draft_model, runner.kv_cache, runner.stream)
    return None


def token_budget(config: EngineConfig, max_model_len: int) -> int:
    """Tokens in a step. Raises FieldError if that is too few for what must fit into one."""
    smallest = config.max_num_seqs
    if not config.enable_chunked_prefill:
        smallest = max(smallest, max_model_len)
    default = 512 if config.device == "cpu" else 2_048
    budget = config.max_num_batched_tokens or max(default, smallest)
    if budget < smallest:
        what = "a token of each of max_num_seqs requests"
        if not config.enable_chunked_prefill:
            what += ", and a whole prompt of max_model_len tokens"
        raise FieldError("max_num_batched_tokens", f"expected at least {smallest}, room for {what}, got {budget}")
    return budget


def check_request(prompt_token_ids: Sequence[int], params: SamplingParams, limits: EngineLimits) -> None:
    """Raises FieldError if the request can never be served."""
    check_supported(params, SAMPLING_FIELDS)
    check_vocabulary(params, limits.vocab_size)
    num_prompt_tokens = len(prompt_token_ids)
    if not num_prompt_tokens:
        raise FieldError("prompt", "expected at least one token, got an empty prompt")
    if min(prompt_token_ids) < 0 or max(prompt_token_ids) >= limits.vocab_size:
        raise FieldError("prompt", f"expected token ids from 0 to {limits.vocab_size - 1} (the vocabulary)")
    if num_prompt_tokens >= limits.max_model_len:
        limit = f"max_model_len is {limits.max_model_len} tokens"
        raise FieldError("prompt", f"{num_prompt_tokens} tokens leave no room for an answer: {limit}")
    num_tokens = min(num_prompt_tokens + params.max_tokens, limits.max_model_len)
    if num_tokens - 1 > limits.num_kv_tokens:  # the last token's key and value are never stored
        raise FieldError(
            "prompt",
            f"{num_prompt_tokens} tokens and an answer of up to {num_tokens - num_prompt_tokens} "
            f"can never fit: the KV cache holds {limits.num_kv_tokens} tokens; lower max_tokens or start with more KV "
            "blocks",
        )


def check_stop(request: Request, eos_token_ids: frozenset[int]) -> tuple[FinishReason, int | None] | None:
    """Why to stop after the newest token: (finish_reason, stop_reason), or None to go on. After vLLM's check_stop."""
    params, last = request.params, request.output_token_ids[-1]
    if len(request.output_token_ids) >= params.min_tokens:
        if last in eos_token_ids and not params.ignore_eos:
            return "stop", None
        if last in params.stop_token_ids:
            return "stop", last
    return ("length", None) if request.num_tokens >= request.max_num_tokens else None


class LLM:
    """The engine for programs without a server: prompts in, answers out, in order."""

    def __init__(self, config: EngineConfig) -> None:
        self.engine, self.max_model_len = (engine := LLMEngine(config)), engine.limits.max_model_len
        self.tokenizer = load_tokenizer(resolve_checkpoint(config.model))
        self.processor = OutputProcessor(self.tokenizer)
        self._request_ids = map(str, itertools.count())  # a step of an earlier call may still be in flight

    def generate(
        self, prompts: Sequence[list[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[RequestOutput]:
        """Answer all prompts. One SamplingParams serves for all, or one for each is given."""
        all_params = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        if len(all_params) != len(prompts):
            raise FieldError("params", f"expected one, or {len(prompts)} (one for each prompt), got {len(all_params)}")
        pieces: dict[str, list[CompletionOutput]] = {next(self._request_ids): [] for _ in prompts}
        for prompt, each in zip(prompts, all_params, strict=True):
            check_request(prompt, each, self.engine.limits)
        try:
            for request_id, prompt, each in zip(pieces, prompts, all_params, strict=True):
                self.processor.add_request(request_id, each)
                self.engine.add_request(request_id, list(prompt), each)
            while self.engine.has_unfinished_requests:
                answers, stopped = self.processor.process(self.engine.step())
                self.engine.abort_requests(stopped)
                for request_id, answer in answers:
                    pieces[request_id].append(answer)
        finally:  # a step that failed, or Ctrl-C, must not leave requests to the next call
            self.engine.abort_requests(pieces)
            self.processor.remove(pieces)
        return [
            RequestOutput(request_id, list(prompt), [join_outputs(outputs)], finished=True)
            for (request_id, outputs), prompt in zip(pieces.items(), prompts, strict=True)
        ]
