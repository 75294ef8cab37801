"""What the tests of every AsyncLLM need: waiting that says what did not happen, and an engine that always ends."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterable, Awaitable, Callable, Iterator
from typing import Any, Protocol, TypeVar

import pytest

DEADLINE_S = 20  # for what takes milliseconds; only a mistake makes a test wait this long
T = TypeVar("T")


class Engine(Protocol):
    """What every part's AsyncLLM has."""

    @property
    def is_alive(self) -> bool: ...

    def shutdown(self) -> None: ...


async def until(condition: Callable[[], object], what: str) -> None:
    """Wait for the condition; fails with `expected <what>` at the deadline."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"expected {what.rstrip('.')}. Nothing happened for {DEADLINE_S} s."
        await asyncio.sleep(0.001)


async def within_deadline(awaitable: Awaitable[T], what: str) -> T:
    """What the awaitable returns; fails with `expected <what>` at the deadline."""
    try:
        return await asyncio.wait_for(awaitable, DEADLINE_S)
    except asyncio.TimeoutError:
        pytest.fail(f"expected {what.rstrip('.')}. Nothing happened for {DEADLINE_S} s.")


async def read_error(stream: AsyncIterable[Any], kind: type[Exception], what: str, look: str) -> tuple[list[Any], str]:
    """The outputs of a request that fails, and the text of the error of that kind that it ends with."""
    outputs: list[Any] = []

    async def read() -> None:
        async for output in stream:
            outputs.append(output)

    with pytest.raises(kind) as caught:
        await within_deadline(read(), f"{what} to end with a {kind.__name__}. {look}")
    return outputs, str(caught.value)


@contextlib.contextmanager
def shut_down_at_the_end(engine: Engine, let_go: Callable[[], None], look: str) -> Iterator[None]:
    """However the test inside ends: let_go frees the model, then shutdown must end the engine's thread."""
    errors: list[Exception] = []

    def shut_down() -> None:
        try:
            engine.shutdown()
        except Exception as error:
            errors.append(error)

    try:
        yield
    finally:
        let_go()
        end = threading.Thread(target=shut_down, daemon=True)
        end.start()
        end.join(DEADLINE_S)
        if errors:  # what abort raises, say: not a matter of the thread that it was called on
            raise errors[0]
        assert not end.is_alive() and not engine.is_alive, f"shutdown did not end the thread. {look}"
