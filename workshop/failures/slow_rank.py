"""A rank that is stopped for a moment: the other one waits, and nothing is lost."""

from __future__ import annotations

import time

import httpx

from workshop.failures.checks import DEADLINE_S, CheckFailed
from workshop.failures.clients import HTTP, Clients, ask_at_once
from workshop.failures.lab import Lab
from workshop.failures.scenario import Choice, Scenario
from workshop.failures.servers import Server, children_of, command_line, resume, state_of

PART = "part09_tensor_parallelism"
FLAGS = ("--tensor-parallel-size", "2", "--num-threads", "1", "--device", "cpu", "--no-log-stats", "--model", "tiny",
         "--num-kv-blocks", "200")  # fmt: skip
PROMPTS, MAX_TOKENS = ["Once upon a time there was a small cat", "One day, the dog saw that the cat"], 200
QUIET_S = 2.0


def run(lab: Lab) -> None:
    lab.title("What is running")
    server = lab.start(PART, *FLAGS)
    lab.wait_until_ready()
    ranks = ranks_of(server)
    lab.say(f"rank 0 is process {ranks[0]}, rank 1 process {ranks[1]}; each has half of every layer.")
    lab.at_the_end(lambda: resume(ranks[1]))
    lab.title(f"Before: {len(PROMPTS)} clients stream answers of {MAX_TOKENS} tokens")
    expected = [answer.token_ids for answer in ask_at_once(server.url, PROMPTS, MAX_TOKENS)]
    clients = lab.stream(server, PROMPTS, MAX_TOKENS)
    clients.wait_for_tokens()
    before = server.metrics()
    lab.predict()
    lab.break_it(
        "Stop rank 1. (The engine gives up after 60 s, --distributed-timeout.)", f"kill -STOP {ranks[1]}",
        lambda: state_of(ranks[1]) == "T", f"process {ranks[1]} is stopped",
    )  # fmt: skip
    wait_until_quiet(clients)
    open_streams = clients.open
    num_tokens = [len(stream.token_ids) for stream in open_streams]
    health = httpx.get(f"{server.url}/health", **HTTP).status_code
    lab.say(f"For {QUIET_S:g} s, no token has come. The open streams wait at {num_tokens} of {MAX_TOKENS} tokens; "
            f"GET /health: {health}.")  # fmt: skip
    lab.check_that("streams that wait, none of them with an error", len(open_streams) == len(PROMPTS),
                   str(len(PROMPTS)), len(open_streams))  # fmt: skip
    lab.break_it("Let it go on.", f"kill -CONT {ranks[1]}", lambda: state_of(ranks[1]) != "T", "rank 1 runs again")
    lab.title("After")
    streams = clients.stop()
    after = server.counters()
    lab.table([
        ("tokens of the streams that waited", num_tokens, [len(stream.token_ids) for stream in open_streams]),
        ("failed requests", int(before["request_errors"]), int(after["request_errors"])),
        ("preemptions", int(before["num_preemptions"]), int(after["num_preemptions"])),
        ("rank processes", ranks, ranks_of(server)),
    ])  # fmt: skip
    lab.check("errors of streams", [], [stream.error for stream in streams if stream.error is not None])
    answers = [stream.token_ids for stream in streams]
    lab.check_answers("answers", [expected[stream.client] for stream in streams], answers)
    lab.check("ranks, the same processes", ranks, ranks_of(server))
    lab.wait_until_free(server)
    lab.say()
    lab.say("If rank 1 never comes back: when a step is late by --distributed-timeout, the engine core asks all ranks, "
            "and one does not answer. Then the core ends with all ranks, and each open request gets the error 'rank 1 "
            "has not answered for 60 s (distributed_timeout)'. Its half of the KV cache is lost, so there is no "
            "repair.")  # fmt: skip


def ranks_of(server: Server) -> list[int]:
    """Their processes: children of the fork server, which is a child of the engine core. Raises CheckFailed."""
    assert server.core is not None, "it is ready"
    fork_servers = [pid for pid in children_of(server.core) if "forkserver" in command_line(pid)]
    ranks = [rank for fork_server in fork_servers for rank in children_of(fork_server)]
    if len(ranks) != 2:
        raise CheckFailed("the ranks' processes", 2, ranks)
    return ranks


def wait_until_quiet(clients: Clients) -> None:
    """Until no token has come for QUIET_S: those of earlier steps may still be on their way. Raises CheckFailed."""
    deadline_s = time.monotonic() + DEADLINE_S
    num_tokens, since_s = clients.num_tokens, time.monotonic()
    while time.monotonic() < since_s + QUIET_S:
        if clients.num_tokens != num_tokens:
            num_tokens, since_s = clients.num_tokens, time.monotonic()
        if time.monotonic() > deadline_s:
            raise CheckFailed("while rank 1 is stopped", "no tokens: rank 0 has to wait for it", f"{num_tokens} tokens")
        time.sleep(0.02)


SCENARIO = Scenario(
    name="slow_rank", part=9, minutes=6, run=run, needs_linux=True,
    about="one of two tensor-parallel ranks stops for a moment",
    question="Two ranks compute every layer together, and one of them is stopped in the middle of two streams. What do "
             "the clients see?",
    choices={
        "a": Choice("A pause. When the rank runs again, the streams continue, with the same tokens as before.",
                    "rank 0 waits in an all-reduce until rank 1 has added its part; no step is skipped or repeated."),
        "b": Choice("The streams go on at half the speed: rank 0 computes alone.",
                    "rank 0 has only half of each matrix and half of the KV heads, so it can't compute a token alone."),
        "c": Choice("The streams go on, with other tokens: rank 1's part of the sums is missing.",
                    "an all-reduce has no result before all ranks have contributed."),
        "d": Choice("Errors, at once: the engine core notices that a rank doesn't answer.",
                    "a stopped process looks like a slow one, so the core gives up only after --distributed-timeout, "
                    "60 s; only a process that has ended is noticed at once."),
    },
    answer="a",
    look={
        f"{PART}/worker/parallel.py::ParallelGroup.all_reduce": "where the other rank waits",
        f"{PART}/core/ranks.py::Ranks.result": "waits for a step, at most --distributed-timeout",
        f"{PART}/core/ranks.py::Ranks._find_cause": "names the rank that is to blame, if it takes longer",
    },
    vllm="MultiprocExecutor in v1/executor/multiproc_executor.py, which starts the ranks and sends them the steps",
)  # fmt: skip
