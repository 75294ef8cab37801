"""Part 4 as a user starts it: it serves, SIGTERM lets open streams finish, and the trace is complete."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from common.trace import read_trace
from part04_continuous_batching import config
from tests.process_checks import check_loading_starts_no_helpers, course_environment, serve

PART_DIR = Path(config.__file__).parent
COMPLETIONS = "/v1/completions"
LOOK = 'Look at __main__.py and common/serve.py; README "What you will see".'
LOOK_DRAIN = 'Look at api/async_engine.py::AsyncLLM.shutdown and common/serve.py; README "Between two threads".'
READY = r"serving tiny on http://127\.0\.0\.1:(?P<port>\d+) \(cpu, context of 300 tokens, 40 KV blocks of 8 tokens\)\n"


def test_it_serves_drains_and_leaves_a_complete_trace(tmp_path: Path) -> None:
    trace_path, errors_path = tmp_path / "trace.jsonl", tmp_path / "stderr"
    flags = ["--port", "0", "--device", "cpu", "--max-model-len", "300", "--block-size", "8", "--num-kv-blocks", "41"]
    command = ["-m", PART_DIR.name, *flags, "--trace", str(trace_path)]
    with serve(command, READY, errors_path, PART_DIR.parent, course_environment(PART_DIR), LOOK) as server:
        assert len(server.lines) == 1, f"one line on stdout only, got {server.lines}. {LOOK}"
        ask = {"temperature": 0, "ignore_eos": True}
        whole = server.post(COMPLETIONS, {**ask, "prompt": [5] * 7, "max_tokens": 4})
        assert whole.status_code == 200 and whole.json()["usage"]["completion_tokens"] == 4, f"{whole.text}. {LOOK}"
        body = {**ask, "prompt": [6] * 10, "max_tokens": 100, "stream": True}
        server.check_finishes_a_stream_after_sigterm(COMPLETIONS, body, LOOK_DRAIN)
    assert errors_path.read_text() == "", f"stderr: {errors_path.read_text()!r}. {LOOK_DRAIN}"
    trace = read_trace(trace_path)
    finished = [request_id for step in trace.steps for request_id in step.finished]
    assert (trace.note, trace.header["part"], len(finished)) == (None, PART_DIR.name, 2), (
        f"both requests have ended, and the trace says {finished}, {trace.note}, {trace.header}. "
        'Look at core/step_tracer.py::StepTracer.close and api/async_engine.py::AsyncLLM._run; README "What you will see".'  # noqa: E501
    )
    num_tokens = sum(request.num_scheduled for step in trace.steps for request in step.requests)
    assert num_tokens == (7 + 4 - 1) + (10 + 100 - 1), f"expected 10 + 109 tokens computed, got {num_tokens}. {LOOK}"
    assert trace.steps[-1].num_blocks_free == trace.steps[-1].num_blocks_total == 40, f"got {trace.steps[-1]}. {LOOK}"


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_loading_leaves_the_processor_to_the_engines_thread() -> None:
    check_loading_starts_no_helpers(PART_DIR, "Look at __main__.py::serve and common/serve.py::single_threaded.")
