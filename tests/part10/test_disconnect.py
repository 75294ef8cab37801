"""A client that leaves, through the router, with a real engine behind it whose steps wait for a permit."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from common.checkpoint import load_tokenizer, resolve_checkpoint
from common.openai_app.app import create_app
from common.serve import ListenConfig, running_app
from part10_data_parallelism.router.app import create_app as create_router
from part10_data_parallelism.router.config import RouterConfig
from tests.contract.engines import SmallModels
from tests.contract.gated_server import GatedServer, prompt_of

LOOK = 'Look at router/app.py::RoutedResponse; README "What passes through".'
TIMEOUT_S = 60.0


def until(condition: Callable[[], object], what: str) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"expected {what}. {LOOK}"
        time.sleep(0.005)


def test_a_client_that_leaves_reaches_the_replica_within_two_steps(tmp_path: Path) -> None:
    """No step ends while the news is on its way, so nothing in between waits for a token; then at most two more run."""
    models = SmallModels(tmp_path)
    server = GatedServer("part10_data_parallelism", models)
    body = {"model": models.target, "prompt": prompt_of(1), "max_tokens": 20, "ignore_eos": True, "stream": True}
    with server.running():
        server.llm.tokenizer = load_tokenizer(resolve_checkpoint(models.target))  # its size does not matter here
        with running_app(create_app(server.llm)) as replica, contextlib.ExitStack() as stack:
            stack.callback(server.gate.open)
            app = create_router(RouterConfig(worker_urls=replica), ListenConfig())
            with running_app(app) as url:
                with httpx.stream(
                    "POST", f"{url}/v1/completions", json=body, timeout=TIMEOUT_S, trust_env=False
                ) as got:
                    server.gate.allow(1)
                    line = next(got.iter_lines())
                    assert got.status_code == 200 and line.startswith("data: {"), f"{got.status_code}, {line}. {LOOK}"
                until(lambda: not server.llm._streams, "the replica to notice that the client has left")
                num_steps = 0
                while server.inner.core.has_unfinished_requests:
                    assert num_steps < 2, f"the request runs on after {num_steps} steps: {server.launched}. {LOOK}"
                    num_begun = len(server.gate.begun)
                    server.gate.allow(1)
                    num_steps += 1
                    until(
                        lambda: len(server.gate.begun) > num_begun or not server.inner.core.has_unfinished_requests,  # noqa: B023
                        "the next step, or the end",
                    )
                until(lambda: not app.state.router.pool.queue.num_running, "the router to be idle")
