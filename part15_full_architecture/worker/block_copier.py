"""Copies KV blocks between the device, host memory and the tiers below, while the model computes."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..messages import Copy, Load, LookUp, Save, TransferDone
from .device import pin
from .kv_tiers import KVTiers
from .stream import Mark

MAX_PENDING_BYTES = 64 * 2**20  # once so many wait for the tiers, further blocks are not written there
LOAD_BATCH = 16  # blocks
FLUSH_TIMEOUT_S = 2.0

logger = logging.getLogger(__name__)
Job = TypeVar("Job")


class KVBlocks:
    """The blocks of several pools as bytes, so that all pools' parts of a block can be copied as one.

    pools: of the model and of the draft model, if there is one, [num_layers, num_blocks, …] each.
    """

    def __init__(self, pools: Sequence[Tensor]) -> None:
        self.parts = [pool.flatten(2).view(torch.uint8) for pool in pools]  # [num_layers, num_blocks, num_bytes]
        self.bytes_per_block = sum(part.shape[0] * part.shape[2] for part in self.parts)

    def views(self, block: Tensor) -> list[Tensor]:
        """One block's bytes, [bytes_per_block], as [num_layers, num_bytes] for each pool."""
        sizes = [part.shape[0] * part.shape[2] for part in self.parts]
        return [
            piece.view(part.shape[0], part.shape[2]) for part, piece in zip(self.parts, block.split(sizes), strict=True)
        ]

    def read(self, block_id: int, block: Tensor) -> None:
        """Copy a block out of the pools."""
        for part, view in zip(self.parts, self.views(block), strict=True):
            copy(view, part[:, block_id])

    def write(self, block_id: int, block: Tensor) -> None:
        """Copy a block into the pools."""
        for part, view in zip(self.parts, self.views(block), strict=True):
            copy(part[:, block_id], view)


def copy(target: Tensor, source: Tensor) -> None:
    """On a CPU with numpy: one thread copies, and torch's other threads are left to the model."""
    if target.device.type == source.device.type == "cpu":
        np.copyto(target.numpy(), source.numpy())
    else:
        target.copy_(source, non_blocking=True)


class BlockCopier:
    """Does what core orders, in threads: for saves, loads from host memory, loads from the tiers, lookups, and writes
    to the tiers. So nothing that only needs host memory waits for a tier.

    A copy between the device and host memory begins when all steps launched before the order have run. On a GPU, each
    direction has a stream of its own, and host memory is pinned, so that copies in both directions and the model run at
    the same time. An order is answered when its blocks have arrived. Core doesn't use them, or reuse what they were
    copied from, before that.

    report: called with each answer, in one of the threads. mark: a mark in the stream of steps, see Stream.mark().
    """

    def __init__(
        self, pools: Sequence[Tensor], num_host_blocks: int, tiers: KVTiers, mark: Callable[[], Mark],
        report: Callable[[TransferDone], None],
    ) -> None:  # fmt: skip
        self.blocks, self.tiers, self.mark, self.report = KVBlocks(pools), tiers, mark, report
        self.device = pools[0].device
        self.host = torch.empty(num_host_blocks, self.blocks.bytes_per_block, dtype=torch.uint8)
        if self.device.type == "cuda":
            pin(self.host)
        self.max_pending_writes = max(1, MAX_PENDING_BYTES // self.blocks.bytes_per_block)
        self._saves: Jobs[tuple[Copy, Mark]] = Jobs("kv-save", self._do, self.device)
        self._loads: Jobs[tuple[Copy, Mark]] = Jobs("kv-load", self._do, self.device)
        self._reads: Jobs[tuple[Copy, Mark]] = Jobs("kv-read", self._do, self.device)
        self._lookups: Jobs[tuple[Copy, Mark]] = Jobs("kv-lookup", self._do, self.device)
        self._writes: Jobs[tuple[bytes, bytes]] = Jobs("kv-write", self._write, self.device)

    def start(self, transfer: Copy) -> None:
        """Returns before it is done."""
        self._jobs_for(transfer).put((transfer, self.mark()))

    def _jobs_for(self, transfer: Copy) -> Jobs[tuple[Copy, Mark]]:
        match transfer:
            case Save():
                return self._saves
            case Load():
                return self._reads if None in transfer.slots else self._loads
            case LookUp():
                return self._lookups

    def _do(self, job: tuple[Copy, Mark]) -> None:
        """Do what was ordered, and answer in any case: core waits for it."""
        transfer, mark = job
        try:
            match transfer:
                case Save():
                    done = self._save(transfer, mark)
                case Load():
                    done = self._load(transfer, mark)
                case LookUp():
                    done = TransferDone(transfer.transfer_id, self.tiers.lookup(transfer.hashes))
        except Exception as error:
            logger.warning("cannot copy KV blocks: %s: %s", type(error).__name__, error)
            done = TransferDone(transfer.transfer_id, 0)
            with contextlib.suppress(Exception):  # the device may be lost
                self._jobs_for(transfer).synchronize()  # copies that were started still read and write
        self.report(done)

    def _save(self, save: Save, mark: Mark) -> TransferDone:
        mark.wait()
        start_s = time.perf_counter()
        for block_id, slot in zip(save.block_ids, save.slots, strict=True):
            self.blocks.read(block_id, self.host[slot])
        self._saves.synchronize()
        end_s = time.perf_counter()
        if self.tiers.tiers:  # before the answer: after it, the slots may be given to other blocks
            for block_hash, slot in zip(save.hashes, save.slots, strict=True):
                if self._writes.num_waiting >= self.max_pending_writes:
                    break  # the tiers are slow; without this block, those after it can't be found
                self._writes.put((block_hash, self.host[slot].numpy().tobytes()))
        num_bytes = len(save.hashes) * self.blocks.bytes_per_block
        return TransferDone(
            save.transfer_id, len(save.hashes), end_s - start_s, num_bytes=num_bytes, start_s=start_s, end_s=end_s
        )

    def _write(self, job: tuple[bytes, bytes]) -> None:
        try:
            self.tiers.write(*job)
        except Exception:
            logger.exception("cannot write a KV block")

    def _load(self, load: Load, mark: Mark) -> TransferDone:
        """Batch by batch, so that blocks from the tiers need little memory on their way."""
        if None not in load.slots:
            mark.wait()  # only reads from the tiers may begin earlier
        done = TransferDone(load.transfer_id, 0, start_s=time.perf_counter())
        orders = list(zip(load.hashes, load.block_ids, load.slots, strict=True))
        for start in range(0, len(orders), LOAD_BATCH):
            batch = orders[start : start + LOAD_BATCH]
            read_s, blocks = self._read(batch)
            mark.wait()
            start_s = time.perf_counter()
            for (_, block_id, _), block in zip(batch, blocks, strict=False):
                self.blocks.write(block_id, block)
            self._jobs_for(load).synchronize()
            copy_s, share = time.perf_counter() - start_s, sum(slot is None for *_, slot in batch) / len(batch)
            done.num_blocks += len(blocks)
            done.host_s += (1 - share) * copy_s
            done.tier_s += share * copy_s + read_s
            if len(blocks) < len(batch):
                break
        done.num_bytes, done.end_s = done.num_blocks * self.blocks.bytes_per_block, time.perf_counter()
        return done

    def _read(self, batch: Sequence[tuple[bytes, int, int | None]]) -> tuple[float, list[Tensor]]:
        """The bytes of the first blocks of a batch, up to one that is missing; and the seconds that the tiers took."""
        missing = [block_hash for block_hash, _, slot in batch if slot is None]
        start_s = time.perf_counter()
        from_tiers = iter(self.tiers.read(missing) if missing else [])
        read_s, blocks = time.perf_counter() - start_s if missing else 0.0, list[Tensor]()
        for _, _, slot in batch:
            if slot is not None:
                blocks.append(self.host[slot])
            elif (data := next(from_tiers, None)) is not None:
                blocks.append(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            else:
                break
        return read_s, blocks

    def flush(self) -> None:
        """Give the tiers a moment for what they haven't got yet."""
        deadline_s = time.monotonic() + FLUSH_TIMEOUT_S
        for jobs in (self._saves, self._writes):
            jobs.wait(deadline_s)

    def close(self) -> None:
        """End the threads, which keep host memory alive. Nothing may be ordered afterwards."""
        self.flush()
        for jobs in (self._saves, self._loads, self._reads, self._lookups, self._writes):
            jobs.end()


class Jobs(Generic[Job]):
    """A thread that does one job after the other, with a stream of its own on a GPU. It ends with the process, or when
    end() is called."""

    def __init__(self, name: str, work: Callable[[Job], None], device: torch.device) -> None:
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._work = work
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        threading.Thread(target=self._run, name=name, daemon=True).start()

    @property
    def num_waiting(self) -> int:
        return self._jobs.qsize()

    def put(self, job: Job) -> None:
        self._jobs.put(job)

    def end(self) -> None:
        """After the jobs that are there."""
        self._jobs.put(None)

    def wait(self, deadline_s: float) -> None:
        """Until all jobs are done, or until then (time.monotonic)."""
        while self._jobs.unfinished_tasks and time.monotonic() < deadline_s:
            time.sleep(0.005)

    def synchronize(self) -> None:
        """Wait for the copies that this thread has started."""
        if self._stream is not None:
            self._stream.synchronize()

    def _run(self) -> None:
        with torch.inference_mode(), torch.cuda.stream(self._stream) if self._stream else nullcontext():
            while (job := self._jobs.get()) is not None:
                self._work(job)
                self._jobs.task_done()
            self._jobs.task_done()
