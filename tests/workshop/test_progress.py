"""What `progress` says, and what a learner's machine tells a board."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import httpx
import pytest
from fastapi import FastAPI

from common.serve import running_app
from workshop import board as boards
from workshop.__main__ import main
from workshop.board import CODE_LETTERS, LETTERS, MAX_BODY, MAX_LEARNERS, Board, create_app
from workshop.course import Part
from workshop.progress import CODE_HEADER, MAX_NAME, membership_path

Solve = Callable[..., None]
Call = Callable[[str], tuple[int, str, str]]
CODE = "KXQTRM"


@pytest.fixture
def call(part: Part, capsys: pytest.CaptureFixture[str]) -> Call:
    def call(line: str) -> tuple[int, str, str]:
        status = main(line.split(), part.root)
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def board() -> Board:
    return Board(CODE)


@pytest.fixture
def url(board: Board) -> Iterator[str]:
    with running_app(create_app(board, "http://192.0.2.1:8080")) as url:
        yield url


def statuses(board: Board) -> dict[str, str]:
    """Of the only learner's exercises."""
    [learner] = board.shown()
    return {each["name"]: each["status"] for part in learner["parts"] for each in part["exercises"]}


def test_progress_in_a_few_lines(call: Call, solve: Solve) -> None:
    assert "No part is started yet: .venv/bin/workshop start 1" in call("progress")[1]
    call("start 1")
    call("hint 1 total")
    solve(add="return a + b")
    call("check 1 add")
    status, out, _ = call("progress")
    assert status == 0 and "part 1  add ✓  total –  1 of 2 solved" in out, out
    assert "1 of 2 exercises solved, 1 hint;" in out, out
    call("catch-up 1 total")
    assert "total ↷" in call("progress")[1] and "1 filled in by catch-up" in call("progress")[1]


def test_a_board_follows_a_learner(call: Call, solve: Solve, board: Board, url: str, part: Part) -> None:
    call("start 1")
    status, out, err = call(f"join {url} {CODE.lower()} Ada")
    assert status == 0 and "'Ada'" in out and not err, f"small letters will do: {out}{err}"
    assert statuses(board) == {"add": "open", "total": "open"}
    solve(add="return a - b")
    call("check 1 add")
    assert statuses(board)["add"] == "fails"
    solve(add="return a + b")
    call("check 1 add")
    call("hint 1 total")
    assert statuses(board) == {"add": "solved", "total": "open"}
    assert board.shown()[0]["parts"][0]["exercises"][1]["num_hints"] == 1
    call("catch-up 1 total")
    assert statuses(board)["total"] == "filled in"
    assert len(board.learners) == 1, "one learner, however often it reports"
    (part.copy / "engine.py").write_text("# no markers")
    call("progress")
    assert statuses(board)["total"] == "started", f"a broken copy is still reported: {statuses(board)}"
    assert call("leave")[0] == 0
    call("start 1 --force")
    assert statuses(board)["total"] == "started", f"after leaving, it was told: {statuses(board)}"
    assert "had not joined" in call("leave")[1]


def test_a_learner_who_joins_again_keeps_the_row(call: Call, board: Board, url: str) -> None:
    for name in ("Ada", "A.L.", "Ada"):
        assert call(f"join {url} {CODE} {name}")[0] == 0
        assert [each["name"] for each in board.shown()] == [name], board.shown()
    assert call("leave")[0] == 0 and call(f"join {url} {CODE} Grace")[0] == 0
    assert [each["name"] for each in board.shown()] == ["Grace"], board.shown()


def test_nothing_is_told_before_a_learner_joins(call: Call, solve: Solve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(httpx, "post", lambda *args, **kwargs: pytest.fail("it told somebody"))
    call("start 1")
    solve(add="return a + b")
    call("check 1 add")
    call("progress")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((CODE[::-1], "Ada"), "the room code is wrong"),
        ((CODE, "A" * (MAX_NAME + 1)), f"expected 1 to {MAX_NAME} characters"),
        ((CODE, "A\x1bB"), "expected 1 to"),
        ((CODE, " "), "expected 1 to"),
        (("Ä", "Ada"), "the room code: expected letters"),
        (("A\nB", "Ada"), "the room code: expected letters"),
        (("", "Ada"), "the room code: expected letters"),
    ],
)
def test_what_a_board_does_not_take_is_not_saved(
    given: tuple[str, str], message: str, url: str, part: Part, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(["join", url, *given], part.root)
    assert status == 2 and message in capsys.readouterr().err
    assert not membership_path(part.root).exists(), "a learner who could not join is no member"


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ftp://127.0.0.1", "http://127.0.0.1:1", "http://[", "http://x y"])
def test_no_board_at_this_address(address: str, part: Part, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["join", address, CODE, "Ada"], part.root) == 2
    err = capsys.readouterr().err
    assert address in err and err.count("\n") == 1, f"expected one line with the address, got {err!r}"


def test_a_server_that_is_no_board(part: Part, capsys: pytest.CaptureFixture[str]) -> None:
    with running_app(FastAPI()) as url:
        assert main(["join", url, CODE, "Ada"], part.root) == 2
    err = capsys.readouterr().err
    assert "status 404; is it a board?" in err and err.count("\n") == 1, err


@pytest.mark.parametrize("port", ["-1", "65536", "99999"])
def test_a_port_that_cannot_be(port: str, call: Call) -> None:
    """The system would take it modulo 65536."""
    status, _, err = call(f"board --port {port}")
    assert status == 2 and err == f"workshop: --port: expected 0 to 65535, got {port}\n", err


def test_a_board_that_has_ended_holds_nobody_up(call: Call, solve: Solve, board: Board, url: str, part: Part) -> None:
    call("start 1")
    call(f"join {url} {CODE} Ada")
    path = membership_path(part.root)
    path.write_text(json.dumps({**json.loads(path.read_text()), "url": "http://127.0.0.1:1"}))
    solve(add="return a + b")
    status, out, err = call("check 1 add")
    assert status == 0 and "passes" in out, f"the check counts, not the board: {out}"
    assert "does not answer" in err and "workshop leave" in err and err.count("\n") == 1, err
    path.write_text("{")
    status, _, err = call("progress")
    assert status == 0 and "damaged" in err, err


# The board


def report(**changes: object) -> bytes:
    exercise = {"name": "add", "status": "solved", "num_hints": 0}
    given = {"learner": "0" * 32, "name": "Ada", "parts": [{"number": 1, "exercises": [exercise]}]}
    return json.dumps({**given, **changes}).encode()


def post(url: str, content: bytes, code: str = CODE) -> httpx.Response:
    """Without certificates, which httpx would read anew for each of a hundred learners."""
    headers = {CODE_HEADER: code}
    return httpx.post(f"{url}/progress", content=content, headers=headers, trust_env=False, verify=False)


def test_the_board_shows_no_secrets(url: str, board: Board) -> None:
    assert post(url, report()).status_code == 204
    shown = httpx.get(f"{url}/learners").text
    assert "Ada" in shown and "0" * 32 not in shown, f"who knows it could report for the learner: {shown}"
    assert f"workshop join http://192.0.2.1:8080 {CODE}" in shown


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"\xff", report(name=""), report(name="A" * 41), report(learner="0"), report(learner="g" * 32),
        report(parts=[{"number": 0, "exercises": []}]), report(parts=[{"number": 1, "exercises": []}] * 101),
        report(parts=[{"number": 1, "exercises": [{"name": "a", "status": "won", "num_hints": 0}]}]),
    ],
)  # fmt: skip
def test_what_is_no_report(content: bytes, url: str, board: Board) -> None:
    got = post(url, content)
    assert got.status_code == 400 and got.text.startswith("not a report") and not board.learners, got.text


def test_limits_of_the_board(url: str, board: Board) -> None:
    assert post(url, b" " * (MAX_BODY + 1)).status_code == 413
    for number in range(MAX_LEARNERS):
        assert post(url, report(learner=f"{number:032x}")).status_code == 204
    got = post(url, report(learner="f" * 32))
    assert got.status_code == 409 and str(MAX_LEARNERS) in got.text and len(board.learners) == MAX_LEARNERS
    assert post(url, report(name="Eve")).status_code == 204, "who is there may still report"


def test_without_the_code_nothing_is_taken(url: str, board: Board) -> None:
    for code in ("", "AAAAAA", CODE.lower(), CODE + "X"):
        assert post(url, report(), code).status_code == 403 and not board.learners, f"code {code!r}"


@pytest.mark.parametrize("path", ["/", "/learners"])
def test_only_the_teachers_machine_sees_the_board(path: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code is on it. A page that has a name for this machine is another one's."""
    assert httpx.get(f"{url}{path}").status_code == 200
    assert httpx.get(f"{url}{path}", headers={"host": "board.example"}).status_code == 403
    monkeypatch.setattr(boards, "is_loopback", lambda host: False)
    got = httpx.get(f"{url}{path}")
    assert got.status_code == 403 and "teacher's machine" in got.text


def test_a_board_is_for_this_machine_unless_it_is_for_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    served = []
    monkeypatch.setattr(boards, "serve_app", lambda app, listener, message: served.append((listener, message)))
    for is_for_room in (False, True):
        boards.main(0, is_for_room=is_for_room)
    (own, message), (all_, _) = served
    with own, all_:
        assert own.getsockname()[0] == "127.0.0.1" and all_.getsockname()[0] == "0.0.0.0"
    words = message.split()
    code = words[words.index("join") + 2]
    assert len(code) == CODE_LETTERS and set(code) <= set(LETTERS), message
