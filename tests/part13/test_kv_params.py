"""kv_params.py, the server's middleware, and the flags: who may tell an engine where to fetch KV."""

from __future__ import annotations

import asyncio
import base64
import json
import random
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse

from common.errors import FieldError
from common.openai_app.errors import ApiError
from common.serve import ServerConfig
from part13_disaggregation import kv_params
from part13_disaggregation.api import server
from part13_disaggregation.api.server import KVTransferHeader, create_app
from part13_disaggregation.config import MAX_SECONDS, EngineConfig
from part13_disaggregation.kv_params import HEADER, KV_TRANSFER, SECRET_VARIABLE, open_signed, sign
from part13_disaggregation.messages import KVSource, KVTransferParams

SECRET, OTHER = "a secret of tests", "another secret"
SOURCES = (KVSource("tcp://10.0.0.1:5000", "layout", 0, 4, 0, 2), KVSource("tcp://10.0.0.2:5000", "layout", 0, 4, 2, 2))
PARAMS = KVTransferParams("transfer-1", SOURCES)
LOOK_SIGN = 'Look at kv_params.py::sign and open_signed; README "From engine to engine".'
LOOK_SERVER = 'Look at api/server.py::KVTransferHeader and create_app; README "From engine to engine".'
LOOK_CONFIG = 'Look at config.py::EngineConfig._check_transfers; README "From engine to engine".'


def test_what_was_signed_is_opened() -> None:
    for params in (PARAMS, KVTransferParams("only an id"), KVTransferParams("é€", SOURCES[:1])):
        got = open_signed(sign(params, SECRET), SECRET)
        assert got == params, f"expected {params}, got {got}. {LOOK_SIGN}"


def test_a_header_is_plain_ascii() -> None:
    value = sign(KVTransferParams("é€\n\0", SOURCES), SECRET)
    assert value.isascii() and value.isprintable() and " " not in value, f"a header can't be {value!r}. {LOOK_SIGN}"


def test_every_changed_bit_is_refused() -> None:
    """Of the signature and of what it signs."""
    signed = base64.urlsafe_b64decode(sign(PARAMS, SECRET))
    for bit in range(8 * len(signed)):
        changed = bytearray(signed)
        changed[bit // 8] ^= 1 << bit % 8
        got = open_signed(base64.urlsafe_b64encode(changed).decode(), SECRET)
        assert got is None, f"bit {bit} of {8 * len(signed)} was flipped, and {got} was accepted. {LOOK_SIGN}"


def test_another_secret_is_refused() -> None:
    assert open_signed(sign(PARAMS, OTHER), SECRET) is None, f"anybody could sign. {LOOK_SIGN}"
    assert open_signed(sign(PARAMS, SECRET + " "), SECRET) is None, f"a space is part of a secret. {LOOK_SIGN}"


@pytest.mark.parametrize(
    "value", ["", "=", "a", "ab", "abc", "not base64!", "é", "\x80\xff", "日本", "A" * 44, "A" * 100_000, "....", "\0"]
)
def test_garbage_is_refused(value: str) -> None:
    got = open_signed(value, SECRET)
    assert got is None, f"{value[:20]!r} was accepted as {got}. {LOOK_SIGN}"


def test_random_garbage_is_refused() -> None:
    rng, signed = random.Random(0), sign(PARAMS, SECRET)
    for _ in range(500):
        cut = signed[: rng.randrange(len(signed))]
        noise = "".join(chr(rng.randrange(256)) for _ in range(rng.randrange(60)))
        for value in (cut, noise, cut + noise):
            assert open_signed(value, SECRET) is None, f"{value!r} was accepted. {LOOK_SIGN}"


def test_well_signed_nonsense_is_refused() -> None:
    """The signature of something that is no KVTransferParams."""
    for data in (b"", b"\xc1", b"\x93\x01\x02\x03", b"\x91\x2a", b"\xff" * 100, b"\x92\xa1\xff\x90"):
        value = base64.urlsafe_b64encode(kv_params._signature(data, SECRET) + data).decode()
        assert open_signed(value, SECRET) is None, f"{data!r} was accepted. {LOOK_SIGN}"


# The server


def request_with(secret: str | None, value: str | bytes | None) -> tuple[int | None, dict[str, Any] | None, Any]:
    """Status and body, if the middleware answers; else None, None, and what the app behind it sees of the header."""
    seen: list[Any] = []

    async def app(*_: Any) -> None:
        seen.append(KV_TRANSFER.get())

    async def ask() -> tuple[int | None, dict[str, Any] | None, Any]:
        headers = [] if value is None else [(HEADER.encode(), value if isinstance(value, bytes) else value.encode())]
        sent: list[dict[str, Any]] = []

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "headers": headers, "method": "POST", "path": "/v1/completions"}
        await KVTransferHeader(app, secret)(scope, None, send)  # type: ignore[arg-type]
        if not sent:
            return None, None, seen[0]
        return sent[0]["status"], json.loads(sent[1]["body"]), seen

    return asyncio.run(ask())


def test_a_signed_header_is_for_this_request_alone() -> None:
    assert request_with(SECRET, sign(PARAMS, SECRET)) == (None, None, PARAMS), (
        f"it should reach the engine. {LOOK_SERVER}"
    )
    assert request_with(SECRET, None) == (None, None, None), f"a request without a header has none. {LOOK_SERVER}"
    assert KV_TRANSFER.get() is None, f"it stays set after its request. {LOOK_SERVER}"


def test_a_request_without_a_header_does_not_inherit_one() -> None:
    """The event loop may run a connection's later requests in the context of an earlier one."""
    token = KV_TRANSFER.set(PARAMS)
    try:
        assert request_with(SECRET, None) == (None, None, None), f"it got an earlier request's. {LOOK_SERVER}"
    finally:
        KV_TRANSFER.reset(token)


@pytest.mark.parametrize("value", [sign(PARAMS, OTHER), "garbage", "", b"\xff\xfe", sign(PARAMS, SECRET)[:-8]])
def test_an_unsigned_header_is_refused(value: str | bytes) -> None:
    """Else a client could make the engine connect to any address, or read another client's prompt."""
    status, body, seen = request_with(SECRET, value)
    assert status == 400 and seen == [], f"header {value!r}: expected status 400, got {status}. {LOOK_SERVER}"
    assert body is not None and body["error"]["param"] == HEADER, f"{body}. {LOOK_SERVER}"
    assert "not signed" in body["error"]["message"], f"the error should say why: {body}. {LOOK_SERVER}"


def test_an_engine_without_a_connector_refuses_the_header() -> None:
    """The request would be computed twice, and nobody would see why."""
    status, body, seen = request_with(None, sign(PARAMS, SECRET))
    assert status == 400 and seen == [] and body is not None, f"expected status 400, got {status}. {LOOK_SERVER}"
    assert "no kv_connector" in body["error"]["message"], f"the error should say why: {body}. {LOOK_SERVER}"
    assert request_with(None, None) == (None, None, None), f"without the header, all is well. {LOOK_SERVER}"


def app_with(api_key: str | None, secret: str | None, monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    """The server's app over an engine that has only what the endpoints of this part need."""
    monkeypatch.setattr(server, "create_openai_app", lambda *_: FastAPI())
    engine: Any = SimpleNamespace(kv_sources=list(SOURCES), kv_transfer_secret=secret)
    return create_app(engine, ServerConfig(api_key=api_key))


def get(app: FastAPI, path: str, **headers: str) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
            return await client.get(path, headers=headers)

    return asyncio.run(ask())


def test_sources_are_told_to_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    got = get(app_with(None, SECRET, monkeypatch), "/kv_transfer").json()
    expected = [["tcp://10.0.0.1:5000", "layout", 0, 4, 0, 2], ["tcp://10.0.0.2:5000", "layout", 0, 4, 2, 2]]
    assert got == {"sources": expected}, f"expected the sources {expected}, got {got}. {LOOK_SERVER}"


def test_sources_need_the_api_key(monkeypatch: pytest.MonkeyPatch) -> None:
    app = app_with("the key", SECRET, monkeypatch)

    async def told(_: Any, error: Any) -> Any:  # what common's app does with it
        return JSONResponse({}, error.status)

    app.add_exception_handler(ApiError, told)
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "the key"}):
        response = get(app, "/kv_transfer", **headers)
        assert response.status_code == 401 and "sources" not in response.text, (
            f"with {headers}: expected status 401, got {response.status_code} {response.text[:80]}. {LOOK_SERVER}"
        )
    response = get(app, "/kv_transfer", Authorization="Bearer the key")
    assert response.status_code == 200 and response.json()["sources"], f"got {response}. {LOOK_SERVER}"


def test_the_app_has_the_middleware(monkeypatch: pytest.MonkeyPatch) -> None:
    for secret, why in ((SECRET, "not signed"), (None, "no kv_connector")):
        response = get(app_with(None, secret, monkeypatch), "/kv_transfer", **{HEADER: "garbage"})
        assert response.status_code == 400 and why in response.text, f"got {response.text[:200]}. {LOOK_SERVER}"


# Flags

GOOD: dict[str, Any] = {"device": "cpu", "kv_connector": "tcp", "kv_transfer_secret": SECRET}


@pytest.mark.parametrize(
    ("flags", "field", "value", "limit"),
    [
        ({"kv_lease": 0.0}, "kv_lease", "got 0.0", "above 0"),
        ({"kv_lease": -1.0}, "kv_lease", "got -1.0", "above 0"),
        ({"kv_lease": float("nan")}, "kv_lease", "got nan", "above 0"),
        ({"kv_lease": MAX_SECONDS + 1.0}, "kv_lease", "got 86401.0", "up to 86400"),
        ({"kv_transfer_timeout": 0.0}, "kv_transfer_timeout", "got 0.0", "above 0"),
        ({"kv_transfer_timeout": float("inf")}, "kv_transfer_timeout", "got inf", "up to 86400"),
        ({"kv_transfer_secret": None}, "kv_transfer_secret", "", SECRET_VARIABLE),
        ({"kv_transfer_secret": "seven77"}, "kv_transfer_secret", "", "at least 8 characters"),
        ({"kv_transfer_secret": "       zq9      "}, "kv_transfer_secret", "", "at least 8 characters"),
        ({"data_parallel_size": 2}, "data_parallel_size", "", "expected 1"),
    ],
)
def test_wrong_flags(
    flags: dict[str, Any], field: str, value: str, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Field, value (but never a secret's) and limit."""
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)
    with pytest.raises(FieldError) as caught:
        EngineConfig(**{**GOOD, **flags})
    message = str(caught.value)
    assert caught.value.field == field, f"{flags}: the error is about {caught.value.field}. {LOOK_CONFIG}"
    assert value in message and limit in message, (
        f"{flags}: expected {field}, {value or 'no value'} and {limit!r}, got {message!r}. {LOOK_CONFIG}"
    )
    secret = flags.get("kv_transfer_secret")
    assert not secret or secret.strip() not in message, f"the error shows the secret: {message!r}. {LOOK_CONFIG}"


def test_the_secret_may_be_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other users of the machine see the command line."""
    monkeypatch.setenv(SECRET_VARIABLE, OTHER)
    assert EngineConfig(**{**GOOD, "kv_transfer_secret": None}).kv_transfer_secret == OTHER, LOOK_CONFIG
    assert EngineConfig(**GOOD).kv_transfer_secret == SECRET, f"the flag comes first. {LOOK_CONFIG}"
    monkeypatch.setenv(SECRET_VARIABLE, "short")
    with pytest.raises(FieldError, match="kv_transfer_secret"):
        EngineConfig(**{**GOOD, "kv_transfer_secret": None})


def test_without_a_connector_no_secret_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)
    assert EngineConfig(device="cpu").kv_connector == "none", LOOK_CONFIG
    assert EngineConfig(device="cpu", data_parallel_size=2).data_parallel_size == 2, LOOK_CONFIG


def test_shared_memory_needs_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    EngineConfig(**{**GOOD, "kv_connector": "shm"})
    monkeypatch.delattr("os.memfd_create")
    with pytest.raises(FieldError, match="kv_connector: shm needs Linux"):
        EngineConfig(**{**GOOD, "kv_connector": "shm"})
