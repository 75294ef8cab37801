"""router/admission.py: a bounded queue, fair turns, and a budget of retries."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from common.serving import QueueFullError
from part10_data_parallelism.router.admission import FairQueue, RetryBudget

LOOK = 'Look at router/admission.py::FairQueue; README "Fair turns".'
LOOK_NEXT = 'Look at router/admission.py::FairQueue._take_next; README "Fair turns".'
LOOK_BUDGET = 'Look at router/admission.py::RetryBudget; README "When a replica fails".'


def on_an_event_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    def run() -> None:
        asyncio.run(test())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


async def ask(
    queue: FairQueue, names: str, turns: list[str] | None = None
) -> tuple[list[str], dict[str, asyncio.Task[Any]]]:
    """One request for each letter, in this order; a letter is a client. Returns who has had a turn, in order."""
    turns = [] if turns is None else turns

    async def wait(client: str, name: str) -> None:
        await queue.acquire(client)
        turns.append(name)

    tasks = {}
    for number, client in enumerate(names):
        tasks[f"{client}{number}"] = asyncio.create_task(wait(client, f"{client}{number}"))
        await asyncio.sleep(0)
    return turns, tasks


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def waiting(queue: FairQueue) -> dict[str, int]:
    """How many requests of each client wait; the next client first."""
    return {client: len(turns) for client, turns in queue._turns.items()}


def release(queue: FairQueue) -> None:
    """FairQueue.release, and then what it has noted must agree."""
    before = waiting(queue)
    what = f"a request ended while {before} waited"
    try:
        queue.release()
    except (LookupError, StopIteration, asyncio.InvalidStateError) as error:
        pytest.fail(f"{what}: release() fails with {error!r}. {LOOK_NEXT}")
    check(queue, what)


def resize(queue: FairQueue, max_running: int) -> None:
    before = waiting(queue)
    what = f"max_running changed to {max_running} while {before} waited"
    try:
        queue.resize(max_running)
    except (LookupError, StopIteration, asyncio.InvalidStateError) as error:
        pytest.fail(f"{what}: resize() fails with {error!r}. {LOOK_NEXT}")
    check(queue, what)


def check(queue: FairQueue, what: str) -> None:
    """Those who wait are in _turns, and nobody else is."""
    got = waiting(queue)
    assert all(got.values()), (
        f"{what}: expected _turns to hold only clients that still have a request waiting, got {got}. {LOOK_NEXT}"
    )
    num_done = sum(turn.done() for turns in queue._turns.values() for turn in turns)
    assert not num_done, (
        f"{what}: expected a request whose turn has come to leave _turns, {num_done} did not: {got}. {LOOK_NEXT}"
    )
    assert sum(got.values()) == queue.num_waiting, (
        f"{what}: expected as many requests in _turns as num_waiting says, {queue.num_waiting}, got {got}. "
        f"_take_next() takes out one, and _start_next() counts it. {LOOK_NEXT}"
    )
    assert queue.num_running <= queue.max_running or not queue.num_waiting, (
        f"{what}: {queue.num_running} run, max_running is {queue.max_running}. {LOOK_NEXT}"
    )


def check_idle(queue: FairQueue) -> None:
    assert (queue.num_running, queue.num_waiting) == (0, 0), (
        f"all requests have ended: expected none to run or wait, got {queue.num_running} and {queue.num_waiting}. "
        f"{LOOK}"
    )
    check(queue, "all requests have ended")


@on_an_event_loop
async def test_clients_take_turns() -> None:
    queue = FairQueue(max_running=1, max_waiting=10)
    turns, _ = await ask(queue, "aaaabbc")
    for _ in range(6):
        release(queue)
        await settle()
    expected = ["a0", "a1", "b4", "c6", "a2", "b5", "a3"]
    assert turns == expected, (
        f"the clients a, a, a, a, b, b, c ask in this order, and one request runs at a time: expected the turns "
        f"{expected}, got {turns}. A client that has had its turn goes behind the others. {LOOK_NEXT}"
    )
    release(queue)
    check_idle(queue)


@on_an_event_loop
async def test_one_client_with_many_requests_does_not_starve_another() -> None:
    queue = FairQueue(max_running=1, max_waiting=1_000)
    turns, _ = await ask(queue, "a" * 1_000 + "b")
    while "b1000" not in turns and len(turns) < 10:
        release(queue)
        await settle()
    assert turns == ["a0", "a1", "b1000"], (
        f"client a has sent 1,000 requests, and then client b one, its number 1000: expected the first turns to be "
        f"a0, a1, b1000, got {turns}. One client's requests must not delay another's. {LOOK_NEXT}"
    )


@on_an_event_loop
async def test_new_clients_do_not_starve_one_that_waits() -> None:
    """Another new client asks whenever a request ends."""
    queue = FairQueue(max_running=1, max_waiting=10)
    turns, _ = await ask(queue, "xaab")
    for client in "cdef":
        await ask(queue, client, turns)
        release(queue)
        await settle()
    expected = ["x0", "a1", "b3", "c0", "a2"]
    assert turns == expected, (
        f"the clients a, a, b wait, and before each turn a new client c, d, e, f asks once: expected the turns "
        f"{expected}, got {turns}. New clients join behind those that wait. {LOOK_NEXT}"
    )


@on_an_event_loop
async def test_the_queue_is_bounded() -> None:
    queue = FairQueue(max_running=2, max_waiting=3)
    await ask(queue, "aaaaa")
    got = queue.num_running, queue.num_waiting
    assert got == (2, 3), f"5 requests, max_running=2: expected 2 to run and 3 to wait, got {got}. {LOOK}"
    with pytest.raises(QueueFullError, match="3 requests are waiting"):
        await queue.acquire("a")


@on_an_event_loop
async def test_a_full_queue_refuses_the_client_with_the_most_requests() -> None:
    """Else one client could keep all others out."""
    queue = FairQueue(max_running=1, max_waiting=3)
    turns, tasks = await ask(queue, "aaaa")
    _, later = await ask(queue, "b", turns)
    await settle()
    with pytest.raises(QueueFullError, match="3 requests are waiting"):
        await tasks["a3"]
    assert waiting(queue) == {"a": 2, "b": 1}, f"expected a's latest to be refused, got {waiting(queue)}. {LOOK}"
    _, refused = await ask(queue, "b", turns)  # it would have as many as a
    with pytest.raises(QueueFullError):
        await refused["b0"]
    for _ in range(3):
        release(queue)
        await settle()
    assert turns == ["a0", "a1", "b0", "a2"], f"got the turns {turns}. {LOOK}"
    await asyncio.gather(*later.values())
    release(queue)
    check_idle(queue)


@on_an_event_loop
async def test_a_client_that_leaves_when_the_last_replica_is_lost() -> None:
    """It never ran, so it must not count as one that has ended."""
    queue = FairQueue(max_running=1, max_waiting=3)
    _, tasks = await ask(queue, "ab")
    resize(queue, 0)
    tasks["b1"].cancel()
    await settle()
    release(queue)
    check_idle(queue)


@on_an_event_loop
async def test_nobody_overtakes_those_who_wait() -> None:
    queue = FairQueue(max_running=1, max_waiting=10)
    turns, _ = await ask(queue, "ab")
    release(queue)  # b's turn, which its task has not seen yet
    assert queue.num_running == 1, f"b's turn has come: expected 1 request to run, got {queue.num_running}. {LOOK}"
    later = asyncio.create_task(queue.acquire("c"))
    await settle()
    assert turns == ["a0", "b1"] and not later.done(), (
        f"expected the turns a0 and b1, and c to wait, got {turns}, and c {'runs' if later.done() else 'waits'}. {LOOK}"
    )
    later.cancel()
    await settle()


@on_an_event_loop
async def test_a_client_that_leaves_gives_its_turn_back() -> None:
    queue = FairQueue(max_running=1, max_waiting=10)
    turns, tasks = await ask(queue, "abab")
    tasks["b1"].cancel()
    await settle()
    assert queue.num_waiting == 2, f"b1 has left: expected 2 requests to wait, got {queue.num_waiting}. {LOOK}"
    release(queue)
    tasks["a2"].cancel()  # its turn has come at this very moment
    await settle()
    assert turns == ["a0", "b3"] and queue.num_running == 1, (
        f"b1 and a2 have left: expected the turns a0 and b3, and 1 request to run, got {turns} and "
        f"{queue.num_running}. {LOOK}"
    )
    release(queue)
    check_idle(queue)


@on_an_event_loop
async def test_a_client_that_leaves_at_the_moment_of_its_turn() -> None:
    """It is still in the queue when its turn comes, or when the last replica is lost."""
    queue = FairQueue(max_running=1, max_waiting=10)
    turns, tasks = await ask(queue, "abcd")
    tasks["b1"].cancel()
    release(queue)
    await settle()
    assert turns == ["a0", "c2"] and (queue.num_running, queue.num_waiting) == (1, 1), (
        f"b1 has left: expected c2 to run and d3 to wait, got {turns}, {queue.num_running}, {queue.num_waiting}. {LOOK}"
    )
    tasks["d3"].cancel()
    resize(queue, 0)
    await settle()
    release(queue)
    check_idle(queue)


@on_an_event_loop
async def test_new_replicas_start_those_who_wait() -> None:
    queue = FairQueue(max_running=1, max_waiting=10)
    turns, _ = await ask(queue, "abc")
    resize(queue, 3)
    await settle()
    assert turns == ["a0", "b1", "c2"], f"room for 3: expected the turns a0, b1, c2, got {turns}. {LOOK_NEXT}"
    resize(queue, 1)
    for _ in range(3):
        release(queue)
    check_idle(queue)


def test_retries_are_a_share_of_the_requests() -> None:
    budget = RetryBudget(share=0.25, reserve=4)
    assert [budget.allows_retry() for _ in range(6)] == [True] * 4 + [False] * 2, LOOK_BUDGET
    got = 0
    for _ in range(400):
        budget.note_request()
        got += budget.allows_retry()
    assert got == 100, f"400 requests allow 100 retries, got {got}. {LOOK_BUDGET}"
