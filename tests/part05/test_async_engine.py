"""AsyncLLM and CoreClient over real sockets: streams, abort, failure, death, shutdown. Steps wait for a permit."""

from __future__ import annotations

import asyncio
import functools
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest

from common.errors import FieldError
from common.outputs import CompletionOutput, Logprob, join_outputs
from common.sampling_params import SamplingParams
from common.serving import GenerationError, QueueFullError
from part05_async_scheduling.api import async_engine
from part05_async_scheduling.api.async_engine import AsyncLLM, RequestStream
from part05_async_scheduling.api.core_client import CoreClient
from tests import gated
from tests.async_checks import read_error, until, within_deadline
from tests.gated import NUM_TOKENS, CoreThread, Gate, gated_engine, prompt_of
from tests.part05.scripted import PART, check_engine, scripted_engine
from tests.scripted import executor_of, ids

LESSON = 'README "Two processes"'
LOOK_QUEUE = f"Look at api/async_engine.py::AsyncLLM.generate; {LESSON}."
LOOK_ABORT = f"Look at api/async_engine.py::AsyncLLM.abort and core/engine_core.py::EngineCore.handle; {LESSON}."
LOOK_STREAM = f"Look at api/async_engine.py::RequestStream; {LESSON}."
LOOK_DELIVER = f"Look at api/async_engine.py::AsyncLLM._deliver and _read_outputs; {LESSON}."
LOOK_FAIL = 'Look at api/async_engine.py::AsyncLLM._deliver and core/engine_core.py::EngineCore.step; README "When one of them dies".'  # noqa: E501
LOOK_DEATH = 'Look at api/async_engine.py::AsyncLLM._core_died and _die; README "When one of them dies".'
LOOK_SHUTDOWN = 'Look at api/async_engine.py::AsyncLLM.shutdown; README "When one of them dies".'
LOOK_START = 'Look at api/core_client.py::CoreClient; README "When one of them dies".'
LOOK_STATS = f"Look at api/async_engine.py::AsyncLLM.stats; {LESSON}."


def make_gate(**flags: Any) -> Gate:
    return Gate(PART, scripted_engine(max_model_len=200, **flags))


on_an_event_loop = functools.partial(gated.on_an_event_loop, make_gate, LOOK_SHUTDOWN)


def generate(engine: AsyncLLM, name: int, max_tokens: int = NUM_TOKENS, **fields: Any) -> RequestStream:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **fields)
    return engine.generate(prompt_of(name), params)


async def read_pieces(stream: RequestStream, what: str) -> list[CompletionOutput]:
    """All outputs of a request that ends by itself."""

    async def read() -> list[CompletionOutput]:
        return [output async for output in stream]

    return await within_deadline(read(), f"{what} to end. {LOOK_DELIVER}")


async def read(stream: RequestStream, what: str) -> tuple[str, list[int]]:
    joined = join_outputs(await read_pieces(stream, what))
    return joined.text, joined.token_ids


async def tokens_and_error(stream: RequestStream, what: str, look: str) -> tuple[list[int], str]:
    """The tokens and the error of a request that fails."""
    outputs, error = await read_error(stream, GenerationError, what, look)
    return [token_id for output in outputs for token_id in output.token_ids], error


async def until_idle(gate: Gate, engine: AsyncLLM) -> None:
    """No request runs or waits, nothing is held, in either process, and the gauges say so."""
    inner = gate.engine
    await until(lambda: not inner.has_unfinished_requests, f"the core to become idle. {LOOK_ABORT}")
    assert not engine._streams, f"no open streams, got {list(engine._streams)}. {LOOK_DELIVER}"
    assert not engine.processor._detokenizers, (
        f"detokenizers are kept of {list(engine.processor._detokenizers)}. {LOOK_ABORT}"
    )
    check_engine(inner, "idle")
    idle = {"num_requests_running": 0, "num_requests_waiting": 0, "kv_cache_usage_perc": 0}
    await until(
        lambda: {name: engine.stats().get(name, 0) for name in idle} == idle, f"gauges of an idle engine. {LOOK_STATS}"
    )


# Streams


@on_an_event_loop()
async def test_each_output_arrives_when_its_step_is_done(gate: Gate, engine: AsyncLLM) -> None:
    (text, token_ids), got = gate.answer(7), ""
    outputs = generate(engine, 7).__aiter__()
    for number in range(NUM_TOKENS):
        gate.allow(1)
        output = await within_deadline(outputs.__anext__(), f"output {number} once its step is done. {LOOK_DELIVER}")
        got += output.text
        assert output.token_ids == [token_ids[number]], f"output {number}: {output}, script {token_ids}. {LOOK_DELIVER}"
    assert got == text, f"expected the text {text!r}, got {got!r}. {LOOK_DELIVER}"
    with pytest.raises(StopAsyncIteration):
        await within_deadline(outputs.__anext__(), f"the stream to end after a finish_reason. {LOOK_STREAM}")


@on_an_event_loop(max_num_seqs=3)
async def test_each_reader_gets_its_own_answer(gate: Gate, engine: AsyncLLM) -> None:
    names = [5, 3, 9, 1, 4]
    streams = [generate(engine, name, max_tokens=2 + name) for name in names]
    gate.open()
    got = await asyncio.gather(*(read(stream, "every request") for stream in streams))
    expected = [gate.answer(name, 2 + name) for name in names]
    assert got == expected, f"requests {names}: expected {expected}, got {got}. {LOOK_DELIVER}"
    await until_idle(gate, engine)


@on_an_event_loop()
async def test_a_slow_reader_finds_one_output(gate: Gate, engine: AsyncLLM) -> None:
    """What has arrived since it last read, joined: tokens, text, and how it ended."""
    text, token_ids = gate.answer(3, 12)
    stream = generate(engine, 3, max_tokens=12)
    gate.allow(2)
    outputs = stream.__aiter__()
    pieces = [await within_deadline(outputs.__anext__(), f"the first output. {LOOK_STREAM}")]
    gate.allow(10)
    await until(lambda: not engine._streams, f"the request to end. {LOOK_DELIVER}")

    async def drain() -> list[CompletionOutput]:
        return [output async for output in outputs]

    pieces += await within_deadline(drain(), f"the stream to end. {LOOK_STREAM}")
    assert len(pieces) == 2, (
        f"it read after at most 2 of 12 steps, and after the end: expected 2 outputs, got {len(pieces)}: "
        f"{pieces}. {LOOK_STREAM}"
    )
    joined = join_outputs(pieces)
    assert (joined.text, joined.token_ids) == (text, token_ids), (
        f"expected {(text, token_ids)}, got {(joined.text, joined.token_ids)}. {LOOK_STREAM}"
    )
    reasons = [piece.finish_reason for piece in pieces]
    assert reasons == [None, "length"], f"expected [None, 'length'], got {reasons}. {LOOK_STREAM}"


def test_outputs_that_wait_are_joined() -> None:
    """Their logprobs too. An error is raised after the outputs that arrived before it."""

    async def check() -> None:
        stream, first, second = RequestStream("1"), {5: Logprob(-0.5, 1)}, {6: Logprob(-0.25, 2)}
        stream.put(CompletionOutput(0, "a", [5], None, None, [first]))
        stream.put(CompletionOutput(0, "b", [6], None, None, [second]))
        stream.put(GenerationError("the cat sat on it"))
        outputs, error = await read_error(stream, GenerationError, "the stream", LOOK_STREAM)
        expected = [CompletionOutput(0, "ab", [5, 6], None, None, [first, second])]
        assert outputs == expected and error == "the cat sat on it", f"got {outputs}, {error}. {LOOK_STREAM}"

    asyncio.run(check())


@on_an_event_loop(block_size=4, num_kv_blocks=1 + 9)
async def test_a_preempted_stream_shows_nothing_twice(gate: Gate, engine: AsyncLLM) -> None:
    streams = [generate(engine, name, max_tokens=24) for name in range(4)]
    gate.open()
    got = await asyncio.gather(*(read(stream, "every request") for stream in streams))
    assert gate.engine.scheduler.num_preemptions > 1, "this test needs preemptions"
    for name, answer in enumerate(got):
        expected = gate.answer(name, 24)
        assert answer == expected, f"request {name}: expected {expected}, got {answer}. {LOOK_STREAM}"
    await until_idle(gate, engine)


@on_an_event_loop()
async def test_a_stop_string_ends_a_request_that_the_core_still_computes(gate: Gate, engine: AsyncLLM) -> None:
    """The request is aborted in the core; tokens that it sampled until then are dropped."""
    _, token_ids = gate.answer(3, 20)
    stop = f" w{token_ids[4]}"
    stream = generate(engine, 3, max_tokens=20, stop=[stop])
    other = generate(engine, 4, max_tokens=20)
    gate.open()
    answer = join_outputs(await read_pieces(stream, "a request with a stop string"))
    first = next(number for number in range(20) if token_ids[number] == token_ids[4])
    expected = ("".join(f" w{token_id}" for token_id in token_ids[:first]), "stop", stop, token_ids[: first + 1])
    got = (answer.text, answer.finish_reason, answer.stop_reason, answer.token_ids)
    assert got == expected, f"stop={stop!r}: expected {expected}, got {got}. {LOOK_DELIVER}"
    assert await read(other, "the other request") == gate.answer(4, 20)
    await until_idle(gate, engine)


@on_an_event_loop()
async def test_the_core_aborts_a_request_that_a_stop_string_ended(gate: Gate, engine: AsyncLLM) -> None:
    _, token_ids = gate.answer(3, 50)
    stream = generate(engine, 3, max_tokens=50, stop=[f" w{token_ids[0]}"])
    gate.allow(1)
    pieces = await read_pieces(stream, "a request with a stop string")
    assert [piece.finish_reason for piece in pieces] == ["stop"], f"its first token stops it: {pieces}. {LOOK_DELIVER}"
    gate.must_hear = gate.num_sent
    gate.allow(3)
    await until(
        lambda: not gate.engine.has_unfinished_requests, f"the request to be aborted in the core. {LOOK_DELIVER}"
    )
    await until_idle(gate, engine)


# The queue


@pytest.mark.parametrize("max_queued_requests", [0, 2])
def test_the_queue_is_bounded(max_queued_requests: int) -> None:
    @on_an_event_loop(max_queued_requests, max_num_seqs=2)
    async def check(gate: Gate, engine: AsyncLLM) -> None:
        limit = f"max_num_seqs=2, max_queued_requests={max_queued_requests}"
        names = list(range(2 + max_queued_requests))
        streams = [generate(engine, name) for name in names]
        with pytest.raises(QueueFullError) as at_once:
            generate(engine, 50)
        await until(lambda: gate.begun, f"a step. {LOOK_DELIVER}")
        with pytest.raises(QueueFullError) as while_running:
            generate(engine, 51)
        for caught in (at_once, while_running):
            assert "max_queued_requests" in str(caught.value), f"{limit}: the error names the limit: {caught.value}."
        engine.abort(streams.pop())
        try:
            streams.append(generate(engine, 60))
        except QueueFullError:
            pytest.fail(f"{limit}: a request was aborted, and there is still no room. {LOOK_ABORT}")
        with pytest.raises(QueueFullError):
            generate(engine, 52)
        gate.open()
        names[-1] = 60
        got = await asyncio.gather(*(read(stream, "every accepted request") for stream in streams))
        assert got == [gate.answer(name) for name in names], f"{limit}: got {got}. {LOOK_QUEUE}"
        await until_idle(gate, engine)
        assert await read(generate(engine, 70), "a request when there is room again") == gate.answer(70)

    check()


@on_an_event_loop(max_num_seqs=1, max_queued_requests=0)
async def test_a_client_with_its_whole_answer_may_ask_again_at_once(gate: Gate, engine: AsyncLLM) -> None:
    gate.open()
    for name in range(4):
        try:
            stream = generate(engine, name)
        except QueueFullError:
            pytest.fail(f"request {name - 1} has given its last output and still counts as unfinished. {LOOK_DELIVER}")
        assert await read(stream, "every request") == gate.answer(name)


@on_an_event_loop(num_kv_blocks=1 + 2)
async def test_a_request_that_can_never_be_served_is_refused_at_once(gate: Gate, engine: AsyncLLM) -> None:
    """In this process, without asking the core: its limits came with Ready."""
    for max_tokens, fields in ((100, {}), (3, {"stop_token_ids": [9_999]})):
        with pytest.raises(FieldError):
            generate(engine, 1, max_tokens=max_tokens, **fields)
    assert not engine._streams and not engine.processor._detokenizers, f"a refused request is queued. {LOOK_QUEUE}"
    gate.open()
    assert await read(generate(engine, 2), "the next request") == gate.answer(2)
    assert (engine.max_model_len, engine.vocab_size, engine.num_kv_blocks) == (200, 256, 3), f"limits. {LOOK_START}"


@on_an_event_loop()
async def test_a_request_that_the_core_refuses_gets_an_error(gate: Gate, engine: AsyncLLM) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(async_engine, "check_request", lambda *_: None)
        refused = engine.generate([], SamplingParams(max_tokens=3))
    gate.open()
    _, message = await tokens_and_error(refused, "a request that the core refuses", LOOK_FAIL)
    assert "prompt" in message, f"the error names the field: {message!r}. {LOOK_FAIL}"
    assert await read(generate(engine, 2), "the next request") == gate.answer(2)
    await until_idle(gate, engine)


# Abort


@pytest.mark.parametrize("state", ["just sent", "waiting", "in flight", "preempted", "last token in flight", "ended"])
def test_abort_at_every_point_of_a_request_s_life(state: str) -> None:
    """It is request 1. Four blocks of 4 hold two prompts of 6; when both have nine tokens, it is preempted."""
    flags: dict[str, Any] = {"block_size": 4, "num_kv_blocks": 1 + (4 if state == "preempted" else 100)}
    if state == "waiting":
        flags["max_num_seqs"] = 1
    max_tokens = {"ended": 2, "last token in flight": 3}.get(state, 10)

    @on_an_event_loop(**flags)
    async def check(gate: Gate, engine: AsyncLLM) -> None:
        gate.must_hear = 1 if state == "just sent" else 3
        first = generate(engine, 0, max_tokens=10)
        if state == "just sent":
            await until(lambda: gate.begun, f"the first step to begin. {LOOK_DELIVER}")
        stream = generate(engine, 1, max_tokens=max_tokens)
        last, name = generate(engine, 2, max_tokens=10), stream.request_id
        if state == "ended":
            gate.allow(2)
            assert await read(stream, "the request") == gate.answer(1, 2)
        elif state == "preempted":
            gate.allow(3)
            await until(lambda: name in ids([*gate.engine.scheduler.waiting]), "1 to be preempted")
        elif state != "just sent":
            gate.allow(2)
            await until(lambda: len(gate.begun) == 3, f"the third step to begin. {LOOK_DELIVER}")
        engine.abort(stream)
        engine.abort(stream)
        num_launched = len(gate.launched)
        gate.must_hear = gate.num_sent  # the abort too: ZeroMQ's threads deliver it
        gate.open()
        for number, other in ((0, first), (2, last)):
            got, expected = await read(other, f"request {number}, which was not aborted"), gate.answer(number, 10)
            assert got == expected, f"1 was aborted, {state}: request {number} expects {expected}, got {got}."
        await until_idle(gate, engine)
        late = [step for step in gate.launched[num_launched + 2 :] if name in step]
        assert not late, f"aborted, {state}: it was in {len(late)} more steps than were in flight. {LOOK_ABORT}"
        again = generate(engine, 3)
        engine.abort(stream)
        assert await read(again, "a later request") == gate.answer(3), f"an old abort hit a new request. {LOOK_ABORT}"

    check()


@on_an_event_loop(block_size=4, num_kv_blocks=1 + 16, max_num_seqs=5, max_queued_requests=100)
async def test_many_requests_and_aborts(gate: Gate, engine: AsyncLLM) -> None:
    """Whenever a request is aborted: what was read is right, and nothing is kept."""
    rng = random.Random(0)
    gate.open()

    async def use(name: int) -> None:
        await asyncio.sleep(rng.random() / 20)
        num_tokens, give_up_after = rng.randint(1, 16), rng.choice([0, 1, 5, 99, 99])
        stream, got = generate(engine, name, max_tokens=num_tokens), list[int]()
        if give_up_after:
            async for output in stream:
                got += output.token_ids
                if len(got) >= give_up_after:
                    break
        engine.abort(stream)
        _, expected = gate.answer(name, num_tokens)
        assert got == expected[: len(got)], f"request {name}: expected {expected}, got {got}. {LOOK_DELIVER}"
        assert give_up_after < 99 or got == expected, f"request {name} was not aborted: {expected}, got {got}."

    await asyncio.gather(*map(use, range(100)))
    await until_idle(gate, engine)
    assert await read(generate(engine, 101), "a request afterwards") == gate.answer(101)


# A step that fails


@pytest.mark.parametrize("where", ["launch_error", "result_error"])
def test_a_failed_step_ends_all_requests(where: str) -> None:
    """Two run, two wait. Later requests are served."""

    @on_an_event_loop(max_num_seqs=2)
    async def check(gate: Gate, engine: AsyncLLM) -> None:
        gate.must_hear = 4
        streams = [generate(engine, name, max_tokens=9) for name in range(4)]
        gate.allow(2)
        await until(lambda: len(gate.begun) == 3, f"the third step to begin. {LOOK_DELIVER}")
        setattr(executor_of(gate.engine), where, ZeroDivisionError("the cat sat on it"))
        gate.open()
        for name, stream in enumerate(streams):
            token_ids, message = await tokens_and_error(stream, f"request {name}, in the engine", LOOK_FAIL)
            expected = gate.answer(name, 9)[1]
            assert token_ids == expected[: len(token_ids)] and (len(token_ids) >= 2) is (name < 2), (
                f"{where}, request {name}: expected the beginning of {expected} before, got {token_ids}. {LOOK_FAIL}"
            )
            assert message == "ZeroDivisionError: the cat sat on it", (
                f"{where}, request {name}: expected the cause, got {message!r}. {LOOK_FAIL}"
            )
        await until_idle(gate, engine)
        assert engine.is_alive, f"one failed step ended the engine. {LOOK_FAIL}"
        got = await read(generate(engine, 5), "a request after a failed step")
        assert got == gate.answer(5), f"{where}, the next request: got {got}. {LOOK_FAIL}"

    check()


@on_an_event_loop(max_num_seqs=2)
async def test_two_failed_steps_in_a_row_end_the_core(gate: Gate, engine: AsyncLLM) -> None:
    """The requests of the first step get its cause, those of the second theirs, and so do later ones."""
    gate.must_hear = 1
    first = generate(engine, 0)
    gate.engine.scheduler.schedule = lambda: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    gate.open()
    _, message = await tokens_and_error(first, "the first request", LOOK_FAIL)
    assert message == "ZeroDivisionError: division by zero", f"got {message!r}. {LOOK_FAIL}"
    _, message = await tokens_and_error(generate(engine, 1), "the second request", LOOK_FAIL)
    cause = "two steps in a row failed, the second with ZeroDivisionError: division by zero"
    assert cause in message or message == "ZeroDivisionError: division by zero", f"got {message!r}. {LOOK_FAIL}"
    await until(lambda: not engine.is_alive, f"the engine to end after two failed steps. {LOOK_DEATH}")
    assert engine.cause_of_death == f"the engine core has ended: {cause}", f"got {engine.cause_of_death!r}"
    with pytest.raises(GenerationError, match="two steps in a row failed"):
        generate(engine, 2)


# Death, shutdown


@on_an_event_loop(max_num_seqs=2)
async def test_when_the_core_dies_all_requests_get_the_cause(gate: Gate, engine: AsyncLLM) -> None:
    """Those that run, those that wait, and later ones."""
    gate.must_hear, words = 4, "killed by SIGKILL"
    streams = [generate(engine, name, max_tokens=50) for name in range(4)]
    gate.allow(1)
    await until(lambda: len(gate.begun) == 2, f"the second step to begin. {LOOK_DELIVER}")
    assert engine.is_alive and engine.cause_of_death is None
    engine.core.process.kill()
    for name, stream in enumerate(streams):
        token_ids, message = await tokens_and_error(stream, f"request {name} of a dead core", LOOK_DEATH)
        assert token_ids == gate.answer(name, 50)[1][: len(token_ids)], f"request {name}: {token_ids}"
        assert "engine core has died" in message and words in message, (
            f"request {name} gets the cause: expected {words!r}, got {message!r}. {LOOK_DEATH}"
        )
    assert not engine.is_alive and words in str(engine.cause_of_death), f"{engine.cause_of_death}. {LOOK_DEATH}"
    with pytest.raises(GenerationError, match=words):
        generate(engine, 5)
    engine.abort(streams[0])
    assert not engine._streams and not engine.processor._detokenizers, f"something is kept. {LOOK_DEATH}"
    assert engine.stats()["num_requests_waiting"] == 0, f"got {engine.stats()}. {LOOK_STATS}"


@on_an_event_loop()
async def test_the_last_answers_of_a_core_that_dies_arrive(gate: Gate, engine: AsyncLLM) -> None:
    """They were sent before it died: a request whose whole answer was sent must not end with an error."""
    stream, core = generate(engine, 1, max_tokens=3), engine.core
    receive, arrived = core.receive, []
    core.receive = lambda: arrived.extend(receive()) or []  # type: ignore[func-returns-value, method-assign]
    gate.allow(3)
    await until(lambda: sum(len(message.outputs) for message in arrived) == 3, "the core to have sent the answer")
    core.receive = lambda: [arrived.pop(0) for _ in arrived[:]]  # type: ignore[method-assign]
    core.process.kill()
    assert await read(stream, "a request whose answer was sent") == gate.answer(1, 3), f"{LOOK_DEATH}"


@on_an_event_loop(max_num_seqs=2)
async def test_shutdown_ends_running_and_waiting_requests(gate: Gate, engine: AsyncLLM) -> None:
    gate.must_hear = 4
    streams = [generate(engine, name, max_tokens=100) for name in range(4)]
    gate.allow(1)
    await until(lambda: streams[1]._output, f"the first outputs. {LOOK_DELIVER}")
    readers = [
        asyncio.ensure_future(tokens_and_error(stream, "every request at shutdown", LOOK_SHUTDOWN))
        for stream in streams
    ]
    await within_deadline(asyncio.to_thread(engine.shutdown), f"shutdown to return. {LOOK_SHUTDOWN}")
    for name, (token_ids, message) in enumerate(await asyncio.gather(*readers)):
        assert "shutting down" in message, f"request {name}: expected the reason, got {message!r}. {LOOK_SHUTDOWN}"
        expected = gate.answer(name, 1)[1] if name < 2 else []
        assert token_ids == expected, f"request {name}: expected {expected} before, got {token_ids}. {LOOK_SHUTDOWN}"
    assert not engine.is_alive and not engine.core.process.is_alive(), f"something is alive. {LOOK_SHUTDOWN}"


def test_shutdown_without_an_event_loop() -> None:
    """start() was not called, or the loop has ended."""
    gate = make_gate()
    with gated_engine(gate) as engine:
        process = engine.core.process
        engine.shutdown()
        assert not process.is_alive(), f"the core is alive. {LOOK_SHUTDOWN}"
        engine.shutdown()


# Start


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_only_this_user_can_enter_the_directory_and_it_is_removed_at_once(temporary: Path) -> None:
    gate = make_gate()
    with gated_engine(gate) as engine:
        process = engine.core.process
        assert isinstance(process, CoreThread) and Path(process.directory).parent == temporary
        assert process.mode == 0o700, f"the sockets' directory has mode {process.mode:o}, expected 700. {LOOK_START}"
        found = list(temporary.iterdir())
        assert not found, f"both ends are connected, and {found} is still there. {LOOK_START}"

        async def ask() -> None:
            engine.start()
            gate.open()
            assert await read(generate(engine, 1), "a request over removed sockets") == gate.answer(1)

        asyncio.run(ask())
        engine.shutdown()


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (FieldError("kv_cache_memory", "10 bytes"), FieldError, "kv_cache_memory: 10 bytes"),
        (OSError("no such file: x"), OSError, "no such file: x"),
        (ZeroDivisionError(), OSError, "the engine core did not start (exit status 1)"),
        (None, OSError, "the engine core did not start (exit status 0)"),
    ],
    ids=["field", "os", "bug", "silence"],
)
def test_a_core_that_does_not_start(
    error: Exception | None, kind: type[Exception], text: str, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, processes, init = make_gate(), list[CoreThread](), CoreThread.__init__
    gate.start_error, gate.is_killed = error, error is None

    def note(self: CoreThread, *args: Any) -> None:
        init(self, *args)
        processes.append(self)

    monkeypatch.setattr(CoreThread, "__init__", note)
    with pytest.raises(kind) as caught, gated_engine(gate):
        pytest.fail(f"the core did not start, and there was no error. {LOOK_START}")
    assert type(caught.value) is kind and str(caught.value) == text, (
        f"expected {text!r}, got {caught.value!r}. {LOOK_START}"
    )
    if isinstance(error, FieldError):
        assert isinstance(caught.value, FieldError) and caught.value.field == "kv_cache_memory", f"{caught.value.field}"
    assert not list(temporary.iterdir()), f"left behind: {list(temporary.iterdir())}. {LOOK_START}"
    assert not processes[0].is_alive(), f"the core is alive. {LOOK_START}"


def test_ctrl_c_while_the_core_loads(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, processes = make_gate(), list[Any]()

    def interrupt(self: CoreClient) -> None:
        processes.append(self.process)
        raise KeyboardInterrupt

    monkeypatch.setattr(CoreClient, "_wait_until_ready", interrupt)
    with pytest.raises(KeyboardInterrupt), gated_engine(gate):
        pytest.fail("not interrupted")
    assert not processes[0].is_alive(), f"the core still runs. {LOOK_START}"
    assert not list(temporary.iterdir()), f"left behind: {list(temporary.iterdir())}. {LOOK_START}"


# Gauges


@on_an_event_loop(max_num_seqs=2, num_kv_blocks=1 + 10)
async def test_stats(gate: Gate, engine: AsyncLLM) -> None:
    assert engine.stats()["num_requests_waiting"] == 0, f"idle: got {engine.stats()}. {LOOK_STATS}"
    gate.must_hear = 5
    for name in range(5):
        generate(engine, name)
    waiting = engine.stats()["num_requests_waiting"]
    assert waiting == 5, f"five were sent, no output has arrived: expected 5 waiting, got {waiting}. {LOOK_STATS}"
    gate.allow(1)
    await until(lambda: engine.stats().get("num_requests_running"), f"gauges to arrive with outputs. {LOOK_STATS}")
    expected = {
        "num_requests_running": 2,
        "num_requests_waiting": 3,
        "kv_cache_usage_perc": 0.2,
        "num_preemptions": 0,
    }  # fmt: skip
    assert engine.stats() == expected, (
        f"two of five run, a block of ten each: expected {expected}, got {engine.stats()}. {LOOK_STATS}"
    )
