"""What happened to a request, and when: one record from its arrival to its last token.

Metrics, the log, OpenTelemetry spans and `demo --trace` all read this record.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.openai_app.protocol import usable_id
from common.outputs import CompletionOutput, FinishReason

from ..messages import EngineCoreEvent, EventKind


@dataclass(slots=True)
class HttpExchange:
    """An HTTP request and its response. All times are of time.perf_counter, which on Linux is the same clock in all
    processes of a machine. request_id: the client's X-Request-Id, as the answer's id has it. traceparent: the client's
    trace id and span id (W3C Trace Context)."""

    received_s: float
    request_id: str | None = None
    traceparent: str | None = None
    first_byte_s: float | None = None
    last_byte_s: float | None = None


@dataclass(slots=True)
class RequestTimeline:
    """One answer of a request. A request with n > 1 has several, with the same http.

    submitted_s: when it was sent to the core, its prompt tokenized. events: what the core says of it. first_token_s,
    last_token_s: when the tokens were in the API process. error: why it failed, "aborted" if the client has gone.
    """

    request_id: str
    http: HttpExchange
    num_prompt_tokens: int
    submitted_s: float
    events: list[EngineCoreEvent] = field(default_factory=list)
    first_token_s: float | None = None
    last_token_s: float | None = None
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    finish_reason: FinishReason | None = None
    error: str | None = None

    def note(self, output: CompletionOutput, now_s: float) -> None:
        """An output is about to be given to the reader."""
        if output.token_ids:
            if self.first_token_s is None:
                self.first_token_s = now_s
            self.last_token_s = now_s
            self.num_output_tokens += len(output.token_ids)
        self.finish_reason = output.finish_reason

    def first(self, kind: EventKind) -> float | None:
        return next((event.at_s for event in self.events if event.kind == kind), None)

    @property
    def num_preemptions(self) -> int:
        return sum(event.kind == "preempted" for event in self.events)

    def stages(self) -> dict[str, tuple[float, float]]:
        """When each stage began and ended, of those that the request has completed.

        tokenize: in the API process, until it is sent to the core. queue: in the core, until it is first scheduled.
        prefill: until its first token, preemptions included. decode: until its last token.
        """
        # exercise: stages
        scheduled_s = self.first("scheduled")
        marks = {
            "tokenize": (self.http.received_s, self.submitted_s),
            "queue": (self.first("queued"), scheduled_s),
            "prefill": (scheduled_s, self.first_token_s),
            "decode": (self.first_token_s, self.last_token_s),
        }
        return {name: (begin, end) for name, (begin, end) in marks.items() if begin is not None and end is not None}
        # exercise: end

    def seconds_in(self, stage: str) -> float | None:
        """How long a stage took, None if the request has not completed it."""
        begin, end = self.stages().get(stage, (None, None))
        return None if begin is None or end is None else end - begin

    @property
    def ttft_s(self) -> float | None:
        """From its arrival to its first token."""
        return None if self.first_token_s is None else self.first_token_s - self.http.received_s


Observer = Callable[[RequestTimeline], None]  # called once for each request, when it has ended
HTTP: ContextVar[HttpExchange | None] = ContextVar("http", default=None)  # of the request that is being handled


def current_exchange() -> HttpExchange:
    """The HTTP request that is being handled; one that begins now for a program without a server."""
    return HTTP.get() or HttpExchange(time.perf_counter())


class NoteTimes:
    """ASGI middleware: notes when a request arrives, and when the first and the last byte of its answer leave."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        http = HttpExchange(time.perf_counter(), usable_id(headers.get(b"x-request-id")), headers.get(b"traceparent"))
        HTTP.set(http)

        async def send_and_note(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.body":
                http.last_byte_s = time.perf_counter()
                if http.first_byte_s is None:
                    http.first_byte_s = http.last_byte_s

        await self.app(scope, receive, send_and_note)
