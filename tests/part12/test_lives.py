"""Random runs over device, host memory and disk: copies that take long, that fail, and files that change."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from part12_cpu_offloading.worker import kv_tiers
from tests.engine_lives import beginning_of
from tests.part08.test_lives import KINDS
from tests.part08.test_lives import Life as SpecLife
from tests.part12.scripted import TierExecutor, checks, scripted_engine
from tests.scripted import executor_of

SEED = 12 * 7919**6


class OffloadLife(SpecLife):
    checks, counts = checks, Counter[str]()
    LOOK = 'Look at core/offload.py and core/scheduler.py; README "A copy holds a lease".'
    LAST_STEPS = 20  # it looks in the tiers first, and its blocks are saved at the end
    directory: Path

    @initialize(
        num_tokens_kv=st.integers(4, 64),
        block_size=st.sampled_from([1, 2, 4, 8]),
        max_num_seqs=st.integers(1, 6),
        spare_tokens=st.one_of(st.integers(0, 6), st.integers(0, 6), st.integers(0, 60)),
        is_chunked=st.sampled_from([True, True, True, False]),
        threshold=st.sampled_from([0, 0, 1, 2, 3, 7, 30]),
        is_async=st.booleans(),
        watermark_blocks=st.integers(0, 3),
        kinds=st.sampled_from([[], [], *KINDS]),
        method=st.sampled_from(["ngram", "draft_model"]),
        num_drafts=st.integers(1, 6),
        num_stages=st.sampled_from([1, 1, 1, 2, 3]),
        num_host_blocks=st.sampled_from([1, 3, 8, 20, 60]),
        disk_blocks=st.sampled_from([None, 5, 30, 200]),
        seed=st.integers(0, 2**30),
        failing=st.sampled_from([0.0, 0.0, 0.1, 0.3]),
        patience=st.sampled_from([0.1, 0.5, 1.0]),
    )
    def start(  # type: ignore[override]
        self, kinds: list[str], method: str, num_drafts: int, num_stages: int, disk_blocks: int | None,
        patience: float, **drawn: Any,
    ) -> None:  # fmt: skip
        flags: dict[str, Any] = {"speculative_method": method} if kinds else {}
        self.directory = Path(tempfile.mkdtemp(dir=self.root))
        self.disk_blocks, self.drawn = disk_blocks, drawn
        if disk_blocks is not None:
            flags |= {"directory": self.directory, "disk_blocks": disk_blocks}
        self.begin_chunked(
            scripted_engine, kinds=kinds, num_speculative_tokens=num_drafts, pipeline_parallel_size=num_stages,
            **flags, **drawn,
        )  # fmt: skip
        self.executor.patience = patience

    root = ""

    @property
    def executor(self) -> TierExecutor:
        executor = executor_of(self.engine)
        assert isinstance(executor, TierExecutor)
        return executor

    def may_fail(self) -> bool:
        return super().may_fail() or any(step.error for step in self.executor.launched[-4:])

    @precondition(lambda self: self.disk_blocks is not None)
    @rule(number=st.integers(0, 2**20), how=st.sampled_from(["flip", "cut", "empty", "swap", "remove"]))
    def damage_a_file(self, number: int, how: str) -> None:
        files = sorted(self.directory.glob("*.kv"))
        if not files:
            return
        path = files[number % len(files)]
        data = bytearray(path.read_bytes())
        match how:
            case "flip":
                data[number % len(data)] ^= 1 << number % 8
            case "cut":
                del data[number % len(data) :]
            case "empty":
                data.clear()
            case "swap":
                data = bytearray(files[(number + 1) % len(files)].read_bytes())
            case "remove":
                path.unlink()
                return
        path.write_bytes(data)
        self.counts["damaged files"] += 1

    def forget_the_device(self) -> None:
        """As after a restart: what comes back has to come from below."""
        assert self.engine.reset_prefix_cache(), f"an idle engine resets its prefix cache. {self.LOOK}"
        self.executor.cache.clear()
        self.counts["resets"] += 1

    @rule(base=st.integers(0, 1), count=st.integers(1, 3))
    def others_fill_the_pool(self, base: int, count: int) -> None:
        """Blocks leave the device."""
        for _ in range(count):
            self.ask(self.own_prompt(min(40, self.capacity)), 1 + base, True, 0)
        for _ in range(6):
            self.step()

    @rule(base=st.integers(0, 3), length=st.integers(20, 50), has_restarted=st.booleans())
    def come_back(self, base: int, length: int, has_restarted: bool) -> None:
        """The device has forgotten a prompt, and host memory, too, if the engine has been restarted."""
        for _ in range(self.most_steps() if not self.may_fail() else 0):
            if not self.engine.has_unfinished_requests:
                self.forget_the_device()
                if has_restarted and self.disk_blocks is not None:
                    self.forget_the_host()
                break
            self.step()
        self.ask(beginning_of(base)[:length], 2, True, 0)
        self.step()

    def forget_the_host(self) -> None:
        host = self.engine.offloader.host
        for block_hash in list(host.blocks):
            host.free_slots.append(host.blocks.pop(block_hash).slot)
        self.executor.host.clear()

    def abort_one(self, name: str) -> None:
        self.counts["aborted while loading"] += any(
            each.request_id == name for each in [*self.engine.scheduler.loading, *self.engine.scheduler.loaded]
        )
        super().abort_one(name)

    @precondition(lambda self: self.engine.scheduler.loading or self.engine.scheduler.loaded)
    @rule(data=st.data())
    def abort_while_loading(self, data: st.DataObject) -> None:
        requests = [*self.engine.scheduler.loading, *self.engine.scheduler.loaded]
        self.abort_one(data.draw(st.sampled_from(sorted(each.request_id for each in requests)), "request"))

    def step(self) -> None:
        self.counts["steps with loading requests"] += bool(self.engine.scheduler.loading)
        super().step()

    def check_empty(self, where: str, look: str) -> None:
        super().check_empty(where, look)
        scheduler, offloader = self.engine.scheduler, self.engine.offloader
        assert not scheduler.loading and not scheduler.loaded, f"{where}: {scheduler.loading} are left. {look}"
        assert not offloader.is_busy and not self.executor.copies, f"{where}: copies are left. {look}"
        assert not (offloader._searches or offloader._loading), (
            f"{where}: the offloader remembers requests that are gone. {look}"
        )

    def most_steps(self) -> int:
        return 6 * super().most_steps()

    def check_end(self) -> None:
        super().check_end()
        self.executor.patience, self.executor.failing = 1.0, 0.0  # for the one that follows
        self.counts.update(self.executor.counts)
        self.counts["damaged blocks that were found"] += self.num_damaged()
        stats = self.engine.offloader.stats
        loaded = self.executor.counts.get("blocks from host", 0) + self.executor.counts.get("blocks from disk", 0)
        got = stats.num_host_tokens + stats.num_tier_tokens
        assert got == loaded * self.engine.blocks.block_size, f"{stats}, {loaded} blocks were loaded. {self.LOOK}"
        self.counts["tokens refused"] += stats.num_recomputed_tokens

    def num_damaged(self) -> int:
        """Every file that is left can be opened, or would be deleted if it was read."""
        found = 0
        for path in self.directory.glob("*.kv"):
            found += kv_tiers.open_sealed(path.stem, path.read_bytes()) is None
        return found


def test_random_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happens, in whatever order: every request gets what it gets alone; no block is lost, or served before
    it is whole."""
    wanted = {
        "steps": 5_000, "answers": 800, "hits": 400, "preemptions": 40, "aborts": 100, "aborted while loading": 40,
        "failures": 30, "failed with a step in flight": 10, "Saves": 2_000, "Saves that failed": 100, "Loads": 120,
        "Loads that failed": 5, "LookUps": 400, "blocks from host": 200, "blocks from disk": 60, "damaged files": 12,
        "tokens refused": 5, "accepted draft tokens": 200,
    }  # fmt: skip
    OffloadLife.root = str(tmp_path)
    monkeypatch.setattr(kv_tiers, "RETRY_S", 0.0)
    monkeypatch.setattr(kv_tiers.logger, "disabled", True)
    OffloadLife.run(max_examples=120, stateful_step_count=24, seed=SEED, wanted=wanted)
