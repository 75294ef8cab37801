"""Part 5's two processes: they serve, drain, and end, each however the other one does.

Later parts run the very same code here. How each part starts and ends is in tests/contract/test_process.py.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from part05_async_scheduling import config
from tests.forked_servers import GREEDY, ForkedServer, Host, in_the_background, until
from tests.http_checks import COMPLETIONS
from tests.process_checks import TIMEOUT_S
from tests.server_host import POISON

PART = Path(config.__file__).parent.name
LOOK = 'Look at __main__.py, api/core_client.py::CoreClient and common/serve.py; README "Two processes".'
LOOK_DRAIN = 'Look at api/async_engine.py::AsyncLLM.shutdown and common/serve.py; README "When a process dies".'
LOOK_DEATH = 'Look at api/async_engine.py::AsyncLLM._core_died and common/serve.py; README "When a process dies".'
LOOK_PARENT = 'Look at core/engine_core.py::run_engine_core and _end_with_parent; README "When a process dies".'
LOOK_START = 'Look at api/core_client.py::CoreClient.__init__; README "When a process dies".'
FLAGS = ["--max-model-len", "300", "--block-size", "8"]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for what processes leave behind in /proc")


def ask(server: ForkedServer, **fields: Any) -> httpx.Response:
    return server.post(COMPLETIONS, {**GREEDY, "prompt": [5] * 5, "max_tokens": 250, **fields})


def test_many_requests_of_all_kinds(host: Host, llm: Any, prompt_of: Any) -> None:
    """A hundred, a third of them cut off by their clients: see soak.py. Afterwards everything is free."""
    from tests.part05.soak import check_answers, make_asks, talk_to

    server = host.serve(PART, *FLAGS, "--num-kv-blocks", "17", "--max-num-seqs", "8")
    two = ask(server, prompt=[[5] * 40, [6] * 40], max_tokens=60)  # 26 blocks
    num_preemptions = server.gauge("num_preemptions", LOOK)
    assert two.status_code == 200 and num_preemptions > 0, f"one was to wait for the other: {two.text}"
    asks = make_asks(prompt_of)
    answers = talk_to(server.url, asks)
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        until(lambda name=name: server.gauge(name, LOOK) == 0, f"an idle engine, whose blocks are all free. {LOOK}")
    check_answers(asks, answers, llm)


# However one of them ends


def test_a_failed_step_and_then_the_core_is_killed(host: Host) -> None:
    """After one failed step the server goes on. The end of the core ends all requests: streams, whole answers, and
    those that wait."""
    server = host.serve(PART, *FLAGS, "--max-num-seqs", "2", step_s=0.02)
    poisoned = ask(server, prompt=[POISON])
    assert poisoned.status_code == 500 and "the cat sat on it" in poisoned.text, f"got {poisoned.text}. {LOOK_DEATH}"
    assert ask(server, max_tokens=3).status_code == 200, f"a failed step has ended the server. {LOOK_DEATH}"
    body = {**GREEDY, "prompt": [6] * 5, "max_tokens": 290, "stream": True}
    with contextlib.ExitStack() as stack:
        chunks = stack.enter_context(server.stream(COMPLETIONS, body)).iter_text()
        text = next(chunks)
        results = stack.enter_context(in_the_background(*[lambda: ask(server)] * 3, look=LOOK_DEATH))
        until(lambda: server.gauge("num_requests_waiting", LOOK) >= 2, "two requests to wait, as two are running")
        os.kill(server.core, signal.SIGKILL)
        text += "".join(chunks)
        health = server.get("/health")
    assert "engine core has died (killed by SIGKILL)" in text, (
        f"the stream must say why it ends: {text[-300:]!r}. {LOOK_DEATH}"
    )
    assert health.status_code == 503, f"/health of a server without a core: {health.status_code}. {LOOK_DEATH}"
    for result in results:
        assert isinstance(result, httpx.Response) and result.status_code == 500, f"got {result!r}. {LOOK_DEATH}"
        assert "killed by SIGKILL" in result.text, f"the error names the cause: {result.text}. {LOOK_DEATH}"
    server.check_end(1, r"error: the engine core has died \(killed by SIGKILL\)\n", LOOK_DEATH)


def test_the_api_process_is_killed(host: Host) -> None:
    """The core must not go on alone, nor keep its memory."""
    server = host.serve(PART, *FLAGS, step_s=0.01)
    body = {**GREEDY, "prompt": [6] * 5, "max_tokens": 290, "stream": True}
    with server.stream(COMPLETIONS, body) as response:
        chunks = response.iter_text()
        next(chunks)
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(httpx.HTTPError):
            "".join(chunks)
    server.check_end(-signal.SIGKILL, "", LOOK_PARENT)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_the_api_process_is_ended_while_the_core_loads(host: Host, number: signal.Signals) -> None:
    """SIGINT as the terminal sends it: to all of its processes. Nothing is ready, so nothing has to be drained."""
    server = host.start(PART, *FLAGS, slow=TIMEOUT_S)
    server.wait_until_loading()
    (os.killpg if number == signal.SIGINT else os.kill)(server.pid, number)
    status = -number if number == signal.SIGKILL else 128 + number
    server.check_end(status, "", LOOK_PARENT)


def test_sigterm_at_the_very_start(host: Host) -> None:
    """The sockets' directory must not stay behind, which the core's process does not know of yet."""
    server = host.start(PART, *FLAGS, sigterm_after="directory")
    server.check_end(143, "", LOOK_PARENT)


def test_the_core_is_killed_while_it_loads(host: Host) -> None:
    server = host.start(PART, *FLAGS, slow=TIMEOUT_S)
    server.wait_until_loading()
    os.kill(server.core, signal.SIGKILL)
    server.check_end(2, rf"{PART}: error: the engine core did not start \(killed by SIGKILL\)\n", LOOK_START)


def test_ctrl_c_drains_as_sigterm_does(host: Host) -> None:
    """It goes to all processes of the terminal. The core, which still has answers to finish, must not get it."""
    server = host.serve(PART, *FLAGS, step_s=0.01)
    body = {**GREEDY, "prompt": [6] * 5, "max_tokens": 100, "stream": True}
    server.check_finishes_a_stream_after(lambda: os.killpg(server.pid, signal.SIGINT), COMPLETIONS, body, LOOK_DRAIN)
    server.check_end(0, "", LOOK_DRAIN)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-num-batched-tokens", "100"], "max_num_batched_tokens: .*300.*100"),
        (["--trace", "/no/such/folder/x"], "trace: .*/no/such/folder/x.*"),
        (["--kv-cache-memory", "10"], "kv_cache_memory: 10 bytes hold 0 blocks of .*"),
        (["--model", "no-such-model"], "model: 'no-such-model' is neither .*"),
        (["--host", "256.256.256.256"], r"cannot listen on 256\.256\.256\.256 port 0: .*"),
    ],
    ids=["budget", "trace", "memory", "model", "host"],
)
def test_an_error_at_the_start_is_one_line(host: Host, flags: list[str], words: str) -> None:
    """The first three are found by the core, which sends them to the API process."""
    server = host.start(PART, *FLAGS, *flags)
    server.check_end(2, rf"{PART}: error: {words}\n", LOOK_START)
    assert not server.stdout.read_text(), f"nothing serves: {server.stdout.read_text()!r}. {LOOK_START}"
