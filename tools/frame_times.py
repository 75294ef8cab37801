"""Measure the engine viewer with a trace of 10,000 steps: python -m tools.frame_times. Needs Chromium.

Writes results/viewer.json: how long the trace takes to load, and how long it takes from a step forward, or a jump to
any step, until the browser has painted the frame.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from common.results import write_result
from common.stats import percentile
from tests.chromium import Page, running_chromium
from tests.common.long_traces import write_long_trace

ROOT = Path(__file__).parents[1]
NUM_STEPS, NUM_FRAMES = 10_000, 300
PAINTED = "new Promise(done => requestAnimationFrame(() => setTimeout(done)))"  # the frame that is due next


def frame_times(page: Page, places: str) -> dict[str, float]:
    """Milliseconds that the page's own code takes to draw a step, and until the frame is painted. The latter includes
    the wait for the screen. places: a list of steps, in JavaScript."""
    drawn, painted = page.js(
        f"""(async () => {{
          const painted = [];
          viewer.frameTimes.length = 0;
          for (const place of {places}) {{
            await {PAINTED};
            const began = performance.now();
            show(place);
            await {PAINTED};
            painted.push(performance.now() - began);
          }}
          return [viewer.frameTimes, painted];
        }})()"""
    )
    times = {"drawn": drawn, "painted": painted}
    return {f"{name}_p{q}_ms": round(percentile(each, q), 1) for name, each in times.items() for q in (50, 99)}


def measure(directory: Path) -> dict[str, Any]:
    path = directory / "long.jsonl"
    write_long_trace(path, NUM_STEPS)
    with running_chromium(directory / "profile") as browser:
        page = browser.open((ROOT / "common" / "pages" / "engine.html").as_uri())
        page.show_as("light", 1280, 900)
        began = time.perf_counter()
        page.choose("#first-file", path)
        page.until(f"viewer.views[0]?.replay.steps.length === {NUM_STEPS}", "the trace to be loaded")
        load_s = time.perf_counter() - began
        forward = frame_times(page, f"[...Array({NUM_FRAMES}).keys()].map(each => {NUM_STEPS // 2} + each)")
        jump = frame_times(page, f"[...Array({NUM_FRAMES}).keys()].map(each => each * 7919 % {NUM_STEPS})")
    return {"load_s": round(load_s, 2), "step": forward, "jump": jump}


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        found = measure(Path(directory))
    print(found)
    write_result(
        ROOT / "results" / "viewer.json", benchmark="viewer", config={"num_steps": NUM_STEPS, "num_slots": 16}, seed=0,
        repeats=NUM_FRAMES, measurements=found,
    )  # fmt: skip


if __name__ == "__main__":
    main()
