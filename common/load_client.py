"""A load client: sends a workload to an OpenAI-compatible server and measures what a client sees.

    python -m common.load_client --base-url http://127.0.0.1:8000 --model tiny --workload short_chat --max-concurrency 4

It streams every reply, so each piece of text has a timestamp. Times start when the request is sent. TTFT is the time to
the first content, ITL the time between two pieces of content, E2E the time to the end of the reply. A piece may carry
several tokens (speculative decoding, a busy server), so ITL is per piece. The metric per token is
TPOT = (E2E − TTFT) / (output_tokens − 1), with the server's token count.
"""

import argparse
import asyncio
import json
import re
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import anyio
import httpx
from rich.console import Console

from common.load_report import LoadReport, RequestError, RequestResult, aggregate, print_report
from common.workloads import WORKLOADS, WorkloadRequest, build_workload

Send = Callable[[WorkloadRequest], Awaitable["RequestResult"]]


@dataclass(frozen=True, slots=True)
class LoadConfig:
    """Where to send the load, and how.

    base_url: with or without a final /v1. max_concurrency: None sends every request at its arrival_s, even
    while others are running (open loop); a number keeps that many in flight and ignores arrival_s (closed loop).
    read_timeout_s: the longest pause within a reply; request_timeout_s: the longest full reply.
    ttft_slo_s, tpot_slo_s: the limits that a request must meet to count as goodput.
    """

    base_url: str
    model: str
    api_key: str | None = None
    max_concurrency: int | None = None
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 120.0
    request_timeout_s: float = 600.0
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None

    def __post_init__(self) -> None:
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise ValueError(f"max_concurrency={self.max_concurrency} must be at least 1, or None for open loop")


class SseParser:
    """Parses server-sent events from bytes that may be split anywhere (the HTML standard's event stream format).

    Lines end with LF, CRLF or CR; str.splitlines would also split at U+2028, which JSON may contain.
    """

    def __init__(self) -> None:
        self._partial_line = b""
        self._ended_with_cr = False
        self._event = "message"
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> list[tuple[str, str]]:
        """The (event name, data) pairs that this chunk completes; data lines of one event are joined by newlines."""
        if self._ended_with_cr:
            chunk = chunk.removeprefix(b"\n")
        self._ended_with_cr = chunk.endswith(b"\r")
        *lines, self._partial_line = re.split(rb"\r\n|\n|\r", self._partial_line + chunk)
        events = [self._end_line(line.decode("utf-8", errors="replace")) for line in lines]
        return [event for event in events if event is not None]

    def _end_line(self, line: str) -> tuple[str, str] | None:
        if line:
            name, _, value = line.partition(":")  # a comment begins with a colon: its name is empty
            if name == "data":
                self._data.append(value.removeprefix(" "))
            elif name == "event":
                self._event = value.removeprefix(" ")
            return None
        event, data = self._event, self._data
        self._event, self._data = "message", []
        return (event, "\n".join(data)) if data else None


async def run_load(config: LoadConfig, requests: Sequence[WorkloadRequest]) -> LoadReport:
    """Send all requests and report; a request that fails becomes a RequestResult with an error, never an exception."""
    timeout = httpx.Timeout(config.read_timeout_s, connect=config.connect_timeout_s)
    headers = {"Authorization": f"Bearer {config.api_key}"} if config.api_key else {}
    # httpx's default limit of 100 connections would make an open loop closed; with trust_env it would use a proxy.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(timeout=timeout, headers=headers, limits=limits, trust_env=False) as client:
        start = time.perf_counter()  # not earlier: creating the client loads certificates

        async def send(request: WorkloadRequest) -> RequestResult:
            return await _send(client, config, request, start)

        if config.max_concurrency is None:
            results = await _open_loop(send, requests, start)
        else:
            results = await _closed_loop(send, requests, config.max_concurrency)
        duration_s = time.perf_counter() - start
    return aggregate(results, duration_s, ttft_slo_s=config.ttft_slo_s, tpot_slo_s=config.tpot_slo_s)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0 if every request completed, else 1."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.request_rate is not None and args.max_concurrency is not None:
        parser.error("--request-rate sets arrival times, which --max-concurrency ignores: give only one of them")
    options = {name: getattr(args, name) for name in ("num_requests", "vocab_size") if getattr(args, name) is not None}
    try:
        requests = build_workload(args.workload, request_rate=args.request_rate, seed=args.seed, **options)
        config = LoadConfig(
            base_url=args.base_url,
            model=args.model,
            api_key=args.api_key,
            max_concurrency=args.max_concurrency,
            request_timeout_s=args.request_timeout_s,
            ttft_slo_s=args.ttft_slo_s,
            tpot_slo_s=args.tpot_slo_s,
        )
    except ValueError as error:
        parser.error(str(error))
    report = asyncio.run(run_load(config, requests))
    print_report(report, Console())
    return 0 if report.num_completed == len(requests) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m common.load_client", description="Load a server and measure it.")
    parser.add_argument("--base-url", required=True, help="for example http://127.0.0.1:8000")
    parser.add_argument("--model", required=True, help="the model's name on the server")
    parser.add_argument("--api-key", help="sent as a bearer token")
    parser.add_argument("--workload", choices=list(WORKLOADS), default="short_chat")
    parser.add_argument("--num-requests", type=int, help="default: the workload's default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab-size", type=int, help="draw token ids below this")
    parser.add_argument("--max-concurrency", type=int, help="closed loop: this many requests in flight")
    parser.add_argument("--request-rate", type=float, help="open loop: Poisson arrivals, requests per second")
    parser.add_argument("--request-timeout-s", type=float, default=600.0)
    parser.add_argument("--ttft-slo-s", type=float, help="goodput: the longest TTFT that counts")
    parser.add_argument("--tpot-slo-s", type=float, help="goodput: the longest TPOT that counts")
    return parser


class _RequestFailed(Exception):
    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.error = RequestError(status, message)


async def _open_loop(send: Send, requests: Sequence[WorkloadRequest], start: float) -> list[RequestResult]:
    async def send_on_time(request: WorkloadRequest) -> RequestResult:
        await asyncio.sleep(max(0.0, start + request.arrival_s - time.perf_counter()))
        return await send(request)

    return await asyncio.gather(*map(send_on_time, requests))


async def _closed_loop(send: Send, requests: Sequence[WorkloadRequest], max_concurrency: int) -> list[RequestResult]:
    slots = asyncio.Semaphore(max_concurrency)  # first come, first served: requests start in order

    async def send_in_turn(request: WorkloadRequest) -> RequestResult:
        async with slots:
            return await send(request)

    return await asyncio.gather(*map(send_in_turn, requests))


async def _send(
    client: httpx.AsyncClient, config: LoadConfig, request: WorkloadRequest, run_start: float
) -> RequestResult:
    sent = time.perf_counter()
    result = RequestResult(request.request_id, start_s=sent - run_start)
    root = config.base_url.rstrip("/").removesuffix("/v1")
    url = root + ("/v1/chat/completions" if request.messages else "/v1/completions")
    try:
        with anyio.fail_after(config.request_timeout_s):
            await _stream(client, url, config.model, request, result, sent)
    except _RequestFailed as failure:
        result.error = failure.error
    except TimeoutError:
        result.error = RequestError(None, f"no complete reply within request_timeout_s={config.request_timeout_s}")
    except httpx.ConnectTimeout:
        result.error = RequestError(None, f"no connection within connect_timeout_s={config.connect_timeout_s}")
    except httpx.TimeoutException:
        result.error = RequestError(None, f"no data for longer than read_timeout_s={config.read_timeout_s}")
    except httpx.HTTPError as error:
        result.error = RequestError(None, f"{type(error).__name__}: {error}")
    return result


async def _stream(
    client: httpx.AsyncClient, url: str, model: str, request: WorkloadRequest, result: RequestResult, sent: float
) -> None:
    parser = SseParser()
    async with client.stream("POST", url, json=_body(model, request)) as response:
        if response.status_code != 200:
            raise _failure((await response.aread()).decode("utf-8", errors="replace"), response.status_code)
        result.cancelled = request.cancel_after_chunks == 0
        if result.cancelled:
            return
        # Read the body to its end, past [DONE]: closing earlier looks like a client disconnect to the server.
        async for chunk in response.aiter_bytes():
            now_s = time.perf_counter() - sent
            for event, data in parser.feed(chunk):
                _record(result, event, data, now_s)
                result.cancelled = len(result.content_times_s) == request.cancel_after_chunks
                if result.cancelled:
                    return
    if result.e2e_s is None:
        raise _RequestFailed("the stream ended before [DONE]")


def _body(model: str, request: WorkloadRequest) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if request.messages:
        body["messages"] = request.messages
    else:
        body["prompt"] = request.prompt_token_ids
    if request.ignore_eos:  # an extension of vLLM and SGLang to OpenAI's API: sent only if needed
        body["ignore_eos"] = True
    if request.seed is not None:
        body["seed"] = request.seed
    return body


def _record(result: RequestResult, event: str, data: str, now_s: float) -> None:
    """Add one event of the stream to the result; raises _RequestFailed if it reports an error or is invalid."""
    if data == "[DONE]":
        if result.output_tokens is None:
            raise _RequestFailed("the stream has no usage: the server ignores stream_options.include_usage")
        result.e2e_s = now_s
        return
    try:
        payload = {"error": data} if event == "error" else json.loads(data)
        if payload.get("error"):
            raise _failure(data)
        _record_chunk(result, payload, now_s)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _RequestFailed(f"not a completion chunk ({type(error).__name__}: {error}): {data[:200]}") from error


def _record_chunk(result: RequestResult, payload: dict[str, Any], now_s: float) -> None:
    if usage := payload.get("usage"):
        result.prompt_tokens, result.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    for choice in payload["choices"]:  # one, or none in the chunk with the usage
        text = (choice["delta"].get("content") if "delta" in choice else choice["text"]) or ""
        finish_reason = choice.get("finish_reason")
        if text or (finish_reason and not result.content_times_s):
            result.content_times_s.append(now_s)
        result.text += text
        result.finish_reason = finish_reason or result.finish_reason


def _failure(body: str, status: int | None = None) -> _RequestFailed:
    """The error that a body or an event reports: OpenAI's {"error": {"message", "code"}}, or else its text."""
    try:
        payload = json.loads(body)
    except ValueError:
        payload = {}
    error = payload.get("error", payload) if isinstance(payload, dict) else {}
    if not isinstance(error, dict):
        error = {"message": error}
    code = error.get("code")
    if status is None and isinstance(code, int):
        status = code
    return _RequestFailed(str(error.get("message") or body[:200]), status)


if __name__ == "__main__":
    sys.exit(main())
