"""The header with which the proxy tells an engine what to do about a request's KV.

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

from ..messages import KVTransferParams

HEADER = "x-kv-transfer"
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
