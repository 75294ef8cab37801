"""A real browser for tests: Chromium without a window, driven over pipes through the DevTools protocol.

Documentation of the protocol: https://chromedevtools.github.io/devtools-protocol/.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

DEADLINE_S = 60  # for what takes milliseconds; a busy machine is slow
NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe",
    # Any name leads to this machine. A page could do that with a name of its own: it is called DNS rebinding.
    "--host-resolver-rules=MAP *.example 127.0.0.1",
)  # fmt: skip
KEYS = {
    "Enter": (13, "\r"), "Escape": (27, ""), "Tab": (9, ""), " ": (32, " "), "ArrowLeft": (37, ""),
    "ArrowRight": (39, ""), "Home": (36, ""), "End": (35, ""), "a": (65, "a"),
}  # fmt: skip


def find_chromium() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


needs_chromium = pytest.mark.skipif(
    find_chromium() is None,
    reason=f"this needs a browser, one of {', '.join(NAMES)} (Debian: apt-get install chromium)",
)


class Browser:
    """The process and its pipes: the browser reads commands from descriptor 3, and writes answers and events to 4."""

    def __init__(self, executable: str, profile: Path) -> None:
        commands, self._commands = os.pipe()
        self._answers, answers = os.pipe()
        self._buffer, self._last_id = b"", 0
        self._tabs: list[str] = []
        self.events: list[dict[str, Any]] = []
        quiet = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
        pipes = [(os.POSIX_SPAWN_DUP2, commands, 3), (os.POSIX_SPAWN_DUP2, answers, 4)]
        argv = [executable, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self.pid = os.posix_spawn(executable, argv, os.environ, file_actions=[*quiet, *pipes], setpgroup=0)
        os.close(commands)
        os.close(answers)

    def send(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """The result of a command. Events that come in before it are kept."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": params}
        message |= {} if session is None else {"sessionId": session}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._last_id:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def open(self, url: str) -> Page:
        """A new tab. A context of its own would double what it costs; the course's pages store nothing."""
        self._tabs.append(self.send("Target.createTarget", url="about:blank")["targetId"])
        page = Page(self, self.send("Target.attachToTarget", targetId=self._tabs[-1], flatten=True)["sessionId"])
        page.go(url)
        return page

    def close_tabs(self) -> None:
        """Else their processes go on, and a page may draw or ask its server again and again."""
        while self._tabs:
            self.send("Target.closeTarget", targetId=self._tabs.pop())
        self.events.clear()

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._commands)
        os.close(self._answers)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], DEADLINE_S)
            data = os.read(self._answers, 1 << 20) if ready else b""
            assert data, "the browser has ended, or says nothing"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


class Page:
    """A tab. JavaScript goes in as text; clicks and keys are real ones, and go to what is there or has the focus."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser, self.session = browser, session
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.send(method, self.session, **params)

    def go(self, url: str) -> None:
        answer = self.send("Page.navigate", url=url)
        assert "errorText" not in answer, f"{url}: {answer}"
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'", f"{url} to load")

    def js(self, expression: str) -> Any:
        """The value of an expression, or of its promise."""
        answer = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, f"{expression}: {answer['exceptionDetails']}"
        return answer["result"].get("value")

    def until(self, expression: str, what: str) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + DEADLINE_S
        while not self.js(f"Boolean({expression})"):
            assert time.monotonic() < deadline, f"expected {what}; the page says {self.text('body')!r}"
            time.sleep(0.01)

    def text(self, selector: str) -> str:
        """What a reader sees of the last element that is selected; nothing if there is none."""
        return self.js(f"[...document.querySelectorAll({json.dumps(selector)})].at(-1)?.innerText.trim() ?? ''")

    def click(self, selector: str) -> None:
        box = self.js(
            f"(() => {{ const element = document.querySelector({json.dumps(selector)}); element.scrollIntoView();"
            "const box = element.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def type(self, text: str) -> None:
        self.send("Input.insertText", text=text)

    def press(self, key: str) -> None:
        code, text = KEYS[key]
        key_fields = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **key_fields)
        self.send("Input.dispatchKeyEvent", type="keyUp", **key_fields)

    def choose(self, selector: str, path: Path) -> None:
        """Choose a file in an <input type="file">."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def show_as(self, scheme: str = "light", width: int = 1280, height: int = 800) -> None:
        """scheme: light or dark, as the reader prefers; width and height in CSS pixels."""
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.send("Emulation.setDeviceMetricsOverride", **metrics)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))

    def controls(self) -> list[tuple[str, str]]:
        """Role and name of each control, as a screen reader has them."""
        roles = ("button", "link", "spinbutton", "textbox")
        nodes = self.send("Accessibility.getFullAXTree")["nodes"]
        found = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if "role" in node]
        return [control for control in found if control[0] in roles]

    def requests(self) -> list[str]:
        """The addresses of all requests so far."""
        return [event["params"]["request"]["url"] for event in self._events("Network.requestWillBeSent")]

    def problems(self) -> list[str]:
        """Uncaught errors, and what the browser refused: a violation of the Content-Security-Policy, say.

        Requests with an error status are not among them.
        """
        entries = [event["params"]["entry"] for event in self._events("Log.entryAdded")]
        refused = [entry["text"] for entry in entries if entry["level"] == "error" and entry["source"] != "network"]
        thrown = [str(event["params"]["exceptionDetails"]) for event in self._events("Runtime.exceptionThrown")]
        return refused + thrown

    def _events(self, method: str) -> list[dict[str, Any]]:
        self.js("0")  # reads what has come in
        return [e for e in self.browser.events if e.get("sessionId") == self.session and e.get("method") == method]


@contextlib.contextmanager
def running_chromium(profile: Path) -> Iterator[Browser]:
    """profile: an empty directory. Raises LookupError if there is no Chromium."""
    executable = find_chromium()
    if executable is None:
        raise LookupError("no Chromium here")
    browser = Browser(executable, profile)
    try:
        yield browser
    finally:
        browser.close()
