"""Fetches KV from other engines, into blocks of this one."""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import msgspec
import torch
import zmq
from zmq.utils.monitor import recv_monitor_message

from ..messages import Fetch, KVSource, TransferDone, Watch
from ..torchrun import encrypt
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
    Status,
    ToSender,
    WatchPrompt,
    checksum,
    decode_to_receiver,
    encode,
)
from .stream import Mark

logger = logging.getLogger(__name__)
LOST = (
    zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED | zmq.EVENT_CLOSED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)  # fmt: skip


@dataclass(eq=False, slots=True)
class Connection:
    """To a rank of another engine. memory: where it writes pieces, if it is on this machine. waiting_since_s: since
    when an answer has been awaited, None if none is."""

    source: KVSource
    socket: zmq.Socket[bytes]
    monitor: zmq.Socket[bytes]
    memory: SharedMemory | None
    view: mmap.mmap | None
    waiting_since_s: float | None = None

    def close(self) -> None:
        self.socket.disable_monitor()
        self.monitor.close(linger=0)
        self.socket.close(linger=0)
        if self.memory is not None:
            os.close(self.memory.descriptor)


@dataclass(slots=True)
class Watched:
    """A prompt that another engine computes. watch: the order, until it is answered. num_tokens: of each source that
    has started."""

    name: bytes
    connections: list[Connection]
    watch: Watch | None
    since_s: float
    num_tokens: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Share:
    """What is fetched from one source. arrived: of each layer, the position up to which all pieces have come. number:
    of the next piece."""

    connection: Connection
    layers: range
    heads: range
    arrived: dict[int, int]
    number: int = 0
    has_ended: bool = False


@dataclass(slots=True)
class Receiving:
    """A fetch. block_ids: from position 0 on; those before `start` are not used."""

    fetch: Fetch
    mark: Mark
    shares: list[Share]
    block_ids: Sequence[int]
    start_s: float
    num_bytes: int = 0
    has_written: bool = False
    is_refused: bool = False  # the other engine has not said that what it sent is right
    error: str | None = None

    @property
    def num_tokens(self) -> int:
        """How many tokens have come in all layers and heads, without a gap."""
        return min(position for share in self.shares for position in share.arrived.values()) - self.fetch.start


class KVReceiver:
    """The other side of the transfer: it watches prompts, and writes what it fetches to this rank's blocks.

    secret: of both engines. num_ranks: of this engine. timeout_s: how long a source may be silent, or not know a
    prompt. shares_memory: let sources on this machine write to memory of this process. report: called with the answer
    to each watch and fetch. Everything runs in one thread.
    """

    def __init__(
        self, shard: KVShard, secret: str, num_ranks: int, timeout_s: float, shares_memory: bool,
        report: Callable[[TransferDone], None], now: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.shard, self.secret, self.num_ranks, self.timeout_s = shard, secret, num_ranks, timeout_s
        self.shares_memory, self.report, self.now = shares_memory, report, now
        self.context = zmq.Context()
        self.context.linger = 0
        self.poller = zmq.Poller()
        self.connections: dict[str, Connection] = {}  # by address
        self.watched: dict[bytes, Watched] = {}
        self.receiving: dict[bytes, Receiving] = {}  # by fetch id
        self.num_bytes_received = self.num_refused = 0

    @property
    def is_idle(self) -> bool:
        return not self.watched

    # What core says

    def watch(self, watch: Watch) -> None:
        """Every rank talks to every source: each holds a prompt's blocks until all ranks have released it."""
        assert watch.name not in self.watched, "core watches a prompt once"
        watched = Watched(watch.name, [self._connect(source) for source in watch.sources], watch, self.now())
        self.watched[watch.name] = watched
        if any(source.layout != self.shard.layout for source in watch.sources):
            self._end_watch(watched, "the other engine has another model")
            return  # core releases it next
        for connection in watched.connections:
            self._ask(connection, WatchPrompt(watch.name, connection.memory))

    def fetch(self, fetch: Fetch, mark: Mark) -> None:
        """mark: before it is reached, steps may still use the blocks."""
        watched = self.watched.get(fetch.name)
        shares = [] if watched is None else plan_shares(watched.connections, self.shard, fetch.start)
        if not shares:
            error = "the connection is lost" if watched is None else "the other engine lacks some layers or heads"
            self.report(TransferDone(fetch.transfer_id, error=error))
            return
        unused = [0] * (fetch.start // self.shard.cache.block_size)
        fetch_id = secrets.token_bytes(8)
        self.receiving[fetch_id] = Receiving(fetch, mark, shares, [*unused, *fetch.block_ids], time.perf_counter())
        for share in shares:
            message = FetchPrompt(
                fetch_id, fetch.name, share.layers.start, len(share.layers), share.heads.start, len(share.heads),
                fetch.start, fetch.end,
            )  # fmt: skip
            self._ask(share.connection, message)

    def release(self, name: bytes) -> None:
        if (watched := self.watched.pop(name, None)) is not None:
            self._end_watch(watched, "released")
            for connection in watched.connections:
                self._tell(connection, ReleasePrompt(name, self.num_ranks))

    # What sources say

    def receive(self, connection: Connection) -> None:
        """Handle a message."""
        try:
            frame, *payload = connection.socket.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:  # the source is lost, and its messages with it
            return
        connection.waiting_since_s = None
        try:
            message = decode_to_receiver(frame.buffer)
        except (msgspec.DecodeError, UnicodeDecodeError):
            self.num_refused += 1
            return
        match message:
            case Status():
                self._note_status(connection, message)
            case Piece():
                self._note_piece(connection, message, payload[0].buffer if payload else None)
            case FetchEnded():
                self._note_end(connection, message)

    def _note_status(self, connection: Connection, status: Status) -> None:
        if (watched := self.watched.get(status.name)) is None or connection not in watched.connections:
            return
        is_late = status.state == "unknown" and self.now() > watched.since_s + self.timeout_s
        if status.state == "gone" or is_late:
            self._end_watch(watched, f"the other engine says: {status.state}")
        elif status.state == "started":
            watched.num_tokens[connection.source.address] = status.num_tokens
            if watched.watch is not None and len(watched.num_tokens) == len(set(watched.connections)):
                transfer_id, watched.watch = watched.watch.transfer_id, None
                self.report(TransferDone(transfer_id, num_tokens=min(watched.num_tokens.values())))

    def _note_piece(self, connection: Connection, piece: Piece, payload: memoryview | None) -> None:
        receiving = self.receiving.get(piece.fetch_id)
        share = None if receiving is None else find_share(receiving, connection)
        if (
            receiving is None or share is None or not is_expected(piece, share, receiving.fetch)
        ):  # late, foreign, or sent twice
            self.num_refused += 1
        else:
            share.number = piece.number + 1
            self._store(connection, piece, payload, receiving, share)
        self._tell(connection, Ack(piece.slot))

    def _store(
        self, connection: Connection, piece: Piece, payload: memoryview | None, receiving: Receiving, share: Share
    ) -> None:  # fmt: skip
        """Write a piece to the blocks, unless it is damaged, or one before it is missing."""
        data = connection_data(connection, piece) if payload is None else payload
        if data is None or data.nbytes != piece.num_bytes or checksum(piece, data) != piece.checksum:
            receiving.error = "a piece was damaged"
        elif share.arrived[piece.layer] != piece.start:
            receiving.error = receiving.error or "a piece was lost"
        else:
            if not receiving.has_written:
                receiving.mark.wait()
                receiving.has_written = True
            positions, dtype = range(piece.start, piece.end), getattr(torch, piece.dtype)
            self.shard.write(piece.layer, share.heads, receiving.block_ids, positions, data, dtype, piece.scales)
            share.arrived[piece.layer] = piece.end
            receiving.num_bytes += data.nbytes
            self.num_bytes_received += data.nbytes

    def _note_end(self, connection: Connection, ended: FetchEnded) -> None:
        receiving = self.receiving.get(ended.fetch_id)
        if receiving is not None and (share := find_share(receiving, connection)) is not None:
            share.has_ended = True
            receiving.error = receiving.error or ended.error
            receiving.is_refused |= ended.error is not None
            if all(share.has_ended for share in receiving.shares):
                self._finish(ended.fetch_id)

    def _finish(self, fetch_id: bytes) -> None:
        receiving = self.receiving.pop(fetch_id)
        num_tokens = 0 if receiving.is_refused else receiving.num_tokens
        expected = receiving.fetch.end - receiving.fetch.start
        if num_tokens < expected and receiving.error is None:
            receiving.error = "a piece was lost"
        if receiving.has_written and self.shard.cache.data.device.type == "cuda":
            torch.cuda.current_stream(self.shard.cache.data.device).synchronize()
        self.report(
            TransferDone(
                receiving.fetch.transfer_id, num_tokens=num_tokens, num_bytes=receiving.num_bytes,
                start_s=receiving.start_s, end_s=time.perf_counter(), error=receiving.error,
            )
        )  # fmt: skip

    def _end_watch(self, watched: Watched, error: str) -> None:
        """Nothing more comes of a prompt: answer what was ordered."""
        if watched.watch is not None:
            transfer_id, watched.watch = watched.watch.transfer_id, None
            self.report(TransferDone(transfer_id, error=error))
        for fetch_id in [each for each, receiving in self.receiving.items() if receiving.fetch.name == watched.name]:
            receiving = self.receiving[fetch_id]
            receiving.error, receiving.is_refused = receiving.error or error, True
            self._finish(fetch_id)

    # Connections

    def _connect(self, source: KVSource) -> Connection:
        if (connection := self.connections.get(source.address)) is not None:
            return connection
        socket = self.context.socket(zmq.DEALER)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RECONNECT_IVL, -1)  # a source that is lost has lost what it offered
        encrypt(socket, self.secret, is_server=False)
        monitor = socket.get_monitor_socket(LOST)
        socket.connect(source.address)
        memory = view = None
        if self.shares_memory:
            piece_bytes = max(PIECE_BYTES, self.shard.bytes_per_token(len(self.shard.heads)))
            memory, view = make_memory(piece_bytes)
        connection = self.connections[source.address] = Connection(source, socket, monitor, memory, view)
        self.poller.register(socket, zmq.POLLIN)
        self.poller.register(monitor, zmq.POLLIN)
        return connection

    def handle(self, ready: Iterable[object]) -> None:
        """Messages and events of all sockets that the poller has found ready."""
        for connection in list(self.connections.values()):
            try:
                if connection.socket in ready:
                    self.receive(connection)
            except Exception as error:  # core waits for what was expected of it
                logger.exception("cannot receive KV from %s", connection.source.address)
                self._lose(connection, f"{type(error).__name__}: {error}")
                continue
            if connection.monitor in ready:
                recv_monitor_message(connection.monitor)
                self._lose(connection, "the connection is lost")

    def _lose(self, connection: Connection, error: str) -> None:
        """A source has gone, and all that was expected of it."""
        del self.connections[connection.source.address]
        self.poller.unregister(connection.socket)
        self.poller.unregister(connection.monitor)
        for watched in [each for each in self.watched.values() if connection in each.connections]:
            del self.watched[watched.name]
            self._end_watch(watched, error)
            for other in watched.connections:
                if other is not connection:
                    self._tell(other, ReleasePrompt(watched.name, self.num_ranks))
        connection.close()

    def send_heartbeats(self) -> None:
        """Tell all sources what is still wanted, and give up those that are silent."""
        for connection in list(self.connections.values()):
            since_s = connection.waiting_since_s
            if since_s is not None and self.now() > since_s + self.timeout_s:
                self._lose(connection, f"no answer for {self.timeout_s:g} s")
            elif names := [each.name for each in self.watched.values() if connection in each.connections]:
                self._ask(connection, Heartbeat(names))

    def _ask(self, connection: Connection, message: ToSender) -> None:
        """Send what will be answered."""
        if connection.waiting_since_s is None:
            connection.waiting_since_s = self.now()
        self._tell(connection, message)

    def _tell(self, connection: Connection, message: ToSender) -> None:
        if not connection.socket.closed:
            with contextlib.suppress(zmq.Again):  # the source is lost, which its monitor will say
                connection.socket.send(encode(message), zmq.NOBLOCK)

    def close(self) -> None:
        for connection in self.connections.values():
            connection.close()
        self.connections.clear()
        self.context.destroy(linger=0)


def plan_shares(connections: Sequence[Connection], shard: KVShard, start: int) -> list[Share]:
    """Which layers and heads to fetch from each source, so that a rank gets all of its own once. Empty if some are
    missing.

    All stages split the heads in the same way. So the heads that are still missing are the same in all common layers,
    and contiguous.
    """
    shares, missing = list[Share](), {(layer, head) for layer in shard.layers for head in shard.heads}
    for connection in connections:
        source = connection.source
        layers = overlap(shard.layers, range(source.first_layer, source.first_layer + source.num_layers))
        heads = range(source.first_head, source.first_head + source.num_heads)
        wanted = [head for head in heads if layers and (layers.start, head) in missing]
        if wanted:
            heads = range(wanted[0], wanted[-1] + 1)
            shares.append(Share(connection, layers, heads, dict.fromkeys(layers, start)))
            missing.difference_update((layer, head) for layer in layers for head in heads)
    return [] if missing else shares


def find_share(receiving: Receiving, connection: Connection) -> Share | None:
    return next((share for share in receiving.shares if share.connection is connection), None)


def is_expected(piece: Piece, share: Share, fetch: Fetch) -> bool:
    """Whether a piece belongs to a share, and has not come before."""
    heads, is_new = range(piece.first_head, piece.first_head + piece.num_heads), piece.number >= share.number
    is_wanted = piece.layer in share.arrived and heads == share.heads
    return is_new and is_wanted and fetch.start <= piece.start < piece.end <= fetch.end


def make_memory(piece_bytes: int) -> tuple[SharedMemory, mmap.mmap]:
    """Memory that has no name in the file system, so it is gone when both processes have ended."""
    name = f"kv-{secrets.token_hex(8)}"
    descriptor = os.memfd_create(name)
    os.ftruncate(descriptor, WINDOW * piece_bytes)
    return SharedMemory(os.getpid(), descriptor, piece_bytes, name), mmap.mmap(descriptor, WINDOW * piece_bytes)


def connection_data(connection: Connection, piece: Piece) -> memoryview | None:
    """The bytes of a piece in shared memory, copied, so that they are those that are checked. None if they can't be
    there."""
    if connection.view is None or connection.memory is None or not 0 <= piece.slot < WINDOW:
        return None
    start = piece.slot * connection.memory.piece_bytes
    if not 0 <= piece.num_bytes <= connection.memory.piece_bytes:
        return None
    return memoryview(connection.view[start : start + piece.num_bytes])
