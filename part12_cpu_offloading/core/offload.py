"""Which KV blocks are copied from the device to slower memory, and back."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

from ..messages import Load, LookUp, Save, Transfer, TransferDone
from .block_manager import BlockHash, BlockManager
from .cost_model import CostModel
from .host_blocks import HostBlocks
from .request import Request

LOOKUP_TIMEOUT_S = 1.0  # then a request goes on without the tiers


@dataclass(slots=True)
class OffloadStats:
    """Tokens that were saved to host memory, and loaded from there and from the tiers below. num_recomputed_tokens:
    those that could have been loaded, but computing them was expected to be faster."""

    num_saved_tokens: int = 0
    num_host_tokens: int = 0
    num_tier_tokens: int = 0
    num_recomputed_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Pending:
    """A transfer that has not ended, and the request that it was made for: none, if it is a save."""

    transfer: Transfer
    request: Request | None
    start_s: float


@dataclass(slots=True)
class Search:
    """What is known about the blocks of a request that has not started to run.

    transfer_id: the transfer that it waits for. in_tiers: the blocks that the tiers have, once they were asked.
    num_host, num_found, num_to_load: the last result of find().
    """

    transfer_id: int | None = None
    in_tiers: frozenset[BlockHash] | None = None
    num_host: int = 0
    num_found: int = 0
    num_to_load: int = 0


class Offloader:
    """Copies every full block to host memory once it is computed, and loads blocks that the device no longer has.

    The worker writes saved blocks through to the tiers below, disk and Redis. Core doesn't know what is in them: it
    asks the worker before it loads. While a request waits for an answer or for its blocks, other requests run.
    A block is leased, and its slot in host memory is pinned, as long as a copy may read or write it.

    num_slots: the size of host memory in blocks; 0 turns offloading off. new_transfers: what the worker may begin.
    Modeled on vLLM's OffloadingConnector, which always loads what it finds; here the faster way is taken.
    """

    def __init__(self, blocks: BlockManager, num_slots: int, has_tiers: bool) -> None:
        self.blocks, self.has_tiers = blocks, has_tiers
        self.host = HostBlocks(num_slots)
        self.cost, self.stats = CostModel(blocks.block_size), OffloadStats()
        self.new_transfers: deque[Transfer] = deque()
        self.pending: dict[int, Pending] = {}
        self._new_saves: list[Save] = []  # of blocks that the next step computes, or one in flight
        self._saves_in_flight: deque[list[Save]] = deque()  # of blocks that each step in flight computes
        self._loading: dict[BlockHash, int] = {}  # the transfer that brings a block to the device
        self._searches: dict[str, Search] = {}  # by request id
        self._num_transfers = 0

    @property
    def is_busy(self) -> bool:
        return bool(self.pending or self._new_saves or any(self._saves_in_flight))

    @property
    def host_usage(self) -> float:
        """Share of the slots in host memory that have a block, from 0 to 1."""
        return len(self.host.blocks) / max(1, self.host.num_slots)

    # From the device to host memory

    def save(self, request: Request, indices: range) -> None:
        """The next step, or one in flight, computes these blocks of a request. When it has succeeded, they are copied
        to host memory, unless that has them already, or has no room for them."""
        if not indices or not self.host.num_slots:
            return
        hashes, table = request.block_hashes[indices.start : indices.stop], self.blocks.block_tables[request.request_id]
        store = self.host.prepare_store(hashes, request.block_hashes)
        self.host.touch(request.block_hashes)
        if store is None or not store.hashes:
            return
        # exercise: save
        block_of = dict(zip(hashes, table[indices.start : indices.stop], strict=True))
        save = Save(self._next_id(), store.hashes, [block_of[each] for each in store.hashes], store.slots)
        self.blocks.lease(save.block_ids)
        self._new_saves.append(save)
        # exercise: end

    def note_launch(self) -> None:
        """A step was launched."""
        self._saves_in_flight.append(self._new_saves)
        self._new_saves = []

    def note_result(self) -> None:
        """The first of the steps in flight has succeeded: what it has computed may be saved."""
        for save in self._saves_in_flight.popleft():
            self._order(save)

    def note_idle(self) -> None:
        """No step is in flight: all blocks have been computed."""
        self.note_launch()
        self.note_result()

    @property
    def has_leaving_blocks(self) -> bool:
        """Whether there is a block that no request has, and that will be free as soon as it is saved."""
        return any(self.blocks.pool[block_id].ref_count == 1 for save in self._saves() for block_id in save.block_ids)

    def _saves(self) -> Iterator[Save]:
        """All that have not ended."""
        yield from self._new_saves
        for saves in self._saves_in_flight:
            yield from saves
        for pending in self.pending.values():
            if isinstance(pending.transfer, Save):
                yield pending.transfer

    # From slower memory to the device

    def find(self, request: Request, num_on_device: int) -> int | None:
        """How many blocks to load after the first num_on_device ones. 0: none, or computing them is faster. None: this
        isn't known yet; ask again when the request no longer is_waiting()."""
        hashes = request.block_hashes[num_on_device : (request.num_tokens - 1) // self.blocks.block_size]
        if not self.host.num_slots:
            return 0
        search = self._searches.setdefault(request.request_id, Search())
        search.num_host = search.num_found = search.num_to_load = 0
        if not hashes:
            return 0
        self.host.touch(request.block_hashes)
        search.transfer_id = next((self._loading[each] for each in hashes if each in self._loading), None)
        if search.transfer_id is not None:  # another request loads some of them
            return None
        search.num_host = self.host.lookup(hashes)
        if search.in_tiers is None and self._may_use_tiers(search.num_host, len(hashes)):
            search.transfer_id = self._order(LookUp(self._next_id(), hashes[search.num_host :]), request)
            return None
        in_tiers = search.in_tiers = search.in_tiers or frozenset()
        found = takewhile(lambda each: self.host.is_ready(each) or each in in_tiers, hashes)
        search.num_found = sum(1 for _ in found)
        search.num_to_load = self.cost.num_to_load(search.num_host, search.num_found)
        return search.num_to_load

    def _may_use_tiers(self, num_host: int, num_blocks: int) -> bool:
        """Whether it is worth asking the tiers: not if computing would be faster even if they had everything."""
        if not self.has_tiers or num_host == num_blocks:
            return False
        num_to_load = self.cost.num_to_load(num_host, num_blocks)
        if num_to_load <= num_host:
            self.cost.note_refused(num_host, num_blocks, num_to_load)
        return num_to_load > num_host

    def load(self, request: Request, num_on_device: int, num_blocks: int) -> None:
        """Load the num_blocks blocks after the first num_on_device ones into the request's block table."""
        span = slice(num_on_device, num_on_device + num_blocks)
        hashes, block_ids = request.block_hashes[span], self.blocks.block_tables[request.request_id][span]
        in_host = [each for each in hashes if self.host.is_ready(each)]
        slot_of = dict(zip(in_host, self.host.prepare_load(in_host), strict=True))
        self.blocks.lease(block_ids)
        load = Load(self._next_id(), hashes, block_ids, [slot_of.get(each) for each in hashes])
        self._loading.update((each, load.transfer_id) for each in hashes)
        request.num_found_blocks = num_on_device
        self._searches[request.request_id].transfer_id = self._order(load, request)

    def is_waiting(self, request: Request) -> bool:
        """Whether the transfer that a request waits for has not ended yet. A slow lookup is not waited for."""
        search = self._searches[request.request_id]
        pending = None if search.transfer_id is None else self.pending.get(search.transfer_id)
        if pending is None:
            return False
        is_late = time.monotonic() > pending.start_s + LOOKUP_TIMEOUT_S
        if isinstance(pending.transfer, LookUp) and is_late:
            search.in_tiers, search.transfer_id = frozenset(), None
            return False
        return True

    def note_start(self, request: Request) -> None:
        """The request starts to run. What was found and not loaded is computed."""
        search = self._searches.get(request.request_id)
        if search is not None and (num_refused := search.num_found - search.num_to_load):
            self.stats.num_recomputed_tokens += num_refused * self.blocks.block_size
            self.cost.note_refused(search.num_host, search.num_found, search.num_to_load)
        self.forget(request)

    def forget(self, request: Request) -> None:
        """The request starts to run, or ends. A transfer for it goes on: it writes to blocks that are leased."""
        self._searches.pop(request.request_id, None)

    # All transfers

    def _next_id(self) -> int:
        self._num_transfers += 1
        return self._num_transfers

    def _order(self, transfer: Transfer, request: Request | None = None) -> int:
        """Returns the transfer's id."""
        self.new_transfers.append(transfer)
        self.pending[transfer.transfer_id] = Pending(transfer, request, time.monotonic())
        return transfer.transfer_id

    def note_done(self, done: TransferDone) -> Pending:
        """A transfer has ended. Its blocks are no longer leased, and its slots no longer pinned. Returns what was
        ordered."""
        pending = self.pending.pop(done.transfer_id)
        transfer, request = pending.transfer, pending.request
        match transfer:
            case Save():
                self.host.complete_store(transfer.hashes[: done.num_blocks])
                self.host.complete_store(transfer.hashes[done.num_blocks :], success=False)
                self.blocks.end_lease(transfer.block_ids)
                self.stats.num_saved_tokens += done.num_blocks * self.blocks.block_size
            case Load():
                self._note_loaded(transfer, done)
                assert request is not None, "a load is made for a request"
                request.num_found_blocks += done.num_blocks
            case LookUp():
                assert request is not None, "a lookup is made for a request"
                search = self._searches.get(request.request_id)
                if search is not None and search.transfer_id == transfer.transfer_id:
                    search.in_tiers = frozenset(transfer.hashes[: done.num_blocks])
        return pending

    def _note_loaded(self, load: Load, done: TransferDone) -> None:
        self.host.complete_load([each for each, slot in zip(load.hashes, load.slots, strict=True) if slot is not None])
        self.blocks.end_lease(load.block_ids)
        for block_hash in load.hashes:
            del self._loading[block_hash]
        block_size = self.blocks.block_size
        num_host_tokens = block_size * sum(slot is not None for slot in load.slots[: done.num_blocks])
        num_tier_tokens = block_size * done.num_blocks - num_host_tokens
        self.stats.num_host_tokens += num_host_tokens
        self.stats.num_tier_tokens += num_tier_tokens
        if num_host_tokens:
            self.cost.host.add(num_host_tokens, done.host_s)
        if None in load.slots:  # also if nothing came: that took time, too
            self.cost.tiers.add(num_tier_tokens, done.tier_s)

    def reset(self) -> None:
        """A step has failed, and all requests with it. Transfers that the worker hasn't got are dropped, and the others
        must end before anything else is done."""
        self.note_launch()
        while self._saves_in_flight:
            self.note_result()
        while self.new_transfers:
            self.note_done(TransferDone(self.new_transfers.popleft().transfer_id, 0))
        self._searches.clear()
