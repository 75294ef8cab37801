"""What the ranks of two engines say to each other. Each message is a frame of MessagePack; a Piece may have a second
frame, with its bytes."""

from __future__ import annotations

import zlib
from typing import Literal

import msgspec

PIECE_BYTES = 2**20  # a piece has at most this many bytes, but at least one token
WINDOW = 8  # pieces that may be on their way to a receiver
State = Literal["unknown", "waiting", "started", "gone"]


# From the receiver to the sender


class SharedMemory(msgspec.Struct, array_like=True, frozen=True):
    """Memory of the receiver that the sender may write to, if both are on one machine: a file descriptor of the
    receiver's process. It has room for WINDOW pieces, and nobody has to remove it, however a process ends. name: a
    random one, which /proc shows; the process with this number may be another one on the sender's machine."""

    pid: int
    descriptor: int
    piece_bytes: int
    name: str

    @property
    def path(self) -> str:
        return f"/proc/{self.pid}/fd/{self.descriptor}"


class WatchPrompt(msgspec.Struct, array_like=True, tag=True):
    """I want the KV of this prompt. Is answered with Status."""

    name: bytes
    memory: SharedMemory | None


class FetchPrompt(msgspec.Struct, array_like=True, tag=True):
    """Send the tokens at positions start to end - 1: these layers and heads of them, as soon as each is computed."""

    fetch_id: bytes
    name: bytes
    first_layer: int
    num_layers: int
    first_head: int
    num_heads: int
    start: int
    end: int


class Ack(msgspec.Struct, array_like=True, tag=True):
    """A piece has been read: its slot is free."""

    slot: int


class Heartbeat(msgspec.Struct, array_like=True, tag=True):
    """I still want these. Each is answered with Status."""

    names: list[bytes]


class ReleasePrompt(msgspec.Struct, array_like=True, tag=True):
    """I want no more of it. My engine has num_ranks ranks, and each says so."""

    name: bytes
    num_ranks: int


# From the sender to the receiver


class Status(msgspec.Struct, array_like=True, tag=True):
    """unknown: never heard of it. waiting: for blocks. started: num_tokens are, or will be, computed. gone: withdrawn,
    released, or too late."""

    name: bytes
    state: State
    num_tokens: int = 0


class Piece(msgspec.Struct, array_like=True, tag=True):
    """KV of some tokens in one layer. number: of the fetch's pieces. slot: which of WINDOW places it takes, in shared
    memory if it has no second frame. checksum: see checksum(). scales: of codes, for keys and then for values, one for
    each head."""

    fetch_id: bytes
    number: int
    slot: int
    layer: int
    first_head: int
    num_heads: int
    start: int
    end: int
    dtype: str
    num_bytes: int
    checksum: int = 0
    scales: list[float] = []


class FetchEnded(msgspec.Struct, array_like=True, tag=True):
    """No more pieces come. error: why there are fewer than were asked for."""

    fetch_id: bytes
    error: str | None = None


ToSender = WatchPrompt | FetchPrompt | Ack | Heartbeat | ReleasePrompt
ToReceiver = Status | Piece | FetchEnded
encode = msgspec.msgpack.Encoder().encode
decode_to_sender = msgspec.msgpack.Decoder(ToSender).decode
decode_to_receiver = msgspec.msgpack.Decoder(ToReceiver).decode


def checksum(piece: Piece, data: memoryview) -> int:
    """Of a piece's description and its bytes: neither may change on the way."""
    header = encode(msgspec.structs.replace(piece, checksum=0))
    return zlib.crc32(data, zlib.crc32(header))
