"""A decode engine that is killed while it streams: its streams end with an error, and the other engine goes on."""

from __future__ import annotations

from workshop.failures.checks import CheckFailed, first_difference, until
from workshop.failures.clients import Stream, ask_at_once
from workshop.failures.lab import Lab
from workshop.failures.pairs import PART, start_cluster
from workshop.failures.scenario import Choice, Scenario
from workshop.failures.servers import Server

FLAGS = ("--kv-lease", "5")  # so that a prompt whose engine has died is freed soon
MAX_TOKENS = 200
PROMPTS = [
    f"Once upon a time there was a small {animal} that lived in a house by the sea with an old man and his dog. "
    f"One day, the {animal} said to the dog:"
    for animal in ("cat", "bird", "horse", "mouse")
]


def run(lab: Lab) -> None:
    lab.title("What is running: a prefill engine, two decode engines, and the proxy in front of them")
    cluster = start_cluster(lab, 2, FLAGS)
    proxy, prefill, (victim, survivor) = cluster.proxy, cluster.prefill, cluster.decode
    lab.title(
        f"Before: {len(PROMPTS)} clients stream answers of {MAX_TOKENS} tokens through the proxy, one after another"
    )
    expected = [answer.token_ids for answer in ask_at_once(proxy.url, PROMPTS, MAX_TOKENS)]
    clients = lab.stream(proxy, PROMPTS, MAX_TOKENS)
    clients.wait_for_tokens()
    before = proxy.metrics()
    for server in (victim, survivor):
        lab.say(f"decode engine {server.url}, process {server.pid}: "
                f"{before[of_replica('pending', server)]:.0f} requests now")  # fmt: skip
    lab.predict()
    lab.break_it(
        f"Kill the decode engine {victim.url}.", f"kill -9 {victim.pid}",
        lambda: victim.has_ended, f"process {victim.pid} has ended",
    )  # fmt: skip
    lab.title("After")

    def without_victim() -> dict[str, float]:
        metrics = proxy.metrics()
        return {} if metrics[of_replica("available", victim)] else metrics

    until(without_victim, "the proxy to stop using the dead engine")
    streams = clients.stop()
    broken = [stream for stream in streams if stream.error is not None]
    whole = [stream for stream in streams if stream.error is None]
    for stream in broken:
        lab.say(f"a stream got {len(stream.token_ids)} of {MAX_TOKENS} tokens, then: {stream.error}", "dim")
    again = ask_at_once(proxy.url, PROMPTS, MAX_TOKENS)
    after = until(without_victim, "the proxy to stop using it for good")  # before, it may have tried it once more
    lab.table([
        (f"{name} of the {which} engine", int(before[of_replica(key, server)]), int(after[of_replica(key, server)]))
        for which, server in (("killed", victim), ("other", survivor))
        for key, name in (("available", "available"), ("requests", "requests so far"), ("pending", "open requests"))
    ])  # fmt: skip
    check_broken(lab, broken, expected, victim)
    lab.check_answers("streams on the other engine", [expected[stream.client] for stream in whole],
                      [stream.token_ids for stream in whole])  # fmt: skip
    lab.check_answers("new requests", expected, [answer.token_ids for answer in again])
    lab.check("requests that the proxy still counts at the killed engine", 0, int(after[of_replica("pending", victim)]))
    lab.wait_until_free(prefill, survivor)


def of_replica(name: str, server: Server) -> str:
    """The router's metric of one engine."""
    return f'replica_{name}{{replica="{server.url}"}}'


def check_broken(lab: Lab, broken: list[Stream], expected: list[list[int]], victim: Server) -> None:
    """Each has got the beginning of its answer, then an error that names the engine. Raises CheckFailed."""
    lab.check_that("streams that ended with an error", bool(broken), "at least 1", len(broken))
    for stream in broken:
        if victim.url not in str(stream.error):
            raise CheckFailed("the error of a stream", f"one that names {victim.url}", stream.error)
        beginning = expected[stream.client][: len(stream.token_ids)]
        if (difference := first_difference(beginning, stream.token_ids)) is not None:
            raise CheckFailed("the beginning of a stream that ended with an error", *difference)
    lab.say(f"✓ all of their errors name {victim.url}, and the tokens before them are right", "green")


SCENARIO = Scenario(
    name="kill_decode_worker", part=13, minutes=8, run=run,
    about="a decode engine is killed while it streams",
    question="Two decode engines have two streams each, and one of these engines is killed. What do the clients of its "
             "streams get?",
    choices={
        "a": Choice("The rest of their answers: the other engine continues each of them at its next token.",
                    "the KV of the tokens so far is lost with the engine, and the proxy repeats a request only before "
                    "its first byte."),
        "b": Choice("An error event that names the engine; a new request is answered by the other one.",
                    "the operating system closes the dead process's connections, so the proxy notices at once; then it "
                    "stops using the engine."),
        "c": Choice("Nothing more: they wait until their own time-out.",
                    "a stream that breaks off always gets an error event and [DONE]."),
        "d": Choice("An error event, and all new requests get status 503 until the engine is restarted.",
                    "the engine is taken out of service, and the other decode engine gets its requests."),
    },
    answer="b",
    look={
        f"{PART}/router/app.py::RoutedResponse.stream": "ends a stream that has broken off with an error event",
        f"{PART}/router/app.py::Router.route": "tries another engine, as long as the client has got nothing",
        f"{PART}/router/health.py::HealthChecks": "takes an engine that doesn't answer out of service",
        f"{PART}/worker/kv_sender.py::KVSender.check_leases": "frees prompts that the dead engine never fetched",
    },
    vllm="leases with heartbeats are the same in NixlConnector (#41383); the proxy is outside of the engine there, "
         "too",
)  # fmt: skip
