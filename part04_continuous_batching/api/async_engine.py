"""The engine in a thread of its own: requests come from the event loop, steps are taken here, outputs go back."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import AsyncIterator

from common.outputs import CompletionOutput
from common.sampling_params import SamplingParams
from common.serving import GenerationError, QueueFullError

from ..core.engine import LLMEngine, join_outputs


class RequestStream:
    """One request: `async for` over its outputs as they come. Whoever loses interest calls AsyncLLM.abort.

    A reader that is slower than the engine finds all that came since its last look as one output, so no more than one
    waits at any time (vLLM's RequestOutputCollector).
    """

    def __init__(self, request_id: str, prompt_token_ids: list[int], params: SamplingParams) -> None:
        self.request_id, self.prompt_token_ids, self.params = request_id, prompt_token_ids, params
        self._loop = asyncio.get_running_loop()
        self._output: CompletionOutput | None = None
        self._error: GenerationError | None = None
        self._came = asyncio.Event()

    def put(self, output: CompletionOutput | GenerationError) -> None:
        """Hand an output over, from the engine's thread to the event loop's."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to read
            self._loop.call_soon_threadsafe(self._keep, output)

    def _keep(self, output: CompletionOutput | GenerationError) -> None:
        if isinstance(output, GenerationError):
            self._error = output
        else:
            self._output = output if self._output is None else join_outputs([self._output, output])
        self._came.set()

    async def __aiter__(self) -> AsyncIterator[CompletionOutput]:
        while True:
            await self._came.wait()
            self._came.clear()
            output, self._output = self._output, None
            if output is not None:
                yield output
                if output.finish_reason:
                    return
            if self._error is not None:
                raise self._error


class AsyncLLM:
    """LLMEngine behind a border between threads: only the engine's thread touches the engine.

    Requests and aborts wait in an inbox until the step that runs has ended. Implements common.serving.ServingEngine.
    """

    def __init__(self, engine: LLMEngine, max_queued_requests: int) -> None:
        self.engine, self.max_num_unfinished = engine, engine.scheduler.max_num_seqs + max_queued_requests
        self.model_name, self.tokenizer = engine.model_name, engine.tokenizer
        self.max_model_len, self.vocab_size = engine.max_model_len, engine.vocab_size
        self.max_request_len = min(engine.max_model_len, engine.num_kv_tokens + 1)  # the last one's are never stored
        self._streams: dict[str, RequestStream] = {}  # of all requests that have not ended
        self._inbox: list[RequestStream] = []
        self._aborted: list[str] = []
        self._request_ids = map(str, itertools.count())
        self._changed = threading.Condition()  # guards all of the above, and _stopping
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def generate(self, prompt_token_ids: list[int], params: SamplingParams) -> RequestStream:
        """Queue a request; call it on the event loop that will read the stream. Raises FieldError, QueueFullError."""
        self.engine.check_request(prompt_token_ids, params)
        with self._changed:
            if len(self._streams) >= self.max_num_unfinished:
                limit = "max_num_seqs + max_queued_requests"
                raise QueueFullError(f"{len(self._streams)} requests are unfinished ({limit}), try again later")
            stream = RequestStream(next(self._request_ids), prompt_token_ids, params)
            self._streams[stream.request_id] = stream
            self._inbox.append(stream)
            self._changed.notify()
        return stream

    def abort(self, stream: RequestStream) -> None:
        """Nobody wants this request any more. It leaves before the next step; one that has ended is no error."""
        with self._changed:
            if self._streams.pop(stream.request_id, None) is not None:
                self._aborted.append(stream.request_id)
                self._changed.notify()

    def shutdown(self) -> None:
        """End the thread; what has not ended is told so."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def stats(self) -> dict[str, float]:
        """Gauges for /metrics, as of the last step."""
        blocks = self.engine.blocks
        num_running = len(self.engine.scheduler.running)
        return {
            "num_requests_running": num_running,
            "num_requests_waiting": max(0, len(self._streams) - num_running),
            "kv_cache_usage_perc": blocks.num_used_blocks / (blocks.num_blocks - 1),
            "num_preemptions": self.engine.scheduler.num_preemptions,
        }

    def _run(self) -> None:
        while self._take_inbox():
            try:
                if self.engine.has_unfinished_requests:
                    self._deliver(self.engine.step())
            except Exception as error:  # those in the step fail with its cause; those that wait may do better
                self._fail(self._request_ids_in_step(), error)
        self._fail(list(self._streams), RuntimeError("the server is shutting down"))
        self.engine.tracer.close()

    def _request_ids_in_step(self) -> list[str]:
        """All that do not wait: also one that ended in the step, which runs no longer but was not told of its end."""
        waiting = {request.request_id for request in self.engine.scheduler.waiting}
        with self._changed:
            waiting |= {stream.request_id for stream in self._inbox}
            return [request_id for request_id in self._streams if request_id not in waiting]

    def _take_inbox(self) -> bool:
        """Wait for something to do, then tell the engine what came in. False when it is time to stop."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._inbox or self._aborted or self._stopping or self.engine.has_unfinished_requests
            )
            added, self._inbox = self._inbox, []
            aborted, self._aborted = self._aborted, []
        for stream in added:
            self.engine.add_request(stream.request_id, stream.prompt_token_ids, stream.params)
        self.engine.abort_requests(aborted)
        return not self._stopping

    def _deliver(self, outputs: list[tuple[str, CompletionOutput]]) -> None:
        for request_id, output in outputs:
            with self._changed:
                stream = self._streams.pop(request_id, None) if output.finish_reason else self._streams.get(request_id)
            if stream is not None:  # else it was aborted during the step
                stream.put(output)

    def _fail(self, request_ids: list[str], error: Exception) -> None:
        self.engine.abort_requests(request_ids)
        for request_id in request_ids:
            with self._changed:
                stream = self._streams.pop(request_id, None)
            if stream is not None:
                stream.put(GenerationError(f"{type(error).__name__}: {error}"))
