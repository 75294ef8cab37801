"""The pages / and /docs in a real browser, as a user has them: keys, clicks, and what is on the screen."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from transformers import PreTrainedTokenizerBase

from common.openai_app import AppOptions
from common.serve import ServerConfig
from common.serving import GenerationError, QueueFullError
from tests.chromium import Browser, Page, needs_chromium
from tests.common.openai_fakes import FakeEngine, FakeStream, Server, delta, serving
from tests.http_checks import until

LOOK = "Look at common/pages/chat.html."
LOOK_DOCS = "Look at common/pages/docs.html."
pytestmark = needs_chromium


@pytest.fixture
def local(engine: FakeEngine) -> Iterator[Server]:
    """As one that a user starts. Its answers are what a test puts into its streams."""
    engine.manual = True
    with serving(engine, AppOptions.from_config(ServerConfig())) as server:
        yield server


@pytest.fixture
def page(browser: Browser, local: Server) -> Iterator[Page]:
    """The chat page. At the end it must have asked nobody but its server, and broken no rule."""
    page = browser.open(local.url)
    page.until("document.querySelector('#model').textContent === 'tiny'", f"the model's name from /v1/models. {LOOK}")
    page.until("!document.querySelector('#docs').hidden", f"a link to /docs, as the server has it. {LOOK}")
    yield page
    check_good(page, local.url)


def check_good(page: Page, url: str) -> None:
    problems, elsewhere = page.problems(), [one for one in page.requests() if not one.startswith((f"{url}/", "data:"))]
    assert not problems, f"the browser complains: {problems}"
    assert not elsewhere, f"the page asks other servers: {elsewhere}"


def ask(page: Page, server: Server, question: str) -> FakeStream:
    """Type a question and send it. Returns the stream that has to answer it."""
    number = len(server.engine.streams) + 1
    page.click("#question")
    page.type(question)
    page.press("Enter")
    return server.until_streams(number)[-1]


def until_answer(page: Page, text: str) -> None:
    page.until(f"[...document.querySelectorAll('.answer .text')].at(-1)?.textContent === {text!r}", f"{text!r}. {LOOK}")


def until_ended(page: Page) -> None:
    page.until("!document.querySelector('[aria-busy]')", f"the answer to be complete. {LOOK}")


def stats_of(page: Page) -> list[str]:
    """Of the last answer."""
    return page.text(".answer .stats").split("\n")


def question_of(server: Server) -> str:
    """The prompt of the last request, as text."""
    return str(server.engine.tokenizer.decode(server.engine.streams[-1].prompt))


def test_an_answer_streams_in_with_its_numbers(page: Page, local: Server) -> None:
    stream = ask(page, local, "What is a cache?")
    assert page.text(".question .text") == "What is a cache?" and page.js(
        "document.querySelector('#question').value === ''"
    )
    params = stream.params
    assert (params.temperature, params.max_tokens) == (0, 32), f"the defaults, with a short context: {params}. {LOOK}"
    stream.put(delta("It <b>remembers</b>", [1]))
    until_answer(page, "It <b>remembers</b>")
    assert re.fullmatch(r"TTFT [\d.,]+ m?s", stats_of(page)[0]), f"the first token is there: {stats_of(page)}. {LOOK}"
    assert not page.js("document.querySelector('.answer b')"), f"an answer is text, not HTML. {LOOK}"
    stream.put(delta(" keys and", [2, 3]))
    until_answer(page, "It <b>remembers</b> keys and")
    assert page.js("document.querySelector('#stop').hidden") is False, f"it still streams. {LOOK}"
    stream.put(delta(" values.", [4], "stop"))
    until_ended(page)
    ttft, speed, *rest = stats_of(page)
    assert re.fullmatch(r"TTFT [\d.,]+ m?s", ttft), f"got {ttft!r}. {LOOK}"
    assert re.fullmatch(r"[\d.,]+ output tokens/s", speed), f"got {speed!r}. {LOOK}"
    assert rest == ["4 output tokens", "finish reason: stop"], f"got {rest}. {LOOK}"
    said = page.js("document.querySelector('#status').textContent")
    assert said.startswith("It <b>remembers</b> keys and values., TTFT"), f"a screen reader gets {said!r}. {LOOK}"


def test_stop_keeps_what_has_come_and_the_chat_goes_on(page: Page, local: Server) -> None:
    stream = ask(page, local, "Tell me a long story.")
    stream.put(*(delta(f" part {number}", [number]) for number in range(5)))
    until_answer(page, " part 0 part 1 part 2 part 3 part 4")
    page.click("#stop")
    until_ended(page)
    until(lambda: stream.num_aborts == 1, f"the server to abort the request. {LOOK}")
    assert stats_of(page)[-2:] == ["5 output tokens", "stopped by you"], f"got {stats_of(page)}. {LOOK}"
    assert page.js("document.querySelector('#send').hidden") is False, f"the next question can be sent. {LOOK}"
    stream = ask(page, local, "And then?")
    prompt = question_of(local)
    for words in ("Tell me a long story.", "part 0 part 1 part 2 part 3 part 4", "And then?"):
        assert words in prompt, f"the conversation goes on: {words!r} is missing in {prompt!r}. {LOOK}"
    stream.put(delta("Then", [1]))
    until_answer(page, "Then")
    page.press("Escape")
    until_ended(page)
    assert stream.num_aborts == 1 or until(lambda: stream.num_aborts, "Escape to stop as well") is None


def test_a_new_chat_forgets_the_old_one(page: Page, local: Server) -> None:
    stream = ask(page, local, "My name is Ada.")
    stream.put(delta("Hello", [1]))
    until_answer(page, "Hello")
    page.click("#new")  # while it streams
    until(lambda: stream.num_aborts == 1, f"the old answer to be aborted. {LOOK}")
    page.until("!document.querySelector('#send').hidden", f"the old answer to end. {LOOK}")
    assert page.text("#messages") == "" and page.text("#intro"), f"an empty chat, got {page.text('main')!r}. {LOOK}"
    page.click("#examples button")
    local.until_streams(2)[-1].put(delta("Hi", [1], "length"))
    until_answer(page, "Hi")
    assert "Ada" not in question_of(local) and "KV cache" in question_of(local), f"got {question_of(local)}. {LOOK}"


def test_settings_are_sent_and_errors_are_shown_in_the_server_s_words(page: Page, local: Server) -> None:
    for selector, value in (("#temperature", "0.5"), ("#max-tokens", "7")):
        page.click(selector)
        page.js(f"document.querySelector('{selector}').select()")
        page.type(value)
    stream = ask(page, local, "One")
    assert (stream.params.temperature, stream.params.max_tokens) == (0.5, 7), f"got {stream.params}. {LOOK}"
    stream.put(delta("half an", [1]), GenerationError("the cat sat on it"))
    page.until("document.querySelector('.answer .error')", "an error")
    assert page.text(".answer .error") == "the cat sat on it", f"got {page.text('.answer')!r}. {LOOK}"
    page.js("document.querySelector('#question').value = ''")  # the page has put the question back

    local.engine.refusal = QueueFullError("64 requests are waiting")
    page.click("#question")
    page.type("Two")
    page.press("Enter")
    page.until("document.querySelectorAll('.answer .error').length === 2", f"another error. {LOOK}")
    assert page.text(".answer .error") == "64 requests are waiting", f"got {page.text('.answer')!r}. {LOOK}"
    assert page.js("document.querySelector('#question').value") == "Two", f"the question can be sent again. {LOOK}"
    local.engine.refusal = None

    page.click("#temperature")
    page.js("document.querySelector('#temperature').select()")
    page.type("3")
    page.click("#send")
    page.until("document.querySelectorAll('.answer .error').length === 3", f"an error about a value. {LOOK}")
    error = page.text(".answer .error")
    assert error.startswith("temperature: expected") and "3" in error, f"got {error!r}. {LOOK}"


def test_the_field_for_the_key_appears_if_it_is_needed(
    tiny_tokenizer: PreTrainedTokenizerBase, browser: Browser
) -> None:
    with serving(FakeEngine(tiny_tokenizer), AppOptions.from_config(ServerConfig(api_key="secret"))) as server:
        page = browser.open(server.url)
        page.until("!document.querySelector('#key-form').hidden", f"the field. {LOOK}")
        wanted = server.client.get("/v1/models").json()["error"]["message"]
        assert page.text("#notice") == wanted, f"the server's words {wanted!r}, got {page.text('#notice')!r}. {LOOK}"
        assert page.js("document.activeElement.id") == "key", f"the field has focus. {LOOK}"
        page.type("guess")
        page.press("Enter")
        page.until("document.querySelector('#model').textContent === 'Chat'", "no model")
        page.js("document.querySelector('#key').select()")
        page.type("secret")
        page.press("Enter")
        page.until("document.querySelector('#model').textContent === 'tiny'", f"the model. {LOOK}")
        assert page.js("document.querySelector('#key-form').hidden && document.querySelector('#notice').hidden")
        page.type("Hi")
        page.press("Enter")
        page.until("document.querySelector('.answer .stats')", f"an answer. {LOOK}")
        until_ended(page)
        assert "finish reason: length" in stats_of(page), f"got {page.text('main')!r}. {LOOK}"
        stored = page.js("localStorage.length + sessionStorage.length + document.cookie.length")
        assert stored == 0, f"the key is stored nowhere. {LOOK}"
        check_good(page, server.url)


def test_a_page_without_a_key_field(page: Page) -> None:
    assert page.js("document.querySelector('#key-form').hidden"), f"nobody asked for a key. {LOOK}"


@pytest.mark.parametrize(
    ("name", "api_key", "expected"),
    [
        ("127.0.0.1", None, "allowed"),
        ("localhost", None, "allowed"),
        ("gpu7.example", None, "refused"),
        ("gpu7.example", "secret", "allowed"),
    ],
)
def test_a_server_for_other_machines(
    tiny_tokenizer: PreTrainedTokenizerBase, browser: Browser, name: str, api_key: str | None, expected: str
) -> None:
    """gpu7.example leads to this machine: see chromium.py. The browser sends the Origin and the Host that it would."""
    options = AppOptions.from_config(ServerConfig(host="0.0.0.0", api_key=api_key))
    with serving(FakeEngine(tiny_tokenizer), options) as server:
        url = server.url.replace("127.0.0.1", name)
        page = browser.open(url)
        if api_key is not None:
            page.until("!document.querySelector('#key-form').hidden", f"the field for the key. {LOOK}")
            page.type(api_key)
            page.press("Enter")
        page.until("document.querySelector('#model').textContent === 'tiny'", f"the page at {url}. {LOOK}")
        page.click("#question")
        page.type("Hi")
        page.press("Enter")
        page.until("document.querySelector('.answer .error, .answer .stats')", "an answer or an error")
        until_ended(page)
        error = page.text(".answer .error")
        assert bool(error) == (expected == "refused"), f"{url}: expected to be {expected}, got {error!r}. {LOOK}"
        assert not error or (url in error and "--allowed-origins" in error), f"{url}: got {error!r}. {LOOK}"


@pytest.mark.parametrize("path", ["/", "/docs"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_its_window_in_light_and_dark(page: Page, local: Server, path: str, width: int) -> None:
    page.go(local.url + path)
    page.until("document.querySelectorAll('button, section').length > 3", f"{path} to be filled")
    backgrounds = []
    for scheme in ("light", "dark"):
        page.show_as(scheme, width)
        overflow = page.js("document.documentElement.scrollWidth - innerWidth")
        assert overflow <= 0, f"{path} is {overflow} pixels too wide for a window of {width}"
        backgrounds.append(page.js("getComputedStyle(document.body).backgroundColor"))
    assert len(set(backgrounds)) == 2, f"{path}: light and dark have the background {backgrounds}"


def test_a_long_name_of_a_model_fits_a_phone(page: Page, local: Server) -> None:
    local.engine.model_name = "meta-llama/Llama-3.1-8B-Instruct-of-the-second-kind"
    page.show_as(width=390)
    page.go(local.url)
    page.until(f"document.querySelector('h1').textContent === {local.engine.model_name!r}", f"the name. {LOOK}")
    width = page.js("document.documentElement.scrollWidth")
    assert width == 390, f"the page is {width} pixels wide in a window of 390. {LOOK}"


def test_every_control_has_a_name(page: Page) -> None:
    page.js("for (const hidden of document.querySelectorAll('[hidden]')) hidden.hidden = false")
    controls = page.controls()
    names = {name for _, name in controls}
    assert {"Your question", "Temperature", "Max tokens", "Send", "Stop", "New chat", "API key"} <= names, (
        f"got {controls}. {LOOK}"
    )
    assert all(name for _, name in controls), f"a screen reader needs a name for each, got {controls}. {LOOK}"


def test_the_keyboard_reaches_every_control(page: Page) -> None:
    page.click("#question")
    reached = set()
    for _ in range(12):
        page.press("Tab")
        reached.add(page.js("document.activeElement.id || document.activeElement.textContent.trim()"))
    assert {"question", "temperature", "max-tokens", "send", "docs", "new", "log", "What is a KV cache?"} <= reached, (
        f"the Tab key reached {reached}. {LOOK}"
    )


def test_the_page_of_the_api(page: Page, local: Server) -> None:
    page.click("#docs")
    page.until("document.querySelectorAll('section').length > 5", f"/docs to be filled. {LOOK_DOCS}")
    described = local.client.get("/openapi.json").json()["paths"]
    assert sorted(page.text("nav").split("\n")[1::2]) == sorted(described), f"got {page.text('nav')!r}. {LOOK_DOCS}"
    rows = page.js(
        "[...document.querySelectorAll('#post-v1-chat-completions tbody')].map((body) => "
        "[...body.rows].map((row) => [...row.cells].map((cell) => cell.innerText.trim())))"
    )
    fields = {row[0][0].split("\n")[0]: [row[0][1:], *row[1:]] for row in rows}
    expected = {
        "temperature": [["number", "0 to 2", "yes"]],
        "messagesrequired": [["array of objects", "1 or more items", "no"]],
        "messages[].content[].textrequired": [["string", "–", "no"]],
        "seed": [["integer", "64 bits, signed", "yes"]],
        "stop": [
            ["string", "1 to 1,000 characters", "yes"],
            ["or array of strings", "up to 16 items, each with 1 to 1,000 characters"],
        ],
        "stream": [["boolean", "–", "yes"]],
        "top_p": [["number", "above 0, up to 1", "yes"]],
    }
    for name, row in expected.items():
        assert fields.get(name) == row, f"{name}: expected {row}, got {fields.get(name)} of {list(fields)}. {LOOK_DOCS}"
    commands = page.js("[...document.querySelectorAll('section pre')].map((command) => command.innerText)")
    generating = [command for command in commands if '"temperature": 0' in command]
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses"):
        found = [command for command in generating if f"{local.url}{path} " in command]
        assert len(found) == 1, f"expected an example of {path}, got {commands}. {LOOK_DOCS}"
    check_good(page, local.url)
