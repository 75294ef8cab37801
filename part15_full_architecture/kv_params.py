"""What the proxy tells an engine to do about a request's KV, in a header. (Importing this imports no torch.)

An engine connects to the addresses in it, so nobody but the proxy may set it: it is signed with a secret that all
engines and the proxy have.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from contextvars import ContextVar

import msgspec

HEADER = "x-kv-transfer"
MIN_SECRET_CHARS = 8
SECRET_VARIABLE = "LLM_KV_TRANSFER_SECRET"


class KVSource(msgspec.Struct, array_like=True, frozen=True):
    """A rank that other engines may fetch KV from. address: where it listens. layout: what must be the same on both
    sides, see worker/kv_shard.py. The rest: the layers and KV heads that it has, numbered as in the whole model."""

    address: str
    layout: str
    first_layer: int
    num_layers: int
    first_head: int
    num_heads: int


class KVTransferParams(msgspec.Struct, frozen=True):
    """What the proxy says of a request's KV. transfer_id: the same on both sides. sources: where it is to be fetched;
    none: this engine computes it, and another one will fetch it."""

    transfer_id: str
    sources: tuple[KVSource, ...] = ()


KV_TRANSFER: ContextVar[KVTransferParams | None] = ContextVar("KV_TRANSFER", default=None)  # of an HTTP request
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(KVTransferParams).decode


def sign(params: KVTransferParams, secret: str) -> str:
    """The header's value."""
    data = _encode(params)
    return base64.urlsafe_b64encode(_signature(data, secret) + data).decode()


def open_signed(value: str, secret: str) -> KVTransferParams | None:
    """What the proxy has signed. None for anything else."""
    try:
        signed = base64.urlsafe_b64decode(value)
        signature, data = signed[: hashlib.sha256().digest_size], signed[hashlib.sha256().digest_size :]
        return _decode(data) if hmac.compare_digest(signature, _signature(data, secret)) else None
    except (binascii.Error, ValueError, msgspec.DecodeError):
        return None


def _signature(data: bytes, secret: str) -> bytes:
    return hmac.digest(secret.encode(), HEADER.encode() + data, "sha256")
