"""Part 6 over HTTP: a long prompt and streams at once, with a budget of 8 tokens per step."""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from common.sampling_params import SamplingParams
from common.trace import read_trace
from part06_chunked_prefill import config
from part06_chunked_prefill.llm import LLM
from tests.forked_servers import DEADLINE_S, ForkedServer, Host, until
from tests.http_checks import COMPLETIONS, request_bytes, send_raw

PART = Path(config.__file__).parent.name
LOOK = 'Look at core/engine.py::LLMEngine.__init__ and core/scheduler.py; README "Decodes first".'
LOOK_CHUNK = 'Look at core/engine.py::LLMEngine._update and _append; README "Chunks that sample no token".'
LOOK_ABORT = 'Look at core/scheduler.py::Scheduler.abort; README "Chunks that sample no token".'
BUDGET, BLOCK_SIZE, NUM_BLOCKS = 8, 16, 160
FLAGS = {
    "--max-num-seqs": "4", "--max-num-batched-tokens": str(BUDGET), "--block-size": str(BLOCK_SIZE),
    "--num-kv-blocks": str(1 + NUM_BLOCKS),
}  # fmt: skip
ASK = {"temperature": 0, "ignore_eos": True}


def params(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, **ASK)


def gauge(server: ForkedServer, name: str) -> float:
    found = re.search(rf"\nengine:{name}(?:_total)? (\S+)\n", server.get("/metrics").text)
    return float(found[1]) if found else 0.0  # it arrives with the core's first message


def read_stream(
    server: ForkedServer, prompt: list[int], num_tokens: int, begun: threading.Event
) -> tuple[str, list[int]]:
    """The text of a streamed answer, and how many tokens came with each event, by its logprobs. begun: set at the
    first of them."""
    body = {**ASK, "prompt": prompt, "max_tokens": num_tokens, "stream": True, "logprobs": 0}
    text, counts = "", []
    with server.stream(COMPLETIONS, body) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                choice = json.loads(line.removeprefix("data: "))["choices"][0]
                text += choice["text"]
                counts.append(len((choice["logprobs"] or {}).get("tokens", [])))
                begun.set()
    return text, counts


def test_a_long_prompt_among_streams(llm: LLM, prompt_of: Callable[..., list[int]], host: Host, tmp_path: Path) -> None:
    trace_path = tmp_path / "trace.jsonl"
    long, shorts = prompt_of(200, 3), [prompt_of(5 + number, number) for number in range(3)]
    expected = [result.outputs[0].text for result in llm.generate([*shorts, long], [*[params(60)] * 3, params(8)])]
    flags = [word for flag in FLAGS.items() for word in flag]
    server = host.serve(PART, "--trace", str(trace_path), *flags, step_s=0.02)
    begun = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(read_stream, server, prompt, 60, begun) for prompt in shorts]
        assert begun.wait(DEADLINE_S), f"expected a stream to begin. {LOOK}"
        whole = pool.submit(server.post, COMPLETIONS, {**ASK, "prompt": long, "max_tokens": 8})
        answers = [stream.result() for stream in streams]
        answer = whole.result().json()["choices"][0]["text"]
    got = [*(text for text, _ in answers), answer]
    assert got == expected, f"three streams and a prompt of 200 at once: expected {expected}, got {got}. {LOOK_CHUNK}"
    for _, counts in answers:
        assert sum(counts) == 60 and all(counts[:-1]), (
            f"expected 60 tokens and no empty delta, got {counts}. {LOOK_CHUNK}"
        )

    check_abort(server, prompt_of)
    os.kill(server.pid, signal.SIGTERM)
    server.check_end(0, "", LOOK)

    trace = read_trace(trace_path)
    for step in trace.steps:
        total = sum(request.num_scheduled for request in step.requests)
        assert total <= BUDGET, f"step {step.step} has {total} tokens, the budget is {BUDGET}. {LOOK}"
    together = [step for step in trace.steps if len({request.num_sampled for request in step.requests}) == 2]
    assert together, f"expected steps with decodes and chunks of a prompt, got none. {LOOK}"
    aborted = [name for step in trace.steps for name in step.aborted]
    steps = [request for step in trace.steps for request in step.requests if request.id in aborted]
    assert len(aborted) == 1 and steps and not any(request.num_sampled for request in steps), (
        f"one request was aborted half-way: expected chunks of it and no token, got {steps[-3:]}. {LOOK_ABORT}"
    )
    free = trace.steps[-1].num_blocks_free
    assert free == NUM_BLOCKS, f"after the last step: expected {NUM_BLOCKS} free blocks, got {free}. {LOOK_ABORT}"


def check_abort(server: ForkedServer, prompt_of: Callable[..., list[int]]) -> None:
    """A client goes away while its prompt of 2,000 tokens is being computed; a stream goes on beside it."""
    body = {**ASK, "prompt": [7] * 2_000, "max_tokens": 8, "stream": True}
    until(lambda: gauge(server, "kv_cache_usage_perc") == 0, "the server to be idle")
    begun = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        stream = pool.submit(read_stream, server, prompt_of(5), 100, begun)
        assert begun.wait(DEADLINE_S), "expected the stream to begin"
        connection: socket.socket = send_raw(server.url, request_bytes(COMPLETIONS, json.dumps(body).encode()))
        until(
            lambda: gauge(server, "kv_cache_usage_perc") * NUM_BLOCKS > 125, f"the prompt to get its 125 blocks. {LOOK}"
        )
        connection.close()
        until(
            lambda: gauge(server, "kv_cache_usage_perc") * NUM_BLOCKS < 125,
            f"the blocks of a prompt to be free once its client has gone. {LOOK_ABORT}",
        )
        stream.result()
    until(lambda: gauge(server, "kv_cache_usage_perc") == 0, f"all blocks to be free when all have ended. {LOOK_ABORT}")
