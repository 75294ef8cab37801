"""KV from and for other engines: what is offered, what is fetched, and which blocks that holds."""

from __future__ import annotations

import hashlib
import logging
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..messages import LEASE_ENDED, Confirm, Fetch, Offer, Publish, Release, Transfer, TransferDone, Watch, Withdraw
from .block_manager import BlockManager
from .kv_connector import Orders
from .request import Request

NUM_ENDED = 1_000  # prompts that are remembered: choices of one HTTP request come within milliseconds of each other
logger = logging.getLogger(__name__)


@dataclass(slots=True)
class KVTransferStats:
    """num_offered: prompts that were offered. num_expired: of these, those that no engine wanted in time.
    num_fetched_tokens, num_fetched_bytes, fetch_s: what has arrived here, and the time of all fetches together.
    num_failed: watches and fetches that did not bring what was expected."""

    num_offered: int = 0
    num_expired: int = 0
    num_fetched_tokens: int = 0
    num_fetched_bytes: int = 0
    fetch_s: float = 0.0
    num_failed: int = 0


@dataclass(slots=True)
class Offering:
    """A prompt that another engine will fetch. block_ids: leased from its first step on."""

    offer: Offer
    block_ids: list[int] = field(default_factory=list)
    num_published: int = 0
    is_withdrawn: bool = False


@dataclass(slots=True)
class Watched:
    """A prompt that another engine computes. num_tokens: how many tokens that engine has, or will have; None: it hasn't
    begun; 0: none, or no more. watch_id, fetch_id: the watch, and the fetch that is under way. users: the requests that
    may use it, by id."""

    watch_id: int
    num_tokens: int | None = None
    fetch_id: int | None = None
    users: dict[str, Request] = field(default_factory=dict)


class KVTransfer:
    """The scheduler's side of transfers between engines. Any engine may offer some prompts and fetch others.

    An offered prompt's blocks are leased until the other engine has fetched them or lets them go, even when its request
    has long ended (vLLM: delay_free_blocks). A fetched prompt gets blocks here only once the other engine has begun:
    if both waited for each other's blocks, neither would go on.

    fails: a request whose KV does not arrive fails; else it is computed here.
    """

    def __init__(self, blocks: BlockManager, orders: Orders, fails: bool = False) -> None:
        self.blocks, self.orders, self.fails = blocks, orders, fails
        self.stats = KVTransferStats()
        self.offered: dict[bytes, Offering] = {}  # by name
        self.watched: dict[bytes, Watched] = {}
        self.failed: list[tuple[Request, str]] = []  # requests that must fail, and why
        self._names: dict[str, bytes] = {}  # by request id: what it offers or may fetch
        self._ended: deque[bytes] = deque(maxlen=NUM_ENDED)  # prompts that have been fetched or given up
        self._completed: list[bytes] = []  # offered prompts whose last tokens the next step computes
        self._completed_in_flight: deque[list[bytes]] = deque()  # the same for each step in flight

    @property
    def is_busy(self) -> bool:
        return bool(self.offered or self.watched)

    @property
    def has_leaving_blocks(self) -> bool:
        """Whether blocks of a withdrawn offer or a released fetch have no other holder. (Blocks of an offer that nobody
        has withdrawn may be held for long.)"""
        leaving = [each.block_ids for each in self.offered.values() if each.is_withdrawn]
        for pending in self.orders.pending.values():
            if isinstance(pending.transfer, Fetch) and pending.transfer.name not in self.watched:
                leaving.append(pending.transfer.block_ids)
        return any(self.blocks.pool[block_id].ref_count == 1 for block_ids in leaving for block_id in block_ids)

    def add_request(self, request: Request) -> None:
        if (params := request.kv_transfer) is None:
            return
        name = name_of(params.transfer_id, request.prompt_token_ids)
        if name in self._ended:
            return  # another choice of the same HTTP request was much faster: the other engine has freed the blocks
        if params.sources:
            if name not in self.watched:
                watch = Watch(self.orders.next_id(), name, list(params.sources))
                self.watched[name] = Watched(self.orders.add(watch, self, request))
            self.watched[name].users[request.request_id] = request
        elif name in self.offered:
            return  # the same prompt twice in one request: the first one is enough
        else:
            offer = Offer(self.orders.next_id(), name, len(request.prompt_token_ids))
            self.offered[name] = Offering(offer)
            self.orders.add(offer, self, request)
            self.stats.num_offered += 1
        self._names[request.request_id] = name

    # What other engines fetch here

    def save(self, request: Request, full: range) -> None:
        """Publish what the next step computes of an offered prompt, full blocks or not."""
        offering = self.offered.get(self._names.get(request.request_id, b""))
        if offering is None or offering.is_withdrawn:
            return
        num_tokens = min(request.num_computed_tokens, offering.offer.num_tokens)
        if num_tokens <= offering.num_published:
            return
        if not offering.block_ids:
            table = self.blocks.block_tables[request.request_id]
            offering.block_ids = table[: self.blocks.num_blocks_for(offering.offer.num_tokens)]
            self.blocks.lease(offering.block_ids)
        offering.num_published = num_tokens
        if num_tokens == offering.offer.num_tokens:
            self._completed.append(offering.offer.name)
        self.orders.new.append(Publish(offering.offer.name, offering.block_ids, num_tokens))

    def note_leave(self, request: Request) -> None:
        """An offer survives its request if that has finished: then the whole prompt is computed."""
        name = self._names.get(request.request_id)
        if name in self.offered and not request.status.is_finished:
            self._withdraw(name)
        self._stop_using(request)
        self._names.pop(request.request_id, None)

    def _withdraw(self, name: bytes) -> None:
        if not self.offered[name].is_withdrawn:
            self.offered[name].is_withdrawn = True
            self.orders.new.append(Withdraw(name))

    # What is fetched from other engines

    def find(self, request: Request, num_on_device: int) -> int | None:
        """All tokens that the other engine has and the device has not, the last one too; none, if that is at most one
        block, which is computed sooner than fetched."""
        watched = self._watched_by(request)
        if watched is None:
            return 0
        if watched.num_tokens is None or watched.fetch_id is not None:
            return None
        num_tokens = min(watched.num_tokens, request.num_tokens) - num_on_device
        return num_tokens if num_tokens > self.blocks.block_size else 0

    def load(self, request: Request, num_on_device: int, num_tokens: int) -> None:
        name = self._names[request.request_id]
        table, block_size = self.blocks.block_tables[request.request_id], self.blocks.block_size
        end = num_on_device + num_tokens
        block_ids = table[num_on_device // block_size : self.blocks.num_blocks_for(end)]
        self.blocks.lease(block_ids)
        request.num_found_tokens = request.num_drafted_tokens = num_on_device  # the draft model's KV is never fetched
        fetch = Fetch(self.orders.next_id(), name, num_on_device, end, block_ids)
        self.watched[name].fetch_id = self.orders.add(fetch, self, request)

    def is_waiting(self, request: Request) -> bool:
        watched = self._watched_by(request)
        return watched is not None and (watched.num_tokens is None or watched.fetch_id is not None)

    def note_start(self, request: Request) -> None:
        self._stop_using(request)

    def _watched_by(self, request: Request) -> Watched | None:
        """An engine that offers a prompt may also watch it, for another request."""
        watched = self.watched.get(self._names.get(request.request_id, b""))
        return watched if watched is not None and request.request_id in watched.users else None

    def _stop_using(self, request: Request) -> None:
        """When the last request has what it needs, or ends, the other engine may free its blocks."""
        if (watched := self._watched_by(request)) is not None:
            name = self._names.pop(request.request_id)
            del watched.users[request.request_id]
            if not watched.users:
                del self.watched[name]
                self._release(name)

    def _release(self, name: bytes) -> None:
        self._ended.append(name)
        self.orders.new.append(Release(name))

    # Both

    def note_done(self, transfer: Transfer, request: Request | None, done: TransferDone) -> None:
        match transfer:
            case Offer():
                self.blocks.end_lease(self.offered.pop(transfer.name).block_ids)
                self._ended.append(transfer.name)
                self.stats.num_expired += done.error == LEASE_ENDED
            case Watch():
                self._note_watched(transfer, done)
            case Fetch():
                self._note_fetched(transfer, request, done)

    def _note_watched(self, watch: Watch, done: TransferDone) -> None:
        watched = self.watched.get(watch.name)
        if watched is not None and watched.watch_id == watch.transfer_id:
            watched.num_tokens = done.num_tokens
            if done.error is not None:
                self._note_failed(watched, done.error)

    def _note_fetched(self, fetch: Fetch, request: Request | None, done: TransferDone) -> None:
        self.blocks.end_lease(fetch.block_ids)
        assert request is not None, "a fetch is made for a request"
        request.num_found_tokens += done.num_tokens
        self.stats.num_fetched_tokens += done.num_tokens
        self.stats.num_fetched_bytes += done.num_bytes
        self.stats.fetch_s += done.end_s - done.start_s
        watched = self.watched.get(fetch.name)
        if watched is not None and watched.fetch_id == fetch.transfer_id:
            watched.fetch_id = None
            if done.error is not None:
                watched.num_tokens = 0
                self._note_failed(watched, done.error)

    def _note_failed(self, watched: Watched, error: str) -> None:
        self.stats.num_failed += 1
        logger.warning("cannot fetch a prompt's KV: %s", error)
        if self.fails:
            self.failed += [(request, error) for request in watched.users.values()]

    def note_launch(self) -> None:
        self._completed_in_flight.append(self._completed)
        self._completed = []

    def note_result(self) -> None:
        """If an earlier step had failed, another engine would have got garbage: it uses nothing before this."""
        for name in self._completed_in_flight.popleft():
            if name in self.offered and not self.offered[name].is_withdrawn:
                self.orders.new.append(Confirm(name))

    def reset(self) -> None:
        """All offers and fetches end as soon as the worker hears of it."""
        self._completed.clear()
        self._completed_in_flight.clear()
        for name in self.offered:
            self._withdraw(name)
        for name in self.watched:
            self._release(name)
        self.watched.clear()
        self._names.clear()
        self.failed.clear()


def name_of(transfer_id: str, token_ids: Sequence[int]) -> bytes:
    """What both engines call a prompt. If they have other tokens for what should be one prompt, the names differ, and
    nothing is fetched."""
    return hashlib.sha256(transfer_id.encode() + b"\0" + array("I", token_ids).tobytes()).digest()
