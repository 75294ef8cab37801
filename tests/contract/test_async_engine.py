"""AsyncLLM of every part: streams, queue, abort, failure and shutdown, over steps that wait for a permit."""

from __future__ import annotations

import asyncio
import random
import threading
from typing import Any

import pytest

from common.errors import FieldError
from common.outputs import join_outputs
from common.sampling_params import SamplingParams
from common.serving import GenerationError, QueueFullError
from tests.async_checks import until, within_deadline
from tests.contract.engines import SmallModels, number_of
from tests.contract.gated_server import (
    LOOK_ABORT,
    LOOK_FAIL,
    LOOK_RUN,
    LOOK_SHUTDOWN,
    LOOK_STATS,
    NUM_TOKENS,
    GatedServer,
    on_an_event_loop,
    run_on_an_event_loop,
)

LOOK_QUEUE = "Look at api/async_engine.py::AsyncLLM.generate."
LOOK_STREAM = "Look at api/async_engine.py::RequestStream."
CAUSE = "ZeroDivisionError: the cat sat on it"


# Streams


@pytest.mark.since(3)
@on_an_event_loop()
async def test_each_output_arrives_when_its_step_is_done(server: GatedServer) -> None:
    (text, token_ids), got = server.answer(7), ""
    outputs = server.generate(7).__aiter__()
    for number in range(NUM_TOKENS):
        server.gate.allow(1)
        output = await within_deadline(outputs.__anext__(), f"output {number} when its step is done. {LOOK_RUN}")
        got += output.text
        assert output.token_ids == [token_ids[number]], (
            f"{server.part}, output {number}: expected token {token_ids[number]}, got {output}. {LOOK_RUN}"
        )
    assert got == text, f"{server.part}: expected the text {text!r}, got {got!r}. {LOOK_RUN}"
    with pytest.raises(StopAsyncIteration):
        await within_deadline(outputs.__anext__(), f"the stream to end after a finish_reason. {LOOK_STREAM}")


@pytest.mark.since(3)
@on_an_event_loop(max_num_seqs=3)
async def test_each_reader_gets_its_own_answer(server: GatedServer) -> None:
    names = [5, 3, 9, 1, 4]
    streams = [server.generate(name, max_tokens=2 + name) for name in names]
    server.gate.open()
    got = await asyncio.gather(*(server.read(stream, "every request") for stream in streams))
    expected = [server.answer(name, 2 + name) for name in names]
    assert got == expected, f"{server.part}, requests {names}: expected {expected}, got {got}. {LOOK_RUN}"
    await server.until_idle()


@pytest.mark.since(3)
@on_an_event_loop()
async def test_the_event_loop_stays_free_while_the_model_computes(server: GatedServer) -> None:
    reader = asyncio.ensure_future(server.read(server.generate(1), "the answer"))
    await server.until_begun(1)
    for _ in range(100):  # other coroutines get their turns while the model is at its first token
        await asyncio.sleep(0)
    server.llm.abort(server.generate(2))  # neither waits for the step
    assert not reader.done(), f"{server.part}: the model had no permit, and there is an answer"
    server.gate.open()
    got = await within_deadline(reader, f"the answer. {LOOK_RUN}")
    assert got == server.answer(1), f"{server.part}: expected {server.answer(1)}, got {got}. {LOOK_RUN}"


@pytest.mark.since(3)
@on_an_event_loop()
async def test_one_thread_serves_all_requests(server: GatedServer) -> None:
    before = set(threading.enumerate())
    streams = [server.generate(name) for name in range(20)]
    server.llm.abort(streams.pop())
    server.gate.open()
    for stream in streams:
        await server.read(stream, "every request")
    await server.until_idle()
    started = set(threading.enumerate()) - before  # threads of earlier engines may end meanwhile
    assert not started, f"{server.part}: 20 requests started {started}. {LOOK_RUN}"
    assert len(server.threads) == 1 and threading.current_thread() not in server.threads, (
        f"{server.part}: steps belong in one thread, and not in the event loop's: got {server.threads}. {LOOK_RUN}"
    )


@pytest.mark.since(3)
@on_an_event_loop()
async def test_when_a_request_that_arrives_during_a_step_joins(server: GatedServer) -> None:
    """The next step that is launched; in part 3, whose batches are static, when the running batch has ended."""
    first = server.generate(1)
    await server.until_begun(1)
    num_launched, second = len(server.launched), server.generate(2)
    server.wait_for_messages()
    server.gate.allow(1)
    await server.until_begun(2)
    expected = [1] if number_of(server.part) == 3 else [1, 2]
    assert server.launched[num_launched] == expected, (
        f"{server.part}: the next step: expected the requests {expected}, got {server.launched}. {LOOK_QUEUE}"
    )
    server.gate.open()
    for name, stream in ((1, first), (2, second)):
        got = await server.read(stream, "every request")
        assert got == server.answer(name), f"{server.part}, request {name}: got {got}. {LOOK_RUN}"
    shared = sum(step == [1, 2] for step in server.launched)
    most = 0 if number_of(server.part) == 3 else NUM_TOKENS - 1
    assert shared <= most and (shared > 0) == (most > 0), (
        f"{server.part}: {shared} steps were shared, expected at most {most}: {server.launched}. {LOOK_RUN}"
    )


@pytest.mark.since(3)
@on_an_event_loop()
async def test_an_idle_engine_takes_no_steps(server: GatedServer) -> None:
    server.gate.open()
    for name in range(3):
        await server.read(server.generate(name), "every request")
    server.llm.abort(server.generate(4))
    await server.until_idle()
    num_steps = len(server.launched)
    await asyncio.sleep(0.02)
    assert len(server.launched) == num_steps, f"{server.part}: idle, and it has taken steps. {LOOK_RUN}"
    assert [] not in server.launched, f"{server.part}: a step without a request: {server.launched}. {LOOK_RUN}"
    needed = sum(4 not in step for step in server.launched)  # request 4 was aborted, sooner or later
    assert needed == 3 * NUM_TOKENS, f"{server.part}: expected {3 * NUM_TOKENS} steps, got {needed}. {LOOK_RUN}"


@pytest.mark.since(4)
@on_an_event_loop()
async def test_a_slow_reader_finds_one_output(server: GatedServer) -> None:
    """What has arrived since it last read, joined: tokens, text, logprobs, and how it ended."""
    stream = server.generate(3, max_tokens=12, logprobs=1)
    outputs = stream.__aiter__()
    server.gate.allow(2)
    pieces = [await within_deadline(outputs.__anext__(), f"the first output. {LOOK_STREAM}")]
    server.gate.allow(10)
    await until(lambda: not server.llm._streams, f"the request to end. {LOOK_RUN}")
    await until(lambda: stream._output is not None and stream._output.finish_reason, "the last output to arrive")
    pieces += [output async for output in outputs]
    assert len(pieces) == 2, (
        f"{server.part}: it read after at most 2 of 12 steps, and after the end: expected 2 outputs, got {pieces}. "
        f"{LOOK_STREAM}"
    )
    joined, expected = join_outputs(pieces), server.answer(3, 12)
    got = (joined.text, joined.token_ids)
    assert got == expected, f"{server.part}: expected {expected}, got {got}. {LOOK_STREAM}"
    sampled = [next(iter(entry)) for entry in joined.logprobs or []]
    assert sampled == expected[1], f"{server.part}: one logprobs entry a token: {expected[1]}, got {sampled}."
    reasons = [piece.finish_reason for piece in pieces]
    assert reasons == [None, "length"], f"{server.part}: expected [None, 'length'], got {reasons}. {LOOK_STREAM}"


@pytest.mark.since(3)
@on_an_event_loop(num_kv_blocks=1 + 9)
async def test_a_preempted_request_streams_no_token_twice(server: GatedServer) -> None:
    streams = [server.generate(name, max_tokens=20) for name in range(4)]
    server.gate.open()
    got = await asyncio.gather(*(server.read(stream, "every request") for stream in streams))
    assert server.inner.queues.num_preemptions > 0, f"{server.part}: this test needs preemptions"
    for name, answer in enumerate(got):
        expected = server.answer(name, 20)
        assert answer == expected, f"{server.part}, request {name}: expected {expected}, got {answer}. {LOOK_STREAM}"
    await server.until_idle()


@pytest.mark.since(3)
@on_an_event_loop()
async def test_a_stop_string_aborts_its_request_in_the_engine(server: GatedServer) -> None:
    _, token_ids = server.answer(4)
    stop = f" w{token_ids[0]}"
    stream = server.generate(4, max_tokens=24, stop=[stop])
    server.gate.allow(1)
    pieces = await server.read_pieces(stream, "a request with a stop string")
    found = [(piece.text, piece.finish_reason, piece.stop_reason, piece.token_ids) for piece in pieces]
    expected = [("", "stop", stop, token_ids[:1])]
    assert found == expected, f"{server.part}: its first token stops it: {expected}, got {pieces}. {LOOK_RUN}"
    server.wait_for_messages()
    server.gate.allow(3)
    await server.until_idle()
    num_steps = len(server.launched)
    most = 3 if server.has_core else 1  # two may be in flight, and one be launched before the abort arrives
    assert num_steps <= most, f"{server.part}: stopped by its first token, it was in {num_steps} steps. {LOOK_ABORT}"


# The queue


@pytest.mark.since(3)
@pytest.mark.parametrize("max_queued_requests", [0, 3])
def test_the_queue_is_bounded(part: str, small_models: SmallModels, max_queued_requests: int) -> None:
    async def check(server: GatedServer) -> None:
        limit = f"{part}, max_num_seqs=2, max_queued_requests={max_queued_requests}"
        names = list(range(2 + max_queued_requests))
        streams = [server.generate(name) for name in names]
        with pytest.raises(QueueFullError) as at_once:
            server.generate(50)
        await server.until_begun(1)
        with pytest.raises(QueueFullError) as while_running:
            server.generate(51)
        for caught in (at_once, while_running):
            for word in ("max_queued_requests", str(len(streams))):
                assert word in str(caught.value), f"{limit}: the error must name value and limit: {caught.value}."
        server.llm.abort(streams.pop())
        try:
            streams.append(server.generate(60))
        except QueueFullError:
            pytest.fail(f"{limit}: a request was aborted, and still counts. {LOOK_ABORT}")
        with pytest.raises(QueueFullError):
            server.generate(52)
        names[-1] = 60
        server.gate.open()
        got = await asyncio.gather(*(server.read(stream, "every accepted request") for stream in streams))
        assert got == [server.answer(name) for name in names], f"{limit}: got {got}. {LOOK_QUEUE}"
        ran = {name for step in server.launched for name in step}
        assert not ran & {50, 51, 52}, f"{limit}: a refused request ran: {ran}. {LOOK_QUEUE}"
        await server.until_idle()
        await server.check_next()

    flags = {"max_num_seqs": 2, "max_queued_requests": max_queued_requests}
    run_on_an_event_loop(GatedServer(part, small_models, **flags), check)


@pytest.mark.since(3)
@on_an_event_loop(max_num_seqs=1, max_queued_requests=0)
async def test_a_client_with_its_whole_answer_may_ask_again_at_once(server: GatedServer) -> None:
    """The request has ended when its reader gets the last output, not some time later."""
    server.gate.open()
    for name in range(10):
        try:
            stream = server.generate(name)
        except QueueFullError:
            pytest.fail(f"{server.part}: request {name - 1} has its last output and still counts. {LOOK_QUEUE}")
        assert await server.read(stream, "every request") == server.answer(name), f"{server.part}, request {name}"


@pytest.mark.since(3)
@on_an_event_loop(num_kv_blocks=1 + 4)
async def test_what_can_never_be_served_is_refused_at_once(server: GatedServer) -> None:
    with pytest.raises(FieldError, match="^prompt: "):
        server.llm.generate([], SamplingParams(max_tokens=3))
    for max_tokens, fields in ((100, {}), (3, {"stop_token_ids": [9_999]})):
        with pytest.raises(FieldError):
            server.generate(1, max_tokens=max_tokens, **fields)
    assert not server.llm._streams and not server.llm.processor._detokenizers, (
        f"{server.part}: a refused request is queued. {LOOK_QUEUE}"
    )
    assert server.llm.stats()["num_requests_waiting"] == 0, f"{server.part}: it counts as waiting. {LOOK_QUEUE}"
    server.gate.open()
    await server.check_next()


# Abort


@pytest.mark.since(3)
@pytest.mark.parametrize("state", ["just sent", "waiting", "running", "preempted", "last token in flight", "ended"])
def test_abort_at_every_point_of_a_requests_life(part: str, small_models: SmallModels, state: str) -> None:
    """It is request 1. Four blocks of 4 hold two prompts of 6; when both have nine tokens, it is preempted."""
    flags: dict[str, Any] = {"num_kv_blocks": 1 + (4 if state == "preempted" else 100)}
    flags["max_num_seqs"] = 1 if state == "waiting" else 4
    max_tokens = {"ended": 2, "last token in flight": 3}.get(state, 10)

    async def check(server: GatedServer) -> None:
        if state == "just sent":
            [first] = await server.generate_together({0: 10})
            stream, last = (server.generate(name, max_tokens=10) for name in (1, 2))
        else:
            first, stream, last = await server.generate_together(dict.fromkeys(range(3), max_tokens))
        await bring_to(server, state, stream)
        server.llm.abort(stream)
        server.llm.abort(stream)
        num_launched = len(server.launched)
        server.wait_for_messages()
        server.gate.open()
        for name, other in ((0, first), (2, last)):
            got = await server.read(other, f"request {name}, which was not aborted")
            expected = server.answer(name, max_tokens)
            assert got == expected, f"{part}: 1 was aborted, {state}: request {name} expects {expected}, got {got}."
        await server.until_idle()
        late = [step for step in server.launched[num_launched + 2 * server.has_core :] if 1 in step]
        assert not late, f"{part}: aborted, {state}, request 1 was in {len(late)} more steps. {LOOK_ABORT}"
        again = server.generate(3)
        server.llm.abort(stream)
        got = await server.read(again, "a later request")
        assert got == server.answer(3), f"{part}: an old abort hit a new request, {got}. {LOOK_ABORT}"

    run_on_an_event_loop(GatedServer(part, small_models, **flags), check)


async def bring_to(server: GatedServer, state: str, stream: Any) -> None:
    """Requests 0, 1 and 2 are in the engine, whose first step with them has begun: go on until 1 is in this state."""
    if state in ("running", "last token in flight"):
        server.gate.allow(2)
        await server.until_begun(4)
    elif state == "ended":
        server.gate.allow(2)
        assert await server.read(stream, "the request") == server.answer(1, 2)
    elif state == "preempted":
        while not server.inner.queues.num_preemptions:
            num_begun = len(server.gate.begun)
            assert num_begun < 10, f"{server.part}: this test needs a preemption"
            server.gate.allow(1)
            await server.until_begun(num_begun + 1)
        [preempted] = [each for each in server.inner.queues.waiting if each.status.name == "PREEMPTED"]
        assert preempted.request_id == stream.request_id, f"{server.part}: {preempted} was preempted, and not 1"


@pytest.mark.since(3)
@on_an_event_loop(num_kv_blocks=1 + 16, max_num_seqs=5, max_queued_requests=100)
async def test_many_requests_and_aborts(server: GatedServer) -> None:
    """Whenever a request is aborted: what was read is right, and nothing is kept."""
    rng, num_whole = random.Random(0), 0
    server.gate.open()

    async def use(name: int) -> None:
        nonlocal num_whole
        await asyncio.sleep(rng.random() / 20)
        num_tokens, give_up_after = rng.randint(1, 16), rng.choice([0, 1, 5, 99, 99])
        stream, got = server.generate(name, num_tokens), list[int]()
        if give_up_after:
            async for output in stream:
                got += output.token_ids
                if len(got) >= give_up_after:
                    break
        server.llm.abort(stream)
        _, expected = server.answer(name, num_tokens)
        assert got == expected[: len(got)], f"{server.part}, request {name}: expected {expected}, got {got}. {LOOK_RUN}"
        assert give_up_after < 99 or got == expected, f"{server.part}, request {name}: expected {expected}, got {got}."
        num_whole += got == expected

    await asyncio.gather(*(use(number % 10) for number in range(60)))
    await server.until_idle()
    assert num_whole >= 20, f"{server.part}: this test needs whole answers, got {num_whole}"
    await server.check_next()


# A step that fails


@pytest.mark.since(3)
@pytest.mark.parametrize("where", ["launch", "result"])
def test_a_failed_step_ends_all_requests_in_the_engine(part: str, small_models: SmallModels, where: str) -> None:
    """Two run and two wait. One that arrives during the failed step is served."""

    async def check(server: GatedServer) -> None:
        # The third token of request 0 is its last, and is lost with the fourth step.
        streams = await server.generate_together({0: 3 if where == "result" else 10, 1: 10, 2: 10, 3: 10})
        server.gate.allow(2)
        await server.until_begun(4)
        errors = server.launch_errors if where == "launch" else server.errors
        errors.append(ZeroDivisionError("the cat sat on it"))
        late = server.generate(4) if where == "result" and not server.has_core else None
        server.gate.open()
        for name, stream in enumerate(streams):
            token_ids, message = await server.read_error(stream, f"request {name}, in the engine when a step failed")
            expected = server.answer(name, 10)[1][: len(token_ids)]
            assert token_ids == expected and (len(token_ids) >= 2) is (name < 2), (
                f"{part}, {where}, request {name}: before, expected {expected}, got {token_ids}. {LOOK_FAIL}"
            )
            assert message == CAUSE, f"{part}, {where}, request {name}: got {message!r}. {LOOK_FAIL}"
        if late is not None:
            got = await server.read(late, "a request that arrived during the failed step")
            assert got == server.answer(4), f"{part}, {where}: expected {server.answer(4)}, got {got}. {LOOK_FAIL}"
        await server.until_idle()
        await server.check_next()

    run_on_an_event_loop(GatedServer(part, small_models, max_num_seqs=2), check)


@pytest.mark.since(3)
@on_an_event_loop()
async def test_a_request_that_is_aborted_in_a_failing_step(server: GatedServer) -> None:
    aborted, stays = await server.generate_together({0: 10, 1: 10})
    server.llm.abort(aborted)
    server.errors.append(ZeroDivisionError("the cat sat on it"))
    server.gate.open()
    _, message = await server.read_error(stays, "the other request of the step")
    assert message == CAUSE, f"{server.part}: expected {CAUSE!r}, got {message!r}. {LOOK_FAIL}"
    await server.until_idle()
    await server.check_next()


@pytest.mark.since(3)
@on_an_event_loop(max_num_seqs=1)
async def test_a_good_step_between_two_failed_ones_keeps_the_engine_alive(server: GatedServer) -> None:
    server.gate.open()
    for name in range(3):
        server.errors.append(ZeroDivisionError("the cat sat on it"))
        _, message = await server.read_error(server.generate(name), f"request {name}, whose step fails")
        assert message == CAUSE, f"{server.part}: got {message!r}. {LOOK_FAIL}"
        await server.check_next(name)


@pytest.mark.since(3)
@on_an_event_loop(max_num_seqs=1)
async def test_two_failed_steps_in_a_row_end_the_engine(server: GatedServer) -> None:
    """The requests of the first step get its cause, the others the second's, and so do all that come later."""
    streams = await server.generate_together({0: NUM_TOKENS})
    server.errors += [ZeroDivisionError("the cat sat on it"), ValueError("the dog ate it")]
    server.gate.allow(1 + server.has_core)  # from part 5 on, the step in flight behind the failed one asks too
    _, message = await server.read_error(streams[0], "the request of the first failed step")
    assert message == CAUSE, f"{server.part}: expected {CAUSE!r}, got {message!r}. {LOOK_FAIL}"
    assert server.llm.is_alive, f"{server.part}: one failed step ended the engine. {LOOK_FAIL}"
    if server.has_core:  # which the step in flight has used up
        server.errors.append(ValueError("the dog ate it"))
    late = [server.generate(name) for name in (1, 2)]
    server.gate.open()
    for stream in late:
        token_ids, message = await server.read_error(stream, "a request of the second failed step")
        assert "the dog ate it" in message and not token_ids, f"{server.part}: {token_ids}, {message!r}. {LOOK_FAIL}"
    await until(lambda: not server.llm.is_alive, f"{server.part} to end after two failed steps. {LOOK_FAIL}")
    cause = "two steps in a row failed, the second with ValueError: the dog ate it"
    assert cause in str(server.llm.cause_of_death), f"{server.part}: {server.llm.cause_of_death!r}. {LOOK_FAIL}"
    with pytest.raises(GenerationError, match=cause):
        server.generate(3)
    server.llm.abort(late[0])  # the server may do so with any stream
    assert server.llm.stats()["num_requests_waiting"] == 0, f"{server.part}: {server.llm.stats()}. {LOOK_STATS}"
    assert not server.llm._streams and not server.llm.processor._detokenizers, f"{server.part}: something is kept."


@pytest.mark.since(3)
@on_an_event_loop()
async def test_a_reader_whose_event_loop_is_closed(server: GatedServer) -> None:
    """Its outputs are dropped; the engine goes on."""

    async def ask() -> None:
        server.generate(1)

    await asyncio.to_thread(asyncio.run, ask())
    server.gate.open()
    await server.check_next()
    await server.until_idle()


# Shutdown and gauges


@pytest.mark.since(3)
@on_an_event_loop(max_num_seqs=2)
async def test_shutdown_ends_running_and_waiting_requests(server: GatedServer) -> None:
    streams = await server.generate_together(dict.fromkeys(range(4), 24))
    server.gate.allow(1)
    await server.until_begun(3)
    streams.append(server.generate(4, max_tokens=24))
    readers = [asyncio.ensure_future(server.read_error(stream, "every request at shutdown")) for stream in streams]
    end = asyncio.ensure_future(asyncio.to_thread(server.llm.shutdown))
    if not server.has_core:  # it finishes the step that it is in; a core's process is told to end
        await until(lambda: server.llm._stopping, f"shutdown to begin. {LOOK_SHUTDOWN}")
        server.gate.open()
    await within_deadline(end, f"{server.part}: shutdown to return. {LOOK_SHUTDOWN}")
    for name, (token_ids, message) in enumerate(await asyncio.gather(*readers)):
        assert "shutting down" in message, f"{server.part}, request {name}: got {message!r}. {LOOK_SHUTDOWN}"
        expected = server.answer(name)[1][:2] if name < 2 else []
        assert token_ids == expected[: len(token_ids)], (
            f"{server.part}, request {name}: expected {expected} before, got {token_ids}. {LOOK_SHUTDOWN}"
        )
    assert not server.llm.is_alive, f"{server.part}: still alive. {LOOK_SHUTDOWN}"
    later = {name for step in server.launched for name in step} & {2, 3, 4}
    assert not later, f"{server.part}: requests {later} started at shutdown. {LOOK_SHUTDOWN}"


@pytest.mark.since(3)
@on_an_event_loop()
async def test_shutdown_when_idle_and_twice(server: GatedServer) -> None:
    assert server.llm.is_alive, f"{server.part}: a started engine is alive. {LOOK_RUN}"
    for _ in range(2):
        await within_deadline(asyncio.to_thread(server.llm.shutdown), f"shutdown to return. {LOOK_SHUTDOWN}")
        assert not server.llm.is_alive, f"{server.part}: still alive. {LOOK_SHUTDOWN}"


@pytest.mark.since(3)
@on_an_event_loop(max_num_seqs=2, num_kv_blocks=1 + 20)
async def test_gauges(server: GatedServer) -> None:
    async def until_gauges(running: int, waiting: int, usage: float) -> None:
        expected = {
            "num_requests_running": running, "num_requests_waiting": waiting, "kv_cache_usage_perc": usage,
            "num_preemptions": 3,
        }  # fmt: skip
        await until(
            lambda: {name: server.llm.stats().get(name, 0) for name in expected} == expected,
            f"{server.part}: {expected}, got {server.llm.stats()}. {LOOK_STATS}",
        )

    server.inner.queues.num_preemptions = 3
    streams = await server.generate_together(dict.fromkeys(range(5), NUM_TOKENS))
    server.gate.allow(1)
    await until_gauges(running=2, waiting=3, usage=4 / 20)
    server.llm.abort(streams.pop())
    await until_gauges(running=2, waiting=2, usage=4 / 20)
    server.gate.open()
    for stream in streams:
        await server.read(stream, "every request")
    await until_gauges(running=0, waiting=0, usage=0)


@pytest.mark.since(3)
def test_the_longest_request_that_fits(part: str, small_models: SmallModels) -> None:
    """Prompt and answer together: the key and value of the last token are never stored."""
    for num_blocks, max_model_len, expected in ((100, 128, 128), (100, 64, 64), (10, 128, 41)):
        flags = {"num_kv_blocks": 1 + num_blocks, "max_model_len": max_model_len}
        server = GatedServer(part, small_models, **flags, max_num_seqs=3, max_queued_requests=5)
        with server.running():
            got = (server.llm.max_request_len, server.llm.max_model_len, server.llm.max_num_unfinished)
            if server.has_core:
                server.llm.shutdown()
        assert got == (expected, max_model_len, 8), (
            f"{part}, {num_blocks} blocks of 4, max_model_len={max_model_len}, 3 that run and 5 that wait: expected "
            f"max_request_len, max_model_len and max_num_unfinished {(expected, max_model_len, 8)}, got {got}. "
            "Look at api/async_engine.py::AsyncLLM.__init__."
        )
