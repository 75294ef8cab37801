"""Part 12's engine over a scripted worker with host memory and a disk, whose copies take their time, and may fail."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec

from part12_cpu_offloading.core.engine import LLMEngine
from part12_cpu_offloading.messages import Load, LookUp, Save, Transfer, TransferDone
from part12_cpu_offloading.worker.disk_tier import DiskTier
from part12_cpu_offloading.worker.kv_tiers import KVTiers
from tests.engine_checks import Before
from tests.part08.scripted import BeforeSpec, Drafter, set_drafter
from tests.part09.scripted import Checks as StagedChecks
from tests.part09.scripted import StagedExecutor
from tests.scripted import NOTHING, Part, ScriptedStep, ids, make_scripted_engine, next_token

PART = Part("part12_cpu_offloading")
DIGEST_BYTES = 8
SLOT_BYTES = 1 + DIGEST_BYTES  # of a token's keys and values in the scripted cache
GARBAGE = (254, b"garbage!")
LOOK_LEASE = 'Look at core/offload.py::Offloader.save, load and note_done; README "A copy holds a lease".'
LOOK_HOST = 'Look at core/host_blocks.py::HostBlocks; README "Host memory".'


class FaultyDisk(DiskTier):
    """A disk that fails now and then. share: of the calls."""

    def __init__(self, directory: str, num_bytes: int, rng: random.Random, share: float) -> None:
        super().__init__(directory, num_bytes)
        self.rng, self.share, self.num_failures = rng, share, 0

    def contains(self, keys: Sequence[str]) -> list[bool]:
        self.fail_sometimes()
        return super().contains(keys)

    def read(self, keys: Sequence[str]) -> list[bytes | None]:
        self.fail_sometimes()
        return super().read(keys)

    def write(self, key: str, data: bytes) -> None:
        self.fail_sometimes()
        super().write(key, data)

    def fail_sometimes(self) -> None:
        if self.rng.random() < self.share:
            self.num_failures += 1
            raise OSError("the disk is on strike")


class Copy:
    """A transfer that the worker has got. num_launched: steps that were launched before; they run first."""

    def __init__(self, transfer: Transfer, num_launched: int) -> None:
        self.transfer, self.num_launched, self.has_begun = transfer, num_launched, False
        self.before: list[Any] = []  # a save: what the blocks held when it began
        self.payloads: list[bytes] = []  # a load: what will be written

    @property
    def direction(self) -> type[Any]:
        return Save if isinstance(self.transfer, Save) else Load


class TierExecutor(StagedExecutor):
    """Its copies begin and end at random times: in one direction one after the other, as the real ones.

    Blocks that are being loaded hold garbage until the load has ended, and nothing else may write there. Blocks that
    are being saved must not change. A copy that fails has copied some of its blocks. host: slot → bytes.
    """

    def __init__(self, part: Part, config: Any) -> None:
        super().__init__(part, config)
        self.rng, self.failing = random.Random(0), 0.0
        self.patience = 0.5  # how likely it is that a copy goes on when core looks
        self.host: dict[int, bytes] = {}
        self.copies: list[Copy] = []
        self.counts: dict[str, int] = {}
        self.tiers: KVTiers | None = None

    def transfer(self, transfer: Transfer) -> None:
        encoded = self.encode(transfer)
        decoded = msgspec.msgpack.Decoder(Transfer).decode(encoded)
        assert decoded == transfer, f"{transfer} does not survive the way to the worker"
        self.copies.append(Copy(decoded, len(self.launched)))

    def finished_transfers(self, timeout_s: float) -> list[TransferDone]:
        finished = list[TransferDone]()
        for direction in self.rng.sample([Save, Load], 2):
            while (copy := next((each for each in self.copies if each.direction is direction), None)) is not None:
                must = bool(timeout_s) and not finished
                if not copy.has_begun and (must or self.rng.random() < self.patience):
                    self.begin(copy)
                if not copy.has_begun or not (must or self.rng.random() < self.patience):
                    break
                self.copies.remove(copy)
                finished.append(self.end(copy))
        return finished

    def begin(self, copy: Copy) -> None:
        copy.has_begun = True
        while self.pending and self.pending[0].number <= copy.num_launched:
            self.run(self.pending.popleft())
        match transfer := copy.transfer:
            case Save():
                copy.before = [self.block(block_id) for block_id in transfer.block_ids]
            case Load():
                missing = [each for each, slot in zip(transfer.hashes, transfer.slots, strict=True) if slot is None]
                from_tiers = iter(self.tiers.read(missing) if self.tiers and missing else [])
                for block_id, slot in zip(transfer.block_ids, transfer.slots, strict=True):
                    payload = next(from_tiers, None) if slot is None else self.host[slot]
                    if payload is None:
                        break
                    copy.payloads.append(payload)
                    self.cache.update((each, GARBAGE) for each in self.slots(block_id))

    def end(self, copy: Copy) -> TransferDone:
        transfer, fails = copy.transfer, self.rng.random() < self.failing
        self.count(f"{type(transfer).__name__}s")
        self.count(f"{type(transfer).__name__}s that failed", fails)
        if isinstance(transfer, LookUp):
            found = self.tiers.lookup(transfer.hashes) if self.tiers else 0
            return TransferDone(transfer.transfer_id, 0 if fails else found)
        if isinstance(transfer, Load):
            num_blocks = self.rng.randrange(len(copy.payloads) + 1) if fails else len(copy.payloads)
            for block_id, payload in zip(transfer.block_ids, copy.payloads[:num_blocks], strict=False):
                self.check_untouched(block_id)
                self.cache.update(zip(self.slots(block_id), decode(payload), strict=True))
            num_tier = sum(slot is None for slot in transfer.slots[:num_blocks])
            self.count("blocks from host", num_blocks - num_tier)
            self.count("blocks from disk", num_tier)
            return TransferDone(transfer.transfer_id, num_blocks, self.rng.random(), self.rng.random())
        num_blocks = 0 if fails else len(transfer.hashes)
        for block_id, before in zip(transfer.block_ids, copy.before, strict=True):
            assert self.block(block_id) == before and NOTHING not in before and GARBAGE not in before, (
                f"block {block_id} is saved, and held {before} when the copy began, {self.block(block_id)} when it "
                f"ended. {LOOK_LEASE}"
            )
        for block_hash, slot, before in list(zip(transfer.hashes, transfer.slots, copy.before, strict=True))[
            :num_blocks
        ]:
            self.host[slot] = encode(before)
            if self.tiers is not None:
                self.tiers.write(block_hash, self.host[slot])
        return TransferDone(transfer.transfer_id, num_blocks)

    def output(self, step: ScriptedStep) -> Any:
        """Steps take random times, so that sometimes computing is faster than loading."""
        output = super().output(step)
        output.start_s, output.end_s = 0.0, self.rng.random()
        return output

    def check_untouched(self, block_id: int) -> None:
        held = self.block(block_id)
        assert all(each == GARBAGE for each in held), (
            f"block {block_id} is being loaded, and something else was written there: {held}. {LOOK_LEASE}"
        )

    def count(self, name: str, number: int = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + number

    def slots(self, block_id: int) -> range:
        return range(block_id * self.config.block_size, (block_id + 1) * self.config.block_size)

    def block(self, block_id: int) -> list[Any]:
        return [self.cache.get(slot, NOTHING) for slot in self.slots(block_id)]


def encode(held: Sequence[tuple[int, bytes]]) -> bytes:
    return b"".join(bytes([token_id]) + last for token_id, last in held)


def decode(payload: bytes) -> list[tuple[int, bytes]]:
    parts = [payload[start : start + SLOT_BYTES] for start in range(0, len(payload), SLOT_BYTES)]
    return [(part[0], part[1:]) for part in parts]


class Checks(StagedChecks):
    """Requests that wait for their blocks hold some; copies hold blocks, too."""

    def look_at(self, scheduler: Any) -> BeforeSpec:
        before = super().look_at(scheduler)
        before.waiting |= {each.request_id: each.num_tokens for each in [*scheduler.loading, *scheduler.loaded]}
        return before

    def check_decodes_first(self, scheduler: Any, output: Any, before: Before, what: str) -> None:
        if scheduler.offloader.has_leaving_blocks:  # a decode may wait for a block that a copy still reads
            scheduled = {*ids(output.requests), *ids(output.preempted)}
            before.at_end.update(set(before.running) - scheduled)
            if output.preempted:
                return
        super().check_decodes_first(scheduler, output, before, what)

    def check_engine(self, engine: Any, where: str) -> None:
        scheduler, blocks, offloader = engine.scheduler, engine.blocks, engine.offloader
        held = {each.request_id for each in [*scheduler.loading, *scheduler.loaded]} & set(blocks.block_tables)
        tables = {name: blocks.block_tables.pop(name) for name in held}  # the rest is as before
        names = [*scheduler.running, *scheduler.waiting, *scheduler.loading, *scheduler.loaded]
        assert len(set(ids(names))) == len(names), f"{where}: a request is there twice: {ids(names)}. {self.LOOK_STEP}"
        self.loading_tables, self.copied = list(tables.values()), copied_blocks(offloader)
        try:
            super().check_engine(engine, where)
        finally:
            blocks.block_tables |= tables
        for request in [*scheduler.loading, *scheduler.loaded]:
            assert request.status is self.part.request.RequestStatus.WAITING_FOR_KV and request.row is None, (
                f"{where}: {request} is loading. {LOOK_LEASE}"
            )
        assert {each.request_id for each in scheduler.loaded} <= held, f"{where}: {scheduler.loaded} have no blocks."
        self.check_host(offloader, where)

    def check_host(self, offloader: Any, where: str) -> None:
        """Every slot is free or has a block; what copies read or write is pinned."""
        host = offloader.host
        slots = sorted([*host.free_slots, *(block.slot for block in host.blocks.values())])
        assert slots == list(range(host.num_slots)), f"{where}: slots {slots} of {host.num_slots}. {LOOK_HOST}"
        transfers, saves = [each.transfer for each in offloader.pending.values()], list(offloader._saves())
        pinned = [
            block_hash
            for each in transfers
            if isinstance(each, Load)
            for block_hash, slot in zip(each.hashes, each.slots, strict=True)
            if slot is not None
        ]
        for block_hash, block in host.blocks.items():
            assert block.num_loads == pinned.count(block_hash), (
                f"{where}: slot {block.slot} is read by {pinned.count(block_hash)} copies, num_loads is "
                f"{block.num_loads}. {LOOK_HOST}"
            )
        not_ready = sorted(block.slot for block in host.blocks.values() if not block.is_ready)
        expected = sorted(slot for save in saves for slot in save.slots)
        assert not_ready == expected, f"{where}: slots {not_ready} are not ready, copies fill {expected}. {LOOK_HOST}"

    def check_blocks(self, blocks: Any, where: str) -> None:
        """Every block is free, in tables, or held by a copy, as many as it has references."""
        free = [block.block_id for block in blocks.free_queue]
        tables = [block_id for table in [*blocks.block_tables.values(), *self.loading_tables] for block_id in table]
        copied = self.copied
        assert sorted([*free, *({*tables, *copied})]) == list(range(1, blocks.num_blocks)), (
            f"{where}: each block is free, in a table or copied; tables {tables}, copied {copied}, free {free}. "
            f"{LOOK_LEASE}"
        )
        for block in blocks.pool[1:]:
            expected = tables.count(block.block_id) + copied[block.block_id]
            assert block.ref_count == expected, (
                f"{where}: block {block.block_id} is in {tables.count(block.block_id)} tables and in "
                f"{copied[block.block_id]} copies, its ref_count is {block.ref_count}. {LOOK_LEASE}"
            )
        hashed = {block.block_hash: block.block_id for block in blocks.pool if block.block_hash is not None}
        found = {block_hash: block.block_id for block_hash, block in blocks.cached_blocks.items()}
        assert hashed == found, f"{where}: {hashed} have a hash, {found} are found by theirs. {self.LOOK_NAME}"


def copied_blocks(offloader: Any) -> Counter[int]:
    """How many copies have leased each block."""
    loads = [each.transfer for each in offloader.pending.values() if isinstance(each.transfer, Load)]
    return Counter(block_id for copy in [*offloader._saves(), *loads] for block_id in copy.block_ids)


checks = Checks(PART)


def scripted_engine(
    max_model_len: int = 64,
    script: Callable[[Sequence[int]], int] = next_token,
    kinds: Sequence[str] = (),
    num_host_blocks: int = 20,
    directory: Path | None = None,
    disk_blocks: int = 40,
    seed: int = 0,
    failing: float = 0.0,
    **flags: Any,
) -> LLMEngine:
    """A real LLMEngine over the scripted worker. directory: of the disk, if there is one. disk_blocks: its limit.
    failing: how many of the transfers and of the disk's calls fail. The others are as for part 9's."""
    flags = {"speculative_method": "ngram" if kinds else "none", "kv_offload_gib": 1.0, **flags}
    if directory is not None:
        flags["kv_offload_dir"] = str(directory)

    def make(part: Part, config: Any) -> TierExecutor:
        executor = TierExecutor(part, config)
        executor.num_host_blocks, executor.rng, executor.failing = num_host_blocks, random.Random(seed), failing
        if directory is not None:
            num_bytes = config.block_size * SLOT_BYTES
            disk = FaultyDisk(str(directory), disk_blocks * (num_bytes + 16), executor.rng, failing)
            executor.tiers = KVTiers([disk], "test", num_bytes)
        return executor

    with mock.patch.object(PART.config, "check_draft_model"):
        engine: LLMEngine = make_scripted_engine(PART, make, max_model_len, script, **flags)
    if kinds:
        set_drafter(engine, Drafter(script, kinds))  # type: ignore[arg-type]
    checks.watch(engine.scheduler)
    return engine
