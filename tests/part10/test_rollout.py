"""router/fleet.py over replicas without processes: what dies and starts at which moment, the test decides."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from part10_data_parallelism.router import fleet as module
from part10_data_parallelism.router.fleet import Fleet
from part10_data_parallelism.router.policies import make_policy
from part10_data_parallelism.router.pool import Pool

LOOK = 'Look at router/fleet.py::Fleet; README "Replicas come and go".'


class Started:
    def __init__(self, number: int, flags: Sequence[str]) -> None:
        self.url, self.flags = f"http://replica-{number}", list(flags)
        self.end: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.is_stopped = False

    async def wait(self) -> str:
        return str(await asyncio.shield(self.end))

    async def stop(self, timeout_s: float = 0.0) -> None:
        self.is_stopped = True
        self.die("was stopped")

    def die(self, how: str = "was killed") -> None:
        if not self.end.done():
            self.end.set_result(how)


class Scripted:
    """A fleet. made: all replicas that were started, in order. on_start: what happens while one with the new flags
    starts."""

    def __init__(self, size: int = 2) -> None:
        self.made: list[Started] = []
        self.on_start: Callable[[], None] = lambda: None
        pool = Pool(make_policy("least_pending", 1), 10, 10)
        health: Any = SimpleNamespace(watch=lambda replica: None)
        self.fleet = Fleet(pool, health, self.start, ["old"], size)

    async def start(self, flags: Sequence[str]) -> Started:
        if flags == ["new"]:
            self.on_start()
        await asyncio.sleep(0.001)
        self.made.append(Started(len(self.made), flags))
        return self.made[-1]

    def serving(self) -> list[str]:
        """The flags of those in the pool."""
        by_url = {each.url: each for each in self.made}
        return sorted(by_url[replica.url].flags[0] for replica in self.fleet.pool.replicas)

    async def until(self, flags: list[str]) -> None:
        for _ in range(1_000):
            if self.serving() == flags and len(self.fleet.started) == len(flags):
                return
            await asyncio.sleep(0.002)
        pytest.fail(f"expected replicas {flags} to serve, got {self.serving()}. {LOOK}")


def scripted(test: Callable[[Scripted], Awaitable[None]]) -> Callable[..., None]:
    def run(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "RESTART_S", 0.002)

        async def main() -> None:
            script = Scripted()
            await script.fleet.start()
            await test(script)
            await script.fleet.stop()
            left = [each.url for each in script.made if not each.end.done()]
            assert not left, f"{left} were not stopped. {LOOK}"

        asyncio.run(asyncio.wait_for(main(), 60))

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@scripted
async def test_all_are_replaced_one_by_one(script: Scripted) -> None:
    seen = []
    script.on_start = lambda: seen.append(script.serving())
    await script.fleet.roll(["new"])
    assert seen == [["old", "old"], ["new", "old"]], f"serving while each new one starts: {seen}. {LOOK}"
    await script.until(["new", "new"])


@pytest.mark.parametrize("number", [0, 1])
def test_an_old_one_dies_while_a_new_one_starts(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever it is, there are as many as before in the end, and all are new."""

    async def test(script: Scripted) -> None:
        script.on_start = lambda: script.made[number].die()
        await script.fleet.roll(["new"])
        await script.until(["new", "new"])
        await asyncio.sleep(0.02)
        assert script.serving() == ["new", "new"], f"got {script.serving()}. {LOOK}"

    scripted(test)(monkeypatch)


@pytest.mark.parametrize("kind", [OSError, ValueError])
def test_a_new_version_that_does_not_start(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """The old ones stay, and those that have died meanwhile are replaced by their like."""

    async def test(script: Scripted) -> None:
        def fail() -> None:
            script.made[0].die()
            raise kind("the cat sat on the model")

        script.on_start = fail
        with pytest.raises(kind, match="the cat sat"):
            await asyncio.gather(script.fleet.roll(["new"]))
        await script.until(["old", "old"])

    scripted(test)(monkeypatch)


@pytest.mark.parametrize("kind", [OSError, ValueError])
def test_a_replacement_that_does_not_start_is_tried_again(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(script: Scripted) -> None:
        start, errors = script.fleet.start_one, [kind("once"), kind("twice")]

        async def fail_twice(flags: Sequence[str]) -> Any:
            if errors:
                raise errors.pop()
            return await start(flags)

        script.fleet.start_one = fail_twice
        script.made[0].die()
        while errors:
            await asyncio.sleep(0.001)
        await script.until(["old", "old"])

    scripted(test)(monkeypatch)


@scripted
async def test_one_that_is_retired_does_not_come_back(script: Scripted) -> None:
    [retired, other] = list(script.fleet.started)
    await script.fleet.retire(retired)
    assert script.made[0].is_stopped, f"its process must end. {LOOK}"
    await script.until(["old"])
    await script.fleet.roll(["new"])
    await script.until(["new"])
    assert other not in script.fleet.started, LOOK


@scripted
async def test_one_that_dies_is_replaced(script: Scripted) -> None:
    for _ in range(3):
        next(each for each in script.made if not each.end.done()).die()
        await asyncio.sleep(0.01)
        await script.until(["old", "old"])
    assert len(script.made) == 5, f"{len(script.made)} were started. {LOOK}"
