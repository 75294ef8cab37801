"""The engine in its own thread: requests come from the event loop, outputs go back to it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import AsyncIterator

from common.checkpoint import load_tokenizer, resolve_checkpoint
from common.outputs import CompletionOutput, join_outputs
from common.sampling_params import SamplingParams
from common.serving import GenerationError, QueueFullError, ShutdownError

from ..config import EngineConfig
from ..core.engine import LLMEngine
from ..core.validation import check_request
from ..messages import EngineCoreOutput
from .output_processor import OutputProcessor


class RequestStream:
    """One request: read its outputs with `async for` as they arrive. To stop early, call AsyncLLM.abort.

    Outputs that arrive while the reader is busy are joined, so at most one waits (vLLM's RequestOutputCollector).
    """

    def __init__(self, request_id: str, prompt_token_ids: list[int], params: SamplingParams) -> None:
        self.request_id, self.prompt_token_ids, self.params = request_id, prompt_token_ids, params
        self._loop = asyncio.get_running_loop()
        self._output: CompletionOutput | None = None
        self._error: GenerationError | None = None
        self._arrived = asyncio.Event()

    def put(self, output: CompletionOutput | GenerationError) -> None:
        """Pass an output from the engine's thread to the event loop's."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, so there is no reader
            self._loop.call_soon_threadsafe(self._keep, output)

    def _keep(self, output: CompletionOutput | GenerationError) -> None:
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
    """LLMEngine for an asyncio server. Only the engine's thread touches the engine.

    Requests and aborts wait in an inbox until the current step has ended. Implements common.serving.ServingEngine.
    cause_of_death: why no request can succeed anymore, or None.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.engine = LLMEngine(config)
        self.model_name, self.device, self.block_size = config.model, config.device, config.block_size
        checkpoint = resolve_checkpoint(config.model)
        self.tokenizer, self.default_sampling = load_tokenizer(checkpoint), checkpoint.default_sampling
        self.processor = OutputProcessor(self.tokenizer)
        self.limits, self.num_kv_blocks = self.engine.limits, self.engine.blocks.num_blocks
        self.max_model_len, self.vocab_size = self.limits.max_model_len, self.limits.vocab_size
        self.max_request_len = min(self.max_model_len, self.limits.num_kv_tokens + 1)  # the last token is not stored
        self.max_num_unfinished = config.max_num_seqs + config.max_queued_requests
        self.cause_of_death: str | None = None
        self._streams: dict[str, RequestStream] = {}  # of all unfinished requests
        self._inbox: list[RequestStream] = []
        self._aborted: list[str] = []
        self._request_ids = map(str, itertools.count())
        self._changed = threading.Condition()  # guards the four above and _stopping
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and self.cause_of_death is None

    def start(self) -> None:
        self._thread.start()

    def generate(self, prompt_token_ids: list[int], params: SamplingParams) -> RequestStream:
        """Queue a request. Call this on the event loop that will read the stream.

        Raises FieldError, QueueFullError, or GenerationError if the engine is dead.
        """
        check_request(prompt_token_ids, params, self.limits)
        with self._changed:
            if self.cause_of_death or self._stopping:
                raise self._end_error()
            if len(self._streams) >= self.max_num_unfinished:
                limit = "max_num_seqs + max_queued_requests"
                raise QueueFullError(f"{len(self._streams)} requests are unfinished (limit: {limit}), try again later")
            stream = RequestStream(next(self._request_ids), prompt_token_ids, params)
            self._streams[stream.request_id] = stream
            self._inbox.append(stream)
            self._changed.notify()
        return stream

    def abort(self, stream: RequestStream) -> None:
        """Abort a request. It leaves the engine before the next step. Does nothing if the request has ended."""
        with self._changed:
            if self._streams.pop(stream.request_id, None) is not None:
                self._aborted.append(stream.request_id)
                self._changed.notify()

    def shutdown(self) -> None:
        """Stop the thread. Unfinished requests get an error."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def stats(self) -> dict[str, float]:
        """Gauges for /metrics, as of the last step."""
        blocks, num_running = self.engine.blocks, len(self.engine.scheduler.running)
        return {
            "num_requests_running": num_running,
            "num_requests_waiting": max(0, len(self._streams) - num_running),
            "kv_cache_usage_perc": blocks.num_used_blocks / (blocks.num_blocks - 1),
            "num_preemptions": self.engine.scheduler.num_preemptions,
        }

    def _run(self) -> None:
        try:
            while self.cause_of_death is None and self._take_inbox():
                self._deliver(self._step())
        except Exception as error:  # not from a step: no request can continue
            self.cause_of_death = f"{type(error).__name__}: {error}"
        with self._changed:
            request_ids = list(self._streams)
        for request_id in request_ids:
            self._put(request_id, self._end_error(), is_last=True)
        self._abort_in_engine(request_ids)
        self.engine.tracer.close()

    def _end_error(self) -> GenerationError:
        """Why no request can succeed anymore."""
        if self.cause_of_death is not None:
            return GenerationError(self.cause_of_death)
        return ShutdownError("the server is shutting down")

    def _take_inbox(self) -> bool:
        """Pass new requests and aborts to the engine; if it is idle, wait for some. Returns False when it must stop."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._inbox or self._aborted or self._stopping or self.engine.has_unfinished_requests
            )
            added, self._inbox = self._inbox, []
            aborted, self._aborted = self._aborted, []
        for stream in added:
            self.processor.add_request(stream.request_id, stream.prompt_token_ids, stream.params)
            self.engine.add_request(stream.request_id, stream.prompt_token_ids, stream.params)
        self._abort_in_engine(aborted)
        return not self._stopping

    def _step(self) -> list[EngineCoreOutput]:
        """One step. If it fails, all requests in the engine fail; if the next step fails too, the engine stops."""
        try:
            return self.engine.step()
        except Exception as error:
            outputs = self.engine.fail(error)
            if self.engine.num_failures > 1:
                self.cause_of_death = f"two steps in a row failed, the second with {type(error).__name__}: {error}"
            return outputs

    def _deliver(self, outputs: list[EngineCoreOutput]) -> None:
        """Pass outputs to their streams, as text."""
        for output in outputs:
            if output.error is not None:
                self.processor.remove([output.request_id])
                self._put(output.request_id, GenerationError(output.error), is_last=True)
        answers, stopped = self.processor.process(output for output in outputs if output.error is None)
        for request_id, answer in answers:
            self._put(request_id, answer, is_last=answer.finish_reason is not None)
        self._abort_in_engine(stopped)

    def _put(self, request_id: str, output: CompletionOutput | GenerationError, is_last: bool) -> None:
        with self._changed:
            stream = self._streams.pop(request_id, None) if is_last else self._streams.get(request_id)
        if stream is not None:  # otherwise the request has been aborted
            stream.put(output)

    def _abort_in_engine(self, request_ids: list[str]) -> None:
        self.processor.remove(request_ids)
        self.engine.abort_requests(request_ids)
