"""The pages / and /docs: how they are served, and what may use the server. See also test_pages_in_a_browser.py."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from common.openai_app import AppOptions
from common.openai_app.browsers import BrowserPolicy
from common.openai_app.pages import PAGES_DIR
from common.openai_app.schema import BODIES, EXAMPLES
from common.serve import ServerConfig
from tests.common.openai_fakes import GOOD, FakeEngine, Server, check_error, serving
from tests.http_checks import CHAT

PAGES = {"/": "chat.html", "/docs": "docs.html"}
every_page = pytest.mark.parametrize("path", PAGES)
LOOK = "Look at common/openai_app/pages.py."
LOOK_ORIGIN = "Look at common/openai_app/browsers.py::BrowserPolicy._is_own_page."


@every_page
def test_a_page_is_served_to_get_and_head(server: Server, path: str) -> None:
    answer, head = server.client.get(path), server.client.head(path)
    file = (PAGES_DIR / PAGES[path]).read_text(encoding="utf-8")
    assert (answer.status_code, answer.text) == (200, file), f"{path}: got {answer.status_code}. {LOOK}"
    assert answer.headers["content-type"] == "text/html; charset=utf-8", f"got {answer.headers}. {LOOK}"
    assert (head.status_code, head.content) == (200, b""), f"HEAD {path}: {head.status_code}, {head.content!r}. {LOOK}"
    for name in ("content-type", "content-length", "content-security-policy", "x-content-type-options"):
        assert head.headers[name] == answer.headers[name], f"HEAD {path}: {name} is {head.headers[name]}. {LOOK}"
    refused = server.client.post(path)
    assert refused.status_code == 405, f"POST {path}: got {refused.status_code}. {LOOK}"


@every_page
def test_the_policy_of_a_page_allows_its_own_code_and_nothing_else(server: Server, path: str) -> None:
    answer = server.client.get(path)
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    for directive, tag in (("script-src", "script"), ("style-src", "style")):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy.pop(directive) == f"'sha256-{digest}'", f"{directive}: expected the hash of <{tag}>. {LOOK}"
    assert policy == {
        "default-src": "'none'", "connect-src": "'self'", "img-src": "data:", "base-uri": "'none'",
        "form-action": "'none'", "frame-ancestors": "'none'", "require-trusted-types-for": "'script'",
    }, f"{path}: got {policy}. {LOOK}"  # fmt: skip
    assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("name", PAGES.values())
def test_a_page_is_complete_and_safe(name: str) -> None:
    html = (PAGES_DIR / name).read_text(encoding="utf-8")
    for pattern, why in (
        (r"(https?:)?//[\w.-]+\.\w", "it works without a network"),
        (r"@import|\burl\(|\bsrc=|<link (?!rel=\"icon\" href=\"data:,\")", "it is one file"),
        (r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", "text stays text"),
        (r"\bstyle=|\bon[a-z]+=\"", "its policy allows no code and no style in attributes"),
    ):
        code = re.sub(r"(?m)^\s*//.*$|/\*\*.*?\*/", "", html)
        assert not (found := re.search(pattern, code)), f"{name}: {why}, but it has {found[0]!r}"
    for needed in ("prefers-color-scheme: dark", 'name="viewport"', 'lang="en"', 'role="status"'):
        assert needed in html, f"{name} lacks {needed!r}"


@every_page
def test_a_page_needs_no_key(tiny_tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    with serving(FakeEngine(tiny_tokenizer), AppOptions(api_key="secret")) as server:
        for method in ("GET", "HEAD"):
            answer = server.client.request(method, path)
            assert answer.status_code == 200, f"{method} {path}: got {answer.status_code}. {LOOK}"
        check_error(server.client.get("/v1/models"), 401, None)


def test_the_pages_are_in_the_package() -> None:
    """An editable install finds them in the checkout, any other one because pyproject.toml names them."""
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r"(?m)^\[tool.setuptools.package-data\]\ncommon = \[\"(pages/[^\"]+)\"", project)
    assert found, "pyproject.toml doesn't name the pages"
    packed = {path.name for path in PAGES_DIR.parent.glob(found[1])}
    files = {path.name for path in PAGES_DIR.iterdir()}
    assert packed == files == {*PAGES.values(), "engine.html"}, f"packed: {packed}, in common/pages: {files}"


@pytest.mark.parametrize("path", BODIES)
def test_every_example_is_a_good_request(server: Server, path: str) -> None:
    example = {**EXAMPLES[path], **({"max_tokens": 2} if "max_tokens" in EXAMPLES[path] else {})}  # a short context
    example |= {"max_output_tokens": 2} if "max_output_tokens" in example else {}
    answer = server.post(path, example)
    assert answer.status_code == 200, f"the example of {path}: got {answer.text}"
    generates = "temperature" in BODIES[path]["properties"]
    assert EXAMPLES[path].get("temperature") == (0 if generates else None), f"{path}: {EXAMPLES[path]}"


# Which pages may use the server


def ask_from(server: Server, host: str, origin: str, key: str | None = None) -> int:
    """The status of a chat that a page of an origin asks for, under a name of the server."""
    headers = {"Host": host, "Origin": origin} | ({"Authorization": f"Bearer {key}"} if key else {})
    answer = server.client.post(CHAT, json=GOOD[CHAT], headers=headers)
    if answer.status_code == 403:
        check_error(answer, 403, None, "Origin", origin, "--allowed-origins", kind="permission_error")
    return answer.status_code


BY_ADDRESS = ["10.0.0.7:8000", "10.0.0.7", "[fd00::7]:8000", "127.0.0.1:8000", "localhost:8000", "[::1]"]
BY_NAME = ["gpu7.example:8000", "gpu7.example", "10.0.0.7.example", "localhost.example:8000", "gpu7"]


def options_of(host: str, api_key: str | None = None) -> AppOptions:
    return AppOptions.from_config(ServerConfig(host=host, api_key=api_key))


def test_the_page_of_a_local_server(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    with serving(FakeEngine(tiny_tokenizer), options_of("127.0.0.1")) as server:
        for host in ("127.0.0.1:8000", "localhost:8000", "[::1]:8000"):
            status = ask_from(server, host, f"http://{host}")
            assert status == 200, f"the page at http://{host}/: got {status}. {LOOK_ORIGIN}"


def test_the_page_of_a_server_for_other_machines(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """Under an address it is allowed. A name may have been pointed here: then its page looks the same."""
    with serving(FakeEngine(tiny_tokenizer), options_of("0.0.0.0")) as server:
        expected = {**dict.fromkeys(BY_ADDRESS, 200), **dict.fromkeys(BY_NAME, 403)}
        got = {host: ask_from(server, host, f"http://{host}") for host in expected}
        assert got == expected, f"pages of the server itself: expected {expected}, got {got}. {LOOK_ORIGIN}"
        for host, origin in (
            ("10.0.0.7:8000", "http://10.0.0.8:8000"),
            ("10.0.0.7:8000", "http://10.0.0.7:8001"),
            ("10.0.0.7:8000", "http://evil.example"),
            ("10.0.0.7:8000", "null"),
            ("10.0.0.7", "file://10.0.0.7"),
        ):
            status = ask_from(server, host, origin)
            assert status == 403, f"Origin {origin} to Host {host}: expected 403, got {status}. {LOOK_ORIGIN}"
        assert ask_from(server, "10.0.0.7", "https://10.0.0.7") == 200, f"behind a proxy with TLS. {LOOK_ORIGIN}"


def test_with_a_key_names_are_allowed_as_well(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """A page whose name was pointed here doesn't have the key."""
    with serving(FakeEngine(tiny_tokenizer), options_of("0.0.0.0", "secret")) as server:
        for host in (*BY_ADDRESS, *BY_NAME):
            got = [ask_from(server, host, f"http://{host}", key) for key in ("secret", "guess", None)]
            assert got == [200, 401, 401], f"http://{host} with the key, another one, none: got {got}. {LOOK_ORIGIN}"
        got_elsewhere = ask_from(server, "gpu7.example", "http://evil.example", "secret")
        assert got_elsewhere == 403, f"another origin: expected 403, got {got_elsewhere}. {LOOK_ORIGIN}"


def test_a_local_server_stays_closed_to_names(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    with serving(FakeEngine(tiny_tokenizer), options_of("127.0.0.1", "secret")) as server:
        for path in (*PAGES, "/openapi.json", "/v1/models"):
            answer = server.client.get(path, headers={"Host": "evil.example"})
            check_error(answer, 403, None, "Host", kind="permission_error")
    assert not BrowserPolicy().needs_key
