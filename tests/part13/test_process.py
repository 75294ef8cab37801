"""Real engines in processes of their own, real transfers between them, and processes that are killed or stopped: every
answer is that of an engine that computes alone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from part13_disaggregation import config
from part13_disaggregation.disagg.proxy import Proxy
from part13_disaggregation.kv_params import SECRET_VARIABLE
from part13_disaggregation.router import fleet as fleet_module
from part13_disaggregation.router import processes
from part13_disaggregation.router.replica import Role
from tests.forked_servers import GREEDY, ForkedServer, Host, is_alive, until
from tests.http_checks import CHAT, COMPLETIONS
from tests.left_behind import Traces, tracing
from tests.part13.real_engines import (
    KEY,
    PART,
    POOL,
    SECRET,
    SENDS,
    Client,
    Engines,
    ForkedReplica,
    Oracle,
    admin,
    check_free,
    counter,
    counters,
    forked,
    kill,
    prompt_of,
    proxied,
    read_events,
)
from tests.process_checks import TIMEOUT_S, ServerProcess, serve

PART_DIR = Path(config.__file__).parent
LOOK = 'Look at worker/kv_sender.py, worker/kv_receiver.py and core/kv_transfer.py; README "From engine to engine".'
LOOK_PROXY = "Look at disagg/proxy.py::Proxy.send and finish."
LOOK_LOST = 'Look at worker/kv_receiver.py::KVReceiver._lose and send_heartbeats; README "When an engine is lost".'
LOOK_LEASE = "Look at worker/kv_sender.py::KVSender.check_leases and _extend_lease."
LOOK_FULL = "Look at core/kv_transfer.py::KVTransfer.find and core/scheduler.py::Scheduler._schedule_waiting."
LOOK_END = "Look at router/processes.py::ReplicaProcess.start and router/app.py::Router.lifespan."
SLOW = {"step_s": 0.4}  # with small steps, a prompt takes as long as a test needs
SMALL_STEPS = ["--max-num-batched-tokens", "16", "--max-num-seqs", "16"]
ROUTING = r"routing on http://127\.0\.0\.1:(?P<port>\d+) .*\n"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="stops processes, and looks for them in /proc")


@pytest.fixture(scope="module")
def engines(one_host: Host) -> Iterator[Engines]:
    with forked(one_host) as found:
        yield found


@pytest.fixture(scope="module")
def alone(engines: Engines) -> Oracle:
    return Oracle(engines.start(*POOL))


@dataclass(frozen=True)
class Pair:
    prefill: ForkedServer
    decode: ForkedServer
    url: str

    @property
    def client(self) -> Client:
        return Client(self.url)

    def check_fetched(self, num_tokens: int, before: float, where: str) -> None:
        got = counter(self.decode, "kv_transfer_fetched_tokens") - before
        assert got == num_tokens, f"{where}: expected {num_tokens} tokens to be fetched, got {got}. {LOOK}"


@pytest.fixture(scope="module")
def pair(engines: Engines) -> Iterator[Pair]:
    """An engine of each role, for tests that kill neither."""
    prefill, decode = engines.start(*POOL, *SENDS), engines.start(*POOL, *SENDS)
    with proxied([prefill], [decode]) as (url, _):
        yield Pair(prefill, decode, url)


# One of each


@pytest.mark.parametrize("num_tokens", [1, 16, 17, 530, 1_900])
def test_answers_are_those_of_an_engine_alone(pair: Pair, alone: Oracle, num_tokens: int) -> None:
    """A prompt of no more than a block is not fetched."""
    prompt, before = prompt_of(num_tokens, num_tokens), counter(pair.decode, "kv_transfer_fetched_tokens")
    [got] = pair.client.ask_for_ids(prompt, 8)
    alone.check(prompt, 8, got, f"{num_tokens} tokens. {LOOK}")
    pair.check_fetched(num_tokens if num_tokens > 16 else 0, before, f"{num_tokens} tokens")
    check_free(pair.prefill, pair.decode)


def test_two_choices_and_streams(pair: Pair, alone: Oracle) -> None:
    """The choices of a request share what was fetched."""
    prompt, before = prompt_of(1, 300), counter(pair.decode, "kv_transfer_fetched_tokens")
    for got in pair.client.ask_for_ids(prompt, 8, n=2):
        alone.check(prompt, 8, got, f"one of two choices. {LOOK}")
    pair.check_fetched(300, before, "two choices")
    prompt = prompt_of(2, 200)
    streamed = pair.client.streamed(prompt, 8)
    assert streamed.error is None, streamed
    alone.check(prompt, 8, streamed.token_ids, f"a stream. {LOOK}")
    pair.check_fetched(500, before, "a stream, too")
    check_free(pair.prefill, pair.decode)


@pytest.mark.parametrize("path", [CHAT, "/v1/responses"])
def test_chats_and_responses(pair: Pair, alone: Oracle, path: str) -> None:
    text = f"A cat sat on a mat, said {path}. " * 20
    before = counter(pair.decode, "kv_transfer_fetched_tokens")
    if path == CHAT:
        body: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "max_tokens": 8}
    else:
        body = {"input": text, "max_output_tokens": 8}
    got, expected = (client.ask(path, **body).json() for client in (pair.client, alone.client))
    said = [each["choices"][0]["message"] if path == CHAT else each["output"][0]["content"] for each in (got, expected)]
    assert said[0] == said[1], f"expected {said[1]}, got {said[0]}. {LOOK}"
    num_fetched = counter(pair.decode, "kv_transfer_fetched_tokens") - before
    assert num_fetched > 150, f"expected most of the prompt to be fetched, got {num_fetched}. {LOOK}"
    check_free(pair.prefill, pair.decode)


def test_a_client_that_leaves_takes_all_blocks_with_it(engines: Engines) -> None:
    """While its prompt is computed, while it is fetched or waits, and in the middle of its answer."""
    slow = {"step_s": 0.02}
    prefill, decode = engines.start(*POOL, *SENDS, *SMALL_STEPS, **slow), engines.start(*POOL, *SENDS, **slow)
    with proxied([prefill], [decode]) as (url, _):
        check_leaving(Pair(prefill, decode, url))


def check_leaving(pair: Pair) -> None:
    for number, moment in enumerate(("the prompt is offered", "the decode engine has the request", "it answers")):
        offered = counter(pair.prefill, "kv_transfer_offered")

        def has_come(moment: str = moment, offered: float = offered) -> bool:
            if moment == "the prompt is offered":
                return pair.prefill.gauge("kv_transfer_offered", LOOK) > offered
            name = "num_requests_waiting" if moment.startswith("the") else "num_requests_running"
            return pair.decode.gauge(name, LOOK) > 0

        with pair.client.begin(prompt=prompt_of(50 + number, 1_500), max_tokens=400):
            until(has_come, f"that {moment}. {LOOK}")
        check_free(pair.prefill, pair.decode)


def test_a_role_may_change_while_requests_run(engines: Engines, alone: Oracle) -> None:
    """A stream goes on where it has begun; the next request goes the other way round."""
    a, b = engines.start(*POOL, *SENDS), engines.start(*POOL, *SENDS)
    with proxied([a], [b]) as (url, _):
        client, prompts = Client(url), [prompt_of(60 + number, 200) for number in range(2)]

        def swap() -> None:
            for engine, role in ((a, "decode"), (b, "prefill")):
                admin("POST", f"{url}/workers/role", url=engine.url, role=role)
            [got] = client.ask_for_ids(prompts[1], 8)
            alone.check(prompts[1], 8, got, f"the other way round. {LOOK_PROXY}")

        streamed = client.streamed(prompts[0], 100, after_first=swap)
        alone.check(prompts[0], 100, streamed.token_ids, f"a stream under way. {LOOK_PROXY}")
        fetched = [counter(engine, "kv_transfer_fetched_tokens") for engine in (a, b)]
        assert fetched == [200, 200], f"expected one prompt each way, got {fetched}. {LOOK_PROXY}"
        check_free(a, b)


# Other ranks and blocks, and the proxy as a user starts it


@contextlib.contextmanager
def proxy_process(traces: Traces, *flags: str) -> Iterator[tuple[Client, ServerProcess]]:
    command = ["-m", f"{PART}.disagg", "--port", "0", "--api-key", "key", "--remote-prefill-chars", "0", *flags]
    env = traces.env | {SECRET_VARIABLE: SECRET}
    with serve(command, ROUTING, traces.folder / "stderr", PART_DIR.parent, env, LOOK_END) as process:
        yield Client(process.url), process


@dataclass(frozen=True)
class StartedProxy:
    """A proxy that starts one decode engine, beside engines that are there. traces: of the proxy and of that one."""

    client: Client
    process: ServerProcess
    traces: Traces
    prefill: ForkedServer
    decode: ForkedServer


@pytest.fixture(scope="module")
def started(engines: Engines) -> Iterator[StartedProxy]:
    """Its engine loads for ten seconds. Whoever asks for it earlier than needed saves most of them."""
    prefill, decode = engines.start(*POOL, *SENDS, "--kv-lease", "2"), engines.start(*POOL, *SENDS)
    with tracing(PART_DIR, LOOK_END) as traces:
        flags = ["--decode", "1", "--prefill-urls", prefill.url, "--decode-urls", decode.url, "--policy", "round_robin",
                 "--health-interval", "0.5", "--", "--device", "cpu", "--num-threads", "1", *POOL]  # fmt: skip
        with proxy_process(traces, *flags) as (client, process):
            yield StartedProxy(client, process, traces, prefill, decode)


@pytest.mark.usefixtures("started")  # for a later test
def test_two_ranks_send_to_one_with_other_blocks_and_sigterm_drains(engines: Engines, alone: Oracle) -> None:
    tcp = ["--kv-connector", "tcp", "--kv-transfer-secret", SECRET]
    two = ["--tensor-parallel-size", "2", "--block-size", "8", "--num-kv-blocks", "300"]
    prefill = engines.start(*two, *tcp, forks_ranks=True)
    decode = engines.start("--block-size", "32", "--num-kv-blocks", "100", *tcp)
    with tracing(PART_DIR, LOOK_END) as traces:
        flags = ["--prefill-urls", prefill.url, "--decode-urls", decode.url, "--health-interval", "0.1"]
        with proxy_process(traces, *flags) as (client, process):
            wait_until_remote(client, prefill, decode)
            before = counter(decode, "kv_transfer_fetched_tokens")
            for number, num_tokens in enumerate((7, 33, 600)):
                prompt = prompt_of(70 + number, num_tokens)
                [got] = client.ask_for_ids(prompt, 8)
                alone.check(prompt, 8, got, f"{num_tokens} tokens of two ranks. {LOOK}")
            fetched = counter(decode, "kv_transfer_fetched_tokens") - before
            assert fetched == 633, f"expected 33 and 600 tokens to be fetched, got {fetched}. {LOOK}"
            prompt, terminate = prompt_of(75, 300), partial(process.process.send_signal, signal.SIGTERM)
            streamed = client.streamed(prompt, 100, after_first=terminate)
            assert streamed.error is None, f"{streamed}. {LOOK_END}"
            alone.check(prompt, 100, streamed.token_ids, f"a stream at the end. {LOOK_END}")
            process.check_ends_after_sigterm(LOOK_END)
    check_free(prefill, decode)


def wait_until_remote(client: Client, *engines: ForkedServer) -> None:
    """The proxy has asked both, as far as one sees from outside: a prompt was computed elsewhere."""

    def is_remote() -> bool:
        client.ask(prompt=[9], max_tokens=1)
        return "router:remote_prefills_total 0.0" not in client.get("/metrics").text

    until(is_remote, f"the proxy to know where KV is. {LOOK_PROXY}")
    check_free(*engines)


# Engines that are lost


def test_a_prefill_engine_is_lost_before_a_transfer(engines: Engines, pair: Pair, alone: Oracle) -> None:
    prefill, prompt = engines.start(*POOL, *SENDS), prompt_of(80, 300)
    with proxied([prefill], [pair.decode], health_interval=3_600.0) as (url, _):
        kill(prefill)
        [got] = Client(url).ask_for_ids(prompt, 8)
        alone.check(prompt, 8, got, f"the prefill engine is gone. {LOOK_PROXY}")
        reasons = [line for line in Client(url).get("/metrics").text.splitlines() if line.startswith("router:local")]
        assert 'router:local_prefills_total{reason="failed"} 1.0' in reasons, f"{reasons}. {LOOK_PROXY}"
    check_free(pair.decode)


@pytest.mark.parametrize("is_stopped", [False, True], ids=["killed", "stopped"])
def test_a_prefill_engine_is_lost_during_a_transfer(engines: Engines, alone: Oracle, is_stopped: bool) -> None:
    """The decode engine has got a part, and computes all of it."""
    decode = engines.start(*POOL, *SENDS, "--kv-transfer-timeout", "1" if is_stopped else "60")
    prefill, prompt = engines.start(*POOL, *SENDS, *SMALL_STEPS, **SLOW), prompt_of(81, 600)
    with proxied([prefill], [decode]) as (url, _), ThreadPoolExecutor(1) as threads:
        answer = threads.submit(Client(url).ask_for_ids, prompt, 8)
        until(lambda: counter(decode, "kv_cache_usage_perc") > 0, f"the fetch to begin. {LOOK}")
        if is_stopped:
            os.kill(prefill.core, signal.SIGSTOP)
        else:
            kill(prefill)
        [got] = answer.result(TIMEOUT_S)
        alone.check(prompt, 8, got, f"the prefill engine was lost. {LOOK_LOST}")
        failed = counter(decode, "kv_transfer_failed")
        assert failed == 1, f"expected one failed transfer, got {failed}. {LOOK_LOST}"
        check_free(decode)
        if is_stopped:
            os.kill(prefill.core, signal.SIGCONT)
            check_free(prefill)


def test_a_prefill_engine_is_lost_after_a_transfer(engines: Engines, pair: Pair, alone: Oracle) -> None:
    prefill, prompt = engines.start(*POOL, *SENDS), prompt_of(83, 300)
    with proxied([prefill], [pair.decode]) as (url, _):
        streamed = Client(url).streamed(prompt, 60, after_first=lambda: kill(prefill))
        assert streamed.error is None, f"{streamed}. {LOOK_LOST}"
        alone.check(prompt, 60, streamed.token_ids, f"the prefill engine was lost later. {LOOK_LOST}")
        prompt = prompt_of(84, 300)
        [got] = Client(url).ask_for_ids(prompt, 8)
        alone.check(prompt, 8, got, f"the next request. {LOOK_PROXY}")
    check_free(pair.decode)


def test_a_decode_engine_is_lost(engines: Engines, alone: Oracle) -> None:
    """It was stopped before it could fetch its prompt: that stays until the lease ends, and no longer. Its request is
    answered by the other one. A stream that has begun ends with an error."""
    prefill = engines.start(*POOL, *SENDS, "--kv-lease", "2")
    stopped, other = engines.start(*POOL, *SENDS), engines.start(*POOL, *SENDS, step_s=0.02)
    with proxied([prefill], [stopped, other]) as (url, _), ThreadPoolExecutor(2) as threads:
        os.kill(stopped.core, signal.SIGSTOP)
        prompts = [prompt_of(90 + number, 300) for number in range(2)]
        began_s = time.monotonic()
        answers = [threads.submit(Client(url).ask_for_ids, prompt, 8) for prompt in prompts]
        until(lambda: any(answer.done() for answer in answers), f"one answer. {LOOK_PROXY}")
        until(lambda: prefill.gauge("kv_transfer_offered", LOOK) == 2, f"both prompts to be offered. {LOOK_PROXY}")
        until(lambda: prefill.gauge("num_requests_running", LOOK) == 0, f"both to be computed. {LOOK_PROXY}")
        kill(stopped)
        for prompt, answer in zip(prompts, answers, strict=True):
            [got] = answer.result(TIMEOUT_S)
            alone.check(prompt, 8, got, f"a decode engine was lost. {LOOK_PROXY}")

        def is_free() -> bool:
            found = counters(prefill)
            is_free, has_ended = found["kv_cache_usage_perc"] == 0, found["kv_transfer_expired"] > 0
            assert has_ended or not is_free, f"its blocks are free, and no lease has ended. {LOOK_LEASE}"
            assert not has_ended or time.monotonic() >= began_s + 2, f"a lease of 2 s has ended early. {LOOK_LEASE}"
            return is_free

        until(is_free, f"the prompt's blocks to be free, and the lease to end. {LOOK_LEASE}")
        prompt = prompt_of(93, 300)
        streamed = Client(url).streamed(prompt, 400, after_first=lambda: kill(other))
        assert streamed.error is not None, f"expected an error event, got {streamed}. {LOOK_PROXY}"
        alone.check_beginning(prompt, 400, streamed.token_ids, f"what was sent before. {LOOK_PROXY}")
        check_free(prefill)


def test_a_proxy_that_is_killed_takes_its_engines_with_it(started: StartedProxy, alone: Oracle) -> None:
    """Engines that were there before free all blocks."""
    client, prefill, decode = started.client, started.prefill, started.decode
    workers = f"{client.url}/workers"
    until(lambda: len(admin("GET", workers)["workers"]) == 3, f"all to serve. {LOOK_END}")
    [url] = {each["url"] for each in admin("GET", workers)["workers"]} - {prefill.url, decode.url}
    wait_until_remote(client, prefill, decode)
    before = counter(prefill, "kv_transfer_offered")
    for number in range(2):
        prompt = prompt_of(100 + number, 200)
        [got] = client.ask_for_ids(prompt, 8)
        alone.check(prompt, 8, got, f"two decode engines. {LOOK}")
    num_offered = counter(prefill, "kv_transfer_offered") - before
    assert num_offered == 2, f"expected both prompts to be computed elsewhere, got {num_offered}. {LOOK_PROXY}"
    fetched = [counter(engine, "kv_transfer_fetched_tokens") for engine in (decode, Client(url))]
    assert fetched == [200, 200], f"expected each to have fetched one, got {fetched}. {LOOK}"
    body = {**GREEDY, "max_tokens": 400, "stream": True}
    with contextlib.ExitStack() as stack:
        for number in range(4):
            given = {**body, "prompt": prompt_of(110 + number, 300)}
            response = stack.enter_context(client.stream(COMPLETIONS, given, KEY))
            next(response.iter_raw())
        offered = prefill.gauge("kv_transfer_offered", LOOK)
        stack.enter_context(client.begin(prompt=prompt_of(115, 1_900), max_tokens=8))
        until(lambda: prefill.gauge("kv_transfer_offered", LOOK) > offered, f"one more prompt. {LOOK_PROXY}")
        started.process.process.send_signal(signal.SIGKILL)
        started.process.process.wait()
        check_free(prefill, decode)
        started.traces.check_nothing_is_left()


# Full pools


@pytest.mark.parametrize(("num_prefill", "num_decode"), [("60", "40"), ("40", "300")])
def test_full_pools(engines: Engines, alone: Oracle, num_prefill: str, num_decode: str) -> None:
    """Each holds one or two of the prompts at a time. No engine waits for ever for the other one's blocks."""
    prefill = engines.start("--num-kv-blocks", num_prefill, *SENDS)
    decode = engines.start("--num-kv-blocks", num_decode, *SENDS)
    prompts = [prompt_of(200 + number, 250 + 20 * number) for number in range(9)]
    with proxied([prefill], [decode]) as (url, proxy), ThreadPoolExecutor(len(prompts)) as threads:
        client = Client(url)
        for prompt, answer in [(each, threads.submit(client.ask_for_ids, each, 8)) for each in prompts]:
            [got] = answer.result(TIMEOUT_S)
            alone.check(prompt, 8, got, f"{len(prompt)} tokens. {LOOK_FULL}")
        check_free(prefill, decode)
        found = counters(decode)
        num_tokens = sum(map(len, prompts))
        assert found["kv_transfer_fetched_tokens"] >= num_tokens, f"all are fetched, got {found}. {LOOK_FULL}"
        assert found["kv_transfer_failed"] == 0, f"{found}. {LOOK_FULL}"


# Everything at once

NUM_REQUESTS, NUM_CLIENTS, NUM_KILLS = 500, 32, 4


@dataclass(frozen=True)
class Asked:
    prompt: list[int]
    max_tokens: int
    salt: str | None
    is_stream: bool
    leaves: bool


def make_requests(rng: random.Random) -> list[Asked]:
    """Some prompts come several times. With another salt, their KV is computed and fetched again."""
    shared = prompt_of(300, 64)
    prompts = [(shared if rng.random() < 0.2 else []) + prompt_of(301 + n, rng.randint(1, 50)) for n in range(98)]
    prompts += [prompt_of(400 + number, 300) for number in range(2)]
    lengths = [rng.randint(1, 4) for _ in prompts]
    found = []
    for number in range(NUM_REQUESTS):
        which, salt = number % len(prompts), None if rng.random() < 0.2 else str(number)
        found.append(Asked(prompts[which], lengths[which], salt, rng.random() < 0.5, rng.random() < 0.1))
    rng.shuffle(found)
    return found


class Killer:
    """Kills engines of both roles in turn, if two others are left; the proxy starts new ones in their place."""

    def __init__(self, proxy: Proxy, rng: random.Random) -> None:
        self.proxy, self.rng, self.counts = proxy, rng, Counter[str]()

    def strike(self, num_ended: int) -> None:
        """The next one is due, as so many requests have ended."""
        if self.counts.total() >= min(NUM_KILLS, num_ended * (NUM_KILLS + 1) // NUM_REQUESTS):
            return
        role, alive = (Role.PREFILL, Role.DECODE)[self.counts.total() % 2], list[tuple[Role, ForkedServer]]()
        for replica, started in list(self.proxy.fleet.started.items()):
            assert isinstance(started, ForkedReplica)
            if is_alive(started.server.pid) and is_alive(started.server.core):
                alive.append((replica.role, started.server))
        found = [server for its_role, server in alive if its_role is role]
        if len(alive) > 2 and found:
            server = self.rng.choice(found)
            for pid in self.rng.choice([(server.pid, server.core), (server.pid,), (server.core,)]):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.counts[role.value] += 1


async def ask_all(url: str, requests: list[Asked], strike: Callable[[int], None], oracle: Oracle) -> Counter[str]:
    """How the requests ended."""
    ends, left = Counter[str](), iter(range(len(requests)))

    async def client(session: aiohttp.ClientSession) -> None:
        for number in left:
            ends[await how_it_ends(session, url, requests[number], oracle)] += 1
            strike(ends.total())

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(TIMEOUT_S), headers=KEY) as session:
        await asyncio.gather(*(client(session) for _ in range(NUM_CLIENTS)))
    return ends


async def how_it_ends(session: aiohttp.ClientSession, url: str, asked: Asked, oracle: Oracle) -> str:
    body = {**GREEDY, "prompt": asked.prompt, "max_tokens": asked.max_tokens, "return_token_ids": True,
            "cache_salt": asked.salt, "stream": asked.is_stream}  # fmt: skip
    async with session.post(url + COMPLETIONS, json=body) as response:
        if asked.leaves:
            if asked.is_stream:
                await response.content.readany()
            return "left"
        text = await response.text()
    if response.status == 503:
        return "status 503"
    if response.status != 200:
        return f"status {response.status}: {text}"
    error = None
    if asked.is_stream:
        streamed = read_events(text)
        got, error = streamed.token_ids, streamed.error
    else:
        got = json.loads(text)["choices"][0]["token_ids"]
    where = f"a prompt of {len(asked.prompt)} tokens. {LOOK}"
    if error is not None:
        oracle.check_beginning(asked.prompt, asked.max_tokens, got, where)
        return "error event"
    oracle.check(asked.prompt, asked.max_tokens, got, where)
    return "right"


def test_no_answer_is_wrong_or_lost_while_engines_are_killed(
    engines: Engines, alone: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two engines of each role, which the proxy starts again and again."""
    monkeypatch.setattr(ForkedReplica, "engines", engines, raising=False)
    monkeypatch.setattr(processes, "ReplicaProcess", ForkedReplica)
    monkeypatch.setattr(fleet_module, "RESTART_S", 0.01)
    rng = random.Random(13)
    requests = make_requests(rng)
    with ThreadPoolExecutor(NUM_CLIENTS) as threads:
        list(threads.map(lambda each: alone.answer(each.prompt, each.max_tokens), requests))
    with proxied([], [], [*POOL, "--kv-lease", "2"], prefill=2, decode=2, policy="cache_aware") as (url, proxy):

        def serves_all() -> bool:
            roles = Counter(replica.role for replica in proxy.pool.replicas if replica.kv_sources)
            return roles == {Role.PREFILL: 2, Role.DECODE: 2}

        until(serves_all, "all engines to serve")
        killer = Killer(proxy, rng)
        ends = asyncio.run(ask_all(url, requests, killer.strike, alone))
        bad = {end: count for end, count in ends.items() if end not in ("right", "left", "status 503", "error event")}
        assert not bad and ends.total() == NUM_REQUESTS, f"{bad}, of {ends}. {LOOK_PROXY}"
        assert ends["right"] >= NUM_REQUESTS / 2, f"too few answers, {ends}, {killer.counts}. {LOOK_PROXY}"
        assert min(killer.counts[role.value] for role in Role) >= 2, f"only {killer.counts} were killed"
        until(serves_all, f"engines in place of those that were killed. {LOOK_PROXY}")
        check_free(*(Client(replica.url) for replica in proxy.pool.replicas))
        until(lambda: not any(replica.num_pending for replica in proxy.pool.replicas), f"nothing pending. {LOOK_PROXY}")
        assert not proxy.prefills, f"{proxy.prefills}. {LOOK_PROXY}"
