"""The engine in the API process: requests go to the core's process, tokens come back and are turned into text here."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import deque
from collections.abc import AsyncIterator

from common.checkpoint import load_tokenizer, resolve_checkpoint
from common.outputs import CompletionOutput, join_outputs
from common.sampling_params import SamplingParams
from common.serving import GenerationError, QueueFullError, ShutdownError

from ..config import EngineConfig
from ..core.validation import check_request
from ..kv_params import KV_TRANSFER
from ..messages import (
    AbortRequests,
    AddRequest,
    EngineCoreDead,
    EngineCoreOutput,
    EngineCoreOutputs,
    PrefixCacheReset,
    ResetPrefixCache,
)
from .core_client import SHUTDOWN_TIMEOUT_S
from .data_parallel_client import make_core_client
from .output_processor import OutputProcessor
from .timeline import Observer, RequestTimeline, current_exchange


class RequestStream:
    """One request: read its outputs with `async for` as they arrive. To stop early, call AsyncLLM.abort.

    Outputs that arrive while the reader is busy are joined, so at most one waits (vLLM's RequestOutputCollector).
    """

    def __init__(self, request_id: str, timeline: RequestTimeline) -> None:
        self.request_id, self.timeline = request_id, timeline
        self._output: CompletionOutput | None = None
        self._error: GenerationError | None = None
        self._arrived = asyncio.Event()

    def put(self, output: CompletionOutput | GenerationError) -> None:
        """Pass an output to the reader. Called on the event loop."""
        if isinstance(output, GenerationError):
            self._error = output
        else:
            self._output = output if self._output is None else join_outputs([self._output, output])
        self._arrived.set()

    async def __aiter__(self) -> AsyncIterator[CompletionOutput]:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            output, self._output = self._output, None
            if output is not None:
                yield output
                if output.finish_reason:
                    return
            if self._error is not None:
                raise self._error


class AsyncLLM:
    """LLMEngine in another process. Implements common.serving.ServingEngine.

    Everything here runs on the event loop, so it needs no locks. cause_of_death: why no request can succeed anymore, or
    None. observers: called with the timeline of each request that has ended. Raises FieldError or OSError if the core
    cannot start.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.model_name, self.device = config.served_model_name or config.model, config.device
        self.block_size = config.block_size
        self.kv_transfer_secret = config.kv_transfer_secret if config.kv_connector != "none" else None
        checkpoint = resolve_checkpoint(config.model)
        self.tokenizer, self.default_sampling = load_tokenizer(checkpoint), checkpoint.default_sampling
        self.processor = OutputProcessor(self.tokenizer)
        self.core = make_core_client(config)
        self.limits, self.num_kv_blocks = self.core.ready.limits, self.core.ready.num_kv_blocks
        self.kv_sources, self.kernels = self.core.ready.kv_sources, self.core.ready.kernels
        self.max_model_len, self.vocab_size = self.limits.max_model_len, self.limits.vocab_size
        self.max_request_len = min(self.max_model_len, self.limits.num_kv_tokens + 1)  # the last token is not stored
        self.max_num_unfinished = config.data_parallel_size * config.max_num_seqs + config.max_queued_requests
        self.cause_of_death: str | None = None
        self.observers: list[Observer] = []
        self._streams: dict[str, RequestStream] = {}  # of all unfinished requests
        self._request_ids = map(str, itertools.count())
        self._stats = self.core.ready.stats
        self._resets: deque[asyncio.Future[bool]] = deque()  # answers that the core has not sent yet, in order
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def is_alive(self) -> bool:
        return self.cause_of_death is None

    def why_not_ready(self) -> str | None:
        """Why a new request would be refused; None if it would be queued."""
        if self.cause_of_death is not None:
            return self.cause_of_death
        if len(self._streams) >= self.max_num_unfinished:
            return f"{len(self._streams)} requests are unfinished, which is the limit"
        return None

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.core.watch(self._loop, self._read_outputs, self._core_died)

    def generate(self, prompt_token_ids: list[int], params: SamplingParams) -> RequestStream:
        """Queue a request. Raises FieldError, QueueFullError, or GenerationError if the core is dead."""
        check_request(prompt_token_ids, params, self.limits)
        if self.cause_of_death is not None:
            raise ShutdownError(self.cause_of_death)
        if len(self._streams) >= self.max_num_unfinished:
            limit = "max_num_seqs + max_queued_requests"
            raise QueueFullError(f"{len(self._streams)} requests are unfinished (limit: {limit}), try again later")
        request_id = next(self._request_ids)
        timeline = RequestTimeline(request_id, current_exchange(), len(prompt_token_ids), time.perf_counter())
        stream = self._streams[request_id] = RequestStream(request_id, timeline)
        self.processor.add_request(request_id, prompt_token_ids, params)
        self.core.send(AddRequest(request_id, prompt_token_ids, params, KV_TRANSFER.get()))
        return stream

    def abort(self, stream: RequestStream) -> None:
        """Abort a request. It leaves the engine before the next step. Does nothing if the request has ended."""
        if self._streams.pop(stream.request_id, None) is not None:
            self._ended(stream, "aborted")
            self.processor.remove([stream.request_id])
            self._tell_core_to_abort([stream.request_id])

    async def reset_prefix_cache(self) -> bool:
        """Uncache all blocks. While requests are in the engine, do nothing and return False.

        Raises ShutdownError if the core is dead.
        """
        if self.cause_of_death is not None:
            raise ShutdownError(self.cause_of_death)
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._resets.append(answer)
        self.core.send(ResetPrefixCache())
        return await answer

    def shutdown(self) -> None:
        """Stop the core's process. Unfinished requests get an error. Must not be called on the event loop's thread."""
        if self._loop is not None and self._loop.is_running():
            told = threading.Event()
            self._loop.call_soon_threadsafe(self._die, "the server is shutting down", ShutdownError, told)
            told.wait(SHUTDOWN_TIMEOUT_S)
        self.core.shutdown()

    def stats(self) -> dict[str, float]:
        """Gauges for /metrics, as of the last outputs."""
        num_running = self._stats["num_requests_running"]
        return {**self._stats, "num_requests_waiting": max(0, len(self._streams) - num_running)}

    def _read_outputs(self) -> None:
        for message in self.core.receive():
            match message:
                case EngineCoreDead():
                    self._die(f"the engine core has ended: {message.cause}", GenerationError)
                case PrefixCacheReset():
                    if not (answer := self._resets.popleft()).done():  # the caller may be gone
                        answer.set_result(message.was_reset)
                case EngineCoreOutputs():
                    self._stats = message.stats
                    self._deliver(message.outputs)

    def _core_died(self) -> None:
        self.core.wait_for_messages()
        self._read_outputs()  # its last messages
        self._die(f"the engine core has died ({self.core.describe_exit()})", ShutdownError)  # not by its requests

    def _deliver(self, outputs: list[EngineCoreOutput]) -> None:
        for output in outputs:
            if found := self._streams.get(output.request_id):
                found.timeline.events += output.events
                found.timeline.num_cached_tokens += output.num_cached_tokens or 0
        failed = [output for output in outputs if output.error is not None]
        for output in failed:
            self.processor.remove([output.request_id])
            if stream := self._streams.pop(output.request_id, None):
                self._ended(stream, output.error)
                stream.put(GenerationError(str(output.error)))
        answers, stopped = self.processor.process([output for output in outputs if output.error is None])
        now_s = time.perf_counter()
        for request_id, answer in answers:
            stream = self._streams.pop(request_id) if answer.finish_reason else self._streams[request_id]
            stream.timeline.note(answer, now_s)
            if answer.finish_reason:
                self._ended(stream)
            stream.put(answer)
        self._tell_core_to_abort(stopped)

    def _ended(self, stream: RequestStream, error: str | None = None) -> None:
        stream.timeline.error = error
        for observe in self.observers:
            observe(stream.timeline)

    def _tell_core_to_abort(self, request_ids: list[str]) -> None:
        if request_ids and self.is_alive:
            self.core.send(AbortRequests(request_ids))

    def _die(self, cause: str, kind: type[GenerationError], told: threading.Event | None = None) -> None:
        """From now on, no request can succeed here: all open requests get the cause as their error."""
        if self.cause_of_death is None:
            assert self._loop is not None, "start() was called"
            self.core.unwatch(self._loop)
            self.cause_of_death = cause
        streams, self._streams = self._streams, {}
        self.processor.remove(streams)
        for stream in streams.values():
            self._ended(stream, cause)
            stream.put(kind(cause))
        for answer in self._resets:
            if not answer.done():
                answer.set_exception(kind(cause))
        if told is not None:
            told.set()
