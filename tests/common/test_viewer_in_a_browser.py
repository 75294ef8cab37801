"""The engine viewer in a real browser: traces of all parts, stepping, selecting, two side by side, a live engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from fastapi import FastAPI

from common.openai_app.errors import add_error_handlers
from common.openai_app.viewer import Viewer
from common.serve import running_app
from common.trace import LIVE_NAME, StepTrace, TraceWriter, files, read_trace
from tests.chromium import Browser, Page, needs_chromium
from tests.common.long_traces import write_long_trace
from tests.http_checks import until

LOOK = "Look at common/pages/engine.html."
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "common" / "pages" / "engine.html").as_uri()
SAMPLES = sorted((ROOT / "results" / "traces").glob("*.jsonl"))
COPYING = ("part12", "part13", "part15")  # a block is in use while it is copied, after its request has ended
SYNCHRONOUS = ("part03", "part04")  # no step is launched before the one before it has ended
pytestmark = needs_chromium


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    page = browser.open(PAGE)
    yield page
    assert not page.problems(), f"the browser complains: {page.problems()}"
    elsewhere = [one for one in page.requests() if not one.startswith(("file:", "data:"))]
    assert not elsewhere, f"the page asks {elsewhere}, and should ask nobody"


def open_trace(page: Page, path: Path, place: int = 0) -> None:
    page.choose("#first-file" if place == 0 else "#second-file", path)
    page.until(f"viewer.views[{place}]?.replay.name === {json.dumps(path.name)} || !$('error').hidden", f"{path.name}")


def names(parts: list[Path]) -> list[str]:
    return [path.stem for path in parts]


@pytest.mark.parametrize("path", SAMPLES, ids=names(SAMPLES))
def test_each_parts_sample_trace(path: Path, page: Page) -> None:
    """It loads, and in each step the blocks, the slots and the tokens are those of the trace."""
    open_trace(page, path)
    steps = read_trace(path).steps
    assert page.text("#error") == "", page.text("#error")
    found = page.js(
        """(() => {
          const {replay} = viewer.views[0], found = [];
          for (let index = 0; index < replay.steps.length; index++) {
            const state = replay.stateAt(index), blocks = new Set();
            for (const [id, table] of state.tables) {
              if (!state.ended.includes(id)) table.blocks.forEach(each => blocks.add(each));
            }
            const slots = replay.steps[index].requests.map(each => each.slot);
            const ids = [...state.waiting, ...replay.steps[index].requests.map(each => each.id)];
            found.push([blocks.size, state.waiting.length, new Set(slots).size, ids.length - new Set(ids).size]);
          }
          return found;
        })()"""
    )
    assert len(found) == len(steps), f"{len(found)} steps of {len(steps)}"
    for (num_blocks, num_waiting, num_slots, num_twice), step in zip(found, steps, strict=True):
        where = f"{path.name}, step {step.step}"
        assert num_twice == 0, f"{where}: a request is listed twice. {LOOK}"
        assert num_slots == len(step.requests), f"{where}: {num_slots} slots for {len(step.requests)} requests. {LOOK}"
        assert num_waiting == step.num_waiting, f"{where}: {num_waiting} wait, not {step.num_waiting}. {LOOK}"
        if path.stem.startswith(SYNCHRONOUS):
            assert num_blocks == step.num_blocks_used, (
                f"{where}: {num_blocks} blocks, not {step.num_blocks_used}. {LOOK}"
            )
    assert found[-1][0] == 0, f"{path.name}: at the end, requests have {found[-1][0]} blocks. {LOOK}"
    if not path.stem.startswith(COPYING):
        assert steps[-1].num_blocks_used == 0, f"{path.name}: {steps[-1].num_blocks_used} blocks are still in use"
    tokens: dict[str, list[int]] = {}
    for step in steps:
        for request in step.requests:
            tokens.setdefault(request.id, []).extend(request.token_ids)
    lives = page.js("Object.fromEntries([...viewer.views[0].replay.lives].map(([id, life]) => [id, life.tokens]))")
    assert lives == tokens, f"{path.name}: the viewer's tokens differ from the trace's. {LOOK}"


def test_stepping_with_buttons_and_keys(page: Page) -> None:
    open_trace(page, SAMPLES[1])
    last = page.js("viewer.views[0].replay.steps.length")
    assert page.text("#where").startswith(f"step 1 of {last}")
    for selector, expected in (("#next", 2), ("#next", 3), ("#back", 2), ("#end", last), ("#start", 1)):
        page.click(selector)
        assert page.text("#where").startswith(f"step {expected} of"), f"{selector}: {page.text('#where')}. {LOOK}"
    page.js("document.activeElement.blur()")
    page.js("$('first-file').focus()")
    open_trace(page, SAMPLES[2])  # the keys are for the replay, not for the field in which it was chosen
    last = page.js("viewer.views[0].replay.steps.length")
    for key, expected in (("ArrowRight", 2), ("End", last), ("ArrowLeft", last - 1), ("Home", 1)):
        page.press(key)
        assert page.text("#where").startswith(f"step {expected} of"), f"{key}: {page.text('#where')}. {LOOK}"
    page.js("$('speed').value = '120'")
    page.press(" ")
    page.until("viewer.place > 3", "the replay to go on after the space bar")
    page.press(" ")
    assert not page.js("viewer.isPlaying"), f"the second space bar pauses. {LOOK}"


def test_backwards_is_the_same_as_forwards(page: Page) -> None:
    """The state is computed from snapshots, whichever step was shown before."""
    open_trace(page, SAMPLES[-1])
    shown = """[...Array(viewer.views[0].replay.steps.length).keys()].%s.map(index => {
        const state = viewer.views[0].replay.stateAt(index);
        return JSON.stringify([[...state.tables], state.waiting, [...state.cached].sort()]);
    })"""
    forwards, backwards = page.js(shown % "slice()"), page.js(shown % "reverse()")
    assert forwards == backwards[::-1], LOOK


def test_a_selected_request_shows_its_life(page: Page) -> None:
    path = next(path for path in SAMPLES if path.stem == "part07_prefix_caching")
    open_trace(page, path)
    page.press("End")
    page.press("ArrowLeft")
    page.click(".requests button")
    life = page.text(".life")
    assert "Block table:" in life and "Answer, token by token" in life and "prefill" in life, f"{life}. {LOOK}"
    assert page.js("document.querySelector('.requests button').getAttribute('aria-pressed')") == "true"
    page.click(".requests button")
    assert page.js("document.querySelector('.life').hidden"), f"a second click ends the selection. {LOOK}"


@pytest.mark.parametrize(
    ("name", "kinds"),
    [("part12_cpu_offloading", {"save", "load"}), ("part13_decode", {"fetch"}), ("part15_full_architecture", {"save"})],
)
def test_transfers_have_lanes_of_their_own(name: str, kinds: set[str], page: Page) -> None:
    """Each copy of KV can be found in the picture of the times, in the lane of its kind, and in its request's life."""
    path = next(path for path in SAMPLES if path.stem == name)
    open_trace(page, path)
    lanes = {"save": "to host memory", "load": "from host memory", "fetch": "from another engine"}
    transfers = [(index, each) for index, step in enumerate(read_trace(path).steps) for each in step.transfers]
    assert {each.kind for _, each in transfers} >= kinds, f"{name} shows no {kinds}: record it again"
    for index, each in transfers:
        page.js(f"show({index})")
        expected = f"KV of {each.num_tokens} tokens {lanes[each.kind]}" + (f" for {each.id}" if each.id else "")
        shown = page.js("viewer.views[0].slices.map(each => each.name)")
        left = page.js("Math.min(...viewer.views[0].slices.map(each => each.x))")
        assert left >= 66, f"step {index + 1}: something is drawn over the lanes' names, at {left}. {LOOK}"
        assert expected in shown, f"step {index + 1} has {expected!r}, and the picture {shown}. {LOOK}"
        if each.id:
            notes = page.js(f"viewer.views[0].replay.lives.get({json.dumps(each.id)}).events.map(each => each.what)")
            expected = f"has got the KV of {each.num_tokens} tokens {lanes[each.kind]}"
            assert expected in notes, f"request {each.id}: expected {expected!r} among {notes}. {LOOK}"


def test_two_traces_side_by_side(page: Page) -> None:
    static, continuous = SAMPLES[0], SAMPLES[1]
    open_trace(page, static)
    open_trace(page, continuous, place=1)
    assert page.js("document.querySelectorAll('.engine').length") == 2, LOOK
    titles = page.js(
        "[...document.querySelectorAll('h2')].filter(each => each.offsetParent).map(each => each.textContent)"
    )
    assert [title.split(":")[0] for title in titles] == ["Part 3", "Part 4"], titles
    page.press("ArrowRight")
    assert page.js("viewer.views.map(view => view.index)") == [1, 1]
    page.js("$('align').value = 'time'; $('align').dispatchEvent(new Event('change'))")
    page.js("show(lastPlace() / 2)")
    starts = page.js("viewer.views.map(view => view.step.start_s * 1e3 <= viewer.place)")
    assert starts == [True, True], f"by time, steps have begun at that time. {LOOK}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no complete line"), ("hello\n", "JSON"), ('{"a": 1}\n', 'no "trace": 1'),
        ('{"trace": 1, "part": "part04_x", "model": "tiny"}\n', "no steps yet"),
        ('{"trace": 1}\n', "line 1: this is not a trace"), ("null\n", "line 1: this is not a trace"),
        ('{"trace": 1, "part": "part04_x", "model": "tiny"}\n\n', "line 2: "),
        ('{"trace": 1, "part": "part04_x", "model": "tiny"}\n{"a": 1}\n', "line 2: this is not a step"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_trace(content: str, message: str, page: Page, tmp_path: Path) -> None:
    (tmp_path / "wrong.jsonl").write_text(content)
    page.choose("#first-file", tmp_path / "wrong.jsonl")
    page.until("!$('error').hidden", "an error")
    assert page.text("#error").startswith("wrong.jsonl: ") and message in page.text("#error"), page.text("#error")


@pytest.mark.parametrize("field", ["requests", "ranks", "transfers"])
@pytest.mark.parametrize("value", [None, [None], [{}]])
def test_a_step_that_is_damaged(field: str, value: object, page: Page, tmp_path: Path) -> None:
    header, first, *_ = SAMPLES[1].read_text().splitlines()
    damaged = json.dumps({**json.loads(first), field: value})
    (tmp_path / "wrong.jsonl").write_text(f"{header}\n{first}\n{damaged}\n")
    page.choose("#first-file", tmp_path / "wrong.jsonl")
    page.until("!$('error').hidden", "an error")
    assert page.text("#error") == "wrong.jsonl: line 3: this is not a step of a trace"


def test_two_files_dropped_at_once(page: Page) -> None:
    """What is wrong with the first one is still said when the second one is shown."""
    for second, expected in (("part05", ["part05"]), ("part06", ["part05", "part06"])):
        page.js(
            f"""(() => {{
              const dataTransfer = new DataTransfer();
              dataTransfer.items.add(new File(["no trace\\n"], "first"));
              dataTransfer.items.add(new File([{json.dumps(SAMPLES[2].read_text())}], "{second}"));
              document.dispatchEvent(new DragEvent("drop", {{dataTransfer}}));
            }})()"""
        )
        page.until(f"viewer.views.at(-1)?.replay.name === '{second}' && !$('error').hidden", "the second, and an error")
        assert page.text("#error").startswith("first: line 1: "), page.text("#error")
        assert page.js("viewer.views.map(view => view.replay.name)") == expected, LOOK


def test_an_incomplete_last_line_is_skipped(page: Page, tmp_path: Path) -> None:
    lines = SAMPLES[1].read_text().splitlines(keepends=True)
    (tmp_path / "growing.jsonl").write_text("".join(lines[:5]) + lines[5][:40])
    open_trace(page, tmp_path / "growing.jsonl")
    assert page.js("viewer.views[0].replay.steps.length") == 4
    assert "incomplete" in page.text("#error"), page.text("#error")


def test_ten_thousand_steps(page: Page, tmp_path: Path) -> None:
    write_long_trace(tmp_path / "long.jsonl", 10_000)
    open_trace(page, tmp_path / "long.jsonl")
    assert page.js("viewer.views[0].replay.steps.length") == 10_000
    for place in (9_999, 0, 5_000, 4_999, 7_123):
        page.js(f"show({place})")
        used = page.js("viewer.owners = new Set(viewer.views[0].owners.keys()).size")
        step = page.js("viewer.views[0].step.num_blocks_total - viewer.views[0].step.num_blocks_free")
        ended = page.js(
            "viewer.views[0].step.finished"
            ".reduce((sum, id) => sum + viewer.views[0].state.tables.get(id).blocks.length, 0)"
        )
        assert used == step + ended, f"step {place + 1}: {used} blocks have owners, not {step + ended}. {LOOK}"
    page.js("$('speed').value = '120'; show(0); setPlaying(true)")
    page.until("viewer.place > 60", "the replay to go on")
    page.js("setPlaying(false)")


def test_it_can_be_used_without_seeing_it(page: Page) -> None:
    open_trace(page, SAMPLES[1])
    controls = page.controls()
    for name in ("First step", "Step back", "Play", "Step forward", "Last step"):
        assert ("button", name) in controls, f"no button is called {name!r}: {controls}. {LOOK}"
    assert all(name for role, name in controls), f"controls without a name: {controls}. {LOOK}"
    labels = page.js("[...document.querySelectorAll('main canvas')].map(each => each.getAttribute('aria-label'))")
    assert len(labels) == 3 and all(labels), f"each picture says what it shows: {labels}. {LOOK}"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_phones_and_screens(scheme: str, width: int, page: Page) -> None:
    page.show_as(scheme, width)
    open_trace(page, SAMPLES[1])
    page.press("End")
    assert page.js("document.documentElement.scrollWidth") <= width, f"{width} px: it scrolls sideways. {LOOK}"


def test_a_live_engine(browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page at /engine shows each step as it comes, and begins again when the file does."""
    monkeypatch.setattr(files, "MAX_LIVE_BYTES", 20_000)
    app, rows = FastAPI(), read_trace(SAMPLES[1]).steps
    add_error_handlers(app)
    viewer = Viewer(tmp_path, "secret")
    viewer.add_to(app)
    app.state.end_requests = lambda: None
    path = tmp_path / LIVE_NAME
    with (
        TraceWriter(path, part="part04_continuous_batching", model="tiny") as writer,
        running_app(app) as url,
    ):
        page = browser.open(f"{url}/engine")
        page.until("!$('key-form').hidden", "a question for the API key")
        page.click("#key")
        page.type("secret")
        page.press("Enter")
        page.until("$('error').textContent.includes('not computed a step yet')", "a word that there is no step yet")
        page.press("ArrowRight")
        page.js("dispatchEvent(new Event('resize'))")
        assert page.js("$('controls').hidden"), f"there is nothing to step through. {LOOK}"

        def write(row: StepTrace) -> None:
            writer.write(msgspec.structs.replace(row, start_s=writer.elapsed_s()))

        for row in rows[:5]:
            write(row)
        page.until("viewer.views[0]?.replay.steps.length === 5", "the first five steps")
        page.until("viewer.views[0].index === 4", f"the page to follow the engine. {LOOK}")
        page.press("ArrowLeft")
        write(rows[5])
        page.until("viewer.views[0].replay.steps.length === 6", "a sixth step")
        assert page.js("viewer.views[0].index") == 3, f"whoever looks at a step stays there. {LOOK}"
        for row in [row for _ in range(20) for row in rows]:
            write(row)
        page.until("viewer.views[0].replay.steps.length > 6 && $('error').hidden", "more steps")
        until(lambda: path.stat().st_size > files.MAX_LIVE_BYTES, "the file to be full")
        write(rows[6])  # the last one in the full file
        write(rows[0])
        page.until(
            "viewer.views[0].replay.header.restarts === 1 && viewer.views[0].replay.steps.length === 1",
            f"the page to begin again with the file. {LOOK}",
        )
        page.press("End")
        other = browser.open(f"{url}/engine")
        other.click("#key")
        other.type("secret")
        other.press("Enter")
        other.until("viewer.views[0]?.replay.steps.length", "steps")
        open_trace(other, SAMPLES[0])
        write(rows[1])
        page.until("viewer.views[0].index === viewer.views[0].replay.steps.length - 1", "the last step")
        assert other.text("#where").startswith("step 1 of"), f"an opened file stays where it is: {other.text('#where')}"
        viewer.end()
        page.until("!$('error').hidden", "the page to notice the end")
        assert "server has ended" in page.text("#error"), page.text("#error")
        assert page.problems() == [], page.problems()
