"""One API request at the engine: one stream per choice, all admitted or none, merged as their outputs arrive."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

from common.errors import FieldError
from common.openai_app.metrics import Metrics, RequestTimer
from common.openai_app.protocol import ApiRequest
from common.outputs import CompletionOutput
from common.serving import GenerationError, OutputStream, ServingEngine


def admit(engine: ServingEngine, request: ApiRequest, metrics: Metrics, timer: RequestTimer) -> Generation:
    """Queue all choices of a request. If the engine raises, none of them is queued."""
    streams, choices = [], list(request.engine_requests())
    if len(choices) > engine.max_num_unfinished:  # retrying later would not help
        limit = f"{engine.max_num_unfinished} (max_num_seqs + max_queued_requests)"
        raise FieldError("n" if request.params.n > 1 else "prompt", f"{len(choices)} choices, expected at most {limit}")
    with contextlib.ExitStack() as on_failure:
        for prompt_token_ids, params in choices:
            try:
                streams.append(engine.generate(prompt_token_ids, params))
            except FieldError as error:
                if error.field == "prompt" and request.is_chat:  # the client's name for it
                    raise FieldError("messages", str(error).removeprefix("prompt: "), error.code) from None
                raise
            on_failure.callback(engine.abort, streams[-1])
        on_failure.pop_all()
    metrics.prompt_tokens.inc(sum(map(len, request.prompts)))
    return Generation(engine, streams, metrics, timer)


class Generation:
    """The engine's streams for one API request. The caller must call close, however the request ends.

    streams: by choice. Each has a reader task that moves its outputs to one shared queue.
    """

    def __init__(
        self, engine: ServingEngine, streams: list[OutputStream], metrics: Metrics, timer: RequestTimer
    ) -> None:
        self._engine, self._metrics, self._timer = engine, metrics, timer
        self._running = dict(enumerate(streams))  # unfinished streams, by choice
        self._outputs: asyncio.Queue[CompletionOutput | Exception] = asyncio.Queue()
        self._readers: list[asyncio.Task[None]] = []

    async def outputs(self) -> AsyncIterator[CompletionOutput]:
        """The outputs of all choices as they arrive; index is the choice. Raises the first error of any choice."""
        self._readers = [asyncio.create_task(self._read(*item)) for item in self._running.items()]
        num_left = len(self._readers)
        while num_left:
            output = await self._outputs.get()
            if isinstance(output, Exception):
                self._metrics.errors.inc()
                raise output
            self._timer.record(output)
            num_left -= output.finish_reason is not None
            yield output

    def close(self) -> None:
        """Abort all unfinished streams. A second call does nothing."""
        for reader in self._readers:
            reader.cancel()
        running, self._running = self._running, {}
        for stream in running.values():
            self._engine.abort(stream)
            self._metrics.aborted.inc()

    async def _read(self, index: int, stream: OutputStream) -> None:
        try:
            async for output in stream:
                if output.finish_reason is not None:
                    del self._running[index]
                self._outputs.put_nowait(replace(output, index=index))
            if index in self._running:
                raise GenerationError("the engine ended an answer without a finish_reason")
        except Exception as error:  # any error is re-raised where the outputs are read
            self._running.pop(index, None)
            self._outputs.put_nowait(error)
