"""Generation off the event loop: one thread runs the model, and asyncio delivers its tokens to the requests."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator

from common.outputs import CompletionOutput
from common.sampling_params import SamplingParams

from .engine import LLM


class QueueFullError(Exception):
    """Too many requests are already waiting."""


class GenerationError(Exception):
    """The engine failed on this request. The message gives the cause."""

    status, kind = 500, "internal_error"


class ShutdownError(GenerationError):
    """The engine is shutting down. The same request may succeed elsewhere, or later."""

    status, kind = 503, "service_unavailable"


class RequestStream:
    """One request: read its outputs with `async for` as they arrive. To cancel it, call AsyncLLM.abort."""

    def __init__(self, prompt_token_ids: list[int], params: SamplingParams) -> None:
        self.prompt_token_ids, self.params = prompt_token_ids, params
        self.aborted = False
        self._loop = asyncio.get_running_loop()
        self._outputs: asyncio.Queue[CompletionOutput | GenerationError] = asyncio.Queue()

    def put(self, output: CompletionOutput | GenerationError) -> None:
        """Pass an output from the engine's thread to the event loop."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, so there is no reader
            self._loop.call_soon_threadsafe(self._outputs.put_nowait, output)

    async def __aiter__(self) -> AsyncIterator[CompletionOutput]:
        while True:
            output = await self._outputs.get()
            if isinstance(output, GenerationError):
                raise output
            yield output
            if output.finish_reason:
                return


class AsyncLLM:
    """An LLM with a queue in front: one request runs, up to max_queued_requests wait, first come, first served.

    num_aborted counts requests that were aborted while waiting or running.
    """

    def __init__(self, llm: LLM, max_queued_requests: int) -> None:
        self.llm, self.max_queued_requests = llm, max_queued_requests
        self.waiting: deque[RequestStream] = deque()
        self.running: RequestStream | None = None
        self.num_aborted = 0
        self._changed = threading.Condition()  # guards waiting, running and _stopping
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def generate(self, prompt_token_ids: list[int], params: SamplingParams) -> RequestStream:
        """Queue a request. Call this on the event loop that will read the stream. Raises QueueFullError."""
        request = RequestStream(prompt_token_ids, params)
        with self._changed:
            if len(self.waiting) + (self.running is not None) > self.max_queued_requests:
                raise QueueFullError(f"{len(self.waiting)} requests are waiting (max_queued_requests), try again later")
            self.waiting.append(request)
            self._changed.notify()
        return request

    def abort(self, request: RequestStream) -> None:
        """Abort a request: remove it if it is waiting, stop it after the current token if it is running."""
        # exercise: abort
        with self._changed:
            if request in self.waiting:
                self.waiting.remove(request)
            elif request is not self.running:
                return  # it has ended
            if not request.aborted:
                request.aborted = True
                self.num_aborted += 1
        # exercise: end

    def shutdown(self) -> None:
        """Stop the thread. Running and waiting requests are aborted."""
        with self._changed:
            self._stopping = True
            requests = [*([self.running] if self.running else []), *self.waiting]
            self._changed.notify()
        for request in requests:
            self.abort(request)
            request.put(ShutdownError("the server is shutting down"))
        self._thread.join()

    def _run(self) -> None:
        while (request := self._next()) is not None:
            try:
                last = self._run_request(request)
            except Exception as error:  # any error ends only this request; the next one may succeed
                last = GenerationError(f"{type(error).__name__}: {error}")
            with self._changed:
                self.running = None
            if last is not None:  # not earlier: the reader of the last output may assume that the request has ended
                request.put(last)

    def _next(self) -> RequestStream | None:
        with self._changed:
            self._changed.wait_for(lambda: self.waiting or self._stopping)
            if self._stopping:
                return None
            self.running = self.waiting.popleft()
            return self.running

    def _run_request(self, request: RequestStream) -> CompletionOutput | GenerationError | None:
        """Pass on all outputs but the last. Returns the last one, or None if the request was aborted."""
        for output in self.llm.stream(request.prompt_token_ids, request.params):
            if request.aborted:
                break
            if output.finish_reason:
                return output
            request.put(output)
        return None
