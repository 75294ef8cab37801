"""python -m part10_data_parallelism.lab.upstream: a replica that computes nothing, to measure a router's own cost.

An answer to a streamed request is one event every interval_s, each with the time when it was written. Any other request
gets a short answer at once.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time

from aiohttp import web

COMPLETION = {"id": "x", "object": "text_completion", "choices": [{"index": 0, "text": "", "finish_reason": "stop"}]}


async def answer(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    if not body.get("stream"):
        return web.json_response(COMPLETION)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for _ in range(body["max_tokens"]):
        await response.write(b"data: " + json.dumps({"sent_s": time.monotonic()}).encode() + b"\n\n")
        await asyncio.sleep(body["interval_s"])
    await response.write(b"data: [DONE]\n\n")
    return response


async def describe(request: web.Request) -> web.Response:
    """What other routers ask a replica before they use it."""
    return web.json_response({"status": "ok", "object": "list", "data": [{"id": "tiny", "object": "model"}]})


async def serve() -> None:
    app = web.Application()
    app.router.add_post("/v1/completions", answer)
    app.router.add_get("/{path:.*}", describe)
    logging.disable(logging.CRITICAL)  # other routers try HTTP/2 first
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve())
