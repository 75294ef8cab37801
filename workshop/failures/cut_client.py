"""A client that closes its connection in the middle of an answer: the engine drops the request and frees its blocks."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

import httpx

from workshop.failures.checks import until
from workshop.failures.clients import GREEDY, HTTP, ask
from workshop.failures.lab import Lab
from workshop.failures.scenario import Choice, Scenario

PART = "part04_continuous_batching"
FLAGS = ("--num-threads", "1", "--device", "cpu", "--no-log-stats", "--model", "tiny", "--num-kv-blocks", "400")
STAYS, MAX_TOKENS = "Once upon a time there was a little dog", 200  # of the client that stays
LEAVES, MAX_TOKENS_CUT, NUM_READ = "Once upon a time there was a small cat", 1_500, 200  # lines, of the one that leaves


def run(lab: Lab) -> None:
    lab.title("What is running")
    server = lab.start(PART, *FLAGS)
    lab.wait_until_ready()
    lab.title("Before: one client streams an answer")
    expected = ask(server.url, STAYS, MAX_TOKENS)
    lab.say(f"{STAYS!r} → {expected.text.strip()[:70]!r} …")
    start = server.metrics()
    clients = lab.stream(server, [STAYS], MAX_TOKENS)
    clients.wait_for_tokens()
    lab.predict()
    body = {**GREEDY, "prompt": LEAVES, "max_tokens": MAX_TOKENS_CUT, "stream": True}
    with contextlib.ExitStack() as connection:
        lab.break_it(
            f"First, a second client asks for an answer of {MAX_TOKENS_CUT:,} tokens.",
            f"curl -N {server.url}/v1/completions -H 'Content-Type: application/json' -d '{json.dumps(body)}'",
            lambda: server.metrics()["num_requests_running"] == 2, "two requests are running",
            do=lambda: connection.enter_context(open_stream(server.url, body)),
        )  # fmt: skip
        before = server.metrics()

        def is_cut() -> bool:
            nonlocal before
            found = server.metrics()
            if found["num_requests_running"] == 2 and found["request_aborted"] == start["request_aborted"]:
                before = found
            return found["request_aborted"] > start["request_aborted"]

        lab.break_it(
            "Then it closes its connection in the middle of the answer: press Ctrl-C where it is printed. (If it has "
            "ended by then, ask again.)", "",
            is_cut, "one request was aborted", do=connection.close,
        )  # fmt: skip
    lab.title("After")
    until(lambda: server.metrics()["num_requests_running"] <= 1, f"{server.url} to run one request only")
    cut = server.metrics()
    streams = clients.stop()
    until(lambda: not server.metrics()["num_requests_running"], f"{server.url} to run no request")
    after = server.metrics()
    num_whole = num_ended(after) - num_ended(start) - len(streams)  # answers that the learner did not cut
    num_cut = after["generation_tokens"] - start["generation_tokens"] - clients.num_tokens - num_whole * MAX_TOKENS_CUT
    lab.table([
        ("requests that run", int(before["num_requests_running"]), int(cut["num_requests_running"])),
        ("KV blocks in use", server.blocks_in_use(before), server.blocks_in_use(cut)),
        ("aborted requests", int(before["request_aborted"]), int(cut["request_aborted"])),
    ])  # fmt: skip
    num_aborted = int(after["request_aborted"] - start["request_aborted"])  # a learner may have cut several
    limit = num_aborted * MAX_TOKENS_CUT
    lab.check_that("aborted requests", num_aborted > 0, "at least 1", num_aborted)
    lab.check_that(
        f"tokens that were generated for it, of {limit:,}", 0 < num_cut < limit, f"fewer than {limit:,}", int(num_cut)
    )
    lab.check("errors of the other client", [], [stream.error for stream in streams if stream.error is not None])
    answers = [stream.token_ids for stream in streams]
    lab.check_answers("answers of the other client", [expected.token_ids] * len(answers), answers)
    lab.wait_until_free(server)


@contextlib.contextmanager
def open_stream(url: str, body: dict[str, object]) -> Iterator[None]:
    """A stream of which the first NUM_READ lines have been read. Its connection is closed with the block."""
    with httpx.stream("POST", f"{url}/v1/completions", json=body, **HTTP) as response:
        lines = response.iter_lines()
        for _ in range(NUM_READ):
            next(lines)
        yield


def num_ended(metrics: dict[str, float]) -> int:
    """Requests that have come to their ends."""
    return int(metrics['request_success{finished_reason="length"}'])


SCENARIO = Scenario(
    name="cut_client", part=4, minutes=5, run=run,
    about="a client that disconnects in the middle of its answer",
    question=f"Two answers are streamed. One client disconnects after some tokens of {MAX_TOKENS_CUT:,}. What does the "
             "engine do with its request?",
    choices={
        "a": Choice("It computes the answer to its end; the server throws the tokens away.",
                    "then anyone could fill the batch with answers that nobody reads; the server aborts the request."),
        "b": Choice("It keeps the request and its blocks for a while, in case the client reconnects.",
                    "a response can't be continued over HTTP: a client that comes back sends a new request."),
        "c": Choice("The step fails, and with it the other request in the batch.",
                    "requests leave between two steps, so no step ever sees a request that is half gone."),
        "d": Choice("It removes the request before one of the next steps, and its blocks are free at once.",
                    "the server notices that the connection is closed, and abort() takes the request out of the batch "
                    "between two steps."),
    },
    answer="d",
    look={
        "common/openai_app/streaming.py::EventStream": "notices the disconnect, and always closes the generation",
        f"{PART}/api/async_engine.py::AsyncLLM.abort": "hands the request's id to the engine's thread",
        f"{PART}/core/scheduler.py::Scheduler.abort": "removes the request wherever it is, and frees its blocks",
    },
    vllm="AsyncLLM.abort; for answers that aren't streamed, with_cancellation in entrypoints/utils.py",
)  # fmt: skip
