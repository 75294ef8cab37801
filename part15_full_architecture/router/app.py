"""The router's HTTP side. A request passes through `Router.answer`, `RoutedResponse.respond` and `Router.route`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.types import Receive, Scope, Send

from common.errors import FieldError, openai_error
from common.openai_app.browsers import BrowserPolicy, add_browser_guards
from common.openai_app.errors import ApiError, add_error_handlers, as_api_error
from common.openai_app.guards import check_api_key, check_json, read_body
from common.openai_app.streaming import format_event, unless_disconnected
from common.serve import ListenConfig, is_loopback
from common.serving import GenerationError, QueueFullError

from .config import RouterConfig, check_url
from .discovery import Discovery
from .fleet import Fleet, with_model
from .forward import BUSY, UNAVAILABLE, Answer, Forwarder, Headers, ReplicaError
from .health import HealthChecks
from .metrics import Metrics
from .policies import RoutedRequest, make_policy
from .pool import Pool
from .processes import END_TIMEOUT_S, SHORT_END_TIMEOUT_S, Start, processes_with_gpus
from .prompts import prompt_of
from .replica import Attempt, Outcome, Replica, Role

MAX_BODY_BYTES, BODY_TIMEOUT_S = 1_000_000, 30.0
NO_REPLICA, SHUTTING_DOWN = "no replica is available", "the server is shutting down"
LOOP_HEADER = b"x-llm-router"  # which routers a request has passed
COMPLETE_EVENTS = re.compile(rb".*(\n\n|\r\n\r\n)", re.DOTALL)  # up to the last one's end
ANSWERS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
OTHERS = (("/v1/models", "GET"), ("/v1/models/{name:path}", "GET"), ("/tokenize", "POST"), ("/detokenize", "POST"))
logger = logging.getLogger(__name__)


class Router:
    """The endpoints over a pool of replicas."""

    def __init__(
        self, config: RouterConfig, api_key: str | None = None, replica_flags: Sequence[str] = ()
    ) -> None:  # fmt: skip
        self.config, self.api_key, self.id = config, api_key, secrets.token_hex(8).encode()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.is_ending = False  # open requests are ended with an error
        self.client_keys = [key.strip().encode() for key in (config.client_keys or "").split(",") if key.strip()]
        if self.client_keys and api_key is None:
            raise FieldError("client_keys", "expected api_key as well: the replicas get that one")
        self.pool = self.make_pool()
        self.forwarder = Forwarder(config)
        self.health_checks = HealthChecks(self.pool, self.is_healthy, config.health_interval)
        wanted = {Role.DECODE: config.replicas}
        self.fleet = Fleet(self.pool, self.health_checks, start_of(config), replica_flags, wanted)
        self.cause_of_death: str | None = None  # why the fleet could not start
        self.discovery = None
        if config.worker_dns is not None:
            self.discovery = Discovery(self.pool, self.health_checks, config.worker_dns, config.discovery_interval)
        self.metrics = Metrics(self.pool)
        self.draining = set[asyncio.Task[None]]()

    def make_pool(self) -> Pool:
        policy = make_policy(self.config.policy, self.config.cache_aware_chars)
        return Pool(policy, self.config.max_requests_per_replica, self.config.max_queued_requests)

    def first_replicas(self) -> list[Replica]:
        """Those that run already."""
        return [Replica(url) for url in self.config.urls]

    async def is_healthy(self, replica: Replica) -> bool:
        """Asked at regular intervals."""
        return await self.forwarder.is_healthy(replica)

    @contextlib.asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        self.loop = asyncio.get_running_loop()
        self.forwarder.start()
        for replica in self.first_replicas():
            self.pool.add(replica)
        self.health_checks.start()
        if self.discovery is not None:
            self.discovery.start()
        starting = asyncio.create_task(self.start_fleet())
        yield
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await self.fleet.stop(SHORT_END_TIMEOUT_S if self.is_ending else END_TIMEOUT_S)
        if self.discovery is not None:
            await self.discovery.stop()
        await self.health_checks.stop()
        for task in self.draining:
            task.cancel()
        await self.forwarder.close()

    def end_requests(self) -> None:
        """End all open requests with an error. Called by another thread, after a second signal."""
        if self.loop is not None:
            asyncio.run_coroutine_threadsafe(self._end_requests(), self.loop).result()

    async def _end_requests(self) -> None:
        self.is_ending = True
        self.pool.queue.resize(0)
        await self.health_checks.stop()  # they use the connections
        await self.forwarder.close()

    async def start_fleet(self) -> None:
        """Meanwhile, requests are refused with 503, and SIGTERM is heard."""
        try:
            await self.fleet.start()
        except Exception as error:
            self.cause_of_death = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"

    async def answer(self, http_request: Request) -> Response:
        """A request for an answer: wait for a turn, then route it."""
        self.check_key(http_request)
        check_json(http_request)
        body = await read_body(http_request, MAX_BODY_BYTES, BODY_TIMEOUT_S)
        return RoutedResponse(self, body, waits_for_turn=True)

    async def pass_on(self, http_request: Request) -> Response:
        """A request that any replica can answer at once."""
        self.check_key(http_request)
        body = await read_body(http_request, MAX_BODY_BYTES, BODY_TIMEOUT_S)
        return RoutedResponse(self, body, waits_for_turn=False)

    async def route(self, scope: Scope, body: bytes) -> Answer:
        """The answer of the replica that the policy chooses, or of another one if it fails while the client has got
        nothing yet: a whole answer, or the beginning of a stream.

        Raises ApiError if none answers. The caller calls finish() with what it got.
        """
        tried = list[Replica]()
        headers = self.headers_for_replica(scope["headers"])
        if (LOOP_HEADER, self.id) in map(tuple, scope["headers"]):
            raise ApiError(503, "the router is its own replica", error_type="service_unavailable")
        session = dict(headers).get(self.config.session_header.lower().encode("latin-1"))
        request = RoutedRequest(prompt_of(body), session.decode("latin-1") if session else None)
        self.pool.retries.note_request()
        status, cause = 503, NO_REPLICA
        while len(tried) <= self.config.max_retries and (not tried or self.pool.retries.allows_retry()):
            if self.is_ending:
                raise ApiError(503, SHUTTING_DOWN, error_type="service_unavailable")
            if (replica := self.pool.choose(request, tried)) is None:
                break
            if tried:
                self.metrics.retries.inc()
            tried.append(replica)
            attempt = self.pool.begin(replica)
            try:
                answer = await self.send(attempt, request, scope, headers, body)
            except ReplicaError as error:
                self.pool.end(attempt, Outcome.GIVEN_UP if self.is_ending else Outcome.FAILED)
                status, cause = 503, SHUTTING_DOWN if self.is_ending else str(error)
                if not error.may_retry or self.is_ending:
                    break
                continue
            except BaseException:
                self.pool.end(attempt, Outcome.GIVEN_UP)
                raise
            if answer.status != BUSY and answer.status not in UNAVAILABLE:
                return answer
            status = BUSY if answer.status == BUSY else 503  # another one may have room
            cause = f"{replica.url} answered with status {answer.status}"
            self.finish(answer, Outcome.GIVEN_UP if answer.status == BUSY else Outcome.FAILED)
        error_type = "rate_limit_error" if status == BUSY else "service_unavailable"
        raise ApiError(status, cause, error_type=error_type, headers={"Retry-After": "1"})

    async def send(
        self, attempt: Attempt, request: RoutedRequest, scope: Scope, headers: Headers, body: bytes
    ) -> Answer:  # fmt: skip
        """Ask the replica that was chosen. Raises ReplicaError."""
        return await self.forwarder.send(attempt, scope["method"], _target(scope), headers, body)

    def finish(self, answer: Answer, outcome: Outcome) -> None:
        answer.close()
        self.pool.end(answer.attempt, outcome)

    def client_of(self, scope: Scope) -> str:
        """Who asks, for fair turns: which of client_keys it has, or else its address."""
        if (number := self.client_key_of(dict(scope["headers"]))) is not None:
            return f"key {number}"
        return str((scope.get("client") or ("?",))[0])

    def client_key_of(self, headers: Mapping[bytes, bytes]) -> int | None:
        """The number of the client key that a request has, if any. All are compared, in constant time."""
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        same = [secrets.compare_digest(given.strip(), key) for key in self.client_keys]
        return same.index(True) if scheme.lower() == b"bearer" and any(same) else None

    def headers_for_replica(self, headers: Headers) -> Headers:
        """As they are, but replicas know the router's key only, and a request that comes back must be recognized."""
        headers = [*headers, (LOOP_HEADER, self.id)]
        if self.api_key is None or self.client_key_of(dict(headers)) is None:
            return headers
        others = [(name, value) for name, value in headers if name != b"authorization"]
        return [*others, (b"authorization", f"Bearer {self.api_key}".encode())]

    # What operators ask for

    async def list_workers(self, http_request: Request) -> Response:
        self.check_admin(http_request)
        return JSONResponse({"workers": [self.describe(replica) for replica in self.pool.replicas]})

    async def add_worker(self, http_request: Request) -> Response:
        """{"url": …}: the replica gets requests as soon as a health check has passed."""
        self.check_admin(http_request)
        replica = self.new_replica(await self.fields_of(http_request))
        if any(other.url == replica.url for other in self.pool.replicas):
            raise ApiError(409, f"url: {replica.url} is already here", "url")
        self.pool.add(replica)
        self.health_checks.watch(replica)
        return JSONResponse(self.describe(replica), 202)

    def new_replica(self, given: dict[str, Any]) -> Replica:
        """As an operator has described it. Raises FieldError."""
        return Replica(check_url(text_of(given, "url"), "url"), is_healthy=False)

    def describe(self, replica: Replica) -> dict[str, Any]:
        return {
            "url": replica.url, "is_healthy": replica.is_healthy, "is_draining": replica.is_draining,
            "circuit": replica.breaker.circuit.name.lower(), "num_pending": replica.num_pending,
        }  # fmt: skip

    async def remove_worker(self, http_request: Request) -> Response:
        """{"url": …}: the replica finishes what it has, and is removed."""
        self.check_admin(http_request)
        replica = self.pool.find(text_of(await self.fields_of(http_request), "url").rstrip("/"))
        if not replica.is_draining:
            self.pool.drain(replica)
            is_ours = replica in self.fleet.started  # then its process ends too
            task = asyncio.create_task(self.fleet.retire(replica) if is_ours else self.pool.remove_when_idle(replica))
            self.draining.add(task)
            task.add_done_callback(self.draining.discard)
        return JSONResponse(self.describe(replica), 202)

    async def roll_out(self, http_request: Request) -> Response:
        """{"model": …}: replace the replicas that the router has started by ones with another model, one by one. The
        answer comes when all are replaced. If one does not start, those replaced before it stay."""
        self.check_admin(http_request)
        model = text_of(await self.fields_of(http_request), "model")
        if not self.fleet.started:
            raise FieldError("model", "the router has started no replicas (--replicas)")
        if self.fleet.is_busy:
            raise ApiError(409, "model: another version is being rolled out, or replicas are being started", "model")
        try:
            await self.fleet.roll(with_model(self.fleet.flags, model))
        except OSError as error:
            raise FieldError("model", str(error)) from error
        return await self.list_workers(http_request)

    async def fields_of(self, http_request: Request) -> dict[str, Any]:
        """The JSON object that an operator has sent. Raises FieldError."""
        check_json(http_request)
        try:
            given = json.loads(await read_body(http_request, MAX_BODY_BYTES, BODY_TIMEOUT_S))
        except (ValueError, RecursionError) as error:
            raise FieldError("body", f"expected JSON: {error}") from error
        return given if isinstance(given, dict) else {}

    async def health(self) -> Response:
        num_available = sum(replica.is_available for replica in self.pool.replicas)
        status = "ok" if num_available else NO_REPLICA
        return JSONResponse({"status": status, "replicas": num_available}, 200 if num_available else 503)

    async def show_metrics(self) -> Response:
        return Response(self.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    def check_key(self, http_request: Request) -> None:
        if self.api_key is not None and self.client_key_of(dict(http_request.scope["headers"])) is None:
            check_api_key(http_request, self.api_key)

    def check_admin(self, http_request: Request) -> None:
        """Changing the pool always needs a key: who may add a replica can read all requests."""
        if self.api_key is None:
            raise ApiError(403, "/workers: start the router with --api-key to use it", code="no_api_key")
        check_api_key(http_request, self.api_key)


class RoutedResponse(Response):
    """Waits for a turn and for a replica, and passes its answer through. If the client leaves, all of it ends."""

    def __init__(self, router: Router, body: bytes, waits_for_turn: bool) -> None:
        self.router, self.request_body, self.waits_for_turn = router, body, waits_for_turn
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_disconnected(receive, self.respond(scope, receive, send))
        except Exception as error:
            if not isinstance(error, ApiError | FieldError | QueueFullError | GenerationError):
                logger.exception("a request failed")
            api_error = as_api_error(error)
            self.router.metrics.refused.labels(api_error.status).inc()
            await JSONResponse(api_error.body, api_error.status, headers=api_error.headers)(scope, receive, send)

    async def respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        queue = self.router.pool.queue
        if not self.waits_for_turn:
            return await self.pass_through(scope, receive, send)
        if not queue.max_running:
            raise ApiError(503, NO_REPLICA, error_type="service_unavailable", headers={"Retry-After": "1"})
        began_s = time.perf_counter()
        await queue.acquire(self.router.client_of(scope))
        self.router.metrics.queue_time.observe(time.perf_counter() - began_s)
        try:
            await self.pass_through(scope, receive, send)
        finally:
            queue.release()

    async def pass_through(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = await self.router.route(scope, self.request_body)
        outcome = Outcome.GIVEN_UP  # until its last byte
        try:
            if answer.is_stream:
                outcome = await self.stream(answer, scope["path"], send)
            else:
                outcome = Outcome.SUCCEEDED
                await send_whole(answer, scope, receive, send)
        finally:
            self.router.finish(answer, outcome)

    async def stream(self, answer: Answer, path: str, send: Send) -> Outcome:
        """Pass a stream of events through, as soon as each is complete. If it breaks off, the client gets an error
        event in place of the half one."""
        await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
        outcome, rest, num_events = Outcome.SUCCEEDED, b"", 0
        try:
            async for chunk in answer.chunks():
                rest += chunk
                if complete := COMPLETE_EVENTS.match(rest):
                    await send({"type": "http.response.body", "body": complete[0], "more_body": True})
                    rest = rest[complete.end() :]
                    num_events += complete[0].count(b"\n\n")
        except ReplicaError as error:
            outcome = Outcome.GIVEN_UP if self.router.is_ending else Outcome.FAILED
            rest = error_event(SHUTTING_DOWN if self.router.is_ending else str(error), path, num_events)
        await send({"type": "http.response.body", "body": rest})
        return outcome


def error_event(message: str, path: str, num_events: int) -> bytes:
    """The end of a stream that has broken off, in the format of its path. num_events: that came before it."""
    kind = "service_unavailable"
    if path == "/v1/responses":
        event = {"type": "error", "sequence_number": num_events, "message": message, "code": kind, "param": None}
        return f"event: error\ndata: {json.dumps(event)}\n\n".encode()
    return (format_event(openai_error(message, None, kind)) + "data: [DONE]\n\n").encode()


async def send_whole(answer: Answer, scope: Scope, receive: Receive, send: Send) -> None:
    response = Response(answer.content, answer.status)
    response.raw_headers = [*answer.headers, (b"content-length", str(len(answer.content)).encode())]
    await response(scope, receive, send)


def start_of(config: RouterConfig) -> Start:
    """How replicas are started. Raises FieldError if they can't be."""
    if config.replica_backend == "process":
        return processes_with_gpus(int(config.replica_gpus))
    from . import ray_backend  # which takes a second

    return ray_backend.connect(config)


def text_of(given: dict[str, Any], name: str) -> str:
    """Raises FieldError."""
    value = given.get(name)
    if not isinstance(value, str):
        raise FieldError(name, f"expected a string, got {str(value)[:100]!r}")
    return value


def _target(scope: Scope) -> str:
    """The path and the query, as the client sent them."""
    query = scope["query_string"].decode("latin-1")
    path = (scope.get("raw_path") or scope["path"].encode()).decode("latin-1")
    return f"{path}?{query}" if query else path


def create_app(config: RouterConfig, server: ListenConfig, replica_flags: Sequence[str] = ()) -> FastAPI:
    """The router's app. It answers as a replica does, so a client needs to know nothing of it."""
    return app_of(Router(config, server.api_key, replica_flags), server)


def app_of(router: Router, server: ListenConfig) -> FastAPI:
    app = FastAPI(title="A router", lifespan=router.lifespan, openapi_url=None, redirect_slashes=False)
    app.state.router, app.state.end_requests = router, router.end_requests
    for path in ANSWERS:
        app.add_api_route(path, router.answer, methods=["POST"], response_model=None)
    for path, method in OTHERS:
        app.add_api_route(path, router.pass_on, methods=[method], response_model=None)
    for method, endpoint in (
        ("GET", router.list_workers),
        ("POST", router.add_worker),
        ("DELETE", router.remove_worker),
    ):
        app.add_api_route("/workers", endpoint, methods=[method], response_model=None)
    app.add_api_route("/rollout", router.roll_out, methods=["POST"], response_model=None)
    app.add_api_route("/health", router.health, methods=["GET"], response_model=None)
    app.add_api_route("/metrics", router.show_metrics, methods=["GET"], response_model=None)
    add_error_handlers(app)
    origins = tuple(origin.strip() for origin in (router.config.allowed_origins or "").split(",") if origin.strip())
    add_browser_guards(app, BrowserPolicy(origins, is_loopback(server.host), server.api_key is not None))
    return app
