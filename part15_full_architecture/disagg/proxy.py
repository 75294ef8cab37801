"""The router with roles. Before a decode engine gets a request, a prefill engine may be told to compute its prompt.

A request passes through `Proxy.send`; the rest is the router's.
"""

from __future__ import annotations

import asyncio
import functools
import secrets
from collections.abc import Sequence
from typing import Any

import aiohttp
import anyio
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.types import Scope

from common.serve import ListenConfig

from ..kv_params import HEADER, SECRET_VARIABLE, KVTransferParams, sign
from ..router.app import ANSWERS, SHUTTING_DOWN, Router, app_of, text_of
from ..router.fleet import Fleet
from ..router.forward import BUSY, Answer, Headers, ReplicaError
from ..router.policies import RoutedRequest
from ..router.processes import processes_with_gpus
from ..router.replica import Attempt, Outcome, Replica, Role
from .config import DisaggConfig, secret_of, with_kv_connector
from .prefill_request import prefill_body
from .roles import ProxyMetrics, RolePool, fetch_kv_sources, role_of

MAX_PREFILL_TRIES = 2  # prefill engines that are asked before the decode engine computes the prompt itself


class RemotePrefill:
    """A request that a prefill engine has accepted. It ends when the engine has answered it, or with cancel(): that
    closes the connection, and the engine aborts it.

    header: tells the decode engine where to fetch the KV.
    """

    def __init__(self, answer: Answer, header: tuple[bytes, bytes]) -> None:
        self.header, self.outcome = header, Outcome.GIVEN_UP
        self.task = asyncio.create_task(self._drain(answer))

    def cancel(self) -> None:
        self.task.cancel()

    async def _drain(self, answer: Answer) -> None:
        """If it breaks off, the decode engine notices, and computes what is missing."""
        try:
            async for _ in answer.chunks():
                self.outcome = Outcome.SUCCEEDED
        except ReplicaError:
            self.outcome = Outcome.FAILED


class Proxy(Router):
    """The endpoints over prefill engines and decode engines."""

    config: DisaggConfig
    pool: RolePool
    metrics: ProxyMetrics

    def __init__(self, config: DisaggConfig, api_key: str | None = None, engine_flags: Sequence[str] = ()) -> None:
        self.secret = secret_of(config)
        super().__init__(config, api_key)
        start = processes_with_gpus(int(config.replica_gpus), {SECRET_VARIABLE: self.secret})
        wanted = {Role.PREFILL: config.prefill, Role.DECODE: config.decode}
        self.fleet = Fleet(self.pool, self.health_checks, start, with_kv_connector(engine_flags), wanted)
        self.metrics = ProxyMetrics(self.pool)
        self.prefills: dict[aiohttp.ClientResponse, RemotePrefill] = {}  # by the decode engine's response

    def make_pool(self) -> RolePool:
        return RolePool(self.config)

    def first_replicas(self) -> list[Replica]:
        return [Replica(url, role=role) for url, role in self.config.engines]

    async def is_healthy(self, replica: Replica) -> bool:
        """Also finds out where its KV can be fetched. It may have been started again, and listen elsewhere."""
        is_healthy = await super().is_healthy(replica)
        session, timeout_s = self.forwarder.session, self.config.health_timeout
        assert session is not None, "start() was called"
        replica.kv_sources = await fetch_kv_sources(session, replica.url, self.api_key, timeout_s) if is_healthy else ()
        return is_healthy

    def headers_for_replica(self, headers: Headers) -> Headers:
        """Only the proxy may say where an engine fetches KV."""
        headers = [(name, value) for name, value in headers if name.lower() != HEADER.encode()]
        return super().headers_for_replica(headers)

    async def send(
        self, attempt: Attempt, request: RoutedRequest, scope: Scope, headers: Headers, body: bytes
    ) -> Answer:  # fmt: skip
        """Ask the decode engine that was chosen, after a prefill engine has accepted the prompt. Raises ReplicaError:
        then the router chooses another one, and the prompt is asked for again."""
        send = functools.partial(super().send, request=request, scope=scope)
        if scope["path"] not in ANSWERS:
            return await send(attempt, headers=headers, body=body)
        prefill = await self.begin_prefill(attempt.replica, request, scope, headers, body)
        if self.is_ending:  # meanwhile
            if isinstance(prefill, RemotePrefill):
                prefill.cancel()
            raise ReplicaError(SHUTTING_DOWN, may_retry=False)
        if isinstance(prefill, str):
            self.metrics.local_prefills.labels(prefill).inc()
            return await send(attempt, headers=headers, body=body)
        self.metrics.remote_prefills.inc()
        try:
            answer = await send(attempt, headers=[*headers, prefill.header], body=body)
        except BaseException:
            prefill.cancel()
            raise
        self.prefills[answer.response] = prefill
        return answer

    def finish(self, answer: Answer, outcome: Outcome) -> None:
        if (prefill := self.prefills.pop(answer.response, None)) is not None:
            prefill.cancel()
        super().finish(answer, outcome)

    async def begin_prefill(
        self, decode: Replica, request: RoutedRequest, scope: Scope, headers: Headers, body: bytes
    ) -> RemotePrefill | str:
        """Returns when a prefill engine has accepted the prompt. A reason if the decode engine is to compute it."""
        num_new_chars = self.pool.note_prompt(request.prompt, decode)
        if decode.role is Role.PREFILL:
            return "colocated"
        if num_new_chars < self.config.remote_prefill_chars:
            return "short"
        if not decode.kv_sources:
            return "no_connector"
        if (body_for_prefill := prefill_body(scope["path"], body)) is None:
            return "other"
        tried = list[Replica]()
        while (replica := self.pool.choose_prefill(request, [decode, *tried])) is not None:  # its role may change
            if tried and not self.pool.retries.allows_retry():
                break
            try:
                return await self._ask(replica, request, scope, headers, body_for_prefill)
            except ReplicaError as error:
                tried.append(replica)
                if not error.may_retry or len(tried) == MAX_PREFILL_TRIES:
                    break
        return "failed" if tried else "no_engine"

    async def _ask(
        self, replica: Replica, request: RoutedRequest, scope: Scope, headers: Headers, body: bytes
    ) -> RemotePrefill:
        """Returns when the prefill engine has accepted the prompt, which takes no longer than a health check may.
        Raises ReplicaError; may_retry: another engine may take it."""
        transfer_id, sources = secrets.token_hex(16), replica.kv_sources  # sources: before they can change
        attempt = self.pool.begin(replica)
        headers = [*headers, self._header(KVTransferParams(transfer_id))]
        try:
            with anyio.fail_after(self.config.health_timeout):
                answer = await super().send(attempt, request, scope, headers, body)
        except (ReplicaError, TimeoutError) as error:
            self.pool.end(attempt, Outcome.GIVEN_UP if self.is_ending else Outcome.FAILED)
            raise ReplicaError(f"{replica.url} has not accepted a prompt: {error}") from error
        except BaseException:
            self.pool.end(attempt, Outcome.GIVEN_UP)
            raise
        if answer.status != 200:
            is_broken, is_busy = answer.status >= 500, answer.status == BUSY
            self.finish(answer, Outcome.FAILED if is_broken else Outcome.GIVEN_UP)
            raise ReplicaError(f"{replica.url} answered with status {answer.status}", may_retry=is_broken or is_busy)
        prefill = RemotePrefill(answer, self._header(KVTransferParams(transfer_id, sources)))
        prefill.task.add_done_callback(
            lambda _: self.finish(answer, Outcome.GIVEN_UP if self.is_ending else prefill.outcome)
        )
        return prefill

    def _header(self, params: KVTransferParams) -> tuple[bytes, bytes]:
        return HEADER.encode(), sign(params, self.secret).encode()

    # What operators ask for

    async def set_role(self, http_request: Request) -> Response:
        """{"url": …, "role": "prefill" or "decode"}: new requests follow it at once; those under way end as they
        began."""
        self.check_admin(http_request)
        given = await self.fields_of(http_request)
        replica = self.pool.find(text_of(given, "url").rstrip("/"))
        self.fleet.set_role(replica, role_of(given))
        self.pool.resize()
        return JSONResponse(self.describe(replica))

    def new_replica(self, given: dict[str, Any]) -> Replica:
        replica = super().new_replica(given)
        replica.role = role_of(given, default=Role.DECODE)
        return replica

    def describe(self, replica: Replica) -> dict[str, Any]:
        return {**super().describe(replica), "role": replica.role.value}


def create_app(config: DisaggConfig, server: ListenConfig, engine_flags: Sequence[str] = ()) -> FastAPI:
    """The proxy's app: the router's, and POST /workers/role."""
    proxy = Proxy(config, server.api_key, engine_flags)
    app = app_of(proxy, server)
    app.add_api_route("/workers/role", proxy.set_role, methods=["POST"], response_model=None)
    return app
