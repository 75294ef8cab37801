"""core/lockstep.py: cores that share experts take the same steps."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from part11_expert_parallelism.core.lockstep import INTERVAL, Lockstep

LOOK = 'Look at core/lockstep.py::Lockstep; README "Cores in step".'


@dataclass
class Core:
    """A scripted engine core: work is how many steps its requests still need; two steps may be in flight."""

    lockstep: Lockstep = field(default_factory=Lockstep)
    work: int = 0
    launched: list[bool | None] = field(default_factory=list)
    num_read: int = 0
    inbox: list[int] = field(default_factory=list)


class Cores:
    """Runs cores in any order. A step ends when all cores have launched it."""

    def __init__(self, size: int, seed: int) -> None:
        self.cores, self.rng = [Core() for _ in range(size)], random.Random(seed)
        self.num_messages = 0

    def act(self, core: Core) -> None:
        """One turn of the busy loop, as EngineCore.run and LLMEngine.step take it."""
        while core.inbox:
            core.lockstep.join(core.inbox.pop(0))
        if core.work and not core.lockstep.is_running:
            for other in self.cores:
                if other is not core:
                    other.inbox.append(core.lockstep.wave)
                    self.num_messages += 1
            core.lockstep.start()
        in_flight = len(core.launched) - core.num_read
        if in_flight == 2 or (in_flight and not core.lockstep.is_running):
            self.read(core)
        elif core.lockstep.is_running:
            core.launched.append(core.lockstep.begin_step(core.work > 0))
            core.work = max(0, core.work - 1)

    def read(self, core: Core) -> None:
        step = core.num_read
        if any(len(other.launched) <= step for other in self.cores):
            return  # it still runs: another core has not launched it
        asked = {other.launched[step] is not None for other in self.cores}
        assert len(asked) == 1, f"step {step}: some cores ask and others don't. {LOOK}"
        if asked == {True}:
            core.lockstep.note_answer(any(other.launched[step] for other in self.cores))
        core.num_read += 1

    def settle(self) -> None:
        for _ in range(200_000):
            self.act(self.rng.choice(self.cores))
            if all(
                not core.work
                and not core.inbox
                and not core.lockstep.is_running
                and core.num_read == len(core.launched)
                for core in self.cores
            ):
                return
        state = [(c.work, c.lockstep.wave, c.lockstep.is_running, len(c.launched), c.num_read) for c in self.cores]
        pytest.fail(f"the cores do not stop: (work, wave, running, launched, read) {state}. {LOOK}")


def test_one_core_has_work() -> None:
    cores = Cores(2, seed=0)
    cores.cores[0].work = 5
    cores.settle()
    launched = [len(core.launched) for core in cores.cores]
    assert launched == [2 * INTERVAL] * 2, f"asked after {INTERVAL} steps, stopped {INTERVAL} later: {launched}. {LOOK}"
    assert [core.lockstep.wave for core in cores.cores] == [1, 1], LOOK


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("seed", range(20))
def test_work_at_any_time(seed: int, size: int) -> None:
    """All cores take the same number of steps and wait for each other forever in none."""
    cores = Cores(size, seed)
    for _ in range(30):
        for _ in range(cores.rng.randrange(400)):
            cores.act(cores.rng.choice(cores.cores))
        cores.rng.choice(cores.cores).work += cores.rng.choice([1, 3, 40])
    cores.settle()
    launched = [len(core.launched) for core in cores.cores]
    waves = [core.lockstep.wave for core in cores.cores]
    assert len(set(launched)) == 1 and len(set(waves)) == 1, f"steps {launched}, waves {waves}. {LOOK}"
