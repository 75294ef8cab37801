"""Sends KV to other engines: each layer of a prompt as soon as it is computed."""

from __future__ import annotations

import logging
import mmap
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import zmq

from ..messages import LEASE_ENDED, Offer, TransferDone
from .kv_shard import KVShard, overlap
from .kv_wire import (
    PIECE_BYTES,
    WINDOW,
    Ack,
    FetchEnded,
    FetchPrompt,
    Heartbeat,
    Piece,
    ReleasePrompt,
    SharedMemory,
    State,
    Status,
    ToReceiver,
    WatchPrompt,
    checksum,
    decode_to_sender,
    encode,
)

EXTENSION = 2 / 3  # of a lease: how long a heartbeat extends it (vLLM: 20 of 30 s)
logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Offered:
    """A prompt that other engines may fetch. block_ids: once it has started. ready: how many of its first tokens each
    layer has. lease_end_s: once it is confirmed, when it is given up unless a receiver is heard of."""

    offer: Offer
    num_layers: int
    block_ids: Sequence[int] = ()
    ready: list[int] = field(default_factory=list)
    lease_end_s: float | None = None

    def __post_init__(self) -> None:
        self.ready = [0] * self.num_layers

    @property
    def state(self) -> State:
        return "started" if self.block_ids else "waiting"


@dataclass(slots=True)
class Sending:
    """A fetch that is being answered. sent: of each of its layers, the position up to which it was sent."""

    fetch: FetchPrompt
    layers: range
    heads: range
    sent: dict[int, int]
    num_pieces: int = 0

    def next(self, ready: Sequence[int], first_layer: int, max_tokens: int) -> tuple[int, range] | None:
        """The layer and the positions of the next piece: the first layer that has more than was sent. None: wait."""
        for layer in self.layers:
            start, end = self.sent[layer], min(ready[layer - first_layer], self.fetch.end)
            if start < end:
                return layer, range(start, min(end, start + max_tokens))
        return None

    @property
    def is_complete(self) -> bool:
        return all(position >= self.fetch.end for position in self.sent.values())


@dataclass(slots=True)
class Receiver:
    """A rank of another engine. free_slots: how many more pieces may be on their way to it. memory: its own, where
    pieces are written if it is on this machine."""

    identity: bytes
    memory: mmap.mmap | None = None
    free_slots: list[int] = field(default_factory=lambda: list(range(WINDOW)))
    sendings: list[Sending] = field(default_factory=list)
    heard_s: float = 0.0


@dataclass(slots=True)
class Releases:
    """Who wants no more of a prompt: the ranks of one engine, of num_ranks."""

    num_ranks: int
    since_s: float
    identities: set[bytes] = field(default_factory=set)


class KVSender:
    """One side of the transfer: it holds a prompt's blocks until each rank of the other engine has released it, or
    until the lease ends.

    socket: a ROUTER. report: called with the answer to each offer. Everything runs in one thread.
    """

    def __init__(
        self, socket: zmq.Socket[bytes], shard: KVShard, lease_s: float, report: Callable[[TransferDone], None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.socket, self.shard, self.lease_s, self.report, self.now = socket, shard, lease_s, report, now
        self.offered: dict[bytes, Offered] = {}
        self.receivers: dict[bytes, Receiver] = {}
        self.watchers: dict[bytes, set[bytes]] = {}  # of each prompt
        self.releases: dict[bytes, Releases] = {}  # of each prompt, offered or to be offered
        self.ended: dict[bytes, float] = {}  # when the latest offers ended: a receiver that asks late need not wait
        self.num_bytes_sent = self.num_refused = self.num_expired = 0

    @property
    def is_idle(self) -> bool:
        return not self.offered and not self.receivers

    # What core says

    def offer(self, offer: Offer) -> None:
        assert offer.name not in self.offered, "core offers a prompt once"
        self.offered[offer.name] = Offered(offer, len(self.shard.layers))
        self._tell_watchers(offer.name)
        self._end_if_released(offer.name)

    def publish(self, name: bytes, block_ids: Sequence[int], layer: int, num_tokens: int) -> None:
        """A layer has the first num_tokens tokens of a prompt now. layer: among this rank's."""
        if (offered := self.offered.get(name)) is None:
            return  # withdrawn
        is_first, offered.block_ids = not offered.block_ids, block_ids
        if is_first:
            self._tell_watchers(name)
        offered.ready[layer] = max(offered.ready[layer], num_tokens)
        for identity in self.watchers.get(name, ()):
            self._send_pieces(self.receivers[identity])

    def confirm(self, name: bytes) -> None:
        """What was sent is right: fetches that are complete may end, and the lease begins."""
        if (offered := self.offered.get(name)) is not None:
            offered.lease_end_s = self.now() + self.lease_s
            for identity in self.watchers.get(name, ()):
                self._end_fetches(self.receivers[identity])

    def withdraw(self, name: bytes) -> None:
        if name in self.offered:
            self._end(name, "withdrawn")

    # What receivers say

    def receive(self) -> None:
        """Handle a message."""
        try:
            identity, *frames = self.socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return
        try:
            message = decode_to_sender(frames[0])
        except (msgspec.DecodeError, UnicodeDecodeError):
            self.num_refused += 1
            return
        receiver = self.receivers.setdefault(identity, Receiver(identity))
        receiver.heard_s = self.now()
        match message:
            case WatchPrompt():
                self._watch(receiver, message)
            case FetchPrompt():
                self._fetch(receiver, message)
            case Ack():
                if message.slot in range(WINDOW) and message.slot not in receiver.free_slots:
                    receiver.free_slots.append(message.slot)
                self._send_pieces(receiver)
            case Heartbeat():
                for name in message.names:
                    self._add_watcher(name, receiver.identity)
                    self._extend_lease(name)
                    self._tell(identity, self._status(name))
            case ReleasePrompt():
                self._release(receiver, message)

    def _watch(self, receiver: Receiver, watch: WatchPrompt) -> None:
        if receiver.memory is None and watch.memory is not None:
            receiver.memory = map_memory(watch.memory)
        self._add_watcher(watch.name, receiver.identity)
        self._extend_lease(watch.name)
        self._tell(receiver.identity, self._status(watch.name))

    def _fetch(self, receiver: Receiver, fetch: FetchPrompt) -> None:
        offered = self.offered.get(fetch.name)
        layers = range(fetch.first_layer, fetch.first_layer + fetch.num_layers)
        heads = range(fetch.first_head, fetch.first_head + fetch.num_heads)
        is_here = overlap(layers, self.shard.layers) == layers and overlap(heads, self.shard.heads) == heads
        num_tokens = 0 if offered is None else offered.offer.num_tokens
        if not (layers and heads and is_here and 0 <= fetch.start < fetch.end <= num_tokens):
            self._tell(receiver.identity, FetchEnded(fetch.fetch_id, "gone" if offered is None else "no such part"))
            return
        self._add_watcher(fetch.name, receiver.identity)
        self._extend_lease(fetch.name)
        receiver.sendings.append(Sending(fetch, layers, heads, dict.fromkeys(layers, fetch.start)))
        self._send_pieces(receiver)

    def _release(self, receiver: Receiver, release: ReleasePrompt) -> None:
        """It may come before the offer, if a client leaves early."""
        self._stop_sending(receiver, release.name)
        self._drop_watcher(release.name, receiver.identity)
        releases = self.releases.setdefault(release.name, Releases(release.num_ranks, self.now()))
        releases.identities.add(receiver.identity)
        self._end_if_released(release.name)

    def _end_if_released(self, name: bytes) -> None:
        """The offer ends when all ranks of the other engine have said so."""
        releases = self.releases.get(name)
        if releases is not None and name in self.offered and len(releases.identities) >= releases.num_ranks:
            self._end(name, "released")

    # Sending

    def _send_pieces(self, receiver: Receiver) -> None:
        """As many as may be on their way, in turn for each fetch."""
        while receiver.free_slots and (chosen := self._next_piece(receiver)) is not None:
            sending, layer, positions = chosen
            self._send_piece(receiver, sending, layer, positions)
            receiver.sendings.remove(sending)
            receiver.sendings.append(sending)
        self._end_fetches(receiver)

    def _end_fetches(self, receiver: Receiver) -> None:
        """Those whose tokens were all sent, and all computed by steps that have succeeded."""
        for sending in list(receiver.sendings):
            if sending.is_complete and self.offered[sending.fetch.name].lease_end_s is not None:
                receiver.sendings.remove(sending)
                self._tell(receiver.identity, FetchEnded(sending.fetch.fetch_id))

    def _next_piece(self, receiver: Receiver) -> tuple[Sending, int, range] | None:
        for sending in receiver.sendings:
            max_tokens = max(1, PIECE_BYTES // self.shard.bytes_per_token(len(sending.heads)))
            piece = sending.next(self.offered[sending.fetch.name].ready, self.shard.layers.start, max_tokens)
            if piece is not None:
                return sending, *piece
        return None

    def _send_piece(self, receiver: Receiver, sending: Sending, layer: int, positions: range) -> None:
        data = self.shard.read(layer, sending.heads, self.offered[sending.fetch.name].block_ids, positions)
        slot = receiver.free_slots.pop()
        piece = Piece(
            sending.fetch.fetch_id, sending.num_pieces, slot, layer, sending.heads.start, len(sending.heads),
            positions.start, positions.stop, str(self.shard.dtype).removeprefix("torch."), data.nbytes,
            scales=self.shard.scales(layer, sending.heads),
        )  # fmt: skip
        piece.checksum = checksum(piece, data)
        sending.num_pieces += 1
        sending.sent[layer] = positions.stop
        self.num_bytes_sent += data.nbytes
        if receiver.memory is not None and data.nbytes <= len(receiver.memory) // WINDOW:
            start = slot * (len(receiver.memory) // WINDOW)
            receiver.memory[start : start + data.nbytes] = data
            self.socket.send_multipart([receiver.identity, encode(piece)])
        else:
            self.socket.send_multipart([receiver.identity, encode(piece), data])

    def _stop_sending(self, receiver: Receiver, name: bytes, error: str | None = None) -> None:
        for sending in [each for each in receiver.sendings if each.fetch.name == name]:
            receiver.sendings.remove(sending)
            if error is not None:
                self._tell(receiver.identity, FetchEnded(sending.fetch.fetch_id, error))

    def _end(self, name: bytes, error: str) -> None:
        """From here on, nothing reads the prompt's blocks."""
        offered = self.offered.pop(name)
        self.releases.pop(name, None)
        self.ended[name] = self.now()
        for identity in self.watchers.get(name, ()):
            self._stop_sending(self.receivers[identity], name, error)
            self._tell(identity, Status(name, "gone"))
        self.report(TransferDone(offered.offer.transfer_id, error=error))

    # Leases

    def _extend_lease(self, name: bytes) -> None:
        """A receiver still wants a prompt. The lease, if it has begun, lasts EXTENSION of its length from now on."""
        offered = self.offered.get(name)
        if offered is not None and offered.lease_end_s is not None:
            offered.lease_end_s = max(offered.lease_end_s, self.now() + EXTENSION * self.lease_s)

    def check_leases(self) -> None:
        """Give up what nobody has asked for in time, and forget receivers that have gone."""
        now = self.now()
        for name, offered in list(self.offered.items()):
            if offered.lease_end_s is not None and now > offered.lease_end_s:
                self.num_expired += 1
                logger.warning("nobody has fetched a prompt of %d tokens in time", offered.offer.num_tokens)
                self._end(name, LEASE_ENDED)
        for identity, receiver in list(self.receivers.items()):
            if now > receiver.heard_s + self.lease_s and not receiver.sendings:
                del self.receivers[identity]
                for name in list(self.watchers):
                    self._drop_watcher(name, identity)
        for name, releases in list(self.releases.items()):
            if now > releases.since_s + self.lease_s:
                del self.releases[name]
        self.ended = {name: end_s for name, end_s in self.ended.items() if now <= end_s + self.lease_s}

    def _add_watcher(self, name: bytes, identity: bytes) -> None:
        """With every message about a prompt: a receiver that was silent for long has been forgotten."""
        self.watchers.setdefault(name, set()).add(identity)

    def _drop_watcher(self, name: bytes, identity: bytes) -> None:
        watchers = self.watchers.get(name, set())
        watchers.discard(identity)
        if not watchers:
            self.watchers.pop(name, None)

    def _status(self, name: bytes) -> Status:
        if (offered := self.offered.get(name)) is None:
            return Status(name, "gone" if name in self.ended else "unknown")
        return Status(name, offered.state, offered.offer.num_tokens)

    def _tell_watchers(self, name: bytes) -> None:
        for identity in self.watchers.get(name, ()):
            self._tell(identity, self._status(name))

    def _tell(self, identity: bytes, message: ToReceiver) -> None:
        self.socket.send_multipart([identity, encode(message)])


def map_memory(memory: SharedMemory) -> mmap.mmap | None:
    """Another process's memory, or None if it is not on this machine: then its pieces have their bytes with them."""
    try:
        if Path(memory.path).readlink().name != f"memfd:{memory.name} (deleted)":
            return None
        descriptor = os.open(memory.path, os.O_RDWR)
    except OSError:
        return None
    try:
        return mmap.mmap(descriptor, WINDOW * memory.piece_bytes)
    except (OSError, ValueError, OverflowError):
        return None
    finally:
        os.close(descriptor)
