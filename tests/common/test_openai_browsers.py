"""What web pages may do with the server: pages of this machine, pages of allowed origins, and all others."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest
from transformers import PreTrainedTokenizerBase

from common.openai_app import AppOptions
from common.openai_app.browsers import BrowserPolicy
from common.serve import ServerConfig, is_loopback, show_url
from tests.common.openai_fakes import GOOD, FakeEngine, Server, check_error, serving
from tests.http_checks import CHAT, COMPLETIONS, both_endpoints

ALLOWED = "https://chat.example"
LOCAL = ["http://localhost:3000", "http://127.0.0.1", "https://localhost", "http://[::1]:8080"]
FOREIGN = ["http://evil.example", "null", "http://localhost.evil.example", "http://127.0.0.1.evil.example", "file://"]
LOOK = "Look at common/openai_app/browsers.py."


@pytest.fixture(scope="module")
def server(tiny_tokenizer: PreTrainedTokenizerBase) -> Iterator[Server]:
    """As one that listens on 127.0.0.1 with --allowed-origins."""
    options = AppOptions.from_config(ServerConfig(allowed_origins=f" {ALLOWED} ,"))
    with serving(FakeEngine(tiny_tokenizer), options) as server:
        yield server


def preflight(server: Server, origin: str) -> httpx.Response:
    """What a browser asks before it sends JSON to another origin."""
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    headers["Access-Control-Request-Headers"] = "authorization,content-type"
    return server.client.options(CHAT, headers=headers)


@pytest.mark.parametrize("origin", [*LOCAL, ALLOWED])
def test_an_allowed_page(server: Server, origin: str) -> None:
    asked = preflight(server, origin)
    assert asked.status_code == 200 and asked.headers.get("access-control-allow-origin") == origin, (
        f"the preflight of {origin}: got {asked.status_code}, {asked.headers}. {LOOK}"
    )
    headers = {name.strip() for name in asked.headers["access-control-allow-headers"].lower().split(",")}
    assert {"authorization", "content-type"} <= headers, f"{origin}: only the headers {headers} are allowed. {LOOK}"
    answer = server.client.post(CHAT, json=GOOD[CHAT], headers={"Origin": origin})
    assert answer.status_code == 200 and answer.headers.get("access-control-allow-origin") == origin, (
        f"{origin}: got {answer.status_code}, {answer.headers}. {LOOK}"
    )


@pytest.mark.parametrize("origin", FOREIGN)
def test_a_foreign_page(server: Server, origin: str) -> None:
    asked = preflight(server, origin)
    assert "access-control-allow-origin" not in asked.headers, f"{origin} is allowed: {asked.headers}. {LOOK}"
    for content_type in ("application/json", "text/plain"):
        headers = {"Origin": origin, "Content-Type": content_type}
        answer = server.client.post(CHAT, content=json.dumps(GOOD[CHAT]), headers=headers)
        check_error(answer, 403, None, "Origin", origin, kind="permission_error")
    assert not server.engine.streams or all(stream.ended for stream in server.engine.streams)
    seen = server.client.get("/v1/models", headers={"Origin": origin})
    assert "access-control-allow-origin" not in seen.headers, f"{origin} may read: {seen.headers}. {LOOK}"


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example:80", "10.0.0.1", "127.0.0.1.evil.example"])
def test_a_name_that_was_pointed_at_this_machine(server: Server, host: str) -> None:
    """DNS rebinding: to the browser such a page has the server's own origin, and it adds no Origin to a GET."""
    for method, path in (("GET", "/v1/models"), ("POST", CHAT), ("GET", "/metrics"), ("GET", "/health")):
        answer = server.client.request(method, path, headers={"Host": host}, json=GOOD[CHAT])
        check_error(answer, 403, None, "Host", host, kind="permission_error")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1234", "127.0.0.1:80", "127.1.2.3", "[::1]:8000", "[::1]"])
def test_local_names(server: Server, host: str) -> None:
    answer = server.client.get("/v1/models", headers={"Host": host})
    assert answer.status_code == 200, f"Host: {host}: got {answer.text}. {LOOK}"


@both_endpoints
@pytest.mark.parametrize(
    "content_type", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
)
def test_only_json_is_read(server: Server, path: str, content_type: str | None) -> None:
    """A page may send the other types without a preflight."""
    headers = {} if content_type is None else {"Content-Type": content_type}
    answer = server.client.post(path, content=json.dumps(GOOD[path]).encode(), headers=headers)
    check_error(answer, 415, "Content-Type", "expected application/json", content_type or "got none")
    good = server.client.post(path, content=json.dumps(GOOD[path]), headers={"Content-Type": "Application/JSON; x=y"})
    assert good.status_code == 200, good.text


def test_all_origins_may_be_allowed(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    options = AppOptions.from_config(ServerConfig(host="0.0.0.0", allowed_origins="*"))
    with serving(FakeEngine(tiny_tokenizer), options) as server:
        for origin in (*LOCAL, *FOREIGN):
            assert preflight(server, origin).headers.get("access-control-allow-origin") == "*", f"{origin}. {LOOK}"
            answer = server.client.post(COMPLETIONS, json=GOOD[COMPLETIONS], headers={"Origin": origin, "Host": "any"})
            assert answer.status_code == 200, f"{origin}: {answer.text}. {LOOK}"


def test_a_server_for_other_machines(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """It has names of its own, which it does not know; without --allowed-origins no page may use it."""
    with serving(FakeEngine(tiny_tokenizer), AppOptions.from_config(ServerConfig(host="0.0.0.0"))) as server:
        assert server.client.get("/v1/models", headers={"Host": "gpu7.example"}).status_code == 200
        for origin in (*LOCAL, *FOREIGN):
            answer = server.client.post(CHAT, json=GOOD[CHAT], headers={"Origin": origin})
            check_error(answer, 403, None, "Origin", kind="permission_error")


def test_which_addresses_are_loopback() -> None:
    hosts = ("localhost", "127.0.0.1", "127.5.5.5", "::1", "0.0.0.0", "::", "10.0.0.1", "example.org")
    assert [is_loopback(host) for host in hosts] == [True] * 4 + [False] * 4
    assert BrowserPolicy() == AppOptions().browsers, "an app without options checks no Host"
    assert [show_url(host, 80) for host in ("127.0.0.1", "::1")] == ["http://127.0.0.1:80", "http://[::1]:80"]
